"""Choices that are known to be bad, on this machine or on any, each with its remedy and with what it is known from.

A table, so that a rule is read beside its source. Nothing is guessed: what is not in docs/log.md, in figures measured beside other
tools, or in the runtime's own documentation and issues is no rule. Facts about the machine are handed in, so that a test can
hand in another machine.
"""

import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from squeeze.provenance import environment, parse_cpuinfo

if TYPE_CHECKING:
    from squeeze.compress.plan import Plan
    from squeeze.compress.quantize import QuantizeStage
    from squeeze.compress.schemes import Layout
    from squeeze.model import Model

ORT_QUANTIZATION = "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html"
ORT_THREADING = "https://onnxruntime.ai/docs/performance/tune-performance/threading.html"
ORT_ISSUES = "https://github.com/microsoft/onnxruntime/issues"
VNNI = frozenset(["amx_int8", "avx512_vnni", "avx_vnni"])
"""x86 instructions that sum products of uint8 and int8 in 32 bits."""


@dataclass(frozen=True)
class Machine:
    """What of a processor decides which integer kernels ONNX Runtime picks."""

    kind: str
    """As platform.machine() says: x86_64, aarch64 …"""
    flags: frozenset[str]
    """In Linux's spelling; empty where the system does not tell, and then nothing is said about it."""

    @classmethod
    def here(cls) -> "Machine":
        """This one."""
        return cls(platform.machine(), frozenset(environment().cpu_flags))

    @classmethod
    def from_cpuinfo(cls, text: str, kind: str) -> "Machine":
        """The one that a /proc/cpuinfo was read on."""
        return cls(kind, frozenset(parse_cpuinfo(text)[1]))

    @property
    def saturates(self) -> bool:
        """Whether products of uint8 and int8 are summed in pairs in 16 bits, beyond which they are cut off (VPMADDUBSW)."""
        is_x86 = re.fullmatch(r"x86_64|amd64|i[3-6]86", self.kind.lower()) is not None
        return is_x86 and bool(self.flags & {"avx2", "sse4_2"}) and not self.flags & VNNI

    @property
    def mistakes_zero_points(self) -> bool:
        """Whether one token times 4-bit blocks with zero points goes through the kernel that is reported to be wrong."""
        return self.saturates and "avx2" in self.flags and "avx512f" not in self.flags

    @property
    def lacks_dots(self) -> bool:
        """Whether an ARM processor has no instruction for integer dot products."""
        return "asimd" in self.flags and not self.flags & {"asimddp", "i8mm"}


@dataclass(frozen=True)
class Choice:
    """What is asked of the quantizer, and of which model."""

    task: str
    source: str
    stage: "QuantizeStage"
    layout: "Layout"
    plans: "Mapping[str, Plan]"

    @property
    def is_decoder(self) -> bool:
        """Whether one token at a time will be asked for."""
        return self.task == "causal-lm"

    @property
    def saturable(self) -> bool:
        """Whether there are integers, one scale to a row, that reach beyond what two products in 16 bits allow."""
        grids = [plan.grid for plan in self.plans.values() if plan.grid is not None and plan.block_size is None]
        return bool(grids) and not any(grid.reach for grid in grids)

    @property
    def has_zero_points(self) -> bool:
        """Whether 4-bit blocks have zero points of their own."""
        return any(
            plan.grid is not None and plan.grid.bits == 4 and not plan.grid.symmetric for plan in self.plans.values()
        )

    @property
    def is_on_source_grid(self) -> bool:
        """Whether zero points let 4-bit blocks of at most 64 fall on the grid of the Q4_0 file that the weights come from.

        Q4_1's grid does not fit: its blocks begin where they like, while ours have an integer for zero.
        """
        grids = [(plan.block_size, plan.grid) for plan in self.plans.values() if plan.grid is not None]
        fits = any(grid.bits == 4 and not grid.symmetric and (size or 0) <= 64 for size, grid in grids)
        return fits and is_q4_0(self.source)


@dataclass(frozen=True)
class Rule:
    """One thing that is known to be bad."""

    name: str
    holds: Callable[[Machine, Choice], bool]
    warning: str
    remedy: str
    source: str

    @property
    def text(self) -> str:
        """As it stands in the report."""
        return f"{self.warning}. {self.remedy} ({self.source})"


SATURATION = (
    "this processor has no VNNI: ONNX Runtime adds products of uint8 inputs and int8 weights in pairs in 16 bits, which cuts off "
    "what goes beyond ±32,767, so that int8 answers can be wrong here"
)
ZERO_POINTS = (
    "on processors with AVX2 but neither AVX-512 nor VNNI, ONNX Runtime is reported to multiply one token with 4-bit blocks that have "
    "zero points wrongly (46 % off)"
)

RULES = (
    Rule(
        "saturation", lambda m, c: m.saturates and c.saturable, SATURATION,
        "Set reduce_range: true (--reduce-range): weights within ±64, exact on every processor",
        f"{ORT_QUANTIZATION}, “When and why do I need to try U8U8?”; {ORT_ISSUES}/6004",
    ),
    Rule(
        "zero points", lambda m, c: m.mistakes_zero_points and c.has_zero_points, ZERO_POINTS,
        "Set symmetric: true, or scheme: int8-weight, and let squeeze verify judge it on this machine", f"{ORT_ISSUES}/29853",
    ),
    Rule(
        "no dot products", lambda m, c: m.lacks_dots,
        "this ARM processor has no integer dot products (asimddp, i8mm), so int8 may be no faster than float32 on it",
        "Measure with squeeze bench before relying on the speed, or deploy to a processor that has them",
        f"{ORT_QUANTIZATION}, “Why am I not seeing performance improvements?”",
    ),
    Rule(
        "blocks on an encoder", lambda m, c: not c.is_decoder and c.layout.block_size > 0,
        "block-wise weights make an encoder slower than float32: MatMulNBits took 143 ms where float32 took 105 (MiniLM, 8×128)",
        "Choose scheme: int8 or int8-static", "figures of peers, encoder table, November 2026",
    ),
    Rule(
        "static decoder", lambda m, c: c.is_decoder and c.layout.is_static,
        "int8-static costs a decoder more perplexity than int8 (SmolLM2-135M: 4.5 % by rounding, 2.0 % with method gptq, smooth_alpha "
        "0.7 and outliers 4; int8 0.2 %) and gains at the first token only (50 ms; int8 67, float32 98)",
        "Choose scheme: int8 unless prompts are long and answers short", "docs/log.md, 2026-11-25, “one fixed range a layer”",
    ),
    Rule(
        "one scale a matrix", lambda m, c: c.stage.granularity == "tensor",
        "one scale per matrix loses accuracy for nothing: 96.8 % the same answers where one per row keeps 98.8 %, and no faster "
        "(MiniLM on tweets)",
        "Drop granularity: tensor", "figures of peers, classifier table, November 2026",
    ),
    Rule(
        "source grid", lambda m, c: c.is_on_source_grid,
        "the source's weights lie on the grid of a Q4_0 file, which 4-bit blocks with zero points partly hit: errors look smaller, by "
        "3.6 dB in blocks of 32 and 2.3 dB in blocks of 64, than on weights that were never quantized",
        "Quantize the original float checkpoint, or judge by symmetric: true, which does not hit it", "docs/log.md, 2026-11-25, “Q4_0”",
    ),
    Rule(
        "rounded to four bits", lambda m, c: c.is_decoder and c.layout.bits == 4 and c.stage.method == "round",
        "rounding to 4 bits cost 30 % of perplexity where GPTQ cost 6 % (SmolLM2-135M)",
        "Set method: gptq with 24 calibration blocks", "docs/log.md, 2026-11-25, “what GPTQ needs to be good at four bits”",
    ),
    Rule(
        "weak smoothing", lambda m, c: not c.is_decoder and 0 < (c.stage.smooth_alpha or 0) <= 0.7,
        "SmoothQuant at α ≤ 0.7 made a classifier worse than none: 84.9 % the same answers at 0.3, 97.7 % at 0.5, 98.6 % at 0.7 and 0",
        "Set smooth_alpha to 0.8 or more, or drop it", "docs/log.md, 2026-11-25, “SmoothQuant at its usual strength”",
    ),
    Rule(
        "narrow percentile", lambda m, c: c.layout.is_static and c.stage.calibrator == "percentile" and c.stage.percentile < 99.999,
        "a range that leaves out more than 0.001 % of the values cuts off what decides: 93.1 % the same answers at 99.99, 98.5 % at 99.999",
        "Set percentile: 99.999, or calibrator: mse", "docs/log.md, 2026-11-25, “int8 for encoders”",
    ),
)  # fmt: skip


def advise(
    model: "Model",
    stage: "QuantizeStage",
    layout: "Layout",
    plans: "Mapping[str, Plan]",
    machine: Machine | None = None,
) -> tuple[str, ...]:
    """What is known to be bad about quantizing `model` so, on this machine or another; most harmful first."""
    choice = Choice(model.task, model.source, stage, layout, plans)
    where = machine or Machine.here()
    return tuple(rule.text for rule in RULES if rule.holds(where, choice))


def is_q4_0(source: str) -> bool:
    """Whether a model's source, as the user named it, is a GGUF file whose name says Q4_0."""
    from squeeze.rows import ASSETS, asset_path

    path = asset_path(source) if source in ASSETS else Path(source)
    return path.suffix == ".gguf" and "Q4_0" in path.name.upper()
