"""LSTM nodes onto ONNX Runtime's integer kernel, with the artifact's own bytes.

torch orders an LSTM's gates i, f, g, o and ONNX i, o, f, c (its g), so rows move in four blocks, and the kernel wants the
matrix turned. Both are undone before weights are looked for by content, and when `verify` compares bytes.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from squeeze.errors import ExportError

if TYPE_CHECKING:
    from squeeze.exporter.placement import Placer
    from squeeze.integers import IntegerWeight

LAYOUT = "lstm"
CONTRIB = "com.microsoft"
TO_ONNX = (0, 3, 1, 2)
"""The gates of ONNX as positions in torch's order."""
TO_TORCH = (0, 2, 3, 1)
KEPT = ("activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size", "input_forget")
"""Attributes that mean the same to both operators. The kernel knows no `layout`, whose default is the only one it takes."""
INPUTS = 8
"""X, W, R, B, sequence_lens, initial_h, initial_c, P: what both operators take, in this order."""
MOVES = frozenset(["Concat", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"])
"""Operators that only move numbers. torch writes W and R as these on the module's matrices, and folds small ones only."""


def place_lstm(placer: "Placer", node: ir.Node) -> int:
    """Replace an LSTM node whose matrices are integers of the artifact by DynamicQuantizeLSTM; how many were replaced.

    Raises ExportError where only some of its matrices are integers, or where the node is none that the kernel computes.
    """
    inputs = [*node.inputs, *[None] * (INPUTS - len(node.inputs))]
    found = [_layers(placer, value) for value in inputs[1:3]]
    if found == [None, None]:
        return 0
    if None in found:
        known = next(names for names in found if names is not None)
        raise ExportError(
            f"{known[0]} is integers, but not every matrix of its layer, and the kernel takes all. Keep it in float with keep."
        )
    if "layout" in node.attributes and node.attributes["layout"].value:
        raise ExportError(f"{node.name} is an LSTM with its batch first, which the integer kernel does not take.")
    weights = [placer.write(names, LAYOUT) for names in found if names is not None]
    for weight in weights:
        shape = weight["scale"].const_value.shape.numpy()  # type: ignore[union-attr]
        zeros = placer.constant("squeeze.lstm_zeros_" + "x".join(map(str, shape)), np.zeros(shape, np.int8))
        inputs += [weight["scale"], zeros]
    inputs[1:3] = [weight["integers"] for weight in weights]
    attributes = [attribute for name, attribute in node.attributes.items() if name in KEPT]
    new = ir.Node(CONTRIB, "DynamicQuantizeLSTM", inputs, attributes, num_outputs=len(node.outputs))
    new.name = f"{node.name}_int8"
    _take_place(placer.graph, node, new)
    return 1


def _layers(placer: "Placer", value: ir.Value | None) -> tuple[str, ...] | None:
    """Names of the weights that an LSTM's W or R [directions, 4·hidden, in] is made of, one for each direction."""
    stack = _constant(value)
    if stack is None or stack.ndim != 3 or stack.dtype != np.float32:
        return None
    names: list[str] = []
    for matrix in stack:
        found = placer.find(np.ascontiguousarray(_reordered(matrix, TO_TORCH)))
        if found is None or len(found) != 1:
            return None
        names += found
    wrong = [name for name in names if not _fits(placer.integers[name])]
    if wrong:
        raise ExportError(f"{wrong[0]} is not int8 with one scale per row, which is all that the LSTM kernel takes.")
    return tuple(names)


def _fits(weight: "IntegerWeight") -> bool:
    signed = isinstance(weight.zero_point, int) and weight.zero_point == 0
    return signed and weight.bits == 8 and weight.block_size is None and not weight.transposed


def _constant(value: ir.Value | None) -> NDArray[Any] | None:
    """What an input always is: an initializer, or one whose numbers were only moved."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.op_type not in MOVES or node.domain != "":
        return None
    arrays = {v.name or "": _constant(v) for v in node.inputs if v is not None}
    if any(array is None for array in arrays.values()):
        return None
    from onnx.reference import ReferenceEvaluator

    opset = node.graph.opset_imports[""] if isinstance(node.graph, ir.Graph) else 0
    results: Any = ReferenceEvaluator(ir.to_proto(node), opsets={"": opset}).run(None, arrays)
    return results[value.index() or 0]  # type: ignore[no-any-return]


def _take_place(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put `new` where `old` stood: its outputs take over name, shape, readers and role as graph outputs."""
    graph.insert_before(old, new)
    names = [output.name for output in old.outputs]
    for theirs, ours in zip(old.outputs, new.outputs, strict=True):
        ours.shape, ours.type = theirs.shape, theirs.type
        theirs.replace_all_uses_with(ours, replace_graph_outputs=True)
    replaced = list(old.outputs)
    graph.remove(old, safe=True)
    for theirs, ours, name in zip(replaced, new.outputs, names, strict=True):
        theirs.name = f"{name}_replaced" if name else None
        ours.name = name


def lstm(parts: "list[IntegerWeight]") -> dict[str, NDArray[Any]]:
    """[directions, in, 4·hidden] int8, gates in ONNX's order; scale [directions, 4·hidden]."""
    integers = [_reordered(part.integers.numpy(), TO_ONNX).T for part in parts]
    return {
        "integers": np.stack(integers),
        "scale": np.stack([_reordered(p.scale.numpy(), TO_ONNX)[:, 0] for p in parts]),
    }


def lstm_integers(array: NDArray[Any]) -> list[NDArray[Any]]:
    """Undo the layout: the [out, in] integers of each direction, in torch's order."""
    return [_reordered(matrix.T, TO_TORCH) for matrix in array]


def lstm_scales(array: NDArray[Any]) -> list[NDArray[Any]]:
    """Undo the layout: the [out, 1] scales of each direction, in torch's order."""
    return [_reordered(row[:, None], TO_TORCH) for row in array]


def _reordered(matrix: NDArray[Any], order: tuple[int, ...]) -> NDArray[Any]:
    """Rows of the four gates in another order."""
    gates = np.split(matrix, 4)
    return np.concatenate([gates[gate] for gate in order])
