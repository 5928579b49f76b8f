"""Outlier channels in the graph: Gather, a small float MatMul, Add; standard operators, beside the integer product of the rest.

What leaves them out of that product costs nothing where the range of inputs is fixed: they saturate and meet integers of zero. Where
the range is measured they must be zeros before it is: by the divisor's own Mul where there is one, else by one more.
Rejected: gathering all other channels, which copies nearly the whole input.
"""

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from squeeze.errors import ExportError

if TYPE_CHECKING:
    from squeeze.exporter.placement import Placer
    from squeeze.integers import IntegerWeight

COLUMNS = "outlier_columns"
"""Ending of the initializer [k, out] of float weights, behind the name of the layers' integers."""


def with_outliers(placer: "Placer", node: ir.Node, layers: tuple[str, ...], product: ir.Value) -> list[ir.Node]:
    """Nodes that add x[channels] · W[channels] to the integer `product` of what `node` reads; none where all channels are integers."""
    x, first = node.inputs[0], placer.integers[layers[0]].outliers
    if first is None or x is None:
        return []
    nodes: list[ir.Node] = []
    key = (x, first.channels.numpy().tobytes())
    if key not in placer.gathered:
        channels = placer.constant(f"{layers[0]}.outlier_channels", first.channels.numpy())
        gather = ir.node("Gather", [x, channels], {"axis": -1}, name=f"{node.name}_outliers")
        placer.gathered[key] = gather.outputs[0]
        producer = x.producer()
        if producer is None:
            nodes.append(gather)
        else:
            placer.graph.insert_after(producer, gather)  # so that every later reader can share it
    columns = placer.constant(f"{'+'.join(layers)}.{COLUMNS}", _columns([placer.integers[name] for name in layers]))
    part = ir.node("MatMul", [placer.gathered[key], columns], name=f"{node.name}_float")
    return [*nodes, part, ir.node("Add", [product, part.outputs[0]], name=f"{node.name}_sum")]


def differing_outliers(graph: ir.Graph, layers: list[str], weights: "list[IntegerWeight]") -> int:
    """How many float columns and channel numbers in the graph are not the artifact's, or not where the product reads them."""
    first = weights[0].outliers
    if first is None:
        return 0
    expected, everything = _columns(weights), first.columns.shape[1] * sum(w.shape[0] for w in weights)
    value = graph.initializers.get(f"{'+'.join(layers)}.{COLUMNS}")
    if value is None or value.const_value is None:
        return everything
    found = value.const_value.numpy()
    readers = [use.node for use in value.uses() if use.node.op_type == "MatMul" and use.idx == 1]
    if found.dtype != expected.dtype or found.shape != expected.shape or not readers:
        return everything
    wrong = 0
    for reader in readers:
        gather = None if reader.inputs[0] is None else reader.inputs[0].producer()
        channels = (
            None
            if gather is None or gather.op_type != "Gather" or gather.inputs[1] is None
            else gather.inputs[1].const_value
        )
        numbers = np.empty(0, np.int64) if channels is None else channels.numpy()
        wrong += int(not np.array_equal(numbers, first.channels.numpy()))
    return wrong + int((found.view(np.int32) != expected.view(np.int32)).sum())


def _columns(weights: "list[IntegerWeight]") -> np.ndarray:
    """[k, out] float32 of layers stacked along their outputs, as MatMul multiplies."""
    if any(w.outliers is None for w in weights):
        raise ExportError(
            "of layers that are one product in the graph, some keep outliers and some do not; this is a bug."
        )
    return np.ascontiguousarray(
        np.concatenate([w.outliers.columns.numpy() for w in weights if w.outliers is not None]).T
    )
