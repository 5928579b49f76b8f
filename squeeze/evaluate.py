"""Quality of a session on held-out examples, kept for every example, so that two models can be paired.

Everything is numpy: the same code scores PyTorch and ONNX Runtime, in a child that imports only what it measures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squeeze.errors import BenchError
from squeeze.runtimes import Session

Floats = NDArray[np.floating[Any]]

PROBES = 1024
"""Positions of all blocks together at which a language model's whole distribution is compared with the source's: 200 MB for
a vocabulary of 49,152."""


@dataclass(frozen=True)
class Outputs:
    """What a session said of every example, in the order of the split."""

    task: str
    values: Floats
    """causal-lm: negative log-likelihood in nats of each predicted token [blocks, length − 1]; text-classification: logits
    [n, classes]; feature-extraction: unit embeddings [n, width]."""
    choices: NDArray[np.int64] | None = None
    """causal-lm: the likeliest token at each of those places [blocks, length − 1]."""
    divergence: Floats | None = None
    """causal-lm: Kullback–Leibler divergence in nats from the source, at the probed positions [blocks, probes]."""

    def save(self, file: Path) -> None:
        """Write as .npz without pickles."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "task"}
        np.savez(file, **{name: array for name, array in arrays.items() if array is not None})

    @classmethod
    def load(cls, file: Path, task: str) -> "Outputs":
        """Read what `save` wrote."""
        with np.load(file, allow_pickle=False) as arrays:
            return cls(task, **{name: arrays[name] for name in arrays.files})


def evaluate(
    session: Session, task: str, batches: Sequence[Mapping[str, NDArray[np.int64]]], *, reference: Path | None = None,
    is_reference: bool = False,
) -> Outputs:  # fmt: skip
    """Score every example; `batches` carry their examples' numbers in "index". Raises BenchError for NaN outputs.

    For language models, `reference` is the .npy file of the source's log-probabilities at the probed positions: written where
    `is_reference`, else compared with.
    """
    rows: list[Floats] = []
    order: list[NDArray[np.int64]] = []
    choices: list[NDArray[np.int64]] = []
    probed: list[Floats] = []
    each = max(1, PROBES // max(1, sum(len(batch["index"]) for batch in batches)))
    source = np.load(reference, mmap_mode="r") if reference is not None and not is_reference else None
    for batch in batches:
        inputs = model_inputs(batch)
        out = session.forward(inputs)
        check_finite(out, int(batch["index"][0]))
        order.append(batch["index"])
        if task == "causal-lm":
            ids = inputs["input_ids"]
            rows.append(negative_log_likelihood(out, ids))
            choices.append(out[:, :-1].argmax(axis=-1))
            if reference is not None:
                found = log_probabilities(out[:, probes(ids.shape[1], each)])
                probed.append(found if source is None else divergence(source[batch["index"]], found))
        else:
            rows.append(out if task == "text-classification" else embed(out, inputs["attention_mask"]))
    back = np.argsort(np.concatenate(order), kind="stable")
    at_probes = np.concatenate(probed)[back] if probed else None
    if reference is not None and at_probes is not None and source is None:
        np.save(reference, at_probes.astype(np.float32))
        at_probes = None
    return Outputs(
        task, np.concatenate(rows)[back], np.concatenate(choices)[back] if choices else None, at_probes
    )  # fmt: skip


def check_finite(out: NDArray[np.float32], example: int) -> None:
    """Raise BenchError where a model answers NaN or infinity."""
    if not np.isfinite(out).all():
        raise BenchError(f"the model answers NaN or infinity to example {example}; no figure about it means anything.")


def model_inputs(batch: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.int64]]:
    """A batch without "index", the numbers of its examples: what a session takes."""
    return {name: array for name, array in batch.items() if name != "index"}


def negative_log_likelihood(logits: NDArray[np.float32], ids: NDArray[np.int64]) -> Floats:
    """−log p(token | those before) in nats of tokens 2 to n of each block [b, n − 1]; logits [b, n, vocabulary], ids [b, n]."""
    found: list[Floats] = []
    for start in range(0, ids.shape[1] - 1, 128):
        part = logits[:, start : min(start + 128, ids.shape[1] - 1)].astype(np.float64)
        wanted = ids[:, start + 1 : start + 1 + part.shape[1], None]
        peak = part.max(axis=-1)
        normaliser = peak + np.log(np.exp(part - peak[..., None]).sum(axis=-1))
        found.append(normaliser - np.take_along_axis(part, wanted, axis=-1)[..., 0])
    return np.concatenate(found, axis=1)


def probes(length: int, each: int) -> NDArray[np.int64]:
    """Positions of a block at which distributions are compared: evenly spread, the last one left out (it predicts nothing)."""
    return np.unique(np.linspace(0, max(0, length - 2), each).round().astype(np.int64))


def log_probabilities(logits: NDArray[np.float32]) -> Floats:
    """Logarithm of the softmax over the last axis, in double precision."""
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=-1, keepdims=True)
    return exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))  # type: ignore[no-any-return]


def divergence(source: Floats, result: Floats) -> Floats:
    """Σ p (log p − log q) in nats over the last axis, p the source's (Kullback and Leibler 1951); never below zero."""
    logs = source.astype(np.float64)
    return np.maximum((np.exp(logs) * (logs - result)).sum(axis=-1), 0.0)  # type: ignore[no-any-return]


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
        return _language_quality(outputs, reference)
    rows: list[Quality] = []
    if outputs.task == "text-classification":
        answers = values.argmax(axis=1)
        if labels is not None:
            rows.append(Quality("correct", "", _floats(answers == np.asarray(labels))))
        rows.append(Quality("answer", "", _floats(answers)))
        if reference is not None:
            rows.append(Quality("same_answer", "", _floats(answers == reference.values.argmax(axis=1))))
            kl = divergence(*(log_probabilities(side) for side in (reference.values, values)))
            rows.append(Quality("kl_to_source", "nats", _floats(kl)))
            error = np.linalg.norm(values - reference.values) / max(float(np.linalg.norm(reference.values)), 1e-30)
            rows.append(Quality("logit_error", "", (float(error),)))
    elif reference is not None:
        rows.append(Quality("cosine_to_source", "", _floats((values * reference.values).sum(axis=1))))
    return rows


def _language_quality(outputs: Outputs, reference: Outputs | None) -> list[Quality]:
    values = outputs.values
    blocks, tokens = values.shape
    rows = [Quality("negative_log_likelihood", "nats", _floats(values.sum(axis=1)), (float(tokens),) * blocks)]
    # Seven digits are more than float32 logits bear, and a third of the file's size.
    rows.append(Quality("token_log_likelihood", "nats", tuple(float(f"{-v:.7g}") for v in values.reshape(-1))))
    if reference is not None and outputs.choices is not None and reference.choices is not None:
        same = outputs.choices == reference.choices
        rows.append(Quality("same_answer", "", _floats(same.reshape(-1))))
    if outputs.divergence is not None:
        rows.append(Quality("kl_to_source", "nats", _floats(outputs.divergence.reshape(-1))))
    return rows


def _floats(values: NDArray[Any]) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
