"""`squeeze bench` as installed: measure, gate, compare, follow and export, on a tiny classifier."""

import contextlib
import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from squeeze.report.status import SHOWN

SQUEEZE = Path(sys.executable).with_name("squeeze")
QUICK = (
    "--threads", 1, "--set", "bench.seconds_per_cell=0.02", "--set", "bench.ceilings=false", "--set", "bench.energy=false",
    "--set", "bench.memory=false", "--set", "bench.workloads=[{kind: grid, batch: [1], sequence: [8, 16]}]",
)  # fmt: skip


Squeeze = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def place(squeeze: Squeeze, tmp_path_factory: pytest.TempPathFactory, tiny_bert_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    assert squeeze("quantize", tiny_bert_folder, "--out", "run", where=folder).returncode == 0
    assert squeeze("export", "run", where=folder).returncode == 0
    return folder


@pytest.fixture(scope="module")
def benched(squeeze: Squeeze, place: Path) -> list[dict[str, Any]]:
    """Two benches of one run folder; the second is the latest."""
    found = []
    for _ in range(2):
        done = squeeze("bench", "run", *QUICK, "--repeats", 3, "--json", where=place)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
        time.sleep(1.1)  # reports of one second sort by their digests
    return found


def test_without_data_shapes_are_timed_and_the_report_is_in_the_results_folder(
    place: Path, benched: list[dict[str, Any]]
) -> None:
    assert len(list((place / "results").glob("*-bench-*.json"))) == 2
    assert not list((place / "results").glob(".bench-*")), "the journal went with the report"
    timed = {
        (m["artifact"], m["workload"]["label"] if "label" in m["workload"] else m["workload"]["sequence"])
        for m in benched[0]["measurements"]
        if m["quantity"] == "latency"
    }
    assert timed == {(name, n) for name in ("0-source", "export-0-source", "export-1-quantize") for n in (8, 16)}
    assert {child["purpose"] for child in benched[0]["children"]} == {"latency"}


def test_the_static_cost_comes_before_and_the_table_after_what_is_measured(squeeze: Squeeze, place: Path) -> None:
    done = squeeze("bench", "run/export-0-source", *QUICK, "--repeats", 1, "--results", "other", where=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("static cost") < done.stdout.index("latency, 1×8")


def test_a_condition_that_holds_ends_with_3_and_one_that_does_not_with_0(
    squeeze: Squeeze, place: Path, benched: list[dict[str, Any]]
) -> None:
    files = sorted((place / "results").glob("*-bench-*.json"))
    same = ("bench", "compare", files[0], files[0], "--before-artifact", "export-0-source")
    passed = squeeze(*same, "--fail-if", "weight_bytes > 0.99x", where=place)
    assert passed.returncode == 0, passed.stderr
    failed = squeeze(*same, "--fail-if", "weight_bytes > 0.01x", where=place)
    assert failed.returncode == 3
    assert "weights on disk: 'weight_bytes > 0.01x' holds beyond chance" in failed.stderr
    unknown = squeeze(*same, "--fail-if", "wait_bytes > 1x", where=place)
    assert (unknown.returncode, "Did you mean" in unknown.stderr) == (2, True)


def test_two_runs_are_compared_with_what_must_be_known(
    squeeze: Squeeze, place: Path, benched: list[dict[str, Any]]
) -> None:
    done = squeeze("bench", "compare", "latest~1", where=place)
    assert done.returncode == 0, done.stderr
    assert "latency, 1×8" in done.stdout
    assert "warning: measured at different times" in done.stderr
    rows = json.loads(squeeze("bench", "compare", "latest~1", "latest", "--json", where=place).stdout)["rows"]
    assert {row["label"] for row in rows} >= {"latency, 1×8", "latency, 1×16", "weights on disk"}


def test_history_export_and_index_read_what_was_measured(
    squeeze: Squeeze, place: Path, benched: list[dict[str, Any]]
) -> None:
    words = (
        "bench",
        "history",
        "--quantity",
        "latency",
        "--artifact",
        "export-0-source",
        "--workload",
        "1×8",
        "--json",
    )
    rows = json.loads(squeeze(*words, where=place).stdout)
    assert [row["title"] for row in rows] == ["bench", "bench"]
    exported = squeeze("bench", "export", "latest", "--format", "csv", where=place)
    lines = list(csv.DictReader(io.StringIO(exported.stdout)))
    expected = sum(len(m["values"]) for m in benched[1]["measurements"])
    assert sum(bool(line["value"]) for line in lines) == expected
    wrong = squeeze("bench", "export", "--format", "pytest_benchmark", where=place)
    assert (wrong.returncode, "Did you mean 'pytest-benchmark'" in wrong.stderr) == (2, True)
    (place / "results" / "torn.json").write_text("{")
    done = squeeze("bench", "index", where=place)
    (place / "results" / "torn.json").unlink()
    assert "2 reports" in done.stderr
    assert "skipped results/torn.json" in done.stderr


def finished(results: Path) -> list[Path]:
    """What the journal keeps of each child that ended; the rows beside it are for onlookers."""
    return [path for path in results.glob(".bench-*/*.json") if not path.name.endswith(SHOWN)]


def test_an_interrupted_bench_goes_on_with_the_same_command(place: Path) -> None:
    command = [
        *map(str, (SQUEEZE, "bench", "run", *QUICK, "--repeats", 6, "--results", "stopped", "--json")),
    ]  # fmt: skip
    # A shell starts background jobs with SIGINT ignored, and a child of this test would inherit that.
    child = subprocess.Popen(
        command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    until = time.monotonic() + 120
    while len(finished(place / "stopped")) < 6 and time.monotonic() < until:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) == 130
    assert not list((place / "stopped").glob("*.json"))
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert sum(child["resumed"] for child in report["children"]) >= 5
    assert any(note.startswith("resumed: ") and "were not measured again" in note for note in report["notes"])
    assert len(report["children"]) == 18


def test_outputs_that_are_not_numbers_are_a_row_and_the_others_are_measured(squeeze: Squeeze, place: Path) -> None:
    import numpy as np
    import onnx
    from onnx import numpy_helper

    folder = place / "not-a-number"
    shutil.copytree(place / "run" / "export-0-source", folder, ignore=shutil.ignore_patterns("squeeze.json"))
    model = onnx.load(folder / "model.onnx")
    tensor = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2)
    spoiled = np.full(tuple(tensor.dims), np.nan, np.float32)
    tensor.CopyFrom(numpy_helper.from_array(spoiled, tensor.name))
    onnx.save(model, folder / "model.onnx")
    done = squeeze("bench", "run/export-0-source", folder, *QUICK, "--repeats", 2, "--json", where=place)
    assert done.returncode == 0, done.stderr
    rows = {(m["artifact"], m["quantity"]): m for m in json.loads(done.stdout)["measurements"]}
    assert "answers NaN or infinity" in rows["not-a-number", "latency"]["error"]
    assert rows["not-a-number", "latency"]["values"] == []
    assert len(rows["export-0-source", "latency"]["values"]) >= 10


def test_children_that_the_kernel_kills_are_a_row_and_the_others_are_measured(place: Path) -> None:
    command = [SQUEEZE, "bench", "run", *map(str, QUICK), "--repeats", "3", "--json", "--results", "killed"]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as bench:
        killer = threading.Thread(target=kill_children_of, args=(bench, place, "export-1-quantize"))
        killer.start()
        assert bench.stdout is not None
        report = json.loads(bench.stdout.read())
        killer.join()
    assert bench.returncode == 0
    latencies = {m["artifact"]: m for m in report["measurements"] if m["quantity"] == "latency"}
    assert latencies["export-1-quantize"]["error"] == "killed by SIGKILL (out of memory?)"
    assert latencies["export-0-source"]["error"] is latencies["0-source"]["error"] is None
    assert {c["error"] for c in report["children"] if c["artifact"] == "export-1-quantize"} == {
        "killed by SIGKILL (out of memory?)"
    }


def kill_children_of(bench: subprocess.Popen[str], place: Path, artifact: str) -> None:
    """Do to every child that measures this artifact what the kernel does when memory is short."""
    while bench.poll() is None:
        for child in psutil.Process(bench.pid).children():
            with contextlib.suppress(psutil.Error, OSError, ValueError, IndexError):
                job = json.loads((place / child.cmdline()[-1]).read_text("utf-8"))
                if job["artifact"] == artifact:
                    child.kill()
        time.sleep(0.02)


def test_a_self_check_says_what_can_be_told_apart(squeeze: Squeeze, place: Path) -> None:
    done = squeeze("bench", "run", *QUICK, "--self-check", "--repeats", 8, "--results", "self", where=place)
    assert done.returncode == 0, done.stderr
    assert "such a bench finds differences from about" in done.stderr
    assert "8 paired repeats" in done.stderr
    wrong = squeeze("bench", "run", "--plant", 0.1, where=place)
    assert (wrong.returncode, "Add --self-check" in wrong.stderr) == (2, True)
    several = squeeze("bench", "run/export-0-source", "run/export-1-quantize", "--self-check", where=place)
    assert (several.returncode, "and 2 were named" in several.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nowhere",), "nowhere is neither an artifact, a run folder nor a model file"),
        (("run", "--runtime", "onnx-runtime"), "Did you mean 'onnxruntime'"),
        (("run", "--threads", "999"), "above the"),
        (("run", "--data", "absent.txt"), "absent.txt"),
        (("run", "--set", "bench.workloads=[{kind: open}]"), "needs held-out texts"),
        (("run", "--fail-if", "faster please"), "is not understood"),
    ],
)
def test_bad_input_is_an_error_without_a_traceback(
    squeeze: Squeeze, words: tuple[str, ...], told: str, place: Path
) -> None:
    done = squeeze("bench", *words, where=place)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
