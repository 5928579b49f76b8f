"""Recurrent layers as one operator each while torch traces a network, so that the length of a text stays free.

torch traces nn.LSTM and nn.GRU as loops over the time steps of its example: every shape after them is then of that length,
and with it whatever meets it, up to the inputs. As operators of squeeze's own, with shapes declared here, they fix nothing,
and each becomes the ONNX operator that computes it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from onnxscript import opset23 as onnx
from torch import Tensor, nn

from squeeze.errors import ExportError
from squeeze.exporter.recurrent import TO_ONNX
from squeeze.recurrent import is_plain, layer_by_layer

ORDERS = {nn.LSTM: TO_ONNX, nn.GRU: (1, 0, 2)}
"""The gates of ONNX as positions in torch's order. GRU: torch has r, z, n and ONNX z, r, h (torch's n)."""


@contextmanager
def whole_layers(network: nn.Module) -> Iterator[dict[Callable[..., Any], Callable[..., Any]]]:
    """Within, LSTM and GRU modules run as the operators below; gives what torch needs to write those as ONNX's.

    Left as they are: projections, which ONNX does not have, and modules with a forward() of their own.
    """
    recurrent = [module for module in network.modules() if isinstance(module, nn.LSTM | nn.GRU)]
    treated = [module for module in recurrent if is_plain(module) and not module.proj_size]
    for module in treated:
        module.forward = partial(layer_by_layer, module, partial(_run, module))  # type: ignore[assignment, method-assign]
    try:
        yield {torch.ops.squeeze.lstm.default: _onnx_lstm, torch.ops.squeeze.gru.default: _onnx_gru}
    finally:
        for module in treated:
            del module.forward


@torch.library.custom_op("squeeze::lstm", mutates_args=())
def _lstm(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX's LSTM: outputs [time, directions, batch, hidden] and the two last states."""
    raise ExportError("squeeze::lstm was computed, which it is only traced for; this is a bug.")


@_lstm.register_fake
def _lstm_shapes(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (x.new_empty(x.shape[0], *hidden.shape), torch.empty_like(hidden), torch.empty_like(cell))


@torch.library.custom_op("squeeze::gru", mutates_args=())
def _gru(x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """ONNX's GRU: outputs [time, directions, batch, hidden] and the last state."""
    raise ExportError("squeeze::gru was computed, which it is only traced for; this is a bug.")


@_gru.register_fake
def _gru_shapes(x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return (x.new_empty(x.shape[0], *hidden.shape), torch.empty_like(hidden))


def _onnx_lstm(x: Any, w: Any, r: Any, b: Any, hidden: Any, cell: Any) -> Any:
    direction = "bidirectional" if r.shape[0] == 2 else "forward"
    return onnx.LSTM(x, w, r, b, None, hidden, cell, hidden_size=r.shape[2], direction=direction)


def _onnx_gru(x: Any, w: Any, r: Any, b: Any, hidden: Any) -> Any:
    direction = "bidirectional" if r.shape[0] == 2 else "forward"
    return onnx.GRU(x, w, r, b, None, hidden, hidden_size=r.shape[2], direction=direction, linear_before_reset=1)


def _run(module: nn.RNNBase, layer: int, x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer by its operator, see squeeze.recurrent.Run."""
    ends = [f"_l{layer}", f"_l{layer}_reverse"][: 2 if module.bidirectional else 1]
    order = ORDERS[nn.LSTM if isinstance(module, nn.LSTM) else nn.GRU]

    def stacked(kind: str) -> Tensor:
        return torch.stack([_reordered(getattr(module, f"{kind}{end}"), order) for end in ends])

    bias = torch.cat([stacked("bias_ih"), stacked("bias_hh")], dim=1) if module.bias else None
    operator = _lstm if isinstance(module, nn.LSTM) else _gru
    outputs, *after = operator(x, stacked("weight_ih"), stacked("weight_hh"), bias, *states)
    return outputs.transpose(1, 2).flatten(2), tuple(after)


def _reordered(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    size = weight.shape[0] // len(order)
    return torch.cat([weight[gate * size : (gate + 1) * size] for gate in order])
