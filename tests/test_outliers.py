"""Outlier channels: by hand, in a file, and what rounding sees of them."""

import json

import torch

from squeeze.integers import (
    InputGrid,
    IntegerWeight,
    dynamic_uint8,
    from_tensors,
    layout_of,
    round_to_nearest,
    static_uint8,
    to_tensors,
)
from squeeze.outliers import Outliers
from squeeze.simulation import input_rounding

CHANNELS = torch.tensor([1, 3])


def weight(**settings: object) -> tuple[torch.Tensor, IntegerWeight]:
    """[3, 5] with channels 1 and 3 in float."""
    matrix = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    rounded = round_to_nearest(matrix.index_fill(1, CHANNELS, 0), None, unsigned=False)
    outliers = Outliers(CHANNELS, matrix[:, CHANNELS])
    return matrix, IntegerWeight(rounded.integers, rounded.scale, 0, None, outliers=outliers, **settings)  # type: ignore[arg-type]


def test_float_columns_come_back_exactly_and_no_divisor_touches_them() -> None:
    matrix, plain = weight()
    assert torch.equal(plain.dequantize()[:, CHANNELS], matrix[:, CHANNELS])
    assert not torch.equal(plain.dequantize(), matrix)
    _, divided = weight(divisor=torch.full((5,), 2.0))
    assert torch.equal(divided.dequantize()[:, CHANNELS], matrix[:, CHANNELS])
    _, turned = weight(transposed=True)
    assert torch.equal(turned.dequantize(), plain.dequantize().T)


def test_a_large_channel_costs_the_others_nothing() -> None:
    _, integer = weight()
    x = torch.tensor([[0.1, 1000.0, -0.2, -500.0, 0.3]])
    rounded = input_rounding(integer)(x)
    assert torch.equal(rounded[:, CHANNELS], x[:, CHANNELS])
    rest = torch.tensor([[0.1, 0.0, -0.2, 0.0, 0.3]])
    assert torch.equal(rounded.index_fill(1, CHANNELS, 0), dynamic_uint8(rest))
    assert float((dynamic_uint8(x) - x).abs()[0, 0]) > 0.09  # without them it is lost


def test_fixed_ranges_and_divisors_are_as_they_are_for_the_rest() -> None:
    grid, divisor = InputGrid(0.01, 100), torch.tensor([1.0, 9.0, 2.0, 9.0, 0.5])
    _, integer = weight(inputs=grid, divisor=divisor)
    x = torch.tensor([[0.123, 50.0, -0.987, -70.0, 0.456]])
    expected = static_uint8(x.index_fill(1, CHANNELS, 0), grid, divisor).index_copy(1, CHANNELS, x[:, CHANNELS])
    assert torch.equal(input_rounding(integer)(x), expected)


def test_gradients_pass_through_the_float_channels() -> None:
    outliers = Outliers(CHANNELS, torch.zeros(3, 2))
    x = torch.ones(2, 5, requires_grad=True)
    outliers.around(lambda y: 3 * y)(x).sum().backward()
    assert x.grad is not None
    assert x.grad[0].tolist() == [3, 1, 3, 1, 3]


def test_a_file_holds_channels_and_columns_and_their_bytes_count() -> None:
    _, integer = weight(divisor=torch.rand(5) + 0.5, inputs=InputGrid(0.5, 7))
    tensors, layout = to_tensors({"a.weight": integer}), json.loads(json.dumps(layout_of({"a.weight": integer})))
    back = from_tensors(tensors, layout)["a.weight"]
    assert torch.equal(back.dequantize(), integer.dequantize())
    assert back.outliers is not None
    assert (back.outliers.channels.dtype, back.outliers.columns.dtype) == (torch.int64, torch.float32)
    assert back.outliers.same_channels(integer.outliers)
    small = {"a.weight.input_scale", "a.weight.input_zero_point"}  # 5 bytes that are not counted as weights
    assert back.stored_bytes == sum(t.numel() * t.element_size() for n, t in tensors.items() if n not in small)
