"""Recurrent layers in integers: which can become so, and what ONNX Runtime's one kernel for them computes, in torch.

That kernel, DynamicQuantizeLSTM, takes int8 matrices with one scale for each of their rows (a row is one gate of one cell). It
rounds the inputs of all time steps to uint8 at once, and at each step the state of the whole batch. torch's LSTM is one
operation that no hook can enter, so the simulation is its definition as a loop over time.
"""

from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from squeeze.errors import ModelError
from squeeze.integers import dynamic_uint8

Run = Callable[[int, Tensor, tuple[Tensor, ...]], tuple[Tensor, tuple[Tensor, ...]]]
"""Number of a layer, inputs [time, batch, in], states [directions, batch, hidden] before it -> outputs [time, batch, directions ·
hidden], states after it. LSTM has two states, hidden and cell; the others have one."""


def why_float(module: nn.RNNBase) -> str:
    """Why the matrices of a recurrent module must stay in float, or ""."""
    kind = type(module).__name__
    if not isinstance(module, nn.LSTM):
        return f"kept in float: ONNX Runtime has no integer kernel for {kind}, only for LSTM"
    if module.proj_size:
        return "kept in float: ONNX Runtime's integer LSTM has no projection (proj_size)"
    if not is_plain(module):
        return f"kept in float: {kind} has a forward() of its own, which need not be the LSTM of the integer kernel"
    stored = {name for name, _ in module.named_parameters(recurse=False)}
    if not {name for layer in range(module.num_layers) for name in matrices(module, layer)} <= stored:
        return f"kept in float: {kind} computes its matrices instead of storing them (weight norm, say)"
    return ""


def is_plain(module: nn.RNNBase) -> bool:
    """Whether the module runs torch's own forward(): not a subclass's, nor one that someone put in its place."""
    own = any(type(module).forward is kind.forward for kind in (nn.LSTM, nn.GRU))
    return own and "forward" not in vars(module)


def matrices(module: nn.RNNBase, layer: int) -> list[str]:
    """Names, within the module, of the matrices that one kernel reads: those of all directions of one layer."""
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [f"weight_{kind}_l{layer}{direction}" for direction in directions for kind in ("ih", "hh")]


def kernel_groups(network: nn.Module) -> list[tuple[str, ...]]:
    """Names of the matrices that become integers together or not at all, because one kernel takes them all."""
    first = {id(parameter): name for name, parameter in reversed(list(network.named_parameters()))}
    return [
        tuple(first[id(getattr(module, name))] for name in matrices(module, layer))
        for module in network.modules()
        if isinstance(module, nn.RNNBase) and not why_float(module)
        for layer in range(module.num_layers)
    ]


def layer_by_layer(module: nn.RNNBase, run: Run, input: Any, hx: Any = None) -> tuple[Tensor, Any]:
    """What calling the module gives, with `run` for each of its layers, while it is evaluated: there is no dropout.

    The arguments are named as in torch, for networks that name them when they call.
    """
    if isinstance(input, PackedSequence):
        raise ModelError(
            f"squeeze cannot follow packed sequences through {type(module).__name__}. Give it padded ones."
        )
    single = input.dim() == 2
    x: Tensor = input.unsqueeze(1) if single else input.transpose(0, 1) if module.batch_first else input
    directions = 2 if module.bidirectional else 1
    if hx is None:
        zeros = x.new_zeros(module.num_layers * directions, x.shape[1], module.hidden_size)
        hx = (zeros, zeros) if isinstance(module, nn.LSTM) else zeros
    elif single:
        hx = tuple(state.unsqueeze(1) for state in hx) if isinstance(hx, tuple) else hx.unsqueeze(1)
    given: tuple[Tensor, ...] = hx if isinstance(hx, tuple) else (hx,)
    after: list[tuple[Tensor, ...]] = []
    for layer in range(module.num_layers):
        own = slice(layer * directions, (layer + 1) * directions)
        x, states = run(layer, x, tuple(state[own] for state in given))
        after.append(states)
    last = tuple(torch.cat(states) for states in zip(*after, strict=True))
    if single:
        x, last = x.squeeze(1), tuple(state.squeeze(1) for state in last)
    elif module.batch_first:
        x = x.transpose(0, 1)
    return x, last if isinstance(module, nn.LSTM) else last[0]


def simulate(module: nn.LSTM, path: str, integers: Container[str], shared: Mapping[str, str]) -> bool:
    """Make an LSTM round as its export does, in those of its layers that are integers; whether there are any.

    `path` is the module's name in the network, `shared` maps the names of tied weights to those in `integers`.
    """
    names = {layer: f"{path}.{matrices(module, layer)[0]}" for layer in range(module.num_layers)}
    rounded = {layer for layer, name in names.items() if shared.get(name, name) in integers}
    if rounded:
        run = partial(loop_over_time, module, frozenset(rounded))
        module.forward = partial(layer_by_layer, module, run)  # type: ignore[assignment, method-assign]
    return bool(rounded)


def loop_over_time(
    module: nn.LSTM, rounded: frozenset[int], layer: int, x: Tensor, states: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer as a loop over time, inputs and states rounded if it is among `rounded`.

    With several threads the kernel rounds the state of a batch in parts, each with its own scale. How many depends on the
    machine, so here the batch is one part; the two are as far apart as two roundings are, or nearer.
    """
    is_rounded = layer in rounded
    x = dynamic_uint8(x) if is_rounded else x
    outputs, hiddens, cells = [], [], []
    for backward, (hidden, cell) in enumerate(zip(*states, strict=True)):
        end = f"_l{layer}{'_reverse' if backward else ''}"
        recurrent: Tensor = getattr(module, f"weight_hh{end}").T
        gates = x @ getattr(module, f"weight_ih{end}").T
        if module.bias:
            gates = gates + (getattr(module, f"bias_ih{end}") + getattr(module, f"bias_hh{end}"))
        steps = []
        for step in gates.flip(0) if backward else gates:
            state = dynamic_uint8(hidden) if is_rounded else hidden
            i, f, g, o = (step + state @ recurrent).chunk(4, dim=1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            steps.append(hidden)
        outputs.append(torch.stack(steps[::-1] if backward else steps))
        hiddens.append(hidden)
        cells.append(cell)
    return torch.cat(outputs, dim=2), (torch.stack(hiddens), torch.stack(cells))
