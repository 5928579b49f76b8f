"""All losses of a task at once, between real networks of other widths, through the objective that trains."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from squeeze.distillation.losses import LOSSES
from squeeze.distillation.objective import Distillation, LiveTeacher, layers_and_width
from squeeze.distillation.settings import LossTerm
from squeeze.model import Model, load_model
from squeeze.training.examples import from_texts

CASES = [("tiny_bert_folder", "hidden_size"), ("tiny_llama_folder", "hidden_size"), ("tiny_t5_folder", "d_model")]


def narrow(model: Model, width: str) -> Model:
    """A student of half the width and one layer, with random weights and the same heads."""
    config = type(model.network.config)(**model.network.config.to_dict() | {"num_hidden_layers": 1, width: 32})  # type: ignore[arg-type, operator, union-attr, call-arg]
    torch.manual_seed(0)
    return dataclasses.replace(model, network=type(model.network)(config).eval())  # type: ignore[arg-type, call-arg]


@pytest.mark.parametrize(("folder", "width"), CASES)
def test_all_losses_of_a_task_train_the_student_alone(folder: str, width: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(folder)
    teacher = load_model(path)
    student = narrow(load_model(path), width)
    names = [name for name, loss in LOSSES.items() if student.task in loss.tasks and not loss.same_width]
    terms = [LossTerm(kind=name, weight=2.0) for name in names]  # type: ignore[arg-type]
    layers, teacher_width = layers_and_width(teacher)
    objective = Distillation(student, LiveTeacher(teacher), terms, teacher_layers=layers, teacher_width=teacher_width)
    objective.requires_grad_of_trained()
    assert set(objective.projections) == {"0-0", "1-2"}
    examples = from_texts(("The cat sat.", "Nine to five, and late again.", "Rain"), None, teacher.tokenizer, 32)
    batch: Any = dict(examples.batch(range(3)))
    if student.task == "causal-lm":
        batch["prompt"] = torch.tensor([1, 2, 1])
    if student.task == "text-classification":
        batch["labels"] = torch.tensor([0, -100, 2])
    shares = objective(batch)
    assert list(shares) == names
    assert all(torch.isfinite(value) and value.detach() > 0 for value in shares.values())
    sum(shares.values()).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in teacher.network.parameters())
    assert all(parameter.grad is not None for parameter in objective.projections.parameters())
    assert sum(p.grad is not None and bool(p.grad.any()) for p in student.network.parameters()) > 10
    judged = objective(batch, judge=True)
    assert torch.isfinite(judged["value"])
    assert not any("teacher" in name for name, _ in objective.named_parameters())
