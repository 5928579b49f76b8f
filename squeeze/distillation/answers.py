"""What a network computes for a batch: its logits and, where a loss asks, what happens in its layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Needs:
    """What losses ask of one network. Layers count from 1; 0 are the embeddings."""

    logits: bool = False
    embedding: bool = False
    hidden: frozenset[int] = frozenset()
    attentions: frozenset[int] = frozenset()
    relations: frozenset[int] = frozenset()
    temperatures: frozenset[float] = frozenset()
    """What the logits are softened with: a `Top` is of one of them."""

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            self.logits or other.logits, self.embedding or other.embedding, self.hidden | other.hidden,
            self.attentions | other.attentions, self.relations | other.relations,
            self.temperatures | other.temperatures,
        )  # fmt: skip


@dataclass(frozen=True)
class Top:
    """A distribution over the vocabulary by its likeliest tokens, at the temperature that it was asked at."""

    tokens: "Tensor"
    """[..., k], int64."""
    log_probabilities: "Tensor"
    """[..., k]."""
    rest: "Tensor"
    """Logarithm of the mass of all other tokens together [...]."""
    temperature: float | None = None
    """What it was asked at, where that is known."""


@dataclass(frozen=True)
class Answers:
    """One network's answers to a batch; what was not asked for is missing."""

    logits: "Tensor | None" = None
    """[b, classes], or [b, n, vocabulary]."""
    top: "Top | None" = None
    """In place of logits, from a cache."""
    embedding: "Tensor | None" = None
    """Mean over the text of the last states, scaled to length 1: [b, width]."""
    hidden: "Mapping[int, Tensor]" = None  # type: ignore[assignment]
    """Layer -> [b, n, width]."""
    attentions: "Mapping[int, Tensor]" = None  # type: ignore[assignment]
    """Layer -> probabilities [b, heads, n, n]."""
    relations: "Mapping[int, tuple[Tensor, Tensor, Tensor]]" = None  # type: ignore[assignment]
    """Layer -> queries, keys and values before they are split into heads, [b, n, width] each."""


def ask(network: "nn.Module", task: str, inputs: "Mapping[str, Tensor]", needs: Needs) -> Answers:
    """Run `network` once; differentiable where its parameters are."""
    from squeeze.model import answer

    options: dict[str, Any] = {"output_hidden_states": True} if needs.hidden else {}
    out = network(**inputs, **options)
    main = answer(out, task)
    hidden = {layer: out.hidden_states[layer] for layer in needs.hidden}
    if task == "feature-extraction":
        return Answers(embedding=embed(main, inputs["attention_mask"]), hidden=hidden)
    return Answers(logits=main, hidden=hidden)


def embed(states: "Tensor", mask: "Tensor") -> "Tensor":
    """Mean of the states [b, n, width] that are not padding, scaled to length 1, as `evaluate.embed` has it: [b, width]."""
    from torch.nn import functional

    weights = mask[..., None].to(states.dtype)
    return functional.normalize((states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1), dim=-1)
