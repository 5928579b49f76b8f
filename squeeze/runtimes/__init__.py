"""Sessions: any artifact in any runtime as one callable on numpy arrays, its threads pinned and its device never guessed.

A session is what the evaluator and the timer see, so both serve every runtime. Runtime libraries are imported when a session
opens, not before: a child that measures ONNX Runtime's memory must not carry torch. Rejected: leaving thread counts to the
runtimes, whose defaults differ by a factor of two on the same machine (onnxruntime-genai's halves decoding).
"""

from pathlib import Path

from squeeze.errors import DeviceError, RuntimeUnavailable, nearest
from squeeze.runtimes.external_data import check_external_data
from squeeze.runtimes.genai_session import GenaiSession
from squeeze.runtimes.llama_session import LlamaSession
from squeeze.runtimes.onnx_session import OnnxSession
from squeeze.runtimes.openvino_session import OpenvinoSession
from squeeze.runtimes.session import (
    DTYPES,
    GENAI_CONFIG,
    MODEL_FILE,
    OPENVINO_MODEL,
    Batch,
    Generation,
    Session,
    cores,
)
from squeeze.runtimes.sparse_session import SparseSession
from squeeze.runtimes.torch_session import CompiledSession, TorchSession


def open_session(
    folder: Path,
    runtime: str,
    *,
    device: str = "cpu",
    threads: int | None = None,
    dtype: str | None = None,
    check: bool = True,
) -> Session:
    """Open an artifact's folder in a runtime. `threads` None is one for each core that this process may use; `dtype` None is what
    the files hold.

    `check` reads the graph first, to refuse weights outside the folder; a child whose memory is measured leaves that to its
    parent.

    Raises RuntimeUnavailable for an unknown runtime or a folder that it cannot read, DeviceError for a device that is not there.
    """
    if runtime not in RUNTIMES:
        raise RuntimeUnavailable(f"runtime {runtime!r} is unknown. {nearest(runtime, RUNTIMES)}")
    if device not in ("cpu", "cuda"):
        raise DeviceError(f"device {device!r} is unknown. {nearest(device, ('cpu', 'cuda'))}")
    if dtype is not None and dtype not in DTYPES:
        raise RuntimeUnavailable(f"dtype {dtype!r} is unknown. {nearest(dtype, DTYPES)}")
    if check and ("onnx" in runtime or (folder / MODEL_FILE).exists()):
        check_external_data(folder)
    return RUNTIMES[runtime](folder, device, threads or cores(), dtype)


def check_device(runtime: str, device: str) -> None:
    """Raise DeviceError, naming the package to install, where the runtime as installed cannot use the device."""
    if device != "cpu":
        RUNTIMES[runtime].check_device(device)


def default_runtimes(folder: Path) -> tuple[str, ...]:
    """The runtimes that squeeze measures this folder (or .gguf file) in if none is named, best first."""
    if (folder / GENAI_CONFIG).exists():
        return ("onnxruntime-genai", "onnxruntime")
    if (folder / MODEL_FILE).exists():
        return ("onnxruntime",)
    if (folder / OPENVINO_MODEL).exists():
        return ("openvino",)
    return ("llama.cpp",) if folder.suffix == ".gguf" else ("torch",)


def possible_runtimes(folder: Path) -> tuple[str, ...]:
    """Every runtime whose files lie in this folder (or are this .gguf file), whether it is installed or not."""
    found = default_runtimes(folder)
    return (*found, *{"onnxruntime": ("openvino",), "torch": ("torch.compile", "torch.sparse")}.get(found[-1], ()))


Opens = type[TorchSession] | type[OnnxSession] | type[GenaiSession] | type[OpenvinoSession] | type[LlamaSession]

RUNTIMES: dict[str, Opens] = {
    "torch": TorchSession,
    "torch.compile": CompiledSession,
    "torch.sparse": SparseSession,
    "onnxruntime": OnnxSession,
    "onnxruntime-genai": GenaiSession,
    "openvino": OpenvinoSession,
    "llama.cpp": LlamaSession,
}

__all__ = [
    "DTYPES", "GENAI_CONFIG", "MODEL_FILE", "OPENVINO_MODEL", "RUNTIMES", "Batch", "Generation", "OnnxSession", "Session",
    "check_device", "check_external_data", "cores", "default_runtimes", "open_session", "possible_runtimes",
]  # fmt: skip
