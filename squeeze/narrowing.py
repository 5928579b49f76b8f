"""Smaller networks of the same architecture: fewer layers, attention heads or feed-forward neurons.

What goes is really gone. The config is rewritten, a network is built from it as `from_pretrained` would build it, and the weights that
stay are copied in. Layer numbers, key-value caches, per-layer lists and scales are then those of a network that never was larger, and
its folder loads anywhere. Whether it computes what the larger one computes without the removed parts is not taken from a list of
architectures but proven on a probe, each time: a family that reads more than its config says is refused instead of changed silently.

Rejected: cutting a deep copy in place. What no config.json holds (a layer's number, a head count of its own) survives in memory and is
lost at the first save. Rejected too: other counts in each layer, which ordinary Transformers classes cannot describe.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from squeeze.errors import TrainError
from squeeze.parts import (
    NEURONS,
    Attention,
    attentions,
    blocks,
    config_of,
    feed_forwards,
    first_bias,
    only_heads,
    only_layers,
    only_neurons,
    only_runs,
    outputs_of,
    own_layers,
    own_name,
    shared_layer,
    slices,
)
from squeeze.tasks import positions

PROBE = 16
"""Tokens on which a smaller network is held against the larger one."""
TOLERANCE = 1e-3
"""Of the largest output: orders of summation differ by about 1e-6, another function by far more."""


# Which heads go together


def head_counts(network: nn.Module) -> tuple[int, ...]:
    """How many heads each layer may keep, fewer than it has: equal numbers of each group, or whole groups, and a config that loads."""
    site = attentions(network)[0]
    counts = []
    for count in range(1, site.heads):
        shared = _shared(count, site)
        if shared is not None:
            try:
                changed(config_of(network), _head_values(network, count, shared, site.size))
            except TrainError:
                continue
            counts.append(count)
    return tuple(counts)


def _shared(count: int, site: Attention) -> int | None:
    """Key-value heads that remain beside `count` heads: all where each group can give equally many, else those of whole groups."""
    if site.shared < site.heads and count % site.shared == 0:
        return site.shared
    per_group = site.heads // site.shared
    return count // per_group if count % per_group == 0 else None


def best_heads(network: nn.Module, scores: Sequence[Tensor], count: int) -> tuple[tuple[int, ...], ...]:
    """The `count` heads of each layer to keep by `scores`, [heads] for each layer.

    Heads that share keys and values are a group (Ainslie et al. 2023, arXiv:2305.13245): each group keeps equally many, so that no
    keys and values go, or, where `count` does not divide so, whole groups stay. T5's layers share one position bias by head number and
    so keep the same heads, those with the highest share of their layer's score over all layers. Raises TrainError for impossible counts.
    """
    site = attentions(network)[0]
    if count == site.heads:
        return (tuple(range(count)),) * len(scores)
    if count not in (possible := head_counts(network)):
        raise TrainError(
            f"student.heads = {count}: each layer has {site.heads} heads in groups that share {site.shared} key-value head(s), and may "
            f"keep {', '.join(map(str, possible)) or 'no other number'}."
        )
    shared = _shared(count, site)
    if first_bias(network) is not None:
        together = torch.stack([each.float() / each.float().sum().clamp(min=1e-30) for each in scores]).sum(0)
        scores = [together] * len(scores)
    groups = torch.arange(site.heads).reshape(site.shared, -1)
    kept: list[tuple[int, ...]] = []
    for score in scores:
        grouped = score.float().cpu().reshape(site.shared, -1)
        if shared == site.shared:
            best = grouped.topk(count // site.shared, dim=1).indices
            numbers = groups.gather(1, best)
        else:
            numbers = groups[grouped.sum(1).topk(shared or 0).indices]
        kept.append(tuple(sorted(numbers.flatten().tolist())))
    return tuple(kept)


def best_neurons(network: nn.Module, scores: Sequence[Tensor], count: int) -> tuple[tuple[int, ...], ...]:
    """The `count` neurons of each layer with the highest scores, [neurons] for each layer."""
    have = feed_forwards(network)[0].neurons
    if count > have:
        raise TrainError(f"student.neurons = {count}: each layer has {have}. Give fewer.")
    return tuple(tuple(sorted(score.topk(count).indices.tolist())) for score in scores)


# What remains


def keep_layers(network: nn.Module, kept: Sequence[int]) -> nn.Module:
    """A network of those layers alone, in their order; `network` stays as it is.

    What only the first layer has (T5's position bias) goes to the first that remains. Raises TrainError for layers that are not there
    and for architectures that compute something else without the others.
    """
    path, layers = own_layers(network)
    if not kept or min(kept) < 0 or max(kept) >= len(layers):
        raise TrainError(
            f"layers {list(kept)} are asked for, and the model has {len(layers)}, from 0 to {len(layers) - 1}."
        )
    if list(kept) != sorted(set(kept)):
        raise TrainError(f"layers {list(kept)} must rise: those that stay keep their order.")
    config = config_of(network)
    values: dict[str, Any] = {own_name(config, path, "layers") or _name(config, "num_hidden_layers"): len(kept)}
    if not getattr(config, "is_encoder_decoder", False):
        values[_name(config, "num_hidden_layers")] = len(
            kept
        )  # the half that is not there: caches are as long as it says
    values |= {
        name: [value[n] for n in kept]
        for name, value in config.to_dict().items()
        if "layer" in name and isinstance(value, list | tuple) and len(value) == len(layers)
    }
    others = {name for layer in layers[1:] for name in layer.state_dict()}
    places = {number: place for place, number in enumerate(kept)}
    state: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        if not name.startswith(f"{path}."):
            state[name] = tensor
            continue
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        alone = number == "0" and len(layers) > 1 and rest not in others
        place = 0 if alone else places.get(int(number))
        if place is not None:
            state[f"{path}.{place}.{rest}"] = tensor
    result = _rebuilt(network, values, state)
    with only_layers(network, kept):
        prove(network, result, "the other layers")
    return result


def keep_runs(network: nn.Module, count: int) -> nn.Module:
    """A network that runs its one layer `count` times (ALBERT); `network` stays as it is.

    Raises TrainError where each layer has its own weights, and for more runs than there are.
    """
    config, found = config_of(network), shared_layer(network)
    if found is None or getattr(config, "num_hidden_groups", 1) != 1:
        raise TrainError(f"{config.model_type}: its layers are not one layer that runs several times.")
    if not 1 <= count <= found[1]:
        raise TrainError(f"{count} layers are asked for, and the model runs its one layer {found[1]} times.")
    result = _rebuilt(network, {_name(config, "num_hidden_layers"): count}, network.state_dict())
    with only_runs(network, count):
        prove(network, result, "the other runs of its layer")
    return result


def keep_heads(network: nn.Module, kept: Sequence[Sequence[int]]) -> nn.Module:
    """A network that has those heads alone, ascending numbers for each layer; `network` stays as it is.

    Every layer keeps equally many, of equally many key-value groups, equally many in each. Raises TrainError where they do not fit the
    architecture.
    """
    sites = attentions(network)
    per_group = sites[0].heads // sites[0].shared
    groups = [sorted({head // per_group for head in heads}) for heads in kept]
    counts = {
        tuple(sum(head // per_group == g for head in heads) for g in gs) for heads, gs in zip(kept, groups, strict=True)
    }
    if len(counts) != 1 or len(set(next(iter(counts)))) != 1:
        raise TrainError("every layer must keep equally many heads, and of each group that it keeps equally many.")
    size, state = sites[0].size, dict(network.state_dict())
    for site, heads, own in zip(sites, kept, groups, strict=True):
        for name, numbers in ((site.queries, heads), (site.keys, own), (site.values, own)):
            _cut(state, network, name, slices(numbers, size), outputs=True)
        _cut(state, network, site.output, slices(heads, size), outputs=False)
    if (bias := first_bias(network)) is not None:
        if len({tuple(heads) for heads in kept}) > 1:
            raise TrainError("layers that share one position bias must keep the same heads.")
        state[bias] = state[bias][:, list(kept[0])]
    result = _rebuilt(network, _head_values(network, len(kept[0]), len(groups[0]), size), state)
    with only_heads(network, kept):
        prove(network, result, "the other heads")
    return result


def keep_neurons(network: nn.Module, kept: Sequence[Sequence[int]]) -> nn.Module:
    """A network that has those feed-forward neurons alone, equally many for each layer; `network` stays as it is.

    Gate and value of a gated part lose the same neurons. Raises TrainError where the config cannot say how many there are.
    """
    config, sites = config_of(network), feed_forwards(network)
    if len({len(each) for each in kept}) != 1:
        raise TrainError("every layer must keep equally many neurons.")
    have, state = sites[0].neurons, dict(network.state_dict())
    described = config.to_dict()
    names = (own_name(config, blocks(network)[0], "ffn_dim"), *NEURONS)
    key = next((name for name in names if name in described and described[name] in (have, None)), None)
    if key is None:
        raise TrainError(
            f"{config.model_type}: its config does not tell the number of neurons. Leave student.neurons out."
        )
    for site, neurons in zip(sites, kept, strict=True):
        index = torch.as_tensor(list(neurons))
        for name in site.writers:
            fused = outputs_of(network.get_submodule(name)) == 2 * have
            _cut(state, network, name, torch.cat([index, index + have]) if fused else index, outputs=True)
        _cut(state, network, site.reader, index, outputs=False)
    result = _rebuilt(network, {key: len(kept[0])}, state)
    with only_neurons(network, kept):
        prove(network, result, "the other neurons")
    return result


def _cut(state: dict[str, Tensor], network: nn.Module, name: str, index: Tensor, *, outputs: bool) -> None:
    """Keep those outputs (with their biases) or inputs of one matrix."""
    axis = 0 if isinstance(network.get_submodule(name), nn.Linear) == outputs else 1
    weight = state[f"{name}.weight"]
    state[f"{name}.weight"] = weight.index_select(axis, index.to(weight.device))
    if outputs and f"{name}.bias" in state:
        state[f"{name}.bias"] = state[f"{name}.bias"][index.to(weight.device)]


# Configs


def _name(config: Any, attribute: str) -> str:
    """What the family's config.json calls it."""
    return str(getattr(config, "attribute_map", {}).get(attribute, attribute))


def _head_values(network: nn.Module, heads: int, shared: int, size: int) -> dict[str, Any]:
    config = config_of(network)
    values = {"num_attention_heads": heads, "head_dim": size}
    if hasattr(config, "num_key_value_heads"):
        values["num_key_value_heads"] = shared
    return {_name(config, attribute): value for attribute, value in values.items()}


def changed(config: Any, values: Mapping[str, Any], without: Sequence[str] = ()) -> Any:
    """A config of the same class with other values, as reading its config.json would make it; those in `without` are derived anew.

    Raises TrainError, in the class's own words, for values that it refuses.
    """
    from huggingface_hub.errors import StrictDataclassError

    described = {name: value for name, value in config.to_dict().items() if name not in without}
    try:
        result = type(config).from_dict(described | dict(values))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        told = ", ".join(f"{name} = {value}" for name, value in values.items())
        raise TrainError(f"{config.model_type} does not allow {told}: {' '.join(str(error).split())}"[:600]) from error
    result._attn_implementation = config._attn_implementation
    return result


def build(kind: type[nn.Module], config: Any) -> Any:
    """A network of random weights in float32, in evaluation mode. Raises TrainError where the class refuses the config."""
    try:
        return kind(config).float().eval().requires_grad_(False)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise TrainError(f"{kind.__name__} cannot be built as asked: {' '.join(str(error).split())}"[:600]) from error


def without_parts(network: nn.Module, result: nn.Module) -> None:
    """Leave out of `result` what was left out of `network`, such as a pooler."""
    for name, module in network._modules.items():
        if module is None:
            setattr(result, name, None)


def _rebuilt(network: nn.Module, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    config = changed(config_of(network), values)
    result = build(type(network), config)
    without_parts(network, result)
    own = result.state_dict()
    wrong = sorted(own.keys() ^ state.keys())
    wrong += sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    if wrong:
        raise TrainError(
            f"{config.model_type}: a network with {', '.join(f'{n} = {v}' for n, v in values.items())} has other weights than those that "
            f"remain ({', '.join(wrong[:3])}). Where its first layer is unlike the others, keep that one; or give student.path."
        )
    result.load_state_dict(state)
    if getattr(network, "generation_config", None) is not None:
        result.generation_config = copy.deepcopy(network.generation_config)
    result.to(next(network.parameters()).device)
    return result  # type: ignore[no-any-return]


# Proof


def prove(network: nn.Module, result: nn.Module, gone: str) -> None:
    """TrainError where `result` computes something else than `network`, from which `gone` is hidden at the moment."""
    config = config_of(network)
    length = min(PROBE, positions(config.to_dict()) or PROBE)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, length), generator=random).to(next(network.parameters()).device)
    with torch.no_grad():
        expected, found = (each(input_ids=ids, **cacheless(each))[0] for each in (network, result))
    if not torch.allclose(expected, found, rtol=0, atol=TOLERANCE * float(expected.abs().max())):
        raise TrainError(
            f"{config.model_type}: a smaller network does not compute what this one computes without {gone} (off by "
            f"{float((expected - found).abs().max()):.2g}): more depends on them than its config says. Give student.path instead."
        )


def cacheless(network: nn.Module) -> dict[str, bool]:
    """What tells a decoder to keep no keys and values."""
    return {"use_cache": False} if "use_cache" in inspect.signature(network.forward).parameters else {}
