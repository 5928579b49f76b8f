"""Which weights become zero, given what each is worth: how many, which may stand together, and among which they are ranked.

Counts are exact and ties go by place, the first first, so that equal scores give equal masks on every machine. Shapes that a pattern
cannot carry are refused: padding a matrix to the next multiple would make zeros that nobody asked for.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from squeeze.errors import PruneError
from squeeze.pruning.settings import block_of, n_of_m


class Pattern(NamedTuple):
    """One row of `squeeze methods`."""

    summary: str
    source: str


PATTERNS: dict[str, Pattern] = {
    "unstructured": Pattern("zeros anywhere; no dense kernel is faster for them", ""),
    "N:M": Pattern("N of M neighbours along the inputs are zero, as 2:4", "Mishra et al. 2021, arXiv:2104.08378"),
    "block-RxC": Pattern("whole blocks of R outputs and C inputs, as block-16x16", "Gray et al. 2017"),
    "row": Pattern("whole outputs; the matrix keeps its shape (remove makes it smaller)", "Li et al. 2016, arXiv:1608.08710"),
}  # fmt: skip


def check_fits(name: str, shape: Sequence[int], sparsity: float, pattern: str) -> None:
    """Raise PruneError, naming the matrix, where its shape [out, in] cannot carry the pattern, or nothing of it would stay."""
    out, columns = shape
    pair, block = n_of_m(pattern), block_of(pattern)
    told = f"{name} [{out}, {columns}]"
    if pair is not None:
        if columns % pair[1]:
            raise PruneError(
                f"{told}: pattern {pattern} takes inputs by {pair[1]}, and {columns} is no multiple. Keep this matrix dense (keep), "
                "or use another pattern."
            )
        if abs(sparsity - pair[0] / pair[1]) > 1e-6:
            raise PruneError(
                f"{told}: sparsity {sparsity:g} is not what pattern {pattern} gives, {pair[0] / pair[1]:g}. Drop sparsity."
            )
        return
    if block is not None and (out % block[0] or columns % block[1]):
        raise PruneError(
            f"{told}: blocks of {block[0]} outputs and {block[1]} inputs do not fit. Keep this matrix dense (keep), or use blocks that "
            "divide its shape."
        )
    units = out * columns if block is None else (out // block[0]) * (columns // block[1])
    if pattern != "row" and sparsity and round(sparsity * units) >= units:
        raise PruneError(
            f"{told}: sparsity {sparsity:g} leaves none of its {units} {'weights' if block is None else 'blocks'}. Lower it, or keep this "
            "matrix dense (keep)."
        )


def keep_mask(scores: Tensor, sparsity: float, pattern: str, scope: str) -> Tensor:
    """Which of [out, in] stay, bool: those with the highest scores.

    `sparsity` of all weights (blocks; rows, of which one stays at least) become zero, to the nearest whole number. With `scope` row each
    row gives equally many, and where that leaves a remainder those with the lowest next score one more; with layer all are ranked
    together. N:M ranks within each M inputs. Raises PruneError for shapes that the pattern does not fit, and for scores with NaN.
    """
    check_fits("a matrix", scores.shape, sparsity, pattern)
    return choose(scores, sparsity, pattern, scope)


def choose(scores: Tensor, sparsity: float, pattern: str, scope: str) -> Tensor:
    """As `keep_mask`, for a part of a matrix, all of which may go."""
    if bool(scores.isnan().any()):
        raise PruneError(
            f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN: weights cannot be ranked by them."
        )
    scores = scores if scores.dtype == torch.float64 else scores.float()
    pair, block = n_of_m(pattern), block_of(pattern)
    if pair is not None:
        groups = scores.reshape(-1, pair[1])
        gone = torch.zeros_like(groups, dtype=torch.bool)
        gone.scatter_(1, groups.argsort(dim=1, stable=True)[:, : pair[0]], True)
        return ~gone.reshape(scores.shape)
    if block is not None:
        (out, columns), (rows, width) = scores.shape, block
        means = scores.reshape(out // rows, rows, columns // width, width).mean(dim=(1, 3))
        return ~_lowest(means, sparsity, scope).repeat_interleave(rows, 0).repeat_interleave(width, 1)
    if pattern == "row":
        means = scores.mean(dim=1)
        count = min(round(sparsity * len(means)), len(means) - 1)
        return ~lowest(means, count)[:, None].expand(scores.shape).contiguous()
    return ~_lowest(scores, sparsity, scope)


def _lowest(scores: Tensor, sparsity: float, scope: str) -> Tensor:
    count = round(sparsity * scores.numel())
    if scope != "row":
        return lowest(scores.flatten(), count).reshape(scores.shape)
    rows = len(scores)
    each, more = divmod(count, rows)
    order = scores.argsort(dim=1, stable=True)
    gone = torch.zeros_like(scores, dtype=torch.bool)
    gone.scatter_(1, order[:, :each], True)
    if more:
        following = order[:, each]
        first = scores[torch.arange(rows), following].argsort(stable=True)[:more]
        gone[first, following[first]] = True
    return gone


def lowest(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest of [n], bool, the first of equal ones first. By selection, not sorting: n may be all weights of a network."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(count).values
    gone = scores < limit
    missing = count - int(gone.sum())
    gone[(scores == limit).nonzero().flatten()[:missing]] = True
    return gone
