"""The cache of a decoder as int8 tensors in its graph: another type for them, and scales for the kernel that reads and writes them.

GroupQueryAttention rounds what it appends, and multiplies with the integers. Rejected: QuantizeLinear and Concat in the graph, which
copy the whole cache for every token, where this kernel appends to a buffer that past and present share.
"""

import re

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from squeeze.errors import ExportError
from squeeze.kv_cache import CacheScales

PAST = re.compile(r"past_key_values\.(\d+)\.key")
K_PAST, K_SCALE, V_SCALE = 3, 12, 13
"""Inputs of GroupQueryAttention."""
CALIBRATED = "squeeze.cache_scales"
"""Where the model's metadata keep the digest of the scales as they were calibrated, for `verify`."""
TYPES = {"channel": "PER_CHANNEL", "tensor": "PER_TENSOR"}


def int8_cache(model: ir.Model, scales: CacheScales) -> list[str]:
    """Let every GroupQueryAttention keep its keys and values as int8. Raises ExportError where a layer's cache is another's."""
    nodes = attentions(model)
    if sorted(nodes) != list(range(scales.layers)):
        raise ExportError(
            f"an int8 cache needs GroupQueryAttention in all {scales.layers} layers, and the graph has it in {len(nodes)}. "
            "Drop kv_cache, or use export.graph: genai."
        )
    for layer, node in nodes.items():
        node.resize_inputs(max(len(node.inputs), V_SCALE + 1))
        for part, place, scale in (
            ("key", K_SCALE, scales.keys[layer]), ("value", V_SCALE, scales.values[layer]),
        ):  # fmt: skip
            node.replace_input_with(place, _initializer(model.graph, f"cache.{layer}.{part}.scale", scale.numpy()))
            node.attributes[f"{part[0]}_quant_type"] = ir.AttrString(f"{part[0]}_quant_type", TYPES[scales.granularity])
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
        for value in (*node.inputs[K_PAST : K_PAST + 2], *node.outputs[1:3]):
            if value is not None:
                value.type = ir.TensorType(ir.DataType.INT8)
    model.metadata_props[CALIBRATED] = scales.digest
    shared = {"channel": "channel of a head", "tensor": "tensor"}[scales.granularity]
    return [f"keys and values of {len(nodes)} layers kept as int8, one calibrated scale for each {shared}"]


def cache_scales(model: ir.Model) -> CacheScales | None:
    """The scales of a graph's int8 cache, in the order of its layers; None where the cache is float. For `verify`."""
    nodes = [node for _, node in sorted(attentions(model).items())]
    if not any("k_quant_type" in node.attributes for node in nodes):
        return None
    return CacheScales(*(tuple(_constant(node, place) for node in nodes) for place in (K_SCALE, V_SCALE)))


def attentions(model: ir.Model) -> dict[int, ir.Node]:
    """The GroupQueryAttention of each layer, known by the cache that it reads."""
    found = {}
    for node in model.graph:
        past = node.inputs[K_PAST] if node.op_type == "GroupQueryAttention" else None
        match = None if past is None else PAST.fullmatch(past.name or "")
        if match is not None:
            found[int(match[1])] = node
    return found


def _constant(node: ir.Node, place: int) -> torch.Tensor:
    value = node.inputs[place] if place < len(node.inputs) else None
    if value is None or value.const_value is None:
        raise ExportError(f"{node.name} has an int8 cache without constant scales. Export again.")
    return torch.tensor(value.const_value.numpy())


def _initializer(graph: ir.Graph, name: str, array: NDArray[np.float32]) -> ir.Value:
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
