"""Each criterion on a matrix of 2×4, by hand."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from squeeze.errors import PruneError
from squeeze.pruning.criteria import CRITERIA, Seen
from squeeze.pruning.settings import DATA_FREE, UPDATING, WITH_GRADIENTS, CriterionName
from squeeze.second_order import DAMPING

WEIGHT = torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.5, 0.25, -1.0, 2.0]])
NORMS = torch.tensor([4.0, 1.0, 1.0, 0.5])
GRADIENT = torch.tensor([[1.0, 1.0, -1.0, 0.5], [2.0, -4.0, 0.0, 1.0]])


def scores(name: str, **seen: object) -> Tensor:
    return CRITERIA[name].score(WEIGHT, Seen(**seen))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "seen", "expected"),
    [
        ("magnitude", {}, [[1, 2, 3, 4], [0.5, 0.25, 1, 2]]),
        ("movement", {"gradient": GRADIENT}, [[-1, 2, 3, 2], [-1, 1, 0, -2]]),
        ("taylor", {"gradient": GRADIENT}, [[1, 2, 3, 2], [1, 1, 0, 2]]),
        ("wanda", {"norms": NORMS}, [[4, 2, 3, 2], [2, 0.25, 1, 1]]),
        (
            "wanda-regional",
            {"norms": NORMS, "gradient": GRADIENT.abs() / 100},
            [[5, 4, 6, 4], [3, 1.25, 1, 3]],
        ),
    ],
)
def test_scores_by_hand(name: str, seen: dict[str, Tensor], expected: list[list[float]]) -> None:
    assert torch.allclose(scores(name, **seen), torch.tensor(expected, dtype=torch.float32))


def test_without_correlations_saliency_is_the_square_times_the_inputs_energy() -> None:
    """H is diagonal then, and [H⁻¹]_jj = 1 / H_jj; an input that was always zero is worth nothing."""
    energy = torch.tensor([1.0, 4.0, 0.0, 3.0])
    damping = DAMPING * (1 + 4 + 1 + 3) / 4
    expected = WEIGHT.square() * torch.tensor([1 + damping, 4 + damping, 0, 3 + damping])
    assert torch.allclose(scores("sparsegpt", gram=energy.diag()), expected, rtol=1e-5)


def test_random_scores_are_the_seeds() -> None:
    one, same, other = (scores("random", generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_statistic_that_nobody_measured_is_named() -> None:
    for name, missing in (("wanda", "norms"), ("taylor", "gradient"), ("sparsegpt", "gram")):
        with pytest.raises(PruneError, match=f"reads {missing}, which was not measured"):
            scores(name)


def test_settings_know_the_table_without_torch() -> None:
    assert set(get_args(CriterionName)) == set(CRITERIA)
    assert {name for name, c in CRITERIA.items() if not c.needs} == DATA_FREE
    assert {name for name, c in CRITERIA.items() if "gradient" in c.needs} == WITH_GRADIENTS
    assert {name for name, c in CRITERIA.items() if c.updates} == UPDATING
    assert all(c.scope in ("row", "layer") for c in CRITERIA.values())
