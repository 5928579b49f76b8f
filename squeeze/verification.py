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

    from squeeze.exporter.half import COMPUTES
    from squeeze.runtimes import MODEL_FILE, open_session

    settings = settings or VerifySettings()
    graph = ir.load(folder / MODEL_FILE)
    checks = [_check_interface(graph, model), *_check_integers(graph, model), *_check_halves(graph, model)]
    in_half = model.half is not None and graph.metadata_props.get(COMPUTES) == model.half.dtype
    rng = np.random.default_rng(seed)
    # With several threads the LSTM kernel rounds the states of a batch in parts; the simulation rounds them as one.
    in_parts = any(node.op_type == "DynamicQuantizeLSTM" for node in graph.graph)
    session = open_session(folder, "onnxruntime", threads=1 if in_parts else None)
    try:
        checks += _check_outputs(session, model, settings, rng, in_half)
    finally:
        session.close()
    if model.task == "causal-lm" and settings.greedy_tokens:
        checks += _check_greedy(model, folder, settings, rng, in_half)
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


def _check_halves(graph: "ir.Model", model: "Model") -> Iterator[Check]:
    """Every 16-bit tensor of the artifact, byte for byte among the graph's initializers."""
    from squeeze.exporter.half import missing_halves

    if model.half is None:
        return
    absent = missing_halves(graph, model.network, model.half)
    count = [parameter.numel() for _, parameter in model.half.tensors(model.network)]
    found = f"{len(count)} tensors, {sum(count):,} values, byte for byte"
    yield _check(f"{model.half.dtype} tensors missing", len(absent), 0, f"first {absent[0]}" if absent else found)


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


def _check_outputs(
    session: "Session", model: "Model", settings: VerifySettings, rng: np.random.Generator, in_half: bool
) -> Iterator[Check]:
    """Relative error |y − ŷ| / |y| at each shape, over the positions that are not padding.

    Where activations are rounded, one rounding that falls the other way can change all later ones, so that two correct
    computations drift apart. There the limit is the error of that rounding itself, at this input (ROUNDINGS): the export may not
    be much further from the simulation than the simulation is from the network with unrounded activations. A graph that computes in
    16 bits is held to the error that rounding each layer's outputs to that type makes, and to no less than the type's epsilon.
    """
    from squeeze.simulation import simulation

    simulated = simulation(model)
    compared = list(_compared(model, settings, rng))
    half_limit = 0.0 if not in_half else _half_limit(model, [inputs for _, inputs in compared])
    for name, inputs in compared:
        expected = call(simulated, model, inputs)
        found = session.forward({n: inputs[n] for n in model.text_inputs})
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
    model: "Model", folder: Path, settings: VerifySettings, rng: np.random.Generator, in_half: bool
) -> Iterator[Check]:
    """Greedy tokens of the export, judged by the source: at each step, how far below its best logit is the chosen one?

    Zero means the same token. Comparing token strings alone would fail on ties and say nothing about the size of a difference,
    so the distance is given relative to the spread (standard deviation) of that step's logits.
    """
    from squeeze.runtimes import default_runtimes, open_session
    from squeeze.simulation import simulation

    prompt, count = _inputs(model, 1, 24, False, rng)["input_ids"], settings.greedy_tokens
    exact = GREEDY_EPSILONS * model.half.epsilon if in_half and model.half is not None else FLOAT_TOLERANCE
    limit = settings.tolerance or (exact if model.activations == "float" else GREEDY_TOLERANCE)
    simulated = simulation(model)
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
