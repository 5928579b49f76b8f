"""What calibration texts do to the layers, one group after another: smoothing, ranges of activations, GPTQ, bias correction.

Each group of layers that read one tensor is met once, with everything before it already quantized, inputs included, so that what it
reads is what the exported graph will give it. Statistics are streamed, several passes for each group; memory holds one Gram matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from squeeze.compress.awq import Scaler, clipped, measured
from squeeze.compress.calibrate import Histogram, Peaks, calibrated, input_grid
from squeeze.compress.gptq import gptq, output_sqnr_db
from squeeze.compress.outliers import outlier_channels
from squeeze.compress.plan import Plan
from squeeze.compress.smooth import SMALLEST, column_peaks, smooth
from squeeze.errors import QuantizeError
from squeeze.integers import Grid, InputGrid, IntegerWeight, reciprocal, sqnr_db, static_uint8
from squeeze.layerwise import Gram, Site, repeated_blocks, walk, width
from squeeze.masks import Pruned
from squeeze.model import aliases
from squeeze.outliers import Outliers
from squeeze.simulation import input_rounding

if TYPE_CHECKING:
    from collections.abc import Callable

    from squeeze.compress.quantize import QuantizeStage
    from squeeze.compress.schemes import Layout
    from squeeze.model import Model

Batches = Sequence[Mapping[str, NDArray[np.int64]]]


@dataclass
class Treated:
    """What is known of a layer after its treatment."""

    sqnr_db: float | None
    """Of its weights; None where a method moves weights away from their nearest integers on purpose."""
    output_sqnr_db: float | None
    notes: tuple[str, ...]


def smooth_norms(
    model: "Model", alpha: float, calibration: Batches, *, needed: bool
) -> tuple[tuple[str, ...], set[nn.Module]]:
    """SmoothQuant where the norms of a decoder can take it: what to note, and the layers whose inputs are smooth by now.

    A network whose norms feed more than linear layers is left as it was: QuantizeError where it is `needed`, else its layers
    get divisors of their own.
    """
    blocks = np.concatenate([batch["input_ids"] for batch in calibration])
    try:
        groups = smooth(model, alpha, blocks)
    except QuantizeError:
        if needed:
            raise
        return (), set()
    note = f"{len(groups)} norms smoothed (α = {alpha:g}) from {len(blocks)} calibration blocks"
    return (note,) if groups else (), {linear for group in groups for linear in group.linears}


class Treatment:
    """The layers of one network, as `walk` meets them."""

    def __init__(
        self, model: "Model", stage: "QuantizeStage", layout: "Layout", plans: dict[str, Plan], *, folded: set[nn.Module], alpha: float,
    ) -> None:  # fmt: skip
        self.model, self.stage, self.layout, self.plans = model, stage, layout, plans
        self.folded, self.alpha = folded, alpha
        self.found: dict[str, Treated] = {}
        self.names = aliases(model.network)
        self.scaler = Scaler.of(model) if stage.method.startswith("awq") else None
        self.tokens = self.smoothed = self.corrected = self.silent = self.relieved = 0
        self.zeros = stage.zeros
        self.pruned: dict[str, Pruned] = {}
        self.inside = {id(p) for p in repeated_blocks(model.network)[1].parameters()} if self.zeros else set()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def walk(self, calibration: Batches, done: "Callable[[int, int], None] | None") -> tuple[str, ...]:
        """Go through the network; return what was done, in words."""
        batches = [{name: batch[name] for name in self.model.text_inputs if name in batch} for batch in calibration]
        try:
            walk(
                self.model.network, batches, self._treat, done, outside=self.layout.block_size == 0,
                alone=self.scaler is None,  # which divides the norms before the layers
            )  # fmt: skip
        finally:
            for hook in self._hooks:
                hook.remove()
        if self.stage.outliers and not self.relieved:
            raise QuantizeError(
                f"no layer of {self.model.source} can keep outliers in float: none reads its inputs row by row with weights of its "
                "own. Drop outliers."
            )
        self.model.pruned = self.model.pruned | self.pruned
        return self._notes()

    def _notes(self) -> tuple[str, ...]:
        notes = [] if self.scaler is None else list(self.scaler.notes)
        if self.stage.method == "awq":
            notes.append(f"ranges of {len(self.found)} layers' blocks clipped from {self.tokens:,} calibration tokens")
        if self.stage.method.endswith("gptq"):
            notes.append(f"GPTQ on {len(self.found)} layers from {self.tokens:,} calibration tokens")
        if self.pruned:
            count = sum(one.zeros for one in self.pruned.values())
            notes.append(
                f"{count:,} weights of {len(self.pruned)} matrices pruned in the same pass (SparseGPT, {self.stage.pattern})"
            )
        if self.layout.is_static:
            notes.append(
                f"ranges of {len(self.found)} layers' inputs by {self.stage.calibrator} from {self.tokens:,} calibration tokens"
            )
        if self.smoothed:
            notes.append(
                f"inputs of {self.smoothed} layers divided channel by channel before rounding (SmoothQuant, α = {self.alpha:g})"
            )
        if self.relieved:
            notes.append(f"{self.stage.outliers} input channels of {self.relieved} layers stay in float (LLM.int8())")
        if self.corrected:
            notes.append(f"{self.corrected} biases make up for the mean error of their layers")
        if self.silent:
            notes.append(
                f"the inputs of {self.silent} layers were zero on all calibration texts: their range says nothing"
            )
        return tuple(notes)

    def _treat(self, layers: list[tuple[str, nn.Module]], site: Site) -> None:
        chosen: list[tuple[str, nn.Module, Plan]] = []
        for path, module in layers:
            name = self.names.get(f"{path}.weight", f"{path}.weight")
            plan = self.plans.get(name)
            if plan is not None and plan.grid is not None and name not in self.model.integers:
                chosen.append((name, module, plan))
        by_block = [item for item in chosen if item[2].block_size is not None]
        by_row = [item for item in chosen if item[2].block_size is None]
        if by_block and self.stage.method != "round" and self.layout.block_size:
            self._compensate(by_block, site)
        if by_row:
            self._calibrate(by_row, site)

    def _compensate(self, layers: list[tuple[str, nn.Module, Plan]], site: Site) -> None:
        """AWQ, GPTQ or both on block-wise weights, whose inputs the kernel rounds by itself."""
        gram, size = (site.gram(), None) if self.scaler is None else measured(site)
        matrix, said = gram.matrix, ""
        self.tokens = gram.tokens
        nearest = [output_sqnr_db(plan.weight, plan.to_nearest(), matrix) for _, _, plan in layers]
        if self.scaler is not None and size is not None:
            matrix, said = self.scaler.fold(layers, matrix, size)
        compensates = self.stage.method.endswith("gptq")
        for (name, _, plan), theirs in zip(layers, nearest, strict=True):
            if compensates:
                rows = plan.weight.T if plan.transposed else plan.weight
                integer = self._rounded(name, plan, rows, matrix, plan.own_grid)
            else:
                integer = clipped(plan.weight, matrix, plan.block_size, plan.own_grid, transposed=plan.transposed)
            ours = output_sqnr_db(plan.weight, integer, matrix)
            note = "" if theirs is None else f"outputs of rounding to nearest: {theirs:.1f} dB"
            self.found[name] = Treated(None, ours, tuple(text for text in (said, note) if text))
            self.model.integers[name] = integer
            plan.weight.copy_(integer.dequantize())

    def _calibrate(self, layers: list[tuple[str, nn.Module, Plan]], site: Site) -> None:
        """Row-wise weights whose inputs become uint8: divisor, range, integers, bias, in this order."""
        peaks = Peaks()
        site.stream(peaks.add)
        self.tokens = max(self.tokens, peaks.tokens)
        matrices = [_rows(plan.weight, plan) for _, _, plan in layers]
        divisor, floats = self._divisor(layers, peaks, matrices), self._outliers(layers, peaks, matrices)
        scaled = [m if divisor is None else m * divisor for m in matrices]
        scaled = [m if floats is None else m.index_fill(1, floats.channels, 0) for m in scaled]
        inputs = self._range(site, peaks, divisor, scaled, floats)
        gram, means = self._statistics(site, divisor, inputs, floats)
        first = _first_rows(site)
        for (name, module, plan), matrix, wide in zip(layers, matrices, scaled, strict=True):
            if self.stage.method == "gptq":
                integer = self._rounded(name, plan, wide, gram.matrix, plan.own_grid)
                noise = None
            else:
                integer = plan.rounded(wide.T if plan.transposed else wide)
                noise = sqnr_db(wide, _rows(integer.dequantize(), plan))
            own = None if floats is None else floats.of(matrix)
            integer = replace(integer, transposed=plan.transposed, divisor=divisor, inputs=inputs, outliers=own)
            self.model.integers[name] = integer
            now = _rows(integer.dequantize(), plan)
            rounding = input_rounding(integer)
            if inputs is not None and self.stage.bias_correction:
                self.corrected += _correct(module, matrix @ means[0] - now @ means[1])
            plan.weight.copy_(integer.dequantize())
            exact = first @ matrix.T
            self.found[name] = Treated(noise, sqnr_db(exact, rounding(first) @ now.T), _said(inputs, own))
            self._hooks.append(
                module.register_forward_pre_hook(lambda _, x, rounding=rounding: (rounding(x[0]), *x[1:]))
            )

    def _rounded(self, name: str, plan: Plan, rows: Tensor, gram: Tensor, grid: Grid) -> IntegerWeight:
        """GPTQ of `rows` [out, in]; zeros of a pruned matrix stay, and where the stage prunes too they are made here."""
        zeros = self.zeros if id(plan.weight) in self.inside else None
        if zeros is not None:
            if zeros.group is not None and rows.shape[1] % zeros.group:
                raise QuantizeError(
                    f"pattern {self.stage.pattern}: {name} has {rows.shape[1]} input channels, which {zeros.group} does not divide. "
                    "Choose pattern: unstructured, or keep that layer in float with keep."
                )
            count = zeros.count(*rows.shape)
            self.pruned[name] = Pruned(self.stage.pattern, zeros.sparsity, count)
        mask = rows != 0 if name in self.model.pruned else None
        found = gptq(rows, gram, plan.block_size, grid, mask=mask, zeros=zeros)
        return replace(found, transposed=plan.transposed)

    def _outliers(
        self, layers: list[tuple[str, nn.Module, Plan]], peaks: Peaks, matrices: list[Tensor]
    ) -> Outliers | None:
        """The channels that all layers of the group keep in float; None where none do, or a matrix is shared, as for `_divisor`."""
        if not self.stage.outliers or self._is_shared(layers):
            return None
        self.relieved += len(layers)
        channels = outlier_channels(peaks.size, matrices, self.stage.outliers)
        return Outliers(channels, matrices[0][:, channels])

    def _is_shared(self, layers: list[tuple[str, nn.Module, Plan]]) -> bool:
        return any(sum(first == name for first in self.names.values()) > 1 for name, _, _ in layers)

    def _divisor(
        self, layers: list[tuple[str, nn.Module, Plan]], peaks: Peaks, matrices: list[Tensor]
    ) -> Tensor | None:
        """SmoothQuant's s, [in], with geometric mean 1; None where inputs are smooth already, or where a matrix is shared (its other
        reader does not divide)."""
        if not self.alpha or self._is_shared(layers) or any(module in self.folded for _, module, _ in layers):
            return None
        size, weight = peaks.size, column_peaks(matrices)
        seen = (size > SMALLEST) & (weight > SMALLEST)
        if not bool(seen.any()):
            return None
        scale = size.clamp(min=SMALLEST).pow(self.alpha) / weight.clamp(min=SMALLEST).pow(1 - self.alpha)
        scale = scale / scale[seen].log().mean().exp()
        self.smoothed += len(layers)
        # A channel that was never seen keeps its size: divided by next to nothing it would burst the range when it comes.
        return torch.where(seen, scale, torch.ones_like(scale))

    def _range(
        self, site: Site, peaks: Peaks, divisor: Tensor | None, matrices: list[Tensor], floats: Outliers | None
    ) -> InputGrid | None:
        """The fixed range of what the group reads, outlier channels aside; None for schemes that measure it as it comes."""
        if not self.layout.is_static:
            return None
        inverse = _factors(divisor, floats, len(peaks.size))
        low, high = (float(end) for end in ((peaks.ends[0] * inverse).amin(), (peaks.ends[1] * inverse).amax()))
        if low == high == 0:
            self.silent += len(matrices)
        if self.stage.calibrator == "minmax" or low == high:
            return input_grid(low, high)
        histogram = Histogram(min(low, 0.0), max(high, 0.0))
        importance = torch.stack([m.square().sum(dim=0) for m in matrices]).sum(dim=0)
        counted = (
            torch.ones(len(inverse), dtype=torch.bool) if floats is None else floats.muted(torch.ones_like(inverse)) > 0
        )
        site.stream(lambda rows: histogram.add((rows * inverse)[:, counted], importance[counted]))
        return calibrated(histogram, self.stage.calibrator, self.stage.percentile)

    def _statistics(
        self, site: Site, divisor: Tensor | None, inputs: InputGrid | None, floats: Outliers | None
    ) -> tuple[Gram, tuple[Tensor, Tensor]]:
        """The Gram matrix of the rounded inputs, as the integers will meet them, and the means of the inputs before and after."""
        n = width(site.module)
        gram, before, after, tokens = Gram(torch.zeros(n, n)), torch.zeros(n), torch.zeros(n), 0
        inverse = _factors(divisor, floats, n)
        if self.stage.method != "gptq" and (inputs is None or not self.stage.bias_correction):
            return gram, (before, after)

        def exact_or_static(rows: Tensor) -> Tensor:
            return rows if inputs is None else static_uint8(rows, inputs, divisor)

        rounding = exact_or_static if floats is None else floats.around(exact_or_static)

        def add(rows: Tensor) -> None:
            nonlocal tokens
            rounded = rounding(rows)
            if self.stage.method == "gptq":
                gram.add(rounded * inverse)
            tokens += len(rows)
            before.add_(rows.sum(dim=0))
            after.add_(rounded.sum(dim=0))

        site.stream(add)
        return gram, (before / tokens, after / tokens)


def _rows(weight: Tensor, plan: Plan) -> Tensor:
    """A copy of the weight as [out, in]."""
    return (weight.T if plan.transposed else weight).detach().float().clone()


def _factors(divisor: Tensor | None, floats: Outliers | None, channels: int) -> Tensor:
    """What inputs are multiplied by before they are rounded, [channels]: 0 for those that are not."""
    inverse = torch.ones(channels) if divisor is None else reciprocal(divisor)
    return inverse if floats is None else floats.muted(inverse)


def _first_rows(site: Site) -> Tensor:
    """What the group reads of the first batch, to judge its outputs by."""
    rows: list[Tensor] = []
    site.stream(rows.append, batches=1)
    return torch.cat(rows)


def _correct(module: nn.Module, error: Tensor) -> int:
    """Add the mean error of the outputs to the bias; 0 where there is none to take it."""
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor):
        return 0
    bias.add_(error)
    return 1


def _said(inputs: InputGrid | None, floats: Outliers | None) -> tuple[str, ...]:
    kept = () if floats is None else (f"{len(floats.channels)} input channels in float",)
    if inputs is None:
        return kept
    low, high = -inputs.zero_point * inputs.scale, (255 - inputs.zero_point) * inputs.scale
    return (f"inputs uint8 from {low:.3g} to {high:.3g}", *kept)
