"""What every runtime shares: the protocol of a session, greedy decoding with each token timed, and the names of files."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from squeeze.errors import RuntimeUnavailable

MODEL_FILE, GENAI_CONFIG, OPENVINO_MODEL = "model.onnx", "genai_config.json", "openvino_model.xml"
DTYPES = ("float32", "bfloat16", "float16")
"""What torch and OpenVINO can be told to compute in; the files of other runtimes hold their own types."""

Batch = Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True)
class Generation:
    """Greedy tokens [batch, new] and when they came; `token_seconds` has one entry for each token after the first."""

    tokens: NDArray[np.int64]
    first_token_seconds: float
    token_seconds: tuple[float, ...]


class Session(Protocol):
    """One artifact opened in one runtime."""

    runtime: str
    takes_dtype: bool
    """Whether it can be told to compute in another type than its files hold."""
    device: str
    threads: int

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Logits [batch, length, vocabulary] or [batch, classes], or the last hidden state [batch, length, width]."""

    def generate(self, input_ids: NDArray[np.int64], new_tokens: int) -> Generation:
        """Exactly `new_tokens` greedy tokens for each prompt [batch, length]; an end-of-text token does not stop it."""

    def close(self) -> None:
        """Give back threads and memory."""

    @staticmethod
    def check_device(device: str) -> None:
        """Raise DeviceError, naming the package to install, where the runtime as installed cannot use the device."""

    @staticmethod
    def import_library() -> None:
        """Import what every session of this runtime imports: memory that is the library's and not the model's."""


def refuse_dtype(runtime: str, dtype: str | None) -> None:
    """Raise RuntimeUnavailable: this runtime computes in the types that the files hold."""
    if dtype is not None:
        raise RuntimeUnavailable(
            f"{runtime} computes in the types that the artifact's files hold, not in {dtype} on demand. Leave dtype out, "
            "or measure it in torch."
        )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best_tokens(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """The likeliest next token of each text, [batch, 1], from logits [batch, length, vocabulary]."""
    return np.asarray(logits[:, -1].argmax(axis=-1)[:, None], np.int64)


def timed_generation(step: Callable[[], NDArray[np.int64]], new_tokens: int) -> Generation:
    """Call `step`, which gives the next token of each text [batch, 1], `new_tokens` times; each call timed."""
    tokens, seconds = [], []
    for _ in range(new_tokens):
        started = time.perf_counter()
        tokens.append(step())
        seconds.append(time.perf_counter() - started)
    return Generation(np.concatenate(tokens, axis=1), seconds[0], tuple(seconds[1:]))


def head_size(folder: Path) -> int:
    """Width of one attention head, where the graph leaves it open; 0 where no config tells."""
    for name, path in ((GENAI_CONFIG, ("model", "decoder", "head_size")), ("config.json", ("head_dim",))):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            value: Any = json.loads((folder / name).read_text("utf-8"))
            for key in path:
                value = value[key]
            return int(value)
    return 0
