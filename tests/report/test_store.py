"""A results folder keeps every report whole whoever writes at once, and its index is only ever a copy."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from squeeze.errors import ReportError
from squeeze.report import store

WRITER = """
import sys, time
from pathlib import Path
from squeeze.report.schema import read_report
from squeeze.report.store import add
report, folder, name, count = read_report(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
for number in range(count):
    add(report.model_copy(update={"title": f"{name} {number}", "notes": ("x" * 50_000,)}), folder)
"""


def test_a_report_is_added_under_its_time_title_and_digest_and_reads_back(make: Any, tmp_path: Path) -> None:
    report = make.pair("latency", [2, 2, 2], [1, 1, 1], title="Zeit für «ümlaut»/..")
    path = store.add(report, tmp_path / "results")
    assert path.name.startswith("20261124T000000Z-zeit-fur-umlaut-")
    (stored,), skipped = store.read_all(tmp_path / "results")
    assert (stored.report, stored.path, skipped) == (report, path, [])
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"


def test_the_same_report_twice_is_one_file_and_another_never_overwrites(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store.add(make.report(), tmp_path)
    assert store.add(make.report(), tmp_path) == first
    monkeypatch.setattr(store, "SHORT", 0)
    names = {store.add(make.report(notes=(text,)), tmp_path) for text in ("a", "b", "c")}
    assert len(names) == 3
    assert len(store.read_all(tmp_path)[0]) == 4


def test_eight_writers_at_once_lose_and_tear_nothing_and_the_index_equals_the_files(make: Any, tmp_path: Path) -> None:
    seed = store.add(make.pair("latency", [2, 2, 2], [1, 1, 1]), tmp_path / "seed")
    folder = tmp_path / "results"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(seed), str(folder), f"writer {n}", "20"]) for n in range(8)
    ]
    while not folder.is_dir():
        time.sleep(0.01)
    store.rebuild(folder)  # while they write
    assert [writer.wait() for writer in writers] == [0] * 8
    stored, skipped = store.read_all(folder)
    assert ({one.report.title for one in stored}, skipped) == (
        {f"writer {w} {n}" for w in range(8) for n in range(20)},
        [],
    )
    assert not store.is_current(folder)
    with closing(sqlite3.connect(store.index(folder))) as base:
        runs = base.execute("SELECT file, bytes, title FROM runs ORDER BY file").fetchall()
        count = base.execute("SELECT COUNT(*) FROM measurements").fetchone()[0]
    assert runs == sorted((one.path.name, one.path.stat().st_size, one.report.title) for one in stored)
    assert count == 2 * 160
    assert store.is_current(folder)


def test_a_writer_that_is_killed_leaves_no_half_report(make: Any, tmp_path: Path) -> None:
    seed = store.add(make.report(), tmp_path / "seed")
    folder = tmp_path / "results"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(seed), str(folder), "killed", "100000"])
    while not folder.is_dir() or len(list(folder.iterdir())) < 5:
        time.sleep(0.005)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    stored, skipped = store.read_all(folder)
    assert len(stored) >= 4
    assert skipped == []


def test_torn_foreign_and_newer_files_are_named_and_the_rest_is_read(make: Any, tmp_path: Path) -> None:
    store.add(make.report(), tmp_path)
    (tmp_path / "torn.json").write_text('{"schema_version": 2, "measu')
    (tmp_path / "foreign.json").write_text('{"a": 1}')
    (tmp_path / "notes.txt").write_text("hello")
    stored, skipped = store.read_all(tmp_path)
    assert len(stored) == 1
    assert [(path.name, reason.split(" ")[1:4]) for path, reason in skipped] == [
        ("foreign.json", ["is", "JSON", "but"]), ("torn.json", ["is", "not", "whole"]),
    ]  # fmt: skip
    assert len(store.history(tmp_path)) == 0


def test_an_index_that_is_torn_or_lies_is_made_again(make: Any, tmp_path: Path) -> None:
    store.add(make.pair("latency", [2, 2, 2], [1, 1, 1]), tmp_path)
    (tmp_path / "index.sqlite").write_bytes(b"not a database")
    assert len(store.history(tmp_path)) == 2
    store.add(make.pair("latency", [4, 4, 4], [1, 1, 1], started="2026-11-25T00:00:00+00:00"), tmp_path)
    assert len(store.history(tmp_path)) == 4


def test_history_is_in_order_of_time_and_asks_by_every_name(make: Any, tmp_path: Path) -> None:
    store.add(make.pair("latency", [4, 4, 4], [3, 3, 3], started="2026-11-26T00:00:00+00:00"), tmp_path)
    store.add(make.pair("latency", [2, 2, 9], [1, 1, 1], environment=make.other_machine()), tmp_path)
    store.add(make.report(make.measured(make.result, "latency", []), title="failed"), tmp_path)
    rows = store.history(tmp_path, quantity="latency", artifact="export-0-source")
    assert [row.median for row in rows] == [2, 4]
    assert rows[0].machine != rows[1].machine
    assert [row.median for row in store.history(tmp_path, machine=rows[1].machine, artifact="export-0-source")] == [4]
    assert store.history(tmp_path, title="failed")[0].error == "killed by SIGKILL"
    assert store.history(tmp_path, workload="8×128") == []
    assert {row.workload for row in store.history(tmp_path, workload="1×128")} == {"1×128"}


def test_a_report_is_found_by_path_folder_id_beginning_or_latest(make: Any, tmp_path: Path) -> None:
    old = store.add(make.report(title="old"), tmp_path)
    new = store.add(make.report(title="new", started="2026-11-25T00:00:00+00:00"), tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").write_text(old.read_text())
    for ref, title in (
        (str(old), "old"), (str(tmp_path / "run"), "old"), (old.stem, "old"), ("20261124", "old"), ("latest", "new"), ("latest~1", "old"),
    ):  # fmt: skip
        assert store.resolve(ref, tmp_path).title == title
    with pytest.raises(ReportError, match=r"2026 is the beginning of 2 ids"):
        store.resolve("2026", tmp_path)
    with pytest.raises(ReportError, match=f"Newest there: {new.stem}, {old.stem}"):
        store.resolve("nowhere", tmp_path)
    with pytest.raises(ReportError, match="holds 2 reports"):
        store.resolve("latest~2", tmp_path)


def test_a_folder_that_cannot_be_written_is_named(make: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match=r"file cannot take a report: File exists"):
        store.add(make.report(), tmp_path / "file")
    with pytest.raises(ReportError, match="is not a folder"):
        store.rebuild(tmp_path / "nowhere")
