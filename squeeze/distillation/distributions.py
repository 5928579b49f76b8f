"""How far a student's distribution over classes is from its teacher's, row by row, in little memory.

A language model's logits are the largest tensors of its training: 49,152 tokens at 2,048 places are 400 MB in float32. Written plainly,
a divergence keeps several copies for its gradient (what is selected, the softened logits, both log-softmaxes, their product). Here
rows are taken in chunks, and each chunk's gradient is computed with its value: one tensor beside both logits, in their precision.

Rejected: leaving padding in and masking the result, which is simpler, costs as much for a padded place as for a real one.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from squeeze.distillation.answers import Answers
from squeeze.errors import TrainError

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Callable[["Tensor", "Tensor"], "Tensor"]
"""Log-probabilities [rows, m] of the teacher and of the student -> one number for each row."""

CHUNK = 2**20
"""Logits at a time, 4 MB in float32: twice as fast as all at once on a CPU, whose caches hold them."""
CHUNK_ELSEWHERE = 2**23
"""On other devices, which wait for each call of a kernel: 32 MB."""
LEAST = -1000.0
"""Stands for the logarithm of no mass, where a difference of infinities would be no number."""


class _Rows(torch.autograd.Function):
    """Sum of a function of rows of logits; its gradient is computed on the way, so that nothing else is kept for it."""

    @staticmethod
    def forward(
        ctx: Any, logits: "Tensor", rows: "Tensor", beside: "tuple[Tensor, ...]", measure: "Callable[..., Tensor]"
    ) -> "Tensor":
        wanted = bool(ctx.needs_input_grad[0])
        flat = logits.detach().reshape(-1, logits.shape[-1])
        others = [other.detach().reshape(-1, *other.shape[logits.ndim - 1 :]) for other in beside]
        precision = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=precision, device=logits.device)
        gradient = torch.zeros_like(flat) if wanted else None
        size = CHUNK if logits.device.type == "cpu" else CHUNK_ELSEWHERE
        for at in torch.split(rows, max(1, size // flat.shape[-1])):
            with torch.set_grad_enabled(wanted):
                chunk = flat[at].to(precision).requires_grad_(wanted)
                value = measure(chunk, *(other[at] for other in others))
            total += value.detach()
            if gradient is not None and len(at):
                gradient.index_copy_(0, at, torch.autograd.grad(value, chunk)[0].to(gradient.dtype))
        ctx.gradient = None if gradient is None else gradient.view(logits.shape)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: "Tensor") -> "tuple[Tensor, None, None, None]":
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("this loss keeps its gradient for one backward pass")
        return gradient.mul_(upstream), None, None, None


def sum_over_rows(
    logits: "Tensor", rows: "Tensor", beside: "tuple[Tensor, ...]", measure: "Callable[..., Tensor]"
) -> "Tensor":
    """measure(logits [r, classes], *beside [r, …]), a scalar, summed over the `rows` of logits [..., classes].

    `rows` [r] count over all leading dimensions; `beside` has the same ones. The gradient goes to `logits` alone, once.
    """
    return _Rows.apply(logits, rows, beside, measure)  # type: ignore[no-any-return, no-untyped-call]


def divergence_from(
    student: "Tensor", teacher: Answers, rows: "Tensor", temperature: float, measure: Divergence, loss: str
) -> "Tensor":
    """T² times the sum over `rows` of a divergence between both softmaxes at temperature T.

    Of a teacher's `Top` the likeliest k tokens are compared one by one, and all others as one more: a coarser partition, so that the
    divergence is at most the whole one, and equal to it for k = vocabulary. Raises TrainError for another number of classes, and
    for a `Top` of another temperature, which cannot be computed from it.
    """
    t = temperature
    if teacher.top is not None:
        top = teacher.top
        if top.temperature is not None and not math.isclose(top.temperature, t):
            raise TrainError(
                f"the loss {loss} is at temperature {t:g}, and the teacher's answers are kept at {top.temperature:g}. "
                "Give all losses the same temperature, or drop cache."
            )

        def from_top(z: "Tensor", tokens: "Tensor", likely: "Tensor", rest: "Tensor") -> "Tensor":
            return measure(
                of_teacher_top(likely.to(z.dtype), rest.to(z.dtype)), of_student_top(z / t, tokens.long())
            ).sum()

        beside: tuple[Tensor, ...] = (top.tokens, top.log_probabilities, top.rest)
        return t * t * sum_over_rows(student, rows, beside, from_top)
    logits = whole_logits(student, teacher, loss)

    def from_logits(z: "Tensor", other: "Tensor") -> "Tensor":
        p = functional.log_softmax(other.to(z.dtype) / t, dim=-1).clamp(min=LEAST)
        return measure(p, functional.log_softmax(z / t, dim=-1)).sum()

    return t * t * sum_over_rows(student, rows, (logits,), from_logits)


def whole_logits(student: "Tensor", teacher: Answers, loss: str) -> "Tensor":
    """The teacher's logits, where they are of the student's classes. Raises TrainError where not, and where a cache has but the top."""
    if teacher.logits is None:
        raise TrainError(
            f"the loss {loss} compares all logits, and the cache keeps the likeliest tokens' alone. Use kl in its place, or drop cache."
        )
    if teacher.logits.shape[-1] != student.shape[-1]:
        raise TrainError(
            f"the loss {loss} compares class by class: the student has {student.shape[-1]:,}, the teacher {teacher.logits.shape[-1]:,}. "
            "Take a student with the teacher's labels (or vocabulary)."
        )
    return teacher.logits


def of_teacher_top(likely: "Tensor", rest: "Tensor") -> "Tensor":
    """Log-probabilities of the k likeliest tokens and of all others [r, k + 1], as they add up to 1: what is stored was rounded."""
    joined = torch.cat([likely, rest[:, None]], dim=-1).clamp(min=LEAST)
    return joined - joined.logsumexp(-1, keepdim=True)


def of_student_top(z: "Tensor", tokens: "Tensor") -> "Tensor":
    """Log-probabilities of those tokens [r, k] and of all others together, from logits: [r, k + 1].

    The others are summed themselves. 1 − Σ top, as log1p or log(−expm1), loses all its digits where the top has nearly all mass, and
    there the gradient of its logarithm is largest.
    """
    top = z.gather(-1, tokens)
    others = z.scatter(-1, tokens, -math.inf).logsumexp(-1, keepdim=True)
    whole = torch.logaddexp(top.logsumexp(-1, keepdim=True), others)
    return torch.cat([top - whole, (others - whole).clamp(min=LEAST)], dim=-1)


def kullback_leibler(p: "Tensor", q: "Tensor") -> "Tensor":
    """Σ p log(p/q)."""
    return (p.exp() * (p - q)).sum(dim=-1)


def reverse(p: "Tensor", q: "Tensor") -> "Tensor":
    """Σ q log(q/p)."""
    return kullback_leibler(q, p)


def skewed(share: float) -> Divergence:
    """KL(p ‖ λp + (1 − λ)q)."""
    return lambda p, q: kullback_leibler(p, mixture(p, q, share))


def jensen_shannon(share: float) -> Divergence:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = βp + (1 − β)q."""

    def measure(p: "Tensor", q: "Tensor") -> "Tensor":
        m = mixture(p, q, share)
        return share * kullback_leibler(p, m) + (1 - share) * kullback_leibler(q, m)

    return measure


def mixture(p: "Tensor", q: "Tensor", share: float) -> "Tensor":
    """Logarithm of share·p + (1 − share)·q."""
    return torch.logaddexp(p + math.log(share), q + math.log1p(-share))
