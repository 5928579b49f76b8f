"""What may be claimed of a measurement before and after: in words, with its interval, and no further than the
evidence goes.

Each judge takes two measurements of one quantity, (before, after), and returns a Verdict. "faster", "worse" and their
like are said only where the interval excludes "no difference" and rests on three repeats (examples, blocks) or more.
Rejected: stars and p-values, which say that something differs but not by how much.
"""

import math
from dataclasses import dataclass
from typing import Literal

from squeeze.report import stats
from squeeze.report.schema import Measurement
from squeeze.report.stats import Interval
from squeeze.report.text import MINUS, decimals_for, percent, times

Sense = Literal["better", "worse", "same", "unknown", "failed"]
"""unknown: measured, but not compared or not often enough. failed: not measured."""

RUINED = 2.0
"""Ratio of perplexities from which the loss is stated as a factor: per cent would read like a small thing."""


@dataclass(frozen=True)
class Verdict:
    """What is said of one comparison."""

    words: str
    """ "2.72× faster", "no difference shown", "0.16 % worse"."""
    sense: Sense
    bounds: str = ""
    """The interval in the same terms: "[2.43, 3.25]"."""
    gain: Interval | None = None
    """How many times better, above 1 whichever way the quantity counts; None where there is no such ratio."""


def judge_less_time(before: Measurement, after: Measurement) -> Verdict:
    """Seconds: less is faster."""
    return _speed(stats.ratio(before, after))


def judge_more_rate(before: Measurement, after: Measurement) -> Verdict:
    """Tokens per second: more is faster."""
    return _speed(stats.ratio(after, before))


def _speed(
    gain: Interval, better: str = "faster", worse: str = "slower", nothing: str = "no repeats in common"
) -> Verdict:
    if gain.n == 0:
        return Verdict(nothing, "unknown")
    if gain.n < stats.FEWEST:
        return Verdict(f"{times(gain.value)}, {_too_few(gain.n, 'repeat')}", "unknown", gain=gain)
    if not gain.excludes(1):
        return Verdict("no difference shown", "same", _ratios(gain), gain)
    if gain.value > 1:
        return Verdict(f"{times(gain.value)} {better}", "better", _ratios(gain), gain)
    loss = gain.map(_inverse)
    return Verdict(f"{times(loss.value)} {worse}", "worse", _ratios(loss), gain)


def judge_less_memory(before: Measurement, after: Measurement) -> Verdict:
    """Peaks, and joules, are measured, so they need repeats as times do; what is left of them is the familiar way to say it."""
    left = stats.ratio(after, before)
    if left.n == 0:
        return Verdict("no repeats in common, or nothing above zero", "unknown")
    gain, words = left.map(_inverse), f"{percent(left.value, 1)} of before"
    if left.n < stats.FEWEST:
        return Verdict(f"{words}, {_too_few(left.n, 'repeat')}", "unknown", gain=gain)
    bounds = f"[{percent(left.low, 1)}, {percent(left.high, 1)}]"
    if not left.excludes(1):
        return Verdict("no difference shown", "same", bounds, gain)
    return Verdict(words, "better" if left.value < 1 else "worse", bounds, gain)


def judge_unpaired(before: Measurement, after: Measurement, *, more_is_better: bool) -> Verdict:
    """Two runs that were not measured in turn: Welch's interval, wider than that of paired repeats."""
    gain = stats.unpaired_ratio(after, before) if more_is_better else stats.unpaired_ratio(before, after)
    better, worse = ("higher", "lower") if more_is_better else ("less", "more")
    return _speed(gain, better, worse, "nothing to compare")


def judge_fewer_bytes(before: Measurement, after: Measurement) -> Verdict:
    """Counted, not measured: one value is the truth, and there is no interval."""
    old, new = stats.median(before.values), stats.median(after.values)
    if old <= 0 or new <= 0:
        return Verdict("nothing to compare", "unknown")
    gain = Interval(old / new, old / new, old / new, 1)
    if old == new:
        return Verdict("the same size", "same", gain=gain)
    return Verdict(f"{percent(new / old, 1)} of before", "better" if new < old else "worse", gain=gain)


def judge_perplexity(before: Measurement, after: Measurement) -> Verdict:
    """Perplexities of the same blocks: less is better."""
    found = stats.perplexity_ratio(after, before)
    if found.n == 0:
        return Verdict("not the same blocks", "unknown")
    gain = found.map(_inverse)
    if found.n < stats.FEWEST:
        return Verdict(f"{_signed(found.value - 1)}, {_too_few(found.n, 'block')}", "unknown", gain=gain)
    if not found.excludes(1):
        return Verdict("no difference shown", "same", f"[{_signed(found.low - 1)}, {_signed(found.high - 1)}]", gain)
    if found.value >= RUINED:
        return Verdict(f"{times(found.value)} worse", "worse", _ratios(found), gain)
    sense: Sense = "worse" if found.value > 1 else "better"
    size = found.map(lambda ratio: ratio - 1 if sense == "worse" else 1 - ratio)
    decimals = decimals_for(size.value)
    bounds = f"[{percent(size.low, decimals)}, {percent(size.high, decimals)}]"
    return Verdict(f"{percent(size.value, decimals)} {sense}", sense, bounds, gain)


def judge_accuracy(before: Measurement, after: Measurement) -> Verdict:
    """Right answers to the same examples, in percentage points: more is better."""
    found = stats.difference(after, before)
    if found.n == 0:
        return Verdict("not the same examples", "unknown")
    if found.n < stats.FEWEST:
        return Verdict(f"{_points(found.value)} points, {_too_few(found.n, 'example')}", "unknown")
    if not found.excludes(0):
        return Verdict("no difference shown", "same", f"[{_points(found.low)}, {_points(found.high)}] points")
    sense: Sense = "worse" if found.value < 0 else "better"
    size = found.map(abs)
    return Verdict(f"{100 * size.value:.2f} points {sense}", sense, f"[{100 * size.low:.2f}, {100 * size.high:.2f}]")


def _ratios(found: Interval) -> str:
    return f"[{times(found.low)[:-1]}, {times(found.high)[:-1]}]"


def _too_few(n: int, noun: str) -> str:
    return f"too few {noun}s to call ({n})"


def _inverse(value: float) -> float:
    return 1 / value if value else math.inf


def _signed(share: float) -> str:
    return ("+" if share > 0 else "") + percent(share, decimals_for(share))


def _points(share: float) -> str:
    return f"{100 * share:+.2f}".replace("-", MINUS)
