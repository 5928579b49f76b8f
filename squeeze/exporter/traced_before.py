"""Graphs of architectures that this process has traced already: another artifact of the same one gets its weights put in.

Tracing takes longer than all else of an export, and `squeeze run` exports two artifacts that as a rule differ in their weights alone. What
is kept is the graph as torch wrote it, before anything is folded into constants, without the weights. What decides a trace makes the key:
classes of all modules, config, names, shapes and ties of weights, values of buffers, inputs and axes. A network with hooks, an own module
(whose forward may read anything), or a graph with floats that are neither weight nor buffer is traced anew each time.

Rejected: keeping traces on disk. They hold what a version of torch and Transformers made, and nobody would know when to throw them away.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from squeeze.provenance import digest_bytes, digest_json

if TYPE_CHECKING:
    import onnx_ir as ir

KEPT = 16
"""Architectures; a graph without weights takes some hundred kilobytes."""
_TRACES: "OrderedDict[str, ir.Model]" = OrderedDict()


def graph_of(network: nn.Module, asked: Any, trace: "Callable[[], ir.Model]") -> "ir.Model":
    """The graph that `trace` writes for `network`, with the network's weights; `asked` is all else that decides it, as JSON.

    `trace` must not fold weights into constants, and names each weight in the graph as the network does.
    """
    key = _key(network, asked)
    if key is None:
        return trace()
    if key not in _TRACES:
        graph = trace()
        if not _is_its_weights(graph, network):
            return graph
        _TRACES[key] = _without_weights(graph, network)
        while len(_TRACES) > KEPT:
            _TRACES.popitem(last=False)
    _TRACES.move_to_end(key)
    # The first one too: the names that a copy gives from here on are not those that the original would.
    return _with_weights(_TRACES[key].clone(), network)


def _key(network: nn.Module, asked: Any) -> str | None:
    """What decides a trace; None where more does than can be seen."""
    modules = dict(network.named_modules())
    configs = [module.config for module in modules.values() if hasattr(module, "config")]
    if not configs or any(m._forward_hooks or m._forward_pre_hooks for m in modules.values()):
        return None
    first: dict[int, str] = {}
    weights = [
        (name, list(p.shape), str(p.dtype), first.setdefault(id(p), name))
        for name, p in network.named_parameters(remove_duplicate=False)
    ]
    buffers = [(name, str(b.dtype), list(b.shape), digest_bytes(_bytes(b))) for name, b in network.named_buffers()]
    config = {name: value for name, value in configs[0].to_dict().items() if name != "_name_or_path"}
    return digest_json({
        "asked": asked, "config": repr(sorted(config.items())), "attention": str(getattr(configs[0], "_attn_implementation", "")),
        "modules": {name: f"{type(m).__module__}.{type(m).__qualname__}" for name, m in modules.items()},
        "weights": repr(weights), "buffers": repr(buffers),
    })  # fmt: skip


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _is_its_weights(graph: "ir.Model", network: nn.Module) -> bool:
    """Whether every float in the graph that is more than a number is a weight or buffer of the network, under its name."""
    own = network.state_dict(keep_vars=True) | dict(network.named_buffers())
    for name, value in graph.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            return False
        raw = getattr(tensor, "raw", None)
        if name in own:
            if not isinstance(raw, Tensor) or raw.data_ptr() != own[name].data_ptr() or raw.shape != own[name].shape:
                return False
        elif tensor.size > 1 and tensor.dtype.is_floating_point():
            return False
    return True


def _without_weights(graph: "ir.Model", network: nn.Module) -> "ir.Model":
    kept, weights = graph.clone(), dict(network.named_parameters(remove_duplicate=False))
    for name, value in kept.graph.initializers.items():
        if name in weights:
            value.const_value = None
    return kept


def _with_weights(graph: "ir.Model", network: nn.Module) -> "ir.Model":
    from onnx_ir.tensor_adapters import TorchTensor

    weights = dict(network.named_parameters(remove_duplicate=False))
    for name, value in graph.graph.initializers.items():
        if value.const_value is None:
            value.const_value = TorchTensor(weights[name].detach(), name=name)
    return graph
