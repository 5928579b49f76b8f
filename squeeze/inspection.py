"""What a model or an artifact is: sizes, layers, for an artifact the chain from its source, and what its parts are worth."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from squeeze.artifact import Artifact, chain, is_artifact, read_artifact
from squeeze.errors import PruneError, nearest
from squeeze.provenance import Digest
from squeeze.report.explained import stage_label
from squeeze.report.schema import LayerRow, Manifest
from squeeze.report.sensitivity_table import PRUNED_TOGETHER, SensitivityTable
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


def inspect_sensitivity(
    path: str, data: dict[str, Any], *, criterion: str = "wanda", pattern: str = "unstructured", sparsities: Sequence[float] = (),
    by: str = "block", keep: Sequence[str] = (), task: str | None = None, weights: str | None = None, seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> SensitivityTable:  # fmt: skip
    """What pruning each part of a model alone costs its answers; `data` as in a recipe, of which the calibration split is read.

    A run folder stands for its last torch artifact. `by`: matrix, block, heads or neurons. Raises PruneError for what cannot be scanned.
    """
    from squeeze.data import DataSettings, load_data
    from squeeze.measuring import torch_artifacts
    from squeeze.model import load_model
    from squeeze.pruning.sensitivity import sensitivity_table
    from squeeze.pruning.settings import PruneStage
    from squeeze.recipe import validated
    from squeeze.stages import calibration_batches

    if by not in PRUNED_TOGETHER:
        raise PruneError(f"--by {by} is unknown. {nearest(by, PRUNED_TOGETHER)}")
    share = (
        None if ":" in pattern else max(sparsities, default=0.5)
    )  # a stage must say how much; the scan tries them all
    given = {"sparsity": share, "criterion": criterion, "pattern": pattern, "keep": tuple(keep), "seed": seed}
    stage = validated(PruneStage, given, "prune")
    settings = validated(DataSettings, data, "data")
    folder = Path(path)
    made = torch_artifacts(folder) if folder.is_dir() and not is_artifact(folder) else ()
    model = load_model(made[-1] if made else path, task, weights=weights)
    texts = load_data(settings, model.task, model.tokenizer, seed)
    split = texts.splits.get("calibration")
    batches = () if split is None else calibration_batches(texts, split, model)

    def block(i: int, n: int) -> None:
        if progress is not None:
            progress(f"prune each part of {path} alone: block {i} of {n}", i, n)

    return sensitivity_table(model, batches, stage, sparsities, block, by=by)  # type: ignore[arg-type]


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
    from squeeze.compress.layers import weight_rows
    from squeeze.model import load_model
    from squeeze.pruning.matrices import nonfinite

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
