"""SmoothQuant: move the size of outlier channels from activations into weights, where one scale a block absorbs it.

s_j = max|X_j|^α / max|W_j|^(1−α) for every input channel j (Xiao et al. 2022, arXiv:2211.10438, eq. 4); the norm before a
linear layer is divided by s, the layer's columns are multiplied by it, so the float function stays the same. We depart from
the paper in one point: s is scaled to a geometric mean of 1, which keeps the norm's weight in its range.
Only norms whose whole output goes to linear layers are smoothed: whether that holds is not read from names but tested, by
comparing the network's answers before and after.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from squeeze.errors import QuantizeError

if TYPE_CHECKING:
    from squeeze.model import Model

SMALLEST = 1e-5
EXACT = 1e-3
"""Largest relative change of the logits that float rounding explains."""


@dataclass
class Group:
    """A norm, the linear layers that read its output, and the largest absolute value seen in each of its channels."""

    norm: nn.Module
    linears: list[nn.Linear] = field(default_factory=list)
    peaks: Tensor | None = None


def smooth(model: "Model", alpha: float, blocks: NDArray[np.int64]) -> list[Group]:
    """Smooth every norm of a pre-norm decoder in place, from calibration `blocks` [n, length]; returns them.

    Norms that feed a tied or shared matrix are left alone. Raises QuantizeError where the network would no longer compute
    the same (the norm's output is used elsewhere too, as in post-norm encoders); the network is then as it was.
    """
    groups = find_groups(model.network, blocks)
    probe = torch.from_numpy(blocks[:1, :64])
    with torch.no_grad():
        before = model.network(input_ids=probe).logits
        scales = [(group, channel_scales(group, alpha)) for group in groups]
        for group, scale in scales:
            _rescale(group, scale)
        after = model.network(input_ids=probe).logits
        if float((after - before).norm() / before.norm()) > EXACT:
            for group, scale in scales:
                _rescale(group, 1 / scale)
            raise QuantizeError(
                f"{model.source} cannot be smoothed: its norms feed more than linear layers. Drop smooth_alpha."
            )
    return groups


def channel_scales(group: Group, alpha: float) -> Tensor:
    """s of equation 4, [channels], with geometric mean 1."""
    if group.peaks is None:
        raise QuantizeError("a norm was smoothed without calibration; this is a bug.")
    weight = column_peaks([linear.weight for linear in group.linears]).clamp(min=SMALLEST)
    scale = group.peaks.clamp(min=SMALLEST).pow(alpha) / weight.pow(1 - alpha)
    return scale / scale.log().mean().exp()


def column_peaks(matrices: Sequence[Tensor]) -> Tensor:
    """The largest absolute weight that each input meets in any of the matrices [out, in], [in]."""
    return torch.stack([matrix.abs().amax(dim=0) for matrix in matrices]).amax(dim=0)


def find_groups(network: nn.Module, blocks: NDArray[np.int64]) -> list[Group]:
    """Which linear layers read which norm, seen by running the network, with the channels' peaks over all blocks."""
    shared = shared_weights(network)
    groups: dict[nn.Module, Group] = {}
    outputs: dict[int, tuple[Tensor, nn.Module]] = {}  # the tensor too: while it lives, no other has its id
    hooks = []

    def norm_ran(module: nn.Module, _: object, output: Tensor) -> None:
        outputs[id(output)] = (output, module)

    def linear_ran(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found = outputs.get(id(inputs[0]))
        if found is None or not isinstance(module, nn.Linear):
            return
        group = groups.setdefault(found[1], Group(found[1]))
        if module not in group.linears:
            group.linears.append(module)
        peaks = inputs[0].abs().flatten(0, -2).amax(dim=0)
        group.peaks = peaks if group.peaks is None else torch.maximum(group.peaks, peaks)

    for module in network.modules():
        if is_norm(module):
            hooks.append(module.register_forward_hook(norm_ran))
        elif isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(linear_ran))
    try:
        with torch.no_grad():
            for block in blocks:
                outputs.clear()
                network(input_ids=torch.from_numpy(block[None]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [g for g in groups.values() if not any(id(linear.weight) in shared for linear in g.linears)]


def is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and isinstance(weight, Tensor) and weight.dim() == 1


def shared_weights(network: nn.Module) -> set[int]:
    seen: set[int] = set()
    twice: set[int] = set()
    for _, parameter in network.named_parameters(remove_duplicate=False):
        (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def _rescale(group: Group, scale: Tensor) -> None:
    group.norm.weight.div_(scale)  # type: ignore[operator]
    bias = getattr(group.norm, "bias", None)
    if isinstance(bias, Tensor):
        bias.div_(scale)
    for linear in group.linears:
        linear.weight.mul_(scale)
