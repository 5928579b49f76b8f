"""The stage: a student in place of the model, trained on what the teacher answers."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from squeeze.distillation.settings import CacheSettings, LossTerm, StudentSettings
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

    def apply(
        self, model: "Model", teacher: "Model | Taught", data: "Data | None", workspace: Path | None, key: Digest,
        done: Callable[[int, int, str], None] | None = None,
    ) -> StageRecord:  # fmt: skip
        """Put the trained student in the place of `model`'s network. `workspace` keeps checkpoints for a run that is killed.

        A `teacher` that is a Taught is loaded where it has to answer, and not at all where its answers lie on disk.
        """
        return distill(self, model, teacher, data, workspace, key, done)


def distill(
    stage: DistillStage, model: "Model", teacher: "Model | Taught", data: "Data | None", workspace: Path | None, key: Digest,
    done: Callable[[int, int, str], None] | None,
) -> StageRecord:  # fmt: skip
    """See DistillStage.apply. Raises TrainError for a student, losses or texts that cannot work, naming the setting to change."""
    import numpy as np
    import torch

    from squeeze.distillation import cache
    from squeeze.distillation.objective import Distillation, LiveTeacher, layers_and_width
    from squeeze.distillation.students import make_student
    from squeeze.training import fit
    from squeeze.training.examples import from_split

    started = time.monotonic()
    if data is None or "train" not in data.splits:
        raise TrainError(
            "distillation trains on the train split. Set data.splits.train, to rest for all that is left over."
        )
    torch.manual_seed(stage.training.seed)
    student, notes = make_student(stage.student, model)
    terms = stage.losses or DEFAULTS[model.task]
    split = data.split("train").first(stage.examples)
    examples = from_split(split, student.tokenizer, data.settings.max_length)
    held = min(stage.training.held_out, len(examples) // 5)
    judged, learned = examples.take(np.arange(held)), examples.take(np.arange(held, len(examples)))
    taught = teacher if isinstance(teacher, Taught) else Taught.of(teacher)
    folder = cache.place(stage.cache, workspace)
    known = None if folder is None else cache.recall(folder, taught)
    layers, width = known or layers_and_width(taught.model)
    torch.manual_seed(stage.training.seed)  # again: a teacher that is loaded, or is not, shall not move what is drawn for projections
    objective = Distillation(
        student, None, terms, teacher_layers=layers, teacher_width=width, dropout=stage.dropout, frozen=stage.freeze
    )  # fmt: skip
    kept: cache.CachedTeacher | None = None
    if folder is not None and stage.cache is not None:
        cache.remember(folder, taught, layers, width)
        kept = cache.open_cache(
            folder, stage.cache, taught, lambda: LiveTeacher(taught.model), model.task, cache.device_of(stage.training.device),
            learned=(learned, objective.theirs), held_out=(judged, objective.judged(judged)), temperatures=objective.temperatures,
            say=done,
        )  # fmt: skip
        notes = (*notes, *kept.notes)
    elif stage.cache is not None:
        notes = (*notes, "teacher's answers are not kept: there is no run folder, and cache.folder names none")
    objective.teacher = (kept or LiveTeacher(taught.model),)
    try:
        found = fit(objective, learned, judged, stage.training, workspace=workspace, key=key, say=done)
    finally:
        if kept is not None:
            kept.close()
    model.network, model.config, model.tokenizer = student.network, student.config, student.tokenizer
    model.integers, model.half, model.artifact = {}, None, None
    return StageRecord(
        kind="distill", settings=stage.model_dump(mode="json"), seconds=time.monotonic() - started, layers=(),
        notes=(*notes, *found.notes), training=found.curve,
    )  # fmt: skip
