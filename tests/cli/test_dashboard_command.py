"""`squeeze dashboard` as a person types it: what it writes, what it says of what it could not read, and how it ends."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from squeeze.provenance import digest_bytes, environment
from squeeze.report.schema import Manifest, Measurement, Report, write_report

Squeeze = Callable[..., CompletedProcess[str]]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with one report of one measurement, and two files that are none."""
    here = environment()
    manifest = Manifest(
        name="alone", format="onnx", task="causal-lm", source="m", files={}, parent=None, record=None, data={}, parameters=8,
        nonzero_parameters=8, weight_bytes=8, inputs=digest_bytes(b"x"), environment=here, created="2026-11-24T00:00:00+00:00", extra={},
    )  # fmt: skip
    measured = Measurement(
        quantity="peak_memory", unit="bytes", values=(1e8,), workload=None, artifact="alone", artifact_digest=manifest.digest,
        runtime="onnxruntime", device="cpu", threads=2, repeat=(0,),
    )  # fmt: skip
    folder = tmp_path / "results"
    folder.mkdir()
    report = Report(
        title="a run", recipe={}, manifests=(manifest,), checks=(), measurements=(measured,), environment=here,
        started="2026-11-24T00:00:00+00:00", seconds=1.0, notes=(), status="ok", error=None,
    )  # fmt: skip
    write_report(report, folder / "a.json")
    (folder / "torn.json").write_text('{"schema_version": 2, "measure')
    (folder / "foreign.json").write_text("[1, 2]")
    return folder


def test_one_page_is_written_and_what_was_skipped_is_named(squeeze: Squeeze, results: Path) -> None:
    done = squeeze("dashboard", "results", where=results.parent)
    assert done.returncode == 0, done.stderr
    page = (results.parent / "dashboard.html").read_text("utf-8")
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    lines = done.stderr.splitlines()
    assert lines[0].startswith("skipped results/foreign.json: is JSON but not a squeeze report")
    assert lines[1].startswith("skipped results/torn.json: is not whole JSON")
    assert lines[2].startswith("dashboard.html: ")
    assert lines[2].endswith("1 report read, 2 skipped")


def test_an_empty_folder_gives_a_page_that_says_so(squeeze: Squeeze, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = squeeze("dashboard", "empty", "--out", "x.html", "--json", where=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No report was found: the page says so." in done.stderr
    told = json.loads(done.stdout)
    assert told == {"file": "x.html", "bytes": (tmp_path / "x.html").stat().st_size, "reports": [], "skipped": []}


def test_a_chart_is_written_alone(squeeze: Squeeze, results: Path) -> None:
    done = squeeze(
        "dashboard", "results/a.json", "--chart", "memory", "--theme", "dark", "-o", "x.png", where=results.parent
    )
    assert done.returncode == 0, done.stderr
    assert (results.parent / "x.png").read_bytes().startswith(b"\x89PNG")
    assert not (results.parent / "dashboard.html").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "error: nowhere does not exist, and is no id in results. Name a report.json"),
        (["results", "--chart", "pareto"], "error: There is nothing to draw as pareto: No artifact has both"),
        (["results", "--chart", "memory", "--theme", "darc"], "error: --theme darc is unknown. Did you mean 'dark'?"),
        (["results", "--variant", "x"], "error: --variant and --report choose what --chart draws."),
        (["results", "--serve", "--out", "x.html"], "error: --serve shows the page and writes nothing."),
        (
            ["results", "--out", "none/x.html"],
            "error: none/x.html cannot be written: No such file or directory. Name another file: --out.",
        ),
    ],
)
def test_what_cannot_be_done_ends_with_2_and_how_to_mend_it(
    squeeze: Squeeze, results: Path, words: list[str], says: str
) -> None:
    done = squeeze("dashboard", *words, where=results.parent)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
