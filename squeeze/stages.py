"""One step of the line on disk: a source or a stage as the next artifact of its chain, reused where nothing it depends on changed."""

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from squeeze import __version__
from squeeze.artifact import Artifact, read_artifact, reusable, write_artifact
from squeeze.errors import TrainError
from squeeze.provenance import Digest, digest_file, digest_json, environment
from squeeze.report.schema import FileEntry, Manifest, StageRecord
from squeeze.report.sensitivity_table import read_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from squeeze.compress import QatStage, Stage
    from squeeze.data import Data, Split
    from squeeze.distillation import DistillStage
    from squeeze.distillation.taught import Taught
    from squeeze.model import Model, ModelSettings

MODEL_NAMES = (
    "config",
    "generation_config",
    "tokenizer",
    "special_tokens",
    "vocab",
    "merges",
    "model.safetensors.index",
    "squeeze",
)
CALIBRATION_TOKENS = 4096
"""Tokens that a stage runs at once: enough to keep the matrix units busy, few enough to fit beside the weights."""
TRAINING = ".{}.training"
"""Folder beside an artifact in which a training keeps its checkpoints until the artifact stands."""
WEIGHT_FILES = (".safetensors", ".onnx", ".data")


def keep_source(settings: "ModelSettings", task: str, folder: Path) -> Artifact:
    """The trained model as the first artifact of a chain; reused where its files have not changed."""
    from squeeze.model import load_model, save_model

    inputs = digest_json(
        {
            "squeeze": __version__,
            "model": settings.model_dump(mode="json"),
            "files": dict(_source_files(settings)),
            "task": task,
        }
    )
    found = reusable(folder, inputs)
    if found is not None:
        return found
    model = load_model(settings, task)
    extra: dict[str, Any] = {"notes": list(model.notes), **_beyond_weights(model)}
    if model.integers:
        extra |= _integers(model)
    return write(folder, lambda place: save_model(model, place), model, inputs=inputs, parent=None, extra=extra)


def apply_stage(
    stage: "Stage",
    parent: Artifact,
    folder: Path,
    data: "Data | None" = None,
    done: Callable[..., None] | None = None,
    source: Artifact | None = None,
) -> Artifact:
    """One compression stage as the next artifact of the chain; reused where parent, settings and data are the same.

    `done(i, n)` hears of stages that go through the network block by block, or train step by step; a stage that trains has
    `source` for its teacher.
    """
    from squeeze.compress.sizes import artifact_bytes
    from squeeze.model import load_model, save_model
    from squeeze.training import processes

    splits = _splits(stage, data)
    split = next(iter(splits.values()), None)
    used = {name: split.digest for name, split in splits.items()}
    inputs = inputs_of(stage, parent, data, source)
    workspace = folder.with_name(TRAINING.format(folder.name))
    found = reusable(folder, inputs)
    if found is not None:
        return found
    model = load_model(parent.folder)
    if stage.kind == "quantize":
        record = stage.apply(
            model, () if split is None or data is None else calibration_batches(data, split, model), done
        )
    elif stage.kind == "distill":
        job = _job(stage, parent, source, data, workspace, inputs)
        with processes.together(job):
            taught = _taught(stage, source or parent, model.task)
            record = stage.apply(model, taught, data, workspace, inputs, done)
    elif stage.kind == "prune":
        texts = calibration_batches(data, splits["calibration"], model) if data and "calibration" in splits else []
        unpruned = None if stage.schedule is None else _unpruned(source or parent)
        record = stage.apply(model, texts, done, data=data, teacher=unpruned, workspace=workspace, key=inputs)
    else:
        teacher = None if source is None else load_model(source.folder)
        record = stage.apply(
            model, () if split is None or data is None else _training(data, split, model, stage), done, teacher
        )
    record = record.model_copy(update={"predicted_bytes": artifact_bytes(model)})
    extra = _integers(model) | _beyond_weights(model)

    def fill(place: Path) -> StageRecord:
        save_model(model, place)
        return record

    artifact = write(folder, fill, model, inputs=inputs, parent=parent.digest, extra=extra, data=used)
    shutil.rmtree(workspace, ignore_errors=True)
    return artifact


def inputs_of(stage: "Stage", parent: Artifact, data: "Data | None", source: Artifact | None) -> Digest:
    """Digest of all that determines what a stage makes: an artifact with the same one need not be made again."""
    used = {name: split.digest for name, split in _splits(stage, data).items()}
    settings = stage.model_dump(mode="json")
    if stage.kind == "distill" and data is not None:
        settings |= {"data": data.settings.model_dump(mode="json"), "taught by": _others(stage, source)}
    if stage.kind == "prune" and stage.schedule is not None and data is not None:
        taught = None if source is None else source.digest
        settings |= {"data": data.settings.model_dump(mode="json"), "taught by": taught}
    if stage.kind == "prune" and stage.scan_file is not None:
        settings |= {"scanned": read_table(stage.scan_file).model_dump(mode="json")}
    return digest_json({"squeeze": __version__, "parent": parent.digest, "stage": settings, "data": dict(used)})


def _splits(stage: "Stage", data: "Data | None") -> "dict[str, Split]":
    """The splits that a stage reads: what is measured is measured on calibration, labels included, and what is trained trains on train."""
    if data is None or not stage.needs_data:
        return {}
    names = ["calibration"] if stage.kind in ("quantize", "prune") else []
    names += ["train"] if stage.kind in ("qat", "distill") or (stage.kind == "prune" and stage.schedule) else []
    return {name: split for name in names if (split := data.splits.get(name)) is not None}


def _unpruned(artifact: Artifact) -> "Taught":
    from squeeze.distillation.taught import Taught
    from squeeze.model import load_model

    return Taught(artifact.digest, lambda: load_model(artifact.folder))


def train_along(job: "Mapping[str, Any]") -> None:
    """What a follower does while the main process is in `apply_stage`: the same training, from the same folders and texts."""
    import os

    from squeeze.data import DataSettings, load_data
    from squeeze.distillation import DistillStage
    from squeeze.model import load_model, load_tokenizer

    os.chdir(job["working directory"])
    stage = DistillStage.model_validate(job["stage"])
    data: Data | None = None
    if job["data"] is not None:
        tokenizer = load_tokenizer(Path(job["source"]))
        data = load_data(DataSettings.model_validate(job["data"]), job["task"], tokenizer, job["seed"])
        if data.digests != job["splits"]:
            raise TrainError(
                f"{data.settings.path} has other texts here than on the main process's machine. Copy it anew."
            )
    model = load_model(Path(job["parent"]))
    taught = _taught(stage, read_artifact(Path(job["source"]), check=False), model.task)
    stage.apply(model, taught, data, Path(job["workspace"]), job["key"])


def _job(
    stage: "DistillStage", parent: Artifact, source: Artifact | None, data: "Data | None", workspace: Path, key: Digest
) -> dict[str, Any]:
    """All that `train_along` needs, as JSON; folders and texts lie where every process sees them."""
    return {
        "stage": stage.model_dump(mode="json"), "parent": str(parent.folder.resolve()), "source": str((source or parent).folder.resolve()),
        "workspace": str(workspace.resolve()), "key": key, "working directory": str(Path.cwd()),
        "data": None if data is None else data.settings.model_dump(mode="json"), "task": None if data is None else data.task,
        "seed": None if data is None else data.seed, "splits": None if data is None else data.digests,
    }  # fmt: skip


def _others(stage: "DistillStage", source: Artifact | None) -> dict[str, Any]:
    """What a distillation reads beside the chain: files of another teacher, a student or a masked language model, and texts."""
    from squeeze.distillation.texts import source_digest
    from squeeze.model import ModelSettings

    masked = None if stage.augment is None else stage.augment.model
    named = [path for path in (stage.teacher, stage.student.path, masked) if path is not None]
    files = {path: dict(_source_files(ModelSettings(path=path))) for path in named}
    texts = None if stage.unlabelled is None else source_digest(stage.unlabelled)
    return {"source": None if source is None else source.digest, "files": files, "texts": texts}


def _taught(stage: "DistillStage", source: Artifact, task: str) -> "Taught":
    """The teacher, known by its files before it is loaded; a hub id has none and is known by its name."""
    from squeeze.distillation.taught import Taught
    from squeeze.model import ModelSettings, load_model

    path = stage.teacher
    if path is None:
        return Taught(source.digest, lambda: load_model(source.folder))
    files = _source_files(ModelSettings(path=path))
    return Taught(digest_json(dict(files) or {"name": path}), lambda: load_model(path, task))


def calibration_batches(data: "Data", split: "Split", model: "Model") -> "list[dict[str, NDArray[np.int64]]]":
    """The calibration split as a stage reads it: batches of about as many tokens, texts of like length together."""
    from squeeze.data import batches

    length = data.settings.block_size if model.task == "causal-lm" else data.settings.max_length
    rows = max(1, CALIBRATION_TOKENS // length)
    found = batches(split, model.tokenizer, model.task, batch=rows, max_length=data.settings.max_length)
    return _labelled(found, split)


def _training(data: "Data", split: "Split", model: "Model", stage: "QatStage") -> "list[dict[str, NDArray[np.int64]]]":
    """The train split, or its first examples, in batches of like length, with labels where the task has them."""
    from squeeze.data import batches

    found = batches(
        split.first(stage.examples), model.tokenizer, model.task, batch=stage.batch, max_length=data.settings.max_length
    )
    return _labelled(found, split)


def _labelled(found: "list[dict[str, NDArray[np.int64]]]", split: "Split") -> "list[dict[str, NDArray[np.int64]]]":
    """Batches with the labels of their texts, where there are any."""
    import numpy as np

    if split.labels is None:
        return found
    labels = np.array(split.labels, np.int64)
    return [{**batch, "labels": labels[batch["index"]]} for batch in found]


def _source_files(settings: "ModelSettings") -> dict[str, Digest]:
    """Digest of every file that the model is read from; a hub id has none and is known by its name and revision."""
    from squeeze.model import locate

    location = locate(settings)
    roots = [location] if isinstance(location, Path) else []
    if settings.weights is not None and Path(settings.weights).expanduser().exists():
        roots.append(Path(settings.weights).expanduser())
    files: dict[str, Digest] = {}
    for root in roots:
        for path in [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file()):
            if path.name.startswith(MODEL_NAMES) or path.suffix in (".safetensors", ".gguf", ".bin", ".jinja"):
                files[path.relative_to(root.parent).as_posix()] = digest_file(path)
    return files


def _integers(model: "Model") -> dict[str, Any]:
    from squeeze.integers import layout_of

    return {"integers": layout_of(model.integers), "activations": model.activations}


def _beyond_weights(model: "Model") -> dict[str, Any]:
    """What a manifest must say besides so that `load_model` finds the same model again."""
    from squeeze.masks import to_rows

    extra: dict[str, Any] = {} if model.factory is None else {"factory": model.factory}
    if model.half is not None:
        extra["half"] = model.half.as_row()
    if model.pruned:
        extra["pruned"] = to_rows(model.pruned)
    return extra


def write(
    folder: Path, fill: Callable[[Path], StageRecord | None], model: "Model", *, inputs: Digest, parent: Digest | None,
    extra: dict[str, Any], form: Literal["torch", "onnx"] = "torch", data: dict[str, Digest] | None = None,
) -> Artifact:  # fmt: skip
    """Write an artifact; `fill` fills its folder and tells what it did, None where the model is as it was found."""
    record: StageRecord | None = None

    def filled(place: Path) -> None:
        nonlocal record
        record = fill(place)

    def manifest(files: dict[str, FileEntry]) -> Manifest:
        return Manifest(
            name=folder.name, format=form, task=model.task, source=model.source, files=files, parent=parent,
            record=record, data=data or {}, parameters=model.parameters,
            nonzero_parameters=model.nonzero_parameters,
            weight_bytes=sum(entry.bytes for name, entry in files.items() if name.endswith(WEIGHT_FILES)),
            inputs=inputs, environment=environment(), created=datetime.now(UTC).isoformat(timespec="seconds"), extra=extra,
        )  # fmt: skip

    return write_artifact(folder, filled, make_manifest=manifest)
