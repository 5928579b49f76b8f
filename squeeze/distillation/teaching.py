"""Who answers in a distillation: the teacher's network at every step, or what it answered once and for all."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from squeeze.distillation.cache import CachedTeacher, open_cache, place
from squeeze.distillation.objective import Distillation, LiveTeacher, Teacher
from squeeze.training import processes

if TYPE_CHECKING:
    from squeeze.distillation.stage import DistillStage
    from squeeze.distillation.taught import Taught
    from squeeze.training.examples import Examples

NOWHERE = "teacher's answers are not kept: there is no run folder, and cache.folder names none"


def answering(
    stage: "DistillStage", taught: "Taught", objective: Distillation, examples: "tuple[Examples, Examples]",
    own: "tuple[Examples, Examples | None] | None", workspace: Path | None, say: Callable[[int, int, str], None] | None,
) -> tuple[Teacher, tuple[str, ...]]:  # fmt: skip
    """The teacher of `objective`, and notes. `examples`: those that are learned, those that judge; `own`: the same in its own tokens.

    With `cache` its answers are computed here, by the main process, where they do not lie on disk yet.
    """
    if stage.cache is None:
        return LiveTeacher(taught.model, own), ()
    folder = place(stage.cache, workspace)
    if folder is None:
        return LiveTeacher(taught.model, own), (NOWHERE,)
    learned, judged = examples
    with processes.main_first():
        kept = open_cache(
            folder, stage.cache, taught, lambda: LiveTeacher(taught.model, own), objective.task, processes.device_of(stage.training.device),
            learned=(learned, objective.theirs), held_out=(judged, objective.judged(judged)), say=say,
        )  # fmt: skip
    return kept, kept.notes


def close(teacher: Teacher) -> None:
    """Nothing is asked any more."""
    if isinstance(teacher, CachedTeacher):
        teacher.close()
