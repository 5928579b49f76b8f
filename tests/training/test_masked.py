"""A pruned network in training: its zeros after every step, in what is stored and in what comes out; killed and gone on, the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from squeeze.data import Data, DataSettings, load_data
from squeeze.distillation import DistillStage
from squeeze.masks import Pruned, kept_zero
from squeeze.model import Model, load_model
from squeeze.training import Training, fit

SETTINGS: dict[str, Any] = {
    "epochs": 3, "batch": 8, "accumulation": 2, "learning_rate": 0.02, "validations": 10, "checkpoint_minutes": 1e-9,
    "precision": "float32", "device": "cpu", "weight_decay": 0.1,
}  # fmt: skip
NAMES = ("table.weight", "inner.weight", "head.weight")


class Cut(Exception):
    """Ends a training from outside."""


def masks() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.rand(shape, generator=generator) > 0.5
        for name, shape in zip(NAMES, ((30, 8), (8, 8), (3, 8)), strict=True)
    }


def train(toy: Any, workspace: Path | None, cut: int | None = None, **more: Any) -> tuple[nn.Module, Any]:
    objective = toy.Toy(dropout=0.3)

    def say(step: int, steps: int, text: str) -> None:
        for name, keep in masks().items():
            assert bool((objective.network.get_parameter(name)[~keep] == 0).all())
        if cut is not None and step >= cut:
            raise Cut

    with kept_zero(objective.network, masks()) as objective.kept:
        found = fit(
            objective, toy.toy_examples(60), toy.toy_examples(20, 1), Training(**SETTINGS | more), workspace=workspace, key="masked",
            say=say,
        )  # fmt: skip
    return objective.network, found


@pytest.mark.parametrize("keep", ["best", "last"])
def test_zeros_stay_in_all_that_is_stored_and_a_cut_run_ends_on_the_same_bits(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    monkeypatch.setattr("squeeze.training.engine.SAY_SECONDS", 0.0)
    whole, undisturbed = train(toy, None, keep=keep)
    with pytest.raises(Cut):
        train(toy, tmp_path / "work", cut=13, keep=keep)
    files = [*(tmp_path / "work").glob("step-*/weights.safetensors"), *(tmp_path / "work").glob("best-*.safetensors")]
    assert len(files) >= (3 if keep == "best" else 2)
    for file in files:
        stored = load_file(file)
        assert all(bool((stored[f"network.{name}"][~stays] == 0).all()) for name, stays in masks().items())
    network, resumed = train(toy, tmp_path / "work", keep=keep)
    assert "went on from step 12 of 24 after an interruption" in resumed.notes
    for name, stays in masks().items():
        assert bool((network.get_parameter(name)[~stays] == 0).all())
        assert bool((network.get_parameter(name)[stays] != 0).all())
    assert toy.digest(network) == toy.digest(whole)
    assert resumed.curve.loss == undisturbed.curve.loss


def test_gradients_of_pruned_weights_do_not_count_when_gradients_are_clipped(toy: Any) -> None:
    """All of a matrix pruned but one weight, which alone has a gradient: clipping to its own norm takes nothing from it."""
    layer = nn.Linear(4, 3, bias=False)
    keep = torch.zeros(3, 4, dtype=torch.bool)
    keep[1, 2] = True
    with kept_zero(layer, {"weight": keep}):
        layer(torch.full((1, 4), 2.0)).sum().backward()
        assert float(nn.utils.clip_grad_norm_(layer.parameters(), 2.0)) == 2.0


@pytest.fixture(scope="module")
def data(tiny_bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    rows = "\n".join(["text,label", *(f"the cat number {n} sat on {'mat ' * (n % 5)},{n % 3}" for n in range(28))])
    file = tmp_path_factory.mktemp("texts") / "texts.csv"
    file.write_text(rows, "utf-8")
    given = {"path": str(file), "label_column": "label", "max_length": 24, "splits": {"evaluate": 4, "train": 24}}
    tokenizer = load_model(tiny_bert_folder).tokenizer
    return load_data(DataSettings.model_validate(given), "text-classification", tokenizer, 0)


def pruned(folder: Path) -> Model:
    """Two of four neighbours in every linear layer of the encoder."""
    model = load_model(folder)
    for name, parameter in model.network.named_parameters():
        if "encoder.layer" in name and parameter.dim() == 2:
            groups = parameter.view(-1, 4)
            with torch.no_grad():
                groups.scatter_(1, groups.abs().topk(2, dim=1, largest=False).indices, 0)
            model.pruned[name] = Pruned("2:4", 0.5, parameter.numel() // 2)
    return model


def distilled(folder: Path, data: Data, **student: Any) -> tuple[Model, Any]:
    model = pruned(folder)
    training = {"steps": 3, "batch": 8, "device": "cpu", "precision": "float32", "learning_rate": 1e-3}
    stage = DistillStage.model_validate({"student": student, "training": training, "freeze": ("layer.0.output",)})
    return model, stage.apply(model, load_model(folder), data, None, "key")


def test_a_pruned_model_that_recovers_keeps_its_pattern(tiny_bert_folder: Path, data: Data) -> None:
    before = pruned(tiny_bert_folder)
    model, record = distilled(tiny_bert_folder, data)
    assert model.pruned == before.pruned
    assert "32,768 weights of 12 pruned matrices stay zero" in record.notes
    old, new = (dict(m.network.named_parameters()) for m in (before, model))
    for name in model.pruned:
        assert torch.equal(new[name] == 0, old[name] == 0)
        assert torch.equal(new[name], old[name]) == ("layer.0.output" in name)  # frozen
        assert new[name]._post_accumulate_grad_hooks in (None, {})


def test_a_student_that_is_cut_keeps_the_zeros_of_its_layers(tiny_bert_folder: Path, data: Data) -> None:
    model, record = distilled(tiny_bert_folder, data, layers=[1])
    assert len(model.pruned) == 6
    assert all(
        one == Pruned("2:4", 0.5, model.network.get_parameter(n).numel() // 2) for n, one in model.pruned.items()
    )
    for name in model.pruned:
        assert int((model.network.get_parameter(name).view(-1, 4) == 0).sum(1).min()) == 2
    assert any("weights of 6 pruned matrices stay zero" in note for note in record.notes)


def test_a_student_from_elsewhere_has_none_of_them_and_that_is_said(tiny_bert_folder: Path, data: Data) -> None:
    model, record = distilled(tiny_bert_folder, data, path=str(tiny_bert_folder))
    assert model.pruned == {}
    assert "none of the model's 12 pruned matrices is part of the student" in record.notes
