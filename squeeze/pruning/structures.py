"""Parts that a network can do without, removed: layers, attention heads, feed-forward neurons.

What remains is an ordinary, smaller Transformers network, proven on a probe to compute what the larger one computes without those parts
(`narrowing.py`). Every layer keeps equally many heads and neurons, as no config.json describes layers of unequal ones. Where none
describes fewer heads of the same size at all, as in BERT and its kin, heads become zero and the export leaves them out
(`silence.py`). Parts of one kind are ranked among those of their layer, so a factor by which a whole layer's scores differ from
another's, as Michel et al.'s norm, decides only where layers must keep the same heads (T5).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from squeeze.distillation.importance import block_influence, head_importance, neuron_importance
from squeeze.distillation.students import pinned, strongest
from squeeze.errors import PruneError, TrainError
from squeeze.narrowing import best_heads, best_neurons, head_counts, keep_heads, keep_layers, keep_neurons, keep_runs
from squeeze.parts import (
    Attention,
    attentions,
    config_of,
    feed_forwards,
    own_layers,
    shared_layer,
    tied_attentions,
)
from squeeze.pruning.gates import LABELS, layer_gates, loss_of, reader_gates
from squeeze.pruning.settings import RemoveSettings
from squeeze.report.schema import LayerRow
from squeeze.silence import silence_heads, speaking_heads

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from squeeze.model import Model

    Batches = Sequence[Mapping[str, NDArray[np.int64]]]
    Labels = Sequence[NDArray[np.int64]]

DEFAULTS = {"layers": "influence", "heads": "activation", "neurons": "activation"}
"""How parts are ranked where nothing is said, or what is said ranks parts of another kind."""


@dataclass
class Texts:
    """What parts are ranked by: the task, the texts, chance."""

    task: str
    criterion: str
    batches: Sequence[Mapping[str, Tensor]]
    """As the network takes them, with `labels` where there are some."""
    generator: torch.Generator

    @property
    def inputs(self) -> list[dict[str, Tensor]]:
        """Without labels."""
        return [{name: tensor for name, tensor in batch.items() if name != LABELS} for batch in self.batches]

    def uniform(self, count: int) -> Tensor:
        """`count` numbers in [0, 1)."""
        return torch.rand(count, generator=self.generator, dtype=torch.float64)


class PartsCriterion(NamedTuple):
    """How layers, heads and neurons are ranked: one score for each, the lowest goes. None: another criterion ranks that kind."""

    summary: str
    source: str
    needs_texts: bool
    needs_loss: bool
    layers: Callable[[Any, Texts], Sequence[float]] | None
    heads: Callable[[Any, Texts, Sequence[Attention]], Sequence[Tensor]] | None
    """float64 [heads] for each layer."""
    neurons: Callable[[Any, Texts], Sequence[Tensor]] | None
    """float64 [neurons] for each layer."""


def needs_texts(remove: RemoveSettings) -> bool:
    """Whether remove_parts measures on texts what goes."""
    return any(PARTS[name].needs_texts for name in _ranking(remove).values())


def needs_loss(remove: RemoveSettings) -> bool:
    """Whether it needs their labels, or next tokens, too."""
    return any(PARTS[name].needs_loss for name in _ranking(remove).values())


def remove_parts(
    model: "Model", remove: RemoveSettings, batches: "Batches", labels: "Labels | None" = None,
    done: Callable[[int, int], None] | None = None, *, seed: int = 0,
) -> tuple[tuple[str, ...], tuple[LayerRow, ...]]:  # fmt: skip
    """Remove layers, then heads, then neurons from `model`, in place; notes on what stays and why, and a row for each matrix that shrank.

    `batches` are texts as the network takes them, `labels` the classes of each batch's texts (else its own "labels" are taken). Parts
    are ranked anew after each cut. Raises PruneError, and leaves the model as it was, for what the architecture cannot do without, for
    more than there is, and for texts or labels that a criterion lacks.
    """
    asked = [kind for kind in ("layers", "heads", "neurons") if getattr(remove, kind) is not None]
    if not asked:
        raise PruneError("remove names nothing that goes. Give layers, heads or neurons.")
    if model.integers or model.half:
        raise PruneError(f"{model.source} is already quantized. Remove parts of the float artifact it was made from.")
    if model.pruned:
        raise PruneError(
            f"{model.source} has pruned matrices, whose zeros would move to other places. Remove parts first, then prune single weights."
        )
    given = _texts(model, remove, batches, labels, seed)
    network: Any = model.network
    notes: list[str] = []
    try:
        for number, kind in enumerate(asked):
            network, said = {"layers": _layers, "heads": _heads, "neurons": _neurons}[kind](network, remove, given)
            notes += said
            if done is not None:
                done(number + 1, len(asked))
    except TrainError as error:
        raise PruneError(_in_our_words(str(error))) from error
    rows = _rows(model.network, network)
    model.network, model.config = network, network.config.to_dict()
    return tuple(notes), rows


def _ranking(remove: RemoveSettings) -> dict[str, str]:
    """The criterion for each kind of part that must be ranked. PruneError for one that ranks no part which is asked for."""
    asked = [kind for kind in DEFAULTS if getattr(remove, kind) is not None]
    named = remove.criterion
    if named is not None and asked and all(getattr(PARTS[named], kind) is None for kind in asked):
        others = [name for name, criterion in PARTS.items() if getattr(criterion, asked[0]) is not None]
        raise PruneError(f"criterion {named} does not rank {' or '.join(asked)}. Use {', '.join(others)}.")
    return {
        kind: named if named is not None and getattr(PARTS[named], kind) is not None else DEFAULTS[kind]
        for kind in asked
        if not isinstance(getattr(remove, kind), tuple)
    }


def _texts(model: "Model", remove: RemoveSettings, batches: "Batches", labels: "Labels | None", seed: int) -> Texts:
    if needs_texts(remove) and not batches:
        raise PruneError("what goes is measured on texts, and there are none. Set data.splits.calibration; or --data.")
    if labels is not None and len(labels) != len(batches):
        raise PruneError(f"labels are given for {len(labels)} batches, and there are {len(batches)}.")
    found = []
    for number, batch in enumerate(batches):
        taken = {name: torch.as_tensor(batch[name]) for name in model.text_inputs if name in batch}
        classes = batch.get(LABELS) if labels is None else labels[number]
        if classes is not None:
            taken[LABELS] = torch.as_tensor(classes)
        found.append(taken)
    criterion = remove.criterion or "activation"
    if needs_loss(remove):
        loss_of(model.task, criterion, found)
    return Texts(model.task, criterion, found, torch.Generator().manual_seed(seed))


# One kind at a time


def _layers(network: Any, remove: RemoveSettings, texts: Texts) -> tuple[Any, list[str]]:
    asked = remove.layers
    shared = shared_layer(network)
    if shared is not None:
        if isinstance(asked, tuple) and (list(asked) != sorted(set(asked)) or not asked or asked[-1] >= shared[1]):
            raise PruneError(
                f"remove.layers = {list(asked)}: the layers that stay must rise, from 0 to at most {shared[1] - 1}."
            )
        count, said = (len(asked), []) if isinstance(asked, tuple) else _stay(asked, range(1, shared[1] + 1), "layers")
        same = f"its one layer runs {count} times in place of {shared[1]}: all runs are the same, so none is chosen"
        return keep_runs(network, count), [*said, same]
    have = len(own_layers(network)[1])
    if isinstance(asked, tuple):
        return keep_layers(network, asked), [f"layers {_numbers(asked)} of {have} stay, as asked"]
    count, said = _stay(asked, range(1, have + 1), "layers")
    if count > have:
        raise PruneError(f"remove.layers = {count}: the model has {have} layers, and {count} cannot stay.")
    name = _ranking(remove)["layers"]
    score = PARTS[name].layers
    assert score is not None  # by _ranking
    scores = tuple(score(network, texts))
    kept = strongest(scores, count, pinned(network))
    listed = ", ".join(f"{n}: {value:.3g}" for n, value in enumerate(scores))
    return keep_layers(network, kept), [*said, f"layers {_numbers(kept)} of {have} stay, by {name} ({listed})"]


def _heads(network: Any, remove: RemoveSettings, texts: Texts) -> tuple[Any, list[str]]:
    speaking = speaking_heads(network)
    sites = tied_attentions(network) or _attentions(network)
    have = sites[0].heads if not speaking else max(map(len, speaking))
    possible = range(1, have + 1) if speaking else (*head_counts(network), have)
    count, said = _stay(remove.heads, possible, "heads")
    if count > have:
        raise PruneError(f"remove.heads = {count}: each layer has {have} heads, and {count} cannot stay.")
    name = _ranking(remove)["heads"]
    score = PARTS[name].heads
    assert score is not None
    scores = score(network, texts, sites)
    if speaking:
        for each, heads in zip(scores, speaking, strict=True):
            each[[n for n in range(len(each)) if n not in heads]] = -1.0
        kept = tuple(tuple(sorted(each.topk(count).indices.tolist())) for each in scores)
        result = silence_heads(network, kept)
        model_type, size = config_of(network).model_type, sites[0].size
        why = (
            f"no {model_type} config describes fewer heads of {size}: the checkpoint keeps the shape of {have}, the others at "
            "zero, where training and quantization leave them, and an exported graph has only those that stay"
        )
    else:
        kept = best_heads(network, scores, count)
        result = network if count == have else keep_heads(network, kept)
        after, before = attentions(result)[0], sites[0]
        why = (
            f"{after.shared} of {before.shared} key-value heads stay with them" if before.shared < before.heads else ""
        )
    told = f"each layer keeps {count} of {have} heads, by {name}, {_share(scores, kept)} of its sum"
    listed = "; ".join(",".join(map(str, heads)) for heads in kept)
    return result, [*said, f"{told}; by layer: {listed}", *([why] if why else [])]


def _neurons(network: Any, remove: RemoveSettings, texts: Texts) -> tuple[Any, list[str]]:
    have = feed_forwards(network)[0].neurons
    count, said = _stay(remove.neurons, range(1, have + 1), "neurons")
    name = _ranking(remove)["neurons"]
    score = PARTS[name].neurons
    assert score is not None
    scores = score(network, texts)
    kept = best_neurons(network, scores, count)
    told = f"each layer keeps {count} of {have} feed-forward neurons, by {name}, {_share(scores, kept)} of its sum"
    return keep_neurons(network, kept), [*said, told]


def _attentions(network: Any) -> tuple[Attention, ...]:
    try:
        return attentions(network)
    except TrainError as error:
        if "no config.json describes fewer" not in str(error):
            raise
        raise PruneError(
            f"{config_of(network).model_type}: heads cannot be removed. Its config ties head size to the width, and its attention cannot "
            "be cut on export either, as that of BERT, RoBERTa, ELECTRA, DistilBERT and ALBERT can. Remove layers or neurons."
        ) from error


def _stay(asked: Any, possible: Sequence[int], kind: str) -> tuple[int, list[str]]:
    """How many stay: a whole number as asked, a share as the nearest possible count (of two the larger), told where it is not round."""
    if isinstance(asked, int):
        return asked, []
    have = possible[-1]
    wanted = have * (1 - asked)
    count = min(possible, key=lambda n: (round(abs(n - wanted), 9), -n))
    if abs(count - wanted) < 0.5:
        return count, []
    near = f"a share of {asked:g} would leave {wanted:.3g} of {have} {kind}; the nearest count that can stay is {count}"
    return count, [near]


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _share(scores: Sequence[Tensor], kept: Sequence[Sequence[int]]) -> str:
    whole = float(torch.stack([each.clamp(min=0).sum() for each in scores]).sum())
    stays = sum(float(each[list(numbers)].sum()) for each, numbers in zip(scores, kept, strict=True))
    return f"{stays / max(whole, 1e-30):.0%}"


def _in_our_words(message: str) -> str:
    """What narrowing says to those who choose a student, to those who prune: sentences about another student are no help here."""
    message = message.replace("; or give student.path", "")
    message = re.sub(r"student\.(layers|heads|neurons)", r"remove.\1", message)
    return re.sub(r" [^.]*student\.(path|config).*?(?:\.(?= )|\.$|$)", "", message)


def _rows(before: nn.Module, after: nn.Module) -> tuple[LayerRow, ...]:
    """A row for each matrix that became smaller, and for those of which some heads are zero."""
    shapes = {name: tuple(parameter.shape) for name, parameter in before.named_parameters()}
    silent: dict[str, str] = {}
    for site, heads in zip(tied_attentions(after), speaking_heads(after), strict=True):
        if len(heads) < site.heads:
            for name in (site.queries, site.keys, site.values, site.output):
                silent[f"{name}.weight"] = (
                    f"{site.heads - len(heads)} of {site.heads} heads are zero; exports leave them out"
                )
    rows = []
    for name, parameter in after.named_parameters():
        old, new = shapes.get(name, tuple(parameter.shape)), tuple(parameter.shape)
        if parameter.dim() != 2 or (old == new and name not in silent):
            continue
        axis = 0 if old[0] != new[0] else 1
        note = silent.get(name) or f"was {old[axis]} {('rows', 'columns')[axis]}"
        zeros = 1 - int(parameter.count_nonzero()) / max(parameter.numel(), 1)
        rows.append(
            LayerRow(name=name, shape=new, bits=8 * parameter.element_size(), sparsity=zeros, sqnr_db=None, note=note)
        )
    return tuple(rows)


# Scores


def _influence(network: Any, texts: Texts) -> Sequence[float]:
    return block_influence(network, texts.inputs)


def _active_heads(network: Any, texts: Texts, sites: Sequence[Attention]) -> Sequence[Tensor]:
    return head_importance(network, texts.inputs, sites)


def _active_neurons(network: Any, texts: Texts) -> Sequence[Tensor]:
    return neuron_importance(network, texts.inputs)


def _taylor_layers(network: Any, texts: Texts) -> Sequence[float]:
    loss = loss_of(texts.task, texts.criterion, texts.batches)
    return layer_gates(network, list(own_layers(network)[1]), texts.batches, texts.task, loss)


def _taylor_heads(network: Any, texts: Texts, sites: Sequence[Attention]) -> Sequence[Tensor]:
    loss = loss_of(texts.task, texts.criterion, texts.batches)
    return reader_gates(network, [site.output for site in sites], sites[0].heads, texts.batches, texts.task, loss)


def _taylor_neurons(network: Any, texts: Texts) -> Sequence[Tensor]:
    loss = loss_of(texts.task, texts.criterion, texts.batches)
    sites = feed_forwards(network)
    return reader_gates(network, [site.reader for site in sites], sites[0].neurons, texts.batches, texts.task, loss)


def _michel_heads(network: Any, texts: Texts, sites: Sequence[Attention]) -> Sequence[Tensor]:
    return [each / each.norm().clamp(min=1e-30) for each in _taylor_heads(network, texts, sites)]


def _random_layers(network: Any, texts: Texts) -> Sequence[float]:
    return texts.uniform(len(own_layers(network)[1])).tolist()


def _random_heads(network: Any, texts: Texts, sites: Sequence[Attention]) -> Sequence[Tensor]:
    return [texts.uniform(site.heads) for site in sites]


def _random_neurons(network: Any, texts: Texts) -> Sequence[Tensor]:
    return [texts.uniform(site.neurons) for site in feed_forwards(network)]


PARTS: dict[str, PartsCriterion] = {
    "influence": PartsCriterion(
        "layers: how far they turn the hidden states, 1 − cos(in, out)", "Men et al. 2024, arXiv:2403.03853, eq. 1",
        True, False, _influence, None, None,
    ),
    "activation": PartsCriterion(
        "heads and neurons: the mean size of what they add to the hidden states", "after Muralidharan et al. 2024, arXiv:2407.14679, 2.2",
        True, False, None, _active_heads, _active_neurons,
    ),
    "taylor": PartsCriterion(
        "what the loss would lose to first order, |Σ a · ∂L/∂a| for each text", "Molchanov et al. 2019, arXiv:1906.10771",
        True, True, _taylor_layers, _taylor_heads, _taylor_neurons,
    ),
    "michel": PartsCriterion(
        "heads: |∂L/∂ξ| by a mask of 1, over each layer's own norm", "Michel et al. 2019, arXiv:1905.10650, eq. 2",
        True, True, None, _michel_heads, None,
    ),
    "random": PartsCriterion(
        "chance: what the others are measured against", "", False, False, _random_layers, _random_heads, _random_neurons
    ),
}  # fmt: skip
