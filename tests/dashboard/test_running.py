"""A run that is going on, read from what it leaves on disk, bit by bit."""

import json
import os
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from squeeze.dashboard.running import Running, running_report, together, watched
from squeeze.dashboard.view import build, collect
from squeeze.report.schema import Manifest, Measurement, write_report
from squeeze.report.status import STATUS, RunStatus, StatusFile

NOW = datetime.now(UTC) - timedelta(seconds=30)


class Run:
    """A run's folder, filled by hand as the pipeline and the bench fill it."""

    def __init__(self, folder: Path, make: Any, **changes: Any) -> None:
        folder.mkdir(exist_ok=True)
        fields = {
            "title": "live", "recipe": {"name": "live"}, "started": NOW.isoformat(timespec="seconds"), "process": os.getpid(),
            "environment": make.environment,
        }  # fmt: skip
        self.folder, self.make, self.manifests = folder, make, ()
        self.file = StatusFile(folder, RunStatus(**{**fields, **changes}))

    def finish(self, *manifests: Manifest) -> None:
        for manifest in manifests:
            (self.folder / manifest.name).mkdir(exist_ok=True)
            (self.folder / manifest.name / "squeeze.json").write_text(manifest.model_dump_json(), "utf-8")
        self.file.finished(tuple(m.name for m in manifests), (), {}, ())

    def child(self, name: str, rows: Sequence[Measurement], journal: str = ".bench-0123456789ab") -> None:
        place = self.folder / journal
        place.mkdir(exist_ok=True)
        (place / f"{name}.json").write_text("{}", "utf-8")
        (place / f"{name}.rows.json").write_text(f"[{','.join(row.model_dump_json() for row in rows)}]", "utf-8")

    def now(self) -> Running:
        found = running_report(self.folder)
        assert found is not None
        return found


@pytest.fixture
def run(tmp_path: Path, make: Any) -> Callable[..., Run]:
    return lambda name="run", **changes: Run(tmp_path / name, make, **changes)


def test_stages_and_cells_are_there_as_they_finish(run: Callable[..., Run], make: Any) -> None:
    going = run()
    going.file.progress("source model", 0, 6)
    found = going.now()
    assert (found.doing, found.is_alive, found.report.manifests) == ("Running: source model (0 of 6).", True, ())
    since = (datetime.now(UTC) - NOW).total_seconds()
    assert since - 2 < found.report.seconds < since + 2
    source, result = make.manifest("0-source"), make.manifest("1-quantize")
    going.finish(source)
    assert [m.name for m in going.now().report.manifests] == ["0-source"]
    going.finish(source, result)
    assert [m.name for m in going.now().report.manifests] == ["0-source", "1-quantize"]
    assert going.now().report.measurements == ()
    going.child("a", [make.measured(source, "latency", [0.1, 0.2], repeat=(0, 0), warmups=(0.5,))])
    going.child("b", [make.measured(result, "latency", [0.05], repeat=(0,))])
    assert [m.values for m in going.now().report.measurements] == [(0.1, 0.2), (0.05,)]
    going.child("c", [make.measured(source, "latency", [0.3], repeat=(1,), warmups=(0.6,))])
    first = going.now().report.measurements[0]
    assert (first.values, first.repeat, first.warmups) == ((0.1, 0.2, 0.3), (0, 0, 1), (0.5, 0.6))


def test_it_is_one_report_of_the_view_that_says_what_it_does_and_keeps_its_id(
    run: Callable[..., Run], make: Any, tmp_path: Path
) -> None:  # fmt: skip
    going, source = run(), make.manifest("0-source")
    going.finish(source)
    going.file.progress("bench 0-source torch: latency", 3, 24)
    sources, skipped = collect([going.folder])
    view = build(sources, skipped)["reports"][0]
    assert skipped == []
    assert (view["status"], view["error"]) == ("running", None)
    assert view["headline"] == "Running: bench 0-source torch: latency (3 of 24)."
    assert view["file"] == str(going.folder / "report.json")
    going.child("a", [make.measured(source, "latency", [0.1] * 3)])
    again = build(*collect([tmp_path]))["reports"][0]
    assert again["id"] == view["id"]
    assert again["headline"].startswith("Running: bench 0-source torch: latency (3 of 24). So far: ")
    assert {cell["quantity"] for cell in again["cells"]} == {"latency"}


def test_the_report_takes_its_place_when_the_run_ends(run: Callable[..., Run], make: Any) -> None:
    going = run()
    write_report(make.report((), (), title="an earlier run"), going.folder / "report.json")
    assert [s.report.title for s in collect([going.folder])[0]] == ["live"]
    write_report(make.report((), (), title="the end"), going.folder / "report.json")
    going.file.remove()
    (source,), _ = collect([going.folder])
    assert (source.report.title, source.running, source.file) == ("the end", False, str(going.folder / "report.json"))
    assert running_report(going.folder) is None
    assert watched(going.folder) == []


def test_a_run_that_was_cut_off_says_so_and_its_earlier_report_stays(run: Callable[..., Run], make: Any) -> None:
    going = run(process=2**40)
    going.finish(make.manifest("0-source"))
    going.file.progress("distill 3 layers: step 40 of 100", 2, 5)
    found = going.now()
    assert (
        found.doing
        == "The run was cut off during: distill 3 layers: step 40 of 100. The same command goes on with what is finished."
    )
    assert (found.is_alive, found.report.status, found.report.error) == (False, "failed", found.doing)
    write_report(make.report((), (), title="an earlier run"), going.folder / "report.json")
    assert [s.report.title for s in collect([going.folder])[0]] == ["an earlier run"]


def test_a_failed_child_is_a_row_with_its_reason_until_another_succeeds(make: Any) -> None:
    source = make.manifest("0-source")
    failed = make.measured(source, "latency", (), error="killed by SIGKILL")
    good = make.measured(source, "latency", [1.0], repeat=(1,))
    assert [m.error for m in together([failed])] == ["killed by SIGKILL"]
    assert [(m.values, m.error) for m in together([failed, good])] == [((1.0,), None)]
    assert [(m.values, m.error) for m in together([good, failed])] == [((1.0,), None)]


def test_what_is_counted_or_scored_is_told_once_and_other_cells_stay_apart(make: Any) -> None:
    source = make.manifest("0-source")
    size = make.measured(source, "weight_bytes", [4.0], repeat=())
    assert [m.values for m in together([size, size])] == [(4.0,)]
    threads = [make.measured(source, "latency", [1.0], threads=n) for n in (1, 2)]
    assert together(threads) == threads


def test_only_the_journal_of_this_run_counts_and_only_of_its_artifacts(run: Callable[..., Run], make: Any) -> None:
    going, source = run(), make.manifest("0-source")
    going.finish(source)
    going.child("a", [make.measured(source, "latency", [9.0])], journal=".bench-older")
    os.utime(going.folder / ".bench-older", (NOW.timestamp() - 100,) * 2)
    assert going.now().report.measurements == ()
    going.child("a", [make.measured(source, "latency", [1.0]), make.measured(make.manifest("x"), "latency", [2.0])])
    assert [m.values for m in going.now().report.measurements] == [(1.0,)]


def test_torn_files_and_names_that_lead_out_are_passed_over(run: Callable[..., Run], make: Any, tmp_path: Path) -> None:
    going, source = run(), make.manifest("0-source")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "squeeze.json").write_text(make.manifest("secret").model_dump_json(), "utf-8")
    going.finish(source)
    going.file.finished(("../secret", str(tmp_path / "secret"), "0-source", "absent"), (), {}, ())
    going.child("a", [make.measured(source, "latency", [1.0])])
    for name, text in (("torn", '[{"quantity": "lat'), ("foreign", '{"a": 1}'), ("empty", "")):
        (going.folder / ".bench-0123456789ab" / f"{name}.rows.json").write_text(text, "utf-8")
    report = going.now().report
    assert [m.name for m in report.manifests] == ["0-source"]
    assert [m.values for m in report.measurements] == [(1.0,)]


def test_a_file_is_read_again_only_when_it_changed(run: Callable[..., Run], make: Any) -> None:
    going, source = run(), make.manifest("0-source")
    going.finish(source)
    going.child("a", [make.measured(source, "latency", [1.0])])
    assert going.now().report.measurements[0].values == (1.0,)
    time.sleep(0.02)
    going.child("a", [make.measured(source, "latency", [25.0])])
    assert going.now().report.measurements[0].values == (25.0,)


def test_what_is_watched_is_the_status_the_manifests_and_the_rows(run: Callable[..., Run], make: Any) -> None:
    going, source = run(), make.manifest("0-source")
    going.finish(source)
    going.child("a", [make.measured(source, "latency", [1.0])])
    names = {str(path.relative_to(going.folder)) for path in watched(going.folder)}
    assert names == {STATUS, "0-source/squeeze.json", ".bench-0123456789ab/a.rows.json"}


def test_a_start_that_is_no_date_shows_no_cells_of_an_unknown_age(run: Callable[..., Run], make: Any) -> None:
    going, source = run(started="yesterday"), make.manifest("0-source")
    going.finish(source)
    assert going.now().report.seconds < 5
    assert json.loads((going.folder / STATUS).read_text("utf-8"))["started"] == "yesterday"
