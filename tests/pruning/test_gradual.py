"""Pruning while training: the curve by hand, zeros at every step, and a run that is cut ends on the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

pytest.importorskip("squeeze.pruning.matrices")

from squeeze.data import Data, DataSettings, load_data
from squeeze.errors import PruneError
from squeeze.masks import Pruned
from squeeze.model import Model, load_model
from squeeze.pruning.gradual import Gradual, planned, prune_gradually
from squeeze.pruning.settings import PruneStage, ScheduleSettings
from squeeze.training import state

TRAINING: dict[str, Any] = {
    "steps": 10, "batch": 8, "accumulation": 2, "validations": 10, "device": "cpu", "precision": "float32", "checkpoint_minutes": 1e-9,
    "learning_rate": 1e-3,
}  # fmt: skip


class Cut(Exception):
    """Ends a run from outside."""


# The curve


def test_sparsity_follows_the_cubic_curve_by_hand() -> None:
    """Zhu & Gupta's equation 1 with s_i = 0, s_f = 1: 1 − (1 − t)³ at quarters of the way from step 20 to 60."""
    found = planned(ScheduleSettings(begin=0.2, end=0.6, times=4), 100)
    assert found == pytest.approx({30: 37 / 64, 40: 7 / 8, 50: 63 / 64, 60: 1.0})


def test_a_start_above_zero_is_chosen_when_the_curve_begins() -> None:
    assert planned(ScheduleSettings(begin=0.2, end=0.6, times=2, start=0.1), 100) == pytest.approx(
        {20: 0.0, 40: 7 / 8, 60: 1.0}
    )


def test_iterative_cuts_are_equal_and_each_is_followed_by_training() -> None:
    found = planned(ScheduleSettings(kind="iterative", begin=0.0, end=0.8, times=4), 100)
    assert found == pytest.approx({1: 0.25, 20: 0.5, 40: 0.75, 60: 1.0})


@pytest.mark.parametrize("kind", ["cubic", "iterative"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("times", [1, 3, 10])
def test_however_few_steps_there_are_all_that_is_asked_is_reached(kind: Any, steps: int, times: int) -> None:
    found = planned(ScheduleSettings(kind=kind, times=times, end=1.0), steps)
    assert list(found) == sorted(found)
    assert list(found.values()) == sorted(found.values())
    assert 1 <= min(found) <= max(found) <= steps
    assert list(found.values())[-1] == pytest.approx(1.0)


# The training


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    rows = "\n".join(["text,label", *(f"the cat number {n} sat on {'mat ' * (n % 5)},{n % 3}" for n in range(44))])
    file = tmp_path_factory.mktemp("texts") / "texts.csv"
    file.write_text(rows, "utf-8")
    return {"path": str(file), "label_column": "label", "max_length": 24, "splits": {"evaluate": 4, "train": 40}}


@pytest.fixture(scope="module")
def data(tiny_bert_folder: Path, texts: dict[str, Any]) -> Data:
    tokenizer = load_model(tiny_bert_folder).tokenizer
    return load_data(DataSettings.model_validate(texts), "text-classification", tokenizer, 0)


def stage(**given: Any) -> PruneStage:
    schedule = {"times": 3, "end": 0.6} | given.pop("schedule", {})
    return PruneStage.model_validate(
        {"sparsity": 0.5, "schedule": schedule, "training": TRAINING | given.pop("training", {}), **given}
    )


def prune(
    folder: Path, data: Data, chosen: PruneStage, workspace: Path | None = None, done: Any = None
) -> tuple[Model, Any]:
    model = load_model(folder)
    return model, prune_gradually(chosen, model, load_model(folder), data, workspace, "key", done)


def zeros(model: Model) -> dict[str, int]:
    return {
        n: int((p == 0).sum()) for n, p in model.network.named_parameters() if "encoder.layer" in n and p.dim() == 2
    }


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.network.named_parameters()}


@pytest.mark.parametrize(
    ("criterion", "kind"), [("magnitude", "iterative"), ("wanda", "cubic"), ("movement", "cubic"), ("taylor", "cubic")]
)
def test_a_run_that_is_cut_ends_on_the_same_bits(
    tiny_bert_folder: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, criterion: str, kind: str
) -> None:
    """Cut between two choices of masks, after gradients were gathered for the next; zeros rise only, to exactly what was asked."""
    monkeypatch.setattr("squeeze.training.engine.SAY_SECONDS", 0.0)
    chosen = stage(criterion=criterion, schedule={"kind": kind})
    whole, (rows, notes, curve) = prune(tiny_bert_folder, data, chosen)
    assert zeros(whole) == {name: whole.network.get_parameter(name).numel() // 2 for name in whole.pruned}
    assert len(whole.pruned) == 12
    assert all(one == Pruned("unstructured", 0.5, zeros(whole)[name]) for name, one in whole.pruned.items())
    told = {row.name: row for row in rows}
    assert all(told[name].sparsity == 0.5 for name in whole.pruned)
    assert "stays dense" in told["classifier.weight"].note
    last = 6 if kind == "cubic" else 4
    assert f"masks of 12 matrices by {criterion}, chosen 3 times" in notes[0]
    assert f"weights of step {last} and later" in notes[1]
    assert len(curve.validations) == 10
    assert curve.kept >= last

    def cut(step: int, steps: int, text: str) -> None:
        if step >= 4:
            raise Cut

    with pytest.raises(Cut):
        prune(tiny_bert_folder, data, chosen, tmp_path / "work", cut)
    assert (state.newest(tmp_path / "work") or tmp_path).name == "step-000000003"
    resumed, found = prune(tiny_bert_folder, data, chosen, tmp_path / "work")
    assert "went on from step 3 of 10 after an interruption" in found[1]
    ours, theirs = weights(whole), weights(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert found[2].validations == curve.validations
    assert not _global_optimizer_post_hooks
    assert not _global_optimizer_pre_hooks


@pytest.mark.parametrize("criterion", ["magnitude", "movement"])
def test_zeros_only_rise_and_held_out_examples_are_scored_with_them(
    tiny_bert_folder: Path, data: Data, monkeypatch: pytest.MonkeyPatch, criterion: str
) -> None:
    seen: list[int] = []
    judged: list[int] = []
    stepped, judge = Gradual.stepped, Gradual._judge

    def count(objective: Gradual) -> int:
        return sum(int((m.weight == 0).sum()) for m in objective.chosen)

    monkeypatch.setattr(Gradual, "stepped", lambda self: (stepped(self), seen.append(count(self)))[0])
    monkeypatch.setattr(Gradual, "_judge", lambda self, *given: (judged.append(count(self)), judge(self, *given))[1])
    chosen = stage(criterion=criterion, scope="global", schedule={"start": 0.1, "begin": 0.2})
    model, _ = prune(tiny_bert_folder, data, chosen)
    size = sum(model.network.get_parameter(name).numel() for name in model.pruned)
    steps = planned(chosen.schedule or ScheduleSettings(), 10)
    assert list(steps) == [2, 3, 5, 6]
    wanted, now = [], 0
    for step in range(1, 11):
        now = round((0.1 + 0.4 * steps[step]) * size) if step in steps else now
        wanted.append(now)
    assert seen == pytest.approx(wanted, abs=0)
    assert sorted(set(judged)) == sorted(set(wanted))
    assert len(set(zeros(model).values())) > 2  # one threshold over all: matrices differ


def test_each_matrix_may_have_a_sparsity_of_its_own_and_blocks_go_whole(tiny_bert_folder: Path, data: Data) -> None:
    model, teacher = load_model(tiny_bert_folder), load_model(tiny_bert_folder)
    name = "bert.encoder.layer.1.output.dense.weight"
    chosen = stage(criterion="magnitude", pattern="block-4x4", keep=["*.0.attention.*"], training={"keep": "last"})
    prune_gradually(chosen, model, teacher, data, None, "key", sparsities={name: 0.25})
    assert not any("0.attention" in one for one in model.pruned)
    for one, pruned in model.pruned.items():
        weight = model.network.get_parameter(one)
        blocks = (weight == 0).view(weight.shape[0] // 4, 4, -1, 4).sum(dim=(1, 3))
        assert set(blocks.flatten().tolist()) == {0, 16}
        assert pruned.zeros == round((0.25 if one == name else 0.5) * weight.numel())


def test_what_was_pruned_before_stays_so(tiny_bert_folder: Path, data: Data) -> None:
    model = load_model(tiny_bert_folder)
    name, other = (f"bert.encoder.layer.{n}.output.dense.weight" for n in (0, 1))
    for one in (name, other):
        with torch.no_grad():
            model.network.get_parameter(one)[:, :40] = 0
        model.pruned[one] = Pruned("unstructured", 40 / 128, 40 * 64)
    prune_gradually(stage(criterion="magnitude", keep=[other.removesuffix(".weight")]), model, None, data, None, "key")
    assert bool((model.network.get_parameter(name)[:, :40] == 0).all())
    assert bool((model.network.get_parameter(other)[:, :40] == 0).all())
    assert model.pruned[other].zeros == 40 * 64
    assert model.pruned[name].zeros == 64 * 128 // 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"criterion": "sparsegpt"}, "criterion sparsegpt changes the weights that stay.*With a schedule: magnitude, random"),
        ({"criterion": "wanda-regional"}, "criterion wanda-regional reads the block gradient"),
        ({"schedule": {"begin": 0.8}}, "schedule.begin = 0.8 does not come before schedule.end = 0.6"),
        ({"schedule": {"start": 0.6}}, "schedule.start = 0.6 is above sparsity = 0.5"),
        ({"training": {"sharding": "fsdp"}}, "fsdp divides them"),
        ({"pattern": "block-5x5"}, "blocks of 5 outputs and 5 inputs do not fit"),
    ],
)  # fmt: skip
def test_what_cannot_be_pruned_so_is_said_before_anything_changes(
    tiny_bert_folder: Path, data: Data, given: dict[str, Any], message: str
) -> None:
    model = load_model(tiny_bert_folder)
    before = weights(model)
    with pytest.raises(PruneError, match=message):
        prune_gradually(stage(**given), model, None, data, None, "key")
    assert all(torch.equal(before[name], now) for name, now in weights(model).items())
    with pytest.raises(PruneError, match=r"Set data\.splits\.train"):
        prune_gradually(stage(), model, None, None, None, "key")
    model.integers = {"x": None}  # type: ignore[dict-item]
    with pytest.raises(PruneError, match="is quantized"):
        prune_gradually(stage(), model, None, data, None, "key")
