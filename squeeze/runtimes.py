"""Sessions: any artifact in any runtime as one callable on numpy arrays, its threads pinned and its device never guessed.

A session is what the evaluator and the timer see, so both serve every runtime. Runtime libraries are imported when a session
opens, not before: a child that measures ONNX Runtime's memory must not carry torch. Rejected: leaving thread counts to the
runtimes, whose defaults differ by a factor of two on the same machine (onnxruntime-genai's halves decoding).
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from squeeze.errors import ArtifactError, DeviceError, RuntimeUnavailable, nearest

MODEL_FILE, GENAI_CONFIG = "model.onnx", "genai_config.json"
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
    device: str
    threads: int

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Logits [batch, length, vocabulary] or [batch, classes], or the last hidden state [batch, length, width]."""

    def generate(self, input_ids: NDArray[np.int64], new_tokens: int) -> Generation:
        """Exactly `new_tokens` greedy tokens for each prompt [batch, length]; an end-of-text token does not stop it."""

    def close(self) -> None:
        """Give back threads and memory."""


def open_session(
    folder: Path, runtime: str, *, device: str = "cpu", threads: int | None = None, check: bool = True
) -> Session:
    """Open an artifact's folder in a runtime. `threads` None is one for each core that this process may use.

    `check` reads the graph first, to refuse weights outside the folder; a child whose memory is measured leaves that to its
    parent.

    Raises RuntimeUnavailable for an unknown runtime or a folder that it cannot read, DeviceError for a device that is not there.
    """
    if runtime not in RUNTIMES:
        raise RuntimeUnavailable(f"runtime {runtime!r} is unknown. {nearest(runtime, RUNTIMES)}")
    if device not in ("cpu", "cuda"):
        raise DeviceError(f"device {device!r} is unknown. {nearest(device, ('cpu', 'cuda'))}")
    if check and runtime != "torch":
        check_external_data(folder)
    return RUNTIMES[runtime](folder, device, threads or cores())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_runtimes(folder: Path) -> tuple[str, ...]:
    """The runtimes that can open this folder, best first."""
    if (folder / GENAI_CONFIG).exists():
        return ("onnxruntime-genai", "onnxruntime")
    return ("onnxruntime",) if (folder / MODEL_FILE).exists() else ("torch",)


class TorchSession:
    """PyTorch eager: the source, or a quantized artifact simulated with its activations rounded as its scheme says."""

    runtime = "torch"

    def __init__(self, folder: Path, device: str, threads: int) -> None:
        import torch

        from squeeze.model import answer, load_model, simulate_activations

        check_device(self.runtime, device)
        torch.set_num_threads(threads)
        self.device, self.threads, self._torch, self._answer = device, threads, torch, answer
        model = load_model(folder)
        simulate_activations(model)
        self._network = model.network.to(device)
        self._task, self._text_inputs = model.task, model.text_inputs
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


class OnnxSession:
    """ONNX Runtime: model.onnx of an export, with or without a key-value cache."""

    runtime = "onnxruntime"

    def __init__(self, folder: Path, device: str, threads: int) -> None:
        import onnxruntime

        check_device(self.runtime, device)
        provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
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

    def _empty(self, name: str, batch: int) -> NDArray[np.float32]:
        shape = self._inputs[name].shape
        kind = np.float16 if self._inputs[name].type == "tensor(float16)" else np.float32
        size = shape[3] if isinstance(shape[3], int) else self._head
        return np.zeros((batch, shape[1], 0, size), kind)

    def _value(self, array: NDArray[Any]) -> Any:
        place = "cuda" if self.device == "cuda" else "cpu"
        return self._ort.OrtValue.ortvalue_from_numpy(array, place, 0)

    def close(self) -> None:
        """See Session."""
        del self._session


class GenaiSession:
    """onnxruntime-genai: decoders that its model builder knows, with a cache that is written in place."""

    runtime = "onnxruntime-genai"

    def __init__(self, folder: Path, device: str, threads: int) -> None:
        if not (folder / GENAI_CONFIG).exists():
            raise RuntimeUnavailable(f"{folder} has no {GENAI_CONFIG}. Open it with runtime onnxruntime.")
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise RuntimeUnavailable("onnxruntime-genai is not installed: pip install onnxruntime-genai.") from error
        check_device(self.runtime, device)
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


def best_tokens(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """The likeliest next token of each text, [batch, 1], from logits [batch, length, vocabulary]."""
    return np.asarray(logits[:, -1].argmax(axis=-1)[:, None], np.int64)


def timed_generation(step: Any, new_tokens: int) -> Generation:
    """Call `step`, which gives the next token of each text [batch, 1], `new_tokens` times; each call timed."""
    tokens, seconds = [], []
    for _ in range(new_tokens):
        started = time.perf_counter()
        tokens.append(step())
        seconds.append(time.perf_counter() - started)
    return Generation(np.concatenate(tokens, axis=1), seconds[0], tuple(seconds[1:]))


def check_device(runtime: str, device: str) -> None:
    """Raise DeviceError, naming the package to install, where the runtime as installed cannot use the device."""
    if device == "cpu":
        return
    if runtime == "torch":
        import torch

        if not torch.cuda.is_available():
            raise DeviceError(
                "torch finds no CUDA device. Install a CUDA build of torch (see pytorch.org), or use --device cpu."
            )
    elif runtime == "onnxruntime":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise DeviceError(
                "this ONNX Runtime has no CUDA: pip install onnxruntime-gpu in place of onnxruntime, or use --device cpu."
            )
    else:
        import onnxruntime_genai

        if not onnxruntime_genai.is_cuda_available():
            raise DeviceError(
                "this onnxruntime-genai has no CUDA: pip install onnxruntime-genai-cuda, or use --device cpu."
            )


def head_size(folder: Path) -> int:
    """Width of one attention head, where the graph leaves it open; 0 where no config tells."""
    for name, path in ((GENAI_CONFIG, ("model", "decoder", "head_size")), ("config.json", ("head_dim",))):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            value: Any = json.loads((folder / name).read_text("utf-8"))
            for key in path:
                value = value[key]
            return int(value)
    return 0


def check_external_data(folder: Path) -> None:
    """Raise ArtifactError where the graph names weight files outside its folder (compare CVE-2022-25882, CVE-2024-27318)."""
    import onnx

    path = folder / MODEL_FILE
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {MODEL_FILE}. Name the folder of an export.")
    try:
        graph = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ArtifactError(f"{path} is not an ONNX model: {error}.") from error
    root = Path(os.path.realpath(folder))
    for tensor in _tensors(graph):
        for entry in tensor.external_data:
            if entry.key != "location":
                continue
            target = Path(os.path.realpath(root / entry.value))
            if Path(entry.value).is_absolute() or not target.is_relative_to(root):
                raise ArtifactError(
                    f"{path} keeps {tensor.name} at {entry.value!r}, outside its folder. It was not read."
                )
            if not target.is_file():
                raise ArtifactError(f"{path} keeps {tensor.name} in {entry.value}, which is missing.")


def _tensors(part: Any) -> Iterator[Any]:
    """Every tensor of an ONNX message, wherever it lies: branches and attributes of nodes hold some too."""
    if part.DESCRIPTOR.name == "TensorProto":
        yield part
        return
    for field, value in part.ListFields():
        if field.message_type is not None:
            for inner in (value,) if hasattr(value, "DESCRIPTOR") else value:
                yield from _tensors(inner)


RUNTIMES: dict[str, type[TorchSession] | type[OnnxSession] | type[GenaiSession]] = {
    "torch": TorchSession,
    "onnxruntime": OnnxSession,
    "onnxruntime-genai": GenaiSession,
}
