"""What a transformer is made of, by the names of its modules: layers, attention heads, feed-forward neurons.

And the network as if some of them were not there: their outputs are hidden while a context lasts, its weights stay as they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from squeeze.errors import TrainError
from squeeze.hooks import hooked

ATTENTION = (("q_proj", "k_proj", "v_proj", "o_proj"), ("q", "k", "v", "o"))
"""Queries, keys, values and output, by what families call them. Only those whose config can tell heads × head size from the width are
here: Llama's many descendants, and T5. BERT, DistilBERT, ELECTRA, GPT-2, OPT and ModernBERT tie the two."""
TIED = (
    ("self.query", "self.key", "self.value", "output.dense"), ("query", "key", "value", "dense"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
)  # fmt: skip
"""The same in encoders whose config ties heads × head size to the width: BERT, RoBERTa and ELECTRA; ALBERT; DistilBERT."""
FEED_FORWARD = (
    (("gate_proj", "up_proj"), "down_proj"), (("gate_up_proj",), "down_proj"), (("wi_0", "wi_1"), "wo"), (("wi",), "wo"),
    (("Wi",), "Wo"), (("fc1",), "fc2"), (("lin1",), "lin2"), (("c_fc",), "c_proj"), (("dense_h_to_4h",), "dense_4h_to_h"),
    (("fc_in",), "fc_out"), (("intermediate.dense",), "output.dense"), (("ffn",), "ffn_output"),
)  # fmt: skip
"""What writes the neurons and what reads them. One writer of twice as many rows holds gate and value, one half after the other."""
NEURONS = ("intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "n_inner")
"""What config.json calls the number of neurons, by family; halves of an encoder-decoder have a number each (`own_name`)."""


@dataclass(frozen=True)
class Attention:
    """The projections of one layer's attention, by their names in the network."""

    queries: str
    keys: str
    values: str
    output: str
    heads: int
    shared: int
    """Key-value heads: each serves heads / shared queries, neighbours of each other."""
    size: int
    """Of one head."""


@dataclass(frozen=True)
class FeedForward:
    """One layer's feed-forward part, by the names of its matrices in the network."""

    writers: tuple[str, ...]
    reader: str
    neurons: int


# What there is


def blocks(network: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the network's layers: the nn.ModuleList with the most weights. Raises TrainError where there is none."""
    found = [(path, m) for path, m in network.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not found:
        raise TrainError(
            f"{type(network).__name__} has no list of layers that some could be kept of. Give student.path instead."
        )
    return max(found, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def own_layers(network: nn.Module) -> tuple[str, nn.ModuleList]:
    """As `blocks`, where each layer has weights of its own. Raises TrainError for layers that run the same ones (ALBERT)."""
    config = config_of(network)
    path, layers = blocks(network)
    count = getattr(config, own_name(config, path, "layers") or "num_hidden_layers", None)
    if count is None:
        raise TrainError(
            f"{config.model_type}: its config does not count its layers (num_hidden_layers). Give student.path instead."
        )
    if count != len(layers):
        raise TrainError(
            f"{config.model_type} runs {count} layers on {len(layers)} set(s) of weights: its layers are one, and none can be taken "
            f"out. Train one that runs fewer from random weights, student.config: {{num_hidden_layers: {max(1, count // 2)}}}, "
            "or name a smaller trained model as student.path."
        )
    return path, layers


def shared_layer(network: nn.Module) -> tuple[nn.Module, int] | None:
    """The one layer that runs again and again (ALBERT), and how often; None where each layer has weights of its own."""
    config = config_of(network)
    _, layers = blocks(network)
    runs = getattr(config, "num_hidden_layers", None)
    return (layers[0], runs) if len(layers) == 1 and isinstance(runs, int) and runs > 1 else None


def own_name(config: Any, path: str, ending: str) -> str | None:
    """What BART's config calls a number of the half that `path` is in, decoder_layers or encoder_ffn_dim say; None elsewhere."""
    names = (f"{half}_{ending}" for half in ("decoder", "encoder") if half in path.split("."))
    return next((name for name in names if name in config.to_dict()), None)


def config_of(network: nn.Module) -> Any:
    """The Transformers config; TrainError for a module of one's own, which has none that could say how small it became."""
    config = getattr(network, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise TrainError(
            f"{type(network).__name__} is a module without a Transformers config: squeeze cannot build a smaller one of it. "
            "Train the smaller module, keep it as an artifact, and name that as student.path."
        )
    return config


def attentions(network: nn.Module) -> tuple[Attention, ...]:
    """Every layer's attention. Raises TrainError where the architecture ties heads × head size to the width."""
    config = config_of(network)
    path, layers = blocks(network)
    found: list[Attention] = []
    for number, layer in enumerate(layers):
        sites = [site for names in ATTENTION for site in _sites(layer, names)]
        if len(sites) != 1:
            raise TrainError(
                f"{config.model_type}: no config.json describes fewer attention heads of the same size, as its head size is the width "
                "divided by the heads (or its projections are not known here). Llama, Mistral, Qwen2, Qwen3, Gemma and T5 can lose "
                "heads; this model can lose layers (student.layers) and neurons (student.neurons)."
            )
        q, k, v, o = (f"{path}.{number}.{name}" for name in sites[0])
        size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        heads, shared = width(network.get_submodule(o)) // size, outputs_of(network.get_submodule(k)) // size
        found.append(Attention(q, k, v, o, heads, shared, size))
    if len({(site.heads, site.shared, site.size) for site in found}) > 1:
        raise TrainError(f"{config.model_type}: its layers have different numbers of heads. Give student.path instead.")
    return tuple(found)


def tied_attentions(network: nn.Module) -> tuple[Attention, ...]:
    """Every layer's attention in an encoder whose config ties heads × head size to the width; () where it is none of those."""
    config = getattr(network, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return ()
    try:
        path, layers = blocks(network)
    except TrainError:
        return ()
    found: list[Attention] = []
    for number, layer in enumerate(layers):
        sites = [site for names in TIED for site in _sites(layer, names)]
        heads = getattr(config, "num_attention_heads", None)
        if len(sites) != 1 or not isinstance(heads, int):
            return ()
        q, k, v, o = (f"{path}.{number}.{name}" for name in sites[0])
        rows = width(network.get_submodule(o))
        if any(outputs_of(network.get_submodule(name)) != rows for name in (q, k, v)) or rows % heads:
            return ()
        found.append(Attention(q, k, v, o, heads, heads, rows // heads))
    return tuple(found)


def feed_forwards(network: nn.Module) -> tuple[FeedForward, ...]:
    """Every layer's feed-forward part. Raises TrainError where there is none, or several (mixtures of experts)."""
    config = config_of(network)
    path, layers = blocks(network)
    found: list[FeedForward] = []
    for number, layer in enumerate(layers):
        sites = [site for writers, reader in FEED_FORWARD for site in _sites(layer, (*writers, reader))]
        if len(sites) != 1:
            raise TrainError(
                f"{config.model_type}: {len(sites)} feed-forward parts are found in layer {number}, and neurons are removed where there "
                "is one. Leave student.neurons out."
            )
        names = [f"{path}.{number}.{name}" for name in sites[0]]
        found.append(FeedForward(tuple(names[:-1]), names[-1], width(network.get_submodule(names[-1]))))
    if len({site.neurons for site in found}) > 1:
        raise TrainError(
            f"{config.model_type}: its layers have different numbers of neurons. Leave student.neurons out."
        )
    return tuple(found)


def _sites(layer: nn.Module, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Where in `layer` modules of those names stand side by side, all of them matrices."""
    modules = dict(layer.named_modules())
    found = []
    for path in modules:
        full = tuple(f"{path}.{name}" if path else name for name in names)
        if all(_is_matrix(modules.get(name)) for name in full):
            found.append(full)
    return found


def _is_matrix(module: nn.Module | None) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def width(matrix: nn.Module) -> int:
    """How many inputs a linear layer, or GPT-2's transposed one, takes."""
    return _shape(matrix)[1]


def outputs_of(matrix: nn.Module) -> int:
    return _shape(matrix)[0]


def _shape(matrix: nn.Module) -> tuple[int, int]:
    weight: Tensor = matrix.weight  # type: ignore[assignment]
    one, other = weight.shape
    return (one, other) if isinstance(matrix, nn.Linear) else (other, one)


def first_bias(network: nn.Module) -> str | None:
    """T5's position bias, which its first layer computes for all: [buckets, heads]."""
    names = [name for name, _ in network.named_parameters() if name.endswith("relative_attention_bias.weight")]
    return names[0] if names else None


def slices(numbers: Sequence[int], size: int) -> Tensor:
    return (torch.as_tensor(list(numbers))[:, None] * size + torch.arange(size)).flatten()


# The larger network without the removed parts


@contextmanager
def only_layers(network: nn.Module, kept: Sequence[int]) -> Iterator[None]:
    """While it lasts, the other layers give back what they read."""

    def passed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        read = args[0] if args else kwargs["hidden_states"]
        return read if isinstance(out, Tensor) else (read, *out[1:])

    _, layers = blocks(network)
    gone = [layer for number, layer in enumerate(layers) if number not in set(kept)]
    with hooked([layer.register_forward_hook(passed, with_kwargs=True) for layer in gone]):
        yield


@contextmanager
def only_runs(network: nn.Module, count: int) -> Iterator[None]:
    """While it lasts, the layer that runs again and again gives back what it reads from run `count` on. For one call of the network."""
    runs = 0

    def passed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        nonlocal runs
        runs += 1
        read = args[0] if args else kwargs["hidden_states"]
        return out if runs <= count else read if isinstance(out, Tensor) else (read, *out[1:])

    _, layers = blocks(network)
    with hooked([layers[0].register_forward_hook(passed, with_kwargs=True)]):
        yield


@contextmanager
def only_heads(
    network: nn.Module, kept: Sequence[Sequence[int]], sites: Sequence[Attention] | None = None
) -> Iterator[None]:
    """While it lasts, the other heads of each layer say nothing."""
    sites = attentions(network) if sites is None else sites
    columns = [slices(heads, site.size) for site, heads in zip(sites, kept, strict=True)]
    with _silenced([network.get_submodule(site.output) for site in sites], columns):
        yield


@contextmanager
def only_neurons(network: nn.Module, kept: Sequence[Sequence[int]]) -> Iterator[None]:
    """While it lasts, the other neurons of each layer are 0."""
    modules = [network.get_submodule(site.reader) for site in feed_forwards(network)]
    with _silenced(modules, [torch.as_tensor(list(neurons)) for neurons in kept]):
        yield


@contextmanager
def _silenced(readers: Sequence[nn.Module], kept: Sequence[Tensor]) -> Iterator[None]:
    """Multiply what each matrix reads by 1 in the kept columns and by 0 in the others."""
    handles = []
    for reader, columns in zip(readers, kept, strict=True):
        mask = torch.zeros(width(reader))
        mask[columns] = 1.0

        def hook(_: nn.Module, args: tuple[Tensor, ...], mask: Tensor = mask) -> tuple[Tensor, ...]:
            return (args[0] * mask.to(args[0]), *args[1:])

        handles.append(reader.register_forward_pre_hook(hook))
    with hooked(handles):
        yield
