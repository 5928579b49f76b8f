"""Quantization: weights become integers, once, here; every later step copies them.

A scheme says how integers are laid out for a task, because the kernels that are fast differ: an encoder multiplies many
tokens at once, so its activations are quantized too and the integer matrix units do the work; a decoder reads all its
weights for one token, so smaller weights are the gain, and activations are rounded block by block inside the kernel.
A method says how a weight finds its integer; scheme and method are chosen apart.
Rejected: letting ONNX Runtime's own quantizer choose integers at export, which nobody could then compare with anything.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from squeeze.compress.layers import refuse_nonfinite, sparsity_of
from squeeze.compress.schemes import CALIBRATOR_NAMES, METHODS, SCHEMES, Layout
from squeeze.errors import QuantizeError, nearest
from squeeze.report.schema import LayerRow, StageRecord

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from squeeze.compress.plan import Plan
    from squeeze.compress.treatment import Treated
    from squeeze.model import Model

    Batches = Sequence[Mapping[str, NDArray[np.int64]]]
    """Calibration texts as the network takes them: input_ids, attention_mask, …, each [batch, length]."""
    Done = Callable[[int, int], None]


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
    granularity: Literal["tensor", "channel", "group"] | None = Field(
        default=None,
        description="weights that share a scale: a whole matrix, an output row, or block_size of a row; none: the scheme's choice",
    )
    smooth_alpha: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="SmoothQuant's α, from the calibration split; 0: no smoothing; none: the scheme's choice",
    )
    calibrator: str = Field(
        default="mse", description="how ranges of activations are chosen, for int8-static: a name in `squeeze methods`"
    )
    percentile: float = Field(
        default=99.999,
        gt=50,
        le=100,
        description="share of values inside the range, in percent, for calibrator: percentile",
    )
    bias_correction: bool = Field(
        default=True, description="int8-static: let biases make up for the mean error of each layer's outputs"
    )
    outliers: int = Field(
        default=0,
        ge=0,
        description="input channels of each layer that stay in float, those with the largest peaks (LLM.int8()), for row-wise schemes",
    )
    keep: tuple[str, ...] = Field(default=(), description="layers that stay in float, as names with * and ?")

    @field_validator("scheme", "method", "calibrator")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        tables = {"scheme": tuple(SCHEMES), "method": tuple(METHODS), "calibrator": CALIBRATOR_NAMES}
        known = tables[str(info.field_name)]
        if value not in known:
            raise ValueError(f"{info.field_name} {value!r} is unknown. {nearest(value, known)}")
        return value

    @model_validator(mode="after")
    def _granularity_fits(self) -> "QuantizeStage":
        if self.block_size is not None and self.granularity not in (None, "group"):
            raise ValueError(f"block_size is for groups, not for granularity {self.granularity!r}. Drop one of them")
        return self

    @property
    def needs_data(self) -> bool:
        """Whether the calibration split decides the result."""
        return (
            bool(self.smooth_alpha or self.outliers)
            or METHODS[self.method].needs_data
            or SCHEMES[self.scheme].layout("").is_static
        )

    def apply(self, model: "Model", calibration: "Batches" = (), done: "Done | None" = None) -> StageRecord:
        """Quantize `model` in place: its network then computes with the dequantized integers, which are kept beside it.

        `calibration` are texts as the network takes them, for the settings that need them;
        `done(i, n)` hears of the methods that go through the network block by block.
        """
        return quantize_model(model, self, calibration, done)


def quantize_model(
    model: "Model", stage: QuantizeStage, calibration: "Batches" = (), done: "Done | None" = None
) -> StageRecord:
    """Replace every weight that the scheme covers by its integers; say of every other layer why it stayed in float.

    Raises QuantizeError for NaN or infinite weights (named), for a model that is already quantized, for a `keep` pattern
    that matches nothing, where calibration texts are missing, and where no layer at all can be quantized.
    """
    if model.integers:
        raise QuantizeError(f"{model.source} is already quantized. Start from the float artifact it was made from.")
    from squeeze.compress.outliers import refuse_outliers
    from squeeze.compress.plan import make_plans

    started = time.monotonic()
    refuse_nonfinite(model.network)
    layout = SCHEMES[stage.scheme].layout(model.task)
    _refuse_impossible(model, stage, layout, calibration)
    plans = make_plans(model.network, stage, layout)
    refuse_outliers(stage, layout, model.task, plans)
    if all(plan.note for plan in plans.values()):
        raise QuantizeError(
            f"{model.source} has no linear layer or large embedding that {stage.scheme} could quantize."
        )
    notes, treated = _changed(model, stage, layout, plans, calibration, done)
    rows = [_row(model, name, plan, treated.get(name)) for name, plan in plans.items()]
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
    granular = {"group": layout.block_size != 0, "channel": layout.block_size == 0, "tensor": layout.block_size == 0}
    if stage.granularity is not None and not granular[stage.granularity]:
        offered = ", ".join(sorted(name for name, offers in granular.items() if offers))
        raise QuantizeError(
            f"granularity {stage.granularity}: {stage.scheme} for {model.task} has kernels for {offered} only. Drop it, or choose "
            "another scheme."
        )
    if stage.granularity == "tensor" and stage.method != "round":
        raise QuantizeError(
            f"method {stage.method} fits a scale to each row, not one to the tensor. Drop granularity: tensor."
        )
    unread = [
        name
        for name in ("calibrator", "percentile", "bias_correction")
        if getattr(stage, name) != type(stage).model_fields[name].default
    ]
    if unread and not layout.is_static:
        raise QuantizeError(
            f"{unread[0]} is for int8-static; {stage.scheme} fixes no ranges beforehand. Drop it, or choose int8-static."
        )
    if stage.smooth_alpha and layout.block_size and (model.factory is not None or model.task != "causal-lm"):
        raise QuantizeError(
            f"smooth_alpha with block-wise scales is for Transformers decoders, not for {model.task} here. Drop it."
        )
    if stage.needs_data and not calibration:
        wanted = f"scheme {stage.scheme}" if layout.is_static else f"method {stage.method}"
        if stage.method == "round" and not layout.is_static:
            wanted = "smooth_alpha" if stage.smooth_alpha else "outliers"
        raise QuantizeError(
            f"{wanted} needs calibration texts. Set data.splits.calibration, to 16 texts or blocks say; or --data."
        )


def _changed(
    model: "Model", stage: QuantizeStage, layout: Layout, plans: "dict[str, Plan]", calibration: "Batches", done: "Done | None"
) -> tuple[tuple[str, ...], "dict[str, Treated]"]:  # fmt: skip
    """All that is done before plain rounding, by looking at calibration texts: notes, and what is known of each layer so treated."""
    alpha = layout.smooth_alpha if stage.smooth_alpha is None else stage.smooth_alpha
    if not (stage.needs_data or alpha):
        return (), {}
    from squeeze.compress.treatment import Treatment, smooth_norms

    by_block = layout.block_size != 0
    notes: tuple[str, ...] = ()
    folded: set[nn.Module] = set()
    if alpha and model.task == "causal-lm" and model.factory is None:
        notes, folded = smooth_norms(model, alpha, calibration, needed=by_block)
    if by_block and stage.method == "round":
        return notes, {}
    treatment = Treatment(model, stage, layout, plans, folded=folded, alpha=0 if by_block else alpha or 0)
    notes += treatment.walk(calibration, done)
    return notes, treatment.found


def _row(model: "Model", name: str, plan: "Plan", treated: "Treated | None") -> LayerRow:
    """Round what no method has rounded yet, put the integers' values into the network, and say what came out."""
    import torch

    from squeeze.integers import sqnr_db

    shape, weight, grid = tuple(plan.weight.shape), plan.weight, plan.grid
    if grid is None:
        return LayerRow(
            name=name, shape=shape, bits=32, sparsity=sparsity_of(weight), sqnr_db=None, note=plan.note
        )  # fmt: skip
    noise = None if treated is None else treated.sqnr_db
    integer = model.integers.get(name)
    if integer is None:
        integer = plan.to_nearest()
        noise = sqnr_db(weight, integer.dequantize())
        model.integers[name] = integer
        with torch.no_grad():
            weight.copy_(integer.dequantize())
    said = () if treated is None else treated.notes
    return LayerRow(
        name=name, shape=shape, bits=8 * integer.stored_bytes / weight.numel(), sparsity=sparsity_of(weight), sqnr_db=noise,
        output_sqnr_db=None if treated is None else treated.output_sqnr_db, note="; ".join((plan.described, *said)),
    )  # fmt: skip


def _summary(model: "Model", rows: list[LayerRow]) -> str:
    shares = []
    for bits in sorted({w.bits for w in model.integers.values()}):
        chosen = [w for w in model.integers.values() if w.bits == bits]
        share = sum(w.integers.numel() for w in chosen) / model.parameters
        shares.append(f"{len(chosen)} of {len(rows)} weight matrices are int{bits}: {share:.1%} of all weights")
    return "; ".join(shares)
