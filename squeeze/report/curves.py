"""Where the marks of a training's two charts go: numbers in, SVG coordinates out.

The first asks whether the student is still learning: the whole loss and each part of it over tokens, from zero, or on a logarithmic
axis where the loss fell to a thirtieth. The second asks whether that holds on examples that were not trained on.
"""

import math
from dataclasses import dataclass

from squeeze.report.text import figures
from squeeze.report.training import TrainingCurve, metric_text

WIDTH, HEIGHT = 450.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 8.0, 8.0, 22.0
"""Room for labels."""
STEEP = 30.0
"""Ratio of the largest loss to the smallest from which the axis is logarithmic."""
COLOURS = 6
"""Kinds of line; a training with more losses repeats them."""

Point = tuple[float, float]
Label = tuple[float, str]


@dataclass(frozen=True)
class Line:
    """One quantity over tokens."""

    name: str
    colour: int
    """0: the whole; the parts count from 1."""
    points: tuple[Point, ...]
    titles: tuple[str, ...] = ()
    """What each point says, where points are drawn."""

    @property
    def path(self) -> str:
        """As SVG's `points`."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


@dataclass(frozen=True)
class Chart:
    """Lines with both axes' labels."""

    lines: tuple[Line, ...]
    grid: tuple[Label, ...]
    """(y, label)"""
    ticks: tuple[Label, ...]
    """(x, label)"""
    is_logarithmic: bool = False
    kept: Point | None = None
    """The validation whose weights came out."""


def loss_chart(curve: TrainingCurve) -> Chart | None:
    """The whole loss and its parts; None where there is one stretch only."""
    if len(curve.steps) < 2:
        return None
    columns = {"whole": curve.loss} | (curve.shares if len(curve.shares) > 1 else {})
    values = [v for column in columns.values() for v in column]
    above = [v for v in values if v > 0]
    steep = min(values) >= 0 and min(curve.loss) > 0 and max(curve.loss) / min(curve.loss) >= STEEP
    low, high = (min(above), max(above)) if steep else (min(0.0, *values), max(values))
    high = high if high > low else low + 1
    ticks = _powers(low, high) if steep else _round_steps(low, high)
    if steep:
        low, high = min(low, *ticks), max(high, *ticks)
    else:
        low, high = min(low, ticks[0]), max(high, ticks[-1])

    def height(value: float) -> float:
        if steep:
            return _between(math.log(max(value, low)), math.log(low), math.log(high))
        return _between(value, low, high)

    last = curve.tokens[-1]
    lines = tuple(
        Line(name, 0 if n == 0 else 1 + (n - 1) % (COLOURS - 1), tuple(
            (_along(at, last), height(v)) for at, v in zip(curve.tokens, column, strict=True)
        ))
        for n, (name, column) in enumerate(columns.items())
    )  # fmt: skip
    return Chart(lines, tuple((height(t), _plain(t)) for t in ticks), _token_ticks(last), steep)


def metric_chart(curve: TrainingCurve) -> Chart | None:
    """The held-out metric at each validation, on the same axis of tokens; None where there was none."""
    if not curve.validations:
        return None
    values = [v.value for v in curve.validations]
    low, high = min(values), max(values)
    margin = max((high - low) * 0.1, abs(high) * 0.005, 1e-9)
    ticks = _round_steps(low - margin, high + margin)
    low, high = min(low - margin, ticks[0]), max(high + margin, ticks[-1])
    last = max(curve.tokens[-1], curve.validations[-1].tokens)
    points = tuple((_along(v.tokens, last), _between(v.value, low, high)) for v in curve.validations)
    titles = tuple(f"step {v.step:,}: {curve.metric} {metric_text(curve, v.value)}" for v in curve.validations)
    kept = next((p for p, v in zip(points, curve.validations, strict=True) if v.step == curve.kept), None)
    grid = tuple((_between(t, low, high), f"{100 * t:g} %" if curve.metric == "accuracy" else _plain(t)) for t in ticks)
    return Chart((Line(curve.metric, 0, points, titles),), grid, _token_ticks(last), kept=kept)


def _along(tokens: float, last: float) -> float:
    return LEFT + tokens / max(last, 1) * (WIDTH - LEFT - RIGHT)


def _between(value: float, low: float, high: float) -> float:
    share = (value - low) / (high - low) if high > low else 0.5
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _token_ticks(last: int) -> tuple[Label, ...]:
    return tuple((_along(t, last), _tokens(t)) for t in _round_steps(0, last) if t <= last)


def _tokens(count: float) -> str:
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:g}{name}"
    return f"{count:g}"


def _round_steps(low: float, high: float) -> list[float]:
    """Three to seven round values that cover low to high, but for the part of a step at either end."""
    span = max(high - low, 1e-12)
    size = 10.0 ** math.floor(math.log10(span / 4))
    step = next(size * n for n in (1, 2, 5, 10, 20) if span / (size * n) <= 5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _powers(low: float, high: float) -> list[float]:
    """The powers of ten around low to high."""
    return [10.0**n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def _plain(value: float) -> str:
    return figures(value, 3).rstrip("0").rstrip(".") if "." in figures(value, 3) else figures(value, 3)
