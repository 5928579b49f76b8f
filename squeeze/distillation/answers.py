"""What a network computes for a batch: its logits and, where a loss asks, what happens in its layers.

Layers mean the same in every family: 0 is what the first layer is given (embeddings with positions, normalised and projected where the
family does so), n what layer n gives, and the last is what the head is given: after the final norm where there is one (GPT-2, OPT, Llama
and those like it, T5), as transformers has it. A layer that is shared (ALBERT) counts each time that it is called.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from squeeze.distillation import attention
from squeeze.errors import TrainError

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
            self.attentions | other.attentions, self.relations | other.relations, self.temperatures | other.temperatures,
        )  # fmt: skip

    @property
    def temperature(self) -> float:
        """The one that a cache keeps a `Top` at, 1 where no loss asks. Raises TrainError where losses ask several."""
        if len(self.temperatures) > 1:
            raise TrainError(
                f"a cache keeps the likeliest tokens at one temperature, and the losses ask {sorted(self.temperatures)}. "
                "Give them the same, or drop cache."
            )
        return next(iter(self.temperatures), 1.0)


@dataclass(frozen=True)
class Top:
    """A distribution over the vocabulary by its likeliest tokens, at the temperature that it was asked at."""

    tokens: "Tensor"
    """[..., k], integers; each once in its row."""
    log_probabilities: "Tensor"
    """[..., k]."""
    rest: "Tensor"
    """Logarithm of the mass of all other tokens together [...]; −inf where there is none."""
    temperature: float | None = None
    """What it was asked at, where that is known: losses of another one refuse it."""


@dataclass(frozen=True)
class Answers:
    """One network's answers to a batch; what was not asked for is missing."""

    logits: "Tensor | None" = None
    """[b, classes], or [b, n, vocabulary]."""
    top: "Top | None" = None
    """In place of logits, from a cache: leading dimensions as logits would have them, [b, n, k]."""
    embedding: "Tensor | None" = None
    """Mean over the text of the last states, scaled to length 1: [b, width]."""
    hidden: "Mapping[int, Tensor]" = None  # type: ignore[assignment]
    """Layer -> [b, n, width]."""
    attentions: "Mapping[int, Tensor]" = None  # type: ignore[assignment]
    """Layer -> probabilities [b, heads, n, n]."""
    relations: "Mapping[int, tuple[Tensor, Tensor, Tensor]]" = None  # type: ignore[assignment]
    """Layer -> queries, keys and values before they are split into heads, [b, n, width] each; see attention.relations."""
    heads: int = 0
    """Attention heads of the network, beside relations."""


def ask(network: "nn.Module", task: str, inputs: "Mapping[str, Tensor]", needs: Needs) -> Answers:
    """Run `network` once; differentiable where its parameters are.

    Raises TrainError for layers that are not there and for a network that does not show what is asked for.
    """
    from squeeze.model import answer

    options: dict[str, Any] = {}
    with ExitStack() as stack:
        if needs.hidden:
            options["output_hidden_states"] = sorted(needs.hidden)  # the others are not kept
        if needs.attentions:
            options["output_attentions"] = True
            stack.enter_context(attention.eager(network))
        take = stack.enter_context(attention.relations(network, needs.relations)) if needs.relations else dict
        out = network(**inputs, **options)
        relations = take()
    main = answer(out, task)
    parts: dict[str, Any] = {
        "hidden": _layers(network, out, "hidden_states", needs.hidden, 0),
        "attentions": _layers(network, out, "attentions", needs.attentions, 1),
        "relations": relations,
        "heads": int(getattr(getattr(network, "config", None), "num_attention_heads", 0)) if relations else 0,
    }
    if task == "feature-extraction":
        return Answers(embedding=embed(main, inputs["attention_mask"]), **parts)
    return Answers(logits=main, **parts)


def _layers(network: "nn.Module", out: Any, name: str, layers: frozenset[int], first: int) -> "dict[int, Tensor]":
    """Of a tuple that begins with layer `first`."""
    given = getattr(out, name, None) or ()
    if layers and not (first <= min(layers) and max(layers) < first + len(given)):
        raise TrainError(
            f"{name} of layers {sorted(layers)} are asked for, and {type(network).__name__} gives "
            + (f"{first} to {first + len(given) - 1}." if given else "none.")
        )
    found = {layer: given[layer - first] for layer in layers}
    if any(value is None for value in found.values()):
        raise TrainError(f"{type(network).__name__} gives no {name}. Drop the loss that compares them.")
    return found


def embed(states: "Tensor", mask: "Tensor") -> "Tensor":
    """Mean of the states [b, n, width] that are not padding, scaled to length 1, as `evaluate.embed` has it: [b, width]."""
    from torch.nn import functional

    weights = mask[..., None].to(states.dtype)
    return functional.normalize((states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1), dim=-1)
