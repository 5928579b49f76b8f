"""Quality of a session on held-out examples, kept for every example, so that two models can be paired.

Everything is numpy: the same code scores PyTorch and ONNX Runtime, in a child that imports only what it measures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squeeze.errors import BenchError
from squeeze.runtimes import Session

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Outputs:
    """What a session said of every example, in the order of the split."""

    task: str
    values: Floats
    """causal-lm: negative log-likelihood in nats of each block; text-classification: logits [n, classes];
    feature-extraction: unit embeddings [n, width]."""
    tokens: NDArray[np.int64] | None = None
    """causal-lm: predicted tokens of each block."""

    def save(self, file: Path) -> None:
        """Write as .npz without pickles."""
        np.savez(file, values=self.values, tokens=np.zeros(0, np.int64) if self.tokens is None else self.tokens)

    @classmethod
    def load(cls, file: Path, task: str) -> "Outputs":
        """Read what `save` wrote."""
        with np.load(file, allow_pickle=False) as arrays:
            tokens = arrays["tokens"]
            return cls(task, arrays["values"], tokens if tokens.size else None)


def evaluate(session: Session, task: str, batches: Sequence[Mapping[str, NDArray[np.int64]]]) -> Outputs:
    """Score every example; `batches` carry their examples' numbers in "index". Raises BenchError for NaN outputs."""
    rows: list[Floats] = []
    order: list[NDArray[np.int64]] = []
    tokens: list[NDArray[np.int64]] = []
    for batch in batches:
        inputs = model_inputs(batch)
        out = session.forward(inputs)
        if not np.isfinite(out).all():
            raise BenchError(
                f"the model answers NaN or infinity to example {int(batch['index'][0])}; no metric means anything."
            )
        order.append(batch["index"])
        if task == "causal-lm":
            rows.append(negative_log_likelihood(out, inputs["input_ids"]))
            tokens.append(np.full(len(out), inputs["input_ids"].shape[1] - 1))
        else:
            rows.append(out if task == "text-classification" else embed(out, inputs["attention_mask"]))
    back = np.argsort(np.concatenate(order), kind="stable")
    return Outputs(task, np.concatenate(rows)[back], np.concatenate(tokens)[back] if tokens else None)


def model_inputs(batch: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.int64]]:
    """A batch without "index", the numbers of its examples: what a session takes."""
    return {name: array for name, array in batch.items() if name != "index"}


def negative_log_likelihood(logits: NDArray[np.float32], ids: NDArray[np.int64]) -> Floats:
    """−Σ log p(token | those before) in nats over tokens 2 to n of each block; logits [b, n, vocabulary], ids [b, n]."""
    total = np.zeros(len(ids))
    for start in range(0, ids.shape[1] - 1, 128):
        part = logits[:, start : min(start + 128, ids.shape[1] - 1)].astype(np.float64)
        wanted = ids[:, start + 1 : start + 1 + part.shape[1], None]
        peak = part.max(axis=-1)
        normaliser = peak + np.log(np.exp(part - peak[..., None]).sum(axis=-1))
        total += (normaliser - np.take_along_axis(part, wanted, axis=-1)[..., 0]).sum(axis=1)
    return total


def embed(states: NDArray[np.float32], mask: NDArray[np.int64]) -> Floats:
    """Mean of the states that are not padding, scaled to length 1 (as sentence-transformers pools MiniLM)."""
    weights = mask[..., None].astype(np.float64)
    mean = (states * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1)
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Quality:
    """One row of quality: a quantity of the report with its values for each example."""

    quantity: str
    unit: str
    values: tuple[float, ...]
    weights: tuple[float, ...] | None = None


def quality(outputs: Outputs, labels: Sequence[int] | None, reference: Outputs | None) -> list[Quality]:
    """The task's metric, and agreement with `reference` (the source's outputs), for every example."""
    values = outputs.values
    if outputs.task == "causal-lm":
        weights = tuple(float(t) for t in outputs.tokens) if outputs.tokens is not None else None
        return [Quality("negative_log_likelihood", "nats", _floats(values), weights)]
    rows: list[Quality] = []
    if outputs.task == "text-classification":
        answers = values.argmax(axis=1)
        if labels is not None:
            rows.append(Quality("correct", "", _floats(answers == np.asarray(labels))))
        rows.append(Quality("answer", "", _floats(answers)))
        if reference is not None:
            rows.append(Quality("same_answer", "", _floats(answers == reference.values.argmax(axis=1))))
            error = np.linalg.norm(values - reference.values) / max(float(np.linalg.norm(reference.values)), 1e-30)
            rows.append(Quality("logit_error", "", (float(error),)))
    elif reference is not None:
        rows.append(Quality("cosine_to_source", "", _floats((values * reference.values).sum(axis=1))))
    return rows


def _floats(values: NDArray[Any]) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
