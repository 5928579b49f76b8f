"""How a training went: each loss's share, the rate and the metric over steps and tokens, as tables and charts read it."""

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat


class Validation(BaseModel):
    """The metric on examples that were not trained on, after a step."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    step: int
    tokens: int
    """Tokens of text trained on until then, padding not counted."""
    value: FiniteFloat


class TrainingCurve(BaseModel):
    """A training as columns, one entry for each stretch of steps: what happened in it on average, and its last step."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    steps: tuple[int, ...]
    tokens: tuple[int, ...]
    """Tokens of text trained on until then, padding not counted."""
    seconds: tuple[FiniteFloat, ...]
    """Since the start, interruptions left out."""
    rate: tuple[FiniteFloat, ...]
    """Learning rate."""
    loss: tuple[FiniteFloat, ...]
    shares: dict[str, tuple[FiniteFloat, ...]]
    """Loss's name -> its part of the whole, weight included; they add up to `loss`."""
    metric: str = "loss"
    better: Literal["higher", "lower"] = "lower"
    held_out: int = 0
    """Examples that the metric was measured on."""
    validations: tuple[Validation, ...] = ()
    kept: int | None = None
    """Step whose weights came out."""
    processes: int = 1
    device: str = "cpu"
    precision: str = "float32"
    epoch_seconds: tuple[FiniteFloat, ...] = ()
    """Of each whole epoch, the teacher's time in it included, validations and checkpoints left out."""

    def rows(self) -> Iterator[tuple[int, int, float, float, dict[str, float]]]:
        """(step, tokens, seconds, loss, shares) of each stretch."""
        for n, step in enumerate(self.steps):
            yield step, self.tokens[n], self.seconds[n], self.loss[n], {name: v[n] for name, v in self.shares.items()}
