"""GPTQ: by hand on two columns, then as claims about real inputs."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squeeze.compress.gptq import Zeros, fit_scales, gptq, output_sqnr_db
from squeeze.integers import Grid, IntegerWeight, round_to_nearest
from squeeze.second_order import DAMPING

INT4 = Grid(4, symmetric=False)


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs [rows, columns] of which each column is much like the one before."""
    steps = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return steps.cumsum(dim=1) / math.sqrt(columns)


def gram_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def test_the_error_of_a_column_goes_onto_the_next_by_hand() -> None:
    gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    weight = torch.tensor([[0.4, 3.0], [-0.4, -7.0]])
    grid = Grid(4, symmetric=True)  # scales 3/7 and 1
    inverse = torch.linalg.inv(gram + DAMPING * torch.eye(2))
    found = gptq(weight, gram, None, grid, order=False, search=False)
    scale = torch.tensor([3 / 7, 1.0])
    first = torch.round(weight[:, 0] / scale)
    error = weight[:, 0] - first * scale
    moved = weight[:, 1] - error * inverse[0, 1] / inverse[0, 0]
    assert (
        found.integers.int().sub(8).tolist()
        == torch.stack([first, torch.round(moved / scale).clamp(-7, 7)], 1).tolist()
    )


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    found = gptq(weight, torch.eye(64), 32, INT4, order=False, search=False)
    plain = round_to_nearest(weight, 32, unsigned=True, bits=4, symmetric=False)
    assert torch.equal(found.integers, plain.integers)
    assert torch.equal(found.scale, plain.scale)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(("columns", "block"), [(192, 64), (200, 64), (160, 256), (96, None)])
def test_outputs_are_nearer_than_by_rounding_to_nearest(
    order: bool, search: bool, columns: int, block: int | None
) -> None:
    gram = gram_of(correlated(2000, columns))
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(2))
    ours = gptq(weight, gram, block, INT4, order=order, search=search)
    plain = round_to_nearest(weight, block, unsigned=True, bits=4, symmetric=False)
    assert ours.integers.shape == weight.shape
    assert ours.scale.shape == plain.scale.shape
    assert int(ours.integers.max()) <= 15
    assert (output_sqnr_db(weight, ours, gram) or 0) > (output_sqnr_db(weight, plain, gram) or 0) + 3


def test_blocks_wider_than_the_lazy_update_see_all_earlier_errors() -> None:
    """One block of 256 columns, fitted when it is reached, must equal the plain loop that spreads every error at once."""
    gram = gram_of(correlated(1000, 320, seed=3))
    weight = torch.randn(5, 320, generator=torch.Generator().manual_seed(3))
    found = gptq(weight, gram, 64, INT4, order=False, search=False)
    hessian = gram.double()
    upper = torch.linalg.cholesky(
        torch.linalg.inv(hessian + DAMPING * hessian.diagonal().mean() * torch.eye(320, dtype=torch.float64)),
        upper=True,
    ).float()
    work, integers = weight.clone(), torch.empty(5, 320)
    for column in range(320):
        if column % 64 == 0:
            part = work[:, column : column + 64]
            scale, zero = INT4.fit(part.amin(dim=1), part.amax(dim=1))
        integers[:, column] = INT4.round(work[:, column], scale, zero)
        error = (work[:, column] - (integers[:, column] - zero) * scale) / upper[column, column]
        work[:, column:] -= error.unsqueeze(1) * upper[column, column:]
    assert (found.integers.float() != integers).float().mean() < 0.01  # float sums in another order


def test_inputs_that_are_always_zero_cost_nothing_and_make_no_nan() -> None:
    x = correlated(500, 64)
    x[:, 5:9] = 0
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    found = gptq(weight, gram_of(x), 32, INT4)
    assert bool(found.dequantize().isfinite().all())
    assert torch.equal(found.dequantize()[:, 5:9], torch.zeros(4, 4))


def test_fewer_tokens_than_channels_still_give_a_factor() -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(5))
    assert bool(gptq(weight, gram_of(correlated(3, 128)), 64, INT4).dequantize().isfinite().all())


def test_transposed_matrices_get_the_same_integers() -> None:
    gram, weight = gram_of(correlated(500, 64)), torch.randn(8, 64, generator=torch.Generator().manual_seed(6))
    plain, turned = gptq(weight, gram, 32, INT4), gptq(weight.T.contiguous(), gram, 32, INT4, transposed=True)
    assert torch.equal(plain.integers, turned.integers)
    assert torch.equal(plain.dequantize(), turned.dequantize().T)


def test_searched_scales_never_lose_more_than_the_extremes() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(7)) ** 3
    importance = torch.rand(128, generator=torch.Generator().manual_seed(8))

    def loss(search: bool) -> torch.Tensor:
        scale, zero = (t.repeat_interleave(64, dim=1) for t in fit_scales(weight, importance, 64, INT4, search=search))
        return (
            (((INT4.round(weight, scale, zero) - zero) * scale - weight).square() * importance).view(16, 2, 64).sum(2)
        )

    assert bool((loss(True) <= loss(False) * (1 + 1e-5)).all())
    assert float(loss(True).sum()) < 0.97 * float(loss(False).sum())


def halved(weight: torch.Tensor) -> torch.Tensor:
    """True for the larger half of all weights."""
    return weight.abs() > weight.abs().flatten().median()


def at_zero(integer: IntegerWeight) -> torch.Tensor:
    return integer.dequantize() == 0


def test_a_masked_column_gives_all_of_it_to_the_next_by_hand() -> None:
    """The first weight of the first row is pruned: its integer is that of 0, and what is lost goes on like an error of rounding."""
    gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    weight = torch.tensor([[-2.0, 3.0], [-0.4, -7.0]])
    mask = torch.tensor([[False, True], [True, True]])
    inverse = torch.linalg.inv(gram + DAMPING * torch.eye(2))
    found = gptq(weight, gram, None, Grid(4, symmetric=True), order=False, search=False, mask=mask)
    assert float(found.scale[0]) == pytest.approx(3 / 7)  # of what stays
    moved = 3.0 + 2.0 * float(inverse[0, 1] / inverse[0, 0])
    assert round(moved * 7 / 3) == 5
    assert found.integers[0].int().sub(8).tolist() == [0, 5]


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("grid", [INT4, Grid(4), Grid(8, unsigned=False)], ids=["asymmetric", "symmetric", "int8"])
@pytest.mark.parametrize(("columns", "block"), [(192, 64), (200, 64), (96, None)])
def test_zeros_of_a_mask_are_exact_and_beat_zeros_after_rounding(
    order: bool, grid: Grid, columns: int, block: int | None
) -> None:
    gram = gram_of(correlated(2000, columns))
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(9))
    mask = halved(weight)
    ours = gptq(weight, gram, block, grid, order=order, mask=mask)
    assert bool(at_zero(ours)[~mask].all())
    turned = gptq(weight.T.contiguous(), gram, block, grid, order=order, mask=mask.T, transposed=True)
    assert torch.equal(turned.dequantize().T, ours.dequantize())
    plain = round_to_nearest(weight * mask, block, unsigned=grid.unsigned, bits=grid.bits, symmetric=grid.symmetric)
    assert bool(at_zero(plain)[~mask].all())
    assert (output_sqnr_db(weight, ours, gram) or 0) > (output_sqnr_db(weight, plain, gram) or 0) + 3


@given(st.integers(1, 6), st.integers(1, 40), st.floats(-3, 3), st.sampled_from([None, 16, 32]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_zero_is_a_number_of_every_grid(rows: int, columns: int, middle: float, block: int | None, seed: int) -> None:
    """Rows of one sign too: the zero point is an integer within the bounds, so that what is pruned is rounded to exactly 0."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + middle
    weight[weight.abs() < 1] = 0
    for bits, symmetric, unsigned in ((4, False, True), (4, True, True), (8, False, True), (8, True, False)):
        found = round_to_nearest(weight, block, unsigned=unsigned, bits=bits, symmetric=symmetric).dequantize()
        assert bool((found[weight == 0] == 0).all())


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize(("columns", "block"), [(192, 64), (200, 64), (96, None)])
@pytest.mark.parametrize("zeros", [Zeros(0.5), Zeros(0.37), Zeros(0.5, 4), Zeros(0.25, 8)], ids=str)
def test_one_pass_prunes_and_rounds_better_than_two(order: bool, columns: int, block: int | None, zeros: Zeros) -> None:
    gram = gram_of(correlated(2000, columns))
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(10))
    ours = gptq(weight, gram, block, Grid(8), order=order, zeros=zeros)
    gone = at_zero(ours)
    by_rounding = 24 * columns // 50  # of so many weights some that stay are small enough to be rounded to 0
    assert 0 <= int(gone.sum()) - zeros.count(24, columns) < by_rounding
    if zeros.group is not None:
        assert int(gone.view(24, -1, zeros.group).sum(2).min()) >= zeros.sparsity * zeros.group
    rounded = gptq(weight, gram, block, Grid(8), order=order)
    scores = rounded.dequantize().square() * gram.diagonal()  # Wanda's
    after = replace(rounded, integers=torch.where(zeros.chosen(scores, 0), 128, rounded.integers).to(torch.uint8))
    assert (output_sqnr_db(weight, ours, gram) or 0) > (output_sqnr_db(weight, after, gram) or 0) + 3


def test_zeros_are_counted_exactly_whatever_the_stretches() -> None:
    scores = torch.rand(7, 50, generator=torch.Generator().manual_seed(11))
    for sparsity in (0.0, 0.31, 0.5, 0.99):
        zeros = Zeros(sparsity)
        found = [zeros.chosen(scores[:, a:b], a) for a, b in ((0, 13), (13, 26), (26, 50))]
        assert int(torch.cat(found, 1).sum()) == zeros.count(7, 50)
        least = zeros.chosen(scores, 0)
        assert not bool(least.any()) or float(scores[least].max()) <= float(scores[~least].min())
    pairs = Zeros(0.5, 4).chosen(torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.0, 0.0, 9.0, 8.0]]), 0)
    assert pairs.tolist() == [[False, True, False, True, True, True, False, False]]
