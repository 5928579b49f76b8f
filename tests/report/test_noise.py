"""Warnings come where something is wrong, say what to do, and stay away from a quiet run."""

from typing import Any

import numpy as np

from squeeze.report.noise import warnings
from squeeze.report.schema import Bandwidth, Ceilings, ChildRun, Cost, Workload


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


def test_a_cell_that_beats_its_floor_shows_the_ceilings_to_be_too_low(make: Any) -> None:
    work = Workload(kind="fixed", batch=1, sequence=1)
    ceilings = Ceilings(
        threads=2,
        measured="2026-11-25",
        operations={"float32": 1e9},
        bandwidth=(Bandwidth(working_set=1, bytes_per_second=1e12),),
    )
    cost = Cost(
        artifact="export-1-quantize", artifact_digest=make.result.digest, parameters=10, weight_bytes=40, read_bytes=40,
        operations_per_token=1e9, operations_per_pair=0, cache_bytes_per_token=None, arithmetic="float32",
    )  # fmt: skip

    def told(seconds: float) -> list[str]:
        rows = make.measured(make.result, "latency", [seconds] * 5, workload=work)
        return warnings(make.report(rows, ceilings=ceilings, costs=(cost,)))

    assert told(1.0) == told(0.97) == []
    (text,) = told(0.5)
    assert text.startswith(
        "1 cell beat what this machine can do (latency, 1×1 of export-1-quantize in onnxruntime reached 200\u00a0%)"
    )
    assert "squeeze bench machine --again" in text
