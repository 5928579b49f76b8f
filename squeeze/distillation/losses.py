"""The losses: what a student is told of its teacher. One function and one entry of `LOSSES` each.

Every one is a mean over what the task counts, so that weights mean the same whatever the batch: over the places where a token is
predicted, or over texts (in which each token of the text, and no padding, counts the same). So parts of a batch add up to the whole.
Temperatures scale by T², so that gradients keep their size (Hinton et al. 2015, arXiv:1503.02531, section 2).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from squeeze.distillation.answers import Answers, Needs
from squeeze.distillation.distributions import (
    Divergence,
    divergence_from,
    jensen_shannon,
    kullback_leibler,
    reverse,
    skewed,
    sum_over_rows,
    whole_logits,
)
from squeeze.distillation.settings import LossTerm
from squeeze.errors import TrainError
from squeeze.training.examples import NO_LABEL

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

    @property
    def predicting(self) -> "Tensor":
        """Whose next token stands in the text [b, n]."""
        return functional.pad(self.scored, (0, 1))

    @property
    def rows(self) -> "Tensor":
        """Rows of logits that count, numbered over the whole batch: each text, or each token whose next one stands in the text."""
        if self.task == "causal-lm":
            return self.predicting.flatten().nonzero()[:, 0]
        return torch.arange(len(self.mask), device=self.mask.device)

    @property
    def weights(self) -> "Tensor":
        """What each token counts [b, n]: 1/places where a token is predicted; else 1/(texts · tokens of its text). They sum to 1."""
        if self.task == "causal-lm":
            counts = self.predicting.float()
            return counts / counts.sum().clamp(min=1)
        counts = self.mask.float()
        return counts / counts.sum(dim=1, keepdim=True).clamp(min=1) / len(counts)


def scored(batch: "Mapping[str, Tensor]") -> "Tensor":
    """Which tokens of a text are predicted and learned [b, n - 1], from the second on: those after its prompt."""
    mask = batch["attention_mask"][:, 1:].bool()
    if "prompt" not in batch:
        return mask
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return mask & (places >= batch["prompt"][:, None])


Layers = tuple[tuple[int, int], ...]
Compute = Callable[[LossTerm, Answers, Answers, Place], "Tensor"]


@dataclass(frozen=True)
class Loss:
    """One entry of the table."""

    summary: str
    equation: str
    source: str
    tasks: frozenset[str]
    needs: Callable[[Layers], tuple[Needs, Needs]]
    """Pairs of layers -> what is asked of the student, and of the teacher (temperatures: see objective.Bound)."""
    compute: Compute
    reads: frozenset[str] = frozenset()
    """Settings of a LossTerm that it reads, beside kind and weight."""
    layers: str = ""
    """What it compares where no layers are given: "spread" (all of the student's), "last", or nothing."""
    lowest: int = 0
    """The lowest layer that it can compare: 1 where embeddings have no such thing."""
    projects: bool = False
    """Widths may differ: a learned map is trained beside the student."""
    same_width: bool = False
    """Widths must not differ."""
    any_tokenizer: bool = False
    """Compares whole texts, not tokens: student and teacher may cut texts differently, but for causal-lm, where all is by token."""


def mean_over_rows(place: Place, logits: "Tensor", beside: "tuple[Tensor, ...]", measure: "Callable[..., Tensor]") -> "Tensor":  # fmt: skip
    """distributions.sum_over_rows of those that count, divided by how many they are."""
    rows = place.rows
    return sum_over_rows(logits, rows, beside, measure) / max(1, len(rows))


def softness(term: LossTerm, task: str) -> float:
    """The temperature of a loss that reads one."""
    return term.temperature or TEMPERATURES[task]


def divergence(name: str, measure: Callable[[LossTerm], Divergence]) -> Compute:
    """T² times the mean of a divergence between both softmaxes at temperature T."""

    def compute(term: LossTerm, student: Answers, teacher: Answers, place: Place) -> "Tensor":
        assert student.logits is not None
        rows, t = place.rows, softness(term, place.task)
        return divergence_from(student.logits, teacher, rows, t, measure(term), name) / max(1, len(rows))

    return compute


kl = divergence("kl", lambda term: kullback_leibler)
reverse_kl = divergence("reverse-kl", lambda term: reverse)
skewed_kl = divergence("skewed-kl", lambda term: skewed(term.skew or 0.1))
js = divergence("js", lambda term: jensen_shannon(term.skew or 0.5))


def mse(term: LossTerm, student: Answers, teacher: Answers, place: Place) -> "Tensor":
    """Mean over rows of the mean squared difference of logits."""
    assert student.logits is not None
    theirs = whole_logits(student.logits, teacher, "mse")
    return mean_over_rows(
        place, student.logits, (theirs,), lambda z, other: (z - other.to(z.dtype)).square().mean(dim=-1).sum()
    )


def labels(term: LossTerm, student: Answers, teacher: Answers, place: Place) -> "Tensor":
    """Cross entropy with the true classes, or with the next token of the text.

    A text without a label adds nothing, but counts in the mean: what a labelled text weighs does not hang on those beside it.
    """
    if place.task == "causal-lm":
        goal = functional.pad(place.inputs["input_ids"][:, 1:], (0, 1), value=NO_LABEL)
    elif "labels" in place.inputs:
        goal = place.inputs["labels"]
    else:
        raise TrainError(
            "the loss `labels` needs labels, and these texts have none. Drop it, or name data.label_column."
        )
    assert student.logits is not None
    smoothing = term.smoothing or 0.0
    return mean_over_rows(
        place, student.logits, (goal,), lambda z, y: functional.cross_entropy(
            z, y, label_smoothing=smoothing, ignore_index=NO_LABEL, reduction="sum"
        ),
    )  # fmt: skip


def over_pairs(place: Place, of_pair: "Callable[[int, int], Tensor]") -> "Tensor":
    """Mean over the pairs of layers of the weighted mean over tokens of what `of_pair` gives [b, n]."""
    weights = place.weights
    return torch.stack([(of_pair(*pair) * weights).sum() for pair in place.layers]).mean()


def states(student: Answers, teacher: Answers, place: Place, pair: tuple[int, int]) -> "tuple[Tensor, Tensor]":
    """Hidden states of a pair of layers in the teacher's width, as numbers of full precision [b, n, width] each."""
    ours, theirs = pair
    one, other = student.hidden[ours], teacher.hidden[theirs]
    if (name := f"{ours}-{theirs}") in place.projections:
        one = place.projections[name](one)
    if one.shape[-1] != other.shape[-1]:
        raise TrainError(
            f"the student's layer {ours} is {one.shape[-1]} wide, the teacher's layer {theirs} {other.shape[-1]}: "
            "name other layers, or use relations, which needs no widths that match."
        )
    return one.float(), other.float()


def hidden(term: LossTerm, student: Answers, teacher: Answers, place: Place) -> "Tensor":
    """Mean squared difference of hidden states, the student's projected where widths differ; mean over the pairs of layers."""

    def of_pair(ours: int, theirs: int) -> "Tensor":
        one, other = states(student, teacher, place, (ours, theirs))
        return (one - other).square().mean(dim=-1)

    return over_pairs(place, of_pair)


def cosine(term: LossTerm, student: Answers, teacher: Answers, place: Place) -> "Tensor":
    """1 − cosine of the hidden states of each token, the student's projected where widths differ."""

    def of_pair(ours: int, theirs: int) -> "Tensor":
        return 1 - functional.cosine_similarity(*states(student, teacher, place, (ours, theirs)), dim=-1)

    return over_pairs(place, of_pair)


def attention(term: LossTerm, student: Answers, teacher: Answers, place: Place) -> "Tensor":
    """KL of each token's attention over the keys, mean over heads (MiniLM's; heads are compared one by one).

    Rejected: TinyBERT's mean squared error of the scores before softmax, which maps give as log-probabilities centred over the keys. It
    is led by keys that no head attends to: their scores are large, without effect, and in half precision no number at all.
    """

    def of_pair(ours: int, theirs: int) -> "Tensor":
        q, p = student.attentions[ours].float(), teacher.attentions[theirs].float()
        if p.shape != q.shape:
            raise TrainError(
                f"the loss attention compares head by head: layer {ours} of the student has {q.shape[1]}, layer {theirs} of the teacher "
                f"{p.shape[1]}. Use relations, which splits both anew."
            )
        return (p * (p.clamp(min=TINY).log() - q.clamp(min=TINY).log())).sum(dim=-1).mean(dim=1)

    return over_pairs(place, of_pair)


def relations(term: LossTerm, student: Answers, teacher: Answers, place: Place) -> "Tensor":
    """KL of softmax(AAᵀ/√d) for A the queries, the keys and the values, each split anew into relation heads of d; mean over the three.

    With grouped-query attention, keys and values get as many fewer relation heads as the teacher's are narrower than its queries, so
    that all its relation heads are of one size. Keys after a token are masked for causal-lm.
    """
    mask = place.mask[:, None, None, :]
    if place.task == "causal-lm":
        size = mask.shape[-1]
        mask = mask & torch.ones(size, size, dtype=torch.bool, device=mask.device).tril()

    def of_pair(ours: int, theirs: int) -> "Tensor":
        widths = [[part.shape[-1] for part in side] for side in (student.relations[ours], teacher.relations[theirs])]
        heads = relation_heads(term.heads or teacher.heads, widths)
        total = torch.zeros((), device=mask.device)
        for count, a, b in zip(heads, student.relations[ours], teacher.relations[theirs], strict=True):
            q, p = relation(a, count, mask), relation(b, count, mask)
            total = total + kullback_leibler(p, q).mean(dim=1)
        return total / 3

    return over_pairs(place, of_pair)


def relation_heads(heads: int, widths: list[list[int]]) -> tuple[int, int, int]:
    """Relation heads of queries, keys and values, for `heads` of the queries. `widths`: of the three, the student's and the teacher's."""
    (ours, theirs) = widths

    def split(count: int) -> tuple[int, int, int]:
        return count, max(1, count * theirs[1] // theirs[0]), max(1, count * theirs[2] // theirs[0])

    def fits(count: int) -> bool:
        return all(width % n == 0 for side in widths for width, n in zip(side, split(count), strict=True))

    if heads < 1 or not fits(heads):
        able = [str(count) for count in range(1, math.gcd(ours[0], theirs[0]) + 1) if fits(count)]
        raise TrainError(
            f"the loss relations splits queries, keys and values into {heads} relation heads ({split(heads)[1]} for keys and values): "
            f"the student's are {ours} wide, the teacher's {theirs}. Set heads to one of {', '.join(able)}."
        )
    return split(heads)


def relation(part: "Tensor", heads: int, mask: "Tensor") -> "Tensor":
    """log softmax(AAᵀ/√d) over the keys that are not masked: [b, heads, n, n], from [b, n, heads · d]."""
    a = part.float().reshape(*part.shape[:-1], heads, -1).transpose(1, 2)
    with torch.autocast(a.device.type, enabled=False):
        scores = a @ a.transpose(-1, -2) / math.sqrt(a.shape[-1])
    return functional.log_softmax(scores.masked_fill(~mask, -1e9), dim=-1)


def embedding(term: LossTerm, student: Answers, teacher: Answers, place: Place) -> "Tensor":
    """1 − cosine of the two embeddings of each text."""
    assert student.embedding is not None
    assert teacher.embedding is not None
    return (1 - functional.cosine_similarity(student.embedding.float(), teacher.embedding.float(), dim=-1)).mean()


def similarity(term: LossTerm, student: Answers, teacher: Answers, place: Place) -> "Tensor":
    """Squared difference of the cosines between each text and the others of the batch, mean over both; 0 for a text alone.

    The texts of one part of a batch (accumulation, processes) are compared with each other alone.
    """
    assert student.embedding is not None
    assert teacher.embedding is not None
    return (others(student.embedding) - others(teacher.embedding)).square().sum() / max(
        1, len(student.embedding) * (len(student.embedding) - 1)
    )


def others(embeddings: "Tensor") -> "Tensor":
    """Cosines of each text with the others [b, b], 0 with itself; `embeddings` [b, width] have length 1."""
    each = embeddings.float()
    with torch.autocast(each.device.type, enabled=False):  # cosines differ in the third digit, where bfloat16 ends
        return (each @ each.T).fill_diagonal_(0.0)


def agreement(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """How well embeddings agree, by text [b]: their cosine; where widths differ, that of their cosines with the batch's other texts."""
    if student.shape[-1] == teacher.shape[-1]:
        return functional.cosine_similarity(student.float(), teacher.float(), dim=-1)
    return functional.cosine_similarity(others(student), others(teacher), dim=-1)


def _logits(layers: Layers) -> tuple[Needs, Needs]:
    return Needs(logits=True), Needs(logits=True)


def _student_logits(layers: Layers) -> tuple[Needs, Needs]:
    return Needs(logits=True), Needs()


def _embedding(layers: Layers) -> tuple[Needs, Needs]:
    return Needs(embedding=True), Needs(embedding=True)


def _hidden(layers: Layers) -> tuple[Needs, Needs]:
    return Needs(hidden=frozenset(s for s, _ in layers)), Needs(hidden=frozenset(t for _, t in layers))


def _attentions(layers: Layers) -> tuple[Needs, Needs]:
    return Needs(attentions=frozenset(s for s, _ in layers)), Needs(attentions=frozenset(t for _, t in layers))


def _relations(layers: Layers) -> tuple[Needs, Needs]:
    return Needs(relations=frozenset(s for s, _ in layers)), Needs(relations=frozenset(t for _, t in layers))


def sequence(term: LossTerm, student: Answers, teacher: Answers, place: Place) -> "Tensor":
    """Cross entropy with what the teacher wrote after the prompts; summed over those tokens, over all that are scored divided."""
    assert student.logits is not None
    counted = place.scored
    written = counted & (place.inputs["prompt"][:, None] > 0) if "prompt" in place.inputs else counted & False
    losses = functional.cross_entropy(
        student.logits[:, :-1][written], place.inputs["input_ids"][:, 1:][written], label_smoothing=term.smoothing or 0.0, reduction="sum"
    )  # fmt: skip
    return losses / counted.sum()


TINY = 1e-30
"""Attention below it counts as none."""
TEMPERATURES = {"text-classification": 2.0, "causal-lm": 1.0, "feature-extraction": 1.0}
ALL = frozenset({"causal-lm", "text-classification", "feature-extraction"})
SCORED = frozenset({"causal-lm", "text-classification"})
EMBEDS = frozenset({"feature-extraction"})

LOSSES: dict[str, Loss] = {
    "kl": Loss(
        "the teacher's probabilities, softened", "T² Σ p log(p/q)", "Hinton et al. 2015, arXiv:1503.02531", SCORED, _logits, kl,
        frozenset({"temperature"}), any_tokenizer=True,
    ),
    "reverse-kl": Loss(
        "the student where the teacher finds it unlikely: seeks modes", "T² Σ q log(q/p)", "MiniLLM, arXiv:2306.08543", SCORED, _logits,
        reverse_kl, frozenset({"temperature"}), any_tokenizer=True,
    ),
    "skewed-kl": Loss(
        "kl to a mixture with a share λ (skew, 0.1) of the teacher: bounded gradients", "T² KL(p ‖ λp + (1−λ)q)",
        "DistiLLM, arXiv:2402.03898", SCORED, _logits, skewed_kl, frozenset({"temperature", "skew"}), any_tokenizer=True,
    ),
    "js": Loss(
        "between kl and reverse-kl, both to the mixture with a share β (skew, 0.5) of the teacher",
        "T² [β KL(p ‖ m) + (1−β) KL(q ‖ m)], m = βp + (1−β)q", "GKD, arXiv:2306.13649, eq. 1", SCORED, _logits, js,
        frozenset({"temperature", "skew"}), any_tokenizer=True,
    ),
    "mse": Loss(
        "the teacher's logits", "mean (z_t − z_s)²", "Ba & Caruana 2013, arXiv:1312.6184", SCORED, _logits, mse, any_tokenizer=True,
    ),
    "labels": Loss(
        "the true classes or next tokens", "−log q(y)", "Szegedy et al. 2015, arXiv:1512.00567 (smoothing)", SCORED, _student_logits,
        labels, frozenset({"smoothing"}), any_tokenizer=True,
    ),
    "hidden": Loss(
        "hidden states, through a learned projection where widths differ", "mean (W h_s − h_t)²", "TinyBERT, arXiv:1909.10351, eq. 8", ALL,
        _hidden, hidden, frozenset({"layers"}), layers="spread", projects=True,
    ),
    "cosine": Loss(
        "directions of hidden states, of the last layers where none are given", "1 − cos(W h_s, h_t)", "DistilBERT, arXiv:1910.01108, "
        "section 3", ALL, _hidden, cosine, frozenset({"layers"}), layers="last", projects=True,
    ),
    "attention": Loss(
        "attention maps, head by head", "mean over heads of Σ a_t log(a_t/a_s)", "MiniLM, arXiv:2002.10957", ALL, _attentions,
        attention, frozenset({"layers"}), layers="spread", lowest=1,
    ),
    "relations": Loss(
        "how queries, keys and values relate to each other; widths and heads may differ", "⅓ Σ_{A = Q, K, V} KL(softmax(A_t A_tᵀ/√d_t) ‖ "
        "softmax(A_s A_sᵀ/√d_s))", "MiniLMv2, arXiv:2012.15828", ALL, _relations, relations, frozenset({"layers", "heads"}),
        layers="last", lowest=1,
    ),
    "embedding": Loss(
        "the embedding of each text", "1 − cos(e_s, e_t)", "Reimers & Gurevych 2020, arXiv:2004.09813", EMBEDS, _embedding, embedding,
        same_width=True, any_tokenizer=True,
    ),
    "similarity": Loss(
        "how alike the texts of a batch are; widths may differ", "mean_{i≠j} (e_s,i · e_s,j − e_t,i · e_t,j)²",
        "Tung & Mori 2019, arXiv:1907.09682", EMBEDS, _embedding, similarity, any_tokenizer=True,
    ),
    "sequence": Loss(
        "text that the teacher wrote (generate)", "−log q(y), y ~ teacher", "Kim & Rush 2016, arXiv:1606.07947", frozenset({"causal-lm"}),
        lambda layers: (Needs(logits=True), Needs()), sequence, frozenset({"smoothing"}),
    ),
}  # fmt: skip
"""What `losses` in a recipe may name."""
