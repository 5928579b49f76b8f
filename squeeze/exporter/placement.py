"""Integers into the graph: every float matrix that *is* a dequantized weight becomes a node that reads the integers.

Matrices are recognised by their content, not by name: exporters rename, transpose and concatenate (Q, K and V, say), yet
the rows stay bit for bit those of the dequantized weight. A weight that is not found is an error, never left in float.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from squeeze.errors import ExportError
from squeeze.exporter.outliers import with_outliers
from squeeze.exporter.passes import replace
from squeeze.exporter.recurrent import LAYOUT, lstm, lstm_integers, lstm_scales, place_lstm
from squeeze.integers import IntegerWeight, pack, unpack

CONTRIB = "com.microsoft"
INT8_ACTIVATIONS = 4
"""MatMulNBits' accuracy_level 4: activations as int8, one scale per block, measured as they come."""


@dataclass
class Place:
    """Where the integers of `layers` (stacked along their outputs) lie: an initializer and its layout there."""

    initializer: str
    layers: tuple[str, ...]
    layout: str

    def as_row(self) -> dict[str, Any]:
        """For the model's metadata, where `verify` reads it."""
        return {"initializer": self.initializer, "layers": list(self.layers), "layout": self.layout}


class Placer:
    """The graph at work, with what has been written so far, so that shared weights and shared inputs are written once."""

    def __init__(self, model: ir.Model, integers: Mapping[str, IntegerWeight]) -> None:
        self.graph, self.integers = model.graph, integers
        self.rows = _first_rows(integers)
        self.written: dict[tuple[tuple[str, ...], str], dict[str, ir.Value]] = {}
        self.quantized_inputs: dict[tuple[ir.Value, Any], tuple[ir.Value, ir.Value, ir.Value]] = {}
        self.gathered: dict[tuple[ir.Value, bytes], ir.Value] = {}
        self.places: list[Place] = []

    def find(self, matrix: NDArray[np.float32]) -> tuple[str, ...] | None:
        """Names of the layers whose rows, in order, are exactly the rows of `matrix` [out, in]; None if they are not."""
        names: list[str] = []
        while sum(self.integers[name].shape[0] for name in names) < len(matrix):
            name = self._layer_at(matrix, sum(self.integers[name].shape[0] for name in names))
            if name is None:
                return None
            names.append(name)
        return tuple(names)

    def runs(self, matrix: NDArray[np.float32]) -> list[tuple[tuple[str, ...], int]]:
        """The rows of `matrix` [out, in] as (layers that one kernel takes, how many rows they have), in order; rows that are no
        layer's integers are a run of no layers. Layers that an exporter joined need not have become the same integers."""
        found: list[tuple[tuple[str, ...], int]] = []
        row = 0
        while row < len(matrix):
            name = self._layer_at(matrix, row)
            rows = 1 if name is None else self.integers[name].shape[0]
            before, count = found[-1] if found else ((), 0)
            if name is None:
                joined = bool(count) and not before
            else:
                joined = bool(before) and _one_kernel(self.integers[before[0]], self.integers[name])
            if joined:
                found.pop()
            names = () if name is None else (name,)
            found.append((before + names, count + rows) if joined else (names, rows))
            row += rows
        return found

    def _layer_at(self, matrix: NDArray[np.float32], row: int) -> str | None:
        """The layer whose rows begin at `row`."""
        for name in self.rows.get(matrix[row].tobytes(), ()):
            out, columns = self.integers[name].shape
            part = matrix[row : row + out]
            if part.shape == (out, columns) and np.array_equal(part, _float_rows(self.integers[name])):
                return name
        return None

    def write(self, layers: tuple[str, ...], layout: str) -> dict[str, ir.Value]:
        """The initializers for these layers in this layout, written on first use."""
        key = (layers, layout)
        if key not in self.written:
            arrays = LAYOUTS[layout]([self.integers[name] for name in layers])
            base = "+".join(layers)
            values = {part: self._initializer(f"{base}.{part}", array) for part, array in arrays.items()}
            self.written[key] = values
            self.places.append(Place(f"{base}.integers", layers, layout))
        return self.written[key]

    def _initializer(self, name: str, array: NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """A small shared constant."""
        return self.graph.initializers[name] if name in self.graph.initializers else self._initializer(name, array)


def place_integers(
    model: ir.Model, integers: Mapping[str, IntegerWeight], activations: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """Replace the float matrices of `integers` in `model`; return where they went, and what was done in words."""
    if not integers:
        return [], []
    placer = Placer(model, integers)
    linears = gathers = recurrent = 0
    for node in list(model.graph):
        if node.op_type in ("MatMul", "Gemm") and node.domain == "":
            linears += _place_linear(placer, node, activations)
        elif node.op_type == "Gather" and node.domain == "":
            gathers += _place_embedding(placer, node)
        elif node.op_type == "LSTM" and node.domain == "":
            recurrent += place_lstm(placer, node)
    placed = {name for place in placer.places for name in place.layers}
    lost = sorted(set(integers) - placed)
    if lost:
        raise ExportError(
            f"{len(lost)} integer weights found no place in the graph, first {lost[0]}. Keep them in float with keep."
        )
    model.graph.opset_imports.setdefault(CONTRIB, 1)
    kernel = {
        "block-int8": "MatMulNBits", "static-uint8": "MatMulIntegerToFloat, inputs rounded in calibrated ranges, once for all readers",
    }.get(activations, "MatMulInteger with activations quantized once per input")  # fmt: skip
    return [p.as_row() for p in placer.places], [
        f"{linears} matrix products on {kernel}, {gathers} embeddings from integers",
        *([f"{recurrent} LSTM layers on DynamicQuantizeLSTM, states rounded at each step"] if recurrent else []),
    ]


def _place_linear(placer: Placer, node: ir.Node, activations: str) -> int:
    flipped = node.op_type == "Gemm" and bool(_attribute(node, "transB", 0))
    matrix = _constant_matrix(node.inputs[1])
    if matrix is None:
        return 0
    matrix = matrix if flipped else np.ascontiguousarray(matrix.T)
    runs = placer.runs(matrix)
    if not any(layers for layers, _ in runs):
        return 0
    if node.op_type == "Gemm" and (_attribute(node, "transA", 0) or _attribute(node, "alpha", 1.0) != 1.0):
        raise ExportError(f"{node.name} is a Gemm with transA or alpha, which squeeze does not turn into integers.")
    target, bias = node, node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    first = placer.integers[runs[0][0][0]] if len(runs) == 1 else None
    if first is None:
        new = _split_product(placer, node, matrix, runs)
        if bias is not None:
            new.append(ir.node("Add", [new[-1].outputs[0], bias], name=f"{node.name}_bias"))
    else:
        if bias is None and (first.inputs is not None or first.outliers is not None):
            target, bias = _with_bias(node)
        new = _product(placer, node, runs[0][0], bias)
    replace(placer.graph, target, new, new[-1].outputs[0])
    return 1


def _product(placer: Placer, node: ir.Node, layers: tuple[str, ...], bias: ir.Value | None = None) -> list[ir.Node]:
    """x · Wᵀ + b by the kernel for these layers' integers; its last node gives the sum."""
    first = placer.integers[layers[0]]
    if first.block_size is None and first.inputs is not None:
        new = _static_product(placer, node, layers, bias)
    else:
        new = (_dynamic_product if first.block_size is None else _block_product)(placer, node, layers)
        if bias is not None:
            new.append(ir.node("Add", [new[-1].outputs[0], bias], name=f"{node.name}_bias"))
    return [*new, *with_outliers(placer, node, layers, new[-1].outputs[0])]


def _split_product(
    placer: Placer, node: ir.Node, matrix: NDArray[np.float32], runs: list[tuple[tuple[str, ...], int]]
) -> list[ir.Node]:
    """One product of layers that are not of one kind, in mixed precision say, as one for each run of rows, put side by side."""
    new: list[ir.Node] = []
    parts: list[ir.Value] = []
    row = 0
    for number, (layers, rows) in enumerate(runs):
        if layers:
            made = _product(placer, node, layers)
        else:
            part = placer.constant(f"{node.name}.float_{number}", np.ascontiguousarray(matrix[row : row + rows].T))
            made = [ir.node("MatMul", [node.inputs[0], part], name=f"{node.name}_float")]
        for one in made:
            one.name = f"{one.name}_{number}"
        new += made
        parts.append(made[-1].outputs[0])
        row += rows
    return [*new, ir.node("Concat", parts, {"axis": -1}, name=f"{node.name}_join")]


def _block_product(placer: Placer, node: ir.Node, layers: tuple[str, ...]) -> list[ir.Node]:
    """x · Wᵀ by MatMulNBits: unsigned blocks, whose zero point is 128 or 8 by the operator's definition where none is given."""
    weight = placer.write(layers, "blocks")
    first = placer.integers[layers[0]]
    attributes = {
        "K": first.shape[1], "N": sum(placer.integers[n].shape[0] for n in layers), "bits": first.bits,
        "block_size": first.block_size or 0, "accuracy_level": INT8_ACTIVATIONS,
    }  # fmt: skip
    inputs = [node.inputs[0], weight["integers"], weight["scale"]]
    inputs += [weight["zero_point"]] if "zero_point" in weight else []
    return [ir.node("MatMulNBits", inputs, attributes, domain=CONTRIB, name=f"{node.name}_int{first.bits}")]


def _dynamic_product(placer: Placer, node: ir.Node, layers: tuple[str, ...]) -> list[ir.Node]:
    """x · Wᵀ by MatMulInteger on uint8 activations. ONNX Runtime fuses this exact shape into its integer kernels."""
    weight = placer.write(layers, "columns")
    new, (integers, scale, zero_point) = _quantized(placer, node, layers[0])
    product = ir.node("MatMulInteger", [integers, weight["integers"], zero_point], name=f"{node.name}_int8")
    cast = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{node.name}_cast")
    scales = ir.node("Mul", [scale, weight["scale"]], name=f"{node.name}_scales")
    result = ir.node("Mul", [cast.outputs[0], scales.outputs[0]], name=f"{node.name}_dequantize")
    return [*new, product, cast, scales, result]


def _static_product(
    placer: Placer, node: ir.Node, layers: tuple[str, ...], bias: ir.Value | None = None
) -> list[ir.Node]:
    """x · Wᵀ + b by one kernel on uint8 inputs of a fixed range. OpenVINO reads it as well, and runs it on its integer units.

    Rejected: QDQ pairs, which ONNX Runtime fuses to the same kernel but without the bias, and MatMulInteger with constant scales,
    whose pattern its constant folding breaks (docs/log.md, 2026-11-25).
    """
    weight = placer.write(layers, "columns")
    new, (integers, scale, zero_point) = _quantized(placer, node, layers[0])
    inputs = [integers, weight["integers"], scale, weight["scale"], zero_point, None, bias]
    return [*new, ir.node("MatMulIntegerToFloat", inputs, domain=CONTRIB, name=f"{node.name}_int8")]


def _quantized(placer: Placer, node: ir.Node, layer: str) -> tuple[list[ir.Node], tuple[ir.Value, ir.Value, ir.Value]]:
    """(nodes still to be put before the product, (integers, scale, zero point)) of what a layer reads: once for all readers."""
    x, weight = node.inputs[0], placer.integers[layer]
    if x is None:
        raise ExportError(f"{node.name} has no input.")
    factor = weight.input_factor
    key = (x, (weight.inputs, None if factor is None else factor.numpy().tobytes()))
    if key in placer.quantized_inputs:
        return [], placer.quantized_inputs[key]
    nodes: list[ir.Node] = []
    if factor is not None:
        constant = placer.constant(f"{layer}.input_factor", factor.numpy())
        nodes.append(ir.node("Mul", [x, constant], name=f"{node.name}_smooth"))
    source = nodes[-1].outputs[0] if nodes else x
    if weight.inputs is None:
        quantize = ir.node("DynamicQuantizeLinear", [source], num_outputs=3, name=f"{node.name}_quantize")
        found = (quantize.outputs[0], quantize.outputs[1], quantize.outputs[2])
    else:
        scale = placer.constant(f"{layer}.input_scale", np.array(weight.inputs.scale, np.float32))
        zero_point = placer.constant(f"{layer}.input_zero_point", np.array(weight.inputs.zero_point, np.uint8))
        quantize = ir.node("QuantizeLinear", [source, scale, zero_point], name=f"{node.name}_quantize")
        found = (quantize.outputs[0], scale, zero_point)
    nodes.append(quantize)
    placer.quantized_inputs[key] = found
    producer = x.producer()
    if producer is None:
        return nodes, found
    placer.graph.insert_after(producer, nodes)  # right after x is made, so that every later reader can share it
    return [], found


def _with_bias(node: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """The addition of a constant row to a product, where that is its only reader, and the row; else the product itself."""
    readers = list(node.outputs[0].uses())
    if len(readers) != 1 or readers[0].node.op_type != "Add" or node.outputs[0].is_graph_output():
        return node, None
    add = readers[0].node
    other = add.inputs[1 - readers[0].idx]
    row = None if other is None or other.const_value is None else other.const_value
    if row is None or tuple(row.shape) != (_columns_out(node),):
        return node, None
    return add, other


def _columns_out(node: ir.Node) -> int:
    matrix = _constant_matrix(node.inputs[1])
    return -1 if matrix is None else matrix.shape[1]


def _one_kernel(one: IntegerWeight, other: IntegerWeight) -> bool:
    """Whether one product can take both: integers of one kind, inputs rounded alike, the same outlier channels."""
    kinds = [(w.bits, w.block_size, isinstance(w.zero_point, int), w.outliers is None) for w in (one, other)]
    if kinds[0] != kinds[1] or one.inputs != other.inputs or (one.divisor is None) != (other.divisor is None):
        return False
    if one.outliers is not None and not one.outliers.same_channels(other.outliers):
        return False
    return one.divisor is None or other.divisor is None or torch.equal(one.divisor, other.divisor)


def _place_embedding(placer: Placer, node: ir.Node) -> int:
    matrix = _constant_matrix(node.inputs[0])
    layers = placer.find(matrix) if matrix is not None and _attribute(node, "axis", 0) == 0 else None
    if layers is None or len(layers) != 1:
        return 0
    integer = placer.integers[layers[0]]
    if integer.bits != 8:
        raise ExportError(
            f"{layers[0]} is a table of {integer.bits}-bit rows, which no kernel looks up. Keep it in float with keep."
        )
    new = _gather_rows(placer, node, layers) if integer.block_size is None else _gather_blocks(placer, node, layers)
    replace(placer.graph, node, new, new[-1].outputs[0])
    return 1


def _gather_blocks(placer: Placer, node: ir.Node, layers: tuple[str, ...]) -> list[ir.Node]:
    """Rows of a block-wise matrix, from the very bytes that MatMulNBits reads where input and output are tied."""
    weight = placer.write(layers, "blocks")
    integer = placer.integers[layers[0]]
    size, columns = integer.block_size or 0, integer.shape[1]
    last = placer.constant("squeeze.last_axis", np.array([-1], np.int64))
    scale = ir.node("Unsqueeze", [weight["scale"], last], name=f"{node.name}_scale")
    attributes = {"bits": 8, "block_size": size, "gather_axis": 0, "quantize_axis": 2}
    inputs = [weight["integers"], node.inputs[1], scale.outputs[0]]
    rows = ir.node("GatherBlockQuantized", inputs, attributes, domain=CONTRIB, name=f"{node.name}_int8")
    flat = ir.node("Reshape", [rows.outputs[0], placer.constant("squeeze.join_blocks", np.array([0, 0, -1], np.int64))])
    flat.name = f"{node.name}_join"
    if columns % size == 0:
        return [scale, rows, flat]
    bounds = [placer.constant(f"squeeze.slice_{v}", np.array([v], np.int64)) for v in (0, columns)]
    cut = ir.node("Slice", [flat.outputs[0], *bounds, last], name=f"{node.name}_cut")
    return [scale, rows, flat, cut]


def _gather_rows(placer: Placer, node: ir.Node, layers: tuple[str, ...]) -> list[ir.Node]:
    """Rows of a per-row matrix: integers and scales gathered by the same ids, then multiplied."""
    weight = placer.write(layers, "rows")
    rows = ir.node("Gather", [weight["integers"], node.inputs[1]], {"axis": 0}, name=f"{node.name}_int8")
    cast = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{node.name}_cast")
    scale = ir.node("Gather", [weight["scale"], node.inputs[1]], {"axis": 0}, name=f"{node.name}_scale")
    return [rows, cast, scale, ir.node("Mul", [cast.outputs[0], scale.outputs[0]], name=f"{node.name}_dequantize")]


def _constant_matrix(value: ir.Value | None) -> NDArray[np.float32] | None:
    """The float matrix behind an input: an initializer, or the plain transpose of one."""
    if value is None:
        return None
    if value.const_value is not None:
        array = value.const_value.numpy()
        return array if array.ndim == 2 and array.dtype == np.float32 else None
    producer = value.producer()
    if producer is None or producer.op_type != "Transpose" or (_attribute(producer, "perm", None) or [1, 0]) != [1, 0]:
        return None
    inner = _constant_matrix(producer.inputs[0])
    return None if inner is None else np.ascontiguousarray(inner.T)


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    return list(attribute.value) if isinstance(attribute.value, tuple) else attribute.value


def _float_rows(weight: IntegerWeight) -> NDArray[np.float32]:
    matrix = weight.dequantize()
    return (matrix.T if weight.transposed else matrix).contiguous().numpy()


def _first_rows(integers: Mapping[str, IntegerWeight]) -> dict[bytes, list[str]]:
    rows: dict[bytes, list[str]] = {}
    for name, weight in integers.items():
        rows.setdefault(_float_rows(weight)[0].tobytes(), []).append(name)
    return rows


def _blocks(parts: list[IntegerWeight]) -> dict[str, NDArray[Any]]:
    """[out, blocks, bytes of a block] uint8, the last block filled up with the zero point; scale [out, blocks]; zero points packed
    as the integers are, [out, bytes of all blocks], where each block has its own."""
    stored, zeros = [], []
    for part in parts:
        out, columns = part.shape
        size = part.block_size or columns
        blocks = part.scale.shape[1]
        zero = part.zero_point if isinstance(part.zero_point, Tensor) else torch.full((out, blocks), part.zero_point)
        full = zero.to(torch.uint8).repeat_interleave(size, dim=1)
        full[:, :columns] = part.integers
        stored.append(pack(full, part.bits).numpy().reshape(out, blocks, size * part.bits // 8))
        zeros.append(pack(zero.to(torch.uint8), part.bits).numpy())
    arrays = {"integers": np.concatenate(stored), "scale": np.concatenate([p.scale.numpy() for p in parts])}
    return arrays if isinstance(parts[0].zero_point, int) else arrays | {"zero_point": np.concatenate(zeros)}


def _columns(parts: list[IntegerWeight]) -> dict[str, NDArray[Any]]:
    """[in, out] int8, as MatMulInteger multiplies; scale [out]."""
    integers = np.concatenate([p.integers.numpy() for p in parts]).T
    return {"integers": integers, "scale": np.concatenate([p.scale.numpy()[:, 0] for p in parts])}


def _rows(parts: list[IntegerWeight]) -> dict[str, NDArray[Any]]:
    """[rows, columns] int8 as kept; scale [rows, 1]."""
    return {"integers": parts[0].integers.numpy(), "scale": parts[0].scale.numpy()}


def integers_in_graph(array: NDArray[Any], layout: str, weights: list[IntegerWeight]) -> list[NDArray[Any]]:
    """Undo a layout: the [out, in] integers of each layer as they lie in the graph's initializer. For `verify`."""
    if layout == LAYOUT:
        return lstm_integers(array)
    if layout == "blocks":
        bits, columns = weights[0].bits, weights[0].shape[1]
        array = unpack(torch.tensor(array.reshape(array.shape[0], -1)), bits, array[0].size * 8 // bits).numpy()[
            :, :columns
        ]
    elif layout == "columns":
        array = array.T
    ends = np.cumsum([w.shape[0] for w in weights])
    return np.split(array, ends[:-1])


def scales_in_graph(array: NDArray[Any], layout: str) -> NDArray[Any]:
    """Undo a layout: the scales of all its layers, in the order in which the artifact keeps them. For `verify`."""
    return (np.concatenate(lstm_scales(array)) if layout == LAYOUT else array).ravel()


LAYOUTS = {"blocks": _blocks, "columns": _columns, "rows": _rows, LAYOUT: lstm}
