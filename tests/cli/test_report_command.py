"""`squeeze report` as it was installed: what goes to stdout, what into files, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from squeeze.report.markdown import to_markdown
from squeeze.report.schema import read_report

Squeeze = Callable[..., subprocess.CompletedProcess[str]]
GOLDEN = Path(__file__).parents[1] / "report" / "golden" / "schema-1.json"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    shutil.copyfile(GOLDEN, tmp_path / "run" / "report.json")
    return tmp_path


def test_markdown_on_stdout_is_that_alone_in_utf_8_whatever_the_locale(run: Path) -> None:
    command = [Path(sys.executable).with_name("squeeze"), "report", "run", "--markdown", "-"]
    for more in ({}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}):
        done = subprocess.run(command, cwd=run, capture_output=True, timeout=120, check=False, env=os.environ | more)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.decode("utf-8") == to_markdown(read_report(GOLDEN))


def test_files_are_written_beside_the_tables(squeeze: Squeeze, run: Path) -> None:
    words = ("--markdown", "out.md", "--model-card", "README.md", "--base-model", "owner/name", "--html", "out.html")
    done = squeeze("report", "run", *words, where=run)
    assert done.returncode == 0, done.stderr
    assert "all cells" in done.stdout
    assert (run / "out.md").read_text("utf-8") == to_markdown(read_report(GOLDEN))
    assert ModelCard.load(run / "README.md").data.base_model == "owner/name"
    assert (run / "out.html").read_text("utf-8").lower().startswith("<!doctype html>")
    assert json.loads(squeeze("report", "run", "--json", where=run).stdout)["title"] == read_report(GOLDEN).title


def test_a_run_is_logged_and_the_command_says_where_it_lies(squeeze: Squeeze, run: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs: pip install 'squeeze[tensorboard]'")
    done = squeeze("report", "run", "--log-to", "tensorboard:logs", "--json", where=run)
    assert done.returncode == 0, done.stderr
    assert "To see it: tensorboard --logdir" in done.stderr
    assert len(list(run.glob("logs/*/events.out.tfevents.*"))) == 1
    assert json.loads(done.stdout)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--markdown", "-", "--json"), "one document fits on stdout"),
        (("--markdown", "-", "--model-card", "-"), "one document fits on stdout"),
        (("--base-model", "owner/name"), "Add --model-card README.md, or drop it"),
        (("--model-card", "README.md", "--base-model", "x"), "'x' is no hub id. Write OWNER/NAME"),
        (("--markdown", "nowhere/out.md"), "nowhere/out.md cannot be written: No such file or directory"),
        (("--html", "nowhere/out.html"), "nowhere/out.html cannot be written: No such file or directory"),
        (("--log-to", "mlflo:x"), "Did you mean 'mlflow'?"),
    ],
)
def test_bad_input_is_one_message_without_traceback(
    squeeze: Squeeze, run: Path, words: tuple[str, ...], message: str
) -> None:
    done = squeeze("report", "run", *words, where=run)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
