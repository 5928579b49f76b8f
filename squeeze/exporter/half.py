"""16-bit weights into the graph: float16 computed in float16, bfloat16 stored and computed in float32.

Weights are recognised by content, as integers are: an initializer whose every value is a 16-bit number is written as 16 bits, and
loses nothing. What is computed in which type follows torch.autocast's lists (github.com/pytorch/pytorch, docs/source/amp.md):
products and attention in 16 bits, sums and functions that overflow or cancel in float32, everything else in the widest type it reads.
Norms sum in float32 by the definition of the operator (stash_type 1).

bfloat16 is only stored: ONNX Runtime's CPU provider refuses a bfloat16 MatMul ("Could not find an implementation", 1.32) and puts no
casts around it, as it does for float16. Each matrix is cast to float32 by a node that the runtime folds away when it loads.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from torch import nn

from squeeze.halves import Half

# fmt: off
PRODUCTS = frozenset([
    "Attention", "Conv", "ConvTranspose", "Einsum", "Gemm", "GroupQueryAttention", "MatMul", "MultiHeadAttention", "RotaryEmbedding",
])
"""Computed in 16 bits, whatever they read, unless a weight of theirs is kept in float32. Recurrent layers are not among them: with one
in float16, before a Transpose and a MatMul, ONNX Runtime 1.32 dies of a segmentation fault when the CPU session opens with all of its
optimizations (docs/log.md). Their weights are stored in 16 bits all the same."""
TABLES = frozenset(["GroupQueryAttention", "RotaryEmbedding"])
"""Products whose constants are sines and cosines, which are rounded as Transformers rounds them; they are nobody's weights."""
CACHE_SCALES = 12
"""Inputs of GroupQueryAttention from here on are the scales of an int8 cache, of a type of their own: float32."""
WIDEST = frozenset([
    "Abs", "Add", "Clip", "Compress", "Concat", "Constant", "Div", "DepthToSpace", "Dropout", "Elu", "Expand", "Flatten", "Gather",
    "GatherElements", "GatherND", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LayerNormalization", "LeakyRelu", "Max", "Mean", "Min",
    "Mul", "Neg", "PRelu", "Pad", "RMSNormalization", "Relu", "Reshape", "Scatter", "ScatterElements", "ScatterND", "Sigmoid",
    "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Slice", "Split", "Squeeze", "Sub",
    "Sum", "Swish", "Tanh", "Tile", "Transpose", "Unsqueeze", "Where",
])
"""Computed in 16 bits unless they read a float32 tensor. Operators in neither list are computed in float32."""
TRUTHS = frozenset(["And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not", "Or", "Xor"])
COUNTS = frozenset(["ArgMax", "ArgMin", "NonZero", "Shape", "Size"])
# fmt: on
NEVER = 1e30
"""A constant beyond this stands for minus infinity in a mask; in float16 it becomes the largest number, so that a row of nothing
else has a softmax."""
SHORT = 1 << 16
"""Vectors are looked for in tensors of up to this many numbers."""
FEW_ROWS = 16
"""A table may be folded to the one row that is read, of its first so many: a token type."""
COMPUTES = "squeeze.computes"
"""Key of the graph's metadata: the type that its products compute in."""
FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def halve(model: ir.Model, half: Half | None) -> list[str]:
    """Write the weights of `model` as `half` says, and compute in float16 where it is float16; what was done, in words."""
    if half is None:
        return []
    nested = any(
        a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for n in model.graph for a in n.attributes.values()
    )
    if half.dtype == "bfloat16" or nested or model.functions:
        count = Halver(model, half).store()
        model.metadata_props[COMPUTES] = "float32"
        why = "its CPU kernels take no bfloat16" if half.dtype == "bfloat16" else "the graph has graphs inside"
        return [f"{count} tensors stored in {half.dtype}, computed in float32 in ONNX Runtime: {why}"]
    model.metadata_props[COMPUTES] = "float16"
    halver = Halver(model, half)
    halver.compute()
    return [
        f"{halver.stored} tensors and {halver.narrow} operators in float16, {halver.wide} operators in float32; "
        f"inputs are token numbers, {model.graph.outputs[0].name} is float32"
    ]


class Halver:
    """The graph at work: which values are 16-bit by now, and the casts that were put in, each once."""

    def __init__(self, model: ir.Model, half: Half) -> None:
        self.model, self.graph, self.half = model, model.graph, half
        self.dtype = FLOAT16 if half.dtype == "float16" else BFLOAT16
        self.stored = self.narrow = self.wide = 0
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._narrow: dict[ir.Value, ir.Value] = {}
        self._types: dict[ir.Value, ir.DataType | None] = {}
        self._exact: dict[ir.Value, bool] = {}
        self._kept: set[ir.Value] = set()
        """What is made of constants alone, some of them weights kept in float32: a turned matrix, the stacked gates of an LSTM."""

    def store(self) -> int:
        """Write every weight in 16 bits and cast it back to float32 for its readers; how many were written."""
        for value in list(self.graph.initializers.values()):
            if value.dtype == FLOAT and value.uses() and not _is_scalar(value) and self._is_exact(value):
                uses = list(value.uses())
                wide = self._cast(self._in_sixteen(value), FLOAT)
                for use in uses:
                    use.node.replace_input_with(use.idx, wide)
        return self.stored

    def compute(self) -> None:
        """Give every operator its type, from the inputs on; the first output stays float32, the cache is 16-bit."""
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(self.model)
        for value in self.graph.inputs:
            if value.dtype == FLOAT:
                self._become_narrow(value)
        for node in list(self.graph):
            self._type_outputs(node)
            self._convert(node)
        first = self.graph.outputs[0]
        for place, value in enumerate(list(self.graph.outputs)):
            if self._type(value) in (FLOAT, FLOAT16):
                self._give_out(place, value, FLOAT if value is first else FLOAT16)

    def _convert(self, node: ir.Node) -> None:
        floats = [
            place
            for place, value in enumerate(node.inputs)
            if value is not None and self._type(value) in (FLOAT, FLOAT16)
            and not (node.op_type == "GroupQueryAttention" and place >= CACHE_SCALES)
        ]  # fmt: skip
        if not floats or (node.op_type == "Cast" and node.domain == ""):
            return
        type_ = self._type_of(node, [value for place in floats if (value := node.inputs[place]) is not None])
        if type_ == FLOAT and all(v is None or v.const_value is not None or v in self._kept for v in node.inputs):
            self._kept.update(node.outputs)
        for place in floats:
            value = node.inputs[place]
            if value is not None:
                node.replace_input_with(place, self._as(value, type_))
        gives = [value for value in node.outputs if self._types.get(value) == FLOAT]
        if gives and any(self._computes(node)):
            self.narrow, self.wide = self.narrow + (type_ == FLOAT16), self.wide + (type_ == FLOAT)
        if type_ == FLOAT16 and node.op_type == "Attention" and node.domain == "":
            node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", FLOAT.value)
        for value in gives if type_ == FLOAT16 else ():
            self._become_narrow(value)

    @staticmethod
    def _computes(node: ir.Node) -> Iterator[bool]:
        yield node.op_type in PRODUCTS or node.op_type not in WIDEST
        yield node.op_type in ("Add", "Div", "Gelu", "Mul", "Sub", "Sum") or "Normalization" in node.op_type

    def _type_of(self, node: ir.Node, floats: list[ir.Value]) -> ir.DataType:
        """FLOAT or FLOAT16, see the lists above. A single number takes the type of what it meets."""
        constants = [value for value in floats if value.const_value is not None and not _is_scalar(value)]
        if node.op_type in PRODUCTS:
            exact = node.op_type in TABLES or all(map(self._is_exact, constants))
            return FLOAT16 if exact and self._kept.isdisjoint(floats) else FLOAT
        if node.op_type not in WIDEST:
            return FLOAT
        met = [self._type(value) for value in floats if value.const_value is None]
        met += [FLOAT16 if self._is_exact(value) else FLOAT for value in constants]
        return FLOAT if FLOAT in met or not met else FLOAT16

    def _as(self, value: ir.Value, type_: ir.DataType) -> ir.Value:
        """`value` in this type: itself, a constant of that type, or a cast."""
        if value.const_value is None:
            return value if self._type(value) == type_ else self._cast(value, type_)
        if type_ == FLOAT16:
            return self._in_sixteen(value)
        if _is_scalar(value) or not self._is_exact(value):
            return value
        return self._cast(self._in_sixteen(value), FLOAT)

    def _in_sixteen(self, value: ir.Value) -> ir.Value:
        """The constant `value` in 16 bits, under its own name; only masks and tables lose anything (`_is_exact`)."""
        if value not in self._narrow:
            number = self._array(value).astype(self.dtype.numpy())
            keeps_name = not _is_scalar(value)
            name = str(value.name) if keeps_name else f"{value.name}.{self.half.dtype}"
            tensor = ir.Tensor(np.ascontiguousarray(number), name=name)
            new = ir.Value(name=name, shape=ir.Shape(number.shape), type=ir.TensorType(self.dtype), const_value=tensor)
            if keeps_name and value.name in self.graph.initializers:
                self.graph.initializers.pop(name)
                value.name = f"{name}.float32"
                self.graph.register_initializer(value)
            self.graph.register_initializer(new)
            self._narrow[value] = new
            self._types[new] = self.dtype
            self.stored += keeps_name
        return self._narrow[value]

    def _cast(self, value: ir.Value, type_: ir.DataType) -> ir.Value:
        key = (value, type_)
        if key not in self._casts:
            node = ir.node("Cast", [value], {"to": type_}, name=f"{value.name}_to_{type_.name.lower()}")
            result = node.outputs[0]
            result.name, result.shape, result.type = (
                f"{value.name}.{type_.name.lower()}",
                value.shape,
                ir.TensorType(type_),
            )
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(next(iter(self.graph)), node)
            else:
                self.graph.insert_after(producer, node)
            self._casts[key], self._types[result] = result, type_
        return self._casts[key]

    def _give_out(self, place: int, value: ir.Value, type_: ir.DataType) -> None:
        """Make the graph's output at this place one of that type, under the same name."""
        if self._type(value) == type_:
            return
        name = value.name
        value.name = f"{name}.{self._type(value).name.lower()}"  # type: ignore[union-attr]
        result = self._cast(value, type_)
        result.name = name
        self.graph.outputs[place] = result

    def _become_narrow(self, value: ir.Value) -> None:
        value.type = ir.TensorType(FLOAT16)
        self._types[value] = FLOAT16

    def _is_exact(self, value: ir.Value) -> bool:
        """Whether every number of a constant is one of 16 bits: then it is a weight that was cast, or may pass for one."""
        if value not in self._exact:
            self._exact[value] = is_exact(self._array(value), self.dtype)
        return self._exact[value]

    def _array(self, value: ir.Value) -> NDArray[np.float32]:
        """A constant's numbers in float32, those that stand for infinity made float16's largest."""
        array = value.const_value.numpy() if value.const_value is not None else np.empty(0, np.float32)
        if self.dtype != FLOAT16:
            return array
        never = np.isfinite(array) & (np.abs(array) > NEVER)
        return np.where(never, np.sign(array) * np.float32(np.finfo(np.float16).max), array)

    def _type(self, value: ir.Value) -> ir.DataType | None:
        return self._types.get(value, value.dtype)

    def _type_outputs(self, node: ir.Node) -> None:
        """Types of outputs that the exporter left open: an operator gives what it reads, unless it compares, counts or casts."""
        for value in node.outputs:
            if value.dtype is not None:
                self._types[value] = value.dtype
            elif node.op_type in TRUTHS:
                self._types[value] = ir.DataType.BOOL
            elif node.op_type in COUNTS:
                self._types[value] = ir.DataType.INT64
            elif node.op_type in ("Cast", "Range", "Constant", "ConstantOfShape"):
                self._types[value] = _stated(node)
            else:
                read = [
                    self._type(v)
                    for v in (node.inputs[1:] if node.op_type == "Where" else node.inputs)
                    if v is not None
                ]
                self._types[value] = FLOAT if read[:1] == [FLOAT16] else read[0] if read else None


def _stated(node: ir.Node) -> ir.DataType | None:
    """The type that a node names itself; of Range, that of what it reads."""
    if node.op_type == "Range":
        return None if node.inputs[0] is None else node.inputs[0].dtype
    found = node.attributes.get("to") or node.attributes.get("value")
    if found is None:
        return FLOAT
    return ir.DataType(found.as_int()) if found.name == "to" else found.as_tensor().dtype


def _is_scalar(value: ir.Value) -> bool:
    """A single number, of any rank: part of a formula, not a weight."""
    return value.const_value is not None and value.const_value.size == 1


def is_exact(array: NDArray[Any], type_: ir.DataType) -> bool:
    """Whether every number of `array` is one of this type."""
    with np.errstate(over="ignore"):
        return bool(np.array_equal(array.astype(type_.numpy()).astype(np.float32), array))


def missing_halves(model: ir.Model, network: nn.Module, half: Half) -> list[str]:
    """Names of the parameters whose 16 bits lie nowhere in the graph, each in order. For `verify`.

    Exporters rename, turn and stack: a matrix may be part of a larger one or its transpose; the gates of a recurrent layer are found one
    by one, in whatever order; and of a table of which one row is always read that row is enough.
    """
    type_ = FLOAT16 if half.dtype == "float16" else BFLOAT16
    values = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    arrays = [tensor.numpy().view(np.uint16) for tensor in values if tensor.dtype == type_]
    short = b"".join(array.tobytes() for array in arrays if array.size <= SHORT)
    owners = {id(p): module for module in network.modules() for p in module.parameters(recurse=False)}
    pieces = {name: _pieces(parameter, owners[id(parameter)], half) for name, parameter in half.tensors(network)}
    wanted = {piece[0].tobytes() for found in pieces.values() for piece in found if piece.ndim == 2}
    rows: dict[bytes, list[tuple[NDArray[np.uint16], int]]] = {}
    for array in arrays:
        matrix = array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array[None]
        for turned in (matrix, np.ascontiguousarray(matrix.T)):
            for number, row in enumerate(turned):
                if (key := row.tobytes()) in wanted:
                    rows.setdefault(key, []).append((turned, number))

    def is_there(bits: NDArray[np.uint16]) -> bool:
        if bits.ndim != 2:
            return bits.tobytes() in short
        places = rows.get(bits[0].tobytes(), ())
        return any(np.array_equal(matrix[start : start + len(bits)], bits) for matrix, start in places)

    missing = []
    for name, parameter in half.tensors(network):
        table = isinstance(owners[id(parameter)], nn.Embedding)
        one_row = table and any(row.tobytes() in short for row in pieces[name][0][:FEW_ROWS])
        if not one_row and not all(map(is_there, pieces[name])):
            missing.append(name)
    return missing


def _pieces(parameter: torch.Tensor, owner: nn.Module, half: Half) -> list[NDArray[np.uint16]]:
    """The 16 bits of a parameter, gate by gate where it has gates."""
    bits = parameter.detach().to(half.torch_dtype).view(torch.int16).numpy().view(np.uint16)
    gates = {"LSTM": 4, "GRU": 3}.get(owner.mode, 1) if isinstance(owner, nn.RNNBase) else 1
    return [np.ascontiguousarray(gate) for gate in np.split(bits, gates)]
