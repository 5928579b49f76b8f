"""From what children said to the measurements of a report: every raw value, or the reason why there is none."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from squeeze.benchmark.cells import Cell, Prepared
from squeeze.benchmark.child import Outcome
from squeeze.evaluate import Outputs, quality
from squeeze.report.schema import Measurement, Workload
from squeeze.tasks import positions

QUANTITIES = {
    "fixed": (("latency", "s"),),
    "dataset": (("set_time", "s"),),
    "generate": (("time_to_first_token", "s"), ("time_per_output_token", "s"), ("decode_rate", "tokens/s")),
    "closed": (("request_latency", "s"), ("throughput", "requests/s")),
    "open": (("request_latency", "s"), ("throughput", "requests/s")),
}
SOUGHT = (("highest_rate", "requests/s"),)
WARMED = ("latency", "set_time", "time_to_first_token")
GENERATED = {"time_to_first_token": "first_token", "time_per_output_token": "per_token", "decode_rate": "rate"}


def quality_rows(cell: Cell, outputs: Outputs | None, reference: Outputs | None, labels: Any) -> list[Measurement]:
    """What a scoring cell's outputs are worth; `reference` is None for the cell that the others are compared with."""
    if not cell.scores:
        return []
    if outputs is None:
        return [failed(cell, "quality", "", None, "quality")]
    return [made(cell, q.quantity, q.unit, q.values, weights=q.weights) for q in quality(outputs, labels, reference)]


def cell_rows(cell: Cell, prepared: Sequence[Prepared]) -> list[Measurement]:
    """All other measurements of one cell."""
    rows = _harness(cell)
    if cell.times:
        for work in prepared:
            rows += _work_rows(cell, work)
        rows += _resources(cell, [w for w in prepared if not w.is_load])
    return rows


def child_rows(
    cell: Cell, prepared: Sequence[Prepared], repeat: int, name: str, outcome: Outcome
) -> list[Measurement]:  # fmt: skip
    """What one child of a cell adds, as if it had been the only one: its values, or the quantities that it failed to measure."""
    alone = replace(cell, results=[], errors=[])
    alone.take(repeat, name, outcome)
    reason = alone.errors[0][1] if alone.errors else None
    return [row for row in cell_rows(alone, prepared) if row.values or row.error == reason]


def too_long(cell: Cell, prepared: Sequence[Prepared]) -> list[Measurement]:
    """The workloads that the model has no positions for, and why they are not measured."""
    return [row for work in prepared if cell.times and not cell.can_run(work) for row in _work_rows(cell, work)]


def _work_rows(cell: Cell, work: Prepared) -> list[Measurement]:
    described = work.described
    wanted = (*(SOUGHT if work.is_sought else ()), *QUANTITIES[described.kind])
    if not cell.can_run(work):
        reason = f"{described.label} is longer than the model's {positions(cell.artifact.config)} positions"
        return [made(cell, quantity, unit, (), described, error=reason) for quantity, unit in wanted]
    rows = _load_rows(cell, work) if work.is_load else _timings(cell, work)
    name = "load" if work.is_load else "latency"
    return rows or [failed(cell, quantity, unit, described, name) for quantity, unit in wanted]


def repeated(
    cell: Cell,
    quantity: str,
    unit: str,
    pairs: Sequence[tuple[int, float]],
    workload: Workload | None = None,
    **more: Any,
) -> Measurement:
    """A measurement from (repeat, value) pairs."""
    repeats = tuple(repeat for repeat, _ in pairs)
    return made(cell, quantity, unit, [float(value) for _, value in pairs], workload, repeat=repeats, **more)


def made(
    cell: Cell, quantity: str, unit: str, values: Sequence[float], workload: Workload | None = None, **more: Any
) -> Measurement:
    """A measurement of a cell with its values."""
    return Measurement(
        quantity=quantity, unit=unit, values=tuple(values), workload=workload, artifact=cell.artifact.name,
        artifact_digest=cell.artifact.digest, runtime=cell.runtime, device=cell.device, threads=cell.threads, dtype=cell.dtype,
        **more,
    )  # fmt: skip


def failed(cell: Cell, quantity: str, unit: str, workload: Workload | None, name: str) -> Measurement:
    """A measurement that there is none of, and why."""
    reasons = [reason for kind, reason in cell.errors if kind == name] or ["nothing was measured"]
    return made(cell, quantity, unit, (), workload, error=cell.blocked or reasons[0])


def _timings(cell: Cell, work: Prepared) -> list[Measurement]:
    """No rows where no child told of this workload."""
    described = work.described
    found: list[tuple[int, dict[str, Any]]] = [
        (repeat, timed)
        for repeat, result in cell.over_repeats("latency")
        for timed in result["workloads"]
        if timed["label"] == described.label
    ]
    rows = []
    for quantity, unit in QUANTITIES[described.kind] if found else ():
        column = GENERATED.get(quantity, "values")
        pairs = [(repeat, value) for repeat, timed in found for value in timed[column]]
        warm = tuple(w for _, timed in found for w in timed["warmups"]) if quantity in WARMED else ()
        rows.append(repeated(cell, quantity, unit, pairs, described, warmups=warm))
    return rows


def _load_rows(cell: Cell, work: Prepared) -> list[Measurement]:
    """No rows where no child told of this load test."""
    described = work.described
    found = [(r, result) for r, result in cell.over_repeats("load") if result["label"] == described.label]
    if not found:
        return []
    rows = []
    if work.is_sought:
        tried = "; ".join(", ".join(_trial(t) for t in result["trials"]) for _, result in found)
        note = f"99th percentiles of the trials of each repeat: {tried}"
        rates = [(r, result["highest_rate"]) for r, result in found]
        rows.append(repeated(cell, "highest_rate", "requests/s", rates, described, note=note))
    held = [(r, result) for r, result in found if result["values"]]
    if not held:
        why = "no rate that was tried kept the 99th percentile within the limit"
        return [*rows, *(made(cell, q, u, (), described, error=why) for q, u in QUANTITIES[described.kind])]
    each = [(r, value) for r, result in held for value in result["values"]]
    rows.append(repeated(cell, "request_latency", "s", each, described))
    rows.append(
        repeated(cell, "throughput", "requests/s", [(r, result["throughput"]) for r, result in held], described)
    )
    return rows


def _trial(trial: dict[str, Any]) -> str:
    ended = "given up" if trial["p99"] is None else f"{1e3 * trial['p99']:.3g} ms"
    return f"{trial['rate']:.3g}/s {ended}"


def _harness(cell: Cell) -> list[Measurement]:
    rows = [
        made(cell, f"{score['task']} {score['metric']}", "", score["values"])
        for _, result in cell.over_repeats("lm_eval")
        for score in result["scores"]
    ]
    if not rows and any(kind == "lm_eval" for kind, _ in cell.errors):
        rows.append(failed(cell, "lm-eval", "", None, "lm_eval"))
    return rows


def _resources(cell: Cell, prepared: Sequence[Prepared]) -> list[Measurement]:
    rows: list[Measurement] = []
    memory, latency = cell.over_repeats("memory"), cell.over_repeats("latency")
    for quantity in ("peak_memory", "baseline_memory", "steady_memory", "cuda_allocated", "cuda_reserved"):
        found = [(repeat, result[quantity]) for repeat, result in memory if quantity in result]
        if found:
            rows.append(repeated(cell, quantity, "bytes", found))
        elif not quantity.startswith("cuda") and any(kind == "memory" for kind, _ in cell.errors):
            rows.append(failed(cell, quantity, "bytes", None, "memory"))
    for quantity in ("load_time", "cold_latency"):
        if latency:
            rows.append(repeated(cell, quantity, "s", [(r, result[quantity]) for r, result in latency]))
    for work in prepared:
        label = work.described.label
        joules = [
            (r, result["joules"][label]) for r, result in cell.over_repeats("energy") if label in result["joules"]
        ]
        if joules:
            rows.append(repeated(cell, "energy", "J", joules, work.described))
    manifest = cell.artifact.manifest
    rows.append(made(cell, "weight_bytes", "bytes", [float(manifest.weight_bytes)]))
    rows.append(made(cell, "folder_bytes", "bytes", [float(sum(entry.bytes for entry in manifest.files.values()))]))
    return rows
