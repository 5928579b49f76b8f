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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from squeeze import parts
from squeeze.distillation.importance import head_importance, neuron_importance
from squeeze.errors import PruneError
from squeeze.model import Model
from squeeze.playback import Batches, Done, Meter, measured_in_order
from squeeze.pruning.criteria import CRITERIA, Seen
from squeeze.pruning.patterns import keep_mask
from squeeze.pruning.settings import PruneStage, n_of_m
from squeeze.pruning.statistics import Place, hidden_weights, layers_of, places, statistics
from squeeze.report.sensitivity_table import Kind, Scanned, SensitivityTable

TEXTS = {"causal-lm": 4, "text-classification": 32, "feature-extraction": 32}
"""Calibration texts that answers are compared on."""
LENGTH, TOKENS = 128, 256
"""A decoder's texts are cut to so many tokens; its distributions are compared at so many, all texts together."""
AROUND = 0.2
"""An allocation's scan tries the target, and so much less and more."""


def default_sparsities(stage: PruneStage) -> tuple[float, ...]:
    """What a scan tries where nothing is said: N:M has one sparsity; an allocation needs those around its target."""
    if n_of_m(stage.pattern) is not None:
        return (stage.share,)
    if stage.sparsity is None:
        return (0.3, 0.5, 0.7)
    return tuple(sorted({round(min(0.95, max(0.05, stage.sparsity + step)), 4) for step in (-AROUND, 0, AROUND)}))


def sensitivity_table(
    model: Model, batches: Batches, stage: PruneStage, sparsities: Sequence[float] = (), done: Done | None = None, *,
    by: Kind = "matrix", texts: int | None = None,
) -> SensitivityTable:  # fmt: skip
    """`scan`, with what a reader of its figures must know."""
    meter = _meter(model, batches, texts)
    rows = _scan(model, batches, stage, sparsities or default_sparsities(stage), done, by, meter)
    is_mask = by in ("matrix", "block")
    return SensitivityTable(
        source=model.source, task=model.task, criterion=stage.criterion if is_mask else "what they add to the hidden states",
        pattern=stage.pattern if is_mask else "unstructured", unit=meter.unit, texts=meter.texts, rows=rows,
    )  # fmt: skip


def scan(
    model: Model, batches: Batches, stage: PruneStage, sparsities: Sequence[float], done: Done | None = None, *,
    by: Kind = "matrix", texts: int | None = None,
) -> tuple[Scanned, ...]:  # fmt: skip
    """Each part of the network pruned alone to each sparsity, and what the answers lose; the network is the same afterwards.

    `done(i, n)` is called after block i of n. Raises PruneError where there are no texts, nothing to prune, a sparsity outside (0, 1), or a
    criterion that needs more than statistics of the dense network.
    """
    return _scan(model, batches, stage, sparsities, done, by, _meter(model, batches, texts))


def _meter(model: Model, batches: Batches, texts: int | None) -> Meter:
    if model.integers or model.half:
        raise PruneError(f"{model.source} is quantized. Scan the float artifact that it was made from.")
    if not batches:
        raise PruneError(
            "sensitivity is measured on calibration texts, and there are none. Set data.splits.calibration, to 16 say; or --data."
        )
    return Meter(model, batches, texts or TEXTS[model.task], length=LENGTH, tokens=TOKENS, fault=PruneError)


def _scan(
    model: Model, batches: Batches, stage: PruneStage, sparsities: Sequence[float], done: Done | None, by: Kind, meter: Meter
) -> tuple[Scanned, ...]:  # fmt: skip
    wrong = [s for s in sparsities if not 0 < s < 1]
    if wrong or not sparsities:
        said = f"sparsity {wrong[0]:g} is not in (0, 1)" if wrong else "no sparsity is given"
        raise PruneError(f"{said}: a scan needs shares of the weights to set to zero, such as 0.3, 0.5 and 0.7.")
    shares = sorted(set(sparsities))
    if by in ("heads", "neurons"):
        return _scan_parts(model, batches, shares, done, by, meter)
    found = places(model.network, stage.keep)
    units = layers_of(model.network, found) if by == "block" else {place.name: [place] for place in found}
    chooser = _Chooser(stage, statistics(model, batches, found, stage))

    def measure(unit: str) -> list[float]:
        losses = []
        scores = {place: chooser.score(place) for place in units[unit]}
        for share in shares:
            with hidden_weights({place: chooser.keep(each, share) for place, each in scores.items()}):
                losses.append(meter.distance())
        return losses

    modules = {unit: [place.module for place in members] for unit, members in units.items()}
    losses = measured_in_order(meter.playback, modules, measure, done)
    return tuple(
        Scanned(
            unit=unit, kind=by if members[0].layer is not None else "matrix", layer=members[0].layer,
            part="" if by == "block" else members[0].part, names=tuple(place.name for place in members),
            weights=sum(place.weights for place in members), sparsity=share, loss=loss,
        )
        for unit, members in units.items()
        for share, loss in zip(shares, losses.get(unit, [0.0] * len(shares)), strict=True)  # 0 where no text reaches it
    )  # fmt: skip


# Which weights


@dataclass
class _Chooser:
    """A stage's way from weights, and what is known of them, to a mask."""

    stage: PruneStage
    seen: Mapping[str, Seen]

    def score(self, place: Place) -> Tensor:
        """What each weight is worth, [out, in]."""
        return CRITERIA[self.stage.criterion].score(place.matrix.rows(), self.seen[place.name])

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        """Which weights stay, [out, in]."""
        scope = self.stage.scope or CRITERIA[self.stage.criterion].scope
        # Of one matrix alone, all that are ranked together globally are its own.
        return keep_mask(scores, sparsity, self.stage.pattern, "layer" if scope == "global" else scope)


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
