"""Mixed precision: which layers stay in a better precision, for a stated error of the answers or a stated size.

A layer costs bytes if it is kept and error if it is not, so layers are kept in the order of error for each byte (Dong et al.
2019, arXiv:1911.03852, rank by curvature instead; here the error itself is measured). Choosing needs figures alone, no
network: what a layer costs is measured in `squeeze.compress.sensitivity`.
Rejected: an integer program over all layers. It optimises the sum of the layers' errors to the last byte, and that sum is an
assumption which is off by more than the last byte; what is chosen here is measured as a whole instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from squeeze.errors import QuantizeError

MEGABYTE = 1e6


class MixedSettings(BaseModel):
    """Which layers stay in a better precision. One of budget and size says how many."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget: float | None = Field(
        default=None,
        gt=0,
        description="largest distance of the answers from the float model's on the calibration texts: nats of KL divergence per "
        "token or text, for embeddings 1 − cosine",
    )
    size: float | None = Field(default=None, gt=0, description="largest size of all weights, in MB")
    fallback: Literal["float", "int8"] | None = Field(
        default=None,
        description="what a sensitive layer becomes: float, or int8 blocks in a 4-bit scheme; none: int8 there, else float",
    )
    texts: int | None = Field(
        default=None,
        ge=1,
        description="calibration texts (of decoders: blocks) that each layer is measured on; none: 64 texts or 2 blocks",
    )

    @model_validator(mode="after")
    def _one_goal(self) -> "MixedSettings":
        if (self.budget is None) == (self.size is None):
            raise ValueError("mixed needs a goal: budget (an error) or size (in MB). Give exactly one of them")
        return self


@dataclass(frozen=True)
class Candidate:
    """What becomes integers together or not at all: a layer, or those that one kernel takes."""

    names: tuple[str, ...]
    error: float
    """Distance of the network's answers where this alone is quantized."""
    low_bytes: int
    """What the scheme stores for it."""
    high_bytes: int | None
    """What the better precision does; None where the scheme's is the best there is for it."""

    @property
    def extra_bytes(self) -> int:
        """What keeping it costs."""
        return 0 if self.high_bytes is None else self.high_bytes - self.low_bytes


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that can be kept, most error for each byte first; ties in the order given."""
    able = [one for one in candidates if one.high_bytes is not None]
    return sorted(able, key=lambda one: -one.error / max(one.extra_bytes, 1))


def predicted(candidates: Sequence[Candidate], kept: Sequence[Candidate]) -> float:
    """The error if layers' errors added up and kept layers had none."""
    chosen = {one.names for one in kept}
    return sum(one.error for one in candidates if one.names not in chosen)


def for_size(candidates: Sequence[Candidate], limit: int, fixed: int) -> list[Candidate]:
    """Layers to keep so that all weights take at most `limit` bytes, `fixed` of them not the candidates'.

    Raises QuantizeError where the smallest is too large, and where everything could be kept.
    """
    size = fixed + sum(one.low_bytes for one in candidates)
    if size > limit:
        raise QuantizeError(
            f"size {limit / MEGABYTE:g} MB cannot be: with every layer in the scheme's integers the weights are "
            f"{size / MEGABYTE:.2f} MB. Allow as much, or choose a scheme of fewer bits."
        )
    able = ranked(candidates)
    # By error for each byte, small layers can leave no room for a large one that matters more; the other order then wins.
    fills = [_fill(order, limit - size) for order in (able, sorted(able, key=lambda one: -one.error))]
    kept = min(fills, key=lambda fill: predicted(candidates, fill))
    size += sum(one.extra_bytes for one in kept)
    if len(kept) == len(able):
        raise QuantizeError(
            f"size {limit / MEGABYTE:g} MB leaves nothing to choose: with every layer in the better precision the weights are "
            f"{size / MEGABYTE:.2f} MB. Give less, or drop mixed."
        )
    return kept


def _fill(order: Sequence[Candidate], room: int) -> list[Candidate]:
    kept = []
    for one in order:
        if one.extra_bytes <= room:
            kept.append(one)
            room -= one.extra_bytes
    return kept


def for_budget(
    candidates: Sequence[Candidate], budget: float, measure: Callable[[Sequence[Candidate]], float], unit: str
) -> tuple[list[Candidate], list[tuple[int, float]]]:
    """The fewest layers, in the order of `ranked`, with which the network as a whole is within the budget; and all that was measured
    for it, as (layers kept, error).

    Starts where the sum of errors says and halves the doubt from there: 1 + log₂(layers) measurements of the whole at most. That more
    kept layers never do harm is an assumption; the last measurement of the choice itself is what is reported.
    Raises QuantizeError where the budget does not hold with every layer kept.
    """
    order = ranked(candidates)
    first = next(k for k in range(len(order) + 1) if k == len(order) or predicted(candidates, order[:k]) <= budget)
    tried: list[tuple[int, float]] = []
    below, enough, k = -1, len(order) + 1, first
    while enough - below > 1:
        error = measure(order[:k])
        tried.append((k, error))
        below, enough = (below, k) if error <= budget else (k, enough)
        k = (below + enough) // 2
    if enough > len(order):
        raise QuantizeError(
            f"budget {budget:g} cannot be: with every layer in the better precision the answers still differ by "
            f"{dict(tried)[len(order)]:.2g} {unit}. Allow more, or choose fallback: float."
        )
    return order[:enough], tried
