"""Weights of an ONNX graph may lie only inside its own folder."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from squeeze.errors import ArtifactError
from squeeze.runtimes.session import MODEL_FILE


def check_external_data(folder: Path) -> None:
    """Raise ArtifactError where the graph names weight files outside its folder (compare CVE-2022-25882, CVE-2024-27318)."""
    import onnx

    path = folder / MODEL_FILE
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {MODEL_FILE}. Name the folder of an export.")
    try:
        graph = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ArtifactError(f"{path} is not an ONNX model: {error}.") from error
    root = Path(os.path.realpath(folder))
    for tensor in _tensors(graph):
        for entry in tensor.external_data:
            if entry.key != "location":
                continue
            target = Path(os.path.realpath(root / entry.value))
            if Path(entry.value).is_absolute() or not target.is_relative_to(root):
                raise ArtifactError(
                    f"{path} keeps {tensor.name} at {entry.value!r}, outside its folder. It was not read."
                )
            if not target.is_file():
                raise ArtifactError(f"{path} keeps {tensor.name} in {entry.value}, which is missing.")


def _tensors(part: Any) -> Iterator[Any]:
    """Every tensor of an ONNX message, wherever it lies: branches and attributes of nodes hold some too."""
    if part.DESCRIPTOR.name == "TensorProto":
        yield part
        return
    for field, value in part.ListFields():
        if field.message_type is not None:
            for inner in (value,) if hasattr(value, "DESCRIPTOR") else value:
                yield from _tensors(inner)
