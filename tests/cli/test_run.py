"""The installed command on a real recipe: what it leaves, that it repeats, and that a killed run continues."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SQUEEZE = Path(sys.executable).with_name("squeeze")
RECIPE = """
name: tiny
model: {{path: {model}}}
task: causal-lm
data: {{path: {data}, block_size: 16, splits: {{evaluate: 4, calibration: 2}}}}
stages:
  - {{kind: quantize, scheme: int8, smooth_alpha: 0.5}}
export: {{}}
verify: {{}}
bench:
  repeats: 1
  most_repeats: 1
  ceilings: false
  workloads: [{{kind: generate, batch: 1, prompt: 8, new_tokens: 4}}]
"""


Squeeze = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("run command")
    text = "\n\n".join(
        f"The cat number {n} sat on mat {n * 7} and looked at the rain for {n} hours." for n in range(40)
    )
    (folder / "prose.txt").write_text(text, "utf-8")
    (folder / "tiny.yaml").write_text(RECIPE.format(model=tiny_llama_folder, data="prose.txt"), "utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(squeeze: Squeeze, place: Path) -> Path:
    done = squeeze("run", "tiny.yaml", "--out", "first", where=place)
    assert done.returncode == 0, done.stderr
    return place / "first"


def digests(folder: Path) -> dict[str, str]:
    report = json.loads((folder / "report.json").read_text("utf-8"))
    return {m["name"]: {n: f["sha256"] for n, f in m["files"].items()} for m in report["manifests"]}


def test_a_run_leaves_artifacts_checks_measurements_and_a_page(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text("utf-8"))
    assert report["status"] == "ok"
    assert list(digests(finished)) == ["0-source", "1-quantize", "export-0-source", "export-1-quantize"]
    assert all(check["passed"] for group in report["checks"] for check in group["checks"])
    measured = {m["quantity"] for m in report["measurements"] if m["values"]}
    assert measured >= {"negative_log_likelihood", "decode_rate", "time_to_first_token", "peak_memory", "weight_bytes"}
    assert "tiny" in (finished / "report.html").read_text("utf-8")


def test_a_finished_run_is_not_overwritten(squeeze: Squeeze, place: Path, finished: Path) -> None:
    again = squeeze("run", "tiny.yaml", "--out", "first", where=place)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    assert "Traceback" not in again.stderr


def test_a_killed_run_continues_to_the_same_digests(squeeze: Squeeze, place: Path, finished: Path) -> None:
    command = [SQUEEZE, "run", "tiny.yaml", "--out", "second"]
    child = subprocess.Popen(
        command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    until = time.monotonic() + 120
    while not (place / "second" / "1-quantize").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not (place / "second" / "report.json").exists()
    kept = (place / "second" / "1-quantize" / "squeeze.json").stat().st_mtime_ns
    again = squeeze("run", "tiny.yaml", "--out", "second", where=place)
    assert again.returncode == 0, again.stderr
    assert (place / "second" / "1-quantize" / "squeeze.json").stat().st_mtime_ns == kept
    assert digests(place / "second") == digests(finished)


def test_inspect_shows_the_chain_from_source_to_export(squeeze: Squeeze, finished: Path) -> None:
    shown = squeeze("inspect", finished, "--json", where=finished.parent)
    chain = json.loads(shown.stdout)["chain"]
    assert [link["name"] for link in chain] == ["0-source", "1-quantize", "export-1-quantize"]


def test_a_damaged_artifact_is_refused_by_name(squeeze: Squeeze, place: Path, finished: Path) -> None:
    copy = place / "copied"
    subprocess.run(["cp", "-r", finished, copy], check=True)
    file = copy / "export-1-quantize" / "model.onnx"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    refused = squeeze("verify", copy, where=place)
    assert refused.returncode == 2
    assert "model.onnx changed after it was written" in refused.stderr


def test_an_export_that_differs_fails_the_run_with_exit_code_3_and_nothing_is_benchmarked(
    squeeze: Squeeze, place: Path
) -> None:
    done = squeeze("run", "tiny.yaml", "--out", "strict", "--set", "verify.tolerance=1e-12", where=place)
    assert done.returncode == 3
    report = json.loads((place / "strict" / "report.json").read_text("utf-8"))
    assert report["status"] == "failed"
    assert report["measurements"] == []
    assert any(not check["passed"] for group in report["checks"] for check in group["checks"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "tiny.yaml", "--set", "data.splits.evaluat=3", "--out", "x"), "evaluate"),
        (("run", "nowhere.yaml", "--out", "x"), "does not exist"),
        (("run", "tiny.yaml", "--set", "data.splits.evaluate=100000", "--out", "x"), "100000"),
        (("quantize", "nowhere/at/all", "--out", "x"), "nowhere/at/all does not exist"),
        (("quantize", ".", "--out", "x"), "holds no model"),
        (("inspect", "asset:nothing"), "asset:nothing"),
        (("verify", "first/1-quantize"), "not an export"),
        (("bench", "first", "--data", "prose.txt", "--evaluate", "2", "--threads", "999"), "999"),
    ],
)
def test_bad_input_is_one_message_without_traceback(
    squeeze: Squeeze, words: tuple[str, ...], message: str, place: Path, finished: Path
) -> None:
    done = squeeze(*words, where=place)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_cuda_without_cuda_is_an_error_and_never_a_run_on_the_cpu(
    squeeze: Squeeze, place: Path, finished: Path
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    words = (
        "bench",
        "first",
        "--data",
        "prose.txt",
        "--evaluate",
        "2",
        "--set",
        "data.block_size=16",
        "--device",
        "cuda",
    )
    done = squeeze(*words, where=place)
    assert done.returncode == 2
    assert "--device cpu" in done.stderr


def test_single_steps_make_the_same_integers_as_a_recipe_without_smoothing(
    squeeze: Squeeze, place: Path, tiny_llama_folder: Path
) -> None:
    assert squeeze("quantize", tiny_llama_folder, "--out", "steps", where=place).returncode == 0
    exported = squeeze("export", "steps", "--json", where=place)
    assert json.loads(exported.stdout)["manifest"]["name"] == "export-1-quantize"
    verified = squeeze("verify", "steps", "--json", where=place)
    assert verified.returncode == 0, verified.stderr
    assert all(check["passed"] for check in json.loads(verified.stdout)["checks"])
    benched = squeeze(
        "bench", "steps", "--data", "prose.txt", "--evaluate", 2, "--repeats", 1, "--set", "data.block_size=16",
        "--set", "bench.workloads=[{kind: fixed, batch: 2, sequence: 8}]", "--set", "bench.seconds_per_cell=0.05", "--json", where=place,
    )  # fmt: skip
    assert benched.returncode == 0, benched.stderr
    assert {m["artifact"] for m in json.loads(benched.stdout)["measurements"]} >= {
        "export-0-source",
        "export-1-quantize",
    }


def test_four_bits_by_gptq_on_the_command_line_export_verify_and_are_smaller(
    squeeze: Squeeze, place: Path, tiny_llama_folder: Path
) -> None:
    words = ("quantize", tiny_llama_folder, "--scheme", "int4-weight", "--method", "gptq", "--out", "four")
    without = squeeze(*words, where=place)
    assert without.returncode == 2
    assert "needs calibration texts" in without.stderr
    unread = squeeze("quantize", tiny_llama_folder, "--data", "prose.txt", "--out", "four", where=place)
    assert unread.returncode == 2
    assert "no setting here reads calibration texts" in unread.stderr
    data = ("--data", "prose.txt", "--calibration", 6, "--evaluate", 2, "--set", "data.block_size=16")
    done = squeeze(*words, *data, "--json", where=place)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)["manifest"]["record"]
    assert any("GPTQ on 14 layers from 96 calibration tokens" in note for note in record["notes"])
    assert squeeze("export", "four", where=place).returncode == 0
    verified = squeeze("verify", "four", "--json", where=place)
    assert verified.returncode == 0, verified.stderr
    sizes = {
        p: json.loads((place / "four" / p / "squeeze.json").read_text("utf-8"))["weight_bytes"]
        for p in ("0-source", "1-quantize")
    }
    assert sizes["1-quantize"] < 0.35 * sizes["0-source"]


def test_mixed_precision_on_the_command_line_says_what_it_kept_and_refuses_two_goals(
    squeeze: Squeeze, place: Path, tiny_llama_folder: Path
) -> None:
    words = ("quantize", tiny_llama_folder, "--scheme", "int4-weight", "--out", "mixed")
    data = ("--data", "prose.txt", "--calibration", 2, "--evaluate", 2, "--set", "data.block_size=16")
    for options, message in (
        (("--budget", 0.1, "--size", 1), "Give exactly one of them"),
        (("--fallback", "float"), "Say how many with --budget or --size"),
        (("--budget", -1), "quantize.mixed.budget = -1.0"),
    ):
        wrong = squeeze(*words, *data, *options, where=place)
        assert wrong.returncode == 2
        assert message in wrong.stderr
    done = squeeze(*words, *data, "--size", 0.08, "--quiet", where=place)
    assert done.returncode == 0, done.stderr
    assert "most sensitive" in done.stdout
    record = json.loads((place / "mixed" / "1-quantize" / "squeeze.json").read_text("utf-8"))["record"]
    assert any("kept at 8 bits: alone, its integers cost" in row["note"] for row in record["layers"])
    assert all(row["sensitivity"] is not None for row in record["layers"])
    listed = squeeze("inspect", place / "mixed" / "1-quantize", "--layers", where=place)
    assert "alone" in listed.stdout


@pytest.mark.parametrize("command", ["methods", "schema", "doctor"])
def test_what_describes_squeeze_is_one_json_document(squeeze: Squeeze, command: str, tmp_path: Path) -> None:
    words = (command,) if command == "schema" else (command, "--json")
    done = squeeze(*words, where=tmp_path)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)


def test_quantize_takes_a_curve_and_a_reduced_range_and_tells_what_it_predicted(
    squeeze: Squeeze, tiny_bert_folder: Path, tmp_path: Path
) -> None:
    rows = "\n".join(["text,label", *(f"the cat number {n} sat on the mat,{n % 3}" for n in range(40))])
    (tmp_path / "texts.csv").write_text(rows, "utf-8")
    done = squeeze(
        "quantize", tiny_bert_folder, "--out", "run", "--scheme", "int8-static", "--data", "texts.csv", "--evaluate", 4,
        "--calibration", 24, "--set", "data.label_column=label", "--set", "data.max_length=16", "--reduce-range", "--curve", 2,
        "--curve", 16, where=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "as predicted" in done.stdout
    assert "error with more calibration texts, on 8 others" in done.stdout
    record = json.loads((tmp_path / "run" / "1-quantize" / "squeeze.json").read_text("utf-8"))["record"]
    assert [point["texts"] for point in record["curve"]] == [2, 16]
    assert record["settings"]["reduce_range"] is True


def test_quantize_prunes_in_the_same_pass_where_the_rest_of_a_recipe_is_set(
    squeeze: Squeeze, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    given = (
        "--method",
        "gptq",
        "--data",
        "asset:pydoc-topics",
        "--evaluate",
        2,
        "--calibration",
        4,
        "--set",
        "data.block_size=16",
    )
    done = squeeze(
        "quantize", tiny_llama_folder, "--out", "run", *given, "--set", "quantize.pattern=2:4", where=tmp_path
    )
    assert done.returncode == 0, done.stderr
    pruned = json.loads((tmp_path / "run" / "1-quantize" / "squeeze.json").read_text("utf-8"))["extra"]["pruned"]
    assert len(pruned) == 14
    done = squeeze(
        "quantize", tiny_llama_folder, "--out", "other", *given, "--set", "quantize.patern=2:4", where=tmp_path
    )
    assert done.returncode == 2
    assert "--set quantize.patern is unknown. Did you mean 'pattern'?" in done.stderr
    assert not (tmp_path / "other").exists()
