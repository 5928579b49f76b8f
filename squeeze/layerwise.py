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
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from squeeze.errors import LayerwiseError


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


class Site:
    """What a group of linear layers reads, to be streamed through as often as a method needs: nothing of it is kept."""

    def __init__(
        self, name: str, module: nn.Module, calls: Sequence[Callable[[], object]], valid: Sequence[Tensor | None]
    ) -> None:
        self.name, self.module, self.calls, self.valid = name, module, calls, valid
        self._gram: Gram | None = None

    def stream(self, consume: Callable[[Tensor], None], *, batches: int | None = None) -> None:
        """Call `consume(rows)` with the inputs [tokens, in] of every calibration batch, or of the first `batches`.

        The network runs up to the layer each time, and no further; padding is left out. Raises LayerwiseError where the layer is not
        reached or its inputs are not finite.
        """
        reached = 0
        valid: Tensor | None = None

        def ran(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal reached
            x = inputs[0]
            rows = x if valid is None or x.shape[:-1] != valid.shape else x[valid]
            rows = rows.reshape(-1, x.shape[-1]).float()
            if len(rows):
                reached += len(rows)
                if not bool(rows.sum().isfinite()):
                    raise LayerwiseError(
                        f"the inputs of {self.name} are not finite on the calibration texts. Repair the checkpoint; nothing was written."
                    )
                consume(rows)
            raise _Enough

        hook = self.module.register_forward_pre_hook(ran, prepend=True)
        try:
            for call, mask in list(zip(self.calls, self.valid, strict=True))[:batches]:
                valid = mask
                with suppress(_Enough):
                    call()
        finally:
            hook.remove()
        if not reached:
            raise LayerwiseError(f"{self.name} was not reached by the calibration texts.")

    def gram(self) -> Gram:
        """The Gram matrix of all rows, gathered on first use."""
        if self._gram is None:
            columns = width(self.module)
            found = Gram(torch.zeros(columns, columns))
            self.stream(found.add)
            self._gram = found
        return self._gram


Enter = Callable[[str, nn.Module, Sequence[Callable[[], object]], Sequence[Tensor | None]], None]


def walk(
    network: nn.Module, batches: Sequence[Mapping[str, NDArray[np.int64]]], treat: Callable[[list[tuple[str, nn.Module]], Site], None],
    done: Callable[[int, int], None] | None = None, *, outside: bool = False, enter: Enter | None = None,
) -> None:  # fmt: skip
    """Call `treat(layers, site)` for every group of linear layers that read one tensor, in the order in which they run.

    `batches` are calibration texts as the network takes them, each array [texts, length]; padding does not count.
    `layers` are (name, module); `treat` changes their weights in place. `done(i, n)` is called after block i of n, and
    `enter(name, block, runs, valid)` before it: `runs` are the block on each batch, not yet changed.
    Layers outside the repeated blocks (the output matrix, a pooler) come last and only where `outside` is set: each
    pass over what they read is one through the whole network.
    Raises LayerwiseError where the network has no repeated blocks, or a layer's inputs are not finite.
    """
    try:
        name, layers = repeated_blocks(network)
    except LayerwiseError:
        if not outside:
            raise
        name, layers = "", nn.ModuleList()
    with torch.no_grad():
        calls = block_calls(network, layers, batches) if len(layers) else []
        for number, block in enumerate(layers):
            if enter is not None:
                enter(
                    f"{name}.{number}",
                    block,
                    [call.run(number, block) for call in calls],
                    [call.valid for call in calls],
                )
            for group in _groups(block, calls[0].run(number, block)):
                runs = [call.run(number, block) for call in calls]
                site = Site(f"{name}.{number}.{group[0][0]}", group[0][1], runs, [call.valid for call in calls])
                treat([(f"{name}.{number}.{path}", module) for path, module in group], site)
            for call in calls:
                out = call.run(number, block)()
                call.hidden = out if isinstance(out, Tensor) else out[0]  # type: ignore[index]
            if done is not None:
                done(number + 1, len(layers))
        if outside:
            inside = set(layers.modules())
            whole, valid = _whole(network, batches)
            for group in _groups(network, whole[0]):
                rest = [(path, module) for path, module in group if module not in inside]
                if rest:
                    treat(rest, Site(rest[0][0], rest[0][1], whole, valid))


def repeated_blocks(network: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the network's transformer blocks: its ModuleList with the most weights, all of one class."""
    found = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1
    }
    if not found:
        raise LayerwiseError(
            f"{type(network).__name__} has no repeated blocks to go through one by one. Use method: round; to prune, criterion: magnitude."
        )
    name = max(found, key=lambda name: sum(p.numel() for p in found[name].parameters()))
    return name, found[name]


@dataclass
class _Call:
    """How the blocks are called for one batch."""

    valid: Tensor | None
    """[texts, length], False at padding; None where there is none."""
    hidden: Tensor
    """What the next block reads first."""
    rest: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """All else that each block gets: masks, positions, what an earlier block made. They differ from block to block."""

    def run(self, number: int, block: nn.Module) -> Callable[[], object]:
        """Block `number` on the hidden state as it is now."""
        args, kwargs = self.rest[number]
        return partial(block, self.hidden, *args, **kwargs)


def block_calls(
    network: nn.Module, layers: nn.ModuleList, batches: Sequence[Mapping[str, NDArray[np.int64]]]
) -> list[_Call]:
    """Run the network once for every batch, and keep what its blocks were called with, of hidden states the first alone."""
    first: Tensor | None = None
    rest: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def seen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal first
        hidden = args[0] if args else kwargs["hidden_states"]
        first = hidden if first is None else first
        rest.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))
        if len(rest) == len(layers):
            raise _Enough

    calls: list[_Call] = []
    hooks = [block.register_forward_pre_hook(seen, with_kwargs=True) for block in layers]
    try:
        for run, valid in zip(*_whole(network, batches), strict=True):
            first, rest = None, []
            with suppress(_Enough):
                run()
            if first is None or len(rest) != len(layers):
                raise LayerwiseError(
                    f"{type(network).__name__} ran {len(rest)} of its {len(layers)} blocks in order. Use method: round; to prune, "
                    "criterion: magnitude."
                )
            calls.append(_Call(valid, first, rest))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _cacheless(network: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(network.forward).parameters else {}


def _whole(
    network: nn.Module, batches: Sequence[Mapping[str, NDArray[np.int64]]]
) -> tuple[list[Callable[[], object]], list[Tensor | None]]:
    """One call of the whole network for every batch, and where its tokens are no padding."""
    runs: list[Callable[[], object]] = []
    valid: list[Tensor | None] = []
    for batch in batches:
        inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
        mask = inputs.get("attention_mask")
        valid.append(None if mask is None or bool(mask.all()) else mask.bool())
        runs.append(partial(network, **inputs, **_cacheless(network)))
    return runs, valid


def _groups(block: nn.Module, run: Callable[[], object]) -> list[list[tuple[str, nn.Module]]]:
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

            # Before a hook that rounds what a layer reads, which would give each layer a tensor of its own.
            hooks.append(module.register_forward_pre_hook(ran, prepend=True))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [members for _, members in groups]


def width(module: nn.Module) -> int:
    """How many inputs a linear layer or Conv1D takes."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[1] if isinstance(module, nn.Linear) else weight.shape[0]
