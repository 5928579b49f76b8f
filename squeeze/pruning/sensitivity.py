"""What pruning each part of a network alone costs its answers, at some sparsities, all else dense.

A part is a matrix, all matrices of a block, or the attention heads or feed-forward neurons of a block. Weights are chosen by the
stage's own criterion, from what the dense network's matrices read of the calibration texts; the distance is `playback.Meter`'s: nats of
KL divergence, for embeddings 1 − cosine.

Cost. Statistics take one pass over all calibration texts. A measurement then costs the blocks from the changed one on, half of the
network on average, over TEXTS × LENGTH tokens (4 × 128 of a decoder). A whole such pass took 3.2 processor seconds with a network of
SmolLM2-135M's shape, its last two blocks and output matrix 0.8, so on two free cores 30 blocks at 5 sparsities are about two and a half
minutes, and 210 matrices at 3 sparsities about ten. Distributions are compared at 256 of the 512 tokens, because the output matrix of a
small model with a large vocabulary costs as much as eight blocks.

Rejected: pruning the blocks before as well, as they will be in the end. It orders the blocks by where they stand: the last would seem
harmless because everything is broken by then. Rejected too: a criterion's weight update in the scan (SparseGPT): its masks are used,
its update of the remaining weights would cost a Cholesky factorization for each figure, and does not change which matrix matters more.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from squeeze import parts
from squeeze.distillation.importance import head_importance, neuron_importance
from squeeze.errors import PruneError, QuantizeError
from squeeze.layerwise import Gram, repeated_blocks, width
from squeeze.model import Model
from squeeze.narrowing import cacheless
from squeeze.playback import Batches, Done, Meter, measured_in_order
from squeeze.pruning.allocation import outlier_allocation, outlier_share
from squeeze.pruning.settings import PruneStage
from squeeze.report.sensitivity_table import Kind, Scanned, SensitivityTable

if TYPE_CHECKING:
    from squeeze.pruning.criteria import Seen

TEXTS = {"causal-lm": 4, "text-classification": 32, "feature-extraction": 32}
"""Calibration texts that answers are compared on."""
LENGTH, TOKENS = 128, 256
"""A decoder's texts are cut to so many tokens; its distributions are compared at so many, all texts together."""
AROUND = 0.2
"""An allocation's scan tries the target, and so much less and more."""


@dataclass(frozen=True)
class Matrix:
    """One matrix that can be pruned."""

    name: str
    """Of its parameter."""
    module: nn.Module
    layer: int | None
    """Number of its block; None outside."""
    part: str
    """Its name in the block, or the whole one."""

    @property
    def weight(self) -> Tensor:
        """The parameter, as it is stored."""
        found: Tensor = self.module.weight  # type: ignore[assignment]
        return found

    @property
    def rows(self) -> Tensor:
        """The weights as [out, in], whichever way they are stored: a view."""
        return self.weight if isinstance(self.module, nn.Linear) else self.weight.T


def default_sparsities(stage: PruneStage) -> tuple[float, ...]:
    """What a scan tries where nothing is said: N:M has one sparsity; an allocation needs those around its target."""
    if ":" in stage.pattern:
        zeros, of = (int(part) for part in stage.pattern.split(":"))
        return (zeros / of,)
    if stage.sparsity is None:
        return (0.3, 0.5, 0.7)
    return tuple(sorted({round(min(0.95, max(0.05, stage.sparsity + step)), 4) for step in (-AROUND, 0, AROUND)}))


def sensitivity_table(
    model: Model, batches: Batches, stage: PruneStage, sparsities: Sequence[float] = (), done: Done | None = None, *,
    by: Kind = "matrix", texts: int | None = None, gradients: Mapping[str, Tensor] | None = None,
) -> SensitivityTable:  # fmt: skip
    """`scan`, with what a reader of its figures must know."""
    meter = _meter(model, batches, texts)
    rows = _scan(model, batches, stage, sparsities or default_sparsities(stage), done, by, meter, gradients)
    is_mask = by in ("matrix", "block")
    return SensitivityTable(
        source=model.source, task=model.task, criterion=stage.criterion if is_mask else "what they add to the hidden states",
        pattern=stage.pattern if is_mask else "unstructured", unit=meter.unit, texts=meter.texts, rows=rows,
    )  # fmt: skip


def scan(
    model: Model, batches: Batches, stage: PruneStage, sparsities: Sequence[float], done: Done | None = None, *,
    by: Kind = "matrix", texts: int | None = None, gradients: Mapping[str, Tensor] | None = None,
) -> tuple[Scanned, ...]:  # fmt: skip
    """Each part of the network pruned alone to each sparsity, and what the answers lose; the network is the same afterwards.

    `gradients`: parameter name -> gradient [out, in], for criteria that need them. `done(i, n)` is called after block i
    of n. Raises PruneError where there are no texts, nothing to prune, a sparsity outside (0, 1), or gradients wanted and not given.
    """
    return _scan(model, batches, stage, sparsities, done, by, _meter(model, batches, texts), gradients)


def _meter(model: Model, batches: Batches, texts: int | None) -> Meter:
    if model.integers or model.half:
        raise PruneError(f"{model.source} is quantized. Scan the float artifact that it was made from.")
    if not batches:
        raise PruneError(
            "sensitivity is measured on calibration texts, and there are none. Set data.splits.calibration, to 16 say; or --data."
        )
    return Meter(model, batches, texts or TEXTS[model.task], length=LENGTH, tokens=TOKENS, fault=PruneError)


def _scan(
    model: Model, batches: Batches, stage: PruneStage, sparsities: Sequence[float], done: Done | None, by: Kind, meter: Meter,
    gradients: Mapping[str, Tensor] | None,
) -> tuple[Scanned, ...]:  # fmt: skip
    wrong = [s for s in sparsities if not 0 < s < 1]
    if wrong or not sparsities:
        said = f"sparsity {wrong[0]:g} is not in (0, 1)" if wrong else "no sparsity is given"
        raise PruneError(f"{said}: a scan needs shares of the weights to set to zero, such as 0.3, 0.5 and 0.7.")
    shares = sorted(set(sparsities))
    if by in ("heads", "neurons"):
        return _scan_parts(model, batches, shares, done, by, meter)
    matrices = prunable(model.network, stage.keep)
    units = _units(model.network, matrices, by)
    chooser = _Chooser(stage, statistics(model, batches, matrices, stage, gradients))

    def measure(unit: str) -> list[float]:
        losses = []
        scores = {matrix.name: chooser.score(matrix) for matrix in units[unit]}
        for share in shares:
            with hidden_weights({m: chooser.keep(scores[m.name], share) for m in units[unit]}):
                losses.append(meter.distance())
        return losses

    found = measured_in_order(meter.playback, {u: [m.module for m in ms] for u, ms in units.items()}, measure, done)
    return tuple(
        Scanned(
            unit=unit, kind=by, layer=members[0].layer, part="" if by == "block" else members[0].part,
            names=tuple(m.name for m in members), weights=sum(m.weight.numel() for m in members), sparsity=share, loss=loss,
        )
        for unit, members in units.items() for share, loss in zip(shares, found.get(unit, [0.0] * len(shares)), strict=True)
    )  # fmt: skip


def prunable(network: nn.Module, keep: Sequence[str] = ()) -> list[Matrix]:
    """The linear layers of the repeated blocks, in order; of a network without blocks, all but those that give the answer.

    `keep`: names, with * and ?, of those that stay dense. Raises PruneError where a name matches nothing, and where nothing is left.
    """
    from transformers.pytorch_utils import Conv1D

    try:
        path, blocks = repeated_blocks(network)
        roots: list[tuple[str, int | None, nn.Module]] = [(f"{path}.{n}", n, block) for n, block in enumerate(blocks)]
    except QuantizeError:
        roots = [("", None, network)]
    found: dict[int, Matrix] = {}
    for root, number, module in roots:
        for name, part in module.named_modules():
            full = ".".join(filter(None, (root, name)))
            if isinstance(part, nn.Linear | Conv1D) and not (number is None and _answers(network, part)):
                found.setdefault(id(part.weight), Matrix(f"{full}.weight", part, number, name or full))
    unused = [pattern for pattern in keep if not any(_matches(m, pattern) for m in found.values())]
    if unused:
        known = ", ".join(m.name for m in list(found.values())[:3])
        raise PruneError(f"keep: {unused[0]!r} matches no matrix that could be pruned. There are {known} and so on.")
    left = [m for m in found.values() if not any(_matches(m, pattern) for pattern in keep)]
    if not left:
        raise PruneError(f"{type(network).__name__} has no linear layer that could be pruned, or keep names them all.")
    return left


def _answers(network: nn.Module, module: nn.Module) -> bool:
    get = getattr(network, "get_output_embeddings", None)
    head = get() if callable(get) else getattr(network, "lm_head", None)
    return module is head or module is getattr(network, "classifier", None)


def _matches(matrix: Matrix, pattern: str) -> bool:
    return fnmatch(matrix.name, pattern) or fnmatch(matrix.name.removesuffix(".weight"), pattern)


def _units(network: nn.Module, matrices: Sequence[Matrix], by: Kind) -> dict[str, list[Matrix]]:
    if by == "matrix" or matrices[0].layer is None:
        return {matrix.name: [matrix] for matrix in matrices}
    path, _ = repeated_blocks(network)
    units: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        units.setdefault(f"{path}.{matrix.layer}", []).append(matrix)
    return units


# Which weights


@dataclass
class _Chooser:
    """A stage's way from weights, and what is known of them, to a mask."""

    stage: PruneStage
    seen: "Mapping[str, Seen]"

    def score(self, matrix: Matrix) -> Tensor:
        """What each weight is worth, [out, in]."""
        from squeeze.pruning.criteria import CRITERIA

        with torch.no_grad():
            return CRITERIA[self.stage.criterion].score(matrix.rows, self.seen[matrix.name])

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        """Which weights stay, [out, in]."""
        from squeeze.pruning.criteria import CRITERIA
        from squeeze.pruning.patterns import keep_mask

        scope = self.stage.scope or CRITERIA[self.stage.criterion].scope
        # Of one matrix alone, all that are ranked together globally are its own.
        return keep_mask(scores, sparsity, self.stage.pattern, "layer" if scope == "global" else scope)


@contextmanager
def hidden_weights(masks: Mapping[Matrix, Tensor]) -> Iterator[None]:
    """While it lasts the weights whose mask is False are zero; as they were, afterwards."""
    before = {matrix: matrix.weight.detach().clone() for matrix in masks}
    try:
        with torch.no_grad():
            for matrix, mask in masks.items():
                matrix.rows.mul_(mask.to(matrix.rows))
        yield
    finally:
        with torch.no_grad():
            for matrix, weight in before.items():
                matrix.weight.copy_(weight)


@dataclass
class _Reading:
    """What one matrix has read: squares summed for each input, or the Gram matrix."""

    squares: Tensor
    gram: Gram | None
    tokens: int = 0


@dataclass
class _Pass:
    """The batch that is going through the network, and who reads what."""

    valid: Tensor | None = None
    last: Tensor | None = None
    source: str = ""
    same: dict[str, str] = field(default_factory=dict)
    """Matrix -> the one just before it that reads the same tensor, and whose statistics are its own."""


def statistics(
    model: Model, batches: Batches, matrices: Sequence[Matrix], stage: PruneStage, gradients: Mapping[str, Tensor] | None = None
) -> "dict[str, Seen]":  # fmt: skip
    """What the stage's criterion needs to know of each matrix of the dense network, from one pass over the calibration texts.

    Gram matrices are kept once for matrices that read one tensor: 0.4 GB for SmolLM2-135M. Raises PruneError for gradients that
    are not given, and for matrices that no text reaches.
    """
    from squeeze.pruning.criteria import CRITERIA, Seen

    needs = CRITERIA[stage.criterion].needs
    if gradients is None and any("gradient" in need for need in needs):
        raise PruneError(
            f"{stage.criterion} needs gradients, and a scan only runs the network forwards. Scan with wanda, or with magnitude."
        )
    readings, same = (
        _read(model, batches, matrices, with_gram="gram" in needs) if needs & {"norms", "gram"} else ({}, {})
    )
    found = {}
    for number, matrix in enumerate(matrices):
        reading = readings.get(same.get(matrix.name, matrix.name))
        found[matrix.name] = Seen(
            norms=None if reading is None else (reading.squares / reading.tokens).sqrt(),
            gram=None if reading is None or reading.gram is None else reading.gram.matrix,
            gradient=None if gradients is None else gradients[matrix.name],
            generator=torch.Generator().manual_seed(stage.seed + number),
        )  # fmt: skip
    return found


def _read(
    model: Model, batches: Batches, matrices: Sequence[Matrix], *, with_gram: bool
) -> tuple[dict[str, _Reading], dict[str, str]]:  # fmt: skip
    readings: dict[str, _Reading] = {}
    now = _Pass()

    def watch(matrix: Matrix) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if x is now.last and (matrix.name in now.same or matrix.name not in readings):
                now.same[matrix.name] = now.source
                return
            now.last, now.source = x, matrix.name
            rows = x if now.valid is None or x.shape[:-1] != now.valid.shape else x[now.valid]
            rows = rows.reshape(-1, x.shape[-1]).float()
            columns = width(matrix.module)
            reading = readings.setdefault(
                matrix.name, _Reading(torch.zeros(columns), Gram(torch.zeros(columns, columns)) if with_gram else None)
            )
            reading.squares += rows.square().sum(0)
            reading.tokens += len(rows)
            if reading.gram is not None:
                reading.gram.add(rows)

        return hook

    trunk: Any = getattr(model.network, "base_model", model.network)
    with ExitStack() as hooks, torch.no_grad():
        for matrix in matrices:
            hooks.callback(matrix.module.register_forward_pre_hook(watch(matrix)).remove)
        for batch in batches:
            inputs = {name: torch.from_numpy(batch[name]) for name in model.text_inputs if name in batch}
            mask = inputs.get("attention_mask")
            now.valid, now.last = None if mask is None or bool(mask.all()) else mask.bool(), None
            trunk(**inputs, **cacheless(trunk))
    dead = [m.name for m in matrices if not (r := readings.get(now.same.get(m.name, m.name))) or not r.tokens]
    if dead:
        raise PruneError(f"{dead[0]} was not reached by the calibration texts. Keep it dense: keep: [{dead[0]!r}].")
    broken = [name for name, reading in readings.items() if not bool(reading.squares.isfinite().all())]
    if broken:
        raise PruneError(f"the inputs of {broken[0]} are not finite on the calibration texts. Repair the checkpoint.")
    return readings, now.same


# Heads and neurons


def _scan_parts(
    model: Model, batches: Batches, shares: Sequence[float], done: Done | None, by: Literal["heads", "neurons"], meter: Meter
) -> tuple[Scanned, ...]:  # fmt: skip
    """The least important heads or neurons of each layer hidden, all other layers whole."""
    network = model.network
    tensors = [{n: torch.from_numpy(b[n]) for n in model.text_inputs if n in b} for b in batches]
    path, _ = parts.blocks(network)
    if by == "heads":
        scores = head_importance(network, tensors)
        names: list[tuple[str, ...]] = [(site.queries, site.output) for site in parts.attentions(network)]
        only: Any = parts.only_heads
    else:
        scores = neuron_importance(network, tensors)
        names = [(*site.writers, site.reader) for site in parts.feed_forwards(network)]
        only = parts.only_neurons
    everything = [tuple(range(len(score))) for score in scores]
    gone = {n: _fewest(len(score), shares) for n, score in enumerate(scores)}

    def measure(layer: int) -> list[float]:
        order = scores[layer].argsort().tolist()
        losses = []
        for count in gone[layer].values():
            kept = list(everything)
            kept[layer] = tuple(sorted(order[count:]))
            with only(network, kept):
                losses.append(meter.distance())
        return losses

    readers = {layer: [network.get_submodule(each[-1])] for layer, each in enumerate(names)}
    found = measured_in_order(meter.playback, readers, measure, done)
    return tuple(
        Scanned(
            unit=f"{path}.{layer}", kind=by, layer=layer, part=by, sparsity=share, loss=loss,
            weights=sum(_weight(network, name).numel() for name in names[layer]),
        )
        for layer in found for share, loss in zip(gone[layer], found[layer], strict=True)
    )  # fmt: skip


def _fewest(number: int, shares: Sequence[float]) -> dict[float, int]:
    """Share asked -> how many of `number` parts are hidden, one at least and not all; shares that hide equally many come once."""
    counts = {share: min(number - 1, max(1, round(share * number))) for share in shares} if number > 1 else {}
    again = {b for a, b in pairwise(counts) if counts[a] == counts[b]}
    return {share: count for share, count in counts.items() if share not in again}


def _weight(network: nn.Module, name: str) -> Tensor:
    found: Tensor = network.get_submodule(name).weight  # type: ignore[assignment]
    return found


# Outliers


def outliers(model: Model, batches: Batches, stage: PruneStage) -> dict[str, float]:
    """OWL's sparsities for the stage (arXiv:2310.05175): each layer's share of outliers among Wanda's scores |w| · ‖x‖ decides.

    Raises PruneError for a stage without a sparsity, and a network without repeated blocks.
    """
    if stage.sparsity is None:
        raise PruneError("allocation: owl spreads a sparsity, and none is given. Set sparsity, to 0.5 say.")
    matrices = prunable(model.network, stage.keep)
    if matrices[0].layer is None:
        raise PruneError(
            f"{type(model.network).__name__} has no layers to spread sparsity over. Use allocation: uniform."
        )
    layers: dict[str, list[Matrix]] = _units(model.network, matrices, "block")
    readings, same = _read(model, batches, matrices, with_gram=False)

    def score(matrix: Matrix) -> Tensor:
        reading = readings[same.get(matrix.name, matrix.name)]
        return matrix.rows.detach().abs() * (reading.squares / reading.tokens).sqrt()

    shares = {layer: outlier_share([score(matrix) for matrix in members]) for layer, members in layers.items()}
    sizes = {layer: {m.name: m.weight.numel() for m in members} for layer, members in layers.items()}
    return outlier_allocation(shares, sizes, stage.sparsity)
