"""What the loss loses, to first order, with a part: the derivative by a gate of 1 on it.

A gate ξ = 1 multiplies what a neuron, a head or a layer gives. For one text ∂L/∂ξ is Σ a · ∂L/∂a over its tokens (and the numbers of a
head): the first-order Taylor term of setting the part to zero (Molchanov et al. 2017, arXiv:1611.06440, eq. 8; 2019,
arXiv:1906.10771) and, for heads, the derivative by a head mask of Michel et al. (2019, arXiv:1905.10650, eq. 2). Both take the
absolute value for each text, then the mean over texts. One gate for each text makes it one backward pass for a whole batch, and only
gates have gradients, not weights.

Rejected: hooks that keep activations and their gradients, which grow with tokens × neurons × layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from squeeze.errors import PruneError
from squeeze.narrowing import cacheless
from squeeze.tasks import TASKS

Batch = Mapping[str, Tensor]
Loss = Callable[[Tensor, Batch], Tensor]
"""Scores and the batch that they are of -> sum of the losses of its texts."""
LABELS = "labels"


def loss_of(task: str, criterion: str, batches: Sequence[Batch]) -> Loss:
    """The loss of a task: cross-entropy with the labels of a text, or of each next token. PruneError where there is none."""
    if task == "causal-lm":
        return next_tokens
    if task != "text-classification":
        raise PruneError(
            f"criterion {criterion} needs a loss, and {task} has none. Use influence for layers, activation for heads and neurons."
        )
    if any(LABELS not in batch for batch in batches):
        raise PruneError(
            f"criterion {criterion} needs the labels of the texts, and they have none. Give labelled texts, or use influence for layers, "
            "activation for heads and neurons."
        )
    return labels


def next_tokens(logits: Tensor, batch: Batch) -> Tensor:
    """Sum over all tokens but the first of −log p(token | those before it); padding does not count."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return losses.sum() if mask is None else (losses * mask[:, 1:]).sum()


def labels(logits: Tensor, batch: Batch) -> Tensor:
    """Sum over the texts of −log p(label)."""
    return functional.cross_entropy(logits, batch[LABELS].long(), reduction="sum")


def reader_gates(
    network: nn.Module, readers: Sequence[str], units: int, batches: Sequence[Batch], task: str, loss: Loss
) -> tuple[Tensor, ...]:
    """Mean over texts of |∂L/∂ξ| for `units` equal, neighbouring parts of what each matrix reads: float64 [units] for each."""

    def gate(module: nn.Module, ones: Tensor) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            read = args[0]
            by_text = read.reshape(len(ones), -1, units, read.shape[-1] // units)
            return ((by_text * ones[:, None, :, None]).reshape(read.shape), *args[1:])

        return module.register_forward_pre_hook(hook)

    return _derivatives(network, [network.get_submodule(name) for name in readers], units, batches, task, loss, gate)


def layer_gates(
    network: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Batch], task: str, loss: Loss
) -> tuple[float, ...]:
    """Mean over texts of |∂L/∂ξ| for x + ξ (f(x) − x), a layer that gives back what it reads where ξ is 0: one number for each."""

    def gate(module: nn.Module, ones: Tensor) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            read = args[0] if args else kwargs["hidden_states"]
            wrote = out if isinstance(out, Tensor) else out[0]
            gated = read + ones[:, :, None] * (wrote - read)
            return gated if isinstance(out, Tensor) else (gated, *out[1:])

        return module.register_forward_hook(hook, with_kwargs=True)

    return tuple(float(found) for found in _derivatives(network, layers, 1, batches, task, loss, gate))


def _derivatives(
    network: nn.Module, modules: Sequence[nn.Module], units: int, batches: Sequence[Batch], task: str, loss: Loss,
    gate: Callable[[nn.Module, Tensor], Any],
) -> tuple[Tensor, ...]:  # fmt: skip
    sums = [torch.zeros(units, dtype=torch.float64) for _ in modules]
    texts = 0
    device = next(network.parameters()).device
    for given in batches:
        batch = {name: tensor.to(device) for name, tensor in given.items()}
        count = len(batch["input_ids"])
        ones = [torch.ones(count, units, device=device, requires_grad=True) for _ in modules]
        hooks = [gate(module, one) for module, one in zip(modules, ones, strict=True)]
        try:
            with torch.enable_grad():
                inputs = {name: tensor for name, tensor in batch.items() if name != LABELS}
                out = network(**inputs, **cacheless(network))
                found = torch.autograd.grad(loss(getattr(out, TASKS[task].output), batch), ones)
        finally:
            for hook in hooks:
                hook.remove()
        sums = [total + each.double().abs().sum(0).cpu() for total, each in zip(sums, found, strict=True)]
        texts += count
    result = tuple(total / max(texts, 1) for total in sums)
    if not all(bool(each.isfinite().all()) for each in result):
        raise PruneError("the gradients of the loss are not finite on these texts. Repair the checkpoint.")
    return result
