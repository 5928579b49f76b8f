"""What a run says of itself while it goes on, for whoever looks at its folder: `.status.json`, replaced as a whole each time.

It is never read by a run. What a run resumes from is its artifacts and its journal, as before; a status that cannot be written
stops nothing, and one that is left behind by a killed run says so, because its process is gone. It is not flushed to the disk:
after a power cut nobody is watching. Rejected: a report.json that is rewritten as the run goes on (whoever finds one may trust
that it is complete), and a socket (the watcher may sit in another container that shares the folder and nothing else).
"""

import contextlib
import json
import os
import time
from pathlib import Path

from pydantic import Field, JsonValue, ValidationError

from squeeze.provenance import Environment
from squeeze.report.files import leave
from squeeze.report.schema import SCHEMA_VERSION, ArtifactChecks, Record, Sha256
from squeeze.report.text import wording

STATUS = ".status.json"
JOURNALS, SHOWN = ".bench-", ".rows.json"
"""Begins the name of a bench's folder of finished children; ends the names of the files there that show their measurements."""
OFTEN = 0.5
"""Seconds between two writings of progress: a watcher looks no oftener, and a training tells of hundreds of steps a second."""


class RunStatus(Record):
    """What is known of a run before its report is: all of the report but artifacts and measurements, which lie in files of their own."""

    schema_version: int = SCHEMA_VERSION
    title: str
    recipe: dict[str, JsonValue]
    started: str
    """ISO 8601, UTC."""
    process: int = Field(gt=0)
    environment: Environment
    step: str = ""
    """What is being done: "quantize int8: block 3 of 30"."""
    done: int = 0
    """Steps done."""
    total: int = 0
    artifacts: tuple[str, ...] = ()
    """Names of the folders that are whole, in order."""
    checks: tuple[ArtifactChecks, ...] = ()
    data: dict[str, Sha256] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def is_alive(self) -> bool:
        """Whether its process is there. In another container than ours its number means nothing, and the answer may be wrong."""
        try:
            os.kill(self.process, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            return True
        return True


class StatusFile:
    """The status of a run in its folder, as the run tells it."""

    def __init__(self, folder: Path, status: RunStatus) -> None:
        self.path, self.status = folder / STATUS, status
        self._written = -OFTEN
        self._write()

    def progress(self, step: str, done: int, total: int) -> None:
        """What is being done now; written at once where its words are others, and twice a second at most where only numbers are."""
        began = wording(step) != wording(self.status.step)
        self.status = self.status.model_copy(update={"step": step, "done": done, "total": total})
        if began or time.monotonic() - self._written >= OFTEN:
            self._write()

    def finished(
        self, artifacts: tuple[str, ...], checks: tuple[ArtifactChecks, ...], data: dict[str, str], notes: tuple[str, ...]
    ) -> None:  # fmt: skip
        """What is whole by now."""
        found = {"artifacts": artifacts, "checks": checks, "data": data, "notes": notes}
        self.status = self.status.model_copy(update=found)
        self._write()

    def remove(self) -> None:
        """At the end, once a report stands in its place."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        leave(self.path, self.status.model_dump_json())
        self._written = time.monotonic()


def read_status(folder: Path) -> RunStatus | None:
    """The status in a run folder; None where there is none that can be read."""
    try:
        content = json.loads((folder / STATUS).read_bytes())
        return RunStatus.model_validate(content)
    except (OSError, ValueError, RecursionError, ValidationError):
        return None
