"""Steps whose texts the student writes: which ones, what is written, what is learned from it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from squeeze.distillation.objective import Distillation, LiveTeacher
from squeeze.distillation.on_policy import OnPolicy, is_sharded
from squeeze.distillation.settings import LossTerm, OnPolicySettings
from squeeze.errors import TrainError
from squeeze.model import Model, load_model
from squeeze.training import Examples, Training, fit


@pytest.fixture
def teacher(tiny_llama_folder: Path) -> Model:
    return load_model(tiny_llama_folder, "causal-lm")


@pytest.fixture
def student(tiny_llama_folder: Path) -> Model:
    """The teacher's build with weights moved a little."""
    model = load_model(tiny_llama_folder, "causal-lm")
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.03)
    return model


def examples(count: int = 12, length: int = 16) -> Examples:
    tokens = np.random.default_rng(2).integers(4, 190, count * length).astype(np.int32)
    return Examples(tokens, np.arange(count + 1, dtype=np.int64) * length, None, None, 0)


def objective(
    student: Model, teacher: Model, terms: tuple[LossTerm, ...] = (LossTerm(kind="kl"),), ends: frozenset[int] = frozenset(),
    **settings: Any,
) -> Distillation:  # fmt: skip
    given = {"share": 1.0, "prompt": 5, "new_tokens": 6} | settings
    on_policy = OnPolicy(OnPolicySettings(**given), LiveTeacher(teacher), ends, 7, 0)
    made = Distillation(student, LiveTeacher(teacher), terms, teacher_layers=2, teacher_width=64, on_policy=on_policy)
    made.requires_grad_of_trained()
    return made


def batch(numbers: list[int], step: int = 3) -> dict[str, torch.Tensor]:
    return {**examples().batch(numbers), "step": torch.tensor(step)}


def test_as_many_steps_as_asked_are_sampled_at_their_places(teacher: Model) -> None:
    half = OnPolicy(OnPolicySettings(share=0.3), LiveTeacher(teacher), frozenset(), 7, 0)
    due = [half.is_due(step) for step in range(3000)]
    assert np.mean(due) == pytest.approx(0.3, abs=0.025)  # three standard errors
    assert due == [half.is_due(step) for step in range(3000)]
    fourth = OnPolicy(OnPolicySettings(share=1.0, every=4), LiveTeacher(teacher), frozenset(), 7, 0)
    assert [step for step in range(12) if fourth.is_due(step)] == [0, 4, 8]


def test_what_the_student_writes_is_drawn_from_its_own_distribution(student: Model, teacher: Model) -> None:
    on_policy = objective(student, teacher, temperature=0.8).on_policy
    assert on_policy is not None
    given = batch([4, 0, 7])
    made, written = on_policy.sampled(student.network, given)
    assert written == 1.0
    for row, number in enumerate((4, 0, 7)):
        text = given["input_ids"][row, :5].tolist()
        uniform = np.random.default_rng((7, 3, number + 1)).random(6)
        for place in range(6):
            logits = student.network(input_ids=torch.tensor([text])).logits[0, -1].detach().double().numpy() / 0.8
            shares = np.exp(logits - logits.max())
            text.append(int(np.searchsorted(np.cumsum(shares / shares.sum()), uniform[place], side="right")))
        assert made["input_ids"][row].tolist() == text
    assert made["prompt"].tolist() == [5, 5, 5]
    other, _ = on_policy.sampled(student.network, batch([4, 0, 7], step=4))
    assert not torch.equal(other["input_ids"], made["input_ids"])


def test_the_divergence_is_over_the_written_tokens_alone(student: Model, teacher: Model) -> None:
    terms = (LossTerm(kind="kl", weight=2.0), LossTerm(kind="labels"), LossTerm(kind="hidden"))
    learned = objective(student, teacher, terms)
    assert learned.on_policy is not None
    made, _ = learned.on_policy.sampled(student.network, batch([1, 2]))
    shares = {name: float(share.detach()) for name, share in learned(batch([1, 2])).items()}
    with torch.no_grad():
        p = teacher.network(input_ids=made["input_ids"]).logits[:, 4:-1].log_softmax(-1)
        q = student.network(input_ids=made["input_ids"]).logits[:, 4:-1].log_softmax(-1)
    assert p.shape[1] == 6
    assert shares["kl"] == pytest.approx(2 * float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert (shares["labels"], shares["hidden"]) == (0, 0)


def test_an_early_end_counts_as_much_less(student: Model, teacher: Model) -> None:
    free = objective(student, teacher).on_policy
    assert free is not None
    whole, _ = free.sampled(student.network, batch([1, 2]))
    end = int(whole["input_ids"][0, 6])
    learned = objective(student, teacher, ends=frozenset({end}))
    assert learned.on_policy is not None
    made, written = learned.on_policy.sampled(student.network, batch([1, 2]))
    counts = made["attention_mask"].sum(dim=1) - 5
    assert int(counts[0]) <= 2
    assert written == pytest.approx(float(counts.sum()) / 12)
    inputs = {n: made[n] for n in ("input_ids", "attention_mask")}
    with torch.no_grad():
        p = teacher.network(**inputs).logits[:, 4:-1].log_softmax(-1)
        q = student.network(**inputs).logits[:, 4:-1].log_softmax(-1)
    each = (p.exp() * (p - q)).sum(-1) * made["attention_mask"][:, 5:]
    assert float(learned(batch([1, 2]))["kl"].detach()) == pytest.approx(float(each.sum()) / 12, rel=1e-4)


def test_parts_of_a_batch_add_up_to_the_whole(student: Model, teacher: Model) -> None:
    learned = objective(student, teacher, ends=frozenset(range(0, 190, 5)))
    gradients = []
    for parts in ([[1, 2, 3, 4]], [[1, 2], [3, 4]]):
        learned.zero_grad()
        for part in parts:
            given = batch(part)
            (learned(given)["kl"] * learned.units(given) / (4 * 15)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in learned.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-4


def test_sampling_in_reduced_precision_leaves_the_gradient_whole(student: Model, teacher: Model) -> None:
    learned = objective(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = learned(batch([1, 2]))["kl"]
    loss.backward()  # type: ignore[no-untyped-call]
    matrices = [p for p in learned.parameters() if p.dim() == 2]
    assert matrices
    assert all(p.grad is not None and bool(p.grad.any()) for p in matrices)


def test_a_run_that_was_killed_reaches_the_same_weights(
    tiny_llama_folder: Path, teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("squeeze.training.engine.SAY_SECONDS", 0.0)  # every step is said: the fourth is where it ends
    training = Training(
        steps=6, batch=4, precision="float32", device="cpu", checkpoint_minutes=1e-9, learning_rate=1e-2
    )

    def trained(workspace: Path, stop: int | None = None) -> list[torch.Tensor]:
        learned = objective(load_model(tiny_llama_folder, "causal-lm"), teacher, share=0.5)
        with torch.no_grad():
            learned.network.lm_head.weight.mul_(0.7)  # type: ignore[operator, union-attr]

        def say(step: int, steps: int, text: str) -> None:
            if step == stop:
                raise KeyboardInterrupt

        fit(learned, examples(), None, training, workspace=workspace, key="k", say=say)
        return [p.detach().clone() for p in learned.parameters()]

    whole = trained(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "b", stop=4)
    torch.rand(5)
    assert all(torch.equal(one, other) for one, other in zip(whole, trained(tmp_path / "b"), strict=True))


def test_what_cannot_be_sampled_is_refused(student: Model, teacher: Model) -> None:
    with pytest.raises(TrainError, match="on_policy.prompt = 20 tokens, and some examples are shorter"):
        objective(student, teacher, prompt=20)(batch([1, 2]))

    class FSDPModule(nn.Linear):
        pass

    student.network.extra = FSDPModule(1, 1)
    assert is_sharded(student.network)
    assert not is_sharded(teacher.network)
    with pytest.raises(TrainError, match="FSDP has cut it up. Train with DDP"):
        objective(student, teacher)(batch([1, 2]))
