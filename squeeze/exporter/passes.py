"""Graph passes: each a small function on an onnx-ir model that returns what it changed, in words, or nothing."""

import json
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

from squeeze.errors import ExportError

if TYPE_CHECKING:
    from squeeze.model import Model

# fmt: off
SAME_SINCE_21 = frozenset([
    "Add", "And", "Cast", "Concat", "Constant", "DequantizeLinear", "Div", "Equal", "Erf", "Expand", "Gather", "Gelu", "Gemm",
    "Greater", "Identity", "LayerNormalization", "Less", "MatMul", "Max", "Min", "Mul", "Neg", "Pow",
    "QuantizeLinear", "Range", "ReduceSum", "Reshape", "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Squeeze",
    "Sub", "Sum", "Tanh", "Transpose", "Unsqueeze", "Where",
])
# fmt: on
"""Operators whose meaning for floats and integers did not change between opsets 21 and 23 (23 adds 4-bit types)."""


def clear_metadata(model: ir.Model) -> None:
    """Drop the exporter's stack traces and doc strings: they hold paths of this machine and differ between runs."""
    ClearMetadataAndDocStringPass()(model)
    model.graph.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def remove_unused(model: ir.Model) -> None:
    """Drop nodes and initializers that nothing reads any more."""
    RemoveUnusedNodesPass()(model)


def standard_norms(model: ir.Model) -> list[str]:
    """Write ONNX Runtime's private SimplifiedLayerNormalization as the standard RMSNormalization of opset 23."""
    found = [node for node in model.graph if node.op_type == "SimplifiedLayerNormalization" and node.domain == ""]
    for node in found:
        kept = {name: node.attributes[name] for name in ("axis", "epsilon", "stash_type") if name in node.attributes}
        norm = ir.Node("", "RMSNormalization", [node.inputs[0], node.inputs[1]], kept, num_outputs=1, name=node.name)
        replace(model.graph, node, [norm], norm.outputs[0])
    return []


def plain_norms(model: ir.Model) -> list[str]:
    """Write the residual sum before a layer norm as Sum instead of Add.

    ONNX Runtime fuses Add + LayerNormalization into SkipLayerNormalization, whose CPU kernel is several times slower than
    the two plain ones (measured, docs/log.md). Sum of two inputs means the same and is left alone, in every runtime.
    """
    changed = 0
    for node in list(model.graph):
        if node.op_type != "LayerNormalization":
            continue
        first = node.inputs[0]
        add = first.producer() if first is not None else None
        if add is None or add.op_type != "Add" or any(v is None or v.const_value is not None for v in add.inputs):
            continue
        total = ir.node("Sum", list(add.inputs), name=f"{add.name}_sum")
        replace(model.graph, add, [total], total.outputs[0])
        changed += 1
    return [f"{changed} residual sums kept apart from their layer norms"] if changed else []


def rotate_every_text(model: ir.Model) -> None:
    """Give RotaryEmbedding a row of angles for each text of the batch.

    The exporter writes one row for all, [1, length, angles], as the network computed it. The operator's definition wants the
    batch there, and ONNX Runtime refuses batches over 1 without it.
    """
    import numpy as np

    spread: dict[ir.Value, ir.Value] = {}
    ones = None
    for node in list(model.graph):
        if node.op_type != "RotaryEmbedding" or node.domain != "" or any(v is not None for v in node.inputs[3:]):
            continue
        if ones is None:
            tensor = ir.tensor(np.ones(2, np.int64), name="squeeze.ones")
            ones = ir.Value(name=tensor.name, shape=ir.Shape([2]), type=ir.TensorType(tensor.dtype), const_value=tensor)
            model.graph.register_initializer(ones)
        for place in (1, 2):
            angles = node.inputs[place]
            if angles is None:
                continue
            if angles not in spread:
                batch = ir.node("Shape", [node.inputs[0]], {"start": 0, "end": 1}, name=f"{node.name}_batch_{place}")
                shape = ir.node("Concat", [batch.outputs[0], ones], {"axis": 0}, name=f"{node.name}_rows_{place}")
                rows = ir.node("Expand", [angles, shape.outputs[0]], name=f"{node.name}_angles_{place}")
                model.graph.insert_before(node, [batch, shape, rows])
                spread[angles] = rows.outputs[0]
            node.replace_input_with(place, spread[angles])


def share_transposed(model: ir.Model) -> list[str]:
    """Where one large initializer is the transpose of another (a tied output matrix), keep one and transpose it in the graph."""
    notes = []
    large = [
        v for v in model.graph.initializers.values() if v.const_value is not None and v.const_value.nbytes > 1 << 16
    ]
    for value in large:
        for other in large:
            if other is value or value.shape is None or other.shape is None or not value.uses() or not other.uses():
                continue
            if len(value.shape) != 2 or list(value.shape) != list(other.shape)[::-1] or value.dtype != other.dtype:
                continue
            reader = next(iter(other.uses())).node
            if reader.op_type != "Gather" or not _equal_transposed(value, other):
                continue
            turned = ir.node("Transpose", [other], {"perm": [1, 0]}, name=f"{other.name}_transposed")
            turned.outputs[0].name = f"{other.name}.transposed"
            model.graph.insert_before(next(iter(model.graph)), turned)
            value.replace_all_uses_with(turned.outputs[0])
            notes.append(f"{other.name} stored once for input and output")
    return notes


def _equal_transposed(value: ir.Value, other: ir.Value) -> bool:
    import numpy as np

    if value.const_value is None or other.const_value is None:
        return False
    return bool(np.array_equal(value.const_value.numpy(), other.const_value.numpy().T))


def raise_opset(model: ir.Model, opset: int) -> None:
    """Declare the default operator set as `opset`, once every operator in the graph is known to mean the same there."""
    found = model.graph.opset_imports[""]
    if found >= opset:
        return
    used = {node.op_type for node in model.graph.all_nodes() if node.domain == ""}
    changed = used - SAME_SINCE_21 - {"RMSNormalization"}
    if found < 21 or changed:
        raise ExportError(
            f"the graph is opset {found} and uses {sorted(changed)}, which squeeze cannot raise to {opset}."
        )
    model.graph.opset_imports[""] = opset


def name_provenance(model: ir.Model, source: "Model", places: list[dict[str, Any]]) -> None:
    """Write into the model's own metadata where it came from and where its integers are."""
    from squeeze import __version__

    model.producer_name, model.producer_version = "squeeze", __version__
    model.graph.name = "squeeze"
    model.metadata_props["squeeze.version"] = __version__
    model.metadata_props["squeeze.source"] = source.source
    model.metadata_props["squeeze.task"] = source.task
    if source.artifact is not None:
        model.metadata_props["squeeze.artifact"] = source.artifact.digest
    if places:
        model.metadata_props["squeeze.integers"] = json.dumps(places, sort_keys=True)


def replace(graph: ir.Graph, old: ir.Node, new: list[ir.Node], output: ir.Value) -> None:
    """Put `new` where `old` (one output) stood; `output` takes over its name, shape, readers and role as graph output."""
    result = old.outputs[0]
    output.shape, output.type = result.shape, result.type
    name = result.name
    graph.insert_before(old, new)
    result.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    result.name = f"{name}_replaced"
    output.name = name
