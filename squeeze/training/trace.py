"""What happened at every step of a training, kept while it runs and in its checkpoints."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from squeeze.report.training import TrainingCurve, Validation

if TYPE_CHECKING:
    from squeeze.training.objective import Objective

RECENT = 50
"""Steps that progress speaks of."""
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
    resumed: list[int] = field(default_factory=list)
    """Steps of the checkpoints that killed runs went on from."""
    changes: list[str] = field(default_factory=list)
    """What was different on the machine when they did."""

    def add(self, tokens: int, seconds: float, rate: float, shares: dict[str, float]) -> None:
        """One more step; a loss that is new (or missing) has 0 where it was not there."""
        for name in shares:
            self.shares.setdefault(name, [0.0] * len(self.tokens))
        self.tokens.append((self.tokens[-1] if self.tokens else 0) + tokens)
        self.seconds.append(seconds)
        self.rate.append(rate)
        for name, values in self.shares.items():
            values.append(shares.get(name, 0.0))

    def interruptions(self, steps: int) -> tuple[str, ...]:
        """Notes for the report."""
        notes = []
        if self.resumed:
            notes.append(
                f"went on from step {', then '.join(map(str, self.resumed))} of {steps} after "
                + ("an interruption" if len(self.resumed) == 1 else f"{len(self.resumed)} interruptions")
            )
        notes += [
            f"an undisturbed run would differ in the last bits, as something changed meanwhile: {c}"
            for c in self.changes
        ]
        return tuple(notes)

    def best_value(self) -> float | None:
        """The metric of the best validation."""
        return None if self.best is None else next(v.value for v in self.validations if v.step == self.best)

    def is_better(self, value: float, better: str) -> bool:
        """Whether a validation is better than all before it that counted."""
        best = self.best_value()
        return best is None or (value > best if better == "higher" else value < best)

    def since_best(self) -> int:
        """Validations after the best one."""
        return 0 if self.best is None else sum(v.step > self.best for v in self.validations)

    def words(self, metric: str, start: int, steps: int) -> str:
        """How it goes, for progress: losses (means of the last steps), the newest validation, tokens a second, time left.

        Speed is that of the last steps since `start`, where this process took over: an earlier one may have had another machine.
        """
        step = len(self.tokens)
        recent = slice(max(0, step - RECENT), step)
        shares = {name: float(np.mean(values[recent])) for name, values in self.shares.items()}
        text = f"loss {sum(shares.values()):.4g}"
        if len(shares) > 1:
            text += f" ({', '.join(f'{name} {value:.3g}' for name, value in shares.items())})"
        if self.validations:
            text += f", {metric} {self.validations[-1].value:.4g}"
        first = max(start, step - RECENT)
        tokens, began = (self.tokens[first - 1], self.seconds[first - 1]) if first else (0, 0.0)
        seconds = max(self.seconds[-1] - began, 1e-9)
        left = seconds / max(1, step - first) * (steps - step)
        return f"{text}, {(self.tokens[-1] - tokens) / seconds:,.0f} tokens/s, {_clock(left)} left"

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


def _clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
