"""A run that is going on, as the report that it would write if it ended now: artifacts as they become whole, cells as children end.

Everything is read from what a running `squeeze run` leaves in its folder anyway: `.status.json` (`report.status`), the manifests of
finished artifacts, and the rows beside the journal of its bench. Nothing is locked and nothing written, so that no watcher can
disturb a run; a file that is being replaced is read old or new, never half. What is there is a part of what will be: repeats are still
to come, so every interval is wider than it will be, and nothing is called better that is not already so.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from squeeze.report.schema import Manifest, Measurement, Report
from squeeze.report.status import JOURNALS, SHOWN, STATUS, RunStatus, read_status

ROWS = TypeAdapter(tuple[Measurement, ...])


@dataclass(frozen=True)
class Running:
    """A run without a report of its own yet."""

    report: Report
    """What there is by now; its status is "ok" while it runs, because nothing failed so far, and "failed" where it was cut off."""
    doing: str
    """ "Running: bench export-1-quantize onnxruntime: latency (3 of 24).", or that it was cut off and how it goes on."""
    is_alive: bool
    """Whether its process is there."""


def running_report(folder: Path) -> Running | None:
    """The run in a folder, where one is going on or was cut off; None where there is none, or it has ended and written its report."""
    status = read_status(folder)
    if status is None or (not status.is_alive and (folder / "report.json").is_file()):
        return None
    manifests = [m for name in status.artifacts if (m := _manifest(folder, name)) is not None]
    doing = _doing(status)
    outcome: Literal["ok", "failed"] = "ok" if status.is_alive else "failed"
    report = Report(
        title=status.title, recipe=status.recipe, manifests=tuple(manifests), checks=status.checks,
        measurements=tuple(_measured(folder, status, manifests)), data=status.data, environment=status.environment, started=status.started,
        seconds=_seconds(status), notes=status.notes, status=outcome,
        error=None if status.is_alive else doing,
    )  # fmt: skip
    return Running(report, doing, status.is_alive)


def watched(folder: Path) -> list[Path]:
    """Files of a running run whose change shows in its report; none in a folder where none is running."""
    status = folder / STATUS
    if not status.is_file():
        return []
    return [status, *folder.glob("*/squeeze.json"), *folder.glob(f"{JOURNALS}*/*{SHOWN}")]


def _doing(status: RunStatus) -> str:
    if not status.is_alive:
        return (
            f"The run was cut off during: {status.step or 'its start'}. The same command goes on with what is finished."
        )
    share = f" ({status.done} of {status.total})" if status.total else ""
    return f"Running: {status.step or 'starting'}{share}."


def _manifest(folder: Path, name: str) -> Manifest | None:
    """The manifest of a finished artifact; None where its name leads out of the run, or it is being replaced."""
    if Path(name).name != name or name.startswith("."):
        return None
    try:
        return Manifest.model_validate(json.loads((folder / name / "squeeze.json").read_bytes()))
    except (OSError, ValueError, RecursionError, ValidationError):
        return None


def _measured(folder: Path, status: RunStatus, manifests: Iterable[Manifest]) -> list[Measurement]:
    """The measurements of the journal in use: those of each child, put together as the bench does at its end."""
    known = {m.digest for m in manifests}
    journals = sorted((time, path) for time, _, path in _found(folder.glob(f"{JOURNALS}*")) if path.is_dir())
    if not journals or journals[-1][0] < _began(status) * 1e9:
        return []
    files = sorted(_found(journals[-1][1].glob(f"*{SHOWN}")))
    return together(
        row for time, size, path in files for row in _rows(path, time, size) if row.artifact_digest in known
    )


def _found(paths: Iterable[Path]) -> Iterator[tuple[int, int, Path]]:
    """(time of change in ns, size, path) of what is still there: a journal goes when its report is written."""
    for path in paths:
        with suppress(OSError):
            found = path.stat()
            yield found.st_mtime_ns, found.st_size, path


@lru_cache(maxsize=4096)
def _rows(path: Path, time: int, size: int) -> tuple[Measurement, ...]:
    """Of one child. `time` and `size` are part of the key: a file is read once, and again when it changed."""
    try:
        return ROWS.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return ()


def together(rows: Iterable[Measurement]) -> list[Measurement]:
    """One measurement for each quantity of each cell, repeats in order; what has values has failed in no repeat that counts.

    What has no repeats (quality, sizes) is told anew by each child, so the last one holds.
    """
    found: dict[tuple[object, ...], list[Measurement]] = {}
    for m in rows:
        key = (m.artifact_digest, m.runtime, m.device, m.threads, m.dtype, m.quantity, m.unit, m.workload)
        found.setdefault(key, []).append(m)
    return [_together(parts) for parts in found.values()]


def _together(parts: list[Measurement]) -> Measurement:
    told = [m for m in parts if m.values]
    repeated = sorted((m for m in told if m.repeat), key=lambda m: m.repeat)
    if not repeated:
        return (told or parts)[-1]
    changes = {
        "values": tuple(v for m in repeated for v in m.values), "repeat": tuple(r for m in repeated for r in m.repeat),
        "warmups": tuple(w for m in repeated for w in m.warmups), "note": "; ".join(dict.fromkeys(m.note for m in repeated if m.note)),
    }  # fmt: skip
    return repeated[-1].model_copy(update=changes)


def _seconds(status: RunStatus) -> float:
    return max(0.0, datetime.now(UTC).timestamp() - _began(status))


def _began(status: RunStatus) -> float:
    """Unix time of the run's start; now where the text is no date."""
    try:
        return datetime.fromisoformat(status.started).timestamp()
    except ValueError:
        return datetime.now(UTC).timestamp()
