"""Exported against source: the same names, the same integers byte for byte, the same answers.

Verification compares with the artifact the export was made from, simulated in torch, so it judges the export alone; what
compression cost is the benchmark's business. A failed check fails the run: nothing measured on a wrong graph is worth having.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from squeeze.contents import check, check_cache, check_halves, check_input_grids, check_integers, check_zeros
from squeeze.errors import SqueezeError
from squeeze.report.schema import Check
from squeeze.tasks import TASKS

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

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
    from squeeze.silence import without_silent
    from squeeze.simulation import simulation

    settings = settings or VerifySettings()
    graph = ir.load(folder / MODEL_FILE)
    cache = cache_scales(graph)
    simulated = simulation(model, cache)
    # The bytes are those of the heads that speak, the answers those of the whole checkpoint.
    written, _ = without_silent(model)
    checks = [_check_interface(graph, model), *check_integers(graph, written), *check_input_grids(graph, written)]
    checks += [*check_halves(graph, written), *check_zeros(graph, written)]
    in_half = model.half is not None and graph.metadata_props.get(COMPUTES) == model.half.dtype
    rng = np.random.default_rng(seed)
    # With several threads the LSTM kernel rounds the states of a batch in parts; the simulation rounds them as one.
    in_parts = any(node.op_type == "DynamicQuantizeLSTM" for node in graph.graph)
    session = _run(lambda: open_session(folder, "onnxruntime", threads=1 if in_parts else None))
    if isinstance(session, Failure):
        return [*checks, session.failed("opens in onnxruntime")]
    try:
        if cache is not None:
            checks += check_cache(graph, cache)
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

    def failed(self, name: str) -> Check:
        """It as a check that failed, with the runtime's own words."""
        said = " ".join(str(self.error).split()) or "no message"
        return check(name, np.inf, 0, f"{type(self.error).__name__}: {said[:MESSAGE]}")


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
    return check("names and axes", len(problems), 0, detail)


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
    from squeeze.model import call

    compared = list(_compared(model, settings, rng))
    half_limit = 0.0 if not in_half else _half_limit(model, [inputs for _, inputs in compared])
    for name, inputs in compared:
        expected = call(simulated, model, inputs)
        found = _run(lambda inputs=inputs: session.forward({n: inputs[n] for n in model.text_inputs}))  # type: ignore[misc]
        if isinstance(found, Failure):
            yield found.failed(name)
            continue
        if expected.shape != found.shape:
            yield check(name, np.inf, FLOAT_TOLERANCE, f"shape {found.shape}, expected {expected.shape}")
            continue
        valid = _valid(expected, inputs)
        limit, detail = settings.tolerance or FLOAT_TOLERANCE, "relative error against the artifact in torch"
        if simulated is not model.network and settings.tolerance is None:
            rounding = _relative(expected[valid], call(model.network, model, inputs)[valid])
            limit = max(ROUNDINGS * rounding, FLOAT_TOLERANCE)
            detail = f"relative error; the limit is {ROUNDINGS:g} times that of rounding activations"
        if in_half and settings.tolerance is None:
            of_cache = limit if simulated is not model.network else 0.0
            limit = max(half_limit, of_cache)
            detail = f"relative error; the limit is {HALF_ROUNDINGS:g} times that of rounding what layers give"
            detail += f" or {ROUNDINGS:g} times that of an int8 cache" if of_cache else ""
        yield check(name, _relative(expected[valid], found[valid]), limit, detail)


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
    from squeeze.model import call

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
    from squeeze.model import call
    from squeeze.runtimes import default_runtimes

    prompt, count = _inputs(model, 1, 24, False, rng)["input_ids"], settings.greedy_tokens
    exact = GREEDY_EPSILONS * model.half.epsilon if in_half and model.half is not None else FLOAT_TOLERANCE
    limit = settings.tolerance or (exact if simulated is model.network else GREEDY_TOLERANCE)
    for runtime in ("onnxruntime-genai", "onnxruntime"):
        if runtime not in default_runtimes(folder):
            continue
        tokens = _run(lambda runtime=runtime: _generated(folder, runtime, prompt, count))  # type: ignore[misc]
        if isinstance(tokens, Failure):
            yield tokens.failed(f"greedy tokens, {runtime}")
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
        yield check(f"greedy tokens, {runtime}", float(regret.max()), limit, detail)


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
