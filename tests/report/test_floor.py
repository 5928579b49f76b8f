"""Floors worked by hand: bytes over bandwidth, operations over rate, the larger of both."""

from typing import Any

import pytest

from squeeze.report.floor import bandwidth_at, cost_rows, floors
from squeeze.report.schema import Bandwidth, Ceilings, Cost, Workload

CEILINGS = Ceilings(
    threads=2, measured="2026-11-24T00:00:00+00:00", operations={"float32": 1e9, "int8": 4e9},
    bandwidth=(Bandwidth(working_set=100, bytes_per_second=1e6), Bandwidth(working_set=10_000, bytes_per_second=1e5)),
)  # fmt: skip


def cost(make: Any, **changes: Any) -> Cost:
    fields: dict[str, Any] = {
        "artifact": "export-1-quantize", "artifact_digest": make.result.digest, "parameters": 10, "weight_bytes": 100, "read_bytes": 100,
        "operations_per_token": 2e6, "operations_per_pair": 1e3, "cache_bytes_per_token": None, "arithmetic": "float32",
    }  # fmt: skip
    return Cost(**{**fields, **changes})


def test_bandwidth_is_read_off_between_working_sets_and_held_beyond_them() -> None:
    assert [bandwidth_at(CEILINGS, size) for size in (1, 100, 10_000, 1e9)] == [1e6, 1e6, 1e5, 1e5]
    assert bandwidth_at(CEILINGS, 1000) == pytest.approx(5.5e5)


def test_an_encoder_is_bound_by_operations_of_its_own_arithmetic(make: Any) -> None:
    work = Workload(kind="fixed", batch=2, sequence=10)
    rows = [make.measured(make.result, "latency", [0.1, 0.1, 0.1], workload=work)]
    operations = 2 * (2e6 * 10 + 1e3 * 100)
    for arithmetic, rate in (("float32", 1e9), ("int8", 4e9)):
        (row,) = floors(make.report(*rows, ceilings=CEILINGS, costs=(cost(make, arithmetic=arithmetic),)))
        assert row.floor == pytest.approx(operations / rate)
        assert (row.bound, row.share) == (f"{arithmetic} operations", pytest.approx(operations / rate / 0.1))


def test_a_decoding_step_is_bound_by_its_weights(make: Any) -> None:
    work = Workload(kind="generate", batch=1, prompt=8, new_tokens=4)
    rows = [make.measured(make.result, "time_per_output_token", [0.5, 0.5, 0.5], workload=work)]
    (row,) = floors(make.report(*rows, ceilings=CEILINGS, costs=(cost(make, read_bytes=10_000),)))
    assert (row.floor, row.bound, row.share) == (pytest.approx(0.1), "memory", pytest.approx(0.2))
    assert row.cells[2:] == ("500\u00a0ms", "100\u00a0ms", "memory", "20\u00a0%")


def test_what_is_not_known_has_no_floor(make: Any) -> None:
    work = Workload(kind="fixed", batch=1, sequence=8)
    timed = make.measured(make.result, "latency", [0.1], workload=work)
    assert floors(make.report(timed, costs=(cost(make),))) == [], "no ceilings"
    assert floors(make.report(timed, ceilings=CEILINGS)) == [], "no cost"
    foreign = cost(make, operations_per_token=None, operations_per_pair=None, read_bytes=None)
    assert floors(make.report(timed, ceilings=CEILINGS, costs=(foreign,))) == [], "another tool's file"
    assert cost_rows([foreign])[0][3] == "unknown"
    on_gpu = timed.model_copy(update={"device": "cuda"})
    assert floors(make.report(on_gpu, ceilings=CEILINGS, costs=(cost(make),))) == []
    unknown = cost(make, operations_per_token=None, operations_per_pair=None)
    (row,) = floors(make.report(timed, ceilings=CEILINGS, costs=(unknown,)))
    assert row.bound == "memory"
    assert cost_rows([unknown])[0][4] == "unknown"
