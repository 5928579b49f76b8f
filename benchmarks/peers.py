"""The peers' models, each made by the peer's own tool with its recommended settings, from the same source as squeeze's.

NNCF int8 for OpenVINO, ONNX Runtime's `quantize_dynamic`, and llama.cpp's F32, Q8_0 and Q4_0. Kept under benchmarks/cache/peers;
what stands there whole is not made again.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.store import CACHE

PEERS = CACHE / "peers"


def nncf_int8(export: Path, calibration: list[dict[str, NDArray[np.int64]]], name: str = "openvino-nncf-int8") -> Path:
    """OpenVINO int8 by NNCF: post-training quantization with SmoothQuant and bias correction, the preset for transformers."""

    def fill(folder: Path) -> None:
        import nncf
        import openvino

        model = openvino.Core().read_model(export / "model.onnx")
        names = {name for given in model.inputs for name in given.names}
        samples = nncf.Dataset([{n: a for n, a in batch.items() if n in names} for batch in calibration])
        quantized = nncf.quantize(
            model, samples, model_type=nncf.ModelType.TRANSFORMER, preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(calibration),
        )  # fmt: skip
        openvino.save_model(quantized, folder / "openvino_model.xml", compress_to_fp16=False)
        shutil.copy(export / "config.json", folder)

    return made(PEERS / name, fill)


def plain_opset18(model: Path) -> Path:
    """What torch's exporter writes when nobody asks for more: float32, opset 18, attention in pieces. No pass of squeeze's."""

    def fill(folder: Path) -> None:
        import onnx_ir

        from squeeze.exporter.trace import traced
        from squeeze.model import load_model

        with traced(load_model(model), 18) as graph:
            onnx_ir.save(graph, folder / "model.onnx")
        shutil.copy(model / "config.json", folder)

    return made(PEERS / "torch-export-opset18", fill)


def quantize_dynamic(export: Path, *, per_channel: bool, name: str | None = None) -> Path:
    """What most people reach for first: ONNX Runtime's dynamic int8, on the matrix products only (see peers.md for why)."""

    def fill(folder: Path) -> None:
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization import quantize_dynamic as quantize

        quantize(
            export / "model.onnx", folder / "model.onnx", op_types_to_quantize=["MatMul", "Gemm"], per_channel=per_channel,
            weight_type=QuantType.QInt8,
        )  # fmt: skip
        shutil.copy(export / "config.json", folder)

    return made(PEERS / (name or f"ort-quantize-dynamic-per-{'channel' if per_channel else 'tensor'}"), fill)


def gguf(source: Path, kind: str) -> Path:
    """llama.cpp's own quantizer on the source's GGUF file; `kind` is F32, Q8_0 or Q4_0. Its weights come from Q4_1."""

    def fill(folder: Path) -> None:
        import ctypes

        import llama_cpp

        settings = llama_cpp.llama_model_quantize_default_params()
        kinds = {"F32": "ALL_F32", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0"}
        settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{kinds[kind]}")
        settings.allow_requantize, settings.nthread = True, 2
        target = folder / f"llama.cpp {kind}.gguf"
        if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
            raise SystemExit(f"llama.cpp could not write {target}")

    return made(PEERS / f"gguf-{kind}", fill) / f"llama.cpp {kind}.gguf"


def made(folder: Path, fill: Callable[[Path], Any]) -> Path:
    """The folder, filled under another name first where it is not there yet."""
    if not folder.is_dir():
        fresh = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        fill(fresh)
        fresh.rename(folder)
    return folder
