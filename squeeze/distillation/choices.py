"""What `squeeze distill` chooses where nothing is said, and how it says what it chose before it starts."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from squeeze.distillation.settings import LossName, LossTerm
from squeeze.distillation.stage import DEFAULTS
from squeeze.errors import DataError, TrainError, nearest
from squeeze.report.text import percent
from squeeze.report.training import epochs_words, loss_words
from squeeze.rows import Columns, Row, read_rows
from squeeze.tasks import layer_count, positions

if TYPE_CHECKING:
    from squeeze.data import Data, DataSettings
    from squeeze.distillation.stage import DistillStage

EVALUATED = {"causal-lm": 100, "text-classification": 1000, "feature-extraction": 1000}
"""Examples that the comparison at the end scores, a tenth of all at most. A block of 512 tokens costs as much as twenty texts."""
TRAINING: dict[str, dict[str, Any]] = {
    "causal-lm": {"epochs": 1.0, "batch": 8},
    "text-classification": {"epochs": 3.0, "batch": 32, "learning_rate": 2e-4},
    "feature-extraction": {"epochs": 3.0, "batch": 32, "learning_rate": 3e-4},
}
"""What the command trains with, where it is told nothing else; a recipe has the defaults of its schema."""


def loss_term(text: str) -> dict[str, Any]:
    """`hidden` or `hidden=0.5` as settings of one loss. Raises TrainError with the nearest name."""
    name, equals, weight = (part.strip() for part in text.partition("="))
    if name not in get_args(LossName):
        raise TrainError(f"--loss {text}: {name!r} is unknown. {nearest(name, get_args(LossName))}")
    if not equals:
        return {"kind": name}
    if not re.fullmatch(r"\+?[0-9]*\.?[0-9]+(e-?[0-9]+)?", weight) or float(weight) == 0:
        raise TrainError(f"--loss {text}: {weight!r} is no weight above 0. Write it as {name}=0.5.")
    return {"kind": name, "weight": float(weight)}


def softened(losses: Sequence[LossTerm], task: str, temperature: float) -> tuple[LossTerm, ...]:
    """The losses, or the task's own, with that temperature in all that read one and have none. Raises TrainError where none does."""
    from squeeze.distillation.losses import LOSSES

    readers = [name for name, loss in LOSSES.items() if "temperature" in loss.reads and task in loss.tasks]
    named = tuple(losses) or DEFAULTS[task]
    if not any(term.kind in readers for term in named):
        raise TrainError(
            f"temperature = {temperature:g} is read by none of the losses {', '.join(term.kind for term in named)}. "
            f"Add one that reads it ({', '.join(readers) or f'there is none for {task}'}), or drop it."
        )
    return tuple(
        term.model_copy(update={"temperature": temperature})
        if term.kind in readers and term.temperature is None
        else term
        for term in named
    )


def complete(
    settings: "DataSettings", evaluate: int | None, task: str, config: Mapping[str, Any], tokenizer: Any, seed: int
) -> "DataSettings":
    """The settings with what was left open: lengths that the model has positions for, the column `label`, the class of each label
    by its name in the model's config, and how many texts are scored at the end. What was said stays as it is.
    """
    said = settings.model_fields_set
    change: dict[str, Any] = {}
    length = "block_size" if task == "causal-lm" else "max_length"
    if length not in said and (limit := positions(config)) is not None:
        change[length] = min(getattr(settings, length), limit)
    if task == "text-classification" and "label_column" not in said and Path(settings.path).suffix.lower() != ".txt":
        change["label_column"] = "label"
    settings = settings.model_copy(update=change)
    if task == "causal-lm":
        if evaluate is None:
            evaluate = _share(_blocks(settings, tokenizer, seed), task)
    else:
        labels = settings.label_column if task == "text-classification" else None
        rows = list(read_rows(settings.path, Columns(settings.text_column, labels, settings.encoding)))
        if labels is not None and settings.labels is None:
            settings = settings.model_copy(update={"labels": class_numbers(rows, config, settings.path)})
        if evaluate is None:
            evaluate = _share(len({row.text for row in rows if row.text.strip()}), task)
    splits = settings.splits.model_copy(update={"evaluate": evaluate})
    return settings.model_copy(update={"splits": splits})


def class_numbers(rows: Sequence[Row], config: Mapping[str, Any], path: str) -> dict[str, int] | None:
    """Class number of each label text, by the names in the model's config.json, whatever their case; None where all labels are
    numbers already. Raises DataError for labels that the model's head does not know.
    """
    seen = list(dict.fromkeys(str(row.label).strip() for row in rows))
    if all(re.fullmatch(r"[0-9]{1,6}", label) for label in seen):
        return None
    names = {str(name): int(number) for number, name in (config.get("id2label") or {}).items()}
    known = {name.casefold(): number for name, number in names.items()} | {str(n): n for n in names.values()}
    unknown = [label for label in seen if label.casefold() not in known]
    if unknown:
        listed = ", ".join(f"{name} {number}" for name, number in names.items()) or "no names"
        raise DataError(
            f"{path} has the labels {', '.join(map(repr, unknown[:8]))}, but the model's head knows {len(names)} classes: {listed}. "
            "Number the labels with --set 'data.labels={…: 0, …: 1}', name their column with --label-column, or take another model."
        )
    return {label: known[label.casefold()] for label in seen}


def plan(
    stage: "DistillStage", data: "Data", config: Mapping[str, Any], teacher: str, student: str = ""
) -> list[tuple[str, str]]:
    """What is about to be done, as (name, words): everything that was chosen, so that it can be stopped before it costs hours."""
    from squeeze.distillation.losses import LOSSES, TEMPERATURES

    training, task = stage.training, data.task
    count = len(data.split("train").first(stage.examples)) if "train" in data.splits else 0
    held = training.held_of(count)
    terms = [term.model_dump(mode="json") for term in stage.losses or DEFAULTS[task]]
    for term in terms:
        if "temperature" in LOSSES[term["kind"]].reads and term["temperature"] is None:
            term["temperature"] = TEMPERATURES.get(task)
    steps = training.steps_for(count - held)
    unit = f"blocks of {data.settings.block_size} tokens" if task == "causal-lm" else "texts"
    judged = f", and {held:,} more that judge it and choose the weights" if held else ""
    length = epochs_words(training.epochs) if training.steps is None else f"{training.steps:,} steps"
    beside = _beside(stage)
    more = ", and more for the texts beside them" if beside and training.steps is None else ""
    return [
        ("teacher", teacher), ("student", _student_words(stage, config) + (f" of {student}" if student else "")),
        ("losses", loss_words(terms)),
        ("trains on", f"{count - held:,} {unit} of {data.settings.path}{judged}"),
        *([("beside them", beside)] if beside else []),
        ("length", f"{length} of batches of {training.batch}: {steps:,} steps{more}"),
        ("rate", f"{training.learning_rate:g}, {training.schedule} after {percent(training.warm_up, 0)} of warming up"),
        ("compared on", f"{len(data.split('evaluate')):,} {unit}, which are neither trained on nor choose anything"),
        ("device", training.device), ("seed", str(training.seed)),
    ]  # fmt: skip


def _beside(stage: "DistillStage") -> str:
    """The texts that no split holds; how many they are is known once they are read or made."""
    said = [f"unlabelled texts of {stage.unlabelled.path}"] if stage.unlabelled is not None else []
    said += ["copies with words replaced"] if stage.augment is not None else []
    said += ["texts that the teacher writes"] if stage.generate is not None else []
    said += ["texts that the student writes"] if stage.on_policy is not None else []
    return ", ".join(said)


def _student_words(stage: "DistillStage", config: Mapping[str, Any]) -> str:
    student = stage.student
    if student.path is not None:
        return student.path
    if student.config is not None:
        return "a new network with " + ", ".join(f"{name} {value}" for name, value in student.config.items())
    count = layer_count(config)
    said = []
    if isinstance(student.layers, int):
        said.append(f"{student.layers} of {count} layers ({student.choose})" if count else f"{student.layers} layers")
    elif student.layers is not None:
        said.append(f"layers {', '.join(map(str, student.layers))}{f' of {count}' if count else ''}")
    said += [f"{student.heads} heads"] * (student.heads is not None)
    said += [f"{student.neurons} neurons"] * (student.neurons is not None)
    return ", ".join(said) or "the model as it is"


def _share(total: int, task: str) -> int:
    return max(1, min(EVALUATED[task], total // 10))


def _blocks(settings: "DataSettings", tokenizer: Any, seed: int) -> int:
    """How many blocks of tokens the texts make."""
    from squeeze.data import load_data

    splits = settings.splits.model_copy(update={"evaluate": 1, "calibration": 0, "train": "rest"})
    data = load_data(settings.model_copy(update={"splits": splits}), "causal-lm", tokenizer, seed)
    return sum(map(len, data.splits.values()))
