"""A self-check of equal sides rarely sees a difference, of unequal ones nearly always, and it says how small a one it could see."""

from typing import Any

import numpy as np
import pytest

from squeeze.report.self_check import self_checks, verdict

NOISE, REPEATS = 0.02, 20


def share_of_differences(make: Any, slower: float, runs: int = 200) -> float:
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(runs):
        drift = np.cumsum(rng.normal(0, NOISE, REPEATS))
        sides = (np.exp(drift + rng.normal(0, NOISE, REPEATS)) * factor for factor in (1, slower))
        (row,) = self_checks(make.pair("latency", *(side.tolist() for side in sides)))
        found += row.differs
    return found / runs


def test_equal_sides_differ_about_one_time_in_twenty_though_the_machine_drifts(make: Any) -> None:
    assert 0.005 <= share_of_differences(make, 1.0) <= 0.09


def test_a_slow_down_twice_the_noise_is_nearly_always_found(make: Any) -> None:
    assert share_of_differences(make, 1.05) > 0.97


def test_the_smallest_difference_that_is_told_is_found_nine_times_in_ten(make: Any) -> None:
    rng = np.random.default_rng(1)
    resolves = np.median(
        [
            self_checks(make.pair("latency", *np.exp(rng.normal(0, NOISE, (2, REPEATS))).tolist()))[0].resolves
            for _ in range(50)
        ]
    )
    assert 0.8 <= share_of_differences(make, 1 + float(resolves)) <= 0.97


def test_several_workloads_are_judged_together(make: Any) -> None:
    rng = np.random.default_rng(2)
    works = [make.short.model_copy(update={"sequence": n}) for n in range(1, 6)]
    alarms = 0
    for _ in range(60):
        rows = [
            make.measured(side, "latency", np.exp(rng.normal(0, NOISE, REPEATS)).tolist(), workload=work)
            for side in (make.source, make.result)
            for work in works
        ]
        found = self_checks(make.report(*rows))
        assert len(found) == 5
        alarms += any(row.differs for row in found)
    assert alarms <= 9, "of 60 checks of five workloads each, a twentieth is 3"


def test_the_verdict_is_in_words(make: Any) -> None:
    text = verdict(make.pair("latency", [1.0, 1.1] * 5, [1.1, 1.0] * 5))
    assert text.startswith("latency, 1×128: no difference is reported: 1.00× [0.")
    assert "from 10 paired repeats; such a bench finds differences from about" in text
    assert verdict(make.report()) == "Nothing was measured twice, so nothing is known of this machine."


@pytest.mark.parametrize("count", [1, 7])
def test_too_few_repeats_claim_nothing(count: int, make: Any) -> None:
    (row,) = self_checks(make.pair("latency", [1.0] * count, [9.0] * count))
    assert not row.differs
    assert row.resolves == float("inf")
