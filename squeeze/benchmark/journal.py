"""What finished children said, kept on disk until the report is written, so that an interrupted bench goes on where it was.

A journal belongs to one request: the same artifacts, data, settings, seed, machine and packages. Anything else has another
name and starts anew, because half of one experiment and half of another are no experiment. A second bench of the same
request at the same time gets a journal of its own, which is thrown away. Rejected: resuming from the report (it is written
once, at the end, whole).
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from squeeze.benchmark.child import Outcome
from squeeze.provenance import Digest, digest_json
from squeeze.report.files import leave
from squeeze.report.schema import ChildRun, Measurement, write_atomically
from squeeze.report.status import JOURNALS, SHOWN

PREFIX = JOURNALS


class Journal:
    """A folder with one file for each finished child, and room for what they leave."""

    def __init__(self, folder: Path, *, is_watched: bool = True) -> None:
        """`is_watched`: whether it lies where somebody may look at it."""
        self.folder, self.is_watched = folder, is_watched
        self.reused = 0
        """Children that were taken over instead of run."""
        self.earlier_seconds = 0.0

    def found(self, key: dict[str, Any]) -> Outcome | None:
        """The outcome of this job if a child finished it before an interruption; failures are tried again."""
        path = self._path(key)
        try:
            kept = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            return None
        run = ChildRun.model_validate(kept["run"]).model_copy(update={"resumed": True})
        self.reused += 1
        self.earlier_seconds += run.seconds
        return Outcome(kept["result"], None, run)

    def keep(self, key: dict[str, Any], outcome: Outcome) -> None:
        """Remember what a child said."""
        if outcome.error is None:
            content = {"run": outcome.run.model_dump(mode="json"), "result": outcome.result}
            write_atomically(self._path(key), json.dumps(content))

    def show(self, key: dict[str, Any], rows: Sequence[Measurement]) -> None:
        """Leave the measurements that one child adds for whoever watches the bench; nothing here reads them, and none need be kept."""
        if rows and self.is_watched:
            leave(self._path(key).with_suffix(SHOWN), f"[{','.join(row.model_dump_json() for row in rows)}]")

    def _path(self, key: dict[str, Any]) -> Path:
        return self.folder / f"{digest_json(key)[7:27]}.json"


@contextmanager
def open_journal(place: Path | None, request: Digest) -> Iterator[Journal]:
    """The journal of a request under `place`; None: a temporary one, for a bench that cannot be resumed."""
    if place is None:
        with tempfile.TemporaryDirectory(prefix="squeeze-bench-") as name:
            yield Journal(Path(name), is_watched=False)
        return
    folder = place / f"{PREFIX}{request[7:19]}"
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with open_journal(None, request) as journal:
                yield journal
            return
        os.utime(folder)  # so that a watcher can tell the journal in use from one that an older bench left
        yield Journal(folder)
    finally:
        os.close(lock)


def discard(journal: Path) -> None:
    """Remove a journal, once its report is safe."""
    if journal.name.startswith(PREFIX):
        shutil.rmtree(journal, ignore_errors=True)
