"""What is to become of every weight matrix, before any is touched: integers on which grid, or float and why."""

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from torch import Tensor, nn

from squeeze.compress.layers import output_matrices, weights
from squeeze.errors import QuantizeError, nearest
from squeeze.integers import REDUCED, Grid, IntegerWeight, round_to_nearest
from squeeze.recurrent import kernel_groups

if TYPE_CHECKING:
    from squeeze.compress.quantize import QuantizeStage
    from squeeze.compress.schemes import Layout

BLOCK_SIZES = (16, 32, 64, 128, 256)
OUTPUT_BLOCK = 32
"""Largest block of the output matrix: the rounding of its input goes straight into the logits (docs/log.md, 2026-11-24)."""


@dataclass(frozen=True)
class Plan:
    """What is to become of one weight matrix."""

    weight: Tensor
    transposed: bool
    note: str
    """Why it stays in float; "" where it becomes integers."""
    block_size: int | None = None
    grid: Grid | None = None
    whole: bool = False
    """Whether the whole matrix shares one scale."""

    def to_nearest(self) -> IntegerWeight:
        """The weight, as it is now, on its grid. Only for one that does not stay in float."""
        return self.rounded(self.weight)

    def rounded(self, weight: Tensor) -> IntegerWeight:
        """Another matrix of the same shape on this weight's grid."""
        grid = self.own_grid
        return round_to_nearest(
            weight, self.block_size, unsigned=grid.unsigned, transposed=self.transposed, bits=grid.bits,
            symmetric=grid.symmetric, whole=self.whole, reach=grid.reach,
        )  # fmt: skip

    @property
    def own_grid(self) -> Grid:
        """The grid of a weight that does not stay in float."""
        if self.grid is None:
            raise QuantizeError("a weight that stays in float was to be rounded; this is a bug.")
        return self.grid

    @property
    def described(self) -> str:
        """The grid in words, for the table of layers."""
        if self.grid is None:
            return self.note
        kind = "" if self.grid.symmetric else " and zero point"
        share = "matrix" if self.whole else "row" if self.block_size is None else f"{self.block_size} weights"
        within = "" if self.grid.reach is None else f" within ±{self.grid.reach}"
        return f"{self.grid.bits} bits{within}, one scale{kind} per {share}"


def make_plans(network: nn.Module, stage: "QuantizeStage", layout: "Layout") -> dict[str, Plan]:
    """What is to become of every weight matrix. Raises QuantizeError for a `keep` pattern that matches nothing."""
    plans: dict[str, Plan] = {}
    groups = kernel_groups(network)
    recurrent = {name for group in groups for name in group}
    unmatched = set(stage.keep)
    tables = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    outputs = output_matrices(network)
    reach = REDUCED if stage.reduce_range else None
    for name, weight, transposed, reason in weights(network):
        kept = [
            pattern
            for pattern in stage.keep
            if fnmatch(name.removesuffix(".weight"), pattern) or fnmatch(name, pattern)
        ]
        unmatched -= set(kept)
        if kept or reason:
            plans[name] = Plan(weight, transposed, f"kept in float: keep {kept[0]!r}" if kept else reason)
            continue
        if name in recurrent:  # in every scheme: the one kernel there is takes nothing else
            grid = Grid(8, symmetric=True, unsigned=False, reach=reach)
            plans[name] = Plan(weight, transposed, "", None, grid, stage.granularity == "tensor")
            continue
        # Tables and the output matrix decide more than they weigh, and the kernel that looks rows up reads 8-bit blocks.
        is_end = name in outputs or id(weight) in tables
        bits = 8 if is_end else layout.bits
        symmetric = bits == 8 or (layout.symmetric if stage.symmetric is None else stage.symmetric)
        largest = OUTPUT_BLOCK if name in outputs else 256 if is_end else layout.block_size
        chosen = None if is_end and layout.bits != 8 else stage.block_size
        columns = weight.shape[0] if transposed else weight.shape[1]
        by_block = bool(layout.block_size) or (is_end and layout.block_ends)
        block = (chosen or best_block(columns, largest)) if by_block else None
        # Where a table is only looked up, nothing is summed; in blocks, the kernel sums without cutting off.
        is_product = block is None and (id(weight) not in tables or name in outputs)
        grid = Grid(bits, symmetric, layout.unsigned or by_block, reach if is_product else None)
        plans[name] = Plan(weight, transposed, "", block, grid, stage.granularity == "tensor" and block is None)
    for group in groups:
        floats = [name for name in group if plans[name].note]
        for name in group if floats else ():
            note = plans[name].note or f"kept in float with {floats[0]}: one kernel takes both"
            plans[name] = Plan(plans[name].weight, plans[name].transposed, note)
    if stage.reduce_range and not any(plan.grid is not None and plan.grid.reach for plan in plans.values()):
        raise QuantizeError(
            f"reduce_range is for products with one scale per row; {stage.scheme} has none here, and its blocks are summed exactly "
            "on every processor. Drop it."
        )
    if unmatched:
        names = [name.removesuffix(".weight") for name in plans]
        raise QuantizeError(
            f"keep {sorted(unmatched)[0]!r} matches no layer. {nearest(sorted(unmatched)[0], names[:400])}"
        )
    return plans


def best_block(columns: int, largest: int) -> int:
    """The largest block up to `largest` that divides the row; where none of 32 or more does, the one with least padding.

    Padding costs bytes in every row: 576 weights in blocks of 128 are stored as 640.
    """
    sizes = [size for size in BLOCK_SIZES if 32 <= size <= largest]
    return max(sizes, key=lambda size: (-(-columns % size), size))
