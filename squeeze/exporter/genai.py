"""The onnxruntime-genai path: its model builder knows a decoder's fastest graph (grouped-query attention, rotary cache).

The builder runs as a command of its own in a child process, in float32; squeeze then puts its integers in. Rejected: the
builder's own int8 and int4, which round the weights again by rules of their own, and calling its Python function, whose
arguments change with every release.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from squeeze.errors import ExportError
from squeeze.model import save_model
from squeeze.runtimes import GENAI_CONFIG, MODEL_FILE

if TYPE_CHECKING:
    import onnx_ir as ir

    from squeeze.model import Model

run_command = subprocess.run
"""A name of its own, so that tests can run the builder where its imports are already."""

ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM",
    "Phi3ForCausalLM", "OlmoForCausalLM", "GraniteForCausalLM", "SmolLM3ForCausalLM", "NemotronForCausalLM",
)  # fmt: skip
"""Text decoders that the builder names and that are ordinary enough for its float graph to match Transformers."""


def architecture(model: "Model") -> str:
    """The Transformers class of the network."""
    return type(model.network).__name__


def knows(model: "Model") -> bool:
    """Whether the builder can make this model's graph."""
    return model.task == "causal-lm" and model.factory is None and architecture(model) in ARCHITECTURES


@contextmanager
def built(model: "Model", folder: Path) -> Iterator["ir.Model"]:
    """The builder's float32 graph, its weights in a folder inside `folder` that goes afterwards; leaves genai_config.json there."""
    import onnx_ir as ir

    with tempfile.TemporaryDirectory(prefix=".genai-", dir=folder) as name:
        source, target = Path(name, "source"), Path(name, "target")
        source.mkdir()
        save_model(dataclasses.replace(model, integers={}, half=None), source)
        _build(source, target, Path(name, "cache"))
        config = json.loads((target / GENAI_CONFIG).read_text("utf-8"))
        (folder / GENAI_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        yield ir.load(target / MODEL_FILE)


def _build(source: Path, target: Path, cache: Path) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(target)]
    command += ["-p", "fp32", "-e", "cpu", "-c", str(cache), "--extra_options", "hf_token=false"]
    done = run_command(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)
    if done.returncode != 0 or not (target / MODEL_FILE).exists():
        last = (done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["no message"])[-1]
        raise ExportError(f"onnxruntime-genai's builder failed: {last} Use export.graph: dynamo to go without it.")
