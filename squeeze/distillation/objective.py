"""A student, its teacher and their losses as one objective of the training engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn
from torch.nn import functional

from squeeze.distillation.answers import Answers, Needs, ask, embed
from squeeze.distillation.losses import LOSSES, TEMPERATURES, Loss, Place
from squeeze.distillation.settings import LossTerm
from squeeze.errors import TrainError
from squeeze.model import answer
from squeeze.training.examples import NO_LABEL, Examples
from squeeze.training.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from squeeze.model import Model


class Teacher(Protocol):
    """Where a teacher's answers come from: its network, or a cache."""

    def answers(self, batch: "Mapping[str, Tensor]", needs: Needs) -> Answers:
        """For a batch of the training examples (or, with the key `held_out`, of those that judge), without gradients."""
        ...


class LiveTeacher:
    """The network itself, run for every batch."""

    def __init__(self, model: "Model") -> None:
        self.model = model
        self.names = model.text_inputs
        model.network.eval().requires_grad_(False)

    def answers(self, batch: "Mapping[str, Tensor]", needs: Needs) -> Answers:
        """See Teacher."""
        device = batch["input_ids"].device
        if next(self.model.network.parameters()).device != device:
            self.model.network.to(device)
        with torch.no_grad():
            return ask(self.model.network, self.model.task, {n: batch[n] for n in self.names if n in batch}, needs)


@dataclass(frozen=True)
class Bound:
    """A loss of the recipe with the layers that it compares."""

    name: str
    term: LossTerm
    loss: Loss
    layers: tuple[tuple[int, int], ...]


class Distillation(Objective):
    """The weighted sum of losses between a student and its teacher.

    The metric that judges: accuracy where the held-out texts have labels, else how far the teacher is; perplexity; cosine.
    """

    def __init__(
        self, student: "Model", teacher: Teacher | None, terms: Sequence[LossTerm], *, teacher_layers: int, teacher_width: int,
        dropout: bool = False, frozen: Sequence[str] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.network = student.network
        self.task, self.names = student.task, student.text_inputs
        self.dropout, self.frozen = dropout, tuple(frozen)
        self.teacher: tuple[Teacher | None] = (teacher,)
        layers, width = layers_and_width(student)
        self.bound = bind(terms, self.task, layers, teacher_layers)
        self.projections = nn.ModuleDict()
        for each in self.bound:
            if each.loss.projects and width != teacher_width:
                for ours, theirs in each.layers:
                    self.projections[f"{ours}-{theirs}"] = nn.Linear(width, teacher_width, bias=False)
        pairs = [each.loss.needs(each.layers) for each in self.bound]
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

    def units(self, batch: "Mapping[str, Tensor]") -> float:
        """Texts, or tokens that are predicted."""
        return (
            float(batch["attention_mask"][:, 1:].sum()) if self.task == "causal-lm" else float(len(batch["input_ids"]))
        )

    def forward(self, batch: "Mapping[str, Tensor]", judge: bool = False) -> "dict[str, Tensor]":
        """See Objective."""
        inputs = {name: batch[name] for name in self.names if name in batch}
        if judge:
            return self._judge(batch, inputs)
        ours = ask(self.network, self.task, inputs, self.ours)
        teacher = self.teacher[0]
        theirs = Answers() if teacher is None or self.theirs == Needs() else teacher.answers(batch, self.theirs)
        place = {"inputs": batch, "task": self.task, "projections": self.projections}
        return {
            each.name: each.term.weight * each.loss.compute(each.term, ours, theirs, Place(layers=each.layers, **place))  # type: ignore[arg-type]
            for each in self.bound
        }

    @property
    def temperatures(self) -> frozenset[float]:
        """Those at which the losses read probabilities."""
        return frozenset(
            each.term.temperature or TEMPERATURES[self.task] for each in self.bound if "temperature" in each.loss.reads
        )

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
            value = functional.cosine_similarity(embed(out, inputs["attention_mask"]), theirs, dim=-1)
            return {"value": value.sum(), "count": torch.tensor(len(value))}
        if "labels" in batch and bool((batch["labels"] != NO_LABEL).all()):
            right = out.argmax(-1) == batch["labels"]
        else:
            assert teacher is not None
            right = out.argmax(-1) == teacher.answers(batch, Needs(logits=True)).logits.argmax(-1)  # type: ignore[union-attr]
        return {"value": right.sum(), "count": torch.tensor(len(right))}

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


def bind(terms: Sequence[LossTerm], task: str, ours: int, theirs: int) -> tuple[Bound, ...]:
    """The losses with their layers. Raises TrainError for a loss that the task does not have and for layers that are not there."""
    bound: list[Bound] = []
    for term in terms:
        loss = LOSSES[term.kind]
        if task not in loss.tasks:
            raise TrainError(f"the loss {term.kind} is for {' and '.join(sorted(loss.tasks))}, not for {task}.")
        layers = term.layers or ()
        if not layers and loss.layers == "spread":
            layers = tuple((n, round(n * theirs / ours)) for n in range(ours + 1))
        elif not layers and loss.layers == "last":
            layers = ((ours, theirs),)
        for one, other in layers:
            if one > ours or other > theirs:
                raise TrainError(
                    f"the loss {term.kind} compares layers {one} and {other}; the student has {ours}, the teacher {theirs}."
                )
        name = term.kind if sum(t.kind == term.kind for t in terms) == 1 else f"{term.kind} {len(bound) + 1}"
        bound.append(Bound(name, term, loss, layers))
    return tuple(bound)
