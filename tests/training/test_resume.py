"""A killed training goes on and reaches the same bits; what a torn disk leaves is passed over; nobody's files are touched."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from squeeze.errors import TrainError
from squeeze.training import Training, fit, state

SETTINGS: dict[str, Any] = {
    "epochs": 5, "batch": 8, "accumulation": 2, "learning_rate": 0.02, "validations": 20, "patience": 5, "keep": "best",
    "checkpoint_minutes": 1e-5, "precision": "float32", "device": "cpu",
}  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_run_that_is_killed_again_and_again_reaches_the_same_bits(tmp_path: Path) -> None:
    """Dropout, accumulation, best weights, early stopping and validations, killed inside steps and checkpoints."""
    asked = {"settings": SETTINGS, "seeds": [0, 1], "folder": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("toy.py")), json.dumps(asked)], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    undisturbed = found.pop("0")
    assert undisturbed["kills"] == 0
    assert not any("went on" in note for note in undisturbed["notes"])
    assert any("without a better one" in note for note in undisturbed["notes"])  # it stops early, and so do the others
    for killed in found.values():
        assert killed["kills"] >= 3
        assert any("went on from step" in note for note in killed["notes"])
        assert killed["curve"] == undisturbed["curve"]
        assert killed["weights"] == undisturbed["weights"]


class Cut(Exception):
    """Ends a training from outside, as a kill would."""


@pytest.fixture(scope="module", autouse=True)
def _hear_of_every_step() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("squeeze.training.engine.SAY_SECONDS", 0.0)
        yield


def cut_at(last: int) -> Callable[[int, int, str], None]:
    def say(step: int, steps: int, text: str) -> None:
        if step >= last:
            raise Cut

    return say


@pytest.fixture(scope="module")
def made(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """A workspace with the checkpoints of steps 13 and 14 of a training cut at 15, and what it would have come to."""
    whole = toy.train_toy(SETTINGS, None)
    workspace = tmp_path_factory.mktemp("made") / "work"
    with pytest.raises(Cut):
        fit(
            toy.Toy(dropout=0.3), toy.toy_examples(60), toy.toy_examples(20, 1), Training(**SETTINGS), workspace=workspace, key="toy",
            say=cut_at(15),
        )  # fmt: skip
    assert [p.name for p in sorted(workspace.glob("step-*"))] == ["step-000000013", "step-000000014"]
    return workspace, whole["weights"], whole["curve"]


@pytest.fixture
def cut(made: tuple[Path, str, dict[str, Any]], tmp_path: Path) -> tuple[Path, str, dict[str, Any]]:
    """A copy of it."""
    return Path(shutil.copytree(made[0], tmp_path / "work")), *made[1:]


def test_it_goes_on_from_the_newest(toy: Any, cut: tuple[Path, str, dict[str, Any]]) -> None:
    workspace, weights, curve = cut
    found = toy.train_toy(SETTINGS, workspace)
    assert (found["weights"], found["curve"]) == (weights, curve)
    assert "went on from step 14 of 40 after an interruption" in found["notes"]
    assert not any("undisturbed" in note for note in found["notes"])


def remove(name: str) -> Callable[[Path], None]:
    return lambda place: (place / name).unlink()


def shorten(name: str) -> Callable[[Path], None]:
    return lambda place: (place / name).write_bytes((place / name).read_bytes()[:-9])


def spoil(name: str, text: str) -> Callable[[Path], None]:
    return lambda place: (place / name).write_text(text) and None


def without_best(place: Path) -> None:
    (place.parent / json.loads((place / "state.json").read_text())["best"]).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        remove("state.json"), remove("weights.safetensors"), shorten("weights.safetensors"), shorten("state.safetensors"),
        shorten("state.json"), spoil("state.json", "[]"), spoil("state.json", "{}"), spoil("state.safetensors", ""),
    ],
)  # fmt: skip
def test_a_torn_checkpoint_gives_way_to_the_one_before(
    cut: tuple[Path, str, dict[str, Any]], damage: Callable[[Path], None]
) -> None:
    workspace, _, _ = cut
    damage(workspace / "step-000000014")
    (note,) = state.prepare(workspace, "toy")
    assert "step-000000014 could not be read" in note
    assert [p.name for p in workspace.glob("step-*")] == ["step-000000013"]
    assert state.newest(workspace) == workspace / "step-000000013"


def test_going_on_from_the_one_before_reaches_the_same_bits(toy: Any, cut: tuple[Path, str, dict[str, Any]]) -> None:
    workspace, weights, curve = cut
    shorten("weights.safetensors")(workspace / "step-000000014")
    found = toy.train_toy(SETTINGS, workspace)
    assert (found["weights"], found["curve"]) == (weights, curve)
    assert "went on from step 13 of 40 after an interruption" in found["notes"]
    assert any("step-000000014 could not be read" in note for note in found["notes"])


def test_without_a_whole_one_it_begins_anew(toy: Any, cut: tuple[Path, str, dict[str, Any]]) -> None:
    workspace, weights, curve = cut
    for place in workspace.glob("step-*"):
        shorten("weights.safetensors")(place)
    found = toy.train_toy(SETTINGS, workspace)
    assert (found["weights"], found["curve"]) == (weights, curve)
    assert not any("went on" in note for note in found["notes"])


def test_the_best_weights_that_a_checkpoint_speaks_of_belong_to_it(
    toy: Any, cut: tuple[Path, str, dict[str, Any]]
) -> None:
    """Where they are lost the checkpoint is torn; older ones that no checkpoint speaks of have gone."""
    workspace, weights, curve = cut
    values = {v["step"]: v["value"] for v in curve["validations"]}
    best = {
        f"best-{max((s for s in values if s <= n), key=lambda s: (values[s], -s)):09d}.safetensors" for n in (13, 14)
    }
    assert {json.loads((p / "state.json").read_text())["best"] for p in workspace.glob("step-*")} == best
    assert {p.name for p in workspace.glob("best-*")} == best
    without_best(workspace / "step-000000014")
    found = toy.train_toy(SETTINGS, workspace)
    assert any("step-000000014 could not be read" in note for note in found["notes"])
    assert (found["weights"], found["curve"]) == (weights, curve)


def test_a_half_written_checkpoint_is_cleared_away(toy: Any, cut: tuple[Path, str, dict[str, Any]]) -> None:
    workspace, weights, _ = cut
    shutil.copytree(workspace / "step-000000014", workspace / "step-000000015.part")
    (workspace / "best-000000015.safetensors.part").write_bytes(b"half")
    (workspace / "key.json.tmp-99").write_text("{")
    assert state.prepare(workspace, "toy") == ()
    assert not [p.name for p in workspace.iterdir() if "part" in p.name or "tmp" in p.name]
    assert toy.train_toy(SETTINGS, workspace)["weights"] == weights


def test_checkpoints_of_another_training_go(toy: Any, cut: tuple[Path, str, dict[str, Any]]) -> None:
    workspace, _, _ = cut
    state.prepare(workspace, "another")
    assert [p.name for p in workspace.iterdir()] == ["key.json"]
    assert json.loads((workspace / "key.json").read_text()) == {"key": "another"}
    spoil("key.json", "{torn")(workspace)
    state.prepare(workspace, "third")
    assert json.loads((workspace / "key.json").read_text()) == {"key": "third"}


@pytest.mark.parametrize("name", ["thesis.txt", "model.safetensors", "step-one", "notes/of/mine.md"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path, name: str, begun: bool) -> None:
    if begun:
        state.prepare(tmp_path, "toy")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(TrainError, match=name.split("/")[0]):
        state.prepare(tmp_path, "another")
    assert (tmp_path / name).read_text() == "mine"


def test_checkpoints_without_a_key_are_somebodys(tmp_path: Path) -> None:
    (tmp_path / "step-000000001").mkdir()
    with pytest.raises(TrainError, match="step-000000001"):
        state.prepare(tmp_path, "toy")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(TrainError, match="is no folder"):
        state.prepare(file, "toy")


def test_other_threads_or_packages_are_told_of(
    toy: Any, cut: tuple[Path, str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on, and says that the last bits may differ; the note outlives a second interruption."""
    workspace, _, _ = cut
    here = state.circumstances()
    assert here["threads"] == torch.get_num_threads()
    assert here["torch"] == torch.__version__.split("+")[0] or here["torch"] == torch.__version__
    monkeypatch.setattr(state, "circumstances", lambda: here | {"threads": 64, "numpy": "1.0"})
    with pytest.raises(Cut):
        fit(
            toy.Toy(dropout=0.3), toy.toy_examples(60), toy.toy_examples(20, 1), Training(**SETTINGS), workspace=workspace, key="toy",
            say=cut_at(20),
        )  # fmt: skip
    found = toy.train_toy(SETTINGS, workspace)
    told = [note for note in found["notes"] if "undisturbed" in note]
    assert len(told) == 1
    assert f"numpy {here['numpy']} then, 1.0 now; threads {here['threads']} then, 64 now" in told[0]
    assert "went on from step 14, then 19 of 40 after 2 interruptions" in found["notes"]


def test_a_disk_that_is_full_ends_it_with_the_checkpoint_before_intact(
    toy: Any, cut: tuple[Path, str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, weights, _ = cut

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(state, "sync", full)
        with pytest.raises(TrainError, match="No space left on device.*goes on from the checkpoint before"):
            toy.train_toy(SETTINGS, workspace)
    assert toy.train_toy(SETTINGS, workspace)["weights"] == weights


def test_two_runs_in_one_process_give_the_same_bits_whatever_was_drawn_before(toy: Any) -> None:
    first = toy.train_toy(SETTINGS, None)
    torch.rand(5)
    np.random.random()
    again = toy.train_toy(SETTINGS, None)
    assert (first["weights"], first["curve"]) == (again["weights"], again["curve"])
    other = toy.train_toy(SETTINGS | {"seed": 1}, None)
    assert other["weights"] != first["weights"]


def test_a_training_leaves_the_settings_of_torch_and_the_draws_of_others_as_they_were(toy: Any) -> None:
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    np.random.seed(3)
    expected = np.random.random(2)[1]
    np.random.seed(3)
    np.random.random()
    toy.train_toy(SETTINGS | {"epochs": 1}, None)
    assert np.random.random() == expected
    assert (torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory) == before
