"""Measurements that follow from others, worked out when a report is read: percentiles of requests, memory above the baseline,
parameters where stages changed their number."""

from collections.abc import Sequence

import numpy as np

from squeeze.report import stats
from squeeze.report.schema import Manifest, Measurement

PERCENTILES = (50, 90, 95, 99)


def with_derived(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The measurements and all that follows from them."""
    return with_percentiles(with_memory_above_baseline(measurements))


def with_memory_above_baseline(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The measurements, each peak of memory followed by its rise above what its own child held before the model was
    opened: the libraries are not the model.
    """
    every: list[Measurement] = []
    baselines = {_cell(m): stats.by_repeat(m) for m in measurements if m.quantity == "baseline_memory"}
    for m in measurements:
        every.append(m)
        if m.quantity == "peak_memory" and (base := baselines.get(_cell(m))):
            rise = {r: peak - base[r] for r, peak in stats.by_repeat(m).items() if r in base}
            if rise:
                change = {"quantity": "memory_above_baseline", "values": tuple(rise.values()), "repeat": tuple(rise)}
                every.append(m.model_copy(update=change))
    return every


def with_percentiles(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The measurements, the requests of each load test followed by four percentiles of every repeat."""
    every: list[Measurement] = []
    for m in measurements:
        if m.quantity != "request_latency" or not m.values:
            every.append(m)
            continue
        values, repeats = np.asarray(m.values), np.asarray(m.repeat or (0,) * len(m.values))
        for percentile in PERCENTILES:
            found = {int(r): float(np.quantile(values[repeats == r], percentile / 100)) for r in np.unique(repeats)}
            change = {"quantity": f"request_p{percentile}", "values": tuple(found.values()), "repeat": tuple(found)}
            every.append(m.model_copy(update=change))
    return every


def with_parameters(measurements: Sequence[Measurement], manifests: Sequence[Manifest]) -> list[Measurement]:
    """The measurements, each artifact's bytes preceded by its parameters where artifacts differ in them: a student has fewer."""
    counts = {m.digest: m.parameters for m in manifests if m.parameters}
    every: list[Measurement] = []
    for m in measurements:
        if m.quantity == "weight_bytes" and len(set(counts.values())) > 1 and m.artifact_digest in counts:
            change = {"quantity": "parameters", "unit": "", "values": (float(counts[m.artifact_digest]),)}
            every.append(m.model_copy(update=change))
        every.append(m)
    return every


def show_count(m: Measurement) -> tuple[float, str]:
    """What was counted once, exactly: 66,955,010."""
    return m.values[0], f"{m.values[0]:,.0f}"


def _cell(m: Measurement) -> tuple[object, ...]:
    return m.artifact_digest, m.runtime, m.device, m.threads, m.dtype
