"""What happened at every step of a training, kept while it runs and in its checkpoints."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from squeeze.report.training import TrainingCurve, Validation

if TYPE_CHECKING:
    from squeeze.training.objective import Objective

STRETCHES = 200
"""Entries that a curve has at most: more than a chart can show, few enough to read."""


@dataclass
class Trace:
    """One entry for each step so far."""

    tokens: list[int] = field(default_factory=list)
    """Tokens of text up to and with this step."""
    seconds: list[float] = field(default_factory=list)
    """Up to and with this step, interruptions left out."""
    rate: list[float] = field(default_factory=list)
    shares: dict[str, list[float]] = field(default_factory=dict)
    validations: list[Validation] = field(default_factory=list)
    best: int | None = None
    """Step of the best validation."""
    epoch_seconds: list[float] = field(default_factory=list)

    def add(self, tokens: int, seconds: float, rate: float, shares: dict[str, float]) -> None:
        """One more step; a loss that is new (or missing) has 0 where it was not there."""
        for name in shares:
            self.shares.setdefault(name, [0.0] * len(self.tokens))
        self.tokens.append((self.tokens[-1] if self.tokens else 0) + tokens)
        self.seconds.append(seconds)
        self.rate.append(rate)
        for name, values in self.shares.items():
            values.append(shares.get(name, 0.0))

    def curve(
        self, objective: "Objective", kept: int | None, held_out: int, processes: int, device: str, precision: str
    ) -> TrainingCurve:
        """The stretches that reports keep."""
        count = len(self.tokens)
        ends = np.unique(np.linspace(0, count, min(STRETCHES, count) + 1).round().astype(int))
        shares = {
            name: tuple(float(np.mean(values[a:b])) for a, b in pairwise(ends)) for name, values in self.shares.items()
        }
        last = [int(end) - 1 for end in ends[1:]]
        return TrainingCurve(
            steps=tuple(n + 1 for n in last), tokens=tuple(self.tokens[n] for n in last), seconds=tuple(self.seconds[n] for n in last),
            rate=tuple(self.rate[n] for n in last), loss=tuple(float(sum(parts)) for parts in zip(*shares.values(), strict=True)),
            shares=shares, metric=objective.metric, better=objective.better, held_out=held_out, validations=tuple(self.validations),
            kept=kept, processes=processes, device=device, precision=precision, epoch_seconds=tuple(self.epoch_seconds),
        )  # fmt: skip
