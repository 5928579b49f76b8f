"""Layer by layer through a transformer: each linear layer is changed while the inputs that it will really see are at hand.

The network's repeated blocks are run one after another over the calibration texts. Before a group of linear layers that read the
same tensor is changed, the Gram matrix X Xᵀ of its inputs is gathered from the blocks *as they are by then*, the earlier layers
of the same block already changed, so that later layers make up for what earlier ones lost (Frantar et al. 2022,
arXiv:2210.17323, section 4). Memory holds the hidden states of the texts once and the Gram matrix of one group, however
many layers there are.

Rejected: gathering all statistics in one pass over the untouched network (no layer then sees the errors before it), and
hooks that keep whole activations (they grow with the calibration set).
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from squeeze.errors import QuantizeError


@dataclass
class Gram:
    """Mean of x xᵀ over the tokens that a linear layer has read, [in, in], and how many they were."""

    matrix: Tensor
    tokens: int = 0

    def add(self, inputs: Tensor) -> None:
        """Take in a batch of inputs [..., in]; the mean stays a mean."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        if len(rows) == 0:
            return
        count = self.tokens + len(rows)
        self.matrix.mul_(self.tokens / count).addmm_(rows.T, rows, alpha=1 / count)
        self.tokens = count


class _Enough(Exception):
    """All that a pass was for has been seen."""


def walk(
    network: nn.Module, batches: Sequence[Mapping[str, NDArray[np.int64]]], treat: Callable[[list[tuple[str, nn.Module]], Gram], None],
    done: Callable[[int, int], None] | None = None,
) -> None:  # fmt: skip
    """Call `treat(layers, gram)` for every group of linear layers that read one tensor, in the order in which they run.

    `batches` are calibration texts as the network takes them, each array [texts, length]; padding does not count.
    `layers` are (name, module); `treat` changes their weights in place. `done(i, n)` is called after block i of n.
    Layers outside the repeated blocks (the output matrix, say) are not treated.
    Raises QuantizeError where the network has no repeated blocks, or a layer's inputs are not finite.
    """
    name, layers = repeated_blocks(network)
    with torch.no_grad():
        calls = _first_inputs(network, layers[0], batches)
        for number, block in enumerate(layers):
            groups = _groups(block, calls[0])
            for group in groups:
                gram = _gram(block, group, calls)
                if not bool(gram.matrix.isfinite().all()):
                    raise QuantizeError(
                        f"the inputs of {name}.{number}.{group[0][0]} are not finite on the calibration texts. "
                        "Repair the checkpoint; nothing was written."
                    )
                treat([(f"{name}.{number}.{path}", module) for path, module in group], gram)
            for call in calls:
                out = block(*call.args, **call.kwargs)
                call.args = (out if isinstance(out, Tensor) else out[0], *call.args[1:])
            if done is not None:
                done(number + 1, len(layers))


def repeated_blocks(network: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the network's transformer blocks: its ModuleList with the most weights, all of one class."""
    found = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1
    }
    if not found:
        raise QuantizeError(
            f"{type(network).__name__} has no repeated blocks to go through one by one. Use method: round."
        )
    name = max(found, key=lambda name: sum(p.numel() for p in found[name].parameters()))
    return name, found[name]


@dataclass
class _Call:
    """How a block was called for one batch; the first argument is the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    valid: Tensor | None
    """[texts, length], False at padding; None where there is none."""


def _first_inputs(
    network: nn.Module, first: nn.Module, batches: Sequence[Mapping[str, NDArray[np.int64]]]
) -> list[_Call]:
    """Run the network up to its first block for every batch, and keep what the block was called with."""
    accepted = inspect.signature(network.forward).parameters
    cacheless = {"use_cache": False} if "use_cache" in accepted else {}
    calls: list[_Call] = []

    def seen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args:
            args, kwargs = (kwargs["hidden_states"],), {k: v for k, v in kwargs.items() if k != "hidden_states"}
        calls.append(_Call(args, kwargs, valid))
        raise _Enough

    valid: Tensor | None = None
    hook = first.register_forward_pre_hook(seen, with_kwargs=True)
    try:
        for batch in batches:
            inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
            mask = inputs.get("attention_mask")
            valid = None if mask is None or bool(mask.all()) else mask.bool()
            with suppress(_Enough):
                network(**inputs, **cacheless)
    finally:
        hook.remove()
    return calls


def _groups(block: nn.Module, call: _Call) -> list[list[tuple[str, nn.Module]]]:
    """The block's linear layers in the order in which they run, those that read the same tensor together."""
    from transformers.pytorch_utils import Conv1D

    groups: list[tuple[Tensor, list[tuple[str, nn.Module]]]] = []  # the tensor too: while it lives, no other has its id
    hooks = []
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D):

            def ran(module: nn.Module, inputs: tuple[Tensor, ...], path: str = path) -> None:
                for tensor, members in groups:
                    if tensor is inputs[0]:
                        members.append((path, module))
                        return
                groups.append((inputs[0], [(path, module)]))

            hooks.append(module.register_forward_pre_hook(ran))
    try:
        block(call.args[0][:1], *call.args[1:], **_narrow(call.kwargs))
    finally:
        for hook in hooks:
            hook.remove()
    return [members for _, members in groups]


def _narrow(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for the first text of a batch alone."""

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one(part) for part in value)
        return value[:1] if isinstance(value, Tensor) and value.dim() > 1 else value

    return {name: one(value) for name, value in kwargs.items()}


def _gram(block: nn.Module, group: list[tuple[str, nn.Module]], calls: list[_Call]) -> Gram:
    """The Gram matrix of what a group reads, over all batches; each pass ends as soon as the group is reached."""
    found: Gram | None = None
    valid: Tensor | None = None

    def ran(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal found
        width = inputs[0].shape[-1]
        found = found or Gram(torch.zeros(width, width))
        found.add(inputs[0] if valid is None or inputs[0].shape[:-1] != valid.shape else inputs[0][valid])
        raise _Enough

    hook = group[0][1].register_forward_pre_hook(ran)
    try:
        for call in calls:
            valid = call.valid
            with suppress(_Enough):
                block(*call.args, **call.kwargs)
    finally:
        hook.remove()
    if found is None:
        raise QuantizeError(f"{group[0][0]} was not reached by the calibration texts.")
    return found
