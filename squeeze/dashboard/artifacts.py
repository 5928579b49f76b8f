"""What a report says of each artifact: where it comes from, and in one sentence what it cost and gained against the source."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from squeeze.dashboard.readings import Readings, finite, unique
from squeeze.provenance import Digest
from squeeze.report.explained import stage_label, stage_warnings
from squeeze.report.headline import SPEEDS
from squeeze.report.schema import Check, Manifest
from squeeze.report.summary import SummaryRow
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


def artifacts(readings: Readings) -> list[dict[str, Any]]:
    """Every artifact of the report in its order, measured or not; then what was measured without a manifest."""
    report = readings.report
    checks = {entry.artifact: entry.checks for entry in report.checks}
    rows = []
    for digest, key in readings.keys.items():
        manifest = readings.manifests.get(digest)
        verdict, sense = verdict_of(readings, digest)
        said = {
            "key": key,
            "stage": stage_of(manifest, readings),
            "peer": manifest is not None and manifest.is_peer,
            "verdict": verdict,
            "sense": sense,
        }
        ran = unique(m.runtime for m in report.measurements if m.artifact_digest == digest)
        known = (
            _UNKNOWN | {"label": key} if manifest is None else _of(manifest, readings, checks.get(manifest.name, ()))
        )
        rows.append({**said, **known, "runtimes": ran, "digest": digest})
    return rows


_UNKNOWN: dict[str, Any] = {
    "format": "unknown", "parent": None, "bytes": 0, "parameters": 0, "nonzero": 0, "seconds": None, "notes": [],
    "warnings": [], "checks": [],
}  # fmt: skip


def _of(manifest: Manifest, readings: Readings, checks: Sequence[Check]) -> dict[str, Any]:
    record = manifest.record
    return {
        "label": manifest.name, "format": manifest.format, "parent": readings.keys.get(manifest.parent or ""),
        "bytes": manifest.weight_bytes, "parameters": manifest.parameters, "nonzero": manifest.nonzero_parameters,
        "seconds": None if record is None else record.seconds, "notes": [] if record is None else list(record.notes),
        "warnings": list(stage_warnings(manifest)),
        "checks": [
            {"name": c.name, "value": finite(c.value), "limit": finite(c.limit), "passed": c.passed, "detail": c.detail} for c in checks
        ],
    }  # fmt: skip


def stage_of(manifest: Manifest | None, readings: Readings) -> str:
    """What made it, in words: "source", "prune wanda 50 % unstructured", "export of 1-quantize"."""
    if manifest is None:
        return "made elsewhere"
    if manifest is readings.report.manifests[0]:
        made = "made by another tool" if manifest.is_peer else stage_label(manifest.record) if manifest.record else ""
        return f"source ({made})" if made else "source"
    if manifest.record is None:
        return "made by another tool" if manifest.is_peer else "another source"
    if manifest.record.kind != "export":
        return stage_label(manifest.record)
    parent = readings.keys.get(manifest.parent or "")
    made = "" if parent is None else f" of {parent}"
    origin = readings.manifests.get(manifest.parent or "")
    return f"export{made}" + (f" ({stage_label(origin.record)})" if origin is not None and origin.record else "")


def verdict_of(readings: Readings, digest: Digest) -> tuple[str, str]:
    """(one sentence, sense) of an artifact against the source, from the same judgement as the before/after table."""
    manifest = readings.manifests.get(digest)
    if manifest is None:
        return "Measured, but its manifest is not in this report: there is nothing to compare it with.", "unknown"
    mine = [m for m in readings.report.measurements if m.artifact_digest == digest]
    if not mine:
        return "Not measured.", "unknown"
    if not any(m.values for m in mine):
        return f"Every measurement failed: {_first_error(m.error for m in mine)}", "failed"
    if manifest is readings.report.manifests[0]:
        return "The source.", "unknown"
    rows = readings.summary(manifest)
    parts = [part for part in (_speed(rows), _quality(rows), _size(rows)) if part is not None]
    failed = [row for row in rows if row.sense == "failed"]
    said = [part.words for part in parts]
    if failed:
        said.append(f"{failed[0].label} failed" if len(failed) == 1 else f"{len(failed)} quantities failed")
    if not said:
        return "Measured, but nothing compares with the source.", "unknown"
    sentence = "; ".join(said) + _against(readings, parts)
    return f"{sentence[0].upper()}{sentence[1:]}.", _sense([part.sense for part in parts], bool(failed))


def _against(readings: Readings, parts: Sequence[_Part]) -> str:
    """What stood for the source where that is not the source itself: exports are held against its export."""
    before = unique(part.before for part in parts if part.before)
    return "" if before in ([], [readings.report.manifests[0].name]) else f" (against {' and '.join(before)})"


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
