"""What each layer's integers cost the network's answers, measured once; and the plans that come of a choice among the layers.

One layer at a time becomes what the scheme would make of it, its weights to nearest on their grid and its inputs rounded as its
kernel rounds them, while all others stay float. The distance of the answers from the float ones is the layer's sensitivity. For
small errors KL divergence and 1 − cosine are quadratic forms of them, so independent errors of layers add up; the report has the sum
beside the network measured as a whole, since independence is an assumption.
Nothing before the layer is run again: blocks are entered with what the float blocks before them gave, kept of one block alone.

Rejected: sensitivity from the weights' SQNR (it does not know what a layer is for), or from gradients (they are zero where the
divergence has its minimum, at the float network; second derivatives cost more than measuring).
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from squeeze.compress.mixed import MEGABYTE, Candidate, MixedSettings, for_budget, for_size, predicted, ranked
from squeeze.compress.plan import Plan
from squeeze.errors import QuantizeError
from squeeze.evaluate import embed, probes
from squeeze.integers import Grid, IntegerWeight
from squeeze.layerwise import repeated_blocks
from squeeze.model import Model, aliases, answer
from squeeze.recurrent import kernel_groups
from squeeze.report.schema import LayerRow
from squeeze.simulation import simulate_activations

if TYPE_CHECKING:
    from squeeze.compress.quantize import QuantizeStage
    from squeeze.compress.schemes import Layout

Batches = Sequence[Mapping[str, NDArray[np.int64]]]
Done = Callable[[int, int], None]

UNITS = {"causal-lm": "nats per token", "text-classification": "nats per text", "feature-extraction": "1 − cosine"}
"""Of the distance between two networks' answers, for each task."""
TEXTS = {"causal-lm": 2, "text-classification": 64, "feature-extraction": 64}
TOKENS = 512
"""Positions of all blocks together at which a decoder's distributions are compared: 100 MB for a vocabulary of 49,152."""


class Playback:
    """A network on fixed texts, entered at any of its blocks; it keeps what one block gave, and no more.

    `positions`: where a decoder's logits are wanted; those that can give them there alone do so.
    """

    def __init__(self, network: nn.Module, texts: list[dict[str, Tensor]], positions: Tensor | None = None) -> None:
        self.network, self.texts = network, texts
        takes = inspect.signature(network.forward).parameters
        self.settings: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        if positions is not None and "logits_to_keep" in takes:
            self.settings["logits_to_keep"] = positions
        self.depth = 0
        """How many blocks are not run any more."""
        self.given: list[Any] = []
        """What the last of them gave for each batch of texts."""
        try:
            blocks = list(repeated_blocks(network)[1])
        except QuantizeError:
            blocks = []
        self.blocks: list[nn.Module] = blocks
        self.first_at = self._places()

    def _places(self) -> dict[nn.Module, int]:
        """For every module that is run, how many blocks have ended before. Blocks that are not run once each, in order, cannot be
        entered: then there are none."""
        ended = 0
        order: list[nn.Module] = []
        at: dict[nn.Module, int] = {}

        def starts(module: nn.Module, _: object) -> None:
            at.setdefault(module, ended)
            if module in inside:
                order.append(module)

        def ends(*_: object) -> None:
            nonlocal ended
            ended += 1

        inside = set(self.blocks)
        hooks = [module.register_forward_pre_hook(starts) for module in self.network.modules()]
        hooks += [block.register_forward_hook(ends) for block in self.blocks]
        try:
            self.run(0)
        finally:
            for hook in hooks:
                hook.remove()
        if order != self.blocks or any("forward" in vars(block) for block in self.blocks):
            self.blocks = []
            return dict.fromkeys(at, 0)
        return at

    def run(self, number: int) -> Any:
        """What the network gives for batch `number`, the blocks up to `depth` as they were when they were passed."""
        passed = self.blocks[: self.depth]
        try:
            for block in passed:
                block.forward = lambda *_, **__: _fresh(self.given[number])
            return self.network(**self.texts[number], **self.settings)
        finally:
            for block in passed:
                vars(block).pop("forward", None)

    def advance(self) -> None:
        """Pass the next block, with the network as it is now."""
        given: list[Any] = []

        def ended(_: nn.Module, __: object, output: Any) -> None:
            given.append(output)
            raise _Passed

        hook = self.blocks[self.depth].register_forward_hook(ended)
        try:
            for number in range(len(self.texts)):
                with suppress(_Passed):
                    self.run(number)
        finally:
            hook.remove()
        self.given = given
        self.depth += 1

    def rewind(self) -> None:
        """Back to the whole network."""
        self.depth, self.given = 0, []


class _Passed(Exception):
    """The block that a pass was for has ended."""


def _fresh(output: Any) -> Any:
    """A block's output, its hidden state copied: a network may add to it in place."""
    return output.clone() if isinstance(output, Tensor) else (output[0].clone(), *output[1:])


class Meter:
    """The float network's answers to some calibration texts, and how far it is from them once it has been changed."""

    def __init__(self, model: Model, calibration: Batches, texts: int | None) -> None:
        self.model, self.unit = model, UNITS[model.task]
        self.batches = _some(calibration, model, texts or TEXTS[model.task])
        self.texts = sum(len(batch["input_ids"]) for batch in self.batches)
        tensors = [{name: torch.from_numpy(a) for name, a in batch.items()} for batch in self.batches]
        self.positions: Tensor | None = None
        if model.task == "causal-lm":
            length = min(batch["input_ids"].shape[1] for batch in self.batches)
            self.positions = torch.from_numpy(probes(length, max(1, TOKENS // self.texts)))
        with torch.no_grad():
            self.playback = Playback(model.network, tensors, self.positions)
            self.exact = [self._answers(number) for number in range(len(self.batches))]

    def distance(self) -> float:
        """Mean over texts or tokens of how far the answers are now. Raises QuantizeError where they are not finite."""
        total, count = 0.0, 0
        with torch.no_grad():
            for number, exact in enumerate(self.exact):
                found = self._answers(number)
                is_embedding = self.model.task == "feature-extraction"
                apart = (found - exact).square().sum(dim=-1) / 2 if is_embedding else divergence(exact, found)
                total += float(apart.double().sum())
                count += len(apart)
        if not np.isfinite(total):
            raise QuantizeError(
                f"{self.model.source} answers NaN or infinity on the calibration texts. Repair the checkpoint; nothing was written."
            )
        return total / count

    def _answers(self, number: int) -> Tensor:
        """Log-probabilities [tokens or texts, classes], or unit embeddings [texts, width]."""
        batch = self.batches[number]
        out = answer(self.playback.run(number), self.model.task)
        mask = batch.get("attention_mask", np.ones_like(batch["input_ids"]))
        if self.model.task == "feature-extraction":
            return torch.from_numpy(embed(out.numpy(), mask))
        if self.positions is not None:
            out = out if "logits_to_keep" in self.playback.settings else out[:, self.positions]
            out = out[torch.from_numpy(mask).bool()[:, self.positions]]
        return out.float().log_softmax(dim=-1)


def divergence(exact: Tensor, found: Tensor) -> Tensor:
    """KL(exact ‖ found) of each row of log-probabilities [rows, classes].

    As log E[eᵈ] − E[d] with d = found − exact and expectations under `exact`: written out, Σ p (log p − log q) loses what is below
    the rounding of log p, which for a layer that hardly matters is all there is.
    """
    p, d = exact.exp(), found - exact
    d = d - (p * d).sum(dim=-1, keepdim=True) / p.sum(dim=-1, keepdim=True)
    small = torch.log1p((p * torch.expm1(d)).sum(dim=-1).clamp(min=0))
    return torch.where(small.isfinite(), small, torch.logsumexp(exact + d, dim=-1))


def _some(calibration: Batches, model: Model, count: int) -> list[dict[str, NDArray[np.int64]]]:
    """`count` texts spread evenly over the calibration batches, as the network takes them; a decoder's one by one, for their logits
    are large."""
    where = [(number, row) for number, batch in enumerate(calibration) for row in range(len(batch["input_ids"]))]
    picked = [where[i] for i in np.unique(np.linspace(0, len(where) - 1, min(count, len(where))).round().astype(int))]
    rows: dict[tuple[int, int], list[int]] = {}
    for number, row in picked:
        rows.setdefault((number, row if model.task == "causal-lm" else 0), []).append(row)
    return [
        {name: calibration[number][name][chosen] for name in model.text_inputs if name in calibration[number]}
        for (number, _), chosen in rows.items()
    ]


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
        network, playback = self.model.network, self.meter.playback
        readers = _readers(network)
        units = _units(network, self.plans)
        at = {
            unit: min((playback.first_at.get(module, -1) for name in unit for module in readers[name]), default=-1)
            for unit in units
        }
        errors = dict.fromkeys(units, 0.0)  # stays so where no text reaches it
        last = len(playback.blocks)
        for depth in range(last + 1):
            for unit in units:
                if at[unit] == depth:
                    errors[unit] = self._alone(unit)
            if depth < last:
                with torch.no_grad():
                    playback.advance()
            if done is not None and last:
                done(min(depth + 1, last), last)
        playback.rewind()
        return [self._candidate(unit, errors[unit]) for unit in units]

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


def _readers(network: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules that hold each parameter, by its first name."""
    shared, found = aliases(network), dict[str, list[nn.Module]]()
    for path, module in network.named_modules():
        for own, _ in module.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            found.setdefault(shared.get(name, name), []).append(module)
    return found
