"""How a teacher's answers are kept in few bytes, and what that changes of them.

* Classes: the logits as they are, float32.
* Vocabularies: the likeliest k tokens of each place that another token follows, at the losses' temperature, as 16-bit codes of
  −2048 log p, and the mass of all other tokens together as one more. A code is off by at most 1/4096 nat. Below −31.99 (a probability of
  1.3e-14) it says −31.99. What is read is scaled to sum to 1, which moves it by at most as much again: `LOG_ERROR` in all.
* Embeddings: they have length 1, so that their direction is all there is: int8, the largest element of each at 127, without a scale. An
  element is off by at most max|e| / 254, the cosine to what was computed thus at least 1 − d max|e|² / 254², for d elements.
* Hidden states: float16, off by at most 2⁻¹¹ of each value (or 2⁻²⁵ below 6e-5); values beyond ±65,504 become that.

Attention and relations are not kept: they grow with the square of the length, or are three times the hidden states.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from squeeze.distillation.answers import Answers, Needs, Top
from squeeze.distillation.store import Column, Store
from squeeze.errors import TrainError

if TYPE_CHECKING:
    from torch import Tensor

CODES = 2048
"""Codes to a nat."""
LOG_ERROR = 1 / CODES
"""Most that a log-probability above −31.99 differs from the teacher's, in nats."""
LARGEST = 65504.0
"""The largest float16."""
SLICE = 1 << 24
"""Logits that are sorted at once: 64 MiB in float32."""


def kept(needs: Needs) -> bool:
    """Whether a store can hold what is needed."""
    return not needs.attentions and not needs.relations


@dataclass(frozen=True)
class Packing:
    """What is kept of a teacher's answers."""

    task: str
    needs: Needs
    top: int
    """Tokens at each place, of language models."""

    @property
    def vocabulary(self) -> bool:
        """Whether distributions over a vocabulary are kept."""
        return self.task == "causal-lm" and self.needs.logits

    @property
    def temperature(self) -> float:
        """At which they are: the one that the losses ask, else 1."""
        (found,) = self.needs.temperatures or {1.0}
        return found

    def covers(self, asked: Needs) -> bool:
        """Whether everything that is asked is kept; of a vocabulary, at the temperature that is asked for, where one is."""
        if self.vocabulary and asked.logits and not asked.temperatures <= {self.temperature}:
            return False
        return self.needs | replace(asked, temperatures=frozenset()) == self.needs

    def columns(self, sample: Answers) -> tuple[Column, ...]:
        """The arrays for answers that look like these."""
        found: list[Column] = []
        if self.vocabulary:
            assert sample.logits is not None
            size = sample.logits.shape[-1]
            k = max(1, min(self.top, size - 1))
            found += [
                Column("top.tokens", "<u2" if size <= 1 << 16 else "<u4", (k,), "place"),
                Column("top.logs", "<u2", (k,), "place"),
                Column("top.rest", "<u2", (), "place"),
            ]
        elif self.needs.logits:
            assert sample.logits is not None
            found.append(Column("logits", "<f4", (sample.logits.shape[-1],), "text"))
        if self.needs.embedding:
            assert sample.embedding is not None
            found.append(Column("embedding", "|i1", (sample.embedding.shape[-1],), "text"))
        found += [
            Column(f"hidden.{n}", "<f2", (sample.hidden[n].shape[-1],), "token") for n in sorted(self.needs.hidden)
        ]
        return tuple(found)

    def pack(self, answers: Answers, mask: "Tensor", columns: tuple[Column, ...]) -> dict[str, NDArray[Any]]:
        """Rows of every column for one batch, text by text, where `mask` [b, n] is 1. Raises TrainError for what is no number."""
        found: dict[str, Tensor] = {}
        mask = mask.bool()
        if self.vocabulary:
            assert answers.logits is not None
            k = next(c.shape[0] for c in columns if c.name == "top.tokens")
            top = top_of(answers.logits[:, :-1][mask[:, 1:]], k, self.temperature)
            _check(top.log_probabilities)
            found |= {"top.tokens": top.tokens, "top.logs": _code(top.log_probabilities), "top.rest": _code(top.rest)}
        elif self.needs.logits:
            found["logits"] = _check(answers.logits)
        if self.needs.embedding:
            e = _check(answers.embedding)
            found["embedding"] = (e * (127 / e.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30))).round()
        for layer in self.needs.hidden:
            found[f"hidden.{layer}"] = _check(answers.hidden[layer][mask]).clamp(-LARGEST, LARGEST)
        return {c.name: found[c.name].cpu().numpy().astype(c.dtype) for c in columns}

    def unpack(self, store: Store, batch: "Mapping[str, Tensor]") -> Answers:
        """The answers for a batch of the examples, where the batch is; 0 (and token 0) at places that have none."""
        numbers = batch["index"].cpu().numpy()
        device, n = batch["input_ids"].device, batch["input_ids"].shape[1]
        lengths = store.lengths[numbers]

        def here(array: NDArray[Any]) -> "Tensor":
            return torch.from_numpy(array).to(device)

        def padded(name: str, count: NDArray[np.int64], dtype: Any) -> NDArray[Any]:
            rows = store.read(name, numbers)
            out = np.zeros((len(numbers), n, *rows.shape[1:]), dtype)
            out[np.arange(n) < count[:, None]] = rows
            return out

        logits, top, embedding = None, None, None
        if self.vocabulary:
            logs, rest = padded("top.logs", lengths - 1, np.float32), padded("top.rest", lengths - 1, np.float32)
            every = here(np.concatenate([logs, rest[..., None]], axis=-1)) / -CODES
            every = every.log_softmax(dim=-1)
            top = Top(
                here(padded("top.tokens", lengths - 1, np.int64)), every[..., :-1], every[..., -1], self.temperature
            )
        elif self.needs.logits:
            logits = here(store.read("logits", numbers))
        if self.needs.embedding:
            codes = here(store.read("embedding", numbers)).float()
            embedding = torch.nn.functional.normalize(codes, dim=-1)
        hidden = {layer: here(padded(f"hidden.{layer}", lengths, np.float32)) for layer in sorted(self.needs.hidden)}
        return Answers(logits=logits, top=top, embedding=embedding, hidden=hidden)


def top_of(logits: "Tensor", k: int, temperature: float) -> Top:
    """The likeliest k tokens of each row [rows, vocabulary] at a temperature, and the rest as the sum over the rest, not as what is
    missing from 1, which would be rounding alone where it is small."""
    size = max(1, SLICE // logits.shape[-1])
    if not len(logits):  # texts of one token each
        empty = logits.new_empty(0, k)
        return Top(empty.long(), empty, empty[:, :0].sum(dim=-1), temperature)
    tokens, logs, rests = [], [], []
    for at in range(0, len(logits), size):
        scaled = logits[at : at + size].float() / temperature
        total = scaled.logsumexp(dim=-1)
        best = scaled.topk(k, dim=-1)
        tokens.append(best.indices)
        logs.append(best.values - total[:, None])
        rests.append(scaled.scatter(-1, best.indices, -torch.inf).logsumexp(dim=-1) - total)
    return Top(torch.cat(tokens), torch.cat(logs), torch.cat(rests), temperature)


def _code(logs: "Tensor") -> "Tensor":
    return (logs * -CODES).round().clamp(0, (1 << 16) - 1)


def _check(values: "Tensor | None") -> "Tensor":
    assert values is not None
    values = values.float()
    if not bool(torch.isfinite(values).all()):
        raise TrainError("the teacher answers with what is no number. Check its weights with `squeeze inspect`.")
    return values
