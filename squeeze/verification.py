"""Exported against source: the same names, the same integers byte for byte, the same answers.

Verification compares with the artifact the export was made from, simulated in torch, so it judges the export alone; what
compression cost is the benchmark's business. A failed check fails the run: nothing measured on a wrong graph is worth having.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from squeeze.errors import SqueezeError
from squeeze.report.schema import Check
from squeeze.tasks import TASKS

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

    from squeeze.integers import IntegerWeight
    from squeeze.kv_cache import CacheScales
    from squeeze.model import Model
    from squeeze.runtimes import Session

FLOAT_TOLERANCE = 1e-3
ROUNDINGS = 1.5
"""Two roundings that have nothing in common differ by √2 times the error of one; more than this is not rounding."""
HALF_ROUNDINGS = 2.0
"""The same for graphs that compute in 16 bits, which round between layers too and not only what layers give."""
GREEDY_TOLERANCE = 0.5
"""Standard deviations of the logits by which a token chosen with rounded activations may fall short of the best one."""
GREEDY_EPSILONS = 32
"""The same for weights and sums in 16 bits, in units of the type's epsilon: 0.03 for float16."""
PAD_SHARE = 3
"""In padded batches the last row keeps one token in three."""
PRODUCTS = ("MatMulInteger", "MatMulIntegerToFloat")
MESSAGE = 300
"""Characters of a runtime's message that are kept: it may name every input."""
Answer = TypeVar("Answer")


class VerifySettings(BaseModel):
    """How closely an export must match its source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tolerance: float | None = Field(
        default=None,
        gt=0,
        description="largest relative error of the outputs; none: 1e-3, or where activations are rounded the error of that rounding",
    )
    shapes: tuple[tuple[int, int], ...] = Field(
        default=((1, 1), (1, 7), (1, 33), (3, 16), (3, 29)), description="batch and length of the compared inputs"
    )
    greedy_tokens: int = Field(default=16, ge=0, description="tokens that a decoder generates for comparison; 0: none")


def verify(model: "Model", folder: Path, settings: VerifySettings | None = None, seed: int = 0) -> list[Check]:
    """Compare the export in `folder` with `model`, the artifact it was made from; every comparison is one Check."""
    import onnx_ir as ir

    from squeeze.exporter.cache import cache_scales
    from squeeze.exporter.half import COMPUTES
    from squeeze.runtimes import MODEL_FILE, open_session
    from squeeze.simulation import simulation

    settings = settings or VerifySettings()
    graph = ir.load(folder / MODEL_FILE)
    cache = cache_scales(graph)
    simulated = simulation(model, cache)
    checks = [_check_interface(graph, model), *_check_integers(graph, model), *_check_input_grids(graph, model)]
    checks += _check_halves(graph, model)
    in_half = model.half is not None and graph.metadata_props.get(COMPUTES) == model.half.dtype
    rng = np.random.default_rng(seed)
    # With several threads the LSTM kernel rounds the states of a batch in parts; the simulation rounds them as one.
    in_parts = any(node.op_type == "DynamicQuantizeLSTM" for node in graph.graph)
    session = _run(lambda: open_session(folder, "onnxruntime", threads=1 if in_parts else None))
    if isinstance(session, Failure):
        return [*checks, session.check("opens in onnxruntime")]
    try:
        if cache is not None:
            checks += _check_cache(graph, cache)
        checks += _check_outputs(session, model, simulated, settings, rng, in_half)
    finally:
        session.close()
    if model.task == "causal-lm" and settings.greedy_tokens:
        checks += _check_greedy(model, simulated, folder, settings, rng, in_half)
    return checks


@dataclass(frozen=True)
class Failure:
    """What a runtime raised instead of an answer."""

    error: Exception

    def check(self, name: str) -> Check:
        """It as a check that failed, with the runtime's own words."""
        said = " ".join(str(self.error).split()) or "no message"
        return _check(name, np.inf, 0, f"{type(self.error).__name__}: {said[:MESSAGE]}")


def _run(ask: Callable[[], Answer]) -> Answer | Failure:
    """What the runtime answers. Its own exceptions are of no common class; squeeze's, which say what to mend, pass through.

    Only the runtime is asked in here: an error of the simulation is a bug of ours and keeps its traceback.
    """
    try:
        return ask()
    except SqueezeError:
        raise
    except Exception as error:
        return Failure(error)


def _check(name: str, value: float, limit: float, detail: str) -> Check:
    finite = bool(np.isfinite(value))
    return Check(name=name, value=float(value) if finite else float(np.finfo(np.float64).max), limit=limit,
                 passed=finite and value <= limit, detail=detail)  # fmt: skip


def _check_interface(graph: "ir.Model", model: "Model") -> Check:
    """Input and output names, and that batch and sequence are free axes."""
    inputs = {v.name: v for v in graph.graph.inputs}
    outputs = {v.name: v for v in graph.graph.outputs}
    wanted_output = TASKS[model.task].output
    problems = [] if wanted_output in outputs else [f"no output {wanted_output}"]
    for name in model.text_inputs:
        shape = inputs[name].shape if name in inputs else None
        if name not in inputs:
            problems.append(f"no input {name}")
        elif shape is None or len(shape) != 2 or any(isinstance(d, int) for d in shape):
            problems.append(f"{name} has fixed axes {shape}")
    past = sorted(n for n in inputs if n and n.startswith("past_key_values."))
    present = sorted(n for n in outputs if n and n.startswith("present."))
    if [n.replace("past_key_values.", "present.") for n in past] != present:
        problems.append(f"{len(past)} cache inputs but {len(present)} cache outputs")
    if model.task == "causal-lm" and model.factory is None and not past:
        problems.append("a decoder without key-value cache")
    detail = "; ".join(problems) or f"{len(inputs)} inputs, {len(outputs)} outputs, free batch and sequence"
    return _check("names and axes", len(problems), 0, detail)


def _check_integers(graph: "ir.Model", model: "Model") -> Iterator[Check]:
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
    yield _check("integer bytes that differ", differing, 0, detail)
    kept = [w.outliers for w in model.integers.values() if w.outliers is not None]
    if kept:
        numbers = sum(outliers.columns.numel() for outliers in kept)
        detail = f"{len(kept)} matrices, {numbers:,} float weights of outlier channels and the channels that they meet"
        yield _check("outlier weights that differ", floats, 0, detail)
    yield _check(
        "integer matrices missing",
        len(absent),
        0,
        f"first {absent[0]}" if absent else "all are in the graph and read by a node",
    )


def _check_halves(graph: "ir.Model", model: "Model") -> Iterator[Check]:
    """Every 16-bit tensor of the artifact, byte for byte among the graph's initializers."""
    from squeeze.exporter.half import missing_halves

    if model.half is None:
        return
    absent = missing_halves(graph, model.network, model.half)
    count = [parameter.numel() for _, parameter in model.half.tensors(model.network)]
    found = f"{len(count)} tensors, {sum(count):,} values, byte for byte"
    yield _check(f"{model.half.dtype} tensors missing", len(absent), 0, f"first {absent[0]}" if absent else found)


def _check_input_grids(graph: "ir.Model", model: "Model") -> Iterator[Check]:
    """Scale, zero point and divisor of every input whose rounding is fixed, in the nodes that the integer products read.

    Outputs alone would not tell: a range that is a little off moves them no more than rounding does.
    """
    fixed = {name for name, weight in model.integers.items() if weight.inputs is not None or weight.divisor is not None}
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
    yield _check("input ranges that differ", len(wrong), 0, detail)


def _reads_grid(product: "ir.Node", weight: "IntegerWeight") -> bool:
    """Whether a product's first input was divided and rounded as the artifact says, and is scaled back by the same numbers."""
    from squeeze.integers import reciprocal

    quantize = product.inputs[0].producer() if product.inputs[0] is not None else None
    if quantize is None or quantize.op_type != ("DynamicQuantizeLinear" if weight.inputs is None else "QuantizeLinear"):
        return False
    if weight.inputs is not None:
        grid = (np.float32(weight.inputs.scale), np.uint8(weight.inputs.zero_point))
        static = product.op_type == "MatMulIntegerToFloat"
        scaled_back = (product.inputs[2], product.inputs[4]) if static and len(product.inputs) > 4 else ()
        if not scaled_back or [_constant(v) for v in (*quantize.inputs[1:3], *scaled_back)] != [*grid, *grid]:
            return False
    if weight.divisor is None:
        return True
    divide = quantize.inputs[0].producer() if quantize.inputs[0] is not None else None
    factors = (
        [v.const_value.numpy() for v in divide.inputs if v is not None and v.const_value is not None] if divide else []
    )
    wanted = reciprocal(weight.divisor).numpy()
    return divide is not None and divide.op_type == "Mul" and any(np.array_equal(f, wanted) for f in factors)


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


def _check_cache(graph: "ir.Model", cache: "CacheScales") -> Iterator[Check]:
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
    yield _check("cache tensors that are not int8", len(floats), 0, detail)
    differs = cache.digest != graph.metadata_props.get(CALIBRATED)
    detail = f"{cache.layers} layers, a scale for each {cache.granularity}"
    yield _check("cache scales other than those calibrated", int(differs), 0, detail)


def _check_outputs(
    session: "Session",
    model: "Model",
    simulated: "nn.Module",
    settings: VerifySettings,
    rng: np.random.Generator,
    in_half: bool,
) -> Iterator[Check]:
    """Relative error |y − ŷ| / |y| at each shape, over the positions that are not padding.

    Where activations are rounded, one rounding that falls the other way can change all later ones, so that two correct
    computations drift apart. There the limit is the error of that rounding itself, at this input (ROUNDINGS): the export may not
    be much further from the simulation than the simulation is from the network with unrounded activations. A graph that computes in
    16 bits is held to the error that rounding each layer's outputs to that type makes, and to no less than the type's epsilon.
    """
    compared = list(_compared(model, settings, rng))
    half_limit = 0.0 if not in_half else _half_limit(model, [inputs for _, inputs in compared])
    for name, inputs in compared:
        expected = call(simulated, model, inputs)
        found = _run(lambda inputs=inputs: session.forward({n: inputs[n] for n in model.text_inputs}))  # type: ignore[misc]
        if isinstance(found, Failure):
            yield found.check(name)
            continue
        if expected.shape != found.shape:
            yield _check(name, np.inf, FLOAT_TOLERANCE, f"shape {found.shape}, expected {expected.shape}")
            continue
        valid = _valid(expected, inputs)
        limit, detail = settings.tolerance or FLOAT_TOLERANCE, "relative error against the artifact in torch"
        if simulated is not model.network and settings.tolerance is None:
            rounding = _relative(expected[valid], call(model.network, model, inputs)[valid])
            limit = max(ROUNDINGS * rounding, FLOAT_TOLERANCE)
            detail = f"relative error; the limit is {ROUNDINGS:g} times that of rounding activations"
        if in_half and settings.tolerance is None:
            limit, detail = (
                half_limit,
                f"relative error; the limit is {HALF_ROUNDINGS:g} times that of rounding what layers give",
            )
        yield _check(name, _relative(expected[valid], found[valid]), limit, detail)


def _compared(
    model: "Model", settings: VerifySettings, rng: np.random.Generator
) -> Iterator[tuple[str, dict[str, NDArray[np.int64]]]]:
    """The inputs to compare at, each with the name of its check."""
    for batch, length in settings.shapes:
        for padded in (False, True) if batch > 1 and "attention_mask" in model.text_inputs else (False,):
            yield f"outputs {batch}×{length}{' padded' if padded else ''}", _inputs(model, batch, length, padded, rng)


def _valid(expected: NDArray[np.float32], inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.bool_]:
    """Which outputs count: all but those of padding."""
    return inputs["attention_mask"].astype(bool) if expected.ndim == 3 else np.ones(len(expected), bool)


def _half_limit(model: "Model", compared: list[dict[str, NDArray[np.int64]]]) -> float:
    """HALF_ROUNDINGS times the largest error that rounding to 16 bits makes at any of the compared inputs; no less than epsilon.

    The largest of all, because a few large numbers of the residual stream make most of it, and how those fall is chance.
    """
    from squeeze.halves import rounded

    if model.half is None:
        return FLOAT_TOLERANCE
    errors = []
    for inputs in compared:
        expected = call(model.network, model, inputs)
        with rounded(model.network, model.half):
            found = call(model.network, model, inputs)
        valid = _valid(expected, inputs)
        errors.append(_relative(expected[valid], found[valid]))
    return max(HALF_ROUNDINGS * max(errors, default=0.0), model.half.epsilon)


def _relative(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-30))


def _inputs(
    model: "Model", batch: int, length: int, padded: bool, rng: np.random.Generator
) -> dict[str, NDArray[np.int64]]:
    rows = _vocabulary(model)
    mask = np.ones((batch, length), np.int64)
    if padded:
        mask[-1, max(1, length // PAD_SHARE) :] = 0
    ids = rng.integers(0, rows, (batch, length), dtype=np.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def _vocabulary(model: "Model") -> int:
    """Token numbers that the input embedding has rows for."""
    from torch import nn

    if model.factory is None:
        return int(model.network.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    tables = [m.num_embeddings for m in model.network.modules() if isinstance(m, nn.Embedding)]
    return max(tables, default=2)


def call(network: "nn.Module", model: "Model", inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
    """What `network`, the model's own or its simulation, gives for the model's text inputs; shape as Session.forward gives it."""
    import torch

    from squeeze.model import answer

    with torch.no_grad():
        out = network(**{n: torch.from_numpy(inputs[n]) for n in model.text_inputs})
    return answer(out, model.task).numpy()


def _check_greedy(
    model: "Model",
    simulated: "nn.Module",
    folder: Path,
    settings: VerifySettings,
    rng: np.random.Generator,
    in_half: bool,
) -> Iterator[Check]:
    """Greedy tokens of the export, judged by the source: at each step, how far below its best logit is the chosen one?

    Zero means the same token. Comparing token strings alone would fail on ties and say nothing about the size of a difference,
    so the distance is given relative to the spread (standard deviation) of that step's logits.
    """
    from squeeze.runtimes import default_runtimes

    prompt, count = _inputs(model, 1, 24, False, rng)["input_ids"], settings.greedy_tokens
    exact = GREEDY_EPSILONS * model.half.epsilon if in_half and model.half is not None else FLOAT_TOLERANCE
    limit = settings.tolerance or (exact if simulated is model.network else GREEDY_TOLERANCE)
    for runtime in ("onnxruntime-genai", "onnxruntime"):
        if runtime not in default_runtimes(folder):
            continue
        tokens = _run(lambda runtime=runtime: _generated(folder, runtime, prompt, count))  # type: ignore[misc]
        if isinstance(tokens, Failure):
            yield tokens.check(f"greedy tokens, {runtime}")
            continue
        ids = np.concatenate([prompt, tokens], axis=1)
        logits = call(simulated, model, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[
            0, prompt.shape[1] - 1 : -1
        ]
        for end in _end_tokens(model):
            logits[tokens[0] != end, end] = -np.inf  # onnxruntime-genai may not choose it before the length asked for
        chosen = np.take_along_axis(logits, tokens[0][:, None], axis=1)[:, 0]
        regret = (logits.max(axis=1) - chosen) / np.std(logits, axis=1, where=np.isfinite(logits))
        same = int((logits.argmax(axis=1) == tokens[0]).sum())
        detail = f"{same} of {count} are the artifact's own choice; worst distance to it in standard deviations of the logits"
        yield _check(f"greedy tokens, {runtime}", float(regret.max()), limit, detail)


def _generated(folder: Path, runtime: str, prompt: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    from squeeze.runtimes import open_session

    session = open_session(folder, runtime)
    try:
        return session.generate(prompt, count).tokens
    finally:
        session.close()


def _end_tokens(model: "Model") -> list[int]:
    value = model.config.get("eos_token_id")
    return [value] if isinstance(value, int) else [int(v) for v in value or ()]
