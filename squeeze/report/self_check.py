"""What a bench of one artifact against itself says of the machine: how small a difference can be told, and whether one was.

The question is asked of a whole report at once, so the interval of each workload is widened for their number (Bonferroni): of
twenty quiet checks one may still see what is not there.
"""

from dataclasses import dataclass

import numpy as np

from squeeze.report import stats
from squeeze.report.schema import Measurement, Report
from squeeze.report.stats import Interval
from squeeze.report.summary import label
from squeeze.report.text import count, percent, times

SPEEDS = ("latency", "set_time", "time_per_output_token")
POWER = 1.65
"""Half-widths away from zero at which nine of ten repetitions find a difference: (1.96 + 1.28) / 1.96."""


@dataclass(frozen=True)
class SelfCheck:
    """One workload of a self-check."""

    label: str
    ratio: Interval
    """Time of B over time of A, from paired repeats."""
    differs: bool
    resolves: float
    """The smallest difference, as a share, that nine of ten such benches would find."""


def self_checks(report: Report) -> list[SelfCheck]:
    """One row for each timed workload that both sides have."""
    names = [manifest.name for manifest in report.manifests]
    sides = [
        [m for m in report.measurements if m.artifact == name and m.quantity in SPEEDS and m.values] for name in names
    ]
    pairs = [(a, b) for a in sides[0] for b in sides[-1] if (a.quantity, a.workload) == (b.quantity, b.workload)]
    return [_checked(a, b, len(pairs)) for a, b in pairs]


def verdict(report: Report) -> str:
    """The outcome in plain sentences."""
    rows = self_checks(report)
    if not rows:
        return "Nothing was measured twice, so nothing is known of this machine."
    said = []
    for row in rows:
        bounds = f"[{times(row.ratio.low)[:-1]}, {times(row.ratio.high)[:-1]}]"
        found = "a difference is reported" if row.differs else "no difference is reported"
        said.append(
            f"{row.label}: {found}: {times(row.ratio.value)} {bounds} from {count(row.ratio.n, 'paired repeat')}; "
            f"such a bench finds differences from about {percent(row.resolves, 1)} (nine times in ten)."
        )
    return " ".join(said)


def _checked(a: Measurement, b: Measurement, workloads: int) -> SelfCheck:
    left, right = stats.by_repeat(a), stats.by_repeat(b)
    logs = [float(np.log(right[r] / left[r])) for r in sorted(left.keys() & right.keys())]
    if len(logs) < stats.MANY:
        return SelfCheck(label(a), Interval(float("nan"), float("nan"), float("nan"), len(logs)), False, float("inf"))
    low, high = stats.paired_interval(logs, confidence=1 - (1 - stats.CONFIDENCE) / workloads)
    found = Interval(float(np.exp(np.median(logs))), float(np.exp(low)), float(np.exp(high)), len(logs))
    return SelfCheck(label(a), found, found.excludes(1), float(np.expm1(POWER * (high - low) / 2)))
