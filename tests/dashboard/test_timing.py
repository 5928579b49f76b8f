"""Rows about speed: gains that are the summary's, every raw latency, percentiles, prompts and load."""

from typing import Any

import numpy as np

from squeeze.dashboard import timing
from squeeze.dashboard.readings import Readings
from squeeze.report.schema import Workload
from squeeze.report.summary import summarize

SHORT = Workload(kind="fixed", batch=1, sequence=128)


def read(make: Any, report: Any) -> Readings:
    return Readings("0" * 12, report)


def test_gains_are_those_of_the_summary_for_each_artifact(make: Any) -> None:
    report = make.full()
    found = timing.gains(read(make, report))
    assert list(found) == ["2-broken", "1-quantize"], "the result first"
    rows = summarize(report, report.manifests[1])
    assert [row["label"] for row in found["1-quantize"].rows] == [row.label for row in rows]
    for drawn, row in zip(found["1-quantize"].rows, rows, strict=True):
        assert row.gain is not None
        assert drawn["ratio"] == row.gain.value
        assert drawn["verdict"] == row.verdict
        assert drawn["line"] == f"{row.change}: {row.verdict}"
        assert drawn["sense"] == timing.SENSES[row.sense]


def test_a_gain_leads_to_the_measurement_after(make: Any) -> None:
    readings = read(make, make.full())
    row = next(row for row in timing.gains(readings)["1-quantize"].rows if row["label"] == "latency, 1×128")
    cell = readings.report.measurements[int(row["cell"] or 0)]
    assert (cell.artifact, cell.quantity, cell.workload) == ("1-quantize", "latency", SHORT)


def test_what_failed_is_a_row_with_its_reason_and_no_ratio(make: Any) -> None:
    rows = timing.gains(read(make, make.full()))["2-broken"].rows
    assert [(row["ratio"], row["sense"], row["line"]) for row in rows] == [
        (None, "failed", "not measured for the result: killed by SIGKILL")
    ]


def test_an_artifact_alone_has_no_gain(make: Any) -> None:
    source = make.manifest("a")
    assert (
        timing.gains(read(make, make.report([source], [make.measured(source, "latency", [1.0] * 3, workload=SHORT)])))
        == {}
    )


def test_every_latency_is_a_mark_and_the_share_counts_up_to_all(make: Any) -> None:
    source = make.manifest("a")
    values = [0.3, 0.1, 0.2, 0.2]
    rows = timing.latency(
        read(make, make.report([source], [make.measured(source, "latency", values, workload=SHORT)]))
    )["latency, 1×128"].rows
    drawn = [(row["x"], row["y"]) for row in rows if row["mark"] == "value"]
    assert drawn == [(0.1, 0.25), (0.2, 0.5), (0.2, 0.75), (0.3, 1.0)]
    marked = {row["mark"]: row["x"] for row in rows if row["mark"] != "value"}
    assert marked == {f"p{p}": np.quantile(values, p / 100) for p in (50, 95, 99)}
    assert (rows[0]["note"], rows[0]["cell"]) == ("4 calls", 0)


def test_ten_thousand_calls_are_drawn_at_even_ranks_and_the_chart_says_so(make: Any) -> None:
    source, other = make.manifest("a"), make.manifest("b", parameters=7)
    values = np.random.default_rng(0).lognormal(size=10_000).tolist()
    measured = [make.measured(m, "latency", values, workload=SHORT, repeat=(0,) * 10_000) for m in (source, other)]
    rows = timing.latency(read(make, make.report([source, other], measured)))["latency, 1×128"].rows
    drawn = [row for row in rows if row["mark"] == "value"]
    assert len(drawn) == timing.MOST_VALUES
    assert rows[0]["note"] == "1,000 of 10,000 calls drawn"
    assert {row["x"] for row in drawn} <= set(values)
    assert (drawn[0]["x"], drawn[-1]["x"]) == (min(values), max(values))
    p99 = next(row["x"] for row in rows if row["mark"] == "p99")
    assert p99 == np.quantile(values, 0.99), "percentiles are those of all calls, not of those drawn"


def test_requests_of_load_tests_have_a_distribution_too(make: Any) -> None:
    found = timing.latency(read(make, make.full()))
    assert "request latency, 4 callers, real texts" in found


def test_generation_is_by_prompt_length_with_its_interval(make: Any) -> None:
    found = timing.generation(read(make, make.full()))
    assert list(found) == ["time to the first token", "time for each later token"]
    rows = found["time to the first token"].rows
    assert [(row["artifact"], row["x"]) for row in rows] == [
        ("0-source", 32),
        ("0-source", 128),
        ("1-quantize", 32),
        ("1-quantize", 128),
    ]
    assert all(row["low"] <= row["y"] <= row["high"] for row in rows)  # type: ignore[operator]
    assert rows[1]["y"] == 0.2


def test_other_lengths_and_batches_are_other_lines(make: Any) -> None:
    source = make.manifest("a")
    works = [Workload(kind="generate", batch=b, prompt=8, new_tokens=n) for b, n in ((1, 16), (1, 64), (4, 16))]
    report = make.report([source], [make.measured(source, "time_to_first_token", [1.0] * 3, workload=w) for w in works])
    series = {row["series"] for row in timing.generation(read(make, report))["time to the first token"].rows}
    assert series == {"a, torch, 16 new tokens", "a, torch, 64 new tokens", "a, torch, 16 new tokens, 4 texts at once"}


def test_load_holds_throughput_against_the_99th_percentile_of_the_same_test(make: Any) -> None:
    readings = read(make, make.full())
    rows = timing.load(readings)["all load tests"].rows
    assert [(row["artifact"], row["callers"]) for row in rows] == [
        ("0-source", 1),
        ("0-source", 4),
        ("1-quantize", 1),
        ("1-quantize", 4),
    ]
    p99 = next(
        r
        for r in readings.of("request_p99")
        if r.m.artifact == "1-quantize" and r.m.workload and r.m.workload.callers == 4
    )
    assert (rows[3]["y"], rows[3]["y_text"]) == (p99.value.value, p99.words)
    assert all(row["joined"] for row in rows)


def test_a_rate_that_requests_arrive_at_is_joined_with_nothing_and_shows_its_limit(make: Any) -> None:
    source = make.manifest("a")
    work = Workload(kind="open", batch=1, callers=2, limit_seconds=0.05)
    rows = [make.measured(source, q, [1.0, 1.1, 1.2], workload=work) for q in ("throughput", "request_latency")]
    found = timing.load(read(make, make.report([source], rows)))["all load tests"].rows[0]
    assert (found["joined"], found["limit"], found["limit_text"], found["kind"]) == (
        False,
        0.05,
        "50.0\u00a0ms",
        "arriving at a rate",
    )


def test_a_failed_load_test_is_no_point(make: Any) -> None:
    source = make.manifest("a")
    work = Workload(kind="closed", batch=1, callers=2)
    rows = [
        make.measured(source, "throughput", [1.0] * 3, workload=work),
        make.measured(source, "request_latency", [], workload=work),
    ]
    assert timing.load(read(make, make.report([source], rows))) == {}
