"""GPTQ: round one column of a weight matrix after another, and let the columns still to come make up for each error.

Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323, algorithm 1: with H = X Xᵀ damped by 1 % of its mean diagonal and U
the upper Cholesky factor of H⁻¹, column j leaves the error e = (w_j − q_j) / U_jj, of which e · U_jk goes onto every later column k.

A weight that is pruned has zero for its q, and what that loses goes onto later columns with the errors of rounding: one pass prunes and
rounds (Frantar & Alistarh 2023, "SparseGPT", arXiv:2301.00774, section 3.5). Which weights are pruned is either known, or chosen on the
way: in each lazy block those with the least w_j² / U_jj², as they have become by then.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from squeeze.integers import Grid, IntegerWeight, in_blocks, integer_weight
from squeeze.pruning.patterns import choose, lowest
from squeeze.second_order import LAZY, hessian_of, inverse_factor, lost_db

SHRINKS = tuple(1 - step / 40 for step in range(17))
"""Shares of a block's range that are tried for its scale."""


@dataclass(frozen=True)
class Zeros:
    """How many weights become zero while the others are rounded."""

    sparsity: float
    """Share of the weights of a matrix, [0, 1)."""
    group: int | None = None
    """M of the pattern N:M: each M neighbours along the inputs have N = sparsity · M zeros. None: unstructured."""

    def count(self, rows: int, columns: int) -> int:
        """Zeros of a matrix of that shape."""
        return round(self.sparsity * rows * columns)

    def chosen(self, scores: Tensor, before: int) -> Tensor:
        """True for the zeros of a stretch of columns [out, n] with the least scores; `before` columns have theirs already."""
        out, width = scores.shape
        if self.group is not None:
            return ~choose(scores, self.sparsity, f"{round(self.sparsity * self.group)}:{self.group}", "layer")
        count = self.count(out, before + width) - self.count(out, before)
        return lowest(scores.flatten(), count).view(out, width)


def gptq(
    weight: Tensor, gram: Tensor, block_size: int | None, grid: Grid, *, order: bool = True, search: bool = True,
    transposed: bool = False, mask: Tensor | None = None, zeros: Zeros | None = None,
) -> IntegerWeight:  # fmt: skip
    """Integers of `weight` ([out, in], or [in, out] if `transposed`) for inputs whose Gram matrix is `gram` [in, in].

    `order`: columns with large inputs first, the scales of all blocks then fixed beforehand ("static groups"); else each block's
    scale is fitted to what its columns have become when they are reached. `search`: fit scales to the least weighted error,
    not to the extremes.

    `mask` (shaped as `weight`, True where the weight stays): the others are exactly zero. `zeros`: how many are to become zero, chosen
    here; of the pattern N:M columns are ordered by whole groups, and M must divide them.
    """
    matrix = (weight.T if transposed else weight).detach().to(torch.float32).clone()
    out, columns = matrix.shape
    size = block_size or columns
    hessian, dead = hessian_of(gram)
    diagonal = hessian.diagonal()
    matrix[:, dead] = 0
    importance = diagonal.float()
    dropped = torch.zeros(out, columns, dtype=torch.bool)
    if mask is not None:
        dropped = ~(mask.T if transposed else mask)
    scale, zero = fit_scales(matrix.masked_fill(dropped, 0), importance, size, grid, search=search)
    group = 1 if zeros is None or zeros.group is None else zeros.group
    permutation, lazy = _permutation(diagonal, group) if order else torch.arange(columns), LAZY - LAZY % group
    upper = inverse_factor(hessian[permutation][:, permutation])
    work, rounded = matrix[:, permutation], torch.empty(out, columns)
    for start in range(0, columns, lazy):
        end = min(start + lazy, columns)
        part, errors = work[:, start:end], torch.empty(out, end - start)
        if zeros is not None:
            scores = (part / upper.diagonal()[start:end]).square()
            dropped[:, permutation[start:end]] = zeros.chosen(scores, start)
        for column in range(end - start):
            place = int(permutation[start + column])
            block = place // size
            if not order and place % size == 0:
                stop = min(place + size, columns)
                # Columns of this block beyond `end` have not had this round's errors yet: give them theirs first.
                now = work[:, place:stop].clone()
                if stop > end and column:
                    now[:, end - place :] -= errors[:, :column] @ upper[start : start + column, end:stop]
                now.masked_fill_(dropped[:, place:stop], 0)
                fresh = fit_scales(now, importance[place:stop], size, grid, search=search)
                scale[:, block], zero[:, block] = fresh[0][:, 0], fresh[1][:, 0]
            s, z = scale[:, block], zero[:, block]
            integers = torch.where(dropped[:, place], z, grid.round(part[:, column], s, z))
            rounded[:, place] = integers
            error = (part[:, column] - (integers - z) * s) / upper[start + column, start + column]
            part[:, column + 1 :] -= error.unsqueeze(1) * upper[start + column, start + column + 1 : end]
            errors[:, column] = error
        work[:, end:] -= errors @ upper[start:end, end:]
    return integer_weight(rounded, scale, zero, grid, block_size, transposed=transposed)


def _permutation(diagonal: Tensor, group: int) -> Tensor:
    """Columns with large inputs first, `group` neighbours together."""
    places = torch.argsort(diagonal.view(-1, group).sum(dim=1), descending=True)
    return (places.unsqueeze(1) * group + torch.arange(group)).flatten()


def fit_scales(matrix: Tensor, importance: Tensor, size: int, grid: Grid, *, search: bool) -> tuple[Tensor, Tensor]:
    """(scale, zero point), each [out, blocks], from the extremes of every block, or with the least weighted squared error.

    `importance` [in] weights the columns.
    """
    blocks = in_blocks(matrix, size)
    low, high = blocks.amin(dim=2), blocks.amax(dim=2)
    best_scale, best_zero = grid.fit(low, high)
    if not search:
        return best_scale, best_zero
    weights = in_blocks(importance.unsqueeze(0), size)
    least = torch.full_like(low, torch.inf)
    for shrink in SHRINKS:
        scale, zero = grid.fit(low * shrink, high * shrink)
        s, z = scale.unsqueeze(2), zero.unsqueeze(2)
        error = (((grid.round(blocks, s, z) - z) * s - blocks).square_() * weights).sum(dim=2)
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def output_sqnr_db(weight: Tensor, integer: IntegerWeight, gram: Tensor) -> float | None:
    """Signal to noise of a layer's outputs in dB, 10 log10(E|W x|² / E|(W − Ŵ) x|²), from its inputs' Gram matrix; None where equal."""
    own = weight.T if integer.transposed else weight
    approximation = integer.dequantize()
    other = approximation.T if integer.transposed else approximation
    return lost_db(own, other, gram)
