"""What each layer's integers cost the network's answers, measured once; and the plans that come of a choice among the layers.

One layer at a time becomes what the scheme would make of it, its weights to nearest on their grid and its inputs rounded as its
kernel rounds them, while all others stay float. The distance of the answers from the float ones is the layer's sensitivity. For
small errors KL divergence and 1 − cosine are quadratic forms of them, so independent errors of layers add up; the report has the sum
beside the network measured as a whole, since independence is an assumption.
Nothing before the layer is run again: blocks are entered with what the float blocks before them gave, kept of one block alone.

Rejected: sensitivity from the weights' SQNR (it does not know what a layer is for), or from gradients (they are zero where the
divergence has its minimum, at the float network; second derivatives cost more than measuring).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from squeeze.compress.mixed import MEGABYTE, Candidate, MixedSettings, for_budget, for_size, predicted, ranked
from squeeze.compress.plan import Plan
from squeeze.errors import QuantizeError
from squeeze.integers import Grid, IntegerWeight
from squeeze.model import Model
from squeeze.playback import Batches, Done, Meter, measured_in_order, readers
from squeeze.recurrent import kernel_groups
from squeeze.report.schema import LayerRow
from squeeze.simulation import simulate_activations

if TYPE_CHECKING:
    from squeeze.compress.quantize import QuantizeStage
    from squeeze.compress.schemes import Layout


@contextmanager
def quantized(
    model: Model, integers: Mapping[str, IntegerWeight], biases: Mapping[str, Tensor], activations: str
) -> Iterator[None]:
    """The network with these weights as integers, inputs rounded, and these biases; as it was before, afterwards."""
    parameters = dict(model.network.named_parameters())
    before = {name: parameters[name].clone() for name in (*integers, *biases)}
    undo: list[Callable[[], object]] = []
    try:
        with torch.no_grad():
            for name, integer in integers.items():
                parameters[name].copy_(integer.dequantize())
            for name, bias in biases.items():
                parameters[name].copy_(bias)
        undo = simulate_activations(replace(model, integers=dict(integers), activations=activations))
        yield
    finally:
        for back in undo:
            back()
        with torch.no_grad():
            for name, tensor in before.items():
                parameters[name].copy_(tensor)


@dataclass
class Mixture:
    """What came of the choice: new plans, and what the report says."""

    plans: dict[str, Plan]
    errors: dict[str, float]
    reasons: dict[str, str]
    """Why a layer is kept, for those that are not float and so have no note of their own."""
    notes: tuple[str, ...]
    meter: Meter
    budget: float | None

    def annotated(self, rows: Sequence[LayerRow]) -> list[LayerRow]:
        """The table of layers with sensitivities and reasons."""
        return [
            row.model_copy(
                update={
                    "sensitivity": self.errors.get(row.name),
                    "sensitivity_unit": self.meter.unit if row.name in self.errors else "",
                    "note": "; ".join(filter(None, (row.note, self.reasons.get(row.name)))),
                }
            )
            for row in rows
        ]

    def outcome(self, model: Model) -> tuple[str, ...]:
        """The quantized network as it will be saved, against what was predicted of it."""
        undo = simulate_activations(model)
        try:
            error = self.meter.distance()
        finally:
            for back in undo:
                back()
        stored = sum(w.stored_bytes for w in model.integers.values())
        stored += 4 * (model.parameters - sum(w.integers.numel() for w in model.integers.values()))
        said = f"as saved: {error:.3g} {self.meter.unit}, {stored / MEGABYTE:.2f} MB"
        if self.budget is not None and error > self.budget:
            said += f"; the budget of {self.budget:g} does NOT hold"
        return (said,)


def mix(
    model: Model, stage: "QuantizeStage", mixed: MixedSettings, layout: "Layout", plans: dict[str, Plan], calibration: Batches,
    folded: set[nn.Module], done: Done | None = None,
) -> Mixture:  # fmt: skip
    """Measure every layer that the plans quantize, choose which are kept, and plan anew.

    `folded` are layers whose inputs a norm has made smooth. The network is the same afterwards. Raises QuantizeError for goals that
    cannot be reached.
    """
    fallback = mixed.fallback or ("int8" if layout.bits == 4 else "float")
    treated, biases = _trial(model, stage, layout, plans, calibration, folded)
    meter = Meter(model, calibration, mixed.texts)
    bench = _Bench(model, layout.activations, plans, fallback, treated, biases, meter)
    candidates = bench.measure_each(done)
    fixed = 4 * (model.parameters - sum(plans[name].weight.numel() for one in candidates for name in one.names))
    tried: list[tuple[int, float]] = []
    if mixed.size is not None:
        kept = for_size(candidates, int(mixed.size * MEGABYTE), fixed)
    else:
        kept, tried = for_budget(candidates, mixed.budget or 0, bench.measure_whole, meter.unit)
    order = {one.names: number for number, one in enumerate(ranked(candidates), start=1)}
    better, reasons = dict(plans), {}
    for one in kept:
        why = f"alone, its integers cost {one.error:.2g} {meter.unit}; number {order[one.names]} of {len(order)} by error for each byte"
        for name in one.names:
            plan = _better(plans[name], fallback)
            better[name] = replace(plan, note=f"kept in float: {why}") if plan.grid is None else plan
            if plan.grid is not None:
                reasons[name] = f"kept at 8 bits: {why}"
    if all(plan.note for plan in better.values()):
        raise QuantizeError(
            f"budget {mixed.budget:g} leaves no layer to quantize. Allow more, or choose a more exact scheme."
        )
    none, chosen = (dict(tried).get(len(some)) for some in ((), kept))
    none = bench.measure_whole([]) if none is None else none
    chosen = bench.measure_whole(kept) if chosen is None else chosen
    size = fixed + sum(one.low_bytes for one in candidates)
    with_kept = size + sum(one.extra_bytes for one in kept)
    notes = (
        f"each of {len(candidates)} layers quantized alone, on {meter.texts} calibration texts: {meter.unit} in the table of layers",
        f"mixed precision: {len(kept)} of {len(order)} layers kept {'in float' if fallback == 'float' else 'at 8 bits'}; "
        f"weights {size / MEGABYTE:.2f} MB without, {with_kept / MEGABYTE:.2f} MB with them",
        f"error without them: {predicted(candidates, ()):.3g} predicted (sum of layers), {none:.3g} measured; with them: "
        f"{predicted(candidates, kept):.3g} predicted, {chosen:.3g} measured ({meter.unit}, weights to nearest)",
    )  # fmt: skip
    errors = {name: one.error for one in candidates for name in one.names}
    return Mixture(better, errors, reasons, notes, meter, mixed.budget)


def _trial(
    model: Model, stage: "QuantizeStage", layout: "Layout", plans: dict[str, Plan], calibration: Batches, folded: set[nn.Module]
) -> tuple[dict[str, IntegerWeight], dict[str, Tensor]]:  # fmt: skip
    """Integers that plain rounding does not give, where the scheme has such (fixed ranges, divisors), and the biases that go with
    them: from a treatment of all layers, of which the network keeps nothing."""
    plain = stage.model_copy(update={"method": "round"})
    if not plain.treats(layout):
        return {}, {}
    from squeeze.compress.treatment import Treatment

    before = {name: tensor.clone() for name, tensor in model.network.named_parameters()}
    try:
        Treatment(model, plain, layout, plans, folded=folded, alpha=stage.alpha(layout)).walk(calibration, None)
        now = dict(model.network.named_parameters())
        biases = {f"{name.removesuffix('.weight')}.bias" for name in model.integers} & set(now)
        return dict(model.integers), {name: now[name].clone() for name in biases}
    finally:
        model.integers.clear()
        with torch.no_grad():
            for name, tensor in model.network.named_parameters():
                tensor.copy_(before[name])


@dataclass
class _Bench:
    """The network on the bench: layers quantized alone, or all but some."""

    model: Model
    activations: str
    plans: dict[str, Plan]
    fallback: str
    treated: dict[str, IntegerWeight]
    biases: dict[str, Tensor]
    meter: Meter

    def measure_each(self, done: Done | None) -> list[Candidate]:
        """Every unit alone, in the order of the plans; they are met in the order in which they run."""
        modules = readers(self.model.network)
        units = {unit: [m for name in unit for m in modules[name]] for unit in _units(self.model.network, self.plans)}
        errors = measured_in_order(self.meter.playback, units, self._alone, done)
        return [self._candidate(unit, errors.get(unit, 0.0)) for unit in units]  # 0 where no text reaches it

    def measure_whole(self, kept: Sequence[Candidate]) -> float:
        """All units quantized, `kept` in the better precision."""
        better = {name for one in kept for name in one.names}
        integers: dict[str, IntegerWeight] = {}
        for name, plan in self.plans.items():
            chosen = _better(plan, self.fallback) if name in better else plan
            if chosen.grid is not None:
                integers[name] = chosen.to_nearest() if name in better else self._integer(name)
        return self._distance(integers)

    def _alone(self, unit: tuple[str, ...]) -> float:
        return self._distance({name: self._integer(name) for name in unit})

    def _distance(self, integers: dict[str, IntegerWeight]) -> float:
        biases = {
            bias: tensor
            for bias, tensor in self.biases.items()
            if any(bias == f"{name.removesuffix('.weight')}.bias" for name in integers)
        }
        with quantized(self.model, integers, biases, self.activations):
            return self.meter.distance()

    def _integer(self, name: str) -> IntegerWeight:
        return self.treated[name] if name in self.treated else self.plans[name].to_nearest()

    def _candidate(self, unit: tuple[str, ...], error: float) -> Candidate:
        low = sum(self._integer(name).stored_bytes for name in unit)
        better = [_better(self.plans[name], self.fallback) for name in unit]
        if any(plan is self.plans[name] for plan, name in zip(better, unit, strict=True)):
            return Candidate(unit, error, low, None)
        high = sum(4 * plan.weight.numel() if plan.grid is None else plan.to_nearest().stored_bytes for plan in better)
        return Candidate(unit, error, low, high)


def _better(plan: Plan, fallback: str) -> Plan:
    """The plan of a layer that is kept; the same plan where it is in 8 bits already and may not be float."""
    if fallback == "float":
        return Plan(plan.weight, plan.transposed, "kept in float")
    if plan.grid is None or plan.grid.bits == 8:
        return plan
    return replace(plan, grid=Grid(8, symmetric=True, unsigned=True))


def _units(network: nn.Module, plans: Mapping[str, Plan]) -> list[tuple[str, ...]]:
    """Names of the weights that become integers together or not at all, in the order of the plans."""
    groups = {name: tuple(dict.fromkeys(group)) for group in kernel_groups(network) for name in group}
    return list(dict.fromkeys(groups.get(name, (name,)) for name, plan in plans.items() if plan.grid is not None))
