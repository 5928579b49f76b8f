"""OpenVINO: an export's model.onnx, or OpenVINO's own openvino_model.xml. An extra: pip install 'squeeze[openvino]'.

Precision is pinned like threads: on CPUs with AMX, OpenVINO computes a float32 model in bfloat16 unless it is told not to,
and a comparison with runtimes that compute in float32 would be of two different things.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squeeze.errors import DeviceError, RuntimeUnavailable
from squeeze.runtimes.session import MODEL_FILE, OPENVINO_MODEL, Batch, Generation

PRECISION = {None: "f32", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class OpenvinoSession:
    """OpenVINO on the CPU."""

    runtime = "openvino"
    takes_dtype = True

    def __init__(self, folder: Path, device: str, threads: int, dtype: str | None = None) -> None:
        self.import_library()
        self.check_device(device)
        import openvino

        self.device, self.threads = device, threads
        file = folder / OPENVINO_MODEL if (folder / OPENVINO_MODEL).exists() else folder / MODEL_FILE
        if not file.exists():
            raise RuntimeUnavailable(f"{folder} has neither {MODEL_FILE} nor {OPENVINO_MODEL}. Open it with torch.")
        options = {
            "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": PRECISION[dtype],
        }  # fmt: skip
        try:
            self._model: Any = openvino.Core().compile_model(file, "CPU", options)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeUnavailable(f"OpenVINO cannot open {file}: {reason}") from error
        self._inputs = {name for given in self._model.inputs for name in given.names}

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """See Session."""
        request = self._model.create_infer_request()
        outputs = request.infer(
            {name: array for name, array in batch.items() if name in self._inputs}, share_inputs=True
        )
        return np.asarray(outputs[self._model.outputs[0]], np.float32)

    def generate(self, input_ids: NDArray[np.int64], new_tokens: int) -> Generation:
        """Not offered: OpenVINO keeps a decoder's cache inside its own graphs, which squeeze does not write."""
        raise RuntimeUnavailable(
            "squeeze does not generate in OpenVINO: its exports keep the key-value cache outside the graph. Use onnxruntime-genai."
        )

    def close(self) -> None:
        """See Session."""
        del self._model

    @staticmethod
    def check_device(device: str) -> None:
        """Raise DeviceError for CUDA, which OpenVINO does not have."""
        if device != "cpu":
            raise DeviceError(f"OpenVINO runs here on the CPU only, not on {device}: use --device cpu.")

    @staticmethod
    def import_library() -> None:
        """Import what every session of this runtime imports. Raises RuntimeUnavailable with the line that installs it."""
        try:
            import openvino  # noqa: F401
        except ImportError as error:
            raise RuntimeUnavailable("OpenVINO is not installed: pip install 'squeeze[openvino]'.") from error
