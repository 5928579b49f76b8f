"""What a reader should distrust, and what to do about it: instability warnings, as pyperf gives them.

Each looks at raw values or at what the parent saw of the machine while a child ran; none changes a figure. Rejected: dropping
outliers (a stall is part of the machine that was measured, and the median does not mind it).
"""

import math
from collections.abc import Iterator

import numpy as np

from squeeze.report import stats
from squeeze.report.explained import stage_warnings
from squeeze.report.floor import floors
from squeeze.report.schema import Measurement, Report
from squeeze.report.summary import label
from squeeze.report.text import count, percent

BUSY, STOLEN = 0.05, 0.02
"""Shares of the cores' time used by others, over all timed children, from which a report warns."""
STALL = 3.0
"""A call this many times the median is a stall."""
BEATEN = 1.05
"""Share of its floor from which a cell shows the ceilings to be wrong, and not only noisy."""
DRIFT = 0.9
"""Spearman correlation of repeats with time from which a machine is said to drift."""
TIMED = ("latency", "set_time", "time_per_output_token", "time_to_first_token")


def warnings(report: Report) -> list[str]:
    """Sentences, each with what to do; none for a quiet run."""
    chosen = (f"{m.name}: {text}" for m in report.manifests for text in stage_warnings(m))
    return [
        *chosen,
        *_surroundings(report),
        *_below_floor(report),
        *(text for m in report.measurements for text in _of(m)),
    ]


def _surroundings(report: Report) -> Iterator[str]:
    timed = [child for child in report.children if child.purpose in ("latency", "load") and child.seconds > 0]
    whole = sum(child.seconds for child in timed)
    if not whole:
        return
    for name, limit, who, mend in (
        ("others", BUSY, "other programs of this machine", "close them"),
        ("stolen", STOLEN, "other guests of the same host", "take a dedicated machine, or measure at a quieter hour"),
    ):
        known = [(getattr(child, name), child.seconds) for child in timed if getattr(child, name) is not None]
        share = sum(value * seconds for value, seconds in known) / whole
        if share > limit:
            yield f"{who} used {percent(share, 0)} of the cores while times were measured: {mend}, and measure again"


def _below_floor(report: Report) -> Iterator[str]:
    """A cell that is faster than the machine can be says that the machine was measured in a bad moment."""
    beaten = [row for row in floors(report) if row.share > BEATEN]
    if beaten:
        most = max(beaten, key=lambda row: row.share)
        yield (
            f"{count(len(beaten), 'cell')} beat what this machine can do ({most.label} of {most.artifact} in {most.runtime} reached "
            f"{percent(most.share, 0)}), so the ceilings are too low: squeeze bench machine --again, and measure again"
        )


def _of(m: Measurement) -> Iterator[str]:
    if m.quantity not in TIMED or len(m.values) < stats.FEWEST:
        return
    where = f"{label(m)} of {m.artifact} in {m.runtime}"
    values = np.asarray(m.values)
    stalls = int((values > STALL * np.median(values)).sum())
    if stalls:
        yield (
            f"{where}: {stalls} of {len(values):,} calls took over {STALL:g} times the median (the longest "
            f"{np.max(values) / np.median(values):.0f} times); the median does not mind, a 99th percentile would"
        )
    repeats = np.asarray(list(stats.by_repeat(m).values()))
    if len(repeats) >= stats.MANY:
        order = np.argsort(np.argsort(repeats))
        correlation = float(np.corrcoef(order, np.arange(len(repeats)))[0, 1]) if np.ptp(repeats) else 0.0
        if abs(correlation) > DRIFT:
            way = "slower" if correlation > 0 else "faster"
            yield f"{where} became steadily {way} from repeat to repeat: let the machine warm up or cool down, and measure again"
    yield from _late_warm_up(m, where)


def _late_warm_up(m: Measurement, where: str) -> Iterator[str]:
    """The first timed call of each child is held against the rest: slower beyond chance means that warm-up was too short."""
    if m.quantity != "latency" or not m.repeat:
        return
    repeats = np.asarray(m.repeat)
    values = np.asarray(m.values)
    logs = []
    for number in np.unique(repeats):
        own = values[repeats == number]
        if len(own) > 2:
            logs.append(math.log(own[0] / float(np.median(own[1:]))))
    if len(logs) >= stats.MANY and stats.paired_interval(logs)[0] > math.log(1.1):
        yield f"{where}: the first timed call is still slower than the others: its warm-up is too short: raise bench.warmup_seconds"
