"""The losses: what a student is told of its teacher. One function and one line in `LOSSES` each.

Every one is a mean over what the task counts (texts; tokens that are predicted; tokens that are not padding), so that weights mean the
same whatever the batch. Temperatures scale by T², so that gradients keep their size (Hinton et al. 2015, arXiv:1503.02531, section 2).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from squeeze.distillation.answers import Answers, Needs
from squeeze.distillation.settings import LossTerm
from squeeze.errors import TrainError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """What a loss is computed from, beside both answers."""

    task: str
    inputs: "Mapping[str, Tensor]"
    """input_ids, attention_mask [b, n]; labels [b] where there are any."""
    layers: tuple[tuple[int, int], ...]
    """(student's, teacher's) layers that are compared."""
    projections: "nn.ModuleDict"
    """Learned maps from the student's width to the teacher's, by "student layer-teacher layer"; empty where widths agree."""

    @property
    def mask(self) -> "Tensor":
        """Which tokens are text [b, n]."""
        return self.inputs["attention_mask"].bool()

    @property
    def scored(self) -> "Tensor":
        """See `scored`."""
        return scored(self.inputs)


def scored(batch: "Mapping[str, Tensor]") -> "Tensor":
    """Which tokens of a text are predicted and learned [b, n - 1], from the second on: those after its prompt."""
    mask = batch["attention_mask"][:, 1:].bool()
    if "prompt" not in batch:
        return mask
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return mask & (places >= batch["prompt"][:, None])


@dataclass(frozen=True)
class Loss:
    """One entry of the table."""

    summary: str
    equation: str
    source: str
    tasks: frozenset[str]
    needs: Callable[[tuple[tuple[int, int], ...]], tuple[Needs, Needs]]
    """Pairs of layers -> what is asked of the student, and of the teacher."""
    compute: "Callable[[LossTerm, Answers, Answers, Place], Tensor]"
    reads: frozenset[str] = frozenset()
    """Settings of a LossTerm that it reads, beside kind and weight."""
    layers: str = ""
    """What it compares where no layers are given: "spread" (all of the student's), "last", or nothing."""
    projects: bool = False
    """Widths may differ: a learned map is trained beside the student."""
    any_tokenizer: bool = False
    """Compares whole texts, not tokens: student and teacher may cut texts differently."""


ALL = frozenset({"causal-lm", "text-classification", "feature-extraction"})
SCORED = frozenset({"causal-lm", "text-classification"})


def _logits(layers: tuple[tuple[int, int], ...]) -> tuple[Needs, Needs]:
    return Needs(logits=True), Needs(logits=True)


def _hidden(layers: tuple[tuple[int, int], ...]) -> tuple[Needs, Needs]:
    return Needs(hidden=frozenset(s for s, _ in layers)), Needs(hidden=frozenset(t for _, t in layers))


def rows(answers: Answers, place: Place) -> "Tensor":
    """Logits [count, classes]: one row for each text, or for each token whose next one stands in the text."""
    logits = answers.logits
    assert logits is not None
    if place.task != "causal-lm":
        return logits
    return logits[:, :-1][place.scored]


def kl(term: LossTerm, student: Answers, teacher: Answers, place: Place) -> "Tensor":
    """T² KL(p ‖ q), p the teacher's softmax at temperature T."""
    t = term.temperature or TEMPERATURES[place.task]
    q = functional.log_softmax(rows(student, place) / t, dim=-1)
    p = functional.log_softmax(rows(teacher, place) / t, dim=-1)
    return t * t * functional.kl_div(q, p, reduction="batchmean", log_target=True)


def mse(term: LossTerm, student: Answers, teacher: Answers, place: Place) -> "Tensor":
    """Mean over rows of the mean squared difference of logits."""
    return functional.mse_loss(rows(student, place), rows(teacher, place))


def labels(term: LossTerm, student: Answers, teacher: Answers, place: Place) -> "Tensor":
    """Cross entropy with the true classes, or with the next token of the text."""
    if place.task == "causal-lm":
        goal = place.inputs["input_ids"][:, 1:][place.scored]
    elif "labels" in place.inputs:
        goal = place.inputs["labels"]
    else:
        raise TrainError(
            "the loss `labels` needs labels, and these texts have none. Drop it, or name data.label_column."
        )
    return functional.cross_entropy(rows(student, place), goal, label_smoothing=term.smoothing or 0.0)


def hidden(term: LossTerm, student: Answers, teacher: Answers, place: Place) -> "Tensor":
    """Mean squared difference of hidden states, the student's projected where widths differ; mean over the pairs of layers."""
    total = torch.zeros((), device=place.mask.device)
    for ours, theirs in place.layers:
        one, other = student.hidden[ours][place.mask], teacher.hidden[theirs][place.mask]
        if (name := f"{ours}-{theirs}") in place.projections:
            one = place.projections[name](one)
        total = total + functional.mse_loss(one, other)
    return total / len(place.layers)


def embedding(term: LossTerm, student: Answers, teacher: Answers, place: Place) -> "Tensor":
    """1 − cosine of the two embeddings of each text."""
    assert student.embedding is not None
    assert teacher.embedding is not None
    return (1 - functional.cosine_similarity(student.embedding, teacher.embedding, dim=-1)).mean()


def sequence(term: LossTerm, student: Answers, teacher: Answers, place: Place) -> "Tensor":
    """Cross entropy with what the teacher wrote after the prompts; summed over those tokens, over all that are scored divided."""
    assert student.logits is not None
    counted = place.scored
    written = counted & (place.inputs["prompt"][:, None] > 0) if "prompt" in place.inputs else counted & False
    losses = functional.cross_entropy(
        student.logits[:, :-1][written], place.inputs["input_ids"][:, 1:][written], label_smoothing=term.smoothing or 0.0, reduction="sum"
    )  # fmt: skip
    return losses / counted.sum()


TEMPERATURES = {"text-classification": 2.0, "causal-lm": 1.0, "feature-extraction": 1.0}

LOSSES: dict[str, Loss] = {
    "kl": Loss(
        "the teacher's probabilities, softened", "T² Σ p log(p/q)", "Hinton et al. 2015, arXiv:1503.02531", SCORED, _logits, kl,
        frozenset({"temperature"}), any_tokenizer=True,
    ),
    "mse": Loss(
        "the teacher's logits", "mean (z_t − z_s)²", "Ba & Caruana 2013, arXiv:1312.6184", SCORED, _logits, mse, any_tokenizer=True,
    ),
    "labels": Loss(
        "the true classes or next tokens", "−log q(y)", "Szegedy et al. 2015, arXiv:1512.00567 (smoothing)", SCORED,
        lambda layers: (Needs(logits=True), Needs()), labels, frozenset({"smoothing"}), any_tokenizer=True,
    ),
    "hidden": Loss(
        "hidden states, through a learned projection where widths differ", "mean (W h_s − h_t)²", "TinyBERT, arXiv:1909.10351, eq. 8", ALL,
        _hidden, hidden, frozenset({"layers"}), layers="spread", projects=True,
    ),
    "embedding": Loss(
        "the embedding of each text", "1 − cos(e_s, e_t)", "Reimers & Gurevych 2020, arXiv:2004.09813", frozenset({"feature-extraction"}),
        lambda layers: (Needs(embedding=True), Needs(embedding=True)), embedding, any_tokenizer=True,
    ),
    "sequence": Loss(
        "text that the teacher wrote (generate)", "−log q(y), y ~ teacher", "Kim & Rush 2016, arXiv:1606.07947", frozenset({"causal-lm"}),
        lambda layers: (Needs(logits=True), Needs()), sequence, frozenset({"smoothing"}),
    ),
}  # fmt: skip
"""What `losses` in a recipe may name."""
