"""Where a positive scale passes through a network exactly: from what makes a tensor's channels to the layers that read them.

Norm → linear layers, up → down of a gated MLP, value → output of attention (each key-value head's channels read once per query
head that shares it), linear → ReLU → linear: dividing the first by s, channel by channel, and multiplying the second's columns by s
leaves the function as it is. Which links a network has is not read from names. Candidates are seen by running it; each is then
proven twice: the reader's inputs must follow a random scale of the producer's outputs channel by channel, which also gives the map of
channels, and the block must answer the same once weights are scaled. At last all links together must leave the network's answer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from squeeze.compress.smooth import EXACT, is_norm, shared_weights
from squeeze.errors import QuantizeError
from squeeze.layerwise import block_calls, repeated_blocks
from squeeze.model import answer

if TYPE_CHECKING:
    from squeeze.model import Model

PROBE = 32
"""Tokens that links are proven on."""
FOLLOWS = 1e-3
"""Largest departure of a channel from its scaled self, as a share of the channel's peak, that float rounding explains."""


@dataclass(frozen=True, eq=False)
class Link:
    """A producer of channels and all that reads them."""

    path: str
    """The producer's name."""
    producer: nn.Module
    """A norm, a linear layer or a Conv1D."""
    rows: slice
    """Which of its outputs: all, or a part such as GPT-2's values."""
    readers: tuple[tuple[str, nn.Module], ...]
    """(name, layer) of every layer that reads the tensor."""
    source: Tensor
    """[in of a reader]: which of the producer's channels each one is."""
    block: Callable[[], Tensor]
    """The answer of the block that holds the link, on the probe."""

    @property
    def channels(self) -> int:
        """How many channels the producer makes for these readers."""
        return len(range(self.rows.start, self.rows.stop))

    @property
    def is_norm(self) -> bool:
        """Whether the producer is a norm, not a matrix."""
        return is_norm(self.producer)

    def produced(self) -> Tensor:
        """The producer's weight by channel: [channels, in] of a matrix, [channels, 1] of a norm. A view."""
        weight: Tensor = self.producer.weight  # type: ignore[assignment]
        return weight.unsqueeze(1) if self.is_norm else _by_output(self.producer)[self.rows]

    def read(self) -> Tensor:
        """The readers' weights one above the other, [sum of out, in]. A copy."""
        return torch.cat([_by_output(module) for _, module in self.readers])

    def pooled(self, by_input: Tensor, reduce: str) -> Tensor:
        """A statistic [in] of the readers' inputs as one of the producer's channels [channels]; `reduce` "mean" or "amax"."""
        start = torch.zeros(self.channels, dtype=by_input.dtype)
        return start.scatter_reduce(0, self.source, by_input, reduce, include_self=False)

    def scale(self, factor: Tensor) -> None:
        """Divide the producer's channels by `factor` [channels] > 0 and multiply what reads them, in place."""
        self.produced().div_(factor.unsqueeze(1))
        bias = getattr(self.producer, "bias", None)
        if isinstance(bias, Tensor):
            bias[self.rows].div_(factor)
        wide = factor[self.source]
        for _, module in self.readers:
            _by_output(module).mul_(wide)

    def apply(self, factor: Tensor) -> None:
        """`scale`, and proof that the block still computes the same; else all is as before and QuantizeError says where."""
        before, kept = self.block(), self.copies()
        self.scale(factor)
        changed = change(before, self.block())
        if not changed <= EXACT:  # NaN is no proof
            restore(kept)
            raise QuantizeError(
                f"a scale that moves from {self.path} to {self.readers[0][0]} changes the block's answer by {changed:.2g} of its size. "
                "Use method: gptq."
            )

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """(tensor, copy) of all that `scale` changes."""
        modules = (self.producer, *(module for _, module in self.readers))
        found = [*(module.weight for module in modules), getattr(self.producer, "bias", None)]
        return [(tensor, tensor.clone()) for tensor in found if isinstance(tensor, Tensor)]


def restore(kept: list[tuple[Tensor, Tensor]]) -> None:
    """Put copies back."""
    for tensor, copy in kept:
        tensor.copy_(copy)


def find_links(model: "Model", remedy: str) -> list[Link]:
    """Every proven link of the network's repeated blocks, in the order in which they run. The network is not changed.

    Raises QuantizeError, ending in `remedy`, where the network has no repeated blocks that run one after another, where no link is
    found, and where links leave every block's answer but not the network's.
    """
    network = model.network
    shared = shared_weights(network)
    links: list[Link] = []
    with torch.no_grad():
        try:
            name, blocks = repeated_blocks(network)
            (call,) = block_calls(network, blocks, [_probe(model)])
        except QuantizeError as error:
            raise QuantizeError(
                f"{model.source} has no repeated blocks that run one after another, in which a scale could be moved. {remedy}"
            ) from error
        for number, block in enumerate(blocks):
            run = call.run(number, block)
            links += _links_of(f"{name}.{number}", block, lambda run=run: _tensor(run()), shared)  # type: ignore[misc]
            call.hidden = _tensor(run())
        if not links:
            raise QuantizeError(
                f"in {model.source} no scale passes from a norm or linear layer to the layers that read it (GELU lets none through, nor "
                f"do norms after the residual sum). {remedy}"
            )
        _prove_together(model, links, remedy)
    return links


def probe_answer(model: "Model") -> Tensor:
    """What the network says to the probe."""
    with torch.no_grad():
        out = model.network(**{name: torch.from_numpy(array) for name, array in _probe(model).items()})
    return answer(out, model.task)


def _prove_together(model: "Model", links: list[Link], remedy: str) -> None:
    before = probe_answer(model)
    kept = [link.copies() for link in links]
    for link in links:
        link.scale(_random_scale(link.channels))
    changed = change(before, probe_answer(model))
    for copies in reversed(kept):
        restore(copies)
    if not changed <= EXACT:
        raise QuantizeError(
            f"{model.source}: scales that pass through its blocks do not pass through it as a whole (its answer changes by "
            f"{changed:.2g} of its size). {remedy}"
        )


def _links_of(name: str, block: nn.Module, run: Callable[[], Tensor], shared: set[int]) -> list[Link]:
    seen = _Seen(block, run)
    links: list[Link] = []
    for read, readers in seen.groups:
        if any(id(module.weight) in shared for _, module in readers):
            continue
        named = tuple((f"{name}.{path}", module) for path, module in readers)
        for link in _candidates(name, seen, read, named, run):
            if id(link.producer.weight) not in shared and _holds(link):
                links.append(link)
                break
    return links


class _Seen:
    """One run of a block: what its linear layers read, those that read one tensor together, and what they and its norms made."""

    def __init__(self, block: nn.Module, run: Callable[[], Tensor]) -> None:
        self.groups: list[tuple[Tensor, list[tuple[str, nn.Module]]]] = []
        self.made: list[tuple[str, nn.Module, Tensor]] = []
        """(name, module, output) in the order in which they ran."""
        hooks = []
        for path, module in block.named_modules():
            if is_norm(module) or _is_matrix(module):

                def ran(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, path: str = path) -> None:
                    if _is_matrix(module):
                        self._read(path, module, inputs[0])
                    self.made.append((path, module, output))

                hooks.append(module.register_forward_hook(ran))
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()

    def _read(self, path: str, module: nn.Module, tensor: Tensor) -> None:
        for other, members in self.groups:
            if other is tensor:
                members.append((path, module))
                return
        self.groups.append((tensor, [(path, module)]))

    def before(self, reader: nn.Module) -> list[tuple[str, nn.Module, Tensor]]:
        """What ran before a layer, the latest first."""
        place = next(i for i, (_, module, _) in enumerate(self.made) if module is reader)
        return self.made[:place][::-1]


def _candidates(
    name: str, seen: _Seen, read: Tensor, readers: tuple[tuple[str, nn.Module], ...], run: Callable[[], Tensor]
) -> "list[Link]":
    """Producers whose scale the readers' inputs follow, not yet proven to leave the block's answer."""
    width = read.shape[-1]
    found = []
    for path, producer, output in seen.before(readers[0][1]):
        if is_norm(producer):
            if output is read:
                found.append(Link(f"{name}.{path}", producer, slice(0, width), readers, torch.arange(width), run))
            continue
        made = output.shape[-1]
        if made % width and width % made:
            continue
        count = min(width, made)
        for start in range(0, made, count):
            rows = slice(start, start + count)
            source = _followed(producer, rows, readers[0][1], read, run)
            if source is not None:
                found.append(Link(f"{name}.{path}", producer, rows, readers, source, run))
    return found


def _followed(
    producer: nn.Module, rows: slice, reader: nn.Module, read: Tensor, run: Callable[[], Tensor]
) -> Tensor | None:
    """Which channel of the producer each of the reader's inputs is, [in]; None where they do not follow its scale."""
    scale = _random_scale(rows.stop - rows.start)
    found: list[Tensor] = []

    def scaled(_: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., rows] *= scale
        return output

    hooks = [
        producer.register_forward_hook(scaled),
        reader.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])),
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    plain, moved = (x.reshape(-1, x.shape[-1]) for x in (read, found[0]))
    if len(scale) == plain.shape[1] and _follows(plain, moved, scale):
        return torch.arange(len(scale))
    peak = plain.abs().argmax(dim=0, keepdim=True)
    ratio = (moved.gather(0, peak) / plain.gather(0, peak)).squeeze(0).nan_to_num()
    source = (ratio.unsqueeze(1) - scale).abs().argmin(dim=1)
    every = len(set(source.tolist())) == len(scale)
    return source if every and _follows(plain, moved, scale[source]) else None


def _follows(plain: Tensor, moved: Tensor, scale: Tensor) -> bool:
    error = (moved - plain * scale).abs().amax(dim=0)
    return bool((error <= FOLLOWS * plain.abs().amax(dim=0)).all()) and bool(plain.any())


def _holds(link: Link) -> bool:
    """Whether the block answers the same with the weights scaled for a trial; they are as before afterwards."""
    before, kept = link.block(), link.copies()
    link.scale(_random_scale(link.channels))
    after = link.block()
    restore(kept)
    return change(before, after) <= EXACT


def _random_scale(channels: int) -> Tensor:
    """Distinct factors from 1/2 to 2 in an order that no channel map follows by chance."""
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(channels))
    return torch.linspace(-math.log(2), math.log(2), channels).exp()[order]


def change(before: Tensor, after: Tensor) -> float:
    """Norm of the difference as a share of the norm of what was."""
    return float((after - before).norm() / before.norm())


def _tensor(output: object) -> Tensor:
    """A block's hidden states, of whatever it returns."""
    return output if isinstance(output, Tensor) else output[0]  # type: ignore[index]


def _is_matrix(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _by_output(module: nn.Module) -> Tensor:
    """The weight as [out, in], a view."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight if isinstance(module, nn.Linear) else weight.T


def _probe(model: "Model") -> dict[str, "np.ndarray"]:
    """Random tokens, the same every time."""
    table = next((m for m in model.network.modules() if isinstance(m, nn.Embedding)), None)
    if table is None:
        raise QuantizeError(f"{model.source} has no embedding table to try tokens on.")
    ids = np.random.default_rng(0).integers(0, table.num_embeddings, (1, min(PROBE, model.positions or PROBE)))
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: given[name] for name in model.text_inputs}
