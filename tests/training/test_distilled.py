"""The engine as a stage of a run uses it: folders, notes, interruptions, failures."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from squeeze.api import run
from squeeze.artifact import read_artifact
from squeeze.data import Data, DataSettings, load_data
from squeeze.distillation import DistillStage
from squeeze.errors import TrainError
from squeeze.model import load_model
from squeeze.recipe import Recipe

TRAINING: dict[str, Any] = {
    "steps": 10, "batch": 8, "accumulation": 2, "validations": 4, "device": "cpu", "precision": "float32",
    "checkpoint_minutes": 1e-6, "learning_rate": 1e-3,
}  # fmt: skip
LOSSES = [{"kind": "kl"}, {"kind": "hidden"}]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    rows = "\n".join(["text,label", *(f"the cat number {n} sat on {'mat ' * (n % 5)},{n % 3}" for n in range(48))])
    file = tmp_path_factory.mktemp("texts") / "texts.csv"
    file.write_text(rows, "utf-8")
    return {"path": str(file), "label_column": "label", "max_length": 24, "splits": {"evaluate": 4, "train": 40}}


class Cut(Exception):
    """Ends a run from outside."""


def stage(**more: Any) -> dict[str, Any]:
    return {"kind": "distill", "student": {"layers": 1}, "losses": LOSSES, "dropout": True} | more


def test_a_run_that_is_cut_goes_on_to_the_same_bits_and_doubles_no_event(
    tiny_bert_folder: Path, texts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout, projections aside, a live teacher; event files in <run folder>/tensorboard/<stage>, which --fresh clears."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    monkeypatch.setattr("squeeze.training.engine.SAY_SECONDS", 0.0)
    recipe = Recipe.model_validate({
        "name": "cut", "model": {"path": str(tiny_bert_folder)}, "task": "text-classification", "data": texts,
            "export": None, "verify": None,
        "stages": [stage(training=TRAINING | {"tensorboard": True})],
    })  # fmt: skip
    run(recipe, tmp_path / "whole", progress=lambda *told: None)

    def cut(text: str, done: int, total: int) -> None:
        if "step 7 of 10" in text:
            raise Cut

    with pytest.raises(Cut):
        run(recipe, tmp_path / "cut", progress=cut)
    assert (tmp_path / "cut" / ".1-distill.training" / "step-000000006").is_dir()
    run(recipe, tmp_path / "cut", mode="resume")
    assert not (tmp_path / "cut" / ".1-distill.training").exists()
    one, other = (read_artifact(tmp_path / name / "1-distill").manifest for name in ("whole", "cut"))
    assert one.files["model.safetensors"].sha256 == other.files["model.safetensors"].sha256
    assert one.record is not None
    assert other.record is not None
    assert one.record.training is not None
    assert other.record.training is not None
    left_out = {"seconds", "epoch_seconds"}
    assert one.record.training.model_dump(exclude=left_out) == other.record.training.model_dump(exclude=left_out)
    assert "went on from step 6 of 10 after an interruption" in other.record.notes
    events = tmp_path / "cut" / "tensorboard" / "1-distill"
    found = reader.EventAccumulator(str(events), size_guidance={"scalars": 0})
    found.Reload()
    assert [e.step for e in found.Scalars("loss/kl")] == list(range(1, 11))
    (tmp_path / "cut" / "tensorboard" / "mine.txt").write_text("mine")
    plain = Recipe.model_validate(recipe.model_dump(mode="json") | {"stages": [stage(training=TRAINING)]})
    run(plain, tmp_path / "cut", mode="fresh")
    assert [p.name for p in (tmp_path / "cut" / "tensorboard").iterdir()] == ["mine.txt"]


@pytest.fixture
def data(tiny_bert_folder: Path, texts: dict[str, Any]) -> Data:
    model = load_model(tiny_bert_folder)
    return load_data(DataSettings.model_validate(texts), "text-classification", model.tokenizer, 0)


def apply(folder: Path, data: Data, workspace: Path | None, **more: Any) -> Any:
    chosen = DistillStage.model_validate(stage(**more))
    return chosen.apply(load_model(folder), load_model(folder), data, workspace, "key")


def test_a_failed_training_leaves_a_model_that_opens(
    tiny_bert_folder: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate far too high: the loss leaves the numbers, the best student so far is an ordinary folder."""
    from squeeze.distillation.objective import Distillation

    forward, count = Distillation.forward, 0

    def failing(self: Any, batch: Any, judge: bool = False) -> Any:
        nonlocal count
        found = forward(self, batch, judge)
        count += not judge
        return found if judge or count < 16 else {name: value * float("inf") for name, value in found.items()}

    monkeypatch.setattr(Distillation, "forward", failing)
    work = tmp_path / ".1-distill.training"
    with pytest.raises(
        TrainError, match=r"the loss kl and hidden is not a number at step 8 of 10.*are a model in .*last-good"
    ):
        apply(tiny_bert_folder, data, work, training=TRAINING)
    left = load_model(work / "last-good")
    assert left.network.config.num_hidden_layers == 1  # type: ignore[union-attr]
    with torch.no_grad():
        assert bool(torch.isfinite(left.network(input_ids=torch.tensor([[1, 2, 3]])).logits).all())
    shutil.rmtree(work / "last-good")
    names = {p.name for p in work.iterdir()}
    assert {"key.json", "step-000000006", "step-000000007"} < names
    assert json.loads((work / "step-000000007" / "state.json").read_text())["best"] in names


def test_how_much_is_held_out_is_said(tiny_bert_folder: Path, data: Data) -> None:
    record = apply(tiny_bert_folder, data, None, training=TRAINING | {"held_out": 30})
    assert "8 of 40 examples are held out, a fifth, not 30" in record.notes
    assert record.training.held_out == 8
    assert np.isfinite(record.training.loss).all()
    with pytest.raises(TrainError, match="patience waits for a better validation, and 4 examples are too few"):
        apply(tiny_bert_folder, data, None, examples=4, training=TRAINING | {"patience": 2})


def test_without_a_train_split(tiny_bert_folder: Path, texts: dict[str, Any]) -> None:
    model = load_model(tiny_bert_folder)
    only = DataSettings.model_validate(texts | {"splits": {"evaluate": 4}})
    with pytest.raises(TrainError, match="Set data.splits.train"):
        apply(tiny_bert_folder, load_data(only, "text-classification", model.tokenizer, 0), None)
