"""The stage: a student in place of the model, trained on what the teacher answers."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from squeeze.distillation.settings import (
    AugmentSettings,
    CacheSettings,
    GenerateSettings,
    LossTerm,
    OnPolicySettings,
    StudentSettings,
    UnlabelledSettings,
)
from squeeze.distillation.taught import Taught
from squeeze.errors import TrainError
from squeeze.provenance import Digest
from squeeze.report.schema import StageRecord
from squeeze.training.settings import Training

if TYPE_CHECKING:
    from squeeze.data import Data
    from squeeze.model import Model

DEFAULTS: dict[str, tuple[LossTerm, ...]] = {
    "text-classification": (LossTerm(kind="kl"), LossTerm(kind="hidden")),
    "causal-lm": (LossTerm(kind="kl"),),
    "feature-extraction": (LossTerm(kind="embedding"), LossTerm(kind="hidden")),
}
"""The losses where a recipe names none."""
MEASURED_TOKENS, AT_ONCE = 8192, 4096
"""Tokens of the train split on which importance is measured, and how many of them in one batch."""


class DistillStage(BaseModel):
    """Train a student on the answers of a teacher: the run's source model, or another one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["distill"] = "distill"
    teacher: str | None = Field(default=None, description="a trained model; none: the run's source model")
    student: StudentSettings = Field(
        default=StudentSettings(), description="the network that learns; {}: the model as the stage gets it"
    )
    losses: tuple[LossTerm, ...] = Field(
        default=(), description="what is minimised: their weighted sum; []: the task's defaults"
    )
    training: Training = Field(default=Training(), description="how long, how fast, in what order")
    examples: int | None = Field(default=None, ge=1, description="examples of the train split that are used; none: all")
    unlabelled: UnlabelledSettings | None = Field(
        default=None, description="texts without labels that are trained on beside the train split"
    )
    augment: AugmentSettings | None = Field(
        default=None, description="copies of the train texts with words replaced; {} for the defaults"
    )
    generate: GenerateSettings | None = Field(
        default=None, description="text that the teacher writes (causal-lm); {} for the defaults"
    )
    on_policy: OnPolicySettings | None = Field(
        default=None, description="text that the student writes while it trains (causal-lm); {} for the defaults"
    )
    cache: CacheSettings | None = Field(
        default=None, description="keep the teacher's answers on disk; {} for the defaults"
    )
    dropout: bool = Field(default=False, description="train with the dropout of the student's config")
    freeze: tuple[str, ...] = Field(
        default=(), description="parts of the names of parameters that stay as they are, such as embeddings"
    )

    @property
    def scheme(self) -> str:
        """For progress: what the stage is about."""
        layers = self.student.layers
        return "" if layers is None else f"{layers if isinstance(layers, int) else len(layers)} layers"

    @property
    def progress_noun(self) -> str:
        """For progress: what is counted."""
        return "step"

    @property
    def needs_data(self) -> bool:
        """Always: it trains."""
        return True

    @property
    def learns_from_itself(self) -> bool:
        """Whether, first in a chain, student and teacher would be one model, and no label says more than it knows."""
        return (
            self.teacher is None
            and self.student == StudentSettings()
            and all(term.kind != "labels" for term in self.losses)
        )

    def apply(
        self, model: "Model", teacher: "Model | Taught", data: "Data | None", workspace: Path | None, key: Digest,
        done: Callable[[int, int, str], None] | None = None,
    ) -> StageRecord:  # fmt: skip
        """Put the trained student in the place of `model`'s network. `workspace` keeps checkpoints for a run that is killed.

        A `teacher` that is a Taught is loaded to be checked against the student, and let go of where its answers lie on disk.
        """
        return distill(self, model, teacher, data, workspace, key, done)


def distill(
    stage: DistillStage, model: "Model", teacher: "Model | Taught", data: "Data | None", workspace: Path | None, key: Digest,
    done: Callable[[int, int, str], None] | None,
) -> StageRecord:  # fmt: skip
    """See DistillStage.apply. Raises TrainError for a student, losses or texts that cannot work, naming the setting to change."""
    import numpy as np
    import torch

    from squeeze.data import check_fits
    from squeeze.distillation.losses import LOSSES
    from squeeze.distillation.objective import Distillation, layers_and_width
    from squeeze.distillation.students import (
        check_pair,
        make_student,
        needs_texts,
        same_tokenizer,
        shrink_notes,
        zeros_notes,
    )
    from squeeze.distillation.teaching import answering, close
    from squeeze.distillation.texts import check_texts, further, sampler
    from squeeze.masks import kept_zero, masks_of
    from squeeze.training import fit, processes
    from squeeze.training.examples import by_length, from_split, from_texts

    started = time.monotonic()
    if data is None or "train" not in data.splits:
        raise TrainError(
            "distillation trains on the train split. Set data.splits.train, to rest for all that is left over."
        )
    torch.manual_seed(stage.training.seed)
    taught = teacher if isinstance(teacher, Taught) else Taught.of(teacher)
    tutor = taught.model
    split = data.split("train").first(stage.examples)
    length = data.settings.block_size if model.task == "causal-lm" else data.settings.max_length
    batches = []
    if needs_texts(stage.student):
        measured = from_split(split.first(max(8, MEASURED_TOKENS // length)), model.tokenizer, length)
        batches = [measured.batch(numbers) for numbers in by_length(measured.lengths, max(1, AT_ONCE // length))]
    student, notes = make_student(stage.student, model, batches)
    terms = stage.losses or DEFAULTS[model.task]
    check_texts(stage, terms, model.task, data.settings, student, tutor)
    check_pair(student, tutor, [LOSSES[term.kind] for term in terms])
    if model.task == "causal-lm" and not same_tokenizer(student.tokenizer, model.tokenizer):
        raise TrainError(
            f"{student.source} cuts texts into other tokens than the model that the data was cut for ({model.source}). Name a student "
            "with that model's tokenizer."
        )
    check_fits(data, student.config)
    check_fits(data, tutor.config)
    sizes, warnings = shrink_notes(student, tutor)
    notes += zeros_notes(model, student)
    examples = from_split(split, student.tokenizer, data.settings.max_length)
    held = stage.training.held_of(len(examples))
    if stage.training.patience is not None and not held:
        raise TrainError(
            f"patience waits for a better validation, and {len(examples)} examples are too few to hold any out: a fifth is the "
            "most. Drop patience, or take more texts."
        )
    if held < stage.training.held_out and "held_out" in stage.training.model_fields_set:
        notes = (*notes, f"{held} of {len(examples)} examples are held out, a fifth, not {stage.training.held_out}")
    judged, learned = examples.take(np.arange(held)), examples.take(np.arange(held, len(examples)))
    with processes.main_first():  # what is written or generated by the main process lies there for the others
        learned, added = further(stage, data, learned, judged, student, tutor, workspace, done)
    own = None
    if not same_tokenizer(student.tokenizer, tutor.tokenizer):
        lists = [
            from_texts(e.texts or (), None, tutor.tokenizer, length) if len(e) else None for e in (learned, judged)
        ]
        assert lists[0] is not None
        own = (lists[0], lists[1])
    layers, width = layers_and_width(tutor)
    objective = Distillation(
        student, None, terms, teacher_layers=layers, teacher_width=width, dropout=stage.dropout, frozen=stage.freeze,
        on_policy=sampler(stage, student, tutor),
    )  # fmt: skip
    del tutor  # where its answers lie on disk it is let go of
    begun = time.monotonic()
    answers, kept = answering(stage, taught, objective, (learned, judged), own, workspace, done)
    seconds = time.monotonic() - begun
    objective.teacher = (answers,)
    try:
        with kept_zero(student.network, masks_of(student)) as objective.kept:
            found = fit(
                objective, learned, judged, stage.training, workspace=workspace, key=key, say=done,
                events=None if workspace is None else events_folder(workspace),
            )  # fmt: skip
    finally:
        close(answers)
    curve = found.curve if stage.cache is None else found.curve.model_copy(update={"teacher_seconds": seconds})
    network = objective.network  # another object than the student's where weights were divided among processes
    model.network, model.config, model.tokenizer = network, student.config, student.tokenizer
    model.factory, model.activations = student.factory, "float"
    model.integers, model.half, model.artifact, model.pruned = {}, None, None, student.pruned
    return StageRecord(
        kind="distill", settings=stage.model_dump(mode="json"), seconds=time.monotonic() - started, layers=(),
        notes=(*notes, *sizes, *added, *kept, *found.notes), warnings=warnings, training=curve,
    )  # fmt: skip


def events_folder(workspace: Path) -> Path:
    """`<run folder>/tensorboard/<stage>` for the workspace `<run folder>/.<stage>.training`."""
    return workspace.parent / "tensorboard" / workspace.name.removeprefix(".").removesuffix(".training")
