"""What a quantization may be: how integers are laid out for a task, and how a weight finds its integer. Tables; no arithmetic."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Activations = Literal["block-int8", "dynamic-uint8", "static-uint8", "float"]


@dataclass(frozen=True)
class Layout:
    """How a scheme stores integers for one task: `block_size` 0 is one scale per output row."""

    block_size: int
    unsigned: bool
    activations: Activations
    bits: int = 8
    symmetric: bool = True
    smooth_alpha: float | None = None
    """SmoothQuant's α where the settings say nothing."""
    block_ends: bool = False
    """Whether the output matrix and tables are laid out in blocks although the other layers are not: decoders tie them, and the
    rounding of the output matrix' input goes straight into the logits."""

    half: Literal["float16", "bfloat16"] | None = None
    """The 16-bit type that weights are cast to; such a layout has no integers, and nothing else here is read."""

    @property
    def is_static(self) -> bool:
        """Whether ranges of activations are fixed beforehand."""
        return self.activations == "static-uint8"


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


def _int8(task: str) -> Layout:
    return _int8_weight(task) if task == "causal-lm" else Layout(0, unsigned=False, activations="dynamic-uint8")


def _int8_static(task: str) -> Layout:
    return Layout(0, unsigned=False, activations="static-uint8", smooth_alpha=0.85, block_ends=task == "causal-lm")


def _int8_weight(task: str) -> Layout:
    return Layout(256, unsigned=True, activations="block-int8")


def _int4_weight(task: str) -> Layout:
    return Layout(64, unsigned=True, activations="block-int8", bits=4, symmetric=False)


def _fp16(task: str) -> Layout:
    return Layout(0, unsigned=False, activations="float", bits=16, half="float16")


def _bf16(task: str) -> Layout:
    return Layout(0, unsigned=False, activations="float", bits=16, half="bfloat16")


SCHEMES: dict[str, Scheme] = {
    "int8": Scheme(
        summary="int8 weights, symmetric; decoders: one scale per block, activations int8 block by block; "
        "encoders: one scale per output row, activations uint8 measured as they come",
        source="Jacob et al. 2017, arXiv:1712.05877",
        layout=_int8,
    ),
    "int8-static": Scheme(
        summary="int8 weights, symmetric, one scale per output row; activations uint8 in ranges fixed by calibration texts, "
        "outlier channels moved into the weights first (SmoothQuant)",
        source="Jacob et al. 2017, arXiv:1712.05877; Xiao et al. 2022, arXiv:2211.10438",
        layout=_int8_static,
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
    "fp16": Scheme(
        summary="float16 weights, for GPUs: half the size; the exported graph computes in float16, sums of norms and softmax in float32",
        source="Micikevicius et al. 2017, arXiv:1710.03740",
        layout=_fp16,
    ),
    "bf16": Scheme(
        summary="bfloat16 weights: half the size, and the range of float32; torch computes in them on GPUs, the exported graph stores them "
        "and computes in float32",
        source="Kalamkar et al. 2019, arXiv:1905.12322",
        layout=_bf16,
    ),
}

METHODS: dict[str, Method] = {
    "round": Method("to the nearest integer", "Jacob et al. 2017, arXiv:1712.05877", needs_data=False),
    "gptq": Method(
        "column after column, later columns making up for each error; needs calibration texts",
        "Frantar et al. 2022, arXiv:2210.17323",
        needs_data=True,
    ),
    "awq": Method(
        "to the nearest integer, channels with large activations made larger first and ranges clipped, for block-wise schemes; "
        "needs calibration texts",
        "Lin et al. 2023, arXiv:2306.00978",
        needs_data=True,
    ),
    "awq-gptq": Method(
        "AWQ's scales, then GPTQ's rounding, for block-wise schemes; needs calibration texts",
        "Lin et al. 2023, arXiv:2306.00978; Frantar et al. 2022, arXiv:2210.17323",
        needs_data=True,
    ),
}

CALIBRATOR_NAMES = ("minmax", "percentile", "entropy", "mse")
"""The names in `squeeze.compress.calibrate.CALIBRATORS`, known without importing torch."""
