"""Two processes against one, and what becomes of both when one of them fails. Each launch starts Python twice: there are few.

Over gloo on CPUs; NCCL needs CUDA and is tried where there is some.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
PATIENCE = 240
"""Seconds after which a launch counts as hung."""


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("several", HERE / "several.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(arguments: list[str]) -> list[tuple[int, str]]:
    """Start the command as rank 0 and rank 1 of a world of two; exit code and stderr of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    paths = {"PYTHONPATH": str(HERE.parents[1])}
    started = [
        subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | world | paths | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=PATIENCE)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, told, strict=True)]


def several(folder: Path, *jobs: dict[str, Any]) -> list[tuple[int, str]]:
    return launch([str(HERE / "several.py"), str(folder), json.dumps(jobs)])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Jobs on two processes (one launch), and `single` on this one."""
    folder = tmp_path_factory.mktemp("several")
    ended = several(
        folder,
        {"name": "ddp", "workspace": "a"},
        {"name": "fsdp", "workspace": "b", "sharding": "fsdp", "checkpoints": True},
        {"name": "dropout", "workspace": "c", "drop": 0.3},
        {"name": "masked ddp", "workspace": "e", "masked": True},
        {"name": "masked fsdp", "workspace": "f", "masked": True, "sharding": "fsdp"},
    )
    assert ended == [(0, ""), (0, "")]
    _script().train({"name": "single", "workspace": "d"}, folder)
    _script().train({"name": "masked single", "workspace": "g", "masked": True}, folder)
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_have_the_curve_and_the_weights_of_one(both: Path, name: str) -> None:
    one, two = (json.loads((both / f"{n}.json").read_text()) for n in ("single", name))
    assert (one["processes"], two["processes"]) == (1, 2)
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-4)
    np.testing.assert_allclose(two["values"], one["values"], rtol=1e-4)
    assert two["loss"][-1] < 0.9 * two["loss"][0]
    assert two["kept"] == one["kept"]
    ours, theirs = (load_file(both / f"{n}.safetensors") for n in ("single", name))
    assert ours.keys() == theirs.keys()
    for key, weights in ours.items():
        np.testing.assert_allclose(theirs[key], weights, atol=1e-4)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_what_comes_out_is_an_ordinary_network_and_children_see_no_launcher(both: Path, name: str) -> None:
    told = json.loads((both / f"{name}.json").read_text())
    assert (told["tied"], told["kind"], told["launcher"]) == (True, "Layer", [])


@pytest.mark.parametrize("name", ["masked ddp", "masked fsdp"])
def test_pruned_weights_are_zero_on_several_processes_and_all_else_as_on_one(both: Path, name: str) -> None:
    one, two = (json.loads((both / f"{n}.json").read_text()) for n in ("masked single", name))
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-4)
    ours, theirs, free = (load_file(both / f"{n}.safetensors") for n in ("masked single", name, "single"))
    for key, keep in _script().masks().items():
        assert np.array_equal(theirs[key] == 0, ~keep.numpy())
        assert np.array_equal(ours[key] == 0, ~keep.numpy())
        assert (free[key] != 0).all()
    for key, weights in ours.items():
        np.testing.assert_allclose(theirs[key], weights, atol=1e-4)


def test_two_that_are_killed_go_on_bit_for_bit(both: Path) -> None:
    job = {"name": "resumed", "workspace": "killed", "drop": 0.3}
    assert [code for code, _ in several(both, job | {"kill": 6})] == [-9, -9]
    assert not (both / "resumed.json").exists()
    assert several(both, job) == [(0, ""), (0, "")]
    whole, resumed = (json.loads((both / f"{n}.json").read_text()) for n in ("dropout", "resumed"))
    assert resumed["notes"] == ["went on from step 5 of 10 after an interruption"]
    assert resumed["loss"] == whole["loss"]
    ours, theirs = (load_file(both / f"{n}.safetensors") for n in ("dropout", "resumed"))
    for key, weights in ours.items():
        assert np.array_equal(weights, theirs[key]), key


def test_one_process_goes_on_from_what_divided_ones_left(both: Path) -> None:
    """The whole tensors of a divided optimizer fit an undivided one: from step 9 on it makes the same last step."""
    _script().train({"name": "alone", "workspace": "b"}, both)
    one, two = (json.loads((both / f"{n}.json").read_text()) for n in ("alone", "fsdp"))
    assert one["notes"][0] == "went on from step 9 of 10 after an interruption"
    assert "processes 2 then, 1 now" in one["notes"][1]
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-5)
    ours, theirs = (load_file(both / f"{n}.safetensors") for n in ("alone", "fsdp"))
    for key, weights in ours.items():
        np.testing.assert_allclose(theirs[key], weights, atol=1e-5)


@pytest.mark.parametrize("job", [{"fail": 0}, {"fail": 1}, {"all fail": True}], ids=["main", "follower", "both"])
def test_an_error_on_one_process_ends_both_and_is_told_once(tmp_path: Path, job: dict[str, Any]) -> None:
    (main, told), (follower, more) = several(tmp_path, {"name": "x", "workspace": "x", **job})
    assert (main, follower) == (2, 2)
    assert told.count("broke") == 1
    assert ("process 1 of 2 failed" in told) == (job.get("fail") == 1)
    assert more == ""


def test_a_command_that_fails_ends_the_other_process_which_says_nothing(tmp_path: Path) -> None:
    (main, told), follower = launch(["-m", "squeeze", "run", str(tmp_path / "missing.yaml")])
    assert main == 2
    assert "missing.yaml" in told
    assert follower == (2, "")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_distils_on_two_processes_as_on_one(tiny_bert_folder: Path, tmp_path: Path) -> None:
    """The real command under torchrun, and the real follower."""
    random = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "over", "small", "houses", "by", "sea"]
    texts = [" ".join(random.choice(words, random.integers(4, 14))) for _ in range(80)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"name: tiny\nmodel: {{path: {tiny_bert_folder}}}\ntask: feature-extraction\n"
        f"data: {{path: {tmp_path / 'texts.txt'}, max_length: 32, splits: {{evaluate: 8, train: rest}}}}\n"
        "stages:\n- kind: distill\n  student: {layers: 1}\n"
        "  training: {steps: 6, batch: 8, validations: 2, held_out: 11, precision: float32, device: cpu}\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
        "--rdzv_endpoint", "127.0.0.1:0", "-m", "squeeze", "run", str(recipe), "--quiet", "-o", str(tmp_path / "two")]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Nothing was measured") == 1
    from squeeze import api
    from squeeze.recipe import read_recipe

    one = api.run(read_recipe(recipe), tmp_path / "one").manifests[-1]
    two = json.loads((tmp_path / "two" / "report.json").read_text())["manifests"][-1]
    assert one.record is not None
    assert one.record.training is not None
    curve = two["record"]["training"]
    assert curve["processes"] == 2
    np.testing.assert_allclose(curve["loss"], one.record.training.loss, rtol=1e-3)
    measured = [v.value for v in one.record.training.validations]
    np.testing.assert_allclose([v["value"] for v in curve["validations"]], measured, rtol=1e-3)


def test_accelerate_asks_for_sharding_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from squeeze.training import processes

    assert not processes.launcher_asks_for_sharding()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert processes.launcher_asks_for_sharding()


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


@pytest.mark.skipif(_gpus() < 2, reason="NCCL between two processes needs two CUDA devices")
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_gpus_have_the_curve_of_one(both: Path, sharding: str) -> None:
    job = {"name": f"nccl {sharding}", "workspace": f"nccl {sharding}", "sharding": sharding, "device": "cuda"}
    assert [code for code, _ in several(both, job)] == [0, 0]
    one, two = (json.loads((both / f"{n}.json").read_text()) for n in ("single", f"nccl {sharding}"))
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-2)
