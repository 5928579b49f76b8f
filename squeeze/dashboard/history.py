"""Medians over runs and commits, and where they changed.

A series is one quantity of one artifact, in one runtime and workload, of runs that have the same title, on one kind of machine. Only
series of two runs or more are shown: a single point is no history.

Where a series changed is asked of its ranks, because one stalled run must not look like a change: for each place at which it may be cut
in two the sum of ranks before it is held against what chance gives, and for each stretch in its midst likewise, so that a loss that was
mended later is found too (binary and circular binary segmentation: Olshen et al. 2004, with Wilcoxon's rank sums for means). The most
uneven cut, and the most uneven stretch, are compared with those of random orders of the same values, drawn from a fixed seed; what
chance makes less often than ALPHA / 2 each is cut out, and the parts are asked again; in the end each cut is moved to where both its
sides lie nearest to their medians. Twelve runs are the fewest that can show a step.
What is counted and not measured (bytes) changes exactly where its value does. Rejected: comparing each run with the one before (drift
hides in small steps, and noise alone is called a change every twentieth time), Student's t over segments (runs have outliers, and those
widen it), and Pettitt's test (it sees steps near the middle and no others).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from itertools import pairwise

import numpy as np

from squeeze.dashboard.readings import COUNTED, Reading, Readings, Row, finite, shown
from squeeze.dashboard.rows import Axis, Variant, Variants
from squeeze.report import stats
from squeeze.report.schema import Measurement
from squeeze.report.store import machine_id
from squeeze.report.summary import QUANTITIES, label
from squeeze.report.text import percent

ALPHA = 0.01
ORDERS = 1999
"""Random orders that a series is held against; the seed is fixed, so a page made twice is the same page."""
LONGEST = 200
"""Newest runs of a series that changes are looked for in: the search grows with the square of their number."""
WORDS = 10
"""Pixels between a change and what is said of it, towards the middle of the chart."""
FOLLOWED = (
    "negative_log_likelihood", "correct", "cosine_to_source", "set_time", "latency", "decode_rate", "time_to_first_token", "throughput",
    "highest_rate", "peak_memory", "energy", "weight_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class _Run:
    readings: Readings
    reading: Reading
    started: float
    """Milliseconds since 1970, UTC."""


def history(every: Sequence[Readings]) -> Variants:
    """A variant for each quantity with its workload that was measured in two comparable runs or more."""
    series: dict[tuple[object, ...], list[_Run]] = {}
    for readings in sorted(every, key=lambda r: (r.report.started, r.identity)):
        for reading in readings.of(*FOLLOWED):
            series.setdefault(_series(readings, reading), []).append(
                _Run(readings, reading, _when(readings.report.started))
            )
    found: Variants = {}
    for runs in series.values():
        if len(runs) < 2:
            continue
        m = runs[0].reading.m
        name = label(m)
        unit, better = (
            ("share" if m.quantity == "correct" else m.unit),
            ("higher" if runs[0].reading.kind.higher_is_better else "lower"),
        )
        unit = "" if m.quantity == "negative_log_likelihood" else unit
        variant = found.setdefault(name, Variant(name, Axis("run started"), Axis(name, unit, better), []))  # type: ignore[arg-type]
        variant.rows.extend(_rows(name, runs))
    order = list(QUANTITIES)
    names = sorted(
        found,
        key=lambda name: min((n for n, q in enumerate(order) if name.startswith(QUANTITIES[q].label)), default=99),
    )
    return {name: found[name] for name in names}


def changes(values: Sequence[float]) -> list[int]:
    """Indexes at which a new level begins, rising."""
    array = np.asarray(values, np.float64)
    return _placed(array, sorted(_changes(array, 0)))


def changes_counted(values: Sequence[float]) -> list[int]:
    """The same of what is counted: wherever the value is not the one before."""
    return [n for n in range(1, len(values)) if values[n] != values[n - 1]]


def _changes(values: stats.Floats, start: int) -> list[int]:
    cuts = _cuts(tuple(values))
    edges = [0, *cuts, len(values)]
    parts = [(values[a:b], start + a) for a, b in pairwise(edges)] if cuts else []
    return [start + cut for cut in cuts] + [at for part, begin in parts for at in _changes(part, begin)]


@lru_cache(maxsize=4096)
def _cuts(values: tuple[float, ...]) -> tuple[int, ...]:
    """Where the most uneven place begins, or where the most uneven stretch begins and ends; () where chance makes the like."""
    count = len(values)
    if count < 4 or len(set(values)) == 1:
        return ()
    ranks = _ranks(np.asarray(values))
    orders = np.random.default_rng(0).permuted(np.tile(ranks, (ORDERS, 1)), axis=1)
    every = _sums(np.vstack([ranks, orders]))
    for search in (_step, _stretch):
        highest, cuts = search(every)
        as_uneven = int((highest[1:] >= highest[0] - 1e-9).sum())
        if (1 + as_uneven) / (1 + ORDERS) < ALPHA / 2:
            return cuts
    return ()


def _step(sums: stats.Floats) -> tuple[stats.Floats, tuple[int, ...]]:
    """(unevenness of the most uneven cut of each order, where the first order has it)."""
    found = np.stack([_unevenness(sums, 0, at) for at in range(1, sums.shape[1] - 1)], axis=1)
    return found.max(axis=1), (int(found[0].argmax()) + 1,)


def _stretch(sums: stats.Floats) -> tuple[stats.Floats, tuple[int, ...]]:
    """The same of stretches that neither begin nor end the series."""
    count = sums.shape[1] - 1
    highest, cuts = np.zeros(len(sums)), (0, 0)
    for first in range(1, count - 1):
        found = _unevenness(sums, first, slice(first + 1, count))
        if found[0].max() > highest[0]:
            cuts = first, first + 1 + int(found[0].argmax())
        highest = np.maximum(highest, found.max(axis=1))
    return highest, cuts


def _unevenness(sums: stats.Floats, first: int, last: int | slice) -> stats.Floats:
    """|rank sum of a stretch − what is expected| in units of its deviation, but for a factor that all stretches share."""
    count = sums.shape[1] - 1
    length = np.arange(count + 1)[last] - first
    apart = np.abs(
        sums[:, last] - sums[:, first if isinstance(last, int) else slice(first, first + 1)] - length * (count + 1) / 2
    )
    return np.asarray(apart / np.sqrt(length * (count - length)))


def _sums(ranks: stats.Floats) -> stats.Floats:
    """Sums of the first 0, 1, … ranks of each row: [rows, n] -> [rows, n + 1]."""
    return np.pad(np.cumsum(ranks, axis=1), ((0, 0), (1, 0)))


def _placed(values: stats.Floats, cuts: list[int]) -> list[int]:
    """The same cuts, each moved between its neighbours to where both sides lie nearest to their medians: rank sums see well whether there
    is a step, but count the highest of the low values as one of the high.
    """
    edges = [0, *cuts, len(values)]
    for n in range(1, len(edges) - 1):
        low, high = edges[n - 1], edges[n + 1]
        edges[n] = min(range(low + 1, high), key=lambda at: _apart(values[low:at]) + _apart(values[at:high]))
    return edges[1:-1]


def _apart(values: stats.Floats) -> float:
    return float(np.abs(values - np.median(values)).sum())


def _ranks(values: stats.Floats) -> stats.Floats:
    """1 for the smallest; equal values share the middle of theirs."""
    _, where, times = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(times)
    return np.asarray((last - (times - 1) / 2)[where], np.float64)


def _series(readings: Readings, reading: Reading) -> tuple[object, ...]:
    m, report = reading.m, readings.report
    return (
        report.title,
        machine_id(report.environment),
        m.artifact,
        m.quantity,
        m.workload,
        m.runtime,
        m.device,
        m.threads,
        m.dtype,
    )


def _rows(variant: str, runs: Sequence[_Run]) -> list[Row]:
    values = [run.reading.value.value for run in runs]
    quantity = runs[0].reading.m.quantity
    old = max(0, len(values) - LONGEST)
    begins = changes_counted(values) if quantity in COUNTED else [old + at for at in changes(values[old:])]
    edges = [0, *begins, len(values)]
    levels = [float(np.median(values[a:b])) for a, b in pairwise(edges) for _ in range(a, b)]
    rows: list[Row] = []
    for n, (run, level) in enumerate(zip(runs, levels, strict=True)):
        report, m = run.readings.report, run.reading.m
        machine = machine_id(report.environment)
        change = n in begins
        rows.append({
            "variant": variant, "series": f"{report.title}: {run.readings.series(m)}, machine {machine}", "artifact": m.artifact,
            "machine": machine, "report": run.readings.identity, "run": n + 1, "x": run.started, "started": report.started,
            "git": (report.environment.git or "")[:12], "y": finite(run.reading.value.value), "low": finite(run.reading.value.low),
            "high": finite(run.reading.value.high), "text": run.reading.words, "level": finite(level), "change": change,
            "change_text": _change_text(levels[n - 1], level, m) if change else "",
            "dx": -WORDS if 2 * n > len(runs) else WORDS, "align": "right" if 2 * n > len(runs) else "left",
        })  # fmt: skip
    return rows


def _change_text(before: float, after: float, m: Measurement) -> str:
    share = f" ({'+' if after > before else ''}{percent(after / before - 1, 1)})" if before else ""
    return f"{shown(before, m.quantity, m.unit)} → {shown(after, m.quantity, m.unit)}{share}"


def _when(started: str) -> float:
    """Milliseconds since 1970 of a report's start; 0 where it cannot be read."""
    try:
        moment = datetime.fromisoformat(started)
    except ValueError:
        return 0.0
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    found = moment.timestamp() * 1000
    return found if math.isfinite(found) else 0.0
