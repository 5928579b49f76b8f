"""Calibration: from a stream of a layer's inputs to the range that its uint8 numbers will cover.

Two passes over the texts, so that memory does not grow with them: the extremes of every channel, then one histogram between them.
Every calibrator is a function of that histogram; a range always contains zero, which padding and ReLU need exact.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from squeeze.errors import QuantizeError
from squeeze.integers import InputGrid

LEVELS = 256
BINS = 8 * LEVELS
"""Bins of a histogram: 8 for each integer, so that the rounding error within one can be seen."""
SHRINKS = tuple(1 - step / 50 for step in range(46))
"""Shares of the observed range that are tried for each end."""


@dataclass
class Peaks:
    """Least and greatest value of every channel, and how many tokens they come from."""

    low: Tensor | None = None
    high: Tensor | None = None
    tokens: int = 0

    def add(self, rows: Tensor) -> None:
        """Take in rows [tokens, channels]."""
        low, high = rows.amin(dim=0), rows.amax(dim=0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.tokens += len(rows)

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """(low, high), each [channels]. Raises QuantizeError where nothing was seen."""
        if self.low is None or self.high is None:
            raise QuantizeError("no calibration text reached this layer. Give it texts that are not empty.")
        return self.low, self.high

    @property
    def size(self) -> Tensor:
        """Largest absolute value of every channel."""
        low, high = self.ends
        return torch.maximum(-low, high)


@dataclass
class Histogram:
    """How often values between `low` and `high` occur: plainly, and weighted by what each channel means to the products."""

    low: float
    high: float
    counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros(BINS))
    weights: NDArray[np.float64] = field(default_factory=lambda: np.zeros(BINS))

    def add(self, rows: Tensor, importance: Tensor) -> None:
        """Take in rows [tokens, channels]; `importance` [channels] weights them."""
        place = ((rows - self.low) * (BINS / (self.high - self.low))).long().clamp_(0, BINS - 1)
        flat = place.flatten()
        self.counts += torch.bincount(flat, minlength=BINS).double().numpy()
        wide = importance.expand_as(rows).flatten()
        self.weights += torch.bincount(flat, weights=wide.double(), minlength=BINS).numpy()

    @property
    def centres(self) -> NDArray[np.float64]:
        """The value that stands for each bin."""
        return self.low + (np.arange(BINS) + 0.5) * (self.high - self.low) / BINS


class Calibrator(NamedTuple):
    """A row of `squeeze methods`."""

    summary: str
    source: str
    choose: Callable[[Histogram, float], tuple[float, float]]
    """(low, high) from a histogram and the percentile that the settings name."""


def calibrated(histogram: Histogram, calibrator: str, percentile: float) -> InputGrid:
    """The grid of a layer's inputs: 256 integers over the range that the calibrator chooses, zero among them."""
    low, high = CALIBRATORS[calibrator].choose(histogram, percentile)
    return input_grid(low, high)


def input_grid(low: float, high: float) -> InputGrid:
    """uint8 over [low, high] and zero. Where all inputs were zero any scale does: 1."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32((high - low) / (LEVELS - 1)))
    if scale == 0:
        return InputGrid(1.0, 0)
    return InputGrid(scale, int(np.clip(np.round(-low / scale), 0, LEVELS - 1)))


def _extremes(histogram: Histogram, _: float) -> tuple[float, float]:
    return histogram.low, histogram.high


def _percentile(histogram: Histogram, percentile: float) -> tuple[float, float]:
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    outside = (1 - percentile / 100) / 2
    edges = np.linspace(histogram.low, histogram.high, BINS + 1)
    first, last = int(np.searchsorted(share, outside)), int(np.searchsorted(share, 1 - outside))
    return float(edges[first]), float(edges[min(last + 1, BINS)])


def _least_error(histogram: Histogram, _: float) -> tuple[float, float]:
    """The range that leaves the least weighted squared error, rounding and clipping together."""
    values, weights = histogram.centres, histogram.weights

    def error(low: float, high: float) -> float:
        grid = input_grid(low, high)
        rounded = np.clip(np.round(values / grid.scale) + grid.zero_point, 0, LEVELS - 1) - grid.zero_point
        return float((np.square(rounded * grid.scale - values) * weights).sum())

    return _least(histogram, error)


def _least_divergence(histogram: Histogram, _: float) -> tuple[float, float]:
    """The range whose 256 levels tell most of the distribution: least KL(clipped ‖ quantized).

    What is clipped counts in the outermost bins of the first, not of the second: that is what makes clipping cost something.
    """
    span = (histogram.high - histogram.low) / BINS

    def divergence(low: float, high: float) -> float:
        first = int(np.clip((low - histogram.low) / span, 0, BINS - 1))
        last = int(np.clip(np.ceil((high - histogram.low) / span), first + 1, BINS))
        inside = histogram.counts[first:last]
        clipped = inside.copy()
        clipped[0] += histogram.counts[:first].sum()
        clipped[-1] += histogram.counts[last:].sum()
        level = np.minimum(np.arange(len(inside)) * LEVELS // len(inside), LEVELS - 1)
        filled = np.bincount(level, weights=inside > 0, minlength=LEVELS)
        mean = np.bincount(level, weights=inside, minlength=LEVELS) / np.maximum(filled, 1)
        quantized = np.where(inside > 0, mean[level], 0)
        p, q = clipped / clipped.sum(), quantized / max(quantized.sum(), 1e-300)
        seen = p > 0
        return float((p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-12))).sum())

    return _least(histogram, divergence)


def _least(histogram: Histogram, cost: Callable[[float, float], float]) -> tuple[float, float]:
    """Both ends in turn, twice, each at the share of its extreme that costs least."""
    low, high = histogram.low, histogram.high
    for _round in range(2):
        low = min([histogram.low * share for share in SHRINKS], key=lambda end, high=high: cost(end, high))  # type: ignore[misc]
        high = min([histogram.high * share for share in SHRINKS], key=lambda end, low=low: cost(low, end))  # type: ignore[misc]
    return low, high


CALIBRATORS: dict[str, Calibrator] = {
    "minmax": Calibrator("the extremes", "Jacob et al. 2017, arXiv:1712.05877", _extremes),
    "percentile": Calibrator("all but the outermost values, see `percentile`", "McKinstry et al. 2018, arXiv:1809.04191", _percentile),
    "entropy": Calibrator("least divergence of rounded and true values", "Wu et al. 2020, arXiv:2004.09602", _least_divergence),
    "mse": Calibrator(
        "least squared error, each channel weighted by the norm of the weights that it meets", "Banner et al. 2018, arXiv:1810.05723",
        _least_error,
    ),
}  # fmt: skip
