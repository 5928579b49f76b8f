"""The verdict in one or two plain sentences, put together from measured numbers and nothing else.

It leads with what was lost, then says what was gained: a reader who stops early has read the price. Rejected: a score
or a grade, which would weigh speed against quality on the reader's behalf.
"""

from collections.abc import Sequence

from squeeze.report.schema import Report
from squeeze.report.summary import SummaryRow, ends, summarize
from squeeze.report.text import count, percent, times

SPEEDS = (("decode_rate", "decodes"), ("set_time", "works through the whole set"), ("latency", "answers"))
"""The first of these that was measured speaks for speed."""


def headline(report: Report, rows: Sequence[SummaryRow] | None = None) -> str:
    """The verdict; `rows`, where the caller has them, are those of `summarize`."""
    if report.status == "failed":
        return "This run failed. What it finished before that is shown; none of it is a result."
    rows = summarize(report) if rows is None else rows
    if not rows:
        return "Nothing was measured."
    before, after = ends(report)
    if before == after:
        return f"{after} was measured alone: there is nothing to compare it with."
    said = [sentence for part in PARTS if (sentence := part(rows))]
    if failed := sum(row.sense == "failed" for row in rows):
        said.append(f"{count(failed, 'quantity', 'quantities')} could not be measured")
    if not said:
        return f"{after} was measured, but nothing compares with {before}."
    return f"{after} against {before}: {'; '.join(said)}."


def _quality(rows: Sequence[SummaryRow]) -> str:
    for row in rows:
        if row.quantity in ("negative_log_likelihood", "correct") and row.sense not in ("failed", "unknown"):
            if row.sense == "same":
                return f"no difference in {row.label} shown ({row.change})"
            return f"{row.label} is {row.words} ({row.change})"
    return ""


def _agreement(rows: Sequence[SummaryRow]) -> str:
    for row in rows:
        if row.quantity == "same_answer" and row.after.text:
            return f"{row.after.text} of the answers are the same"
        if row.quantity == "cosine_to_source" and row.after.text:
            return f"the mean cosine to the source's embeddings is {row.after.text}"
    return ""


def _speed(rows: Sequence[SummaryRow]) -> str:
    for quantity, verb in SPEEDS:
        found = [row for row in rows if row.quantity == quantity and row.gain is not None]
        if len(found) > 1 and all(row.sense == "better" for row in found):
            gains = sorted(row.gain.value for row in found if row.gain is not None)
            return f"{verb} {times(gains[0])} to {times(gains[-1])} faster in {len(found)} workloads"
        if found:
            return f"{verb} " + ", ".join(_one_speed(row, named=len(found) > 1) for row in found)
    return ""


def _one_speed(row: SummaryRow, *, named: bool) -> str:
    said = "with no difference in speed shown" if row.sense == "same" else row.verdict
    return f"{said} ({row.label.partition(', ')[2]})" if named else said


def _parameters(rows: Sequence[SummaryRow]) -> str:
    return _share_left(rows, "parameters", "has {} of the parameters", "")


def _memory(rows: Sequence[SummaryRow]) -> str:
    return _share_left(rows, "peak_memory", "peaks at {} of the memory", "no difference in peak memory shown")


def _disk(rows: Sequence[SummaryRow]) -> str:
    return _share_left(rows, "weight_bytes", "takes {} of the disk", "takes as much disk as before")


def _share_left(rows: Sequence[SummaryRow], quantity: str, changed: str, same: str) -> str:
    for row in rows:
        if row.quantity == quantity and row.gain is not None:
            doubt = " (too few repeats to call)" if row.sense == "unknown" else ""
            return same if row.sense == "same" else changed.format(percent(1 / row.gain.value, 1)) + doubt
    return ""


PARTS = (_quality, _agreement, _parameters, _speed, _memory, _disk)
