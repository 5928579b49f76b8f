"""`--fail-if`: a sentence of a test for CI, such as `latency > 1.05x`, `accuracy < -0.5 points` or `peak_memory > 400 MB`.

A ratio is result over source, and what rests on repeats fails only where its whole interval lies beyond the limit: a gate that
fires by chance is soon switched off. A measurement that failed counts as a violation, and a condition that nothing in the report
answers to is an error: a gate that can never fire must not pass in silence.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from squeeze.errors import ReportError, nearest
from squeeze.report.stats import Interval
from squeeze.report.summary import QUANTITIES, SummaryRow
from squeeze.report.text import figures

UNITS = {
    "x": 1.0, "%": 0.01, "points": 0.01,
    "s": 1.0, "ms": 1e-3, "µs": 1e-6, "us": 1e-6,
    "bytes": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9,
    "tokens/s": 1.0, "requests/s": 1.0, "nats": 1.0, "J": 1.0, "": 1.0,
}  # fmt: skip
GRAMMAR = "QUANTITY[, WORKLOAD] > or < NUMBER UNIT, such as 'latency, 1×128 > 1.05x', 'accuracy < -0.5 points', 'peak_memory > 400 MB'"
WORDED = re.compile(r"(?P<name>[^<>]+?)\s*(?P<sign>[<>])\s*(?P<number>[+-]?\d+(?:\.\d+)?)\s*(?P<unit>\S*)\s*")


@dataclass(frozen=True)
class Condition:
    """What must not hold."""

    text: str
    quantity: str
    workload: str | None
    above: bool
    limit: float
    unit: str


def parse(text: str) -> Condition:
    """The condition that a text says. Raises ReportError with the grammar, or the nearest name."""
    found = WORDED.fullmatch(text.strip())
    if found is None:
        raise ReportError(f"--fail-if {text!r} is not understood. Write {GRAMMAR}.")
    name, _, workload = (part.strip() for part in found["name"].partition(","))
    labels = {kind.label: quantity for quantity, kind in QUANTITIES.items()}
    quantity = name if name in QUANTITIES else labels.get(name)
    if quantity is None:
        raise ReportError(f"--fail-if {text!r}: {name!r} is unknown. {nearest(name, [*QUANTITIES, *labels])}")
    if found["unit"] not in UNITS:
        raise ReportError(f"--fail-if {text!r}: the unit {found['unit']!r} is unknown. {nearest(found['unit'], UNITS)}")
    limit = float(found["number"]) * UNITS[found["unit"]]
    return Condition(text, quantity, workload.replace("x", "×") or None, found["sign"] == ">", limit, found["unit"])


def violated(condition: Condition, rows: Sequence[SummaryRow]) -> list[str]:
    """A sentence for each row that the condition holds of. Raises ReportError where no row answers to it."""
    spoken = [row for row in rows if row.quantity in (condition.quantity, "quality") and _fits(condition, row)]
    meant = [row for row in spoken if row.quantity == condition.quantity] or spoken
    if not meant:
        labels = ", ".join(row.label for row in rows) or "nothing"
        raise ReportError(f"--fail-if {condition.text!r} speaks of nothing that was measured. Measured: {labels}.")
    return [sentence for row in meant if (sentence := _violation(condition, row))]


def _fits(condition: Condition, row: SummaryRow) -> bool:
    return condition.workload is None or condition.workload in row.label.replace("x", "×")


def _violation(condition: Condition, row: SummaryRow) -> str:
    if row.sense == "failed":
        return f"{row.label}: {condition.text!r} cannot be answered: {row.words}."
    if condition.unit == "x" or (condition.unit == "%" and row.gain is not None):
        found = _ratio(row)
        if found is None:
            raise ReportError(
                f"--fail-if {condition.text!r}: {row.label} has no ratio to a source ({row.words or 'alone'})."
            )
        limit = condition.limit if condition.unit == "x" else 1 + condition.limit
        beyond = found.low > limit if condition.above else found.high < limit
        counted = found.n == 1 and (found.value > limit if condition.above else found.value < limit)
        if beyond or (counted and found.low == found.high):
            return f"{row.label}: {condition.text!r} holds beyond chance: {row.change}, {row.verdict}."
        return ""
    value = row.after.value - row.before.value if condition.unit in ("points", "%") else row.after.value
    if value > condition.limit if condition.above else value < condition.limit:
        if condition.unit in ("points", "%") and row.sense == "same":
            return ""
        return f"{row.label}: {condition.text!r} holds: {row.change} ({figures(value)})."
    return ""


def _ratio(row: SummaryRow) -> Interval | None:
    """Result over source, with its interval: the gain where more is better, else its inverse."""
    if row.gain is None:
        return None
    return (
        row.gain
        if QUANTITIES[row.quantity].higher_is_better
        else row.gain.map(lambda gain: 1 / gain if gain else float("inf"))
    )
