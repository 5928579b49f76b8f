"""Two reports held against each other, each claim no stronger than how they were measured.

Two artifacts of one run were measured in turn, so their repeats pair up. Two runs were not: a slow hour of one is no slow hour of
the other, so their intervals are unpaired and wider (Welch 1947), and on different machines nothing at all is said of speed.
Answers to the same examples pair up whenever they were given. Rejected: comparing medians alone, as most tools do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from squeeze.errors import ReportError, nearest
from squeeze.report import verdict
from squeeze.report.derived import with_derived
from squeeze.report.schema import Measurement, Report
from squeeze.report.store import machine_id
from squeeze.report.summary import QUANTITIES, Quantity, SummaryRow, ends, label, place, runtimes, side
from squeeze.report.verdict import Verdict

PACKAGES = ("onnxruntime", "onnxruntime-genai", "onnxruntime-gpu", "torch", "transformers", "openvino")
"""Whose versions decide speed."""
COUNTED = ("weight_bytes", "compressed_bytes")


@dataclass(frozen=True)
class Comparison:
    """Rows as a report's own summary has them, and what a reader must know before believing them."""

    rows: list[SummaryRow]
    warnings: tuple[str, ...]


def compare(
    before: Report, after: Report, *, before_artifact: str | None = None, after_artifact: str | None = None
) -> Comparison:
    """The result of one report against the result of another, or any artifact of either by its name."""
    names = [_chosen(before, before_artifact), _chosen(after, after_artifact)]
    same_run = before == after
    same_machine = machine_id(before.environment) == machine_id(after.environment)
    rows, measured = [], _alike(_of(before, names[0]))
    for new in _of(after, names[1]):
        old = _partner(measured.get(_what(new), ()), new)
        kind = QUANTITIES.get(new.quantity)
        if kind is None or old is None:
            continue
        said = _judged(
            kind, old, new, same_run=same_run, same_machine=same_machine, same_data=before.data == after.data
        )
        rows.append(_row(kind, old, new, said))
    order = list(QUANTITIES)
    rows.sort(key=lambda row: order.index(row.quantity))
    return Comparison(rows, tuple(_warnings(before, after, same_run=same_run, same_machine=same_machine)))


def _chosen(report: Report, name: str | None) -> str:
    names = list(dict.fromkeys(m.artifact for m in report.measurements))
    if name is None:
        return ends(report)[1]
    if name not in names:
        raise ReportError(f"{name} was not measured in the report {report.title}. {nearest(name, names)}")
    return name


def _of(report: Report, name: str) -> list[Measurement]:
    return with_derived([m for m in report.measurements if m.artifact == name])


def _alike(measured: Sequence[Measurement]) -> dict[tuple[object, ...], list[Measurement]]:
    found: dict[tuple[object, ...], list[Measurement]] = {}
    for m in measured:
        found.setdefault(_what(m), []).append(m)
    return found


def _what(m: Measurement) -> tuple[object, ...]:
    return m.quantity, m.workload, m.device, m.dtype


def _partner(alike: Sequence[Measurement], new: Measurement) -> Measurement | None:
    return min(alike, key=lambda m: (m.runtime != new.runtime, m.threads != new.threads), default=None)


def _judged(
    kind: Quantity, old: Measurement, new: Measurement, *, same_run: bool, same_machine: bool, same_data: bool
) -> Verdict:
    for which, m in (("the first", old), ("the second", new)):
        if not m.values:
            return Verdict(f"not measured in {which}: {m.error}", "failed")
    if kind.judge is None:
        return Verdict("each compares with its own source", "unknown")
    if same_run or new.quantity in COUNTED:
        return kind.judge(old, new)
    if kind.examples:
        return kind.judge(old, new) if same_data else Verdict("measured on other data", "unknown")
    if not same_machine:
        return Verdict("other machine", "unknown")
    if old.threads != new.threads:
        return Verdict("other number of threads", "unknown")
    return verdict.judge_unpaired(old, new, more_is_better=kind.higher_is_better)


def _row(kind: Quantity, old: Measurement, new: Measurement, said: Verdict) -> SummaryRow:
    return SummaryRow(
        quantity=new.quantity, label=label(new), unit=new.unit, before=side(kind, old), after=side(kind, new), words=said.words,
        bounds=said.bounds, sense=said.sense, gain=said.gain, runtime=runtimes(old, new), where=place(new),
        evidence="", note="; ".join(m.note for m in (old, new) if m.note),
    )  # fmt: skip


def _warnings(before: Report, after: Report, *, same_run: bool, same_machine: bool) -> list[str]:
    if same_run:
        return []
    said = [
        "measured at different times and not in turn: intervals are unpaired, and a slow hour of either counts as a difference"
    ]
    if not same_machine:
        said.append(
            f"other machine ({before.environment.cpu} against {after.environment.cpu}): nothing is said of speed and memory"
        )
    versions = [(name, *(r.environment.packages.get(name) for r in (before, after))) for name in PACKAGES]
    said += [
        f"{name} is {old or 'absent'} in the first and {new or 'absent'} in the second"
        for name, old, new in versions
        if old != new
    ]
    for which, report in (("first", before), ("second", after)):
        if (report.environment.git or "").endswith("-dirty"):
            said.append(f"the {which} was measured with uncommitted changes of squeeze")
    if before.data != after.data:
        said.append("they were scored on other data: nothing is said of quality")
    return said
