"""Quantization: weights become integers, once, here; every later step copies them.

A scheme says how integers are laid out for a task, because the kernels that are fast differ: an encoder multiplies many
tokens at once, so its activations are quantized too and the integer matrix units do the work; a decoder reads all its
weights for one token, so smaller weights are the gain, and activations are rounded block by block inside the kernel.
Rejected: letting ONNX Runtime's own quantizer choose integers at export, which nobody could then compare with anything.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from squeeze.errors import QuantizeError, nearest
from squeeze.report.schema import LayerRow, StageRecord

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from squeeze.model import Model

BLOCK_SIZES = (16, 32, 64, 128, 256)
SMALL_HEAD = 32
"""A linear layer with fewer outputs stays in float: its integers save nothing, and it decides the answer."""
OUTPUT_BLOCK = 32
"""Largest block of the output matrix: the rounding of its input goes straight into the logits (docs/log.md, 2026-11-24)."""
SMALL_EMBEDDING = 0.01
"""An embedding with a smaller share of all weights stays in float (position and type tables)."""


class QuantizeStage(BaseModel):
    """Turn weights into integers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["quantize"] = "quantize"
    scheme: str = Field(default="int8", description="a name in `squeeze methods`")
    block_size: Literal[16, 32, 64, 128, 256] | None = Field(
        default=None, description="weights that share a scale, for decoders; none: the scheme's choice for each layer"
    )
    smooth_alpha: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="SmoothQuant's α for decoders, from the calibration split; none: no smoothing",
    )
    keep: tuple[str, ...] = Field(default=(), description="layers that stay in float, as names with * and ?")

    @field_validator("scheme")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in SCHEMES:
            raise ValueError(f"scheme {value!r} is unknown. {nearest(value, SCHEMES)}")
        return value

    @property
    def needs_data(self) -> bool:
        """Whether the calibration split decides the result."""
        return self.smooth_alpha is not None

    def apply(self, model: "Model", calibration: "NDArray[np.int64] | None" = None) -> StageRecord:
        """Quantize `model` in place: its network then computes with the dequantized integers, which are kept beside it.

        `calibration` are blocks of tokens [n, length], for the settings that need them.
        """
        return quantize_model(model, self, calibration)


@dataclass(frozen=True)
class Layout:
    """How a scheme stores integers for one task: `block_size` 0 is one scale per output row."""

    block_size: int
    unsigned: bool
    activations: Literal["block-int8", "dynamic-uint8"]


@dataclass(frozen=True)
class Scheme:
    """A row of `squeeze methods`."""

    summary: str
    source: str
    layout: Callable[[str], Layout]


def quantize_model(model: "Model", stage: QuantizeStage, calibration: "NDArray[np.int64] | None" = None) -> StageRecord:
    """Replace every weight that the scheme covers by its integers; say of every other layer why it stayed in float.

    Raises QuantizeError for NaN or infinite weights (named), for a model that is already quantized, for a `keep` pattern
    that matches nothing, and where no layer at all can be quantized.
    """
    import torch

    from squeeze.integers import round_to_nearest, sqnr_db

    if model.integers:
        raise QuantizeError(f"{model.source} is already quantized. Start from the float artifact it was made from.")
    started = time.monotonic()
    refuse_nonfinite(model.network)
    scheme = SCHEMES[stage.scheme]
    layout = scheme.layout(model.task)
    if stage.block_size is not None and layout.block_size == 0:
        raise QuantizeError(
            f"block_size is for decoders; {stage.scheme} gives {model.task} one scale per output row. Drop it."
        )
    notes = _smoothed(model, stage, layout, calibration)
    rows: list[LayerRow] = []
    unmatched = set(stage.keep)
    outputs = output_matrices(model.network)
    for name, weight, transposed, reason in weights(model.network):
        kept = [
            pattern
            for pattern in stage.keep
            if fnmatch(name.removesuffix(".weight"), pattern) or fnmatch(name, pattern)
        ]
        unmatched -= set(kept)
        note = f"kept in float: keep {kept[0]!r}" if kept else reason
        shape = tuple(weight.shape)
        if note:
            rows.append(LayerRow(name=name, shape=shape, bits=32, sparsity=_sparsity(weight), sqnr_db=None, note=note))
            continue
        columns = shape[0] if transposed else shape[1]
        largest = OUTPUT_BLOCK if name in outputs else layout.block_size
        block = (stage.block_size or best_block(columns, largest)) if layout.block_size else None
        integer = round_to_nearest(weight, block, unsigned=layout.unsigned, transposed=transposed)
        dequantized = integer.dequantize()
        rows.append(
            LayerRow(
                name=name,
                shape=shape,
                bits=8 * integer.stored_bytes / weight.numel(),
                sparsity=_sparsity(dequantized),
                sqnr_db=sqnr_db(weight, dequantized),
                note=f"one scale per {'row' if block is None else f'{block} weights'}",
            )
        )
        with torch.no_grad():
            weight.copy_(dequantized)
        model.integers[name] = integer
    if unmatched:
        names = [row.name.removesuffix(".weight") for row in rows]
        raise QuantizeError(
            f"keep {sorted(unmatched)[0]!r} matches no layer. {nearest(sorted(unmatched)[0], names[:400])}"
        )
    if not model.integers:
        raise QuantizeError(
            f"{model.source} has no linear layer or large embedding that {stage.scheme} could quantize."
        )
    model.activations = layout.activations
    return StageRecord(
        kind="quantize", settings=stage.model_dump(mode="json"), seconds=time.monotonic() - started,
        layers=tuple(rows), notes=(*notes, _summary(model, rows)),
    )  # fmt: skip


def _smoothed(
    model: "Model", stage: QuantizeStage, layout: "Layout", calibration: "NDArray[np.int64] | None"
) -> tuple[str, ...]:
    if stage.smooth_alpha is None:
        return ()
    if layout.block_size == 0 or model.factory is not None:
        raise QuantizeError(f"smooth_alpha is for Transformers decoders, not for {model.task} here. Drop it.")
    if calibration is None or len(calibration) == 0:
        raise QuantizeError("smooth_alpha needs calibration texts. Set data.splits.calibration, to 4 blocks say.")
    from squeeze.compress.smooth import smooth

    count = smooth(model, stage.smooth_alpha, calibration)
    return (f"{count} norms smoothed (α = {stage.smooth_alpha:g}) from {len(calibration)} calibration blocks",)


def weights(network: "nn.Module") -> Iterator[tuple[str, "Tensor", bool, str]]:
    """Every weight matrix once: (name, tensor, transposed, why it must stay in float or '').

    Tied matrices come once, under their first name. Norms and biases are not matrices and are not listed.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    total = sum(p.numel() for p in network.parameters())
    seen: set[int] = set()
    for path, module in network.named_modules():
        if isinstance(module, nn.RNNBase):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 2:
                    yield (
                        f"{path}.{name}",
                        parameter,
                        False,
                        f"kept in float: {type(module).__name__} weights are not linear layers",
                    )
            continue
        if not isinstance(module, nn.Linear | nn.Embedding | Conv1D) or id(module.weight) in seen:
            continue
        seen.add(id(module.weight))
        name = f"{path}.weight" if path else "weight"
        yield name, module.weight, isinstance(module, Conv1D), _why_float(module, total)


def _why_float(module: "nn.Module", total: int) -> str:
    from torch import nn

    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, nn.Embedding):
        share = weight.numel() / total
        return f"kept in float: {share:.1%} of the weights" if share < SMALL_EMBEDDING else ""
    if isinstance(module, nn.Linear) and module.out_features < SMALL_HEAD:
        return f"kept in float: a head with {module.out_features} outputs decides the answer and saves nothing"
    return ""


def output_matrices(network: "nn.Module") -> set[str]:
    """Names of the matrices that give the logits: what get_output_embeddings() says, else a layer named lm_head."""
    get = getattr(network, "get_output_embeddings", None)
    head = get() if callable(get) else getattr(network, "lm_head", None)
    target = getattr(head, "weight", None)
    return {name for name, weight, _, _ in weights(network) if weight is target}


def best_block(columns: int, largest: int) -> int:
    """The largest block up to `largest` that divides the row; where none of 32 or more does, the one with least padding.

    Padding costs bytes in every row: 576 weights in blocks of 128 are stored as 640.
    """
    sizes = [size for size in BLOCK_SIZES if 32 <= size <= largest]
    return max(sizes, key=lambda size: (-(-columns % size), size))


def refuse_nonfinite(network: "nn.Module") -> None:
    """Raise QuantizeError naming the tensors with NaN or infinite values, with their counts."""
    bad = nonfinite(network)
    if bad:
        listed = ", ".join(f"{name} ({count})" for name, count in list(bad.items())[:5])
        raise QuantizeError(
            f"{len(bad)} tensors hold NaN or infinite weights: {listed}. Repair the checkpoint; nothing was written."
        )


def nonfinite(network: "nn.Module") -> dict[str, int]:
    """How many NaN or infinite weights each tensor holds; only those that hold any."""
    counts = {name: 0 if p.sum().isfinite() else int((~p.isfinite()).sum()) for name, p in network.named_parameters()}
    return {name: count for name, count in counts.items() if count}


def weight_rows(model: "Model") -> list[LayerRow]:
    """Every weight matrix as it is now, without changing it."""
    rows = []
    for name, weight, _, _ in weights(model.network):
        integer = model.integers.get(name)
        bits = 8 * integer.stored_bytes / weight.numel() if integer is not None else 8 * weight.element_size()
        rows.append(LayerRow(name=name, shape=tuple(weight.shape), bits=bits, sparsity=_sparsity(weight), sqnr_db=None))
    return rows


def _sparsity(weight: "Tensor") -> float:
    return 1.0 - int(weight.count_nonzero()) / max(weight.numel(), 1)


def _summary(model: "Model", rows: list[LayerRow]) -> str:
    integers = sum(w.integers.numel() for w in model.integers.values())
    return f"{len(model.integers)} of {len(rows)} weight matrices are int8: {integers / model.parameters:.1%} of all weights"


def _int8(task: str) -> Layout:
    if task == "causal-lm":
        return Layout(block_size=256, unsigned=True, activations="block-int8")
    return Layout(block_size=0, unsigned=False, activations="dynamic-uint8")


SCHEMES: dict[str, Scheme] = {
    "int8": Scheme(
        summary="int8 weights, symmetric, round to nearest; decoders: one scale per block, activations int8 block by block; "
        "encoders: one scale per output row, activations uint8 measured as they come",
        source="Jacob et al. 2017, arXiv:1712.05877",
        layout=_int8,
    ),
}
