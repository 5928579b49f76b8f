"""Rows of the charts about what the machine does: where the time goes, how near its ceiling, how much memory."""

from collections.abc import Iterator, Sequence

from squeeze.dashboard.readings import Reading, Readings, Row, cell
from squeeze.dashboard.rows import Axis, Variant, Variants
from squeeze.report.floor import floors
from squeeze.report.schema import Profile
from squeeze.report.text import amount, percent

MOST_NAMES = 12
"""Operators or layers of a chart; what is left is one more."""


def time(readings: Readings) -> Variants:
    """By operator and by layer, for each workload that was profiled, all artifacts side by side."""
    by_workload: dict[str, list[Profile]] = {}
    for profile in readings.report.profiles:
        by_workload.setdefault(profile.workload.label, []).append(profile)
    found: Variants = {}
    for work, profiles in by_workload.items():
        for by in ("operator", "layer"):
            name = f"by {by}, {work}"
            found[name] = Variant(
                name, Axis("time in one call", "s", "lower"), Axis(by), list(_times(readings, profiles, by))
            )
    return found


def _times(readings: Readings, profiles: Sequence[Profile], by: str) -> Iterator[Row]:
    sums = [_sums(profile, by) for profile in profiles]
    longest: dict[str, float] = {}
    for parts in sums:
        for name, (seconds, _) in parts.items():
            longest[name] = max(seconds, longest.get(name, 0.0))
    names = sorted(longest, key=lambda name: (-longest[name], name))
    shown, rest = names[:MOST_NAMES], names[MOST_NAMES:]
    for profile, parts in zip(profiles, sums, strict=True):
        inside = sum(seconds for seconds, _ in parts.values()) or 1.0
        left = [parts[name] for name in rest if name in parts]
        lines = [(name, *parts[name]) for name in shown if name in parts]
        if left:
            lines.append((f"({len(rest)} more)", sum(s for s, _ in left), sum(c for _, c in left)))
        key = readings.keys.get(profile.artifact_digest, profile.artifact)
        for name, seconds, kernels in lines:
            yield {
                "series": f"{key}, {profile.runtime}, {profile.threads} threads", "name": name, "x": seconds, "share": seconds / inside,
                "text": amount(seconds, "s"), "share_text": percent(seconds / inside, 1), "kernels": kernels,
            }  # fmt: skip


def _sums(profile: Profile, by: str) -> dict[str, tuple[float, float]]:
    """Operator or layer -> (seconds, kernels) of one call."""
    found: dict[str, tuple[float, float]] = {}
    for row in profile.rows:
        name = getattr(row, by) or "(no layer)"
        seconds, kernels = found.get(name, (0.0, 0.0))
        found[name] = seconds + row.seconds, kernels + row.count
    return found


def floor(readings: Readings) -> Variants:
    """The share of the machine's ceiling that each timed cell reached, by workload."""
    # A floor names its artifact and runtime only; what else told two cells apart is put into the name.
    named = (m.model_copy(update={"artifact": readings.series(m)}) for m in readings.report.measurements)
    found: Variants = {}
    for row in floors(readings.report.model_copy(update={"measurements": tuple(named)})):
        variant = found.setdefault(
            row.label, Variant(row.label, Axis("share of what the machine can do", "share", "higher"), Axis(""))
        )
        variant.rows.append({
            "series": row.artifact, "x": row.share, "text": percent(row.share, 0), "measured": amount(row.seconds, "s"),
            "floor": amount(row.floor, "s"), "bound": row.bound,
        })  # fmt: skip
    return found


def memory(readings: Readings) -> Variants:
    """What each child held before the model, with it, and at its peak."""
    base, steady = ({cell(r.m): r for r in readings.of(q)} for q in ("baseline_memory", "steady_memory"))
    rows: list[Row] = []
    for peak in readings.of("peak_memory"):
        rows += _memory(readings, peak, base.get(cell(peak.m)), steady.get(cell(peak.m)))
    return (
        {"process": Variant("of the process", Axis("memory of the process", "bytes", "lower"), Axis(""), rows)}
        if rows
        else {}
    )


def _memory(readings: Readings, peak: Reading, base: Reading | None, steady: Reading | None) -> Iterator[Row]:
    """Pieces end to end, each ending where something was measured; one that was not measured, or is not above the last, is no piece."""
    start = 0.0
    ends = [("before the model is opened", base), ("with the model, after the calls", steady), ("at the peak", peak)]
    for name, reading in ends:
        if reading is None or (reading.value.value <= start and reading is not peak):
            continue
        end = reading.value.value
        yield {
            "series": readings.series(peak.m), "piece": name, "x": min(start, end), "x2": end, "text": reading.text,
            "interval": reading.interval, "added": amount(end - start, "bytes"), "artifact": peak.m.artifact,
            "cell": reading.number,
        }  # fmt: skip
        start = end
