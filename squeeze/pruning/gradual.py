"""Pruning while training: sparsity rises step by step, and what stays learns to do without what went.

Between two shares of the steps masks are chosen anew, each time with more zeros: along the cubic curve of Zhu & Gupta 2017
(arXiv:1710.01878, eq. 1), which takes much while much can be spared and little at the end, or in equal cuts with training after each
(Han et al. 2015, arXiv:1506.02626). What is zero stays zero, as there, so that masks need not be stored: a run that was killed finds them
in the weights of its checkpoint and ends on the same bits.

The training is distillation's: the same engine, losses and held-out examples, the unpruned model for a teacher; with the loss `labels`
alone it is plain fine-tuning. Only weights with all their zeros, those of the last masks, may come out as the best ones.

Rejected: regrowing weights (RigL), whose momentum would be state beside the weights; and masks learned as scores beside them (movement
pruning's threshold), which doubles the parameters: movement here is the sum of −w · gradient over the steps, from the gradients that the
training computes anyway.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from squeeze.distillation.objective import Distillation, LiveTeacher, layers_and_width
from squeeze.distillation.stage import DEFAULTS, events_folder
from squeeze.distillation.taught import Taught
from squeeze.errors import PruneError
from squeeze.masks import Kept, Pruned, kept_zero, masks_of
from squeeze.provenance import Digest
from squeeze.pruning.criteria import CRITERIA, Seen
from squeeze.pruning.matrices import Matrix, matrices, sparsity_of
from squeeze.pruning.patterns import check_fits, keep_mask, lowest
from squeeze.pruning.settings import PruneStage, ScheduleSettings
from squeeze.report.schema import LayerRow
from squeeze.report.text import percent
from squeeze.report.training import TrainingCurve
from squeeze.training import fit, processes
from squeeze.training.examples import Examples, by_length, from_split

if TYPE_CHECKING:
    from squeeze.data import Data
    from squeeze.model import Model

MEASURED_TOKENS, AT_ONCE = 8192, 4096
"""Tokens of the train split on which sizes of inputs are measured each time masks are chosen, and how many in one batch."""
Say = Callable[[int, int, str], None]


def prune_gradually(
    stage: PruneStage, model: "Model", teacher: "Model | Taught | None", data: "Data | None", workspace: Path | None, key: Digest,
    done: Say | None = None, *, sparsities: Mapping[str, float] | None = None,
) -> tuple[tuple[LayerRow, ...], tuple[str, ...], TrainingCurve]:  # fmt: skip
    """Train `model` in place while it is pruned by `stage.schedule`: rows of all matrices, notes, and how the training went.

    `teacher`: the unpruned model; None: `model` as it is now. `workspace` keeps checkpoints for a run that is killed, `key` is the digest
    of all that determines it. `sparsities` gives matrices, by parameter name, another sparsity than the stage's.
    Raises PruneError before anything is changed (but for a global threshold that leaves nothing of a matrix, which shows on the way), and
    TrainError as `fit` does.
    """
    from squeeze.data import check_fits as check_length

    schedule = stage.schedule or ScheduleSettings()
    every = matrices(model.network, stage.keep)
    chosen = [matrix for matrix in every if not matrix.note]
    asked = {matrix.name: (sparsities or {}).get(matrix.name, stage.share) for matrix in chosen}
    _refuse(stage, schedule, model, data, chosen, asked)
    assert data is not None
    torch.manual_seed(stage.training.seed)
    check_length(data, model.config)
    examples = from_split(data.split("train"), model.tokenizer, data.settings.max_length)
    held = stage.training.held_of(len(examples))
    judged, learned = examples.take(np.arange(held)), examples.take(np.arange(held, len(examples)))
    plan = planned(schedule, stage.training.steps_for(len(learned)))
    tutor = _tutor(teacher, model)
    objective = Gradual(stage, model, tutor, chosen, asked, schedule.start, plan, learned)
    with kept_zero(model.network, {}) as objective.kept, following(objective):
        found = fit(
            objective, learned, judged, stage.training, workspace=workspace, key=key, say=done,
            events=None if workspace is None else events_folder(workspace),
        )  # fmt: skip
    model.network, model.artifact = objective.network, None
    zeros = {m.name: m.weight.numel() - int(m.weight.count_nonzero()) for m in chosen}
    model.pruned = model.pruned | {name: Pruned(stage.pattern, asked[name], zeros[name]) for name in asked}
    return (
        tuple(_row(m, asked.get(m.name)) for m in every),
        (*_notes(stage, schedule, plan, asked), *found.notes),
        found.curve,
    )


def planned(schedule: ScheduleSettings, steps: int) -> dict[int, float]:
    """Step after which masks are chosen -> how far sparsity has come by then, from 0 (`start`) to 1 (all that is asked), rising.

    Nothing is chosen before the first step: until then there is no gradient. Where several fall on one step, the last counts.
    """
    begin, length = schedule.begin * steps, (schedule.end - schedule.begin) * steps
    parts = [(k / schedule.times, 1 - (1 - k / schedule.times) ** 3) for k in range(schedule.times + 1)]
    if schedule.kind == "iterative":
        parts = [((k - 1) / schedule.times, k / schedule.times) for k in range(1, schedule.times + 1)]
    elif not schedule.start:
        parts = parts[1:]
    return {min(steps, max(1, round(begin + length * part))): reached for part, reached in parts}


class Gradual(Distillation):
    """Distillation whose network loses weights on the way."""

    def __init__(
        self, stage: PruneStage, model: "Model", teacher: "Model", chosen: Sequence[Matrix], asked: Mapping[str, float], start: float,
        plan: Mapping[int, float], examples: Examples,
    ) -> None:  # fmt: skip
        layers, width = layers_and_width(teacher)
        terms = stage.losses or DEFAULTS[model.task]
        super().__init__(model, LiveTeacher(teacher), terms, teacher_layers=layers, teacher_width=width)
        self.stage, self.criterion = stage, CRITERIA[stage.criterion]
        self.chosen, self.asked, self.start, self.plan = tuple(chosen), asked, start, dict(plan)
        self.at, self.begun = 0, False
        names = {matrix.name for matrix in chosen}
        self.others = {name: keep for name, keep in masks_of(model).items() if name not in names}
        self.batches = _measured(examples) if "norms" in self.criterion.needs else []
        if self.batches:
            self.norms()  # what cannot be measured is said before the first step
        for number, matrix in enumerate(chosen) if "gradient" in self.criterion.needs else ():
            self.register_buffer(
                f"gathered_{number}", torch.zeros_like(matrix.weight)
            )  # checkpoints keep what buffers hold

    def forward(self, batch: "Mapping[str, Tensor]", judge: bool = False) -> "dict[str, Tensor]":
        """See Objective. Where training begins or goes on, masks are what is zero by now."""
        if "step" in batch:
            self.at = int(batch["step"])
            if not self.begun:
                self.begun = True
                self._zeros.replace(self.others | {m.name: m.weight.detach() != 0 for m in self.chosen})
        return super().forward(batch, judge)

    def counts(self, step: int) -> bool:
        """Weights with all their zeros alone may come out."""
        return step >= max(self.plan)

    def gather(self) -> None:
        """Take in the gradients of a step, those of all processes and parts together, before it is taken.

        Movement sums w · g over all steps (eq. 5 of arXiv:2005.07683); other criteria get the mean of g, or of g² where they square it,
        since masks were chosen last.
        """
        with torch.no_grad():
            for number, matrix in enumerate(self.chosen):
                gathered, gradient = getattr(self, f"gathered_{number}", None), matrix.weight.grad
                if gathered is None or gradient is None:
                    continue
                if self.stage.criterion == "movement":
                    gathered.addcmul_(matrix.weight, gradient)
                elif self.criterion.squares:
                    gathered.addcmul_(gradient, gradient)
                else:
                    gathered.add_(gradient)

    def stepped(self) -> None:
        """After a step: choose masks anew where it is time."""
        if (reached := self.plan.get(self.at + 1)) is not None:
            with torch.no_grad():
                self._choose(reached)

    def norms(self) -> dict[str, Tensor]:
        """Root mean square of each input of each matrix [in], over the measured texts, in evaluation mode."""
        sums: dict[str, Tensor] = {}
        tokens: dict[str, int] = {}
        mask: Tensor | None = None

        def read(name: str, x: Tensor) -> None:
            rows = x[mask] if mask is not None and x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1])
            squares = rows.float().square().sum(dim=0)
            sums[name] = sums[name] + squares if name in sums else squares
            tokens[name] = tokens.get(name, 0) + len(rows)

        network, was = self.network, self.network.training
        modules = {matrix.name: network.get_submodule(matrix.name.rpartition(".")[0]) for matrix in self.chosen}
        hooks = [
            module.register_forward_pre_hook(lambda _, inputs, name=name: read(name, inputs[0]))
            for name, module in modules.items()
        ]
        try:
            network.eval()
            with torch.no_grad():
                for batch in self.batches:
                    inputs = {
                        name: batch[name].to(self.chosen[0].weight.device) for name in self.names if name in batch
                    }
                    mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
                    network(**inputs)
        finally:
            network.train(was)
            for hook in hooks:
                hook.remove()
        found = {name: (total / tokens[name]).sqrt() for name, total in sums.items()}
        for matrix in self.chosen:
            if matrix.name not in found or len(found[matrix.name]) != matrix.shape[1]:
                raise PruneError(
                    f"{self.stage.criterion} reads what each matrix multiplies, and {matrix.name} is not reached by the train texts, or is "
                    "no linear layer's. Use criterion magnitude, or keep that matrix dense with keep."
                )
        return found

    @property
    def _zeros(self) -> Kept:
        assert self.kept is not None, "prune_gradually sets it"
        return self.kept

    def _choose(self, reached: float) -> None:
        norms = self.norms() if self.batches else {}
        scores = {m.name: self._scores(number, m, norms.get(m.name)) for number, m in enumerate(self.chosen)}
        scope = self.stage.scope or self.criterion.scope
        lows = {name: each.min() for name, each in scores.items()}
        if scope == "global":
            lows = dict.fromkeys(lows, torch.stack(list(lows.values())).min())
        for matrix in self.chosen:  # what is zero already ranks below all that it is ranked with
            low = lows[matrix.name]
            scores[matrix.name] = scores[matrix.name].masked_fill(
                matrix.rows() == 0, torch.nextafter(low, torch.full_like(low, -torch.inf))
            )
        shares = {
            name: min(self.start, end) + (end - min(self.start, end)) * reached for name, end in self.asked.items()
        }
        if scope == "global":
            gone = lowest(torch.cat([s.flatten() for s in scores.values()]), self._count(shares))
            parts = torch.split(gone, [s.numel() for s in scores.values()])
            keep = {name: ~part.view_as(s) for (name, s), part in zip(scores.items(), parts, strict=True)}
        else:
            keep = {name: keep_mask(s, shares[name], self.stage.pattern, scope) for name, s in scores.items()}
        masks = {}
        for number, matrix in enumerate(self.chosen):
            stays = keep[matrix.name] & (matrix.rows() != 0)
            if not bool(stays.any()):
                raise PruneError(
                    f"{matrix.name}: one threshold over all matrices leaves none of its weights at step {self.at + 1}. Lower sparsity, "
                    "use scope: layer, or keep that matrix dense with keep."
                )
            masks[matrix.name] = stays.T if matrix.transposed else stays
            if self.stage.criterion != "movement" and hasattr(self, f"gathered_{number}"):
                getattr(self, f"gathered_{number}").zero_()
        self._zeros.replace(self.others | masks)

    def _scores(self, number: int, matrix: Matrix, norms: Tensor | None) -> Tensor:
        """What each weight is worth, [out, in]."""
        rows = matrix.rows()
        gradient = None
        if "gradient" in self.criterion.needs:
            gathered: Tensor = getattr(self, f"gathered_{number}")
            gradient = gathered.T if matrix.transposed else gathered
            if self.stage.criterion == "movement":
                gradient = torch.where(rows == 0, 0, gradient / torch.where(rows == 0, 1, rows))
            elif self.criterion.squares:
                gradient = gradient.sqrt()
        seed = torch.Generator().manual_seed((crc32(matrix.name.encode()) ^ self.stage.seed) % 2**63)
        return self.criterion.score(rows, Seen(norms=norms, gradient=gradient, generator=seed)).to(rows.device)

    def _count(self, shares: Mapping[str, float]) -> int:
        return round(sum(shares[matrix.name] * matrix.weight.numel() for matrix in self.chosen))


@contextmanager
def following(objective: Gradual) -> Iterator[None]:
    """While the `with` block lasts, the objective hears of every step: of its gradients before it, and of its end."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    before = register_optimizer_step_pre_hook(lambda *_: objective.gather())
    after = register_optimizer_step_post_hook(lambda *_: objective.stepped())
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _refuse(
    stage: PruneStage, schedule: ScheduleSettings, model: "Model", data: "Data | None", chosen: Sequence[Matrix],
    asked: Mapping[str, float],
) -> None:  # fmt: skip
    if model.integers or model.half is not None:
        raise PruneError(
            f"{model.source} is quantized, and its integers would go while it trains. Prune the float model, then quantize."
        )
    criterion = CRITERIA[stage.criterion]
    if criterion.updates or not criterion.needs <= {"norms", "gradient"}:
        able = [name for name, c in CRITERIA.items() if not c.updates and c.needs <= {"norms", "gradient"}]
        why = "changes the weights that stay" if criterion.updates else f"reads the {min(criterion.needs - {'norms'})}"
        raise PruneError(
            f"criterion {stage.criterion} {why}, which a training does in its own way. With a schedule: {', '.join(able)}."
        )
    if schedule.begin >= schedule.end:
        raise PruneError(
            f"schedule.begin = {schedule.begin:g} does not come before schedule.end = {schedule.end:g}. Lower begin."
        )
    if schedule.start > stage.share:
        raise PruneError(
            f"schedule.start = {schedule.start:g} is above sparsity = {stage.share:g}: sparsity rises. Lower start."
        )
    if stage.training.sharding == "fsdp" or processes.launcher_asks_for_sharding():
        raise PruneError(
            "a schedule ranks whole matrices, and fsdp divides them among processes. Set training.sharding: none."
        )
    if strange := sorted(set(asked) - {matrix.name for matrix in chosen}):
        raise PruneError(f"{strange[0]} is given a sparsity, and is no matrix that is pruned here.")
    for matrix in chosen:
        check_fits(matrix.name, matrix.shape, asked[matrix.name], stage.pattern)
    if data is None or "train" not in data.splits:
        raise PruneError(
            "a schedule prunes while training on the train split. Set data.splits.train, to rest for all that is left over."
        )


def _tutor(teacher: "Model | Taught | None", model: "Model") -> "Model":
    if isinstance(teacher, Taught):
        return teacher.model
    if teacher is not None:
        return teacher
    twin = copy.copy(model)
    twin.network = copy.deepcopy(model.network)
    return twin


def _measured(examples: Examples) -> list[dict[str, Any]]:
    """The first texts, as many as MEASURED_TOKENS are, in batches of like length."""
    count = max(1, int(np.searchsorted(np.cumsum(examples.lengths), MEASURED_TOKENS)))
    few = examples.take(np.arange(min(count, len(examples))))
    return [few.batch(numbers) for numbers in by_length(few.lengths, max(1, AT_ONCE // int(few.lengths.max())))]


def _notes(
    stage: PruneStage, schedule: ScheduleSettings, plan: Mapping[int, float], asked: Mapping[str, float]
) -> tuple[str, ...]:
    first, last = min(plan), max(plan)
    shares = [schedule.start + (stage.share - schedule.start) * reached for reached in plan.values()]
    listed = ", ".join(percent(share, 1) for share in shares)
    return (
        f"masks of {len(asked)} matrices by {stage.criterion}, chosen {len(plan)} times from step {first} to {last} ({schedule.kind}): "
        f"{listed}",
        f"weights of step {last} and later could come out: those before have fewer zeros",
    )  # fmt: skip


def _row(matrix: Matrix, asked: float | None) -> LayerRow:
    reached = sparsity_of(matrix.weight)
    note = matrix.note if asked is None else f"zeros: {percent(asked, 1)} asked, {percent(reached, 1)} reached"
    return LayerRow(
        name=matrix.name, shape=tuple(matrix.weight.shape), bits=8 * matrix.weight.element_size(), sparsity=reached, sqnr_db=None,
        note=note,
    )  # fmt: skip
