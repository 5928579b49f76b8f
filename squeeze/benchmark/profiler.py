"""Where the time goes: ONNX Runtime's own profiler, summed by operator and by layer.

A node's layer is that of the weights it uses, which keep their names from the model; a node without weights belongs to the one
that uses its answer. What the runtime fused under a name of its own belongs to the layer that ran before it.

A node's time is its kernel's alone; what the runtime does between kernels is the difference to the call's time. Decoders are
profiled in ONNX Runtime, step by step with a key-value cache, because onnxruntime-genai runs the same graph there.
"""

import json
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from squeeze.evaluate import model_inputs
from squeeze.runtimes import MODEL_FILE, OnnxSession

CALLS, WARM_UP = 20, 2


def profile(
    folder: Path, device: str, threads: int, work: dict[str, Any], batches: list[dict[str, Any]], result: Path
) -> dict[str, Any]:
    """Seconds and kernels of one call (one generation for a decoder), by operator and layer."""
    session = OnnxSession(folder, device, threads, profile=result.with_suffix(".profile"))

    def call() -> None:
        if work["kind"] == "generate":
            session.generate(batches[0]["input_ids"], work["new_tokens"])
        else:
            session.forward(model_inputs(batches[0]))

    for _ in range(WARM_UP):
        call()
    calls = 3 if work["kind"] == "generate" else CALLS
    started = time.perf_counter()
    # The profiler's clock counts microseconds from the session's start; what lies before this call is warm-up.
    skipped = WARM_UP / (WARM_UP + calls)
    for _ in range(calls):
        call()
    seconds = (time.perf_counter() - started) / calls
    file = session.end_profiling()
    try:
        events = json.loads(file.read_text("utf-8"))
    finally:
        file.unlink(missing_ok=True)
    return {"calls": calls, "seconds": seconds, "rows": rows(events, calls, skipped, layers_of(folder))}


def rows(events: list[dict[str, Any]], calls: int, skipped: float, layers: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of a profile, most time first. `skipped`: share of every node's runs, the earliest, that were warm-up."""
    runs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    operators: dict[str, str] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            node = name.removesuffix("_kernel_time")
            runs[node].append((float(event["ts"]), float(event["dur"])))
            operators[node] = str(event.get("args", {}).get("op_name", ""))
    ran, layer = sorted(runs, key=lambda node: min(runs[node])), ""
    placed: dict[str, str] = {}
    for node in ran:
        placed[node] = layer = layers.get(node, layer)
    found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for node, spans in runs.items():
        kept = sorted(spans)[round(skipped * len(spans)) :]
        row = found[operators[node], placed[node]]
        row[0] += sum(microseconds for _, microseconds in kept) / 1e6 / calls
        row[1] += len(kept) / calls
    made = [
        {"operator": operator, "layer": layer, "seconds": seconds, "count": count}
        for (operator, layer), (seconds, count) in found.items()
    ]
    return sorted(made, key=lambda row: -float(row["seconds"]))


def layers_of(folder: Path) -> dict[str, str]:
    """Node name -> layer, for every node of an export's graph that weights or its users place."""
    import onnx

    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    users: dict[str, list[str]] = defaultdict(list)
    layers: dict[str, str] = {}
    for node in reversed(graph.node):
        own = next((layer for name in node.input if name in weights and (layer := layer_of(name))), "")
        used = (layers[user] for output in node.output for user in users[output] if user in layers)
        if layer := own or next(used, ""):
            layers[node.name] = layer
        for name in node.input:
            users[name].append(node.name)
    return layers


def layer_of(weight: str) -> str:
    """ "model.layers.3.self_attn.q_proj.weight.scale" -> "layers.3.self_attn"; "bert.embeddings.word_embeddings.weight" ->
    "embeddings.word_embeddings"; "" for a constant of the exporter's own.
    """
    parts = re.split(r"\.(?:weight|bias)\b", weight, maxsplit=1)[0].split(".")
    if len(parts) == len(weight.split(".")):
        return ""
    numbers = [position for position, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return ".".join([part for part in parts if part not in ("network", "model")][-2:])
    return ".".join(parts[max(0, numbers[0] - 1) : numbers[0] + 2])
