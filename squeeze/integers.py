"""Integer weights: the one form in which squeeze computes, stores, exports and verifies them.

`w ≈ scale · (integers − zero_point)` (affine quantization as in Jacob et al. 2017, arXiv:1712.05877, eq. 1). Integers are
kept in the byte layout that the kernels read, so that the export copies bytes and never rounds again:
signed with zero point 0 for `MatMulInteger`, unsigned with zero point 128 for `MatMulNBits` and `GatherBlockQuantized`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from squeeze.outliers import Outliers

QMAX = 127
"""Symmetric int8 uses [-127, 127]: -128 has no partner, and pairs of products then stay within 16 bits more often."""
REDUCED = 64
"""Largest integer with which two products of uint8 and int8 always stay within 16 bits: 2 · 255 · 64 = 32,640 < 2¹⁵. Processors
without VNNI add such pairs in 16 bits and cut off what is beyond (VPMADDUBSW)."""


@dataclass(frozen=True)
class Grid:
    """The integers that numbers may become: `bits` of them, around zero or with a zero point for each row or block."""

    bits: int = 8
    symmetric: bool = True
    unsigned: bool = True
    """How they are stored; a symmetric grid then has its zero in the middle (128, 8). An asymmetric one always is."""
    reach: int | None = None
    """Largest distance from zero on a symmetric grid; None: all that the bits allow."""

    @property
    def middle(self) -> int:
        """The integer that stands for zero where the grid is symmetric."""
        return 2 ** (self.bits - 1) if self.unsigned else 0

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        return (self.middle - self.half, self.middle + self.half) if self.symmetric else (0, 2**self.bits - 1)

    @property
    def half(self) -> int:
        """Steps from zero to either end of a symmetric grid."""
        return self.reach or 2 ** (self.bits - 1) - 1

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, zero point) that cover numbers from `low` to `high`, elementwise; zero is always exact, a range of nothing gets 1."""
        if self.symmetric:
            scale = torch.maximum(-low, high) / self.half
            scale = torch.where(scale == 0, torch.ones_like(scale), scale)
            return scale, torch.full_like(scale, self.middle)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (2**self.bits - 1)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return scale, torch.round(-low / scale)

    def round(self, numbers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The integers, as floats: nearest (ties to even), kept within the bounds."""
        return (torch.round(numbers / scale) + zero_point).clamp_(*self.bounds)


@dataclass(frozen=True)
class InputGrid:
    """How a layer's inputs become uint8, fixed beforehand: x ≈ scale · (q − zero_point), q in [0, 255]."""

    scale: float
    """A float32 number."""
    zero_point: int


@dataclass(frozen=True)
class IntegerWeight:
    """A weight matrix as integers [out, in] with one scale per row and block, scale [out, ceil(in / block_size)]."""

    integers: Tensor
    """One byte each, also where `bits` is 4; they are packed where they are stored."""
    scale: Tensor
    zero_point: int | Tensor
    """One for all, or uint8 with the shape of `scale`."""
    block_size: int | None
    """Weights along `in` that share one scale; None: the whole row does (per channel)."""
    transposed: bool = False
    """True where the network stores the matrix as [in, out] (GPT-2's Conv1D)."""
    bits: int = 8
    divisor: Tensor | None = None
    """[in]: what the inputs are divided by before they are rounded; the columns were multiplied by it before they were
    (SmoothQuant, where no norm can take it). The integers then stand for w · divisor, and the weight is that divided by it."""
    inputs: InputGrid | None = None
    """Where the layer's inputs have a range fixed by calibration; None: they are rounded as they come, or not at all."""
    reach: int | None = None
    """Of its grid, where that is narrower than the bits allow: training on must stay within it."""
    outliers: Outliers | None = None
    """Input channels that stay in float. The integers are zero there, and neither range nor divisor counts."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.integers.shape[0], self.integers.shape[1]

    @property
    def input_factor(self) -> Tensor | None:
        """[in]: what inputs are multiplied by before they are rounded; 0 for outlier channels. None where nothing need be.

        Without a divisor a fixed range needs no factor: beyond it outliers saturate, and the integers that they meet are zeros.
        """
        factor = None if self.divisor is None else reciprocal(self.divisor)
        if self.outliers is None or (factor is None and self.inputs is not None):
            return factor
        return self.outliers.muted(torch.ones(self.shape[1]) if factor is None else factor)

    @property
    def stored_bytes(self) -> int:
        """Bytes of integers, scales, zero points and float columns on disk."""
        packed = self.integers.shape[0] * -(-self.integers.shape[1] * self.bits // 8)
        zeros = self.zero_point.numel() if isinstance(self.zero_point, Tensor) else 0
        divisor = 0 if self.divisor is None else 4 * self.divisor.numel()
        floats = 0 if self.outliers is None else self.outliers.stored_bytes
        return packed + self.scale.numel() * self.scale.element_size() + zeros + divisor + floats

    def dequantize(self) -> Tensor:
        """The float32 weight that these integers stand for, in the network's own orientation."""
        zero = self.wide(self.zero_point) if isinstance(self.zero_point, Tensor) else self.zero_point
        weight = (self.integers.to(torch.float32) - zero) * self.wide(self.scale)
        if self.divisor is not None:
            weight = weight / self.divisor
        if self.outliers is not None:
            weight = self.outliers.into(weight)
        return weight.T.contiguous() if self.transposed else weight

    def wide(self, by_block: Tensor) -> Tensor:
        """[out, blocks] as [out, in], or as [out, 1] where a row is one block."""
        if self.block_size is None:
            return by_block
        return by_block.repeat_interleave(self.block_size, dim=1)[:, : self.integers.shape[1]]


def round_to_nearest(
    weight: Tensor, block_size: int | None, *, unsigned: bool, transposed: bool = False, bits: int = 8, symmetric: bool = True,
    whole: bool = False, reach: int | None = None,
) -> IntegerWeight:  # fmt: skip
    """Integers by rounding to nearest (ties to even), one scale for each row or block of a row, from its extreme values.

    `whole`: one for the whole matrix, written for every row all the same, as the kernels read it.

    `weight` is [out, in], or [in, out] if `transposed`. A row or block of zeros gets scale 1. Property that the tests
    hold: |w − dequantize| ≤ scale / 2, on an asymmetric grid ≤ scale (the zero point is rounded, too).
    """
    grid = Grid(bits, symmetric, unsigned, reach)
    matrix = (weight.T if transposed else weight).detach().to(torch.float32)
    blocks = in_blocks(matrix, block_size)
    low, high = blocks.amin(dim=2), blocks.amax(dim=2)
    if whole:
        low, high = low.amin().expand_as(low), high.amax().expand_as(high)
    scale, zero_point = grid.fit(low, high)
    rounded = grid.round(blocks, scale.unsqueeze(2), zero_point.unsqueeze(2)).flatten(1)[:, : matrix.shape[1]]
    return integer_weight(rounded, scale, zero_point, grid, block_size, transposed=transposed)


def in_blocks(matrix: Tensor, block_size: int | None) -> Tensor:
    """[out, in] as [out, blocks, block_size], the last block filled up with zeros."""
    out, columns = matrix.shape
    size = block_size or columns
    return torch.nn.functional.pad(matrix, (0, -columns % size)).view(out, -1, size)


def integer_weight(
    rounded: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, block_size: int | None, *, transposed: bool
) -> IntegerWeight:
    """Rounded numbers [out, in] of a grid in the form that is kept."""
    stored = rounded.to(torch.uint8 if grid.unsigned else torch.int8).contiguous()
    zero = grid.middle if grid.symmetric else zero_point.to(torch.uint8).contiguous()
    return IntegerWeight(stored, scale.contiguous(), zero, block_size, transposed, grid.bits, reach=grid.reach)


def pack(integers: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] as stored: of 4 bits two in a byte, the first in its lower half, an odd last one with 0 above it."""
    if bits == 8:
        return integers
    even = torch.nn.functional.pad(integers, (0, integers.shape[-1] % 2))
    return even[..., 0::2] | (even[..., 1::2] << 4)


def unpack(stored: Tensor, bits: int, columns: int) -> Tensor:
    """What `pack` packed: uint8 [rows, columns]."""
    if bits == 8:
        return stored
    return torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2)[..., :columns].contiguous()


def to_tensors(weights: Mapping[str, IntegerWeight]) -> dict[str, Tensor]:
    """All that a file must hold of these weights, beside `layout_of` them."""
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        tensors[f"{name}.integers"] = pack(weight.integers, weight.bits).contiguous()
        tensors[f"{name}.scale"] = weight.scale.contiguous()
        if isinstance(weight.zero_point, Tensor):
            tensors[f"{name}.zero_point"] = weight.zero_point.contiguous()
        if weight.divisor is not None:
            tensors[f"{name}.divisor"] = weight.divisor.clone()  # readers of one tensor share one; files do not
        if weight.inputs is not None:
            tensors[f"{name}.input_scale"] = torch.tensor([weight.inputs.scale], dtype=torch.float32)
            tensors[f"{name}.input_zero_point"] = torch.tensor([weight.inputs.zero_point], dtype=torch.uint8)
        if weight.outliers is not None:
            tensors[f"{name}.outlier_channels"] = weight.outliers.channels.clone()
            tensors[f"{name}.outlier_columns"] = weight.outliers.columns.contiguous()
    return tensors


def layout_of(weights: Mapping[str, IntegerWeight]) -> dict[str, dict[str, Any]]:
    """What the tensors do not say, as plain data for a manifest."""
    return {
        name: {
            "zero_point": None if isinstance(w.zero_point, Tensor) else w.zero_point, "block_size": w.block_size,
            "transposed": w.transposed, "bits": w.bits, "columns": w.shape[1],
            **({} if w.reach is None else {"reach": w.reach}),
        }
        for name, w in weights.items()
    }  # fmt: skip


def from_tensors(tensors: Mapping[str, Tensor], layout: Mapping[str, Mapping[str, Any]]) -> dict[str, IntegerWeight]:
    """The weights that `to_tensors` and `layout_of` describe. Artifacts older than 4-bit weights name no bits and no columns."""
    found = {}
    for name, row in layout.items():
        stored, bits = tensors[f"{name}.integers"], row.get("bits", 8)
        integers = unpack(stored, bits, row.get("columns", stored.shape[1]))
        zero = tensors[f"{name}.zero_point"] if row["zero_point"] is None else row["zero_point"]
        inputs = None
        if f"{name}.input_scale" in tensors:
            inputs = InputGrid(float(tensors[f"{name}.input_scale"]), int(tensors[f"{name}.input_zero_point"]))
        outliers = None
        if f"{name}.outlier_channels" in tensors:
            outliers = Outliers(tensors[f"{name}.outlier_channels"], tensors[f"{name}.outlier_columns"])
        found[name] = IntegerWeight(
            integers, tensors[f"{name}.scale"], zero, row["block_size"], row["transposed"], bits,
            tensors.get(f"{name}.divisor"), inputs, row.get("reach"), outliers,
        )  # fmt: skip
    return found


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


def static_uint8(x: Tensor, grid: InputGrid, divisor: Tensor | None = None) -> Tensor:
    """`x` after ONNX's QuantizeLinear with a fixed range and back; where there is a divisor, x / divisor is rounded.

    Follows the operator to the letter (round half to even, saturate), so that a simulated run differs from ONNX Runtime only by the
    order of float additions.
    """
    y = x if divisor is None else x * reciprocal(divisor)
    y = (torch.round(y / grid.scale) + grid.zero_point).clamp(0, 255).sub(grid.zero_point) * grid.scale
    return y if divisor is None else y * divisor


def reciprocal(divisor: Tensor) -> Tensor:
    """What an export multiplies inputs by: a product is several times faster than a quotient."""
    return 1 / divisor


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
