"""Exported against source: the same names, the same integers byte for byte, the same answers.

Verification compares with the artifact the export was made from, simulated in torch, so it judges the export alone; what
compression cost is the benchmark's business. A failed check fails the run: nothing measured on a wrong graph is worth having.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

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
GREEDY_TOLERANCE = 0.5
"""Standard deviations of the logits by which a token chosen with rounded activations may fall short of the best one."""
PAD_SHARE = 3
"""In padded batches the last row keeps one token in three."""


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
    from squeeze.runtimes import MODEL_FILE, open_session
    from squeeze.simulation import simulation

    settings = settings or VerifySettings()
    graph = ir.load(folder / MODEL_FILE)
    cache = cache_scales(graph)
    simulated = simulation(model, cache)
    checks = [_check_interface(graph, model), *_check_integers(graph, model)]
    rng = np.random.default_rng(seed)
    # With several threads the LSTM kernel rounds the states of a batch in parts; the simulation rounds them as one.
    in_parts = any(node.op_type == "DynamicQuantizeLSTM" for node in graph.graph)
    session = open_session(folder, "onnxruntime", threads=1 if in_parts else None)
    try:
        if cache is not None:
            checks += _check_cache(graph, cache)
        checks += _check_outputs(session, model, simulated, settings, rng)
    finally:
        session.close()
    if model.task == "causal-lm" and settings.greedy_tokens:
        checks += _check_greedy(model, simulated, folder, settings, rng)
    return checks


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
    from squeeze.exporter.placement import integers_in_graph, scales_in_graph

    if not model.integers:
        return
    places: list[dict[str, Any]] = json.loads(graph.metadata_props.get("squeeze.integers", "[]"))
    read = {v.name for node in graph.graph.all_nodes() for v in node.inputs if v is not None}
    differing, seen = 0, set()
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
        for name, array, weight in zip(place["layers"], found, weights, strict=True):
            same = array.dtype == weight.integers.numpy().dtype and array.shape == weight.integers.shape
            differing += int((array != weight.integers.numpy()).sum()) if same else weight.integers.numel()
            seen.add(name)
    absent = sorted(set(model.integers) - seen)
    count = sum(w.integers.numel() for w in model.integers.values())
    detail = f"{len(model.integers)} matrices, {count:,} integers and their scales"
    yield _check("integer bytes that differ", differing, 0, detail)
    yield _check(
        "integer matrices missing",
        len(absent),
        0,
        f"first {absent[0]}" if absent else "all are in the graph and read by a node",
    )


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
    session: "Session", model: "Model", simulated: "nn.Module", settings: VerifySettings, rng: np.random.Generator
) -> Iterator[Check]:
    """Relative error |y − ŷ| / |y| at each shape, over the positions that are not padding.

    Where activations are rounded, one rounding that falls the other way can change all later ones, so that two correct
    computations drift apart. There the limit is the error of that rounding itself, at this input (ROUNDINGS): the export may not
    be much further from the simulation than the simulation is from the network with unrounded activations.
    """
    for batch, length in settings.shapes:
        for padded in (False, True) if batch > 1 and "attention_mask" in model.text_inputs else (False,):
            name = f"outputs {batch}×{length}{' padded' if padded else ''}"
            inputs = _inputs(model, batch, length, padded, rng)
            expected = call(simulated, model, inputs)
            found = session.forward({n: inputs[n] for n in model.text_inputs})
            if expected.shape != found.shape:
                yield _check(name, np.inf, FLOAT_TOLERANCE, f"shape {found.shape}, expected {expected.shape}")
                continue
            valid = inputs["attention_mask"].astype(bool) if expected.ndim == 3 else np.ones(len(expected), bool)
            limit, detail = settings.tolerance or FLOAT_TOLERANCE, "relative error against the artifact in torch"
            if simulated is not model.network and settings.tolerance is None:
                rounding = _relative(expected[valid], call(model.network, model, inputs)[valid])
                limit = max(ROUNDINGS * rounding, FLOAT_TOLERANCE)
                detail = f"relative error; the limit is {ROUNDINGS:g} times that of rounding activations"
            yield _check(name, _relative(expected[valid], found[valid]), limit, detail)


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
    model: "Model", simulated: "nn.Module", folder: Path, settings: VerifySettings, rng: np.random.Generator
) -> Iterator[Check]:
    """Greedy tokens of the export, judged by the source: at each step, how far below its best logit is the chosen one?

    Zero means the same token. Comparing token strings alone would fail on ties and say nothing about the size of a difference,
    so the distance is given relative to the spread (standard deviation) of that step's logits.
    """
    from squeeze.runtimes import default_runtimes, open_session

    prompt, count = _inputs(model, 1, 24, False, rng)["input_ids"], settings.greedy_tokens
    limit = settings.tolerance or (FLOAT_TOLERANCE if simulated is model.network else GREEDY_TOLERANCE)
    for runtime in ("onnxruntime-genai", "onnxruntime"):
        if runtime not in default_runtimes(folder):
            continue
        session = open_session(folder, runtime)
        try:
            tokens = session.generate(prompt, count).tokens
        finally:
            session.close()
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


def _end_tokens(model: "Model") -> list[int]:
    value = model.config.get("eos_token_id")
    return [value] if isinstance(value, int) else [int(v) for v in value or ()]
