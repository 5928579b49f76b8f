"""llama.cpp through llama-cpp-python: decoders in .gguf files. An extra: pip install 'squeeze[llama-cpp]' (it compiles).

One text at a time: llama-cpp-python's batches are of one sequence. The context is as long as the longest text so far, because its
key-value cache is allocated whole. Rejected: the model's full length from the start (188 MB of cache for SmolLM2, which no
other runtime here would be charged with).
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squeeze.errors import DeviceError, RuntimeUnavailable
from squeeze.runtimes.session import Batch, Generation, refuse_dtype, timed_generation

CONTEXT = 512
"""Tokens that the first context holds."""


class LlamaSession:
    """llama.cpp on the CPU, or with every layer on the GPU where the package was built for CUDA."""

    runtime = "llama.cpp"
    takes_dtype = False

    def __init__(self, folder: Path, device: str, threads: int, dtype: str | None = None) -> None:
        """`folder` is the .gguf file."""
        refuse_dtype(self.runtime, dtype)
        self.import_library()
        self.check_device(device)
        if folder.suffix != ".gguf":
            raise RuntimeUnavailable(f"{folder} is not a .gguf file, which llama.cpp reads. Open it with torch.")
        self.device, self.threads, self._file = device, threads, folder
        self._open(CONTEXT, every=False)

    def _open(self, context: int, *, every: bool) -> None:
        import llama_cpp

        self._context, self._every, self._library = context, every, llama_cpp
        try:
            self._model: Any = llama_cpp.Llama(
                str(self._file), n_ctx=context, n_threads=self.threads, n_threads_batch=self.threads, logits_all=every,
                n_gpu_layers=-1 if self.device == "cuda" else 0, verbose=False,
            )  # fmt: skip
        except ValueError as error:
            raise RuntimeUnavailable(f"llama.cpp cannot open {self._file}: {error}") from error

    def _ready(self, length: int, *, every: bool) -> None:
        """An empty cache with room for `length` tokens, and logits of every position or of the last alone."""
        if length > self._context or every != self._every:
            self._model.close()
            self._open(-(-max(length, CONTEXT) // 256) * 256, every=every)
        self._model.reset()

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """See Session."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if mask is not None and not mask.all():
            raise RuntimeUnavailable("llama.cpp is measured without padding. Use batches of one text.")
        answers = []
        for text in ids:
            self._ready(len(text), every=True)
            self._model.eval(text.tolist())
            answers.append(np.array(self._model.scores[: len(text)], np.float32))
        return np.stack(answers)

    def generate(self, input_ids: NDArray[np.int64], new_tokens: int) -> Generation:
        """See Session."""
        if len(input_ids) != 1:
            raise RuntimeUnavailable(
                "llama-cpp-python generates one text at a time. Measure batches in another runtime."
            )
        self._ready(input_ids.shape[1] + new_tokens, every=False)
        ids: list[int] = input_ids[0].tolist()

        def step() -> NDArray[np.int64]:
            nonlocal ids
            self._model.eval(ids)
            last = self._library.llama_get_logits_ith(self._model.ctx, -1)
            logits = np.ctypeslib.as_array(last, shape=(self._model.n_vocab(),))
            ids = [int(logits.argmax())]
            return np.asarray([ids], np.int64)

        return timed_generation(step, new_tokens)

    def close(self) -> None:
        """See Session."""
        self._model.close()

    @staticmethod
    def check_device(device: str) -> None:
        """Raise DeviceError where llama.cpp was built without a GPU."""
        import llama_cpp

        if device == "cuda" and not llama_cpp.llama_supports_gpu_offload():
            raise DeviceError(
                "this llama-cpp-python was built without CUDA: CMAKE_ARGS=-DGGML_CUDA=on pip install --no-binary :all: "
                "--force-reinstall llama-cpp-python, or use --device cpu."
            )

    @staticmethod
    def import_library() -> None:
        """Import what every session of this runtime imports. Raises RuntimeUnavailable with the line that installs it."""
        try:
            import llama_cpp  # noqa: F401
        except ImportError as error:
            raise RuntimeUnavailable("llama-cpp-python is not installed: pip install 'squeeze[llama-cpp]'.") from error
