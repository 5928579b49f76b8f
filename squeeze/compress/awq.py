"""AWQ: channels that carry large activations are made larger before rounding, and so lose less of it; then ranges are clipped.

Lin, Tang, Tang, Yang, Chen, Wang, Gan, Dang, Han 2023, arXiv:2306.00978, section 3.2: the columns of all layers that read one tensor are
multiplied by s = (mean |x|)^α, what makes the tensor is divided by s, and α is the one of a grid over [0, 1] that leaves the least
error of the layers' outputs (equations 4 and 5). The paper measures that error on activations that it keeps; here it is
tr(ΔW G ΔWᵀ) with G the Gram matrix of the inputs, the same number for the layers' own outputs, and nothing need be kept.
Where the paper scales only what it lists for each family, this scales every link that is proven to be one (squeeze.compress.links).
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from squeeze.compress.gptq import SHRINKS
from squeeze.compress.links import Link, find_links
from squeeze.integers import Grid, IntegerWeight, in_blocks, integer_weight
from squeeze.layerwise import Gram, Site, width

if TYPE_CHECKING:
    from squeeze.compress.plan import Plan
    from squeeze.model import Model

GRID = tuple(step / 19 for step in range(20))
"""Values of α that are tried; 0 scales nothing."""
SMALLEST = 1e-4
"""Share of the largest channel's mean below which a channel counts as that share."""


@dataclass
class Scaler:
    """The links of one network, and what has been chosen for them."""

    model: "Model"
    links: dict[nn.Module, Link]
    """By each of their readers."""
    alphas: list[float] = field(default_factory=list)
    unlinked: Counter[str] = field(default_factory=Counter)
    """Names of layers, without their block, that nothing could take a scale from."""

    @classmethod
    def of(cls, model: "Model") -> "Scaler":
        """Raises QuantizeError where no scale can be moved anywhere."""
        links = find_links(model, "Use method: round.")
        return cls(model, {reader: link for link in links for _, reader in link.readers})

    def fold(self, layers: "list[tuple[str, nn.Module, Plan]]", gram: Tensor, size: Tensor) -> tuple[Tensor, str]:
        """Scale the layers of one group and what makes their inputs; the Gram matrix of what they read now, and what to note.

        `gram` [in, in] and `size` = mean |x| [in] are of the inputs as they were.
        """
        link = self.links.get(layers[0][1])
        if link is None:
            self.unlinked.update(name.removesuffix(".weight").rsplit(".", 1)[-1] for name, _, _ in layers)
            return gram, "nothing before it takes a scale"
        size = link.pooled(size, "mean")
        plans = [plan for _, _, plan in layers]
        errors = {alpha: error(plans, gram, channel_scale(size, alpha)[link.source]) for alpha in GRID}
        alpha = min(errors, key=lambda alpha: errors[alpha])
        self.alphas.append(alpha)
        if alpha == 0:
            return gram, "α = 0"
        factor = channel_scale(size, alpha)
        link.apply(factor)
        self._divide_integers(link, factor)
        wide = factor[link.source]
        return gram / (wide * wide.unsqueeze(1)), f"α = {alpha:.2f}"

    def _divide_integers(self, link: Link, factor: Tensor) -> None:
        """Where the producer is rounded already: its rows' scales take the division, exactly."""
        name = f"{link.path}.weight"
        integer = self.model.integers.get(name)
        if integer is None or link.is_norm:
            return
        scale = integer.scale.clone()
        scale[link.rows] /= factor.unsqueeze(1)
        integer = replace(integer, scale=scale)
        self.model.integers[name] = integer
        link.producer.weight.copy_(integer.dequantize())  # type: ignore[operator]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done, in words."""
        notes = ["AWQ scaled nothing: all layers that could be are kept in float"]
        if self.alphas:
            low, middle, high = min(self.alphas), median(self.alphas), max(self.alphas)
            count = f"AWQ scaled the inputs of {len(self.alphas)} groups of layers"
            notes = [f"{count}, α from {low:.2f} to {high:.2f}, in the middle {middle:.2f}"]
        if self.unlinked:
            listed = ", ".join(f"{count} {name}" for name, count in self.unlinked.items())
            notes.append(f"nothing before these layers takes a scale, so that they were not scaled: {listed}")
        return tuple(notes)


def measured(site: Site) -> tuple[Gram, Tensor]:
    """Gram matrix and mean |x| [in] of what a group reads, in one pass."""
    n = width(site.module)
    gram, total = Gram(torch.zeros(n, n)), torch.zeros(n)

    def add(rows: Tensor) -> None:
        gram.add(rows)
        total.add_(rows.abs().sum(dim=0))

    site.stream(add)
    return gram, total / gram.tokens


def channel_scale(size: Tensor, alpha: float) -> Tensor:
    """s = size^α [channels], divided by √(max s · min s) so that it lies around 1; 1 for channels that were always zero."""
    seen = size > 0
    if not bool(seen.any()):
        return torch.ones_like(size)
    scale = size.clamp(min=SMALLEST * float(size.max())).pow(alpha)
    scale = scale / (scale[seen].max() * scale[seen].min()).sqrt()
    return torch.where(seen, scale, torch.ones_like(scale))


def error(plans: "list[Plan]", gram: Tensor, scale: Tensor) -> float:
    """Σ tr(ΔW G ΔWᵀ) with ΔW = Q(W · s) / s − W over the matrices that read one tensor: the mean squared error of their outputs."""
    total = 0.0
    for plan in plans:
        matrix = plan.weight.T if plan.transposed else plan.weight
        wide = matrix * scale
        rounded = plan.rounded(wide.T if plan.transposed else wide).dequantize()
        delta = ((rounded.T if plan.transposed else rounded) - wide) / scale
        total += float(((delta @ gram) * delta).sum())
    return total


def clipped(
    weight: Tensor, gram: Tensor, block_size: int | None, grid: Grid, *, transposed: bool = False
) -> IntegerWeight:
    """Nearest integers of `weight` ([out, in], or [in, out] if `transposed`) in ranges that leave each block's outputs the least error.

    For every block of a row, δᵀ G_bb δ with G_bb the block's own part of the Gram matrix [in, in]: as the paper's clipping, which
    judges each block by the output of that block alone.
    """
    matrix = (weight.T if transposed else weight).detach().float()
    blocks = in_blocks(matrix, block_size)
    own = _diagonal_blocks(gram, block_size or len(gram))
    low, high = blocks.amin(dim=2), blocks.amax(dim=2)
    scale, zero = grid.fit(low, high)
    least = torch.full_like(low, torch.inf)
    for shrink in SHRINKS:
        s, z = grid.fit(low * shrink, high * shrink)
        delta = (grid.round(blocks, s.unsqueeze(2), z.unsqueeze(2)) - z.unsqueeze(2)) * s.unsqueeze(2) - blocks
        by_block = delta.transpose(0, 1)  # [blocks, out, block_size]
        lost = ((by_block @ own) * by_block).sum(dim=2).T
        better = lost < least
        least, scale, zero = (torch.where(better, new, old) for new, old in ((lost, least), (s, scale), (z, zero)))
    rounded = grid.round(blocks, scale.unsqueeze(2), zero.unsqueeze(2)).flatten(1)[:, : matrix.shape[1]]
    return integer_weight(rounded, scale, zero, grid, block_size, transposed=transposed)


def _diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    """[in, in] -> [blocks, size, size], the last filled up with zeros."""
    padded = torch.nn.functional.pad(gram, (0, -len(gram) % size, 0, -len(gram) % size))
    count = len(padded) // size
    return padded.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
