"""Where every mark of the page's charts goes: numbers in, SVG coordinates out, nothing drawn.

Three charts answer three questions. Strips: how far apart are before and after, and do the repeats agree? They start
at zero, so that lengths compare. Gains: which differences are beyond chance? One logarithmic axis for all rows,
better to the right. Layers: where did quantization hurt? Rejected: a chart library. The smallest weighs fifty times
as much as this file, and needs a script where SVG needs none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from squeeze.report.schema import LayerRow
from squeeze.report.summary import SummaryRow
from squeeze.report.text import figures

STRIP_WIDTH, GAIN_WIDTH, LAYERS_WIDTH, LAYERS_HEIGHT = 170.0, 160.0, 900.0, 120.0
MARGIN = 6.0
"""Room for half a dot at the edges."""

TICKS: tuple[tuple[float, ...], ...] = (
    (0.95, 1, 1.05), (0.8, 1, 1.25), (0.5, 1, 1.5, 2), (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8), (1 / 100, 1 / 10, 1, 10, 100),
)  # fmt: skip
"""Sets of axis labels."""

LABEL_WIDTH = 27.0


@dataclass(frozen=True)
class Strip:
    """One row's repeats: bars from zero to the median, a dot for each repeat."""

    before: float
    after: float
    """Length of each bar; 0 where that side was not measured."""
    before_dots: tuple[float, ...]
    after_dots: tuple[float, ...]


@dataclass(frozen=True)
class Gain:
    """One row's gain on the shared axis; low and high are equal where the gain was counted."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Axis:
    """The gains' axis: where 1 is, and the labelled ticks."""

    one: float
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class LayerDot:
    """One weight matrix in the order of the model."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class LayerChart:
    """SQNR of each quantized matrix; grid lines as (y, label)."""

    dots: tuple[LayerDot, ...]
    grid: tuple[tuple[float, str], ...]


def strip(row: SummaryRow) -> Strip | None:
    """Both sides of a row on one scale from zero; None where there is nothing to place."""
    sides = (row.before, row.after)
    largest = max((v for side in sides for v in (*side.dots, side.value) if side.dots), default=0.0)
    if largest <= 0 or not math.isfinite(largest):
        return None
    scale = (STRIP_WIDTH - MARGIN) / largest
    bars = [side.value * scale if side.dots else 0.0 for side in sides]
    dots = [tuple(max(0.0, v) * scale for v in side.dots) for side in sides]
    return Strip(bars[0], bars[1], dots[0], dots[1])


def bars(row: SummaryRow) -> tuple[float, float] | None:
    """Lengths of before and after on one scale, the longer one all of STRIP_WIDTH; None where one side is missing."""
    values = (row.before.value, row.after.value)
    if not all(math.isfinite(v) and v >= 0 for v in values) or max(values) == 0:
        return None
    return values[0] / max(values) * STRIP_WIDTH, values[1] / max(values) * STRIP_WIDTH


def gains(rows: Sequence[SummaryRow]) -> tuple[Axis, list[Gain | None]]:
    """The shared axis, and each row's place on it: None where there is no gain, or too few repeats for an interval."""
    known = [_bounded(row) for row in rows]
    edges = [abs(math.log(edge)) for gain in known if gain for edge in (gain.low, gain.high)]
    widest = max([*edges, math.log(1.05)]) * 1.08
    # 1 in the middle would waste half of the width, where nearly everything got better.
    lowest = max([-math.log(gain.low) for gain in known if gain] + [0.0])
    highest = max([math.log(gain.high) for gain in known if gain] + [0.0])
    low, high = max(lowest * 1.08, 0.18 * widest), max(highest * 1.08, 0.18 * widest)

    def place(value: float) -> float:
        return MARGIN + (math.log(value) + low) / (low + high) * (GAIN_WIDTH - 2 * MARGIN)

    sets = [tuple(tick for tick in ticks if -low <= math.log(tick) <= high) for ticks in TICKS]
    roomy = [ticks for ticks in sets if all(place(b) - place(a) >= LABEL_WIDTH for a, b in pairwise(ticks))]
    labels = max(roomy, key=len, default=(1.0,))
    axis = Axis(place(1), tuple((place(tick), f"{figures(tick, 3).rstrip('0').rstrip('.')}×") for tick in labels))
    return axis, [Gain(place(g.value), place(g.low), place(g.high)) if g else None for g in known]


def layer_chart(layers: Sequence[LayerRow]) -> LayerChart | None:
    """SQNR over the model's depth; None where fewer than two matrices were quantized."""
    rows = [(number, layer, layer.sqnr_db) for number, layer in enumerate(layers)]
    known = [(number, layer, db) for number, layer, db in rows if db is not None]
    if len(known) < 2:
        return None
    bottom = 5 * math.floor(min(db for _, _, db in known) / 5 - 0.2)
    top = 5 * math.ceil(max(db for _, _, db in known) / 5 + 0.2)
    step = 5 if top - bottom <= 25 else 10 if top - bottom <= 50 else 20

    def height(db: float) -> float:
        return MARGIN + (top - db) / (top - bottom) * (LAYERS_HEIGHT - 2 * MARGIN)

    left, right = 34.0, LAYERS_WIDTH - MARGIN
    width = (right - left) / max(1, len(layers) - 1)
    return LayerChart(
        tuple(LayerDot(left + number * width, height(db), f"{layer.name}: {db:.1f} dB") for number, layer, db in known),
        tuple((height(db), f"{db} dB") for db in range(bottom, top + 1) if db % step == 0),
    )


def _bounded(row: SummaryRow) -> Gain | None:
    gain = row.gain
    if gain is None or row.sense == "unknown" or not all(0 < v < math.inf for v in (gain.low, gain.value, gain.high)):
        return None
    return Gain(gain.value, gain.low, gain.high)
