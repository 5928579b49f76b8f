"""Layer by layer through a transformer: each linear layer is changed while the inputs that it will really see are at hand.

The network's repeated blocks are run one after another over the calibration texts. Before a group of linear layers that read the
same tensor is changed, the Gram matrix X Xᵀ of its inputs is gathered from the blocks *as they are by then*, the earlier layers
of the same block already changed, so that later layers make up for what earlier ones lost (Frantar et al. 2022,
arXiv:2210.17323, section 4). A block runs once for each batch, waiting before every group (`paused`). Memory holds the hidden states of
the texts, what one group reads, and its Gram matrix, however many layers there are; where what a group reads is too much to
hold, and where `treat` changes more than the group itself, blocks run anew for each group instead.

Rejected: gathering all statistics in one pass over the untouched network (no layer then sees the errors before it), and
hooks that keep the activations of all layers.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from squeeze.errors import LayerwiseError
from squeeze.hooks import hooked
from squeeze.paused import paused


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


HELD = 2 * 2**30
"""Bytes of activations that runs may hold while they wait."""
WIDTHS_HELD = 4
"""About how much a waiting run holds, in rows as wide as the block's widest input: the residual, queries, keys and values, or two halves
of a gated feed-forward layer."""


class _Enough(Exception):
    """All that a pass was for has been seen."""


class Site:
    """What a group of linear layers reads, to be streamed through as often as a method needs: nothing of it is kept."""

    def __init__(
        self, name: str, module: nn.Module, reads: Sequence[Callable[[], Tensor | None]], valid: Sequence[Tensor | None]
    ) -> None:
        self.name, self.module, self.reads, self.valid = name, module, reads, valid
        self._gram: Gram | None = None

    def stream(self, consume: Callable[[Tensor], None], *, batches: int | None = None) -> None:
        """Call `consume(rows)` with the inputs [tokens, in] of every calibration batch, or of the first `batches`.

        Padding is left out. Raises LayerwiseError where the layer is not reached or its inputs are not finite.
        """
        reached = 0
        for read, valid in list(zip(self.reads, self.valid, strict=True))[:batches]:
            x = read()
            if x is None:
                continue
            rows = x if valid is None or x.shape[:-1] != valid.shape else x[valid]
            rows = rows.reshape(-1, x.shape[-1]).float()
            if len(rows):
                reached += len(rows)
                if not bool(rows.sum().isfinite()):
                    raise LayerwiseError(
                        f"the inputs of {self.name} are not finite on the calibration texts. Repair the checkpoint; nothing was written."
                    )
                consume(rows)
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


def _read(module: nn.Module, call: Callable[[], object]) -> Tensor | None:
    """What `module` first reads in a call that goes no further; None where it is not reached."""
    found: Tensor | None = None

    def ran(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal found
        found = inputs[0]
        raise _Enough

    with hooked([module.register_forward_pre_hook(ran, prepend=True)]), suppress(_Enough):
        call()
    return found


Treat = Callable[[list[tuple[str, nn.Module]], Site], None]
Enter = Callable[[str, nn.Module, Sequence[Callable[[], object]], Sequence[Tensor | None]], None]


def walk(
    network: nn.Module, batches: Sequence[Mapping[str, NDArray[np.int64]]], treat: Treat,
    done: Callable[[int, int], None] | None = None, *, outside: bool = False, enter: Enter | None = None, alone: bool = True,
) -> None:  # fmt: skip
    """Call `treat(layers, site)` for every group of linear layers that read one tensor, in the order in which they run.

    `batches` are calibration texts as the network takes them, each array [texts, length]; padding does not count.
    `layers` are (name, module); `treat` changes them in place: weights, biases, hooks on their inputs. Where it changes anything else of
    the block too (a norm before them), set `alone` to False. `done(i, n)` is called after block i of n, and
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
            _through(f"{name}.{number}", number, block, calls, treat, alone=alone)
            if done is not None:
                done(number + 1, len(layers))
        if outside:
            inside = set(layers.modules())
            whole, valid = _whole(network, batches)
            for group in _groups(network, whole[0]):
                rest = [(path, module) for path, module in group if module not in inside]
                if rest:
                    path, module = rest[0]
                    treat(rest, Site(path, module, [partial(_read, module, run) for run in whole], valid))


def _through(name: str, number: int, block: nn.Module, calls: "list[_Call]", treat: Treat, *, alone: bool) -> None:
    """Treat the groups of one block, and leave what it makes of the hidden states in `calls`."""
    valid = [call.valid for call in calls]
    groups = _groups(block, calls[0].run(number, block))
    widest = max((width(group[0][1]) for group in groups), default=0)
    tokens = sum(call.hidden.shape[:-1].numel() for call in calls)
    waits = alone and WIDTHS_HELD * widest * tokens * calls[0].hidden.element_size() <= HELD
    stops = [group[0][1] for group in groups] if waits else []
    with paused([call.run(number, block) for call in calls], stops) as runs:
        for i, group in enumerate(groups):
            first, reader = group[0]
            reads = [
                partial(run.until, i) if waits else partial(_read, reader, call.run(number, block))
                for call, run in zip(calls, runs, strict=True)
            ]
            layers = [(f"{name}.{path}", module) for path, module in group]
            treat(layers, Site(f"{name}.{first}", reader, reads, valid))
        for call, run in zip(calls, runs, strict=True):
            call.take(run.result(len(groups)))


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

    def take(self, out: object) -> None:
        """What a block returned is what the next one reads."""
        self.hidden = out if isinstance(out, Tensor) else out[0]  # type: ignore[index]


def block_calls(
    network: nn.Module, layers: nn.ModuleList, batches: Sequence[Mapping[str, NDArray[np.int64]]]
) -> list[_Call]:
    """What the network's blocks are called with on every batch; of hidden states the first alone.

    The blocks compute on the first batch. Where they would have been called alike without that (masks and positions come from the
    texts), they are passed by on the others: this takes no second run of the whole network.
    """
    made: dict[nn.Module, int | None] = {}

    def returned(block: nn.Module, _: object, out: object) -> None:
        made[block] = _form(out)

    runs, valid = _whole(network, batches)
    with hooked([block.register_forward_hook(returned) for block in layers]):
        first = _seen(network, layers, runs[0], valid[0])

    def others() -> list[_Call]:
        return [_seen(network, layers, run, mask) for run, mask in zip(runs[1:], valid[1:], strict=True)]

    with _passing(made) as passes:
        if passes and len(runs) > 1 and _alike(_seen(network, layers, runs[0], valid[0]).rest, first.rest):
            return [first, *others()]
    return [first, *others()]


def _seen(network: nn.Module, layers: nn.ModuleList, run: Callable[[], object], valid: Tensor | None) -> _Call:
    """What the blocks are called with in one run, which ends before the last of them computes."""
    first: Tensor | None = None
    rest: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def seen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal first
        hidden = args[0] if args else kwargs["hidden_states"]
        first = hidden if first is None else first
        rest.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))
        if len(rest) == len(layers):
            raise _Enough

    hooks = [block.register_forward_pre_hook(seen, with_kwargs=True) for block in layers]
    with hooked(hooks), suppress(_Enough):
        run()
    if first is None or len(rest) != len(layers):
        raise LayerwiseError(
            f"{type(network).__name__} ran {len(rest)} of its {len(layers)} blocks in order. Use method: round; to prune, "
            "criterion: magnitude."
        )
    return _Call(valid, first, rest)


def _form(out: object) -> int | None:
    """0 of a tensor, n of a tuple of n that is a tensor and Nones; None of anything else."""
    if isinstance(out, Tensor):
        return 0
    plain = isinstance(out, tuple) and out and isinstance(out[0], Tensor) and all(one is None for one in out[1:])
    return len(out) if plain else None  # type: ignore[arg-type]


@contextmanager
def _passing(forms: Mapping[nn.Module, int | None]) -> Iterator[bool]:
    """Blocks that hand on what they read, in the form in which they returned what they made; whether they can."""

    def forward(form: int, *args: Any, **kwargs: Any) -> object:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *(form - 1) * [None]) if form else hidden

    if None in forms.values():
        yield False
        return
    own = {block: block.__dict__.get("forward") for block in forms}
    try:
        for block, form in forms.items():
            block.forward = partial(forward, form or 0)
        yield True
    finally:
        for block, before in own.items():
            if before is None:
                del block.forward
            else:
                block.forward = before


def _alike(one: Any, other: Any) -> bool:
    """Whether two calls' arguments are equal, looked at one by one."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_alike(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    return one is other or (isinstance(one, bool | int | float | str) and one == other)


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
    with hooked(hooks):
        run()
    return [members for _, members in groups]


def width(module: nn.Module) -> int:
    """How many inputs a linear layer or Conv1D takes."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[1] if isinstance(module, nn.Linear) else weight.shape[0]
