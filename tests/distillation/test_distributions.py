"""Divergences by row: against the formulas in numpy with 64 bits, and against plain autograd."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from squeeze.distillation import distributions
from squeeze.distillation.answers import Answers, Top
from squeeze.distillation.distributions import (
    divergence_from,
    jensen_shannon,
    kullback_leibler,
    of_student_top,
    reverse,
    skewed,
    sum_over_rows,
)
from squeeze.errors import TrainError

ROWS, CLASSES = 6, 11
MEASURES = {
    "kl": kullback_leibler,
    "reverse-kl": reverse,
    "skewed-kl": skewed(0.1),
    "js": jensen_shannon(0.3),
}


def formula(name: str, p: Any, q: Any) -> Any:
    """The same from probabilities [..., m], written out."""

    def kl(a: Any, b: Any) -> Any:
        return (a * np.log(a / b)).sum(-1)

    if name == "kl":
        return kl(p, q)
    if name == "reverse-kl":
        return kl(q, p)
    if name == "skewed-kl":
        return kl(p, 0.1 * p + 0.9 * q)
    m = 0.3 * p + 0.7 * q
    return 0.3 * kl(p, m) + 0.7 * kl(q, m)


def softmax(z: Any, t: float = 1.0) -> Any:
    e = np.exp(z.numpy().astype(np.float64) / t)
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(ROWS, CLASSES) * 2, torch.randn(ROWS, CLASSES) * 2


def top_of(teacher: torch.Tensor, k: int, t: float, temperature: float | None = None) -> Top:
    logs = torch.log_softmax(teacher.double() / t, -1)
    likely, tokens = logs.topk(k, dim=-1)
    rest = torch.log((1 - likely.exp().sum(-1)).clamp(min=0))
    if k == teacher.shape[-1]:
        rest = torch.full_like(rest, -torch.inf)
    return Top(tokens, likely.float(), rest.float(), temperature)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("t", [1.0, 2.5])
def test_divergence_of_logits_is_the_formula(name: str, t: float, logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = logits
    rows = torch.tensor([0, 2, 5])
    found = divergence_from(student, Answers(logits=teacher), rows, t, MEASURES[name], name)
    expected = t * t * formula(name, softmax(teacher, t), softmax(student, t))[[0, 2, 5]].sum()
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", MEASURES)
def test_a_top_of_all_tokens_is_the_whole_distribution(name: str, logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = logits[0].requires_grad_(), logits[1]
    rows = torch.arange(ROWS)
    gradients = []
    for answers in (Answers(logits=teacher), Answers(top=top_of(teacher, CLASSES, 2.0, 2.0))):
        value = divergence_from(student, answers, rows, 2.0, MEASURES[name], name)
        gradients.append((value.detach(), torch.autograd.grad(value, student)[0]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MEASURES)
def test_a_top_is_compared_token_by_token_and_all_others_as_one(
    name: str, logits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    student, teacher = logits
    t, k = 1.5, 4
    top = top_of(teacher, k, t)
    p, q = softmax(teacher, t), softmax(student, t)
    order = top.tokens.numpy()
    two = [np.take_along_axis(x, order, -1) for x in (p, q)]
    two = [np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in two]
    expected = t * t * formula(name, *two).sum()
    found = divergence_from(student, Answers(top=top), torch.arange(ROWS), t, MEASURES[name], name)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    whole = t * t * formula(name, p, q).sum()
    assert float(found) < whole


def test_the_rest_keeps_its_digits_where_the_top_has_nearly_all_mass() -> None:
    z = torch.tensor([[40.0, 38.0, 1.0, 0.5, -3.0]])
    found = of_student_top(z, torch.tensor([[0, 1]]))
    exact = np.log(np.exp(z.double().numpy()[0, 2:]).sum()) - np.log(np.exp(z.double().numpy()).sum())
    assert exact < -38
    assert float(found[0, 2]) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("answers", ["logits", "top"])
def test_gradient_is_the_numerical_one(name: str, answers: str, logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = logits[0].double().requires_grad_(), logits[1].double()
    given = Answers(logits=teacher) if answers == "logits" else Answers(top=top_of(teacher, 5, 2.0))
    rows = torch.tensor([1, 4])

    def value(z: torch.Tensor) -> torch.Tensor:
        return divergence_from(z, given, rows, 2.0, MEASURES[name], name)

    (gradient,) = torch.autograd.grad(value(student), student)
    for row, column in ((1, 0), (1, 7), (4, 3), (4, 10)):
        step = torch.zeros_like(student)
        step[row, column] = 1e-5
        with torch.no_grad():
            slope = (value(student + step) - value(student - step)) / 2e-5
        torch.testing.assert_close(gradient[row, column], slope, rtol=1e-6, atol=1e-8)


def test_chunks_do_not_change_what_comes_out(
    monkeypatch: pytest.MonkeyPatch, logits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    student = logits[0].view(2, 3, CLASSES).requires_grad_()
    teacher = Answers(logits=logits[1].view(2, 3, CLASSES))
    rows = torch.tensor([0, 1, 4, 5])
    found = []
    for size in (2**20, 1, 2 * CLASSES + 1):
        monkeypatch.setattr(distributions, "CHUNK", size)
        value = divergence_from(student, teacher, rows, 1.0, kullback_leibler, "kl")
        (gradient,) = torch.autograd.grad(value * 3, student)
        assert not gradient.view(-1, CLASSES)[[2, 3]].any()
        found.append((value.detach(), gradient))
    torch.testing.assert_close(found[1:], [found[0]] * 2)
    plain = functional.kl_div(
        student.log_softmax(-1), teacher.logits.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    (gradient,) = torch.autograd.grad(plain.flatten()[rows].sum() * 3, student)
    torch.testing.assert_close(found[0][1], gradient)


def test_the_gradient_keeps_the_precision_of_the_logits_and_is_given_once() -> None:
    z = torch.randn(4, 7, dtype=torch.bfloat16, requires_grad=True)
    value = sum_over_rows(z, torch.arange(4), (), lambda x: x.square().sum())
    assert value.dtype == torch.float32
    value.backward(retain_graph=True)
    assert z.grad is not None
    assert z.grad.dtype == torch.bfloat16
    torch.testing.assert_close(z.grad, 2 * z.detach())
    with pytest.raises(RuntimeError, match="one backward pass"):
        value.backward()


def test_no_rows_give_nothing_and_a_gradient_of_zeros() -> None:
    z = torch.randn(4, 7, requires_grad=True)
    value = divergence_from(
        z, Answers(logits=torch.randn(4, 7)), torch.empty(0, dtype=torch.long), 1.0, kullback_leibler, "kl"
    )
    value.backward()
    assert float(value.detach()) == 0
    assert z.grad is not None
    assert not z.grad.any()


@pytest.mark.parametrize("name", MEASURES)
def test_temperature_squared_keeps_the_size_of_gradients(name: str, logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    """For large T the gradient of all of them tends to c (z_s − z_t) / classes of centred logits (Hinton et al. 2015, eq. 4).

    c is the second derivative of the divergence in q at p: 1; 1; (1 − λ)²; β(1 − β)² + (1 − β)β² = β(1 − β).
    """
    student, teacher = logits[0].requires_grad_(), logits[1]
    value = divergence_from(student, Answers(logits=teacher), torch.arange(ROWS), 200.0, MEASURES[name], name)
    (gradient,) = torch.autograd.grad(value, student)
    difference = (student - teacher).detach()
    limit = (difference - difference.mean(-1, keepdim=True)) / CLASSES
    factor = {"kl": 1.0, "reverse-kl": 1.0, "skewed-kl": 0.81, "js": 0.21}[name]
    torch.testing.assert_close(gradient, factor * limit, rtol=0.1, atol=5e-3)


def test_errors_say_what_to_change(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = logits
    rows = torch.arange(ROWS)

    def ask(answers: Answers) -> Callable[[], torch.Tensor]:
        return lambda: divergence_from(student, answers, rows, 1.0, kullback_leibler, "kl")

    with pytest.raises(TrainError, match="the student has 11, the teacher 9"):
        ask(Answers(logits=teacher[:, :9]))()
    with pytest.raises(TrainError, match="at temperature 1, and the teacher's answers are kept at 2"):
        ask(Answers(top=top_of(teacher, 3, 2.0, 2.0)))()
    assert torch.isfinite(ask(Answers(top=top_of(teacher, 3, 1.0, 1.0)))())
