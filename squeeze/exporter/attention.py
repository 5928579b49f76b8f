"""Attention without transposed heads, and a last layer that works for the one token a classifier reads.

Two graph passes that change where and how often something is computed, never what comes out. They match by operators and
shapes, not by names, and leave alone whatever they do not recognise to the last detail.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from squeeze.exporter.passes import remove_unused, replace

HEADS_FIRST = (0, 2, 1, 3)
"""[batch, tokens, heads, size] to [batch, heads, tokens, size], and back."""
TOKENS = 1
"""The axis of the tokens in [batch, tokens, width]."""
UNARY = frozenset(["Cast", "Erf", "Gelu", "Identity", "Neg", "Relu", "Sigmoid", "Sqrt", "Tanh"])
ELEMENTWISE = frozenset(["Add", "Div", "Mul", "Pow", "Sub", "Sum"])
NORMS = frozenset(["LayerNormalization", "RMSNormalization"])


def attention_on_rows(model: ir.Model) -> list[str]:
    """Let attention read and write [batch, tokens, heads · size], where the exporter splits and transposes the heads first.

    Opset 23's Attention does the same on either layout; rows spare it four transposes of the whole batch in every layer.
    """
    if _has_cache(model):
        return []
    changed = 0
    for node in list(model.graph):
        if not _is(node, "Attention") or any(value is not None for value in node.inputs[4:]):
            continue
        split = [found for value in node.inputs[:3] if (found := _rows_before_heads(value)) is not None]
        join = _join_of_heads(node)
        if join is None or len(split) != 3:
            continue
        (q, heads), (k, kv_heads), (v, _) = split
        attributes: dict[str, Any] = {**node.attributes, "q_num_heads": heads, "kv_num_heads": kv_heads}
        rows = ir.node("Attention", [q, k, v, *node.inputs[3:4]], attributes, name=node.name)
        replace(model.graph, join, [rows], rows.outputs[0])
        changed += 1
    if changed:
        remove_unused(model)  # the next pass asks who reads a value
    return [f"{changed} attentions read and write rows of tokens, heads not transposed"] if changed else []


def first_token_only(model: ir.Model) -> list[str]:
    """Compute only the first token wherever nothing else is read: after the last keys and values of a text classifier.

    Values keep their three axes, so the head's own selection of token 0 stays as it is. Run it on products in float: their
    integer form rounds an input once for all readers. A decoder is left alone: it is read at its last token.
    """
    if _has_cache(model) or any(_looks_back(node) for node in model.graph.all_nodes()):
        return []
    narrowed = _first_token_nodes(model.graph)
    if not any(node.op_type == "MatMul" for node in narrowed):
        return []  # nothing saved that is worth a Slice
    made = {output for node in narrowed for output in node.outputs}
    firsts: dict[tuple[ir.Value, int], ir.Value] = {}
    for node, places in narrowed.items():
        for place, axis in [*((place, TOKENS) for place in places), *_mask_axis(node)]:
            value = node.inputs[place]
            if value is None or value in made:
                continue
            if (value, axis) not in firsts:
                firsts[value, axis] = _insert_first(model.graph, node, value, axis)
            node.replace_input_with(place, firsts[value, axis])
        for output in node.outputs:
            output.shape = _with_one(output.shape, TOKENS)
    return [f"{len(narrowed)} operators at the end compute the first token only, the one that is read"]


def _has_cache(model: ir.Model) -> bool:
    return any((value.name or "").startswith("past_key_values") for value in model.graph.inputs)


def _looks_back(node: ir.Node) -> bool:
    """Whether `node` is a decoder's attention: to earlier tokens only, or to a cache."""
    if not _is(node, "Attention"):
        return False
    return _integer(node, "is_causal", 0) != 0 or any(value is not None for value in node.inputs[4:])


def _mask_axis(node: ir.Node) -> list[tuple[int, int]]:
    """(3, its axis of queries) where `node` is attention with a mask that has a row for every query."""
    mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
    if mask is None or mask.shape is None or mask.shape[-2] == 1:
        return []
    return [(3, len(mask.shape) - 2)]


def _rows_before_heads(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """The rows that `value` [batch, heads, tokens, size] was split from, and the number of heads."""
    turn = None if value is None else value.producer()
    if turn is None or not _turns_heads(turn) or turn.inputs[0] is None:
        return None
    split = turn.inputs[0].producer()
    if split is None or not _is(split, "Reshape") or split.inputs[0] is None:
        return None
    heads = _heads(split.inputs[0], split.outputs[0])
    return None if heads is None else (split.inputs[0], heads)


def _join_of_heads(attention: ir.Node) -> ir.Node | None:
    """The Reshape that joins the heads of what `attention` gives, if nothing else reads it."""
    if any(output.uses() or output.is_graph_output() for output in attention.outputs[1:]):
        return None
    turn = _only_reader(attention.outputs[0])
    join = _only_reader(turn.outputs[0]) if turn is not None and _turns_heads(turn) else None
    if turn is None or join is None or not _is(join, "Reshape"):
        return None
    return None if _heads(join.outputs[0], turn.outputs[0]) is None else join


def _heads(rows: ir.Value, heads: ir.Value) -> int | None:
    """The number of heads, if [batch, tokens, width] and [batch, tokens, heads, size] differ in the split of width alone."""
    if rows.shape is None or heads.shape is None or len(rows.shape) != 3 or len(heads.shape) != 4:
        return None
    count = heads.shape[2]
    same = all(_same_length(rows.shape[axis], heads.shape[axis]) for axis in (0, TOKENS))
    return count if same and isinstance(count, int) else None


def _same_length(one: "int | ir.SymbolicDim", other: "int | ir.SymbolicDim") -> bool:
    unknown = isinstance(one, ir.SymbolicDim) and one.value is None
    return not unknown and one == other


def _turns_heads(node: ir.Node) -> bool:
    perm = node.attributes.get("perm")
    return _is(node, "Transpose") and perm is not None and tuple(perm.as_ints()) == HEADS_FIRST


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and uses[0].idx == 0 and not value.is_graph_output() else None


def _first_token_nodes(graph: ir.Graph) -> dict[ir.Node, list[int]]:
    """Nodes of which only the first token is read, in order, each with the inputs that carry tokens."""
    found: dict[ir.Node, list[int]] = {}
    for node in reversed(graph):
        if all(_first_is_enough(output, found) for output in node.outputs) and (places := _token_inputs(node)):
            found[node] = places
    return dict(reversed(found.items()))


def _first_is_enough(value: ir.Value, found: Mapping[ir.Node, list[int]]) -> bool:
    """Whether `value` [batch, tokens, width] has readers, and every one takes its first token or is itself in `found`."""
    if value.shape is None or len(value.shape) != 3 or value.shape[TOKENS] == 1 or value.is_graph_output():
        return False
    uses = list(value.uses())
    return bool(uses) and all(use.idx in found.get(use.node, ()) or _takes_first(use.node) for use in uses)


def _takes_first(node: ir.Node) -> bool:
    """Whether `node` selects token 0, and nothing else, of its input [batch, tokens, width]."""
    if _is(node, "Gather"):
        return _integer(node, "axis", 0) in (TOKENS, TOKENS - 3) and _constant(node, 1) == [0]
    one = _is(node, "Slice") and _constant(node, 1) == [0] and _constant(node, 2) == [1]
    return one and _constant(node, 3) in ([TOKENS], [TOKENS - 3])


def _token_inputs(node: ir.Node) -> list[int]:
    """Inputs of `node` that carry tokens along axis 1, where the node treats each token by itself; [] where it does not.

    Asked only of nodes that give [batch, tokens, width].
    """
    if node.domain != "":
        return []
    kind, by_token = node.op_type, node.op_type in UNARY
    if kind in ELEMENTWISE:
        return _elementwise_token_inputs(node)
    if kind in NORMS:
        by_token = _integer(node, "axis", -1) in (-1, 2) and all(_rank(v) == 1 for v in node.inputs[1:])
    elif kind == "MatMul":
        by_token = _rank(node.inputs[1]) == 2
    elif kind == "Split":
        by_token = _integer(node, "axis", 0) in (-1, 2)
    elif kind == "Attention":
        by_token = len(node.inputs) < 4 or node.inputs[3] is None or _rank(node.inputs[3]) >= 2
    return [0] if by_token else []


def _elementwise_token_inputs(node: ir.Node) -> list[int]:
    """Of an operator that broadcasts: inputs of one or no axis hold for every token, and so do those with one row."""
    places = []
    for place, value in enumerate(node.inputs):
        if value is None or value.shape is None or len(value.shape) not in (0, 1, 3):
            return []
        if len(value.shape) == 3 and value.shape[TOKENS] != 1:
            places.append(place)
    return places


def _insert_first(graph: ir.Graph, node: ir.Node, value: ir.Value, axis: int) -> ir.Value:
    """Row 0 along `axis` of `value`, put right before its first reader, `node`."""
    bounds = [_number(graph, number) for number in (0, 1, axis)]
    name = f"{value.name}.first_{axis}"
    cut = ir.node("Slice", [value, *bounds], name=name)
    cut.outputs[0].name, cut.outputs[0].type = name, value.type
    cut.outputs[0].shape = _with_one(value.shape, axis)
    graph.insert_before(node, cut)
    return cut.outputs[0]


def _number(graph: ir.Graph, number: int) -> ir.Value:
    """A list of one integer as an initializer, written once for the whole graph."""
    name = f"squeeze.first_{number}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.array([number], np.int64), name=name)
        value = ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _with_one(shape: ir.Shape | None, axis: int) -> ir.Shape | None:
    return None if shape is None else ir.Shape([1 if place == axis else size for place, size in enumerate(shape)])


def _is(node: ir.Node, kind: str) -> bool:
    return node.domain == "" and node.op_type == kind


def _rank(value: ir.Value | None) -> int:
    """Number of axes; -1 where that is not known."""
    return -1 if value is None or value.shape is None else len(value.shape)


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _constant(node: ir.Node, place: int) -> list[int] | None:
    """The integers of a constant input, flat."""
    value = node.inputs[place] if place < len(node.inputs) else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(number) for number in tensor.numpy().ravel()]
