"""Quantization: weights become integers, once, here; every later step copies them.

A scheme says how integers are laid out for a task, because the kernels that are fast differ: an encoder multiplies many
tokens at once, so its activations are quantized too and the integer matrix units do the work; a decoder reads all its
weights for one token, so smaller weights are the gain, and activations are rounded block by block inside the kernel.
A method says how a weight finds its integer; scheme and method are chosen apart.
Rejected: letting ONNX Runtime's own quantizer choose integers at export, which nobody could then compare with anything.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from squeeze.compress.layers import refuse_nonfinite
from squeeze.compress.mixed import MixedSettings
from squeeze.compress.schemes import CALIBRATOR_NAMES, METHODS, SCHEMES, Layout
from squeeze.errors import QuantizeError, nearest
from squeeze.pruning.matrices import sparsity_of
from squeeze.pruning.settings import Share, n_of_m
from squeeze.report.schema import LayerRow, StageRecord

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from squeeze.compress.gptq import Zeros
    from squeeze.compress.plan import Plan
    from squeeze.compress.treatment import Treated
    from squeeze.model import Model

    Batches = Sequence[Mapping[str, NDArray[np.int64]]]
    """Calibration texts as the network takes them: input_ids, attention_mask, …, each [batch, length]."""
    Done = Callable[[int, int], None]


LARGEST_GROUP = 64
"""Largest M of a pattern N:M: whole groups lie in one lazy block of GPTQ."""


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
    equalize: bool = Field(
        default=False,
        description="give each channel the same range where it is made and where it is read, before all else; needs no data",
    )
    reduce_range: bool = Field(
        default=False,
        description="integers within ±64 for products with one scale per row: exact on x86 processors without VNNI too",
    )
    curve: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(),
        description="counts of calibration texts to compare, such as [4, 16, 64]: copies quantized with so many, their answers' "
        "distance from float on calibration texts beyond the largest count",
    )
    outliers: int = Field(
        default=0,
        ge=0,
        description="input channels of each layer that stay in float, those with the largest peaks (LLM.int8()), for row-wise schemes",
    )
    sparsity: Share | None = Field(
        default=None,
        description="share of the weights of each layer of the blocks that become zero in the same pass (SparseGPT), for method gptq",
    )
    pattern: str = Field(
        default="unstructured", description="where those zeros may lie: unstructured, or N:M such as 2:4"
    )
    keep: tuple[str, ...] = Field(default=(), description="layers that stay in float, as names with * and ?")
    mixed: MixedSettings | None = Field(
        default=None, description="keep the layers that matter most in a better precision, from the calibration split"
    )

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

    @model_validator(mode="after")
    def _half_reads_only_keep(self) -> "QuantizeStage":
        if SCHEMES[self.scheme].layout("").half is None:
            return self
        fields = type(self).model_fields
        unread = [n for n in fields if n not in ("kind", "scheme", "keep") and getattr(self, n) != fields[n].default]
        if unread:
            raise ValueError(f"{unread[0]} is for integers; {self.scheme} casts weights and reads only keep. Drop it")
        return self

    @model_validator(mode="after")
    def _curve_means_something(self) -> "QuantizeStage":
        if list(self.curve) != sorted(set(self.curve)):
            raise ValueError(f"curve {list(self.curve)} does not rise. Give each count once, the smallest first")
        if self.curve and not self.needs_data:
            raise ValueError(
                f"curve compares calibration texts, which scheme {self.scheme} with method {self.method} reads none of. Drop it"
            )
        return self

    @model_validator(mode="after")
    def _prunes_what_it_can(self) -> "QuantizeStage":
        if self.sparsity is None and self.pattern == "unstructured":
            return self
        asked = f"pattern {self.pattern}" if self.sparsity is None else f"sparsity {self.sparsity:g}"
        if self.method != "gptq":
            raise ValueError(
                f"{asked} prunes while GPTQ rounds; method {self.method} only rounds. Set method: gptq, or put a prune stage before it"
            )
        for name in ("outliers", "mixed"):
            if getattr(self, name):
                raise ValueError(
                    f"{asked} is of all weights of a layer, of which {name} keeps some in float. Drop one of the two"
                )
        if self.pattern != "unstructured":
            pair = n_of_m(self.pattern)
            if pair is None:
                raise ValueError(
                    f"pattern {self.pattern!r} is not what GPTQ can prune in one pass: unstructured, or N:M such as 2:4"
                )
            n, m = pair
            if not 0 < n < m <= LARGEST_GROUP:
                raise ValueError(
                    f"pattern {self.pattern}: N of M neighbours become zero, with N below M and M at most {LARGEST_GROUP}"
                )
            if self.sparsity is not None and self.sparsity != n / m:
                raise ValueError(
                    f"pattern {self.pattern} is a sparsity of {n / m:g}, and sparsity says {self.sparsity:g}. Drop sparsity"
                )
        return self

    @property
    def zeros(self) -> "Zeros | None":
        """What becomes zero while GPTQ rounds; None where nothing does."""
        from squeeze.compress.gptq import Zeros

        if pair := n_of_m(self.pattern):
            return Zeros(pair[0] / pair[1], pair[1])
        return None if self.sparsity is None else Zeros(self.sparsity)

    @property
    def progress_noun(self) -> str:
        """For progress: what is counted."""
        return "block"

    @property
    def needs_data(self) -> bool:
        """Whether the calibration split decides the result."""
        by_setting = bool(self.smooth_alpha or self.outliers) or self.mixed is not None
        return by_setting or METHODS[self.method].needs_data or SCHEMES[self.scheme].layout("").is_static

    def alpha(self, layout: Layout) -> float:
        """SmoothQuant's α: what the settings say, else the layout's choice; 0 is none."""
        return (layout.smooth_alpha if self.smooth_alpha is None else self.smooth_alpha) or 0.0

    def treats(self, layout: Layout) -> bool:
        """Whether layers become something that plain rounding does not give, from what they read of the calibration texts."""
        if layout.block_size and self.method == "round":
            return False
        return METHODS[self.method].needs_data or layout.is_static or bool(self.alpha(layout) or self.outliers)

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
    if model.integers or model.half:
        raise QuantizeError(f"{model.source} is already quantized. Start from the float artifact it was made from.")
    from squeeze.compress.advice import advise
    from squeeze.compress.curve import calibration_curve
    from squeeze.compress.outliers import refuse_outliers
    from squeeze.compress.plan import make_plans

    layout = SCHEMES[stage.scheme].layout(model.task)
    if layout.half is not None:
        from squeeze.compress.halves import halve_model

        return halve_model(model, stage, layout.half)
    started = time.monotonic()
    refuse_nonfinite(model.network)
    _refuse_impossible(model, stage, layout, calibration)
    equalized: tuple[str, ...] = ()
    if stage.equalize:
        from squeeze.compress.equalize import equalize

        equalized = equalize(model)
    plans = make_plans(model.network, stage, layout)
    refuse_outliers(stage, layout, model.task, plans)
    if all(plan.note for plan in plans.values()):
        raise QuantizeError(
            f"{model.source} has no linear layer or large embedding that {stage.scheme} could quantize."
        )
    warned = advise(model, stage, layout, plans)
    curve = calibration_curve(model, stage, calibration, done) if stage.curve else ()
    notes, folded = _smoothed(model, stage, layout, calibration)
    mixture = None
    if stage.mixed is not None:
        from squeeze.compress.sensitivity import mix

        mixture = mix(model, stage, stage.mixed, layout, plans, calibration, folded, done)
        plans, notes = mixture.plans, (*notes, *mixture.notes)
    said, treated = _changed(model, stage, layout, plans, calibration, folded, done)
    rows = [_row(model, name, plan, treated.get(name)) for name, plan in plans.items()]
    model.activations = layout.activations
    notes += said
    if mixture is not None:
        rows, notes = mixture.annotated(rows), (*notes, *mixture.outcome(model))
    return StageRecord(
        kind="quantize", settings=stage.model_dump(mode="json"), seconds=time.monotonic() - started,
        layers=tuple(rows), notes=(*equalized, *notes, _summary(model, rows), *_zeros(model)), warnings=warned, curve=curve,
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
    if stage.zeros is not None and model.pruned:
        raise QuantizeError(
            f"{model.source} is pruned already ({len(model.pruned)} matrices), and the stage prunes anew. Drop sparsity and pattern: GPTQ "
            "keeps the zeros that are there."
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
    if stage.method.startswith("awq") and layout.block_size == 0:
        raise QuantizeError(
            f"method {stage.method} is for weights in blocks; {stage.scheme} gives {model.task} one scale per output row. Use "
            "int8-weight or int4-weight, or method: gptq with int8-static."
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
    if stage.mixed is not None and stage.mixed.fallback == "int8" and layout.bits == 8:
        raise QuantizeError(
            f"mixed.fallback int8 is for 4-bit schemes; {stage.scheme} has 8 bits already. Choose fallback: float, or drop it."
        )
    if stage.needs_data and not calibration:
        wanted = f"scheme {stage.scheme}" if layout.is_static else f"method {stage.method}"
        if stage.method == "round" and not layout.is_static:
            wanted = "mixed" if stage.mixed is not None else "smooth_alpha" if stage.smooth_alpha else "outliers"
        raise QuantizeError(
            f"{wanted} needs calibration texts. Set data.splits.calibration, to 16 texts or blocks say; or --data."
        )


def _smoothed(
    model: "Model", stage: QuantizeStage, layout: Layout, calibration: "Batches"
) -> "tuple[tuple[str, ...], set[nn.Module]]":
    """What norms of a decoder can do for what they feed: notes, and the layers whose inputs are smooth by now."""
    alpha = stage.alpha(layout)
    if not alpha or model.task != "causal-lm" or model.factory is not None:
        return (), set()
    from squeeze.compress.treatment import smooth_norms

    return smooth_norms(model, alpha, calibration, needed=layout.block_size != 0)


def _changed(
    model: "Model", stage: QuantizeStage, layout: Layout, plans: "dict[str, Plan]", calibration: "Batches",
    folded: "set[nn.Module]", done: "Done | None",
) -> tuple[tuple[str, ...], "dict[str, Treated]"]:  # fmt: skip
    """All that is done before plain rounding, by looking at calibration texts: notes, and what is known of each layer so treated."""
    by_block, alpha = layout.block_size != 0, stage.alpha(layout)
    if not stage.treats(layout):
        return (), {}
    from squeeze.compress.treatment import Treatment

    treatment = Treatment(model, stage, layout, plans, folded=folded, alpha=0 if by_block else alpha)
    return treatment.walk(calibration, done), treatment.found


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


def _zeros(model: "Model") -> tuple[str, ...]:
    """What became of the zeros of pruned matrices, in words."""
    if not model.pruned:
        return ()
    from squeeze.masks import further_zeros

    kept, more = sum(one.zeros for one in model.pruned.values()), further_zeros(model)
    said = f"all {kept:,} zeros of {len(model.pruned)} pruned matrices are zero still"
    if more:
        said += f"; rounding made {sum(more.values()):,} more weights zero, in {len(more)} of them"
    return (said,)


def _summary(model: "Model", rows: list[LayerRow]) -> str:
    shares = []
    for bits in sorted({w.bits for w in model.integers.values()}):
        chosen = [w for w in model.integers.values() if w.bits == bits]
        share = sum(w.integers.numel() for w in chosen) / model.parameters
        shares.append(f"{len(chosen)} of {len(rows)} weight matrices are int{bits}: {share:.1%} of all weights")
    return "; ".join(shares)
