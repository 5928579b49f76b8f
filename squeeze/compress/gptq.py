"""GPTQ: round one column of a weight matrix after another, and let the columns still to come make up for each error.

Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323, algorithm 1: with H = X Xᵀ damped by 1 % of its mean diagonal and U
the upper Cholesky factor of H⁻¹, column j leaves the error e = (w_j − q_j) / U_jj, of which e · U_jk goes onto every later column k.
"""

import math

import torch
from torch import Tensor

from squeeze.integers import Grid, IntegerWeight, in_blocks, integer_weight
from squeeze.second_order import LAZY, hessian_of, inverse_factor

SHRINKS = tuple(1 - step / 40 for step in range(17))
"""Shares of a block's range that are tried for its scale."""


def gptq(
    weight: Tensor, gram: Tensor, block_size: int | None, grid: Grid, *, order: bool = True, search: bool = True,
    transposed: bool = False,
) -> IntegerWeight:  # fmt: skip
    """Integers of `weight` ([out, in], or [in, out] if `transposed`) for inputs whose Gram matrix is `gram` [in, in].

    `order`: columns with large inputs first, the scales of all blocks then fixed beforehand ("static groups"); else each block's
    scale is fitted to what its columns have become when they are reached. `search`: fit scales to the least weighted error,
    not to the extremes.
    """
    matrix = (weight.T if transposed else weight).detach().to(torch.float32).clone()
    out, columns = matrix.shape
    size = block_size or columns
    hessian, dead = hessian_of(gram)
    diagonal = hessian.diagonal()
    matrix[:, dead] = 0
    importance = diagonal.float()
    scale, zero = fit_scales(matrix, importance, size, grid, search=search)
    permutation = torch.argsort(diagonal, descending=True) if order else torch.arange(columns)
    upper = inverse_factor(hessian[permutation][:, permutation])
    work, rounded = matrix[:, permutation], torch.empty(out, columns)
    for start in range(0, columns, LAZY):
        end = min(start + LAZY, columns)
        part, errors = work[:, start:end], torch.empty(out, end - start)
        for column in range(end - start):
            place = int(permutation[start + column])
            block = place // size
            if not order and place % size == 0:
                stop = min(place + size, columns)
                # Columns of this block beyond `end` have not had this round's errors yet: give them theirs first.
                now = work[:, place:stop].clone()
                if stop > end and column:
                    now[:, end - place :] -= errors[:, :column] @ upper[start : start + column, end:stop]
                fresh = fit_scales(now, importance[place:stop], size, grid, search=search)
                scale[:, block], zero[:, block] = fresh[0][:, 0], fresh[1][:, 0]
            s, z = scale[:, block], zero[:, block]
            integers = grid.round(part[:, column], s, z)
            rounded[:, place] = integers
            error = (part[:, column] - (integers - z) * s) / upper[start + column, start + column]
            part[:, column + 1 :] -= error.unsqueeze(1) * upper[start + column, start + column + 1 : end]
            errors[:, column] = error
        work[:, end:] -= errors @ upper[start:end, end:]
    return integer_weight(rounded, scale, zero, grid, block_size, transposed=transposed)


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
    signal, noise = (float(((m @ gram) * m).sum()) for m in (own, own - other))
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
