"""Integer weights: the one form in which squeeze computes, stores, exports and verifies them.

`w ≈ scale · (integers − zero_point)` (affine quantization as in Jacob et al. 2017, arXiv:1712.05877, eq. 1). Integers are
kept in the byte layout that the kernels read, so that the export copies bytes and never rounds again:
signed with zero point 0 for `MatMulInteger`, unsigned with zero point 128 for `MatMulNBits` and `GatherBlockQuantized`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

QMAX = 127
"""Symmetric int8 uses [-127, 127]: -128 has no partner, and pairs of products then stay within 16 bits more often."""


@dataclass(frozen=True)
class IntegerWeight:
    """A weight matrix as integers [out, in] with one scale per row and block, scale [out, ceil(in / block_size)]."""

    integers: Tensor
    scale: Tensor
    zero_point: int
    block_size: int | None
    """Weights along `in` that share one scale; None: the whole row does (per channel)."""
    transposed: bool = False
    """True where the network stores the matrix as [in, out] (GPT-2's Conv1D)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.integers.shape[0], self.integers.shape[1]

    @property
    def stored_bytes(self) -> int:
        """Bytes of integers and scales on disk."""
        return self.integers.numel() * self.integers.element_size() + self.scale.numel() * self.scale.element_size()

    def dequantize(self) -> Tensor:
        """The float32 weight that these integers stand for, in the network's own orientation."""
        columns = self.integers.shape[1]
        scale = self.scale
        if self.block_size is not None:
            scale = scale.repeat_interleave(self.block_size, dim=1)[:, :columns]
        weight = (self.integers.to(torch.float32) - self.zero_point) * scale
        return weight.T.contiguous() if self.transposed else weight


def round_to_nearest(
    weight: Tensor, block_size: int | None, *, unsigned: bool, transposed: bool = False
) -> IntegerWeight:
    """Symmetric int8 by rounding to nearest (ties to even): scale = max|w| / 127 in each row or block of a row.

    `weight` is [out, in], or [in, out] if `transposed`. A row or block of zeros gets scale 1. Property that the tests
    hold: |w − dequantize| ≤ scale / 2.
    """
    matrix = (weight.T if transposed else weight).detach().to(torch.float32)
    out, columns = matrix.shape
    size = block_size or columns
    blocks = -(-columns // size)
    padded = torch.nn.functional.pad(matrix, (0, blocks * size - columns)).view(out, blocks, size)
    scale = padded.abs().amax(dim=2) / QMAX
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    rounded = (padded / scale.unsqueeze(2)).round_().clamp_(-QMAX, QMAX)
    integers = rounded.view(out, blocks * size)[:, :columns]
    zero_point = 128 if unsigned else 0
    integers = (integers + zero_point).to(torch.uint8 if unsigned else torch.int8).contiguous()
    return IntegerWeight(integers, scale.contiguous(), zero_point, block_size, transposed)


def sqnr_db(weight: Tensor, approximation: Tensor) -> float | None:
    """Signal to quantization noise, 10 log10(|w|² / |w − ŵ|²) in dB; None where the two are equal or w is zero."""
    noise = float((weight - approximation).double().square().sum())
    signal = float(weight.double().square().sum())
    if noise == 0 or signal == 0:
        return None
    return float(10 * torch.log10(torch.tensor(signal / noise)))


def dynamic_uint8(x: Tensor) -> Tensor:
    """`x` after ONNX's DynamicQuantizeLinear and back: one asymmetric uint8 scale for the whole tensor, zero always exact.

    Follows the operator's definition to the letter, rounding to even, so that a simulated run and ONNX Runtime differ only
    by the order of float additions. A tensor of zeros comes back unchanged.
    """
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = (high - low) / 255
    if float(scale) == 0:
        return x
    zero_point = torch.round(-low / scale).clamp(0, 255)
    return (torch.round(x / scale).add(zero_point).clamp(0, 255) - zero_point) * scale


def block_int8(x: Tensor, block_size: int) -> Tensor:
    """`x` [..., channels] as MatMulNBits with accuracy_level 4 rounds it: symmetric int8, one scale for each row and block.

    A block of zeros comes back unchanged.
    """
    channels = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -channels % block_size))
    padded = padded.view(*x.shape[:-1], -1, block_size)
    scale = padded.abs().amax(dim=-1, keepdim=True) / QMAX
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (torch.round(padded / scale) * scale).flatten(-2)[..., :channels]
