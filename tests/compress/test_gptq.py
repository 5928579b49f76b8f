"""GPTQ: by hand on two columns, then as claims about real inputs."""

import math

import pytest
import torch

from squeeze.compress.gptq import fit_scales, gptq, output_sqnr_db
from squeeze.integers import Grid, round_to_nearest
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
