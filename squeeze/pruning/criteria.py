"""What a weight is worth: one score for each, and the lowest go. Which zeros may stand together is `patterns.py`'s business.

A criterion reads the matrix and what was seen of it (`Seen`), and never builds a mask; its `needs` say what must be measured first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from squeeze.errors import PruneError
from squeeze.second_order import hessian_of, inverse_factor

ALPHA = 100.0
"""Weight of the regional gradient beside the inputs' norms; the paper's default (arXiv:2503.04992)."""


@dataclass(frozen=True)
class Seen:
    """What is known of one matrix W [out, in]."""

    norms: Tensor | None = None
    """Root mean square of each input over tokens, [in]."""
    gram: Tensor | None = None
    """Mean of x xᵀ over tokens, [in, in]."""
    gradient: Tensor | None = None
    """Of a loss by the weights, [out, in]: its mean over texts, or the root of its mean square where the criterion `squares`."""
    generator: torch.Generator | None = None
    """Where what is drawn at random comes from."""


class Criterion(NamedTuple):
    """One way to say what weights are worth."""

    summary: str
    source: str
    needs: frozenset[str]
    """Of norms, gram, gradient (of the task's loss), block gradient (of the norm of what the layer's own block puts out)."""
    score: Callable[[Tensor, Seen], Tensor]
    """[out, in] and what was seen to scores [out, in]; the lowest go."""
    scope: str
    """Weights that it ranks together where nothing else is asked: row or layer."""
    updates: bool = False
    """Whether weights that stay are changed to make up for those that go (`sparsegpt.py`)."""
    squares: bool = False
    """Whether gradients of single texts are squared before their mean is taken, so that those of opposite signs add up."""


def magnitude(weight: Tensor, seen: Seen) -> Tensor:
    """|W|."""
    return weight.abs()


def random(weight: Tensor, seen: Seen) -> Tensor:
    """Uniform in [0, 1), whatever the weights are: what any criterion must beat."""
    return torch.rand(weight.shape, generator=seen.generator)


def movement(weight: Tensor, seen: Seen) -> Tensor:
    """−W · ∂L/∂W: weights that a step of descent would move towards zero go (Sanh et al., at the weights as they are)."""
    return -weight * _given(seen.gradient, "gradient")


def taylor(weight: Tensor, seen: Seen) -> Tensor:
    """|W · ∂L/∂W|: how far the loss moves, to first order, where the weight is removed (Molchanov et al.)."""
    return (weight * _given(seen.gradient, "gradient")).abs()


def wanda(weight: Tensor, seen: Seen) -> Tensor:
    """|W_ij| · ‖X_j‖₂ (eq. 1); a mean over tokens in place of their sum ranks alike."""
    return weight.abs() * _given(seen.norms, "norms")


def wanda_regional(weight: Tensor, seen: Seen) -> Tensor:
    """(α G_ij + ‖X_j‖₂) · |W_ij| (Yang et al.). Both terms are of one text there, both divided by the root of its tokens here."""
    return (ALPHA * _given(seen.gradient, "gradient") + _given(seen.norms, "norms")) * weight.abs()


def saliency(weight: Tensor, seen: Seen) -> Tensor:
    """W_ij² / [H⁻¹]_jj, the error that removing one weight leaves when all others make up for it (Hassibi & Stork 1993).

    For a mask alone. `sparsegpt.sparsegpt` chooses while it updates, and its H⁻¹ then knows of the later columns only.
    """
    hessian, dead = hessian_of(_given(seen.gram, "gram"))
    return (weight.square() / inverse_factor(hessian).square().sum(0)).masked_fill(dead, 0)


def _given(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise PruneError(f"this criterion reads {name}, which was not measured; this is a bug.")
    return tensor


NOTHING: frozenset[str] = frozenset()

CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion("the smallest weights go", "Han et al. 2015, arXiv:1506.02626", NOTHING, magnitude, "layer"),
    "random": Criterion("any weights go: a floor for the others", "", NOTHING, random, "layer"),
    "movement": Criterion(
        "weights that training moves towards zero go: −w · gradient", "Sanh et al. 2020, arXiv:2005.07683",
        frozenset({"gradient"}), movement, "layer",
    ),
    "taylor": Criterion(
        "weights that the loss would miss least go: |w · gradient|", "Molchanov et al. 2019, arXiv:1906.10771",
        frozenset({"gradient"}), taylor, "layer", squares=True,
    ),
    "wanda": Criterion(
        "smallest |w| times the size of its input go, row by row", "Sun et al. 2023, arXiv:2306.11695",
        frozenset({"norms"}), wanda, "row",
    ),
    "wanda-regional": Criterion(
        "wanda plus the gradient of the block's own output", "Yang et al. 2025, arXiv:2503.04992",
        frozenset({"norms", "block gradient"}), wanda_regional, "row", squares=True,
    ),
    "sparsegpt": Criterion(
        "least error goes, column by column, and later columns make up for it", "Frantar & Alistarh 2023, arXiv:2301.00774",
        frozenset({"gram"}), saliency, "layer", updates=True,
    ),
}  # fmt: skip
