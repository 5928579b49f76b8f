"""Outlier channels: the few inputs of a layer that are multiplied in float, so that they do not set the range of all others.

y = Q(x without them) · W_q + x[channels] · W[channels] (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, eq. 8). We depart from the
paper in one point: the channels are chosen once, from calibration texts, and not anew in every batch by a threshold, so that an
exported graph of fixed operators can compute it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outliers:
    """The channels of one layer that stay in float; the integers are zero there."""

    channels: Tensor
    """[k] int64, ascending: places along `in`."""
    columns: Tensor
    """[out, k] float32: the weights that these channels meet, as they are; no divisor applies to them."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of both on disk; the zeros among the integers come on top."""
        return 8 * self.channels.numel() + 4 * self.columns.numel()

    def into(self, matrix: Tensor) -> Tensor:
        """`matrix` [out, in] with the float columns in their places."""
        return matrix.index_copy(1, self.channels, self.columns)

    def of(self, matrix: Tensor) -> "Outliers":
        """The same channels with the columns that `matrix` [out, in] has there."""
        return replace(self, columns=matrix.index_select(1, self.channels).contiguous())

    def same_channels(self, other: "Outliers | None") -> bool:
        """Whether both layers keep the same inputs in float."""
        return other is not None and torch.equal(self.channels, other.channels)

    def around(self, rounding: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A layer's rounding of its inputs [..., in] that neither sees nor changes these channels; differentiable where `rounding` is."""

        def rounded(x: Tensor) -> Tensor:
            return rounding(x.index_fill(-1, self.channels, 0)).index_copy(-1, self.channels, x[..., self.channels])

        return rounded

    def muted(self, factors: Tensor) -> Tensor:
        """What inputs are multiplied by before they are rounded, [in], with a 0 at these channels."""
        return factors.index_fill(0, self.channels, 0)
