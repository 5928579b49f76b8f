"""The child on real little models: what each pass reports. No time is asserted, only that there is one for each call."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from squeeze.benchmark.child import run_child
from squeeze.benchmark.worker import AT_LEAST, GENERATIONS, PASSES, WARM_UP
from squeeze.benchmark.workload import pack
from squeeze.evaluate import Outputs

AFTER = [2, 0, 3, 1]


@pytest.fixture(scope="module")
def successor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose likeliest token after n is AFTER[n]: one Gather from a table."""
    table = numpy_helper.from_array(np.eye(4, dtype=np.float32)[AFTER], "table")
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["logits"])],
        "successor",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 4])],
        [table],
    )
    folder = tmp_path_factory.mktemp("successor")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(model, folder / "model.onnx")
    return folder


@pytest.fixture
def inputs(tmp_path: Path) -> str:
    """Two batches of two blocks of three tokens."""
    blocks = np.array([[0, 2, 3], [1, 0, 2], [3, 1, 0], [2, 2, 2]])
    given = [
        {"input_ids": blocks[n : n + 2], "attention_mask": np.ones((2, 3), np.int64), "index": np.array([n, n + 1])}
        for n in (0, 2)
    ]
    np.savez(tmp_path / "inputs.npz", **pack(given))
    return str(tmp_path / "inputs.npz")


def job_for(folder: Path, name: str, runtime: str = "onnxruntime", **more: Any) -> dict[str, Any]:
    plain = {
        "artifact": "any",
        "device": "cpu",
        "threads": 1,
        "dtype": None,
        "reference": None,
        "is_reference": False,
        "seed": 0,
    }
    return {"pass": name, "folder": str(folder), "runtime": runtime, **plain, **more}


def result_of(job: dict[str, Any], place: Path) -> dict[str, Any]:
    outcome = run_child(job, place / "job.json")
    assert outcome.result is not None, outcome.error
    return outcome.result


def test_there_is_one_pass_for_each_thing_that_would_spoil_the_others() -> None:
    assert set(PASSES) == {"latency", "load", "memory", "energy", "quality", "lm_eval"}


def test_the_peak_of_memory_is_at_least_the_baseline_in_torch(
    tiny_bert_folder: Path, inputs: str, tmp_path: Path
) -> None:
    works = [{"kind": "fixed", "file": inputs, "label": "2×3"}]
    result = result_of(job_for(tiny_bert_folder, "memory", "torch", workloads=works), tmp_path)
    assert result["peak_memory"] >= result["baseline_memory"] > 0
    assert result["threads"] == 1


@pytest.mark.parametrize("kind", ["fixed", "generate"])
def test_the_peak_of_memory_is_at_least_the_baseline_in_onnxruntime(
    kind: str, successor: Path, inputs: str, tmp_path: Path
) -> None:
    works = [{"kind": kind, "file": inputs, "label": "any", "new_tokens": 2}]
    result = result_of(job_for(successor, "memory", workloads=works), tmp_path)
    assert result["peak_memory"] >= result["baseline_memory"] > 0


def test_latency_gives_every_workload_in_the_order_asked_with_one_value_for_each_timed_call(
    successor: Path, inputs: str, tmp_path: Path
) -> None:
    works = [
        {"kind": "generate", "file": inputs, "label": "3+4 tokens", "new_tokens": 4},
        {"kind": "fixed", "file": inputs, "label": "2×3"},
        {"kind": "dataset", "file": inputs, "label": "4 texts"},
    ]
    result = result_of(job_for(successor, "latency", workloads=works, cold=works[1], seconds=1e-9, warmup=0), tmp_path)
    generated, fixed, whole = result["workloads"]
    assert [work["label"] for work in result["workloads"]] == ["3+4 tokens", "2×3", "4 texts"]
    assert (len(generated["first_token"]), len(generated["rate"])) == (GENERATIONS, GENERATIONS)
    assert (len(fixed["values"]), len(fixed["warmups"])) == (AT_LEAST, WARM_UP)
    assert (len(whole["values"]), len(whole["warmups"])) == (1, 2)
    assert result["cold_latency"] > 0
    times = [*generated["first_token"], *generated["rate"], *fixed["values"], *whole["values"], result["load_time"]]
    assert all(value > 0 for value in times)


def test_warm_up_goes_on_for_as_long_as_asked_and_is_kept_apart(successor: Path, inputs: str, tmp_path: Path) -> None:
    works = [{"kind": "fixed", "file": inputs, "label": "2×3"}]
    result = result_of(
        job_for(successor, "latency", workloads=works, cold=works[0], seconds=1e-9, warmup=0.05), tmp_path
    )
    (fixed,) = result["workloads"]
    assert len(fixed["warmups"]) > WARM_UP
    assert sum(fixed["warmups"][1:]) >= 0.05 > sum(fixed["warmups"][1:-1])
    assert len(fixed["values"]) == AT_LEAST


def test_quality_writes_outputs_in_the_order_of_the_split(successor: Path, inputs: str, tmp_path: Path) -> None:
    file = tmp_path / "outputs.npz"
    result_of(job_for(successor, "quality", task="causal-lm", batches=inputs, outputs=str(file)), tmp_path)
    outputs = Outputs.load(file, "causal-lm")
    known, wrong = np.log(np.e + 3) - 1, np.log(np.e + 3)  # each token's cost where the table is right, and where not
    assert outputs.values == pytest.approx(np.array([[known] * 2] * 3 + [[wrong] * 2]), rel=1e-6)


def test_a_child_that_measures_onnxruntime_carries_neither_torch_nor_onnx(
    successor: Path, inputs: str, tmp_path: Path
) -> None:
    works = [{"kind": "fixed", "file": inputs, "label": "2×3"}]
    job = job_for(successor, "memory", workloads=works, result=str(tmp_path / "job.result"))
    (tmp_path / "job.json").write_text(json.dumps(job), "utf-8")
    code = (
        f"import sys; sys.argv = ['worker', {str(tmp_path / 'job.json')!r}]\n"
        "from squeeze.benchmark import worker; worker.main()\n"
        "print({'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'onnxruntime'}"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_child_ends_when_its_parent_is_killed(successor: Path, inputs: str, tmp_path: Path) -> None:
    works = [{"kind": "fixed", "file": inputs, "label": "2×3"}]
    job = job_for(successor, "latency", workloads=works, cold=works[0], seconds=600, warmup=0)
    code = (
        "from pathlib import Path; from squeeze.benchmark.child import run_child\n"
        f"run_child({job!r}, Path({str(tmp_path / 'job.json')!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        child = measuring_child(parent.pid)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 30
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = is_alive(child)
    if left:
        child.kill()
    assert not left


def measuring_child(parent: int) -> psutil.Process:
    """The child of a process, once it has opened its runtime's library."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(parent).children():
            try:
                if any("onnxruntime" in area.path for area in child.memory_maps()):
                    return child
            except psutil.Error:
                continue
        time.sleep(0.05)
    raise AssertionError("no child began to measure")


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
