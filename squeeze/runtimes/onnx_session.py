"""ONNX Runtime: graphs with or without a key-value cache."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squeeze.errors import DeviceError
from squeeze.runtimes.session import (
    MODEL_FILE,
    Batch,
    Generation,
    best_tokens,
    head_size,
    refuse_dtype,
    timed_generation,
)

CACHE_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


class OnnxSession:
    """ONNX Runtime: model.onnx of an export, with or without a key-value cache."""

    runtime = "onnxruntime"
    takes_dtype = False

    def __init__(
        self, folder: Path, device: str, threads: int, dtype: str | None = None, *, profile: Path | None = None
    ) -> None:
        """`profile`: where the runtime's own profiler writes, as the beginning of a file name."""
        import onnxruntime

        refuse_dtype(self.runtime, dtype)
        self.check_device(device)
        provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        self.device, self.threads, self._ort = device, threads, onnxruntime
        self._session = onnxruntime.InferenceSession(str(folder / MODEL_FILE), options, providers=[provider])
        if provider not in self._session.get_providers():
            raise DeviceError(
                f"ONNX Runtime opened {folder} without {provider}. Check the CUDA libraries it needs, or use --device cpu."
            )
        self._inputs = {i.name: i for i in self._session.get_inputs()}
        self._past = [n for n in self._inputs if n.startswith("past_key_values.")]
        self._output = self._session.get_outputs()[0].name
        self._head = head_size(folder)

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """See Session."""
        feed: dict[str, Any] = {n: a for n, a in batch.items() if n in self._inputs}
        feed |= {n: self._empty(n, len(batch["input_ids"])) for n in self._past}
        if self.device == "cpu":
            return self._session.run([self._output], feed)[0]  # type: ignore[no-any-return]
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_ortvalue_input(
                name, self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), "cuda", 0)
            )
        binding.bind_output(self._output, "cpu")
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding.copy_outputs_to_cpu()[0]  # type: ignore[no-any-return]

    def generate(self, input_ids: NDArray[np.int64], new_tokens: int) -> Generation:
        """See Session."""
        if not self._past:
            return self._generate_uncached(input_ids, new_tokens)
        ids, length = input_ids, input_ids.shape[1]
        past = {n: self._value(self._empty(n, len(input_ids))) for n in self._past}
        present = [n.replace("past_key_values.", "present.") for n in self._past]

        def step() -> NDArray[np.int64]:
            nonlocal ids, length, past
            binding = self._session.io_binding()
            binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
            if "attention_mask" in self._inputs:
                binding.bind_cpu_input("attention_mask", np.ones((len(ids), length), np.int64))
            for name, value in past.items():
                binding.bind_ortvalue_input(name, value)
            binding.bind_output(self._output, "cpu")
            for name in present:
                binding.bind_output(name, self.device)
            self._session.run_with_iobinding(binding)
            logits, *cache = binding.get_outputs()
            past = dict(zip(self._past, cache, strict=True))
            ids = best_tokens(logits.numpy())
            length += 1
            return ids

        return timed_generation(step, new_tokens)

    def _generate_uncached(self, input_ids: NDArray[np.int64], new_tokens: int) -> Generation:
        ids = input_ids

        def step() -> NDArray[np.int64]:
            nonlocal ids
            batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            chosen = best_tokens(self.forward(batch))
            ids = np.concatenate([ids, chosen], axis=1)
            return chosen

        return timed_generation(step, new_tokens)

    def _empty(self, name: str, batch: int) -> NDArray[Any]:
        shape = self._inputs[name].shape
        kind = CACHE_TYPES[self._inputs[name].type]
        size = shape[3] if isinstance(shape[3], int) else self._head
        return np.zeros((batch, shape[1], 0, size), kind)

    def _value(self, array: NDArray[Any]) -> Any:
        place = "cuda" if self.device == "cuda" else "cpu"
        return self._ort.OrtValue.ortvalue_from_numpy(array, place, 0)

    def end_profiling(self) -> Path:
        """Stop the profiler that was asked for; its file."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """See Session."""
        del self._session

    @staticmethod
    def check_device(device: str) -> None:
        """Raise DeviceError where this build of ONNX Runtime has no such device."""
        import onnxruntime

        if device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise DeviceError(
                "this ONNX Runtime has no CUDA: pip install onnxruntime-gpu in place of onnxruntime, or use --device cpu."
            )

    @staticmethod
    def import_library() -> None:
        """Import what every session of this runtime imports."""
        import onnxruntime  # noqa: F401
