"""PyTorch, eager and compiled."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squeeze.errors import DeviceError, RuntimeUnavailable
from squeeze.runtimes.session import Batch, Generation, timed_generation


class TorchSession:
    """PyTorch eager: the source, or a quantized artifact simulated with its activations rounded as its scheme says.

    One whose weights are all in 16 bits computes in them on a GPU, and in float32 on the CPU, which would be slow in 16 bits.
    """

    runtime = "torch"
    takes_dtype = True

    def __init__(self, folder: Path, device: str, threads: int, dtype: str | None = None) -> None:
        import torch

        from squeeze.model import answer, load_model
        from squeeze.simulation import simulate_activations

        self.check_device(device)
        torch.set_num_threads(threads)
        self.device, self.threads, self._torch, self._answer = device, threads, torch, answer
        model = load_model(folder)
        simulate_activations(model)
        if dtype is None and device == "cuda" and model.half is not None and not model.half.kept:
            dtype = model.half.dtype
        self._network: Any = model.network.to(device, None if dtype is None else getattr(torch, dtype))
        self._task, self._text_inputs, self._pruned = model.task, model.text_inputs, model.pruned
        self._cached = model.factory is None

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """See Session."""
        tensors = {n: self._tensor(batch[n]) for n in self._text_inputs if n in batch}
        with self._torch.inference_mode():
            out = self._network(**tensors)
        return self._answer(out, self._task).float().cpu().numpy()

    def generate(self, input_ids: NDArray[np.int64], new_tokens: int) -> Generation:
        """See Session."""
        ids = self._tensor(input_ids)
        cache: Any = None
        whole = ids

        def step() -> NDArray[np.int64]:
            nonlocal ids, cache, whole
            if self._cached:
                out = self._network(input_ids=ids, past_key_values=cache, use_cache=True)
                cache, logits = out.past_key_values, out.logits[:, -1]
            else:
                logits = self._network(whole)[:, -1]
            ids = logits.argmax(dim=-1, keepdim=True)
            whole = self._torch.cat([whole, ids], dim=1) if not self._cached else whole
            return ids.cpu().numpy()  # type: ignore[no-any-return]

        with self._torch.inference_mode():
            return timed_generation(step, new_tokens)

    def _tensor(self, array: NDArray[np.int64]) -> Any:
        tensor = self._torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device == "cuda" else tensor

    def close(self) -> None:
        """See Session."""
        del self._network

    @staticmethod
    def check_device(device: str) -> None:
        """Raise DeviceError where torch finds no such device."""
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise DeviceError(
                "torch finds no CUDA device. Install a CUDA build of torch (see pytorch.org), or use --device cpu."
            )

    @staticmethod
    def import_library() -> None:
        """Import what every session of this runtime imports."""
        import transformers  # noqa: F401


class CompiledSession(TorchSession):
    """torch.compile: the same network through TorchInductor, which needs a C++ compiler for the CPU.

    Every new shape costs a compilation, seconds each, until torch treats lengths as open; the warm-up shows it.
    """

    runtime = "torch.compile"

    def __init__(self, folder: Path, device: str, threads: int, dtype: str | None = None) -> None:
        if device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "c++"))):
            raise RuntimeUnavailable(
                "torch.compile needs a C++ compiler and finds none. Install g++ (Debian: apt install g++), or name one in CXX."
            )
        super().__init__(folder, device, threads, dtype)
        self._network = self._torch.compile(self._network)
