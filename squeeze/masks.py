"""Zeros that were put into a matrix on purpose, and must survive all that comes after."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pruned:
    """What was done to one matrix."""

    pattern: str
    sparsity: float
    """Share of zeros that was asked, [0, 1)."""
    zeros: int
    """How many there are."""
