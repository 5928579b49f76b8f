"""Attention heads that no config.json can leave out: zero in the checkpoint, gone from what is exported.

The configs of BERT, RoBERTa, ELECTRA, DistilBERT and ALBERT tie head size to width / heads, and Transformers 5 has no pruned_heads any
more, so an ordinary checkpoint with fewer heads of the same size does not exist. A head whose values and output columns are all zero
says nothing in such a checkpoint, and stays silent: each of its gradients is a product with one of those zeros, so that training
moves none of them, masks or not. Nor do integers: zero is on every symmetric grid. The export cuts those rows and columns, and the
graph is that of a network with fewer heads, narrower by measurement.

Rejected: another architecture that computes the same. DeBERTa-v2 has a head size of its own in its config, but its output matrix reads
the full width; of the encoders whose output matrix reads heads × head size, none adds positions to its embeddings and norms after
each sum (Jina v3, NomicBERT and GTE turn queries and keys instead). Rejected too: a class of our own beside the weights, which nobody
loads without trusting code.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from squeeze.integers import IntegerWeight
from squeeze.narrowing import prove
from squeeze.parts import Attention, only_heads, slices, tied_attentions

if TYPE_CHECKING:
    from squeeze.model import Model


def silence_heads(network: nn.Module, kept: Sequence[Sequence[int]]) -> nn.Module:
    """A copy in which all but the `kept` heads of each layer are zero: queries, keys, values and their biases, and the output's columns.

    `network` stays as it is, and must have `tied_attentions`. Raises TrainError where the copy, or the copy without those heads, does
    not compute what `network` computes while they are hidden.
    """
    sites = tied_attentions(network)
    result = copy.deepcopy(network)
    with torch.no_grad():
        for site, heads in zip(sites, kept, strict=True):
            gone = slices(sorted(set(range(site.heads)) - set(heads)), site.size)
            for name in (site.queries, site.keys, site.values):
                _matrix(result, name).weight[gone] = 0
                if _matrix(result, name).bias is not None:
                    _matrix(result, name).bias[gone] = 0
            _matrix(result, site.output).weight[:, gone] = 0
    cut = copy.deepcopy(result)
    _cut(cut, sites, kept)
    with only_heads(network, kept, sites):
        prove(network, result, "the other heads")
        prove(network, cut, "the other heads")
    return result


def speaking_heads(network: nn.Module) -> tuple[tuple[int, ...], ...]:
    """The heads of each layer that say something; () where the architecture has none of the kind that can be silenced."""
    return tuple(_speaking(network, site) for site in tied_attentions(network))


def without_silent(model: "Model") -> tuple["Model", tuple[str, ...]]:
    """The model without its silent heads, integers too, and a note; the model itself, and no note, where all heads speak.

    A layer whose output matrix shares scales over blocks that do not end where its heads end keeps them all.
    """
    sites = tied_attentions(model.network) if model.factory is None else ()
    kept = []
    for site in sites:
        heads = _speaking(model.network, site) or (0,)
        whole = tuple(range(site.heads))
        integer = model.integers.get(f"{site.output}.weight")
        fits = integer is None or _blocks(integer, slices(heads, site.size)) is not None
        kept.append(heads if fits else whole)
    gone = sum(site.heads - len(heads) for site, heads in zip(sites, kept, strict=True))
    if not gone:
        return model, ()
    network, integers = copy.deepcopy(model.network), dict(model.integers)
    _cut(network, sites, kept)
    for site, heads in zip(sites, kept, strict=True):
        index = slices(heads, site.size)
        for name in (site.queries, site.keys, site.values):
            if (weight := f"{name}.weight") in integers:
                integers[weight] = _rows(integers[weight], index)
        if (weight := f"{site.output}.weight") in integers:
            integers[weight] = _columns(integers[weight], index)
    every = sum(site.heads for site in sites)
    note = f"{gone} of {every} attention heads are zero in the checkpoint, whose config cannot leave them out; this graph does"
    return dataclasses.replace(model, network=network, integers=integers), (note,)


def _speaking(network: nn.Module, site: Attention) -> tuple[int, ...]:
    values, output = _matrix(network, site.values), _matrix(network, site.output)
    rows = values.weight.detach().abs().sum(1)
    if values.bias is not None:
        rows = rows + values.bias.detach().abs()
    said = (rows.reshape(site.heads, -1).sum(1) != 0) | (
        output.weight.detach().abs().sum(0).reshape(site.heads, -1).sum(1) != 0
    )
    return tuple(said.nonzero().flatten().tolist())


def _matrix(network: nn.Module, name: str) -> Any:
    return network.get_submodule(name)


def _cut(network: nn.Module, sites: Sequence[Attention], kept: Sequence[Sequence[int]]) -> None:
    """Take the other heads out of the modules in place: these attentions split what they read by head size, however wide it is."""
    for site, heads in zip(sites, kept, strict=True):
        index = slices(heads, site.size)
        for name in (site.queries, site.keys, site.values):
            old = _matrix(network, name)
            network.set_submodule(name, _linear(old.weight[index], None if old.bias is None else old.bias[index]))
        old = _matrix(network, site.output)
        network.set_submodule(site.output, _linear(old.weight[:, index], old.bias))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    result = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
    result.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        result.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return result.eval()


def _rows(weight: IntegerWeight, index: Tensor) -> IntegerWeight:
    zero, outliers = weight.zero_point, weight.outliers
    return dataclasses.replace(
        weight, integers=weight.integers[index].contiguous(), scale=weight.scale[index].contiguous(),
        zero_point=zero[index].contiguous() if isinstance(zero, Tensor) else zero,
        outliers=None if outliers is None else dataclasses.replace(outliers, columns=outliers.columns[index].contiguous()),
    )  # fmt: skip


def _columns(weight: IntegerWeight, index: Tensor) -> IntegerWeight:
    blocks, zero, outliers = _blocks(weight, index), weight.zero_point, weight.outliers
    if outliers is not None:
        there = torch.isin(outliers.channels, index)
        places = torch.searchsorted(index, outliers.channels[there])
        outliers = dataclasses.replace(outliers, channels=places, columns=outliers.columns[:, there].contiguous())
    return dataclasses.replace(
        weight, integers=weight.integers[:, index].contiguous(), scale=weight.scale[:, blocks].contiguous(),
        zero_point=zero[:, blocks].contiguous() if isinstance(zero, Tensor) else zero,
        divisor=None if weight.divisor is None else weight.divisor[index].contiguous(),
        outliers=outliers if outliers is None or len(outliers.channels) else None,
    )  # fmt: skip


def _blocks(weight: IntegerWeight, index: Tensor) -> Tensor | None:
    """The blocks of a row that the ascending columns `index` are made of, each whole; None where they cut through one."""
    if weight.block_size is None:
        return torch.zeros(1, dtype=torch.int64)
    size, columns = weight.block_size, weight.shape[1]
    blocks = sorted({column // size for column in index.tolist()})
    whole = sum(min(size, columns - block * size) for block in blocks)
    return torch.tensor(blocks) if whole == len(index) else None
