"""What a report says of each artifact: where it comes from, and in one sentence what it cost and gained against the source."""

from collections.abc import Sequence
from typing import Any

from squeeze.dashboard.readings import Readings, finite, unique
from squeeze.report.artifact_verdict import verdict_of
from squeeze.report.explained import stage_label, stage_warnings
from squeeze.report.schema import Check, Manifest


def artifacts(readings: Readings) -> list[dict[str, Any]]:
    """Every artifact of the report in its order, measured or not; then what was measured without a manifest."""
    report = readings.report
    checks = {entry.artifact: entry.checks for entry in report.checks}
    rows = []
    for digest, key in readings.keys.items():
        manifest = readings.manifests.get(digest)
        verdict, sense = _WITHOUT_MANIFEST if manifest is None else verdict_of(report, manifest, readings.summary)
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


_WITHOUT_MANIFEST = (
    "Measured, but its manifest is not in this report: there is nothing to compare it with.", "unknown"
)  # fmt: skip
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
