"""Integer weights: exact by hand first, then as properties, then as a noise floor."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squeeze.integers import (
    IntegerWeight,
    block_int8,
    dynamic_uint8,
    from_tensors,
    layout_of,
    pack,
    round_to_nearest,
    sqnr_db,
    to_tensors,
    unpack,
)  # fmt: skip


def matrices(rows: int = 4, columns: int = 12) -> st.SearchStrategy[torch.Tensor]:
    numbers = st.floats(-100, 100, width=32, allow_nan=False)
    return st.lists(numbers, min_size=rows * columns, max_size=rows * columns).map(
        lambda values: torch.tensor(values, dtype=torch.float32).view(rows, columns)
    )


def test_one_scale_per_row_by_hand() -> None:
    weight = torch.tensor([[1.27, -0.64, 0.0, 0.01], [-254.0, 100.0, 3.0, 1.0]])
    integer = round_to_nearest(weight, None, unsigned=False)
    assert integer.scale.flatten().tolist() == pytest.approx([0.01, 2.0])
    assert integer.integers.tolist() == [[127, -64, 0, 1], [-127, 50, 2, 0]]
    assert integer.integers.dtype == torch.int8


def test_unsigned_integers_are_the_signed_ones_plus_128() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    signed = round_to_nearest(weight, 16, unsigned=False)
    unsigned = round_to_nearest(weight, 16, unsigned=True)
    assert unsigned.integers.dtype == torch.uint8
    assert torch.equal(unsigned.integers.int() - 128, signed.integers.int())
    assert torch.equal(unsigned.dequantize(), signed.dequantize())


def test_the_last_block_may_be_short() -> None:
    weight = torch.arange(1.0, 11.0).view(1, 10)
    integer = round_to_nearest(weight, 4, unsigned=False)
    assert integer.scale.shape == (1, 3)
    assert integer.integers.shape == (1, 10)
    assert float(integer.scale[0, 2]) == pytest.approx(10 / 127)


def test_zero_rows_stay_zero() -> None:
    integer = round_to_nearest(torch.zeros(2, 32), 16, unsigned=True)
    assert torch.equal(integer.dequantize(), torch.zeros(2, 32))


def test_transposed_matrices_come_back_in_their_own_orientation() -> None:
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    plain = round_to_nearest(weight, None, unsigned=False)
    turned = round_to_nearest(weight.T.contiguous(), None, unsigned=False, transposed=True)
    assert torch.equal(plain.integers, turned.integers)
    assert torch.equal(turned.dequantize(), plain.dequantize().T)


@settings(max_examples=60, deadline=None)
@given(weight=matrices(), block=st.sampled_from([None, 4, 5, 16]), unsigned=st.booleans())
def test_no_weight_moves_further_than_half_a_step(weight: torch.Tensor, block: int | None, unsigned: bool) -> None:
    integer = round_to_nearest(weight, block, unsigned=unsigned)
    steps = integer.scale.repeat_interleave(block or weight.shape[1], dim=1)[:, : weight.shape[1]]
    assert bool(((weight - integer.dequantize()).abs() <= steps / 2 * (1 + 1e-5) + 1e-30).all())


@settings(max_examples=40, deadline=None)
@given(weight=matrices())
def test_quantizing_a_dequantized_weight_again_changes_no_integer(weight: torch.Tensor) -> None:
    once = round_to_nearest(weight, None, unsigned=False)
    again = round_to_nearest(once.dequantize(), None, unsigned=False)
    assert torch.equal(once.integers, again.integers)


def test_four_bits_with_a_zero_point_by_hand() -> None:
    integer = round_to_nearest(
        torch.tensor([[-0.5, 1.0, 0.2, 0.0], [0.0, 0.0, 3.0, 1.4]]), 2, unsigned=True, bits=4, symmetric=False
    )
    assert integer.scale.flatten().tolist() == pytest.approx([0.1, 0.2 / 15, 1.0, 0.2])
    assert integer.zero_point.tolist() == [[5, 0], [0, 0]]
    assert integer.integers.tolist() == [[0, 15, 15, 0], [0, 0, 15, 7]]
    assert torch.allclose(integer.dequantize(), torch.tensor([[-0.5, 1.0, 0.2, 0.0], [0.0, 0.0, 3.0, 1.4]]), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(weight=matrices(), block=st.sampled_from([None, 4, 5, 16]), symmetric=st.booleans())
def test_four_bit_weights_move_no_further_than_a_step_and_zero_stays_zero(
    weight: torch.Tensor, block: int | None, symmetric: bool
) -> None:
    weight[0, 0] = 0
    integer = round_to_nearest(weight, block, unsigned=True, bits=4, symmetric=symmetric)
    steps = integer.scale.repeat_interleave(block or weight.shape[1], dim=1)[:, : weight.shape[1]]
    most = steps * (0.5 if symmetric else 1.0)
    assert bool(((weight - integer.dequantize()).abs() <= most * (1 + 1e-4) + 1e-30).all())
    assert float(integer.dequantize()[0, 0]) == 0
    assert int(integer.integers.max()) <= 15


@settings(max_examples=30, deadline=None)
@given(columns=st.integers(1, 9), bits=st.sampled_from([4, 8]))
def test_packing_loses_nothing(columns: int, bits: int) -> None:
    integers = torch.randint(
        0, 2**bits, (3, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(columns)
    )
    stored = pack(integers, bits)
    assert stored.shape[1] == -(-columns * bits // 8)
    assert torch.equal(unpack(stored, bits, columns), integers)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_come_back_from_their_tensors_and_layout(bits: int, symmetric: bool) -> None:
    weight = torch.randn(6, 45, generator=torch.Generator().manual_seed(3))
    kept = {"a.weight": round_to_nearest(weight, 16, unsigned=True, bits=bits, symmetric=symmetric, transposed=False)}
    tensors, layout = to_tensors(kept), json.loads(json.dumps(layout_of(kept)))
    back = from_tensors(tensors, layout)["a.weight"]
    assert torch.equal(back.integers, kept["a.weight"].integers)
    assert torch.equal(back.dequantize(), kept["a.weight"].dequantize())
    assert back.stored_bytes == sum(t.numel() * t.element_size() for t in tensors.values())


def test_gaussian_weights_keep_40_db() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(2))
    assert (sqnr_db(weight, round_to_nearest(weight, None, unsigned=False).dequantize()) or 0) > 38
    assert (sqnr_db(weight, round_to_nearest(weight, 32, unsigned=False).dequantize()) or 0) > 43


def test_sqnr_of_equal_tensors_is_none_not_infinite() -> None:
    assert sqnr_db(torch.ones(3), torch.ones(3)) is None


def test_stored_bytes_count_integers_and_scales() -> None:
    integer = IntegerWeight(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2), 128, 32)
    assert integer.stored_bytes == 4 * 64 + 4 * 2 * 4


def test_dynamic_uint8_by_hand() -> None:
    x = torch.tensor([-1.0, 0.0, 0.5, 1.55])
    # scale 0.01, zero point 100
    assert torch.allclose(dynamic_uint8(x), x, atol=1e-6)
    assert torch.allclose(dynamic_uint8(torch.tensor([-1.0, 0.004, 1.55])), torch.tensor([-1.0, 0.0, 1.55]), atol=1e-6)


def test_dynamic_uint8_keeps_zero_exact_and_constants_whole() -> None:
    assert torch.equal(dynamic_uint8(torch.zeros(3)), torch.zeros(3))
    rounded = dynamic_uint8(torch.tensor([3.0, 7.0, 0.0]))
    assert float(rounded[2]) == 0.0


def test_activations_are_rounded_row_by_row_and_block_by_block() -> None:
    x = torch.tensor([[127.0, 1.4, 0.0, 0.0, 2.54], [12.7, 0.04, -12.7, 3.0, 5.0]])
    expected = torch.tensor([[127, 1, 0, 0, 2.54], [12.7, 0, -12.7, 3.0, 5.0]])
    assert torch.allclose(block_int8(x, 2), expected, atol=1e-5)
