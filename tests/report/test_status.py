"""What a run says of itself: whole or not there, never in the way of the run."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from squeeze.provenance import environment
from squeeze.report.status import STATUS, RunStatus, StatusFile, read_status


def status(**changes: Any) -> RunStatus:
    fields = {
        "title": "x",
        "recipe": {},
        "started": "2026-11-24T00:00:00+00:00",
        "process": os.getpid(),
        "environment": environment(),
    }
    return RunStatus(**{**fields, **changes})


def test_what_is_told_is_read_and_gone_at_the_end(tmp_path: Path) -> None:
    told = StatusFile(tmp_path, status())
    told.progress("quantize int8: block 1 of 3", 2, 6)
    told.finished(("0-source",), (), {}, ("a note",))
    found = read_status(tmp_path)
    assert found is not None
    assert (found.step, found.done, found.total) == ("quantize int8: block 1 of 3", 2, 6)
    assert (found.artifacts, found.notes, found.is_alive) == (("0-source",), ("a note",), True)
    assert [path.name for path in tmp_path.iterdir()] == [STATUS]
    told.remove()
    told.remove()
    assert read_status(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_progress_within_a_step_is_written_seldom_and_another_step_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("squeeze.report.status.time.monotonic", lambda: clock[0])
    told = StatusFile(tmp_path, status())
    seen = []
    steps = (
        (100.1, "a 1", 1),
        (100.2, "a 2", 1),
        (100.3, "1-b: loss 1e-3", 2),
        (100.7, "1-b: loss 2", 2),
        (100.9, "2-b: loss 2", 2),
    )
    for moment, step, done in steps:
        clock[0] = moment
        told.progress(step, done, 9)
        found = read_status(tmp_path)
        assert found is not None
        seen.append(found.step)
    assert seen == ["a 1", "a 1", "1-b: loss 1e-3", "1-b: loss 1e-3", "2-b: loss 2"]


def test_a_folder_that_cannot_be_written_stops_no_run(tmp_path: Path) -> None:
    told = StatusFile(tmp_path / "gone", status())
    told.progress("a", 1, 2)
    told.finished((), (), {}, ())
    told.remove()
    assert not (tmp_path / "gone").exists()


def test_a_process_that_ended_is_not_alive(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not status(process=ended.pid).is_alive
    assert not status(process=2**62).is_alive


@pytest.mark.parametrize("content", ["", "{", "[]", '{"title": 1}', "[" * 100_000, '{"process": -1}'])
def test_a_torn_or_foreign_status_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / STATUS).write_text(content, "utf-8")
    assert read_status(tmp_path) is None
