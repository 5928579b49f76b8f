"""What an export computes, in torch: the network of a quantized artifact with the inputs of its integer layers rounded too.

`verify` holds an export against this, and the torch runtime measures it, so that a quality figure is the same method's
wherever it is read.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn

from squeeze.integers import IntegerWeight, block_int8, dynamic_uint8, reciprocal, static_uint8
from squeeze.kv_cache import CacheScales, simulate_cache
from squeeze.model import Model, aliases, answer
from squeeze.recurrent import simulate


def simulation(model: Model, cache: CacheScales | None = None) -> nn.Module:
    """The artifact's network as its export computes: a copy that rounds activations, or the network itself if none are.

    `cache`: the scales of an int8 cache, where the export has one.
    """
    if model.activations == "float" and cache is None:
        return model.network
    twin = copy.copy(model)
    twin.network = copy.deepcopy(model.network)
    simulate_activations(twin)
    if cache is not None:
        simulate_cache(twin.network, cache)
    return twin.network


def simulate_activations(model: Model) -> list[Callable[[], object]]:
    """Make the network round the inputs of its integer layers as the exported graph does; for a model that only runs.

    Not for one that is exported or saved: the hooks are part of the module until what is returned has been called.
    """
    undo: list[Callable[[], object]] = []
    if model.activations == "float":
        return undo
    shared = aliases(model.network)
    first_only = _first_token_only(model) if model.activations == "dynamic-uint8" else {}
    for path, module in model.network.named_modules():
        if isinstance(module, nn.LSTM):
            if simulate(module, path, model.integers, shared):
                undo.append(partial(vars(module).pop, "forward"))
            continue
        name = f"{path}.weight"
        weight = model.integers.get(shared.get(name, name))
        if weight is None or isinstance(module, nn.Embedding):
            continue
        rounded = input_rounding(weight)
        if any(first_only.get(path, ())):
            rounded = partial(_by_call, rounded, cycle(first_only[path]))
        hook = module.register_forward_pre_hook(
            lambda _module, inputs, rounded=rounded: (rounded(inputs[0]), *inputs[1:])
        )
        undo.append(hook.remove)
    return undo


def input_rounding(weight: IntegerWeight) -> Callable[[Tensor], Tensor]:
    """What the kernel that multiplies these integers does to its inputs, there and back; outlier channels pass as they are."""
    if weight.outliers is not None:
        return weight.outliers.around(input_rounding(replace(weight, outliers=None)))
    if weight.block_size is not None:
        return partial(block_int8, block_size=weight.block_size)
    if weight.inputs is not None:
        return partial(static_uint8, grid=weight.inputs, divisor=weight.divisor)
    if weight.divisor is None:
        return dynamic_uint8
    divisor, inverse = weight.divisor, reciprocal(weight.divisor)
    return lambda x: dynamic_uint8(x * inverse) * divisor


def _by_call(rounded: Callable[[Tensor], Tensor], first_only: Iterator[bool], x: Tensor) -> Tensor:
    """Rounds all tokens, or in calls of which only token 0 counts that token alone, in the range that it has by itself."""
    if not next(first_only):
        return rounded(x)
    out = x.clone()
    out[:, :1] = rounded(x[:, :1])
    return out


def _first_token_only(model: Model) -> dict[str, tuple[bool, ...]]:
    """For every linear layer of a classifier and each of its calls in one pass (ALBERT's layers share theirs), whether its outputs
    count at token 0 alone: there the answer's gradient is zero everywhere else.

    The export leaves the other tokens out (squeeze.exporter.attention), and a range measured as it comes is then another one.
    """
    if model.task != "text-classification" or model.factory is not None:
        return {}
    added: dict[str, list[Tensor]] = {}
    hooks = []
    for path, module in model.network.named_modules():
        if isinstance(module, nn.Linear):

            def ran(_: nn.Module, _inputs: object, output: Tensor, path: str = path) -> Tensor | None:
                if output.dim() != 3:
                    return None
                added.setdefault(path, []).append(torch.zeros_like(output, requires_grad=True))
                return output + added[path][-1]

            hooks.append(module.register_forward_hook(ran))
    try:
        with torch.enable_grad():
            ids = torch.arange(5, 13).unsqueeze(0)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
            out = model.network(**{name: inputs[name] for name in model.text_inputs})
            answer(out, model.task).sum().backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
    return {path: tuple(_only_first(zero.grad) for zero in zeros) for path, zeros in added.items()}


def _only_first(grad: Tensor | None) -> bool:
    return grad is not None and bool(grad[:, :1].any()) and not bool(grad[:, 1:].any())
