"""Quantization: weights become integers, once, here; every later step copies them.

A scheme says how integers are laid out for a task, because the kernels that are fast differ: an encoder multiplies many
tokens at once, so its activations are quantized too and the integer matrix units do the work; a decoder reads all its
weights for one token, so smaller weights are the gain, and activations are rounded block by block inside the kernel.
A method says how a weight finds its integer; scheme and method are chosen apart.
Rejected: letting ONNX Runtime's own quantizer choose integers at export, which nobody could then compare with anything.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from squeeze.compress.layers import output_matrices, refuse_nonfinite, sparsity_of, weights
from squeeze.errors import QuantizeError, nearest
from squeeze.report.schema import LayerRow, StageRecord

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from squeeze.compress.layerwise import Gram
    from squeeze.integers import Grid, IntegerWeight
    from squeeze.model import Model

    Batches = Sequence[Mapping[str, NDArray[np.int64]]]
    """Calibration texts as the network takes them: input_ids, attention_mask, …, each [batch, length]."""
    Done = Callable[[int, int], None]

BLOCK_SIZES = (16, 32, 64, 128, 256)
OUTPUT_BLOCK = 32
"""Largest block of the output matrix: the rounding of its input goes straight into the logits (docs/log.md, 2026-11-24)."""


class QuantizeStage(BaseModel):
    """Turn weights into integers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["quantize"] = "quantize"
    scheme: str = Field(default="int8", description="a name in `squeeze methods`")
    method: str = Field(default="round", description="how weights find their integers: a name in `squeeze methods`")
    block_size: Literal[16, 32, 64, 128, 256] | None = Field(
        default=None,
        description="weights that share a scale, for block-wise schemes; none: the scheme's choice for each layer",
    )
    symmetric: bool | None = Field(
        default=None, description="integers around zero, or with a zero point for each block; none: the scheme's choice"
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

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"method {value!r} is unknown. {nearest(value, METHODS)}")
        return value

    @property
    def needs_data(self) -> bool:
        """Whether the calibration split decides the result."""
        return self.smooth_alpha is not None or METHODS[self.method].needs_data

    def apply(self, model: "Model", calibration: "Batches" = (), done: "Done | None" = None) -> StageRecord:
        """Quantize `model` in place: its network then computes with the dequantized integers, which are kept beside it.

        `calibration` are texts as the network takes them, for the settings that need them;
        `done(i, n)` hears of the methods that go through the network block by block.
        """
        return quantize_model(model, self, calibration, done)


@dataclass(frozen=True)
class Layout:
    """How a scheme stores integers for one task: `block_size` 0 is one scale per output row."""

    block_size: int
    unsigned: bool
    activations: Literal["block-int8", "dynamic-uint8"]
    bits: int = 8
    symmetric: bool = True


@dataclass(frozen=True)
class Scheme:
    """A row of `squeeze methods`."""

    summary: str
    source: str
    layout: Callable[[str], Layout]


@dataclass(frozen=True)
class Method:
    """A row of `squeeze methods`: how weights find their integers, given their place on the grid."""

    summary: str
    source: str
    needs_data: bool


@dataclass(frozen=True)
class _Plan:
    """What is to become of one weight matrix."""

    weight: "Tensor"
    transposed: bool
    note: str
    """Why it stays in float; "" where it becomes integers."""
    block_size: int | None = None
    grid: "Grid | None" = None

    def to_nearest(self) -> "IntegerWeight":
        """The weight, as it is now, on its grid. Only for one that does not stay in float."""
        from squeeze.integers import round_to_nearest

        if self.grid is None:
            raise QuantizeError("a weight that stays in float was to be rounded; this is a bug.")
        return round_to_nearest(
            self.weight, self.block_size, unsigned=self.grid.unsigned, transposed=self.transposed, bits=self.grid.bits,
            symmetric=self.grid.symmetric,
        )  # fmt: skip


def quantize_model(
    model: "Model", stage: QuantizeStage, calibration: "Batches" = (), done: "Done | None" = None
) -> StageRecord:
    """Replace every weight that the scheme covers by its integers; say of every other layer why it stayed in float.

    Raises QuantizeError for NaN or infinite weights (named), for a model that is already quantized, for a `keep` pattern
    that matches nothing, where calibration texts are missing, and where no layer at all can be quantized.
    """
    if model.integers:
        raise QuantizeError(f"{model.source} is already quantized. Start from the float artifact it was made from.")
    started = time.monotonic()
    refuse_nonfinite(model.network)
    layout = SCHEMES[stage.scheme].layout(model.task)
    _refuse_impossible(model, stage, layout, calibration)
    plans = _plans(model.network, stage, layout)
    if all(plan.note for plan in plans.values()):
        raise QuantizeError(
            f"{model.source} has no linear layer or large embedding that {stage.scheme} could quantize."
        )
    notes = _smoothed(model, stage, calibration)
    found: dict[str, tuple[float | None, str]] = {}
    if stage.method == "gptq":
        notes += _compensated(model, plans, calibration, found, done)
    rows = [_row(model, name, plan, *found.get(name, (None, ""))) for name, plan in plans.items()]
    model.activations = layout.activations
    return StageRecord(
        kind="quantize", settings=stage.model_dump(mode="json"), seconds=time.monotonic() - started,
        layers=tuple(rows), notes=(*notes, _summary(model, rows)),
    )  # fmt: skip


def _refuse_impossible(model: "Model", stage: QuantizeStage, layout: Layout, calibration: "Batches") -> None:
    if stage.block_size is not None and layout.block_size == 0:
        raise QuantizeError(
            f"block_size is for block-wise schemes; {stage.scheme} gives {model.task} one scale per output row. Drop it, or "
            "use int8-weight."
        )
    if stage.symmetric is False and layout.block_size == 0:
        raise QuantizeError(
            f"{stage.scheme} is symmetric for {model.task}: its kernel has no zero point for weights. Drop symmetric."
        )
    if stage.symmetric is False and layout.bits == 8:
        raise QuantizeError("8-bit blocks are symmetric: the embedding kernel shares their bytes. Drop symmetric.")
    if stage.smooth_alpha is not None and (layout.block_size == 0 or model.factory is not None):
        raise QuantizeError(f"smooth_alpha is for Transformers decoders, not for {model.task} here. Drop it.")
    if stage.needs_data and not calibration:
        wanted = "smooth_alpha" if stage.smooth_alpha is not None else f"method {stage.method}"
        raise QuantizeError(
            f"{wanted} needs calibration texts. Set data.splits.calibration, to 4 blocks say; or --data."
        )


def _plans(network: "nn.Module", stage: QuantizeStage, layout: Layout) -> dict[str, _Plan]:
    """What is to become of every weight matrix. Raises QuantizeError for a `keep` pattern that matches nothing."""
    from torch import nn

    from squeeze.integers import Grid

    plans: dict[str, _Plan] = {}
    unmatched = set(stage.keep)
    tables = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    outputs = output_matrices(network)
    for name, weight, transposed, reason in weights(network):
        kept = [
            pattern
            for pattern in stage.keep
            if fnmatch(name.removesuffix(".weight"), pattern) or fnmatch(name, pattern)
        ]
        unmatched -= set(kept)
        if kept or reason:
            plans[name] = _Plan(weight, transposed, f"kept in float: keep {kept[0]!r}" if kept else reason)
            continue
        # Tables and the output matrix decide more than they weigh, and the kernel that looks rows up reads 8-bit blocks.
        is_end = name in outputs or id(weight) in tables
        bits = 8 if is_end else layout.bits
        symmetric = bits == 8 or (layout.symmetric if stage.symmetric is None else stage.symmetric)
        largest = OUTPUT_BLOCK if name in outputs else 256 if is_end else layout.block_size
        chosen = None if is_end and layout.bits != 8 else stage.block_size
        columns = weight.shape[0] if transposed else weight.shape[1]
        block = (chosen or best_block(columns, largest)) if layout.block_size else None
        plans[name] = _Plan(weight, transposed, "", block, Grid(bits, symmetric, layout.unsigned))
    if unmatched:
        names = [name.removesuffix(".weight") for name in plans]
        raise QuantizeError(
            f"keep {sorted(unmatched)[0]!r} matches no layer. {nearest(sorted(unmatched)[0], names[:400])}"
        )
    return plans


def _smoothed(model: "Model", stage: QuantizeStage, calibration: "Batches") -> tuple[str, ...]:
    if stage.smooth_alpha is None:
        return ()
    import numpy as np

    from squeeze.compress.smooth import smooth

    blocks = np.concatenate([batch["input_ids"] for batch in calibration])
    count = smooth(model, stage.smooth_alpha, blocks)
    return (f"{count} norms smoothed (α = {stage.smooth_alpha:g}) from {len(blocks)} calibration blocks",)


def _compensated(
    model: "Model", plans: dict[str, _Plan], calibration: "Batches", found: dict[str, tuple[float | None, str]],
    done: "Done | None",
) -> tuple[str, ...]:  # fmt: skip
    """GPTQ on every planned layer inside the repeated blocks; `found` gets the quality of each one's outputs."""
    from squeeze.compress.gptq import gptq, output_sqnr_db
    from squeeze.compress.layerwise import walk

    tokens = 0

    def treat(layers: "list[tuple[str, nn.Module]]", gram: "Gram") -> None:
        nonlocal tokens
        tokens = gram.tokens
        for path, _ in layers:
            name = f"{path}.weight"
            plan = plans.get(name)
            if plan is None or plan.grid is None:
                continue
            integer = gptq(plan.weight, gram.matrix, plan.block_size, plan.grid, transposed=plan.transposed)
            ours, theirs = (output_sqnr_db(plan.weight, w, gram.matrix) for w in (integer, plan.to_nearest()))
            better = "" if theirs is None else f"outputs of rounding to nearest: {theirs:.1f} dB"
            found[name] = (ours, better)
            model.integers[name] = integer
            plan.weight.copy_(integer.dequantize())

    batches = [{name: batch[name] for name in model.text_inputs if name in batch} for batch in calibration]
    walk(model.network, batches, treat, done)
    return (f"GPTQ on {len(model.integers)} layers from {tokens:,} calibration tokens",)


def _row(model: "Model", name: str, plan: _Plan, output_sqnr_db: float | None, said: str) -> LayerRow:
    """Round what no method has rounded yet, put the integers' values into the network, and say what came out."""
    import torch

    from squeeze.integers import sqnr_db

    shape, weight, grid = tuple(plan.weight.shape), plan.weight, plan.grid
    if grid is None:
        return LayerRow(
            name=name, shape=shape, bits=32, sparsity=sparsity_of(weight), sqnr_db=None, note=plan.note
        )  # fmt: skip
    noise = None
    integer = model.integers.get(name)
    if integer is None:
        integer = plan.to_nearest()
        noise = sqnr_db(weight, integer.dequantize())
        model.integers[name] = integer
        with torch.no_grad():
            weight.copy_(integer.dequantize())
    kind = "" if grid.symmetric else " and zero point"
    note = f"{grid.bits} bits, one scale{kind} per {'row' if plan.block_size is None else f'{plan.block_size} weights'}"
    return LayerRow(
        name=name, shape=shape, bits=8 * integer.stored_bytes / weight.numel(), sparsity=sparsity_of(weight), sqnr_db=noise,
        output_sqnr_db=output_sqnr_db, note=f"{note}; {said}" if said else note,
    )  # fmt: skip


def best_block(columns: int, largest: int) -> int:
    """The largest block up to `largest` that divides the row; where none of 32 or more does, the one with least padding.

    Padding costs bytes in every row: 576 weights in blocks of 128 are stored as 640.
    """
    sizes = [size for size in BLOCK_SIZES if 32 <= size <= largest]
    return max(sizes, key=lambda size: (-(-columns % size), size))


def _summary(model: "Model", rows: list[LayerRow]) -> str:
    shares = []
    for bits in sorted({w.bits for w in model.integers.values()}):
        chosen = [w for w in model.integers.values() if w.bits == bits]
        share = sum(w.integers.numel() for w in chosen) / model.parameters
        shares.append(f"{len(chosen)} of {len(rows)} weight matrices are int{bits}: {share:.1%} of all weights")
    return "; ".join(shares)


def _int8(task: str) -> Layout:
    return _int8_weight(task) if task == "causal-lm" else Layout(0, unsigned=False, activations="dynamic-uint8")


def _int8_weight(task: str) -> Layout:
    return Layout(256, unsigned=True, activations="block-int8")


def _int4_weight(task: str) -> Layout:
    return Layout(64, unsigned=True, activations="block-int8", bits=4, symmetric=False)


SCHEMES: dict[str, Scheme] = {
    "int8": Scheme(
        summary="int8 weights, symmetric; decoders: one scale per block, activations int8 block by block; "
        "encoders: one scale per output row, activations uint8 measured as they come",
        source="Jacob et al. 2017, arXiv:1712.05877",
        layout=_int8,
    ),
    "int8-weight": Scheme(
        summary="int8 weights, symmetric, one scale per block; activations int8 block by block inside the kernel",
        source="Dettmers et al. 2021, arXiv:2110.02861",
        layout=_int8_weight,
    ),
    "int4-weight": Scheme(
        summary="int4 weights with a zero point, one scale per block of 64; embeddings and the output matrix int8 in blocks; "
        "activations int8 block by block inside the kernel",
        source="Dettmers and Zettlemoyer 2022, arXiv:2212.09720",
        layout=_int4_weight,
    ),
}

METHODS: dict[str, Method] = {
    "round": Method("to the nearest integer", "Jacob et al. 2017, arXiv:1712.05877", needs_data=False),
    "gptq": Method(
        "column after column, later columns making up for each error; needs calibration texts",
        "Frantar et al. 2022, arXiv:2210.17323",
        needs_data=True,
    ),
}
