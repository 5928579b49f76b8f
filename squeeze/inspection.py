"""What a model or an artifact is: sizes, layers, and for an artifact the chain from its source."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from squeeze.artifact import Artifact, chain, is_artifact, read_artifact
from squeeze.provenance import Digest
from squeeze.report.explained import stage_label
from squeeze.report.schema import LayerRow, Manifest
from squeeze.tasks import positions


class Link(BaseModel):
    """One artifact of a chain."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    format: str
    digest: Digest
    parameters: int
    weight_bytes: int
    made_by: str


class Inspection(BaseModel):
    """What `squeeze inspect` prints."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    task: str
    architecture: str
    parameters: int
    nonzero_parameters: int
    weight_bytes: int
    positions: int | None
    layers: tuple[LayerRow, ...]
    chain: tuple[Link, ...]
    warnings: tuple[str, ...]


def inspect_model(path: str, *, task: str | None = None, weights: str | None = None) -> Inspection:
    """Open whatever `path` names and describe it; a run folder stands for its last export, or its last artifact.

    Unlike every other command it only warns of NaN or infinite weights: looking at a broken model is its purpose.
    """
    folder = Path(path)
    if folder.is_dir() and not is_artifact(folder):
        folder = _last(folder)
    links: tuple[Link, ...] = ()
    if is_artifact(folder):
        artifact = read_artifact(folder)
        manifests = chain(folder)
        links = tuple(_link(m) for m in manifests)
        if artifact.manifest.format == "onnx":
            return _inspect_export(artifact, manifests, links)
        found, record = _inspect_torch(str(folder), task, weights, links), artifact.manifest.record
        rows = {} if record is None else {row.name: row for row in record.layers}
        return found.model_copy(update={"layers": tuple(rows.get(row.name, row) for row in found.layers)})
    return _inspect_torch(path, task, weights, links)


def _last(folder: Path) -> Path:
    from squeeze.measuring import run_artifacts

    artifacts = run_artifacts(folder)
    return artifacts[-1] if artifacts else folder


def _inspect_export(artifact: Artifact, manifests: list[Manifest], links: tuple[Link, ...]) -> Inspection:
    manifest = artifact.manifest
    records = [m.record for m in manifests if m.record is not None and m.record.layers]
    return Inspection(
        source=manifest.source, task=manifest.task, architecture="ONNX graph", parameters=manifest.parameters,
        nonzero_parameters=manifest.nonzero_parameters, weight_bytes=manifest.weight_bytes, positions=positions(artifact.config),
        layers=records[-1].layers if records else (), chain=links, warnings=(),
    )  # fmt: skip


def _inspect_torch(path: str, task: str | None, weights: str | None, links: tuple[Link, ...]) -> Inspection:
    from squeeze.compress.layers import nonfinite, weight_rows
    from squeeze.model import load_model

    model = load_model(path, task, weights=weights)
    bad = nonfinite(model.network)
    return Inspection(
        source=model.source, task=model.task, architecture=type(model.network).__name__, parameters=model.parameters,
        nonzero_parameters=model.nonzero_parameters, weight_bytes=stored_bytes(model.parameters, links), positions=model.positions,
        layers=tuple(weight_rows(model)), chain=links,
        warnings=(*model.notes, *(f"{name} holds {count} NaN or infinite weights" for name, count in bad.items())),
    )  # fmt: skip


def stored_bytes(parameters: int, links: tuple[Link, ...]) -> int:
    """Bytes on disk of an artifact's weights; of a model outside a run, what float32 takes."""
    return links[-1].weight_bytes if links else 4 * parameters


def _link(manifest: Manifest) -> Link:
    record = manifest.record
    made_by = "loaded" if record is None else stage_label(record)
    return Link(
        name=manifest.name, format=manifest.format, digest=manifest.digest, parameters=manifest.parameters,
        weight_bytes=manifest.weight_bytes, made_by=made_by,
    )  # fmt: skip
