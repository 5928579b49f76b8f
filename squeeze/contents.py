"""What an export must carry exactly: integers, scales, ranges of inputs, 16-bit weights, scales of a cache; read from the graph alone."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from squeeze.report.schema import Check

if TYPE_CHECKING:
    import onnx_ir as ir

    from squeeze.integers import IntegerWeight
    from squeeze.kv_cache import CacheScales
    from squeeze.model import Model

PRODUCTS = ("MatMulInteger", "MatMulIntegerToFloat")


def check(name: str, value: float, limit: float, detail: str) -> Check:
    """One comparison; a value that is no number failed."""
    finite = bool(np.isfinite(value))
    return Check(name=name, value=float(value) if finite else float(np.finfo(np.float64).max), limit=limit,
                 passed=finite and value <= limit, detail=detail)  # fmt: skip


def check_integers(graph: "ir.Model", model: "Model") -> Iterator[Check]:
    """Every integer and every scale of the artifact, against the bytes in the graph's initializers."""
    from squeeze.exporter.outliers import differing_outliers
    from squeeze.exporter.placement import integers_in_graph, scales_in_graph

    if not model.integers:
        return
    places: list[dict[str, Any]] = json.loads(graph.metadata_props.get("squeeze.integers", "[]"))
    read = {v.name for node in graph.graph.all_nodes() for v in node.inputs if v is not None}
    differing, floats, seen = 0, 0, set()
    for place in places:
        weights = [model.integers[name] for name in place["layers"]]
        value = graph.graph.initializers.get(place["initializer"])
        if value is None or value.const_value is None or value.name not in read:
            continue
        found = integers_in_graph(value.const_value.numpy(), place["layout"], weights)
        scale = graph.graph.initializers[place["initializer"].removesuffix(".integers") + ".scale"].const_value
        scales = b"" if scale is None else scales_in_graph(scale.numpy(), place["layout"]).tobytes()
        differing += int(scales != np.concatenate([w.scale.numpy().ravel() for w in weights]).tobytes())
        differing += _differing_zero_points(
            graph, place["initializer"].removesuffix(".integers") + ".zero_point", weights
        )
        floats += differing_outliers(graph.graph, place["layers"], weights)
        for name, array, weight in zip(place["layers"], found, weights, strict=True):
            same = array.dtype == weight.integers.numpy().dtype and array.shape == weight.integers.shape
            differing += int((array != weight.integers.numpy()).sum()) if same else weight.integers.numel()
            seen.add(name)
    absent = sorted(set(model.integers) - seen)
    count = sum(w.integers.numel() for w in model.integers.values())
    detail = f"{len(model.integers)} matrices, {count:,} integers and their scales"
    yield check("integer bytes that differ", differing, 0, detail)
    kept = [w.outliers for w in model.integers.values() if w.outliers is not None]
    if kept:
        numbers = sum(outliers.columns.numel() for outliers in kept)
        detail = f"{len(kept)} matrices, {numbers:,} float weights of outlier channels and the channels that they meet"
        yield check("outlier weights that differ", floats, 0, detail)
    yield check(
        "integer matrices missing",
        len(absent),
        0,
        f"first {absent[0]}" if absent else "all are in the graph and read by a node",
    )


def check_zeros(graph: "ir.Model", model: "Model") -> Iterator[Check]:
    """The zeros of pruned matrices, counted in the graph: of integers matrix by matrix, at their zero points; of float ones all together,
    as exporters turn, stack and scale those."""
    from squeeze.exporter.placement import integers_in_graph
    from squeeze.masks import masks_of

    if not model.pruned:
        return
    zeros = {name: ~keep for name, keep in masks_of(model).items()}
    floats = sum(int(where.sum()) for name, where in zeros.items() if name not in model.integers)
    for held in graph.graph.initializers.values() if floats else ():
        tensor = held.const_value
        if tensor is not None and len(tensor.shape) > 1 and tensor.dtype.is_floating_point():
            floats -= int((tensor.numpy() == 0).sum())
    missing = max(floats, 0)
    places: list[dict[str, Any]] = json.loads(graph.metadata_props.get("squeeze.integers", "[]"))
    seen = set()
    for place in places:
        value = graph.graph.initializers.get(place["initializer"])
        if value is None or value.const_value is None or not zeros.keys() & set(place["layers"]):
            continue
        weights = [model.integers[name] for name in place["layers"]]
        arrays = integers_in_graph(value.const_value.numpy(), place["layout"], weights)
        for name, array, weight in zip(place["layers"], arrays, weights, strict=True):
            if name in zeros:
                seen.add(name)
                at = weight.zero_point if isinstance(weight.zero_point, int) else weight.wide(weight.zero_point).numpy()
                where = zeros[name].T if weight.transposed else zeros[name]
                missing += int((array[where.numpy()] != np.broadcast_to(at, array.shape)[where.numpy()]).sum())
    missing += sum(int(zeros[name].sum()) for name in model.integers.keys() & zeros.keys() if name not in seen)
    detail = f"{sum(int(where.sum()) for where in zeros.values()):,} zeros of {len(zeros)} matrices"
    yield check("zeros of pruned matrices lost", missing, 0, detail)


def check_halves(graph: "ir.Model", model: "Model") -> Iterator[Check]:
    """Every 16-bit tensor of the artifact, byte for byte among the graph's initializers."""
    from squeeze.exporter.half import missing_halves

    if model.half is None:
        return
    absent = missing_halves(graph, model.network, model.half)
    count = [parameter.numel() for _, parameter in model.half.tensors(model.network)]
    found = f"{len(count)} tensors, {sum(count):,} values, byte for byte"
    yield check(f"{model.half.dtype} tensors missing", len(absent), 0, f"first {absent[0]}" if absent else found)


def check_input_grids(graph: "ir.Model", model: "Model") -> Iterator[Check]:
    """Scale, zero point and divisor of every input whose rounding is fixed, in the nodes that the integer products read.

    Outputs alone would not tell: a range that is a little off moves them no more than rounding does.
    """
    fixed = {
        name
        for name, w in model.integers.items()
        if not (w.inputs is None and w.divisor is None and w.outliers is None)
    }
    if not fixed:
        return
    places = json.loads(graph.metadata_props.get("squeeze.integers", "[]"))
    layers = {place["initializer"]: place["layers"] for place in places}
    differing: list[str] = []
    seen: set[str] = set()
    for node in graph.graph.all_nodes():
        matrix = node.inputs[1].name if len(node.inputs) > 1 and node.inputs[1] is not None else ""
        for name in layers.get(matrix, ()) if node.op_type in PRODUCTS else ():
            if name in fixed:
                seen.add(name)
                differing += [name] * (not _reads_grid(node, model.integers[name]))
    wrong = sorted({*differing, *(fixed - seen)})
    detail = f"first {wrong[0]}" if wrong else f"scales, zero points and divisors of {len(fixed)} layers' inputs"
    yield check("input ranges that differ", len(wrong), 0, detail)


def _reads_grid(product: "ir.Node", weight: "IntegerWeight") -> bool:
    """Whether a product's first input was divided and rounded as the artifact says, and is scaled back by the same numbers."""
    quantize = product.inputs[0].producer() if product.inputs[0] is not None else None
    if quantize is None or quantize.op_type != ("DynamicQuantizeLinear" if weight.inputs is None else "QuantizeLinear"):
        return False
    if weight.inputs is not None:
        grid = (np.float32(weight.inputs.scale), np.uint8(weight.inputs.zero_point))
        static = product.op_type == "MatMulIntegerToFloat"
        scaled_back = (product.inputs[2], product.inputs[4]) if static and len(product.inputs) > 4 else ()
        if not scaled_back or [_constant(v) for v in (*quantize.inputs[1:3], *scaled_back)] != [*grid, *grid]:
            return False
    wanted = weight.input_factor
    if wanted is None:
        return True
    divide = quantize.inputs[0].producer() if quantize.inputs[0] is not None else None
    factors = (
        [v.const_value.numpy() for v in divide.inputs if v is not None and v.const_value is not None] if divide else []
    )
    return divide is not None and divide.op_type == "Mul" and any(np.array_equal(f, wanted.numpy()) for f in factors)


def _constant(value: "ir.Value | None") -> Any:
    """The one number that an input always is, of its own type; None where it is none."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return value.const_value.numpy().reshape(-1)[0]


def _differing_zero_points(graph: "ir.Model", name: str, weights: "list[IntegerWeight]") -> int:
    """How many zero points in the graph are not the artifact's; where one holds for all, the operator's definition says it."""
    from squeeze.integers import pack

    expected = [pack(w.zero_point, w.bits).numpy() for w in weights if not isinstance(w.zero_point, int)]
    value = graph.graph.initializers.get(name)
    if value is None or value.const_value is None:
        return sum(array.size for array in expected)
    found = value.const_value.numpy()
    wanted = np.concatenate(expected) if expected else np.empty(0, np.uint8)
    return int((found != wanted).sum()) if found.shape == wanted.shape else found.size


def check_cache(graph: "ir.Model", cache: "CacheScales") -> Iterator[Check]:
    """An int8 cache: its tensors' types, and that every layer has the scales that were calibrated for it.

    The simulation takes the graph's own scales, so with wrong ones the two would agree and only answer badly.
    """
    import onnx_ir as ir

    from squeeze.exporter.cache import CALIBRATED

    values = [
        v for v in (*graph.graph.inputs, *graph.graph.outputs) if (v.name or "").startswith(("past_", "present."))
    ]
    floats = [v.name for v in values if v.dtype != ir.DataType.INT8]
    detail = f"first {floats[0]}" if floats else f"{len(values)} tensors"
    yield check("cache tensors that are not int8", len(floats), 0, detail)
    differs = cache.digest != graph.metadata_props.get(CALIBRATED)
    detail = f"{cache.layers} layers, a scale for each {cache.granularity}"
    yield check("cache scales other than those calibrated", int(differs), 0, detail)
