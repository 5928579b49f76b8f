"""Any two artifacts held against each other, worked out beforehand, because the page must claim nothing that Python did not judge.

Within a report every ordered pair of measured artifacts is judged, at most MOST of them: 20 artifacts have all theirs, and beyond that
the pairs with the source or the result come first, then the others in the report's order. Across reports the results alone are paired,
at most MOST in all, newest first. A pair costs some hundredths of a second where thousands of examples are resampled. Rejected: deriving
B against A from A against B; bounds are rounded in the terms of one direction ("−0.40" of before is not "+0.40" of after).
"""

from collections.abc import Sequence
from itertools import permutations
from weakref import WeakKeyDictionary

from squeeze.dashboard.readings import Readings
from squeeze.report.compare import compare
from squeeze.report.schema import Report
from squeeze.report.summary import SummaryRow

MOST = 400
Judged = tuple[str, str, str, str, str, str, str]
"""label, runtime, before, after, words, bounds, sense"""


def within(readings: Readings) -> tuple[dict[str, list[Judged]], int]:
    """("A|B" -> rows, how many pairs were left out) of one report."""
    chosen, left = chosen_pairs(readings.measured, readings.ends)
    lean = readings.lean
    parts = {key: _only(lean, key) for key in readings.measured}
    found = {}
    for before, after in chosen:
        both = lean.model_copy(update={"measurements": (*parts[before].measurements, *parts[after].measurements)})
        found[f"{before}|{after}"] = _judged(both, both, before, after)
    return found, left


def across(every: Sequence[Readings]) -> tuple[dict[str, list[Judged]], dict[str, list[str]]]:
    """("idA/keyA|idB/keyB" -> rows, "idA|idB" -> warnings) of the results of different reports."""
    with_result = [r for r in every if r.ends[1] in r.measured]
    wanted = sorted(permutations(range(len(with_result)), 2), key=lambda pair: (-max(pair), -min(pair), pair))[:MOST]
    rows, warnings = {}, {}
    for first, second in ((with_result[a], with_result[b]) for a, b in wanted):
        ids = f"{first.identity}/{first.ends[1]}|{second.identity}/{second.ends[1]}"
        rows[ids], warnings[f"{first.identity}|{second.identity}"] = _between(first, second)
    return rows, warnings


def _between(first: Readings, second: Readings) -> tuple[list[Judged], list[str]]:
    """The result of one report against that of another, and warnings."""
    known = _KNOWN.setdefault(first, WeakKeyDictionary())
    if second not in known:
        sides = [_only(readings.lean, readings.ends[1]) for readings in (first, second)]
        found = compare(*sides, before_artifact=first.ends[1], after_artifact=second.ends[1])
        known[second] = _rows(found.rows), list(found.warnings)
    return known[second]


_KNOWN: "WeakKeyDictionary[Readings, WeakKeyDictionary[Readings, tuple[list[Judged], list[str]]]]" = WeakKeyDictionary()
"""As long as both reports are read: a server asks again for each new figure of a third."""


def chosen_pairs(keys: Sequence[str], ends: tuple[str, str], most: int = MOST) -> tuple[list[tuple[str, str]], int]:
    """(ordered pairs that are judged, how many are not)."""
    every = list(permutations(keys, 2))
    if len(every) <= most:
        return every, 0
    every.sort(key=lambda pair: not set(pair) & set(ends))
    return every[:most], len(every) - most


def _only(report: Report, key: str) -> Report:
    return report.model_copy(update={"measurements": tuple(m for m in report.measurements if m.artifact == key)})


def _judged(before: Report, after: Report, first: str, second: str) -> list[Judged]:
    return _rows(compare(before, after, before_artifact=first, after_artifact=second).rows)


def _rows(found: Sequence[SummaryRow]) -> list[Judged]:
    return [(r.label, r.runtime, r.before.text, r.after.text, r.words, r.bounds, r.sense) for r in found]
