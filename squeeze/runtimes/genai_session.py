"""onnxruntime-genai: decoders with a cache that is written in place."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from squeeze.errors import DeviceError, RuntimeUnavailable
from squeeze.runtimes.session import GENAI_CONFIG, Batch, Generation, refuse_dtype, timed_generation


class GenaiSession:
    """onnxruntime-genai: decoders that its model builder knows, with a cache that is written in place."""

    runtime = "onnxruntime-genai"
    takes_dtype = False

    def __init__(self, folder: Path, device: str, threads: int, dtype: str | None = None) -> None:
        refuse_dtype(self.runtime, dtype)
        if not (folder / GENAI_CONFIG).exists():
            raise RuntimeUnavailable(f"{folder} has no {GENAI_CONFIG}. Open it with runtime onnxruntime.")
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise RuntimeUnavailable("onnxruntime-genai is not installed: pip install onnxruntime-genai.") from error
        self.check_device(device)
        config = onnxruntime_genai.Config(str(folder))
        config.clear_providers()
        if device == "cuda":
            config.append_provider("cuda")
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.device, self.threads, self._genai = device, threads, onnxruntime_genai
        self._model = onnxruntime_genai.Model(config)

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Not what this runtime is for: it keeps one position's logits only."""
        raise RuntimeUnavailable("onnxruntime-genai gives no logits for whole texts. Score with runtime onnxruntime.")

    def generate(self, input_ids: NDArray[np.int64], new_tokens: int) -> Generation:
        """See Session."""
        batch, length = input_ids.shape
        total = length + new_tokens
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(batch_size=batch, min_length=total, max_length=total, do_sample=False)
        generator = self._genai.Generator(self._model, parameters)
        prompt: NDArray[np.int32] | None = input_ids.astype(np.int32)

        def step() -> NDArray[np.int64]:
            nonlocal prompt
            if prompt is not None:
                generator.append_tokens(prompt)
                prompt = None
            generator.generate_next_token()
            return np.asarray(generator.get_next_tokens(), np.int64)[:, None]

        return timed_generation(step, new_tokens)

    def close(self) -> None:
        """See Session."""
        del self._model

    @staticmethod
    def check_device(device: str) -> None:
        """Raise DeviceError where this build of onnxruntime-genai has no such device."""
        import onnxruntime_genai

        if device == "cuda" and not onnxruntime_genai.is_cuda_available():
            raise DeviceError(
                "this onnxruntime-genai has no CUDA: pip install onnxruntime-genai-cuda, or use --device cpu."
            )

    @staticmethod
    def import_library() -> None:
        """Import what every session of this runtime imports."""
        import onnxruntime_genai  # noqa: F401
