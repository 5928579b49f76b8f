"""From what children said to the measurements of a report: every raw value, or the reason why there is none."""

from collections.abc import Sequence
from typing import Any

from squeeze.benchmark.cells import Cell, Prepared
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
GENERATED = {"time_to_first_token": "first_token", "time_per_output_token": "per_token", "decode_rate": "rate"}


def cell_rows(
    cell: Cell, prepared: Sequence[Prepared], outputs: Outputs | None, reference: Outputs | None, labels: Any
) -> list[Measurement]:
    """All measurements of one cell; `reference` is None for the cell that the others are compared with."""
    rows: list[Measurement] = []
    if cell.scores:
        if outputs is None:
            rows.append(failed(cell, "quality", "", None, "quality"))
        else:
            for q in quality(outputs, labels, reference):
                rows.append(made(cell, q.quantity, q.unit, q.values, weights=q.weights))
    rows += _harness(cell)
    if cell.times:
        for work in prepared:
            rows += _load_rows(cell, work) if work.is_load else _timings(cell, work)
        rows += _resources(cell, [w for w in prepared if not w.is_load])
    return rows


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
    kind, described = work.described.kind, work.described
    if not cell.can_run(work):
        reason = f"{described.label} is longer than the model's {positions(cell.artifact.config)} positions"
        return [made(cell, quantity, unit, (), described, error=reason) for quantity, unit in QUANTITIES[kind]]
    found: list[tuple[int, dict[str, Any]]] = [
        (repeat, timed)
        for repeat, result in cell.over_repeats("latency")
        for timed in result["workloads"]
        if timed["label"] == described.label
    ]
    if not found:
        return [failed(cell, quantity, unit, described, "latency") for quantity, unit in QUANTITIES[kind]]
    rows = []
    for quantity, unit in QUANTITIES[kind]:
        column = GENERATED.get(quantity, "values")
        pairs = [(repeat, value) for repeat, timed in found for value in timed[column]]
        warm = tuple(w for _, timed in found for w in timed["warmups"]) if quantity in WARMED else ()
        row = made(
            cell, quantity, unit, [v for _, v in pairs], described, repeat=tuple(r for r, _ in pairs), warmups=warm
        )
        rows.append(row)
    return rows


def _trial(trial: dict[str, Any]) -> str:
    ended = "given up" if trial["p99"] is None else f"{1e3 * trial['p99']:.3g} ms"
    return f"{trial['rate']:.3g}/s {ended}"


WARMED = ("latency", "set_time", "time_to_first_token")


def _load_rows(cell: Cell, work: Prepared) -> list[Measurement]:
    described, sought = work.described, work.described.kind == "open" and work.described.rate is None
    wanted = (*(SOUGHT if sought else ()), *QUANTITIES[described.kind])
    found = [(r, result) for r, result in cell.over_repeats("load") if result["label"] == described.label]
    if not cell.can_run(work) or not found:
        reason = "longer than the model's positions" if not cell.can_run(work) else None
        return [
            made(cell, q, u, (), described, error=reason) if reason else failed(cell, q, u, described, "load")
            for q, u in wanted
        ]
    rows = []
    if sought:
        tried = "; ".join(", ".join(_trial(t) for t in result["trials"]) for _, result in found)
        note = f"99th percentiles of the trials of each repeat: {tried}"
        rates = [result["highest_rate"] for _, result in found]
        rows.append(
            made(cell, "highest_rate", "requests/s", rates, described, repeat=tuple(r for r, _ in found), note=note)
        )
    held = [(r, result) for r, result in found if result["values"]]
    if not held:
        why = "no rate that was tried kept the 99th percentile within the limit"
        return [*rows, *(made(cell, q, u, (), described, error=why) for q, u in QUANTITIES[described.kind])]
    pairs = [(r, value) for r, result in held for value in result["values"]]
    rows.append(made(cell, "request_latency", "s", [v for _, v in pairs], described, repeat=tuple(r for r, _ in pairs)))
    rates = [result["throughput"] for _, result in held]
    rows.append(made(cell, "throughput", "requests/s", rates, described, repeat=tuple(r for r, _ in held)))
    return rows


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
        found = [(repeat, float(result[quantity])) for repeat, result in memory if quantity in result]
        if found:
            repeats = tuple(repeat for repeat, _ in found)
            rows.append(made(cell, quantity, "bytes", [value for _, value in found], repeat=repeats))
        elif not quantity.startswith("cuda") and any(kind == "memory" for kind, _ in cell.errors):
            rows.append(failed(cell, quantity, "bytes", None, "memory"))
    for quantity in ("load_time", "cold_latency"):
        timed = [(r, result[quantity]) for r, result in latency if result.get(quantity) is not None]
        if timed:
            rows.append(made(cell, quantity, "s", [v for _, v in timed], repeat=tuple(r for r, _ in timed)))
    for work in prepared:
        joules = [(r, result["joules"][work.described.label]) for r, result in cell.over_repeats("energy")]
        if joules:
            repeats = tuple(r for r, _ in joules)
            rows.append(made(cell, "energy", "J", [v for _, v in joules], work.described, repeat=repeats))
    manifest = cell.artifact.manifest
    rows.append(made(cell, "weight_bytes", "bytes", [float(manifest.weight_bytes)]))
    rows.append(made(cell, "folder_bytes", "bytes", [float(sum(entry.bytes for entry in manifest.files.values()))]))
    return rows
