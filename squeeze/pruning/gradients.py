"""Gradients by the weights, text by text: of the task's loss, or of what one block puts out.

One text at a time, because the sign of a text's gradient matters to one criterion and is in the way of another: a trained network's mean
gradient is near zero, and what is left of it is noise. Memory holds one gradient and one sum for each pruned matrix.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from squeeze.errors import PruneError
from squeeze.model import answer
from squeeze.narrowing import cacheless
from squeeze.pruning.gates import labels, next_tokens

if TYPE_CHECKING:
    from squeeze.model import Model

Batch = Mapping[str, NDArray[np.int64]]


class Sum:
    """Mean of gradients, or root of their mean square, by name."""

    def __init__(self, weights: Mapping[str, Tensor], *, squares: bool) -> None:
        self.weights, self.squares, self.count = weights, squares, 0
        self.total = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}

    def add(self, loss: Tensor, factor: float = 1.0) -> None:
        """Take in the gradients of one text's loss, times a factor."""
        found = torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True)
        self.count += 1
        for name, gradient in zip(self.weights, found, strict=True):
            if gradient is None:
                continue
            if self.squares:
                self.total[name].addcmul_(gradient, gradient, value=factor**2)
            else:
                self.total[name].add_(gradient, alpha=factor)

    def mean(self, name: str) -> Tensor:
        """Over the texts so far, shaped as the parameter."""
        value = self.total[name] / max(self.count, 1)
        return value.sqrt_() if self.squares else value


@contextmanager
def differentiable(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """While it lasts, these weights have gradients, inside of no_grad too."""
    before = {name: weight.requires_grad for name, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(before[name])


def loss_gradients(
    model: "Model", batches: Sequence[Batch], weights: Mapping[str, Tensor], *, squares: bool, without: Sequence[str] = (),
    done: Callable[[int, int], None] | None = None,
) -> Sum:  # fmt: skip
    """Gradients of the task's loss by `weights`: of the next token, or of each text's class in `labels`.

    `without` are the criteria that an error offers for models without a loss. Raises PruneError where there is none, or no labels.
    """
    if model.task == "feature-extraction":
        raise PruneError(
            f"embeddings have no labels, so no loss whose gradient could say what a weight is worth. Use criterion {' or '.join(without)}."
        )
    if model.task == "text-classification" and any("labels" not in batch for batch in batches):
        raise PruneError("a gradient of the loss needs labels, and these texts have none. Set data.label_column.")
    found, texts = Sum(weights, squares=squares), single(batches)
    with differentiable(weights):
        for number, text in enumerate(texts, start=1):
            loss = _loss(model, text)
            if not bool(loss.isfinite()):
                raise PruneError(
                    f"the loss is {float(loss.detach())} on calibration text {number} of {len(texts)}. Repair the model."
                )
            found.add(loss)
            if done is not None:
                done(number, len(texts))
    return found


def _loss(model: "Model", text: Batch) -> Tensor:
    """Mean over what the text is scored by: its class, or its tokens but the first."""
    given = {name: torch.from_numpy(array) for name, array in text.items()}
    inputs = {name: given[name] for name in model.text_inputs if name in given}
    out = answer(model.network(**inputs, **cacheless(model.network)), model.task)
    if model.task == "text-classification":
        return labels(out, given)
    return next_tokens(out, inputs) / (inputs["input_ids"].shape[1] - 1)


def block_gradients(
    weights: Mapping[str, Tensor], runs: Sequence[Callable[[], object]], valid: Sequence[Tensor | None]
) -> Sum:
    """Gradients of ‖f(X)‖₂ by a block's weights, f the block and X what it reads of each text, divided by the root of its tokens.

    Regional gradients (arXiv:2503.04992); `runs` are of one text each.
    """
    found = Sum(weights, squares=True)
    with differentiable(weights):
        for run, mask in zip(runs, valid, strict=True):
            out = run()
            states: Tensor = out if isinstance(out, Tensor) else out[0]  # type: ignore[index]
            rows = states[mask] if mask is not None else states.flatten(0, -2)
            if len(rows):
                found.add(rows.norm(), len(rows) ** -0.5)
    return found


def single(batches: Sequence[Batch]) -> list[dict[str, NDArray[np.int64]]]:
    """Each text by itself, without its padding."""
    found = []
    for batch in batches:
        for number in range(len(batch["input_ids"])):
            text = {name: array[number : number + 1] for name, array in batch.items()}
            mask = text.get("attention_mask")
            if mask is not None:
                places = mask[0].nonzero()[0]
                if not len(places):
                    continue
                inside = slice(int(places[0]), int(places[-1]) + 1)
                text = {name: array[:, inside] if array.shape == mask.shape else array for name, array in text.items()}
            found.append(text)
    return found


def named(block: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `weights` that are the block's."""
    own = {id(parameter) for parameter in block.parameters()}
    return {name: weight for name, weight in weights.items() if id(weight) in own}
