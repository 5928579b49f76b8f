"""A student, its teacher and their losses as one objective of the training engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn
from torch.nn import functional

from squeeze.distillation.answers import Answers, Needs, ask, embed
from squeeze.distillation.losses import LOSSES, Loss, Place, agreement, scored, softness
from squeeze.distillation.on_policy import DIVERGENCES, OnPolicy
from squeeze.distillation.settings import LossTerm
from squeeze.errors import TrainError
from squeeze.model import answer, save_model
from squeeze.training.examples import NO_LABEL, Examples
from squeeze.training.objective import Objective

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from squeeze.model import Model


class Teacher(Protocol):
    """Where a teacher's answers come from: its network, or a cache."""

    def answers(self, batch: "Mapping[str, Tensor]", needs: Needs) -> Answers:
        """For a batch of the training examples (or, with the key `held_out`, of those that judge), without gradients."""
        ...


class LiveTeacher:
    """The network itself, run for every batch.

    `own` are the training examples and those that judge as the teacher's tokenizer cuts them, where that is another than the student's.
    """

    def __init__(self, model: "Model", own: "tuple[Examples, Examples | None] | None" = None) -> None:
        self.model, self.own = model, own
        self.names = model.text_inputs
        model.network.eval().requires_grad_(False)

    def answers(self, batch: "Mapping[str, Tensor]", needs: Needs) -> Answers:
        """See Teacher."""
        device = batch["input_ids"].device
        if next(self.model.network.parameters()).device != device:
            self.model.network.to(device)
        if self.own is not None:
            examples = self.own["held_out" in batch]
            assert examples is not None
            batch = {name: tensor.to(device) for name, tensor in examples.batch(batch["index"].cpu().numpy()).items()}
        with torch.no_grad():
            return ask(self.model.network, self.model.task, {n: batch[n] for n in self.names if n in batch}, needs)


@dataclass(frozen=True)
class Bound:
    """A loss of the recipe with the layers that it compares."""

    name: str
    term: LossTerm
    loss: Loss
    layers: tuple[tuple[int, int], ...]

    def needs(self, task: str) -> tuple[Needs, Needs]:
        """What it asks of the student, and of the teacher."""
        ours, theirs = self.loss.needs(self.layers)
        if "temperature" in self.loss.reads:
            theirs |= Needs(temperatures=frozenset({softness(self.term, task)}))
        return ours, theirs


class Distillation(Objective):
    """The weighted sum of losses between a student and its teacher.

    The metric that judges: accuracy where the held-out texts have labels, else how far the teacher is; perplexity; cosine.
    """

    def __init__(
        self, student: "Model", teacher: Teacher | None, terms: Sequence[LossTerm], *, teacher_layers: int, teacher_width: int,
        dropout: bool = False, frozen: Sequence[str] = (), on_policy: OnPolicy | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network = student.network
        self.student = (student,)
        self.task, self.names = student.task, student.text_inputs
        self.dropout, self.frozen = dropout, tuple(frozen)
        self.teacher: tuple[Teacher | None] = (teacher,)
        self.on_policy = on_policy
        layers, width = layers_and_width(student)
        self.bound = bind(terms, self.task, layers, teacher_layers, (width, teacher_width))
        self.projections = nn.ModuleDict()
        for each in self.bound:
            if each.loss.projects and width != teacher_width:
                for ours, theirs in each.layers:
                    self.projections[f"{ours}-{theirs}"] = projection(width, teacher_width)
        pairs = [each.needs(self.task) for each in self.bound]
        self.ours, self.theirs = Needs(), Needs()
        for one, other in pairs:
            self.ours, self.theirs = self.ours | one, self.theirs | other
        self.metric = {"text-classification": "accuracy", "causal-lm": "perplexity", "feature-extraction": "cosine"}[
            self.task
        ]
        self.better = "lower" if self.task == "causal-lm" else "higher"

    def train(self, mode: bool = True) -> "Distillation":
        """Without dropout a network in training computes as in evaluation: a teacher's answers need no noise to be learned."""
        return super().train(mode and self.dropout)

    def requires_grad_of_trained(self) -> None:
        """All but what is frozen."""
        self.requires_grad_(True)
        for name, parameter in self.network.named_parameters():
            if any(part in name for part in self.frozen):
                parameter.requires_grad_(False)
        self.changed()

    def units(self, batch: "Mapping[str, Tensor]") -> float:
        """Texts, or tokens that are predicted."""
        return float(scored(batch).sum()) if self.task == "causal-lm" else float(len(batch["input_ids"]))

    def forward(self, batch: "Mapping[str, Tensor]", judge: bool = False) -> "dict[str, Tensor]":
        """See Objective."""
        inputs = {name: batch[name] for name in self.names if name in batch}
        if judge:
            return self._judge(batch, inputs)
        if self.on_policy is not None and self.on_policy.is_due(int(batch["step"])):
            return self._own(batch, self.on_policy)
        ours = ask(self.network, self.task, inputs, self.ours)
        teacher = self.teacher[0]
        theirs = Answers() if teacher is None or self.theirs == Needs() else teacher.answers(batch, self.theirs)
        place = {"inputs": batch, "task": self.task, "projections": self.projections}
        return {
            each.name: each.term.weight * each.loss.compute(each.term, ours, theirs, Place(layers=each.layers, **place))  # type: ignore[arg-type]
            for each in self.bound
        }

    def _own(self, batch: "Mapping[str, Tensor]", on_policy: OnPolicy) -> "dict[str, Tensor]":
        """The divergences over what the student writes itself, 0 for all other losses.

        Means over as many tokens as it could have written: an early end counts less, and the parts of a batch add up to the whole.
        """
        made, written = on_policy.sampled(self.network, batch)
        ours = ask(
            self.network, self.task, {name: made[name] for name in self.names if name in made}, Needs(logits=True)
        )
        theirs = on_policy.teacher.answers(made, Needs(logits=True))
        place = Place(self.task, made, (), self.projections)
        nothing = sum(
            (p.sum() * 0 for p in self.projections.parameters()), torch.zeros((), device=made["index"].device)
        )
        return {
            each.name: nothing + each.term.weight * written * each.loss.compute(each.term, ours, theirs, place)
            if each.term.kind in DIVERGENCES
            else nothing
            for each in self.bound
        }

    def judged(self, held_out: Examples) -> Needs:
        """What the metric asks of the teacher on these examples."""
        if self.task == "feature-extraction":
            return Needs(embedding=True)
        named = held_out.labels is not None and bool((held_out.labels != NO_LABEL).all())
        return Needs(logits=self.task == "text-classification" and not named)

    def _judge(self, batch: "Mapping[str, Tensor]", inputs: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        out = answer(self.network(**inputs), self.task)
        teacher = self.teacher[0]
        if self.task == "causal-lm":
            mask = inputs["attention_mask"][:, 1:].bool()
            scored, goal = out[:, :-1][mask].float(), inputs["input_ids"][:, 1:][mask]
            return {"value": functional.cross_entropy(scored, goal, reduction="sum"), "count": mask.sum()}
        if self.task == "feature-extraction":
            assert teacher is not None
            theirs = teacher.answers(batch, Needs(embedding=True)).embedding
            assert theirs is not None
            value = agreement(embed(out, inputs["attention_mask"]), theirs)
            return {"value": value.sum(), "count": torch.tensor(len(value))}
        if "labels" in batch and bool((batch["labels"] != NO_LABEL).all()):
            right = out.argmax(-1) == batch["labels"]
        else:
            assert teacher is not None
            right = out.argmax(-1) == teacher.answers(batch, Needs(logits=True)).logits.argmax(-1)  # type: ignore[union-attr]
        return {"value": right.sum(), "count": torch.tensor(len(right))}

    def write(self, folder: "Path") -> bool:
        """As an ordinary Transformers folder."""
        save_model(self.student[0], folder)
        return True

    def figure(self, value: float, count: float) -> float:
        """Perplexity of language models, the mean of all else."""
        import math

        mean = value / max(count, 1e-30)
        return math.exp(min(mean, 700.0)) if self.task == "causal-lm" else mean


def layers_and_width(model: "Model") -> tuple[int, int]:
    """How many layers a model has, and how wide its hidden states are."""
    config = getattr(model.network, "config", None)
    if config is None:
        raise TrainError(f"{model.source} has no config that tells its layers and width.")
    return int(config.num_hidden_layers), int(config.hidden_size)


def projection(width: int, goal: int) -> nn.Linear:
    """The learned map between widths as it starts: dimension i to dimension i, so that lengths are kept and no chance is in it."""
    made = nn.Linear(width, goal, bias=False)
    nn.init.eye_(made.weight)
    return made


def bind(
    terms: Sequence[LossTerm], task: str, ours: int, theirs: int, widths: tuple[int, int] | None = None
) -> tuple[Bound, ...]:
    """The losses with their layers, for a student of `ours` and a teacher of `theirs` layers; `widths`: the student's, the teacher's.

    Raises TrainError for a loss that the task does not have, settings that it does not read, layers that are not there, and widths
    that it cannot compare.
    """
    bound: list[Bound] = []
    for term in terms:
        loss = LOSSES[term.kind]
        if task not in loss.tasks:
            able = ", ".join(name for name, other in LOSSES.items() if task in other.tasks)
            raise TrainError(
                f"the loss {term.kind} is for {' and '.join(sorted(loss.tasks))}, not for {task}, which has {able}."
            )
        given = {name for name in term.model_fields_set - {"kind", "weight"} if getattr(term, name) is not None}
        if unread := sorted(given - loss.reads):
            raise TrainError(
                f"the loss {term.kind} does not read {' and '.join(unread)}; it reads {', '.join(['weight', *sorted(loss.reads)])}. "
                f"Drop {'it' if len(unread) == 1 else 'them'}."
            )
        if loss.same_width and widths is not None and widths[0] != widths[1]:
            raise TrainError(
                f"the loss {term.kind} compares {widths[0]} numbers of the student with {widths[1]} of the teacher. "
                "Use similarity, which needs no widths that match, or take a student as wide as the teacher."
            )
        layers = term.layers or ()
        if not layers and loss.layers == "spread":
            layers = tuple((n, max(loss.lowest, round(n * theirs / ours))) for n in range(loss.lowest, ours + 1))
        elif not layers and loss.layers == "last":
            layers = ((ours, theirs),)
        for one, other in layers:
            if not (loss.lowest <= one <= ours and loss.lowest <= other <= theirs):
                raise TrainError(
                    f"the loss {term.kind} cannot compare layer {one} of the student with layer {other} of the teacher: layers of the "
                    f"student are {loss.lowest} to {ours}, of the teacher {loss.lowest} to {theirs}."
                )
        name = term.kind if sum(t.kind == term.kind for t in terms) == 1 else f"{term.kind} {len(bound) + 1}"
        bound.append(Bound(name, term, loss, layers))
    return tuple(bound)
