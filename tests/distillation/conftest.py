"""Texts of unlike lengths, as examples of a tokenizer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from squeeze.training.examples import Examples, from_texts

WORDS = tuple(
    word for line in ("the cat sat on a small mat", "it looked at the rain for two days", "12 pieces") for word in line.split()
)  # fmt: skip


@pytest.fixture(scope="session")
def written() -> Callable[..., Examples]:
    """`count` texts of 1 to 12 words, drawn with a seed."""

    def write(tokenizer: Any, count: int = 60, seed: int = 0, labels: int | None = None) -> Examples:
        random = np.random.default_rng(seed)
        texts = [" ".join(random.choice(WORDS, size=random.integers(1, 13))) for _ in range(count)]
        numbers = None if labels is None else random.integers(0, labels, size=count)
        return from_texts(texts, numbers, tokenizer, 48)

    return write
