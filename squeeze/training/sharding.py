"""Weights, gradients and the optimizer's state divided among the processes (FSDP2: torch's `fully_shard`).

accelerate has the same, but for accelerators only: on CPU processes its plugin is passed over without a word. Called here directly it is
one way for CPU and CUDA, `training.sharding: fsdp` or `accelerate launch --use_fsdp`. Zhao et al. 2023, arXiv:2304.11277, section 3.

Checkpoints hold whole tensors under the names of an undivided network, so that a run may go on under another number of processes, or
undivided.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from squeeze.training.objective import Objective


def divide(objective: "Objective", device: torch.device) -> nn.Module:
    """Divide the parameters of `objective` among all processes, layer by layer; return its network's skeleton for `join`.

    All processes start from the main one's weights. Tied weights stay tied: outside the layers everything is one unit.
    """
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    skeleton = _skeleton(objective.network)
    objective.to(device)
    with torch.no_grad():
        for tensor in (*objective.parameters(), *objective.buffers()):
            sent = tensor.data.contiguous()
            distributed.broadcast(sent, 0)
            tensor.data.copy_(sent)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in list(layers(objective.network)):
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    objective.changed()
    return skeleton


def layers(network: nn.Module) -> Iterator[nn.Module]:
    """The members of every outermost nn.ModuleList: the layers of encoders, of decoders, of both."""
    for module in network.children():
        if isinstance(module, nn.ModuleList):
            for member in module:
                yield from layers(member) if isinstance(member, nn.ModuleList | nn.ModuleDict) else (member,)
        else:
            yield from layers(module)


def rest(objective: nn.Module) -> None:
    """Between passes: give back what the last forward pass gathered (without a backward pass the outermost unit stays whole)."""
    from torch.distributed.fsdp import FSDPModule

    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def summed(objective: nn.Module, last: bool) -> Iterator[None]:
    """Gradients of the parts of a batch are summed here, and over the processes with the last part."""
    objective.set_requires_gradient_sync(last)  # type: ignore[operator]
    yield


def leaves_some_out(objective: "Objective", example: "Mapping[str, Tensor]", device: torch.device) -> bool:
    """Whether parameters in training (BERT's pooler, say) get no gradient: undivided processes then have to look for those at each step.

    One backward pass tells; gradients and random numbers are afterwards as they were before.
    """
    objective.train()
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        losses = objective(example)
        torch.stack([value.float() for value in losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
    found = any(p.grad is None for p in objective.parameters() if p.requires_grad)
    objective.zero_grad(set_to_none=True)
    return found


def whole(tensor: "Tensor") -> "Tensor":
    """The tensor that `tensor` is this process's share of; all processes must ask. One that is not divided is itself."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: "Tensor") -> "Tensor":
    """What this process holds of a divided tensor; all of another."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share(tensor: "Tensor", like: "Tensor") -> "Tensor":
    """This process's share of a whole tensor that every process has, divided as `like` is; itself where that is not."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    moved = tensor.to(device=like.device, dtype=tensor.dtype)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def join(skeleton: nn.Module, weights: Mapping[str, "Tensor"], prefix: str = "network.") -> nn.Module:
    """The skeleton with its weights: an ordinary network again, on the CPU."""
    with torch.no_grad():
        for name, parameter in skeleton.named_parameters():
            parameter.data = weights[prefix + name].detach().cpu()
        for name, buffer in skeleton.named_buffers():
            if prefix + name in weights:
                buffer.copy_(weights[prefix + name])
    return skeleton


def _skeleton(network: nn.Module) -> nn.Module:
    """A copy that has all but the numbers, with weights that are shared still shared. fully_shard cannot be undone on the original."""
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(0, dtype=p.dtype), requires_grad=p.requires_grad) for p in network.parameters()
    }
    return copy.deepcopy(network, empty)
