"""How a training went: each loss's share, the rate and the metric over steps and tokens, as tables and charts read it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat

from squeeze.report.text import MINUS, amount, count, figures, percent

MOMENTS = (("start", 0.0), ("a quarter", 0.25), ("half", 0.5), ("three quarters", 0.75), ("end", 1.0))
"""What of a curve a table shows."""


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
    teacher_seconds: FiniteFloat | None = None
    """Before the first step, to compute or to check the answers that are kept on disk; None where the teacher answers at each step."""

    def rows(self) -> Iterator[tuple[int, int, float, float, dict[str, float]]]:
        """(step, tokens, seconds, loss, shares) of each stretch."""
        for n, step in enumerate(self.steps):
            yield step, self.tokens[n], self.seconds[n], self.loss[n], {name: v[n] for name, v in self.shares.items()}


def training_table(curve: TrainingCurve) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(columns, rows) of a curve at five moments: the loss, each part with its share, and the metric as last validated until then."""
    return training_columns(curve), [_row(curve, name, n) for name, n in _moments(curve).items()]


def training_columns(curve: TrainingCurve) -> tuple[str, ...]:
    """Of the table; a single loss has no column beside the whole."""
    parts = tuple(curve.shares) if len(curve.shares) > 1 else ()
    judged = (f"held-out {curve.metric}",) if curve.validations else ()
    return ("", "step", "tokens", "loss", *parts, "rate", *judged)


def training_rows(curve: TrainingCurve) -> list[tuple[str, ...]]:
    """Every stretch of the curve, as `training_table` shows five of them."""
    return [_row(curve, "", n) for n in range(len(curve.steps))]


def training_words(curve: TrainingCurve) -> str:
    """What came out and how fast it went, in a line."""
    said = []
    kept = next((v for v in curve.validations if v.step == curve.kept), None)
    if kept is not None:
        other = "last" if kept is curve.validations[-1] else "best that counted"
        best = "best" if _is_best(curve, kept) else other
        tests = count(len(curve.validations), "validation")
        said.append(
            f"kept the weights of step {kept.step:,}, {curve.metric} {metric_text(curve, kept.value)} on {curve.held_out:,} "
            f"held-out examples, the {best} of {tests}"
        )
    if curve.steps and curve.seconds[-1] > 0:
        said.append(f"{curve.tokens[-1]:,} tokens in {amount(curve.seconds[-1], 's')}")
        said.append(f"{curve.tokens[-1] / curve.seconds[-1]:,.0f} tokens/s")
    if curve.epoch_seconds:
        said.append(f"an epoch took {amount(sum(curve.epoch_seconds) / len(curve.epoch_seconds), 's')}")
    where = f"{curve.precision} on {curve.device}"
    said.append(where if curve.processes == 1 else f"{where}, {curve.processes} processes")
    return "; ".join(said)


def metric_text(curve: TrainingCurve, value: float) -> str:
    """A value of the held-out metric."""
    if curve.metric == "accuracy":
        return percent(value, 2)
    return f"{value:.4f}".replace("-", MINUS) if curve.metric == "cosine" else figures(value, 4)


def loss_words(terms: Sequence[Mapping[str, Any]]) -> str:
    """Losses as a record or a plan holds them: "kl (T 2) + 0.5 hidden"."""
    return " + ".join(_term(term) for term in terms)


def epochs_words(epochs: float) -> str:
    """1 epoch, 0.5 epochs."""
    return f"{epochs:g} epoch{'' if epochs == 1 else 's'}"


def distill_words(settings: Mapping[str, Any], losses: Sequence[str] = ()) -> str:
    """A distillation's settings, as its record holds them, in a line; `losses` are the task's own, for settings that name none."""
    student, training = settings.get("student") or {}, settings.get("training") or {}
    layers = student.get("layers")
    said = [f"student {student['path']}"] if student.get("path") else []
    if layers is not None:
        said.append(f"layers {', '.join(map(str, layers))}" if isinstance(layers, list) else count(layers, "layer"))
    said += [f"{student[name]} {name}" for name in ("heads", "neurons") if student.get(name)]
    said += ["student from random weights"] if student.get("config") else []
    said += [f"teacher {settings['teacher']}"] if settings.get("teacher") else []
    terms = loss_words(settings.get("losses") or [{"kind": name} for name in losses])
    said += [terms] if terms else []
    if training:
        steps = training.get("steps")
        said.append(epochs_words(training.get("epochs", 1)) if steps is None else count(steps, "step"))
        said.append(f"batches of {training.get('batch')}, rate {training.get('learning_rate'):g}")
    return ", ".join(said)


def _term(term: Mapping[str, Any]) -> str:
    weight, temperature = term.get("weight", 1.0), term.get("temperature")
    heat = "" if temperature is None else f" (T {temperature:g})"
    return f"{'' if weight == 1 else f'{weight:g} '}{term.get('kind')}{heat}"


def _moments(curve: TrainingCurve) -> dict[str, int]:
    """Name -> number of the stretch, each stretch once."""
    last = len(curve.steps) - 1
    found: dict[int, str] = {}
    for name, share in MOMENTS:
        found[round(share * last)] = name
    return {name: n for n, name in found.items() if n >= 0}


def _row(curve: TrainingCurve, name: str, n: int) -> tuple[str, ...]:
    loss = curve.loss[n]
    parts = [
        f"{figures(v[n])} ({percent(v[n] / loss, 0)})" if loss > 0 else figures(v[n]) for v in curve.shares.values()
    ]
    cells = [name, f"{curve.steps[n]:,}", f"{curve.tokens[n]:,}", figures(loss, 4), *(parts if len(parts) > 1 else ())]
    cells.append(f"{curve.rate[n]:.2g}")
    if curve.validations:
        until = [v for v in curve.validations if v.step <= curve.steps[n]]
        cells.append(metric_text(curve, until[-1].value) if until else "")
    return tuple(cells)


def _is_best(curve: TrainingCurve, kept: Validation) -> bool:
    values = [v.value for v in curve.validations]
    return kept.value == (max(values) if curve.better == "higher" else min(values))
