"""Warnings come where something is wrong, say what to do, and stay away from a quiet run."""

from typing import Any

import numpy as np

from squeeze.report.noise import warnings
from squeeze.report.schema import ChildRun


def child(**changes: Any) -> ChildRun:
    fields: dict[str, Any] = {
        "purpose": "latency", "artifact": "a", "runtime": "torch", "threads": 1, "repeat": 0, "started": 0.0, "seconds": 10.0,
        "cpu_seconds": 9.0, "others": 0.0, "stolen": 0.0,
    }  # fmt: skip
    return ChildRun(**{**fields, **changes})


def steady(repeats: int = 10, calls: int = 6) -> tuple[list[float], tuple[int, ...]]:
    rng = np.random.default_rng(0)
    values = (1 + rng.normal(0, 0.01, repeats * calls)).tolist()
    return values, tuple(int(n) for n in np.repeat(np.arange(repeats), calls))


def test_a_quiet_run_has_no_warning(make: Any) -> None:
    values, repeat = steady()
    rows = make.measured(make.source, "latency", values, repeat=repeat)
    assert warnings(make.report(rows, children=(child(), child(others=None, stolen=None)))) == []


def test_busy_neighbours_are_named_with_the_mend(make: Any) -> None:
    busy = make.report(
        children=(child(others=0.3), child(others=0.1, stolen=0.1), child(purpose="quality", others=1.0))
    )
    told = warnings(busy)
    assert told[0].startswith("other programs of this machine used 20\u00a0% of the cores")
    assert "close them" in told[0]
    assert told[1].startswith("other guests of the same host used 5\u00a0%")


def test_stalls_drift_and_short_warm_up_are_told_apart(make: Any) -> None:
    values, repeat = steady()
    stalled = [*values[:-1], 9.0]
    assert "1 of 60 calls took over 3 times the median" in warnings(
        make.report(make.measured(make.source, "latency", stalled, repeat=repeat))
    )[0]  # fmt: skip
    drifting = [value * (1 + 0.1 * number) for value, number in zip(values, repeat, strict=True)]
    (told,) = warnings(make.report(make.measured(make.source, "latency", drifting, repeat=repeat)))
    assert "became steadily slower" in told
    cold = [value * (1.5 if n % 6 == 0 else 1) for n, value in enumerate(values)]
    (told,) = warnings(make.report(make.measured(make.source, "latency", cold, repeat=repeat)))
    assert "warm-up is too short: raise bench.warmup_seconds" in told
