"""Tokenised examples, and the order in which a training meets them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from squeeze.errors import DataError
from squeeze.provenance import Digest, digest_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from squeeze.data import Split

POOL = 50
"""Batches whose examples are sorted by length together: little padding, and still a fresh mixture every step."""
NO_LABEL = -100
"""What torch's cross entropy passes over."""


@dataclass(frozen=True)
class Examples:
    """Token sequences end to end: flat arrays that cost what their tokens cost, shared by every epoch."""

    tokens: NDArray[np.int32]
    """All examples' tokens, one after another."""
    starts: NDArray[np.int64]
    """Where each begins, and the end: [n + 1]."""
    types: NDArray[np.int8] | None
    """Token types beside the tokens, where the tokenizer gives any."""
    labels: NDArray[np.int64] | None
    """Class of each [n]; NO_LABEL where it has none."""
    pad: int
    texts: tuple[str, ...] | None = None
    """What was tokenised, for networks with another tokenizer; None for blocks."""
    prompt: NDArray[np.int64] | None = None
    """Tokens at the start of each that are given and not learned [n]; None: no example has any."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example [n]."""
        return np.diff(self.starts)

    @property
    def digest(self) -> Digest:
        """Over tokens, their types, labels and prompts."""
        parts = [self.tokens.tobytes(), self.starts.tobytes()]
        parts += [
            b"" if self.types is None else self.types.tobytes(),
            b"" if self.labels is None else self.labels.tobytes(),
        ]
        if self.prompt is not None:
            parts.append(self.prompt.tobytes())
        return digest_bytes(b"|".join(parts))

    def batch(self, numbers: Sequence[int] | NDArray[np.int64]) -> "dict[str, Tensor]":
        """Those examples padded on the right to the longest: int64 [b, n]; `index` [b]; `labels`, `prompt` [b] where there are any."""
        import torch

        numbers = np.asarray(numbers, dtype=np.int64)
        lengths = self.starts[numbers + 1] - self.starts[numbers]
        ids = np.full((len(numbers), int(lengths.max())), self.pad, dtype=np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
            at = slice(self.starts[number], self.starts[number + 1])
            ids[row, :length] = self.tokens[at]
            mask[row, :length] = 1
            if self.types is not None:
                types[row, :length] = self.types[at]
        arrays = {"input_ids": ids, "attention_mask": mask, "index": numbers}
        if self.types is not None:
            arrays["token_type_ids"] = types
        if self.labels is not None:
            arrays["labels"] = self.labels[numbers]
        if self.prompt is not None:
            arrays["prompt"] = self.prompt[numbers]
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def take(self, numbers: NDArray[np.int64]) -> "Examples":
        """Those examples alone, in that order, numbered anew."""
        at = np.concatenate([np.arange(self.starts[n], self.starts[n + 1]) for n in numbers] or [np.empty(0, np.int64)])
        return replace(
            self, tokens=self.tokens[at], starts=np.concatenate([[0], np.cumsum(self.lengths[numbers])]).astype(np.int64),
            types=None if self.types is None else self.types[at], labels=None if self.labels is None else self.labels[numbers],
            texts=None if self.texts is None else tuple(self.texts[n] for n in numbers),
            prompt=None if self.prompt is None else self.prompt[numbers],
        )  # fmt: skip


def joined(parts: Sequence[Examples]) -> Examples:
    """All of these one after another. Where only some have labels the others get NO_LABEL; prompts, 0; token types, 0."""
    first = parts[0]

    def filled(arrays: list[Any], lengths: list[int], value: int, dtype: Any) -> NDArray[Any] | None:
        if all(array is None for array in arrays):
            return None
        return np.concatenate(
            [np.full(n, value, dtype) if a is None else a for a, n in zip(arrays, lengths, strict=True)]
        )

    counts = [len(part) for part in parts]
    lengths = np.concatenate([part.lengths for part in parts])
    texts: list[str] | None = []
    for part in parts:
        texts = None if texts is None or part.texts is None else [*texts, *part.texts]
    return Examples(
        np.concatenate([part.tokens for part in parts]), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        filled([part.types for part in parts], [len(part.tokens) for part in parts], 0, np.int8),
        filled([part.labels for part in parts], counts, NO_LABEL, np.int64), first.pad, None if texts is None else tuple(texts),
        filled([part.prompt for part in parts], counts, 0, np.int64),
    )  # fmt: skip


def from_split(split: "Split", tokenizer: Any, max_length: int) -> Examples:
    """A split of texts (with labels where it has them) or of blocks. Raises DataError for texts that give no token."""
    if split.blocks is not None:
        count, size = split.blocks.shape
        return Examples(
            split.blocks.astype(np.int32).reshape(-1), np.arange(count + 1, dtype=np.int64) * size, None, None, tokenizer.pad_token_id or 0
        )  # fmt: skip
    labels = None if split.labels is None else np.array(split.labels, np.int64)
    return from_texts(split.texts or (), labels, tokenizer, max_length)


def from_texts(texts: Sequence[str], labels: NDArray[np.int64] | None, tokenizer: Any, max_length: int) -> Examples:
    """Texts as their tokenizer cuts them, at most `max_length` tokens each."""
    if not texts:
        raise DataError("there is no text to train on. Set data.splits.train, to rest for all that is left over.")
    columns = tokenizer(list(texts), truncation=True, max_length=max_length)
    lengths = np.array([len(ids) for ids in columns["input_ids"]], np.int64)
    if lengths.min() == 0:
        raise DataError(
            f"the tokenizer makes no token of {texts[int(lengths.argmin())][:60]!r}. Drop that text from the data."
        )
    types = None
    if "token_type_ids" in columns:
        types = np.concatenate([np.asarray(row, np.int8) for row in columns["token_type_ids"]])
    return Examples(
        np.concatenate([np.asarray(row, np.int32) for row in columns["input_ids"]]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), types, labels, tokenizer.pad_token_id or 0, tuple(texts),
    )  # fmt: skip


def batches_of_epoch(lengths: NDArray[np.int64], batch: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Example numbers of every batch of one epoch: a fresh order drawn from seed and epoch, texts of like length together.

    The same arguments give the same batches on every process and after every restart.
    """
    random = np.random.default_rng((seed, epoch))
    numbers = random.permutation(len(lengths))
    groups: list[NDArray[np.int64]] = []
    for at in range(0, len(numbers), batch * POOL):
        pool = numbers[at : at + batch * POOL]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        groups += [pool[i : i + batch] for i in range(0, len(pool), batch)]
    return [groups[n] for n in random.permutation(len(groups))]


def by_length(lengths: NDArray[np.int64], batch: int) -> Iterator[NDArray[np.int64]]:
    """Example numbers in batches, longest first: for passes whose order does not matter."""
    numbers = np.argsort(-lengths, kind="stable")
    for at in range(0, len(numbers), batch):
        yield numbers[at : at + batch]
