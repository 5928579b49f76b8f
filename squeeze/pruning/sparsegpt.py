"""SparseGPT: zero one column of a weight matrix after another, and let the columns still to come make up for each.

Frantar & Alistarh 2023, arXiv:2301.00774, algorithm 1: with H = X Xᵀ damped by 1 % of its mean diagonal and U the upper Cholesky factor
of H⁻¹, a weight of column j costs (w / U_jj)²; the cheapest go, and leave the error e = w / U_jj, of which e · U_jk goes onto every later
column k. Masks are chosen for 128 columns at once, from what earlier columns have made of them.

It works on Wᵀ, whose columns lie together in memory. Departures: sparsity is exact over the matrix, not only for each 128 columns; and
inputs that were always zero go first but are not zeroed beyond what was asked.
"""

import torch
from torch import Tensor

from squeeze.pruning.patterns import check_fits, choose
from squeeze.pruning.settings import block_of, n_of_m
from squeeze.second_order import LAZY, hessian_of, inverse_factor


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    sparsity: float,
    pattern: str = "unstructured",
    scope: str = "layer",
    *,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(pruned weights, which stay), both [out, in], for inputs whose Gram matrix is `gram` [in, in]; float32.

    A `mask` of weights that stay is kept as it is; the others make up for what it takes. Raises PruneError as `keep_mask` does.
    """
    check_fits("a matrix", weight.shape, sparsity, pattern)
    hessian, dead = hessian_of(gram)
    upper = inverse_factor(hessian)
    work = weight.detach().float().T.clone(memory_format=torch.contiguous_format)
    columns, out = work.shape
    keep = torch.ones(columns, out, dtype=torch.bool) if mask is None else mask.T.contiguous()
    pair, width = n_of_m(pattern), _width(pattern, columns)

    def cost(start: int, end: int) -> Tensor:
        found = (work[start:end] / upper.diagonal()[start:end, None]).square_()
        return found.masked_fill_(dead[start:end, None], 0).T

    for start in range(0, columns, width):
        end = min(start + width, columns)
        if mask is None and pair is None:
            keep[start:end] = choose(cost(start, end), _part(sparsity, pattern, out, start, end), pattern, scope).T
        part, factor, errors = work[start:end], upper[start:end, start:end], torch.empty(end - start, out)
        for column in range(end - start):
            place = start + column
            if mask is None and pair is not None and column % pair[1] == 0:
                keep[place : place + pair[1]] = choose(cost(place, place + pair[1]), sparsity, pattern, scope).T
            error = part[column].masked_fill(keep[place], 0) / factor[column, column]
            part[column].masked_fill_(~keep[place], 0)
            part[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
            errors[column] = error
        work[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return work.T.contiguous(), keep.T.contiguous()


def _width(pattern: str, columns: int) -> int:
    """Columns whose masks are chosen together: about 128, and whole groups of the pattern."""
    pair, block = n_of_m(pattern), block_of(pattern)
    step = pair[1] if pair is not None else block[1] if block is not None else 1
    return min(columns, max(1, LAZY // step) * step)


def _part(sparsity: float, pattern: str, out: int, start: int, end: int) -> float:
    """The share of columns start to end that goes, so that all parts together make the asked one exactly."""
    block = block_of(pattern) or (1, 1)
    units = out // block[0]

    def until(column: int) -> int:
        return round(sparsity * units * (column // block[1]))

    return (until(end) - until(start)) / (units * ((end - start) // block[1]))
