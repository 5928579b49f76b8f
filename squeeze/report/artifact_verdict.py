"""What one artifact cost and gained against the source, in one sentence: for the dashboard, pull requests and model cards.

`headline` says more, of the result alone; here every artifact of a report has its line, exports and peers too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from squeeze.report.headline import SPEEDS
from squeeze.report.schema import Manifest, Report
from squeeze.report.summary import SummaryRow, names, summarize
from squeeze.report.text import MINUS, decimals_for, percent

QUALITY = ("negative_log_likelihood", "correct", "cosine_to_source", "same_answer")
"""The first of these that was measured speaks for quality."""
NOT_SHOWN = "not distinguishable"
SPOKEN = (*(quantity for quantity, _ in SPEEDS), "highest_rate", "throughput")
"""The first of these that was measured speaks for speed."""
UNSEEN = 5e-6
"""Change of a perplexity that is not printed at all: rounding of sums in another order."""
NEGLIGIBLE = 0.02
"""Share by which files may differ (graphs, names of layers) before that alone makes a verdict better or worse."""


@dataclass(frozen=True)
class _Part:
    """What a sentence says of one quantity."""

    words: str
    sense: str
    before: str
    """What it is held against; "" where it compares by itself."""


def verdict_of(
    report: Report, manifest: Manifest, summary: Callable[[Manifest], Sequence[SummaryRow]] | None = None
) -> tuple[str, str]:
    """(one sentence, sense) of an artifact, from the same judgement as the before/after table: "3.10× faster [2.90, 3.30] (latency,
    1×128); accuracy −0.20 points [−0.40, +0.80], not distinguishable; 25.1 % of the disk." Sense: better, worse, mixed, same, failed or
    unknown. `summary`, where the caller keeps them, gives the rows of `summarize(report, manifest)`."""
    digest, source = manifest.digest, report.manifests[0].digest  # each is taken over the whole manifest
    mine = [m for m in report.measurements if m.artifact_digest == digest]
    if not mine:
        return "Not measured.", "unknown"
    if not any(m.values for m in mine):
        return f"Every measurement failed: {_first_error(m.error for m in mine)}", "failed"
    if digest == source:
        return "The source.", "unknown"
    rows = summarize(report, manifest) if summary is None else summary(manifest)
    parts = [part for part in (_speed(rows), _quality(rows), _size(rows)) if part is not None]
    failed = [row for row in rows if row.sense == "failed"]
    said = [part.words for part in parts]
    if failed:
        said.append(f"{failed[0].label} failed" if len(failed) == 1 else f"{len(failed)} quantities failed")
    if not said:
        return "Measured, but nothing compares with the source.", "unknown"
    sentence = "; ".join(said) + _against(names(report)[source], parts)
    return f"{sentence[0].upper()}{sentence[1:]}.", _sense([part.sense for part in parts], bool(failed))


def _against(source: str, parts: Sequence[_Part]) -> str:
    """What stood for the source where that is not the source itself: exports are held against its export."""
    before = list(dict.fromkeys(part.before for part in parts if part.before))
    return "" if before in ([], [source]) else f" (against {' and '.join(before)})"


def _sense(senses: Sequence[str], failed: bool) -> str:
    if {"better", "worse"} <= set(senses):
        return "mixed"
    for sense in ("worse", "better", "same"):
        if sense in senses:
            return sense
    return "failed" if failed else "unknown"


def _speed(rows: Sequence[SummaryRow]) -> _Part | None:
    for quantity in SPOKEN:
        row = next((r for r in rows if r.quantity == quantity and r.gain is not None), None)
        if row is not None:
            said = f"no difference in speed shown {row.bounds}" if row.sense == "same" else row.verdict
            return _Part(f"{said} ({row.label})", row.sense, row.before.artifact)
    return None


def _quality(rows: Sequence[SummaryRow]) -> _Part | None:
    """The price, in the terms of its quantity; where no difference is shown, what was seen stands there with its interval."""
    row = next((r for q in QUALITY for r in rows if r.quantity == q and r.after.text and r.sense != "failed"), None)
    if row is None:
        return None
    if row.quantity in ("cosine_to_source", "same_answer"):
        return _Part(f"{row.label} {row.after.text} {row.bounds}".strip(), "unknown", "")
    if row.before.text and row.before.text == row.after.text and _is_equal(row):
        return _Part(f"{row.label} unchanged", "same", row.before.artifact)
    if row.sense == "same":
        return _Part(
            f"{row.label} {_seen(row)} {row.bounds.removesuffix(' points')}, {NOT_SHOWN}", "same", row.before.artifact
        )
    return _Part(f"{row.label} {row.verdict}", row.sense, row.before.artifact)


def _is_equal(row: SummaryRow) -> bool:
    """Whether nothing changed in any example, or by less than is ever printed."""
    if row.quantity == "correct":
        return row.bounds.startswith("[+0.00, +0.00]")
    return row.gain is not None and max(abs(v - 1) for v in (row.gain.value, row.gain.low, row.gain.high)) < UNSEEN


def _seen(row: SummaryRow) -> str:
    if row.quantity == "correct":
        return f"{100 * (row.after.value - row.before.value):+.2f} points".replace("-", MINUS)
    change = row.after.value / row.before.value - 1
    return ("+" if change > 0 else "") + percent(change, decimals_for(change))


def _size(rows: Sequence[SummaryRow]) -> _Part | None:
    for row in rows:
        if row.quantity == "weight_bytes" and row.gain is not None:
            words = "the same size on disk" if row.sense == "same" else f"{percent(1 / row.gain.value, 1)} of the disk"
            sense = "same" if abs(row.gain.value - 1) < NEGLIGIBLE else row.sense
            return _Part(words, sense, row.before.artifact)
    return None


def _first_error(errors: Any) -> str:
    text = next((str(error) for error in errors if error), "no reason is given")
    return text if text.endswith(".") else f"{text}."
