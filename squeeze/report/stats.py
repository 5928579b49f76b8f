"""Statistics of measurements: functions of the raw values in a report, never stored.

Two kinds of evidence, two kinds of interval, all at 95 %:

* **Repeats** (times, memory) are few: three, perhaps ten. Each repeat gives one number, the median of its calls,
  because calls inside one process share their luck. Repeats ran interleaved, so those of two artifacts pair up and a
  slow minute of the machine cancels in their ratio. The interval is Student's t on the logarithms of the paired
  ratios (Student 1908); from eight repeats on it is Wilcoxon's (1945), which a single stall does not widen.
* **Examples** (answers, blocks of text) are many: a bootstrap over the examples that both artifacts saw (Efron 1979),
  and Wilson's interval (1927) for a plain share, which stays honest at 3,000 right out of 3,000.

Rejected: the bootstrap for repeats. Resampling three of them cannot reach beyond their range, and the range of three
misses the truth one time in four: "faster" would be said of two equal models in a quarter of all runs (a test counts
it). Also rejected: means over calls (one stall moves them) and unpaired tests (they drown a 5 % gain in the machine's
drift).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from statistics import NormalDist
from statistics import median as middle_of

import numpy as np
from numpy.typing import NDArray

from squeeze.report.schema import Measurement

CONFIDENCE = 0.95
FEWEST = 3
"""Repeats below which nothing is claimed."""

MANY = 8
"""Repeats from which intervals are distribution-free; of six, Wilcoxon's is still the whole range."""

FEW = 1000
"""Values up to which Python finds the middle faster than numpy, which takes 0.1 ms for a handful."""

RESAMPLES = 2000
AT_ONCE = 1_000_000
"""Drawn examples held in memory at a time."""
KEPT = 6_000_000
"""Drawn examples (48 MB) that are kept for the next mean over as many examples."""

SMALL_T = (12.706, 4.303, 3.182, 2.776)
"""Student's t at 95 %, two-sided, for 1 to 4 degrees of freedom."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value and the bounds that hold it at 95 % confidence, from `n` repeats or examples; NaN bounds where n < 2."""

    value: float
    low: float
    high: float
    n: int

    def excludes(self, point: float) -> bool:
        """Whether the value differs from `point` beyond chance; never true of fewer than three repeats."""
        return self.n >= FEWEST and (self.low > point or self.high < point)

    def map(self, function: Callable[[float], float]) -> "Interval":
        """The same statement about a monotonic function of the value, such as its inverse."""
        ends = function(self.low), function(self.high)
        return Interval(function(self.value), min(ends), max(ends), self.n)


def median(values: Sequence[float]) -> float:
    """The middle value; NaN of none."""
    if len(values) > FEW:
        return float(np.median(values))
    return float(middle_of(values)) if len(values) else math.nan


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, as a share of the median; NaN of fewer than three values."""
    middle = median(values)
    if len(values) < FEWEST or not middle:
        return math.nan
    low, high = np.quantile(values, (0.25, 0.75))
    return float((high - low) / 2 / abs(middle))


def by_repeat(m: Measurement) -> dict[int, float]:
    """Repeat index -> median of its values. Values without repeat indexes are one repeat."""
    calls: dict[int, list[float]] = {}
    for number, value in zip(m.repeat or (0,) * len(m.values), m.values, strict=True):
        calls.setdefault(number, []).append(value)
    return {number: median(calls[number]) for number in sorted(calls)}


def ratio(numerator: Measurement, denominator: Measurement) -> Interval:
    """Ratio of the medians over the repeats that both have, with the t interval of the paired ratios.

    The interval is centred on the geometric mean of the paired ratios and widened, where need be, to hold the value.
    n is 0 where no repeat is shared, or where a value is not positive and so has no ratio.
    """
    above, below = by_repeat(numerator), by_repeat(denominator)
    shared = sorted(above.keys() & below.keys())
    if not shared or min(*(above[r] for r in shared), *(below[r] for r in shared)) <= 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    value = median([above[r] for r in shared]) / median([below[r] for r in shared])
    logs = np.log([above[r] / below[r] for r in shared])
    if len(logs) == 1:
        return Interval(value, math.nan, math.nan, 1)
    low, high = (math.exp(end) for end in paired_interval(logs))
    return Interval(value, min(low, value), max(high, value), len(logs))


def unpaired_ratio(numerator: Measurement, denominator: Measurement) -> Interval:
    """Ratio of the medians of repeats that do not pair up, with Welch's interval (1947) on their logarithms; n is the fewer of both
    repeats, and 0 where a value is not positive.
    """
    sides = [np.asarray(list(by_repeat(m).values())) for m in (numerator, denominator)]
    if any(len(values) == 0 or values.min() <= 0 for values in sides):
        return Interval(math.nan, math.nan, math.nan, 0)
    n = min(len(values) for values in sides)
    value = float(np.median(sides[0]) / np.median(sides[1]))
    if n == 1:
        return Interval(value, math.nan, math.nan, 1)
    logs = [np.log(values) for values in sides]
    parts = [float(one.var(ddof=1)) / len(one) for one in logs]
    squares = sum(part**2 / (len(one) - 1) for part, one in zip(parts, logs, strict=True))
    # Rounded down to a whole number of degrees: the interval is never narrower than Welch's.
    freedom = math.floor(sum(parts) ** 2 / squares) if squares else n - 1
    centre, half = float(logs[0].mean() - logs[1].mean()), student_t(max(1, freedom)) * math.sqrt(sum(parts))
    return Interval(value, min(math.exp(centre - half), value), max(math.exp(centre + half), value), n)


def paired_interval(differences: Sequence[float] | Floats, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Interval of the middle of paired differences: Student's t for a few, from MANY on the distribution-free one of Wilcoxon's
    signed ranks (Hodges and Lehmann 1963; Tukey's Walsh averages), which one stalled repeat cannot blow up. `confidence` is heeded
    from MANY on.
    """
    values = np.asarray(differences, np.float64)
    n = len(values)
    if n < MANY:
        half = student_t(n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
        return float(values.mean()) - half, float(values.mean()) + half
    upper, lower = np.triu_indices(n)
    walsh = np.sort((values[upper] + values[lower]) / 2)
    rank = _signed_rank(n, confidence)
    return float(walsh[rank]), float(walsh[len(walsh) - 1 - rank])


def half_width(differences: Sequence[float] | Floats) -> float:
    """Half the width of that interval; infinite of fewer than three differences."""
    if len(differences) < FEWEST:
        return math.inf
    low, high = paired_interval(differences)
    return (high - low) / 2


@cache
def _signed_rank(n: int, confidence: float) -> int:
    """How many of the smallest Walsh averages lie below the interval: the largest k with 2·P(T⁺ ≤ k) ≤ 1 − confidence, T⁺
    being Wilcoxon's statistic, whose distribution is counted exactly; 0 where even the whole range holds less.
    """
    ways = np.zeros(n * (n + 1) // 2 + 1)
    ways[0] = 1.0
    for rank in range(1, n + 1):
        ways[rank:] = ways[rank:] + ways[:-rank]
    tail = np.cumsum(ways / 2.0**n)
    return max(0, int(np.searchsorted(tail, (1 - confidence) / 2, side="right")) - 1)


def perplexity(m: Measurement) -> float:
    """exp of the mean negative log-likelihood of a token; values are sums over blocks, weights their tokens."""
    return _exp(sum(m.values) / float(_weights(m).sum()))


def perplexity_ratio(numerator: Measurement, denominator: Measurement, seed: int = 0) -> Interval:
    """Ratio of two perplexities on the same blocks, resampling the blocks; n of 0 where the blocks are not the same."""
    weights = _weights(numerator)
    if len(numerator.values) != len(denominator.values) or not np.array_equal(weights, _weights(denominator)):
        return Interval(math.nan, math.nan, math.nan, 0)
    gaps = np.asarray(numerator.values) - np.asarray(denominator.values)
    found = _bootstrap(len(gaps), lambda picks: gaps[picks].sum(axis=-1) / weights[picks].sum(axis=-1), seed)
    return found.map(_exp)


def mean(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean over examples, resampling the examples."""
    array = np.asarray(values, np.float64)
    n = len(array)
    if n < 2 or n * RESAMPLES > KEPT:
        return _bootstrap(n, lambda picks: array[picks].mean(axis=-1), seed)
    counts, changed = _counts(n, seed), np.flatnonzero(array)
    # Most answers of two artifacts are the same: where few differ, few rows are read.
    sums = array @ counts if 4 * len(changed) > n else array[changed] @ counts[changed]
    return _bounded(float(array.mean()), sums / n, n)


def difference(after: Measurement, before: Measurement, seed: int = 0) -> Interval:
    """Mean of after − before over the same examples in order; n of 0 where their counts differ."""
    if len(after.values) != len(before.values):
        return Interval(math.nan, math.nan, math.nan, 0)
    return mean(np.subtract(after.values, before.values).tolist(), seed)


def mcnemar(before: Sequence[float], after: Sequence[float]) -> tuple[int, int, float]:
    """Right answers lost and gained on the same examples, and the exact two-sided probability of so uneven a change where both
    are as good (McNemar 1947, the binomial form).
    """
    lost = sum(1 for b, a in zip(before, after, strict=True) if b > a)
    gained = sum(1 for b, a in zip(before, after, strict=True) if b < a)
    changed = lost + gained
    fewer = sum(math.comb(changed, k) for k in range(min(lost, gained) + 1))
    return lost, gained, min(1.0, 2 * fewer / 2**changed)


def share(values: Sequence[float]) -> Interval:
    """Share of ones among zeros and ones, with Wilson's score interval."""
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    p, z2 = math.fsum(values) / n, NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # Rounding may leave a bound a hair inside the value where the share is 0 or 1.
    return Interval(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n)


def student_t(freedom: int) -> float:
    """Two-sided 95 % point of Student's t: a table up to 4 degrees of freedom, then Abramowitz and Stegun's expansion
    26.7.5 (1964), off by less than 0.004. scipy would be a dependency for this one line.
    """
    if freedom <= len(SMALL_T):
        return SMALL_T[freedom - 1]
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / float(freedom) ** power for power, term in enumerate(terms))


def _weights(m: Measurement) -> Floats:
    return np.asarray(m.weights if m.weights is not None else np.ones(len(m.values)), np.float64)


def _exp(value: float) -> float:
    """exp, infinite where it overflows: a broken model's perplexity is a finding, not a crash."""
    return math.exp(value) if value < 700 else math.inf


def _bootstrap(n: int, statistic: Callable[[NDArray[np.intp]], Floats], seed: int) -> Interval:
    """Percentile bootstrap over `n` examples; `statistic` maps indexes [..., n] to values [...]."""
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    value = float(statistic(np.arange(n)))
    if n == 1:
        return Interval(value, math.nan, math.nan, 1)
    return _bounded(value, np.concatenate([statistic(picks) for picks in _draws(n, seed)]), n)


def _bounded(value: float, resampled: Floats, n: int) -> Interval:
    low, high = np.quantile(resampled, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Interval(value, min(float(low), value), max(float(high), value), n)


def _draws(n: int, seed: int) -> Iterator[NDArray[np.intp]]:
    """RESAMPLES times n numbers below n, some at a time."""
    rng, rows = np.random.default_rng(seed), max(1, AT_ONCE // n)
    return (rng.integers(0, n, (min(rows, RESAMPLES - done), n)) for done in range(0, RESAMPLES, rows))


@lru_cache(maxsize=2)
def _counts(n: int, seed: int) -> Floats:
    """How often each resample draws each example: [n, RESAMPLES]. Kept, because drawing takes longer than all the rest, and the
    artifacts of a report answer the same examples.
    """
    rows = np.concatenate([[np.bincount(row, minlength=n) for row in picks] for picks in _draws(n, seed)])
    return np.ascontiguousarray(rows.T, np.float64)
