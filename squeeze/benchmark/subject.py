"""What squeeze did not make but can measure beside what it did: a .gguf file, an OpenVINO or ONNX folder, a Transformers folder.

A manifest is put together from the files as they lie there, so that a report says exactly what was measured; nothing is written
beside them.
"""

import json
from datetime import UTC, datetime
from pathlib import Path

from squeeze.artifact import Artifact
from squeeze.errors import ArtifactError
from squeeze.provenance import digest_file, digest_json, environment
from squeeze.report.schema import FileEntry, Manifest
from squeeze.runtimes import GENAI_CONFIG, MODEL_FILE, OPENVINO_MODEL

WEIGHTS = (".gguf", ".safetensors", ".onnx", ".data", ".bin")


def is_foreign(path: Path) -> bool:
    """Whether this is a model that some runtime here reads, made by another tool."""
    return path.suffix == ".gguf" or any(
        (path / name).is_file() for name in (OPENVINO_MODEL, MODEL_FILE, "config.json")
    )


def foreign(path: Path, task: str) -> Artifact:
    """The artifact that stands for it. Raises ArtifactError where there is nothing to measure."""
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist. Name a .gguf file.")
        return Artifact(path, _manifest(path.stem, "gguf", task, path.parent, [path]))
    files = sorted(p for p in path.rglob("*") if p.is_file())
    kind = "openvino" if (path / OPENVINO_MODEL).is_file() else "onnx" if (path / MODEL_FILE).is_file() else "torch"
    return Artifact(path, _manifest(path.resolve().name, kind, task, path, files))


def task_of(path: Path) -> str | None:
    """What a foreign model is for, where its files tell."""
    if path.suffix == ".gguf" or (path / GENAI_CONFIG).is_file():
        return "causal-lm"
    try:
        architectures = json.loads((path / "config.json").read_text("utf-8"))["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    name = str(architectures[0]) if architectures else ""
    endings = {
        "ForCausalLM": "causal-lm",
        "LMHeadModel": "causal-lm",
        "ForSequenceClassification": "text-classification",
    }
    return next((task for ending, task in endings.items() if name.endswith(ending)), "feature-extraction")


def _manifest(name: str, kind: str, task: str, root: Path, files: list[Path]) -> Manifest:
    entries = {
        file.relative_to(root).as_posix(): FileEntry(sha256=digest_file(file), bytes=file.stat().st_size) for file in files
    }  # fmt: skip
    weights = sum(entry.bytes for name, entry in entries.items() if name.endswith(WEIGHTS))
    return Manifest.model_validate(
        {
            "name": name, "format": kind, "task": task, "source": str(root), "files": entries, "parent": None, "record": None,
            "data": {}, "parameters": 0, "nonzero_parameters": 0, "weight_bytes": weights,
            "inputs": digest_json({n: e.sha256 for n, e in entries.items()}), "environment": environment(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"), "extra": {"made_by": "another tool"},
        }
    )  # fmt: skip
