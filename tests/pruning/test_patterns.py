"""Masks by hand, then as claims about all shapes, types and shares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squeeze.errors import PruneError
from squeeze.pruning.patterns import keep_mask, lowest

SCORES = torch.tensor([[4.0, 2.0, 3.0, 2.0], [2.0, 0.25, 1.0, 1.0]])


@pytest.mark.parametrize(
    ("sparsity", "pattern", "scope", "expected"),
    [
        (0.5, "unstructured", "row", [[1, 0, 1, 0], [1, 0, 0, 1]]),
        (0.5, "unstructured", "layer", [[1, 0, 1, 1], [1, 0, 0, 0]]),
        (0.25, "unstructured", "row", [[1, 0, 1, 1], [1, 0, 1, 1]]),
        (0.375, "unstructured", "row", [[1, 0, 1, 1], [1, 0, 0, 1]]),  # three of eight: the second row's next is lower
        (0.0, "unstructured", "layer", [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (0.5, "2:4", "row", [[1, 0, 1, 0], [1, 0, 0, 1]]),
        (0.5, "1:2", "layer", [[1, 0, 1, 0], [1, 0, 0, 1]]),
        (0.75, "3:4", "row", [[1, 0, 0, 0], [1, 0, 0, 0]]),
        (0.5, "block-1x2", "layer", [[1, 1, 1, 1], [0, 0, 0, 0]]),
        (0.5, "block-1x2", "row", [[1, 1, 0, 0], [1, 1, 0, 0]]),
        (0.5, "block-2x2", "layer", [[1, 1, 0, 0], [1, 1, 0, 0]]),
        (0.5, "row", "layer", [[1, 1, 1, 1], [0, 0, 0, 0]]),
        (0.9, "row", "layer", [[1, 1, 1, 1], [0, 0, 0, 0]]),  # one row always stays
    ],
)
def test_masks_by_hand(sparsity: float, pattern: str, scope: str, expected: list[list[int]]) -> None:
    assert keep_mask(SCORES, sparsity, pattern, scope).int().tolist() == expected


def test_of_equal_scores_the_first_go() -> None:
    same = torch.ones(2, 4)
    assert keep_mask(same, 0.5, "unstructured", "layer").int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert keep_mask(same, 0.5, "unstructured", "row").int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert keep_mask(same, 0.5, "2:4", "row").int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert lowest(torch.tensor([2.0, 1.0, 1.0, 1.0]), 2).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("shape", "sparsity", "pattern", "message"),
    [
        ((2, 6), 0.5, "2:4", r"a matrix \[2, 6\]: pattern 2:4 takes inputs by 4, and 6 is no multiple"),
        ((2, 8), 0.25, "2:4", r"sparsity 0\.25 is not what pattern 2:4 gives, 0\.5\. Drop sparsity"),
        ((4, 6), 0.5, "block-2x4", r"\[4, 6\]: blocks of 2 outputs and 4 inputs do not fit"),
        ((1, 3), 0.9, "unstructured", r"\[1, 3\]: sparsity 0\.9 leaves none of its 3 weights\. Lower it"),
        ((2, 2), 0.6, "block-2x2", r"sparsity 0\.6 leaves none of its 1 blocks"),
    ],
)
def test_what_a_shape_cannot_carry_is_refused(
    shape: tuple[int, int], sparsity: float, pattern: str, message: str
) -> None:
    with pytest.raises(PruneError, match=message):
        keep_mask(torch.rand(shape), sparsity, pattern, "layer")


def test_scores_that_are_no_numbers_are_counted() -> None:
    bad = SCORES.clone()
    bad[0, 1] = float("nan")
    with pytest.raises(PruneError, match="1 of 8 scores are NaN"):
        keep_mask(bad, 0.5, "unstructured", "row")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12), columns=st.integers(2, 12), sparsity=st.floats(0, 0.85), scope=st.sampled_from(["row", "layer"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]), seed=st.integers(0, 99),
)  # fmt: skip
def test_zeros_are_as_many_as_asked_and_pruning_twice_changes_nothing(
    rows: int, columns: int, sparsity: float, scope: str, dtype: torch.dtype, seed: int
) -> None:
    """Few different values, so that ties are common."""
    weight = torch.randint(1, 5, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)
    count = round(sparsity * rows * columns)
    if count >= rows * columns:
        return
    keep = keep_mask(weight, sparsity, "unstructured", scope)
    assert int((~keep).sum()) == count
    if scope == "row":
        each = (~keep).sum(dim=1)
        assert int(each.max() - each.min()) <= 1
    pruned = weight * keep
    assert torch.equal(keep_mask(pruned, sparsity, "unstructured", scope), keep)
    gone, stays = weight[~keep], weight[keep]
    if scope == "layer" and len(gone):
        assert float(gone.max()) <= float(stays.min())


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(2, 8),
    share=st.integers(1, 7),
    groups=st.integers(1, 4),
    rows=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_every_group_has_its_zeros_and_they_are_the_lowest(
    m: int, share: int, groups: int, rows: int, seed: int
) -> None:
    n = min(share, m - 1)
    scores = torch.rand(rows, m * groups, generator=torch.Generator().manual_seed(seed))
    keep = keep_mask(scores, n / m, f"{n}:{m}", "layer").reshape(rows, groups, m)
    assert bool(((~keep).sum(dim=2) == n).all())
    apart = scores.reshape(rows, groups, m)
    assert bool((apart.masked_fill(keep, -1).amax(2) <= apart.masked_fill(~keep, 2).amin(2)).all())
