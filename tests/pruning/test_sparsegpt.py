"""SparseGPT against what it approximates, computed the slow way."""

import math

import pytest
import torch
from torch import Tensor

from squeeze.errors import PruneError
from squeeze.pruning.patterns import keep_mask
from squeeze.pruning.sparsegpt import sparsegpt
from squeeze.second_order import DAMPING


def gram(columns: int, seed: int = 0, rows: int = 2000) -> Tensor:
    """Of inputs of which each column is much like the one before."""
    steps = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x = steps.cumsum(dim=1) / math.sqrt(columns)
    return x.T @ x / rows


def drawn(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(weight: Tensor, other: Tensor, of: Tensor) -> float:
    difference = (weight - other).double()
    return float(((difference @ of.double()) * difference).sum())


def test_two_columns_by_hand() -> None:
    """The first weight of the upper row costs least; its error goes onto the second by H⁻¹."""
    h = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    weight = torch.tensor([[0.1, 3.0], [2.0, 5.0]])
    inverse = torch.linalg.inv(h + DAMPING * torch.eye(2))
    found, keep = sparsegpt(weight, h, 0.25)
    assert keep.tolist() == [[False, True], [True, True]]
    moved = 3.0 - 0.1 * float(inverse[0, 1] / inverse[0, 0])
    assert torch.allclose(found, torch.tensor([[0.0, moved], [2.0, 5.0]]), atol=1e-6)


def test_with_a_given_mask_it_is_the_exact_update_of_all_later_columns() -> None:
    """Against the plain loop in float64, which inverts H of the columns that are left anew at each column; 300 cross two borders."""
    of, weight, keep = gram(300), drawn(4, 300, 1), torch.rand(4, 300, generator=torch.Generator().manual_seed(2)) > 0.5
    h = of.double() + DAMPING * of.double().diagonal().mean() * torch.eye(300, dtype=torch.float64)
    expected = weight.double().clone()
    for j in range(300):
        inverse = torch.linalg.inv(h[j:, j:])
        amount = expected[:, j].masked_fill(keep[:, j], 0) / inverse[0, 0]
        expected[:, j:] -= amount[:, None] * inverse[0]
    found, kept = sparsegpt(weight, of, 0.5, mask=keep)
    assert torch.equal(kept, keep)
    assert torch.equal(found == 0, ~keep)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_a_row_is_between_the_best_there_is_for_its_mask_and_magnitude(seed: int) -> None:
    """The best by the normal equations: the weights that stay, free, and all columns known at once."""
    of, weight = gram(24, seed), drawn(1, 24, seed + 50)
    found, keep = sparsegpt(weight, of, 0.5)
    stays, goes = keep[0].nonzero().flatten(), (~keep[0]).nonzero().flatten()
    best = torch.zeros(1, 24, dtype=torch.float64)
    right = (weight[0, stays].double() @ of.double()[stays][:, stays]) + weight[0, goes].double() @ of.double()[goes][
        :, stays
    ]
    best[0, stays] = torch.linalg.solve(of.double()[stays][:, stays], right)
    plain = weight * keep_mask(weight.abs(), 0.5, "unstructured", "layer")
    ours, least, theirs = (error(weight, other, of) for other in (found, best, plain))
    assert least <= ours * (1 + 1e-6)
    assert ours < 4 * least
    assert ours < theirs / 2


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8", "block-2x4", "3:6"])
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_sparsity_is_exact_and_outputs_are_nearer_than_by_magnitude(pattern: str, scope: str) -> None:
    of, weight = gram(312, 3), drawn(10, 312, 4)
    found, keep = sparsegpt(weight, of, 0.5, pattern, scope)
    assert torch.equal(found != 0, keep)
    assert int(keep.sum()) == keep.numel() // 2
    if ":" in pattern:
        m = int(pattern.split(":")[1])
        assert bool((keep.reshape(10, -1, m).sum(2) == m // 2).all())
    if pattern.startswith("block"):
        assert set(keep.reshape(5, 2, 78, 4).float().mean(dim=(1, 3)).flatten().tolist()) == {0.0, 1.0}
    plain = weight * keep_mask(weight.abs(), 0.5, pattern, scope)
    assert error(weight, found, of) < 0.7 * error(weight, plain, of)


@pytest.mark.parametrize("sparsity", [0.0, 0.013, 0.3, 0.777, 0.97])
def test_odd_shares_come_out_to_the_weight(sparsity: float) -> None:
    weight = drawn(3, 130, 5)
    found, _ = sparsegpt(weight, gram(130), sparsity)
    assert int((found == 0).sum()) == round(sparsity * 390)
    if not sparsity:
        assert torch.equal(found, weight)


def test_inputs_that_are_always_zero_go_first_and_make_no_nan() -> None:
    of = gram(64)
    of[:, 5:9] = 0
    of[5:9] = 0
    weight = drawn(4, 64, 6)
    found, keep = sparsegpt(weight, of, 0.5)
    assert bool(found.isfinite().all())
    assert not bool(keep[:, 5:9].any())
    assert int((~keep).sum()) == 128
    none, _ = sparsegpt(weight, torch.zeros(64, 64), 0.5)
    assert bool(none.isfinite().all())


def test_a_row_of_zeros_stays_one_and_the_given_matrix_as_it_was() -> None:
    weight = drawn(4, 64, 7)
    weight[2] = 0
    before = weight.clone()
    found, _ = sparsegpt(weight, gram(64), 0.4)
    assert torch.equal(weight, before)
    assert torch.equal(found[2], torch.zeros(64))


def test_a_pattern_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PruneError, match=r"\[2, 6\]: pattern 2:4 takes inputs by 4"):
        sparsegpt(torch.ones(2, 6), torch.eye(6), 0.5, "2:4")
