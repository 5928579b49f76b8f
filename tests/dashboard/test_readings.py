"""One report as the dashboard reads it: keys that are one artifact's alone, and intervals that are those of the statistics."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squeeze.dashboard.readings import Readings, bounds, by_repeat, finite, thinned
from squeeze.provenance import digest_bytes
from squeeze.report import stats
from squeeze.report.compare import compare


def read(report: Any) -> Readings:
    return Readings("0" * 12, report)


def test_every_artifact_has_a_key_of_its_own_that_is_safe_to_show(make: Any) -> None:
    names = ("a|b", "a|b", "x\u202ey", "a¦b")
    manifests = [make.manifest(name, inputs=digest_bytes(str(n).encode())) for n, name in enumerate(names)]
    stray = make.manifest("stray")
    found = read(make.report(manifests, [make.measured(stray, "latency", [1.0])]))
    keys = list(found.keys.values())
    assert len(set(keys)) == 5
    assert not [key for key in keys if "|" in key or "\u202e" in key]
    assert keys[2] == "x\\u202ey"
    assert keys[4] == "stray", "what was measured without a manifest is there, too"
    assert found.measured == ["stray"]
    assert [reading.m.artifact for reading in found.all] == ["stray"]


def test_ends_are_keys(make: Any) -> None:
    full = read(make.full())
    assert full.ends == ("0-source", "2-broken")
    assert read(make.report((), ())).ends == ("", "")


def test_the_interval_of_repeats_is_student_t_of_their_logarithms(make: Any) -> None:
    m = make.measured(make.manifest("a"), "latency", [1.0, 2.0, 4.0])
    found = read(make.report([make.manifest("a")], [m])).all[0].value
    half = 4.303 * math.log(2) / math.sqrt(3)
    assert found.value == 2.0
    assert (found.low, found.high) == pytest.approx((2 * math.exp(-half), 2 * math.exp(half)))
    assert found.n == 3


def test_calls_of_one_repeat_count_once(make: Any) -> None:
    m = make.measured(make.manifest("a"), "latency", [1.0] * 30 + [2.0] * 30, repeat=(0,) * 30 + (1,) * 30)
    found = read(make.report([make.manifest("a")], [m])).all[0]
    assert (found.value.value, found.value.n) == (1.5, 2)
    assert math.isnan(found.value.low)
    assert found.words == "1.50\u00a0s", "two repeats have no interval"


def test_intervals_of_shares_perplexities_and_counts(make: Any) -> None:
    source = make.manifest("a")
    rows = [
        make.measured(source, "correct", [1.0] * 90 + [0.0] * 10, unit="", repeat=()),
        make.measured(
            source, "negative_log_likelihood", [20.0, 30.0, 25.0, 22.0], unit="nats", weights=(10.0,) * 4, repeat=()
        ),
        make.measured(source, "weight_bytes", [4000.0], unit="bytes", repeat=()),
        make.measured(source, "answer", [3.0, 1.0], unit="", repeat=()),
    ]
    share, perplexity, counted, answer = read(make.report([source], rows)).all
    assert share.value == stats.share([1.0] * 90 + [0.0] * 10)
    assert share.interval == "[82.56\u00a0%, 94.48\u00a0%]"
    assert perplexity.value.value == pytest.approx(math.exp(97 / 40))
    assert math.exp(2.0) <= perplexity.value.low < perplexity.value.value < perplexity.value.high <= math.exp(3.0)
    assert (counted.text, counted.interval) == ("4.00\u00a0kB", "")
    assert (answer.text, finite(answer.value.value)) == ("", None), "a median of class ids says nothing"


def test_what_failed_has_no_value(make: Any) -> None:
    found = read(make.report([make.manifest("a")], [make.measured(make.manifest("a"), "latency", [])])).all[0]
    assert (finite(found.value.value), found.text, found.m.error) == (None, "", "killed by SIGKILL")


def test_derived_readings_have_no_number_and_the_others_have_their_place(make: Any) -> None:
    found = read(make.full())
    numbers = [reading.number for reading in found.all if reading.number >= 0]
    assert numbers == list(range(len(found.report.measurements)))
    derived = {reading.m.quantity for reading in found.all if reading.number < 0}
    assert derived == {"memory_above_baseline", "request_p50", "request_p90", "request_p95", "request_p99"}


def test_series_tell_what_the_report_varies_and_no_more(make: Any) -> None:
    source = make.manifest("a")
    one, two = make.measured(source, "latency", [1.0]), make.measured(source, "latency", [1.0], threads=1)
    assert read(make.report([source], [one])).series(one) == "a, torch"
    assert read(make.report([source], [one, two])).series(two) == "a, torch, 1 threads"


def test_one_value_a_repeat_says_the_same_of_every_pair(make: Any) -> None:
    found = read(make.full())
    assert any(
        len(lean.values) < len(m.values)
        for lean, m in zip(found.lean.measurements, found.report.measurements, strict=True)
    )
    chosen = {"before_artifact": "0-source", "after_artifact": "1-quantize"}
    assert compare(found.lean, found.lean, **chosen) == compare(found.report, found.report, **chosen)


def test_requests_and_examples_are_never_reduced(make: Any) -> None:
    source = make.manifest("a")
    for quantity in ("request_latency", "correct", "negative_log_likelihood"):
        m = make.measured(source, quantity, [1.0, 2.0, 3.0, 4.0], repeat=(0, 0, 1, 1))
        assert by_repeat(m) is m


def test_an_interval_is_told_in_the_terms_of_its_quantity() -> None:
    of = stats.Interval
    assert bounds(of(0.5, 0.4, 0.6, 3), "correct", "") == "[40.00\u00a0%, 60.00\u00a0%]"
    assert bounds(of(5e7, 4e7, 6e7, 3), "peak_memory", "bytes") == "[40.0\u00a0MB, 60.0\u00a0MB]"
    assert bounds(of(14.0, 13.0, 15.0, 3), "negative_log_likelihood", "nats") == "[13.00, 15.00]"
    assert bounds(of(1.0, math.nan, math.nan, 1), "latency", "s") == ""


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.integers(2, 60))
def test_a_thinned_distribution_holds_raw_values_at_their_true_shares(values: list[float], most: int) -> None:
    found = thinned(values, most)
    assert len(found) == len(values) if len(values) <= most else len(found) <= most
    ordered = sorted(values)
    assert found[0][0] == ordered[0]
    assert found[-1] == (ordered[-1], 1.0)
    for value, share in found:
        assert ordered[round(share * len(values)) - 1] == value
    assert found == sorted(found)
