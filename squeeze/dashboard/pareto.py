"""Quality against what it costs: the rows of the Pareto chart.

A point is one artifact in one runtime. It is dimmed, as dominated, where another point is at least as good in both values and shown
to be better in one of them, by the interval of the pair and not by the two values alone: of two points that cannot be told apart
neither is dimmed. Rejected: domination by values (noise alone would dim half of a cloud of equals).

Lines join an artifact with the nearest one that it was made from, in the same runtime, as the digests of their parents tell; an export
is joined with the export of what its own origin was made from. Where a report does not hold the origin (a bench of exports alone), the
export is joined with the export of the same source, which is the one thing that is known.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from squeeze.dashboard.artifacts import stage_of
from squeeze.dashboard.drawings import LARGEST
from squeeze.dashboard.labels import Spot, placed
from squeeze.dashboard.readings import Reading, Readings, Row, cell, finite
from squeeze.dashboard.rows import Axis, Better, Variant, Variants
from squeeze.provenance import Digest
from squeeze.report.partners import SCORED_IN
from squeeze.report.schema import Manifest, Measurement
from squeeze.report.summary import QUANTITIES, label
from squeeze.report.text import amount

QUALITIES = ("negative_log_likelihood", "correct", "cosine_to_source")
COSTS = (
    "set_time", "latency", "decode_rate", "time_per_output_token", "time_to_first_token", "weight_bytes", "compressed_bytes",
    "peak_memory", "throughput", "highest_rate", "energy",
)  # fmt: skip
"""In the order of the switch: whole sets first, because they hold the lengths that texts really have."""
Place = tuple[str, str, int | None, str | None]
"""runtime, device, threads, type"""


@dataclass(frozen=True)
class _Point:
    x: Reading
    y: Reading
    manifest: Manifest | None

    @property
    def bytes(self) -> int:
        return 0 if self.manifest is None else self.manifest.weight_bytes


def pareto(readings: Readings) -> Variants:
    """A variant for each quality and each cost that some cell has both of."""
    found: Variants = {}
    for quality in QUALITIES:
        scored = {cell(reading.m): reading for reading in readings.of(quality)}
        for cost in COSTS:
            by_label: dict[str, list[_Point]] = {}
            for reading in readings.of(cost):
                if (y := _scored(scored, reading)) is not None:
                    by_label.setdefault(label(reading.m), []).append(
                        _Point(reading, y, readings.manifests.get(reading.m.artifact_digest))
                    )
            for name, points in by_label.items():
                found[f"{QUANTITIES[quality].label} against {name}"] = _variant(readings, quality, name, points)
    return found


def _scored(scored: Mapping[Any, Reading], cost: Reading) -> Reading | None:
    """The quality of the same cell; of the artifact in any runtime where the cost belongs to its files, and of the same graph in the
    runtime that scores for the one that only generates.
    """
    found = scored.get(cell(cost.m))
    if found is None:
        of_files = cost.m.quantity in ("weight_bytes", "compressed_bytes")
        scorer = SCORED_IN.get(cost.m.runtime)
        same = (
            r for key, r in scored.items() if key[0] == cost.m.artifact_digest and (of_files or r.m.runtime == scorer)
        )
        return next(same, None)
    return found


def _variant(readings: Readings, quality: str, name: str, points: Sequence[_Point]) -> Variant:
    first = points[0].x.m
    rows = [_row(readings, point, points) for point in points]
    names = placed(_spots(points))
    rows = [row | {"dx": at.dx, "dy": at.dy, "align": at.align} for row, at in zip(rows, names, strict=True)]
    rows += _links(readings, points)
    return Variant(
        label=name, x=Axis(name, first.unit, _better(first.quantity)),
        y=Axis(QUANTITIES[quality].label, "share" if quality == "correct" else "", _better(quality)), rows=rows,
    )  # fmt: skip


def _spots(points: Sequence[_Point]) -> list[Spot]:
    """Where the chart puts each point: better towards the top left, logarithmic where less is better (`drawings.pareto`)."""
    across, down = _shares([point.x for point in points]), _shares([point.y for point in points])
    largest = max((point.bytes for point in points), default=0) or 1
    radii = [math.sqrt(LARGEST * point.bytes / largest / math.pi) for point in points]
    return [Spot(x, y, radius, p.x.m.artifact) for p, x, y, radius in zip(points, across, down, radii, strict=True)]


def _shares(side: Sequence[Reading]) -> list[float]:
    """0 for the best end of the axis, 1 for the worst, intervals included."""
    known = [[_along(r, v) for v in (r.value.value, r.value.low, r.value.high) if math.isfinite(v)] for r in side]
    ends = [place for places in known for place in places]
    low, high = min(ends, default=0.0), max(ends, default=0.0)
    return [(places[0] - low) / (high - low) if places and high > low else 0.5 for places in known]


def _along(reading: Reading, value: float) -> float:
    if reading.kind.higher_is_better:
        return -value
    return math.log(value) if value > 0 else 0.0


def _better(quantity: str) -> Better:
    return "higher" if QUANTITIES[quantity].higher_is_better else "lower"


def _row(readings: Readings, point: _Point, points: Sequence[_Point]) -> Row:
    beaten = next((other for other in points if other is not point and _dominates(readings, other, point)), None)
    x, y = point.x, point.y
    elsewhere = f" (in {y.m.runtime})" if x.m.runtime in SCORED_IN and x.m.runtime != y.m.runtime else ""
    return {
        "mark": "point", "artifact": x.m.artifact, "runtime": x.m.runtime, "series": readings.series(x.m),
        "stage": stage_of(point.manifest, readings),
        "made": "another tool" if point.manifest is not None and point.manifest.is_peer else "squeeze",
        "x": finite(x.value.value), "x_low": finite(x.value.low), "x_high": finite(x.value.high), "x_text": x.words,
        "y": finite(y.value.value), "y_low": finite(y.value.low), "y_high": finite(y.value.high), "y_text": y.words + elsewhere,
        "bytes": point.bytes, "size": amount(point.bytes, "bytes"), "cell": x.number, "dominated": beaten is not None,
        "standing": f"dominated by {readings.series(beaten.x.m)}" if beaten is not None else "not dominated",
    }  # fmt: skip


def _dominates(readings: Readings, one: _Point, other: _Point) -> bool:
    sides = [(one.x, other.x), (one.y, other.y)]
    if not all(_at_least_as_good(a, b) for a, b in sides):
        return False
    return any(readings.is_better(a, b) for a, b in sides)


def _at_least_as_good(one: Reading, other: Reading) -> bool:
    if one.kind.higher_is_better:
        return one.value.value >= other.value.value
    return one.value.value <= other.value.value


def _links(readings: Readings, points: Sequence[_Point]) -> Iterator[Row]:
    """From each point to the point of what it was made from."""
    at = {(p.x.m.artifact_digest, _place(p.x.m)): p for p in points}
    for point in points:
        for origin in _origins(readings.manifests, point.x.m.artifact_digest):
            before = at.get((origin, _place(point.x.m)))
            if before is not None:
                yield _link(before, point)
                break


def _link(before: _Point, after: _Point) -> Row:
    return {
        "mark": "link", "artifact": after.x.m.artifact, "runtime": after.x.m.runtime, "x": finite(before.x.value.value),
        "y": finite(before.y.value.value), "x2": finite(after.x.value.value), "y2": finite(after.y.value.value),
        "x_text": f"{before.x.m.artifact} → {after.x.m.artifact}",
    }  # fmt: skip


def _place(m: Measurement) -> Place:
    return m.runtime, m.device, m.threads, m.dtype


def _origins(known: dict[Digest, Manifest], digest: Digest) -> list[Digest]:
    """What may stand at the other end of an artifact's line, nearest first."""
    own = known.get(digest)
    if own is None or own.parent is None:
        return []
    chain = _chain(own, known)
    if own.record is None or own.record.kind != "export":
        return chain
    if own.parent not in known:
        return [
            other for other, m in known.items() if m is not own and m.format == own.format and _is_source_export(m, own)
        ]
    exports = {
        m.parent: other
        for other, m in known.items()
        if m.format == own.format and m.record is not None and m.record.kind == "export"
    }
    return [exports[origin] for origin in chain[1:] if origin in exports]


def _chain(own: Manifest, known: dict[Digest, Manifest]) -> list[Digest]:
    found: list[Digest] = []
    parent = own.parent
    while parent in known and parent not in found:
        found.append(parent)
        parent = known[parent].parent
    return found


def _is_source_export(candidate: Manifest, own: Manifest) -> bool:
    """Artifacts are named after the stage that made them, the source's export "export-0-…"."""
    return (
        candidate.source == own.source
        and candidate.name.startswith("export-0-")
        and not own.name.startswith("export-0-")
    )
