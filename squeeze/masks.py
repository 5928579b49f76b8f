"""Zeros that stay: which matrices of a model are pruned, and how a training leaves their zeros alone.

A mask is not stored: it is where a pruned matrix is zero, in memory, in every artifact and in every checkpoint. A weight that stays and
happens to be exactly zero then counts as pruned, which costs nothing where it is one in a million.
Rejected: masks as buffers beside the weights (two truths, and every file format would have to know them), and torch.nn.utils.prune, which
renames parameters under the exporter, the checkpoints and the optimizer.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Pruned:
    """How one matrix was pruned."""

    pattern: str
    """As recipes write it: unstructured, 2:4, block-16x16, row."""
    sparsity: float
    """Share of zeros that was asked of it, [0, 1)."""
    zeros: int
    """Weights that pruning set to zero."""


class HasPruned(Protocol):
    """What masks are read from: a squeeze.model.Model."""

    network: nn.Module
    pruned: dict[str, Pruned]


def masks_of(model: HasPruned) -> dict[str, Tensor]:
    """Name of every pruned parameter -> bool of its own shape, True where the weight stays."""
    own = dict(model.network.named_parameters(remove_duplicate=False))
    return {name: own[name].detach() != 0 for name in model.pruned}


def further_zeros(model: HasPruned) -> dict[str, int]:
    """Zeros of the pruned matrices beyond those that pruning made, by name; only where there are any."""
    found = {n: int((~keep).sum()) - model.pruned[n].zeros for n, keep in masks_of(model).items()}
    return {name: count for name, count in found.items() if count > 0}


def to_rows(pruned: Mapping[str, Pruned]) -> dict[str, Any]:
    """For a manifest."""
    return {name: asdict(one) for name, one in pruned.items()}


def from_rows(rows: Any) -> dict[str, Pruned]:
    """What `to_rows` gave; a manifest that says nothing (None) knows of no pruned matrix."""
    return {name: Pruned(**row) for name, row in (rows or {}).items()}


def carried(network: nn.Module, model: HasPruned) -> dict[str, Pruned]:
    """What is pruned in a network that was cut from `model`'s, whose layers are numbered anew and whose matrices may be narrower.

    A matrix counts where one at the same place in any layer was pruned and where it has zeros. One that lost rows or columns has no
    pattern any more, and no share that was asked: its own share of zeros stands for it.
    """
    shapes = {name: p.shape for name, p in model.network.named_parameters(remove_duplicate=False)}
    alike: dict[str, list[tuple[Pruned, torch.Size]]] = {}
    for name, one in model.pruned.items():
        alike.setdefault(_place(name), []).append((one, shapes[name]))
    found = {}
    for name, parameter in network.named_parameters():
        zeros = parameter.numel() - int(parameter.count_nonzero())
        if zeros and (known := alike.get(_place(name))):
            whole = [one for one, shape in known if shape == parameter.shape]
            same = [one for one in whole if one.zeros == zeros]
            share = same[0].sparsity if same else zeros / parameter.numel()
            found[name] = Pruned(whole[0].pattern if whole else "unstructured", share, zeros)
    return found


class Kept:
    """The zeros of a network in training. `masks`: parameter's name -> True where the weight stays."""

    def __init__(self, network: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self.network, self.masks = network, dict(masks)
        self._followed: dict[str, Tensor] = {}
        self._dropped: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def watch(self) -> None:
        """Follow the parameters as they are now; again after they were frozen, freed, or replaced by this process's shares of them.

        From here on gradients of pruned weights are zero before anybody measures a norm: what moves no weight must not count
        when gradients are clipped.
        """
        self.close()
        own = dict(self.network.named_parameters(remove_duplicate=False))
        self._followed = {name: own[name] for name in self.masks}
        for name, parameter in self._followed.items():
            if parameter.requires_grad:

                def masked(parameter: Tensor, name: str = name) -> None:
                    if parameter.grad is not None:
                        _local(parameter.grad).masked_fill_(self._zeros(name, parameter), 0)

                self._hooks.append(parameter.register_post_accumulate_grad_hook(masked))  # type: ignore[no-untyped-call]

    def restore(self) -> None:
        """Set every pruned weight to 0, exactly: a step of the optimizer may have moved it."""
        with torch.no_grad():
            for name, parameter in self._followed.items():
                _local(parameter.detach()).masked_fill_(self._zeros(name, parameter), 0)

    def replace(self, masks: Mapping[str, Tensor]) -> None:
        """Other masks from here on."""
        self.masks = dict(masks)
        self.watch()
        self.restore()

    def close(self) -> None:
        """Let go of all parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._followed, self._dropped = [], {}, {}

    def _zeros(self, name: str, parameter: Tensor) -> Tensor:
        """True where this process's part of the parameter is pruned, on the parameter's device."""
        found = self._dropped.get(name)
        if found is None or found.device != parameter.device:
            found = _local(_share(~self.masks[name].to(parameter.device), parameter))
            self._dropped[name] = found
        return found


@contextmanager
def kept_zero(network: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[Kept]:
    """While the `with` block lasts, every step of any optimizer, and every call of `restore()`, leaves the masked weights at exactly 0."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    kept = Kept(network, masks)
    step = register_optimizer_step_post_hook(lambda *_: kept.restore())
    try:
        kept.watch()
        kept.restore()
        yield kept
    finally:
        step.remove()
        kept.close()


def _place(name: str) -> str:
    """A parameter's name without the numbers of layers."""
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that is divided among several."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _share(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, divided as `like` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
