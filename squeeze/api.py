"""The Python side: one function for each command, on a model or an artifact that is already on disk.

Steps made one at a time share a *run folder* with the layout that `squeeze run` makes (0-source, 1-quantize,
export-1-quantize), so that the chain from source to export can be followed and nothing has to be named twice.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from squeeze.artifact import Artifact, claim, is_artifact, read_artifact, reusable, run_of, siblings
from squeeze.errors import ArtifactError, ExportError, PruneError, QuantizeError, RecipeError, TrainError
from squeeze.measuring import bench, exports, self_check, torch_artifacts
from squeeze.pipeline import (
    Progress,
    export_artifact,
    export_name,
    parent_of,
    require,
    to_export,
    verify_artifact,
)
from squeeze.pipeline import run as run_recipe
from squeeze.provenance import digest_json
from squeeze.report.schema import ArtifactChecks, Report
from squeeze.stages import apply_stage, inputs_of, keep_source

if TYPE_CHECKING:
    from squeeze.compress import DistillStage
    from squeeze.data import Data

STEPS = digest_json({"run": "steps made one at a time"})
"""Stands where a recipe's digest stands in a folder made by `squeeze run`, so that the two are never mixed."""


def quantize(
    model: str | Path, out: str | Path | None = None, *, scheme: str = "int8", method: str = "round", block_size: int | None = None,
    symmetric: bool | None = None, smooth_alpha: float | None = None, granularity: str | None = None, calibrator: str = "mse",
    percentile: float = 99.999, bias_correction: bool = True, equalize: bool = False, reduce_range: bool = False, curve: Sequence[int] = (),
    outliers: int = 0, sparsity: float | None = None, pattern: str = "unstructured", keep: Sequence[str] = (),
    mixed: dict[str, Any] | None = None, data: dict[str, Any] | None = None, seed: int = 0, task: str | None = None,
    weights: str | None = None, revision: str | None = None, progress: Progress | None = None,
) -> Artifact:  # fmt: skip
    """Quantize a model into the run folder `out`, or an artifact as the next stage of its own run folder.

    `mixed` and `data` are as in a recipe; its calibration split serves the settings that need texts. Returns the new artifact;
    its manifest's record has every layer's bits and signal-to-noise ratio. Raises QuantizeError for data that no setting would read.
    """
    from squeeze.compress import QuantizeStage
    from squeeze.data import DataSettings, load_data
    from squeeze.model import load_tokenizer
    from squeeze.recipe import validated

    given = {
        "scheme": scheme, "method": method, "block_size": block_size, "symmetric": symmetric, "smooth_alpha": smooth_alpha,
        "granularity": granularity, "calibrator": calibrator, "percentile": percentile, "bias_correction": bias_correction,
        "equalize": equalize, "reduce_range": reduce_range, "curve": tuple(curve), "outliers": outliers,
        "sparsity": sparsity, "pattern": pattern, "keep": tuple(keep), "mixed": mixed,
    }  # fmt: skip
    stage = validated(QuantizeStage, given, "quantize")
    settings = None if data is None else validated(DataSettings, data, "data")
    if settings is not None and not stage.needs_data:
        raise QuantizeError(
            "no setting here reads calibration texts. Add one that does (--scheme int8-static, --method gptq, --smooth, --budget), "
            "or drop data."
        )

    def block(i: int, n: int) -> None:
        if progress is not None:
            progress(f"quantize {model}: block {i} of {n}", i, n)

    with _parent(model, out, task, weights, revision) as parent:
        loaded = None
        if settings is not None:
            loaded = load_data(settings, parent.manifest.task, load_tokenizer(parent.folder), seed)
        return apply_stage(stage, parent, _next(parent.folder.parent, stage.kind), loaded, block)


def prune(
    model: str | Path, out: str | Path | None = None, *, sparsity: float | None = None, criterion: str | None = None,
    pattern: str = "unstructured", scope: str | None = None, allocation: str = "uniform", scan: str = "block", keep: Sequence[str] = (),
    remove: dict[str, Any] | None = None, schedule: dict[str, Any] | None = None, losses: Sequence[dict[str, Any]] = (),
    training: dict[str, Any] | None = None, data: dict[str, Any] | None = None, seed: int = 0, task: str | None = None,
    weights: str | None = None, revision: str | None = None, progress: Progress | None = None,
) -> Artifact:  # fmt: skip
    """Prune a model into the run folder `out`, or an artifact as the next stage of its own run folder: `sparsity` (or a pattern such as
    2:4) of single weights, or the parts that `remove` names.

    `remove`, `schedule`, `losses`, `training` and `data` are as in a recipe; data's calibration split, labels included, says what weights
    and parts are worth. Returns the new artifact; its manifest's record has every matrix's sparsity. Raises PruneError.
    """
    from squeeze.compress import PruneStage
    from squeeze.data import DataSettings, load_data
    from squeeze.model import load_tokenizer
    from squeeze.recipe import validated

    given = {
        "sparsity": sparsity, "pattern": pattern, "scope": scope, "allocation": allocation, "scan": scan, "keep": tuple(keep),
        "remove": remove, "schedule": schedule, "losses": tuple(losses), "seed": seed,
        **({} if criterion is None else {"criterion": criterion}), **({} if training is None else {"training": training}),
    }  # fmt: skip
    stage = validated(PruneStage, given, "prune")
    settings = None if data is None else validated(DataSettings, data, "data")
    if settings is not None and not stage.needs_data:
        raise PruneError(
            "no setting here reads calibration texts. Choose a criterion that does (wanda, sparsegpt), or drop data."
        )
    if settings is None and stage.needs_data:
        raise PruneError(
            f"{stage.scheme} is decided by texts, and there are none. Name some with --data, or choose criterion magnitude."
        )

    def part(i: int, n: int, text: str = "") -> None:
        if progress is not None:
            progress(f"prune {model}: {text or f'{stage.progress_noun} {i} of {n}'}", i, n)

    with _parent(model, out, task, weights, revision) as parent:
        folder = parent.folder.parent
        loaded = None
        if settings is not None:
            loaded = load_data(settings, parent.manifest.task, load_tokenizer(parent.folder), seed)
        source = read_artifact(folder / "0-source") if is_artifact(folder / "0-source") else None
        return apply_stage(stage, parent, _next(folder, stage.kind), loaded, part, source)


def distill(
    model: str | Path, out: str | Path | None = None, *, data: dict[str, Any], student: dict[str, Any] | None = None,
    losses: Sequence[str | dict[str, Any]] = (), temperature: float | None = None, teacher: str | Path | None = None,
    training: dict[str, Any] | None = None, evaluate: int | None = None, more: dict[str, Any] | None = None, bench: bool = True,
    seed: int = 0, task: str | None = None, weights: str | None = None, revision: str | None = None, progress: Progress | None = None,
    announce: Callable[[list[tuple[str, str]]], None] | None = None,
) -> Report:  # fmt: skip
    """Train a smaller student of a model (or of an artifact, as the next stage of its run folder), and compare the two, paired.

    `student`, `training`, `data` and `more` are settings as in a recipe's stage; a loss is a name, `name=weight`, or its settings. The
    student learns from `model`, or from `teacher` where one is named, or from its run's source where `model` is a later artifact and
    the student itself. `evaluate`: examples scored at the end; none: a tenth of all, 1000 at most, of language models 100 blocks.
    `announce` hears all that was chosen before anything is trained. Without `bench` nothing is timed.

    A call that was interrupted goes on when it is made again. The report also lies in the run folder, with its page. Raises TrainError
    for what cannot be learned.
    """
    from squeeze.compress import DistillStage
    from squeeze.data import DataSettings, check_fits, load_data
    from squeeze.distillation.choices import TRAINING, complete, loss_term, plan, softened
    from squeeze.measuring import compare_stage
    from squeeze.model import load_tokenizer
    from squeeze.recipe import validated

    began, say = (datetime.now(UTC), time.monotonic()), progress or (lambda description, done, total: None)
    terms = [loss_term(loss) if isinstance(loss, str) else loss for loss in losses]
    splits: dict[str, Any] = data.get("splits", {})
    evaluate = splits.get("evaluate") if evaluate is None else evaluate
    open_splits = {"train": "rest", **splits, "evaluate": 1 if evaluate is None else evaluate}
    wanted = validated(DataSettings, {**data, "splits": open_splits}, "data")
    with _parent(model, out, task, weights, revision) as last:
        folder, task = last.folder.parent, last.manifest.task
        given = {
            "student": student or {}, "losses": terms, "teacher": None if teacher is None else str(teacher),
            "training": {**TRAINING[task], "seed": seed, **(training or {})}, **(more or {}),
        }  # fmt: skip
        stage = validated(DistillStage, given, "distill")
        if temperature is not None:
            stage = stage.model_copy(update={"losses": softened(stage.losses, task, temperature)})
        tokenizer = load_tokenizer(last.folder)
        texts = load_data(complete(wanted, evaluate, task, last.config, tokenizer, seed), task, tokenizer, seed)
        check_fits(texts, last.config)
        parent = last if is_artifact(Path(model)) else _before(stage, last, texts)
        source = _teacher(stage, parent)
        if announce is not None:
            started = "" if parent.name == "0-source" else parent.name
            announce(plan(stage, texts, parent.config, stage.teacher or _called(source or parent, model), started))

        def step(i: int, n: int, text: str = "") -> None:
            say(f"{stage.kind} {stage.scheme}: {text or stage.progress_noun}", i, n)

        inputs = inputs_of(stage, parent, texts, source)
        made = [path for path in torch_artifacts(folder) if reusable(path, inputs) is not None]
        result = apply_stage(stage, parent, made[0] if made else _next(folder, stage.kind), texts, step, source)
        if source is None:
            source = _kept(str(stage.teacher), task, folder / "teacher")
        return compare_stage(stage, source, result, texts, seed=seed, began=began, timed=bench, progress=say)


def export(
    model: str | Path, out: str | Path | None = None, *, graph: Literal["auto", "genai", "dynamo"] = "auto", source: bool = True,
    kv_cache: Literal["float32", "int8"] = "float32", kv_scales: Literal["channel", "tensor"] | None = None,
    data: dict[str, Any] | None = None, seed: int = 0,
    task: str | None = None, weights: str | None = None, revision: str | None = None,
) -> Artifact:  # fmt: skip
    """Export a model, an artifact, or the last artifact of a run folder to ONNX; with `source` the first one as well.

    Exports of a recipe's stages go beside them too, but never in place of those that the recipe made.
    `data` is as in a recipe; its calibration split gives an int8 cache its scales. Raises ExportError for data that nothing reads.
    """
    from squeeze.data import DataSettings, load_data
    from squeeze.exporter import ExportSettings
    from squeeze.model import load_tokenizer
    from squeeze.recipe import validated

    given = {"graph": graph, "source": source, "kv_cache": kv_cache, "kv_scales": kv_scales}
    settings = validated(ExportSettings, given, "export")
    texts = None if data is None else validated(DataSettings, data, "data")
    if texts is not None and not settings.needs_data:
        raise ExportError("an export with a float cache reads no texts. Add --kv-cache int8, or drop data.")
    if settings.needs_data and (texts is None or texts.splits.calibration == 0):
        raise ExportError(
            "an int8 cache takes its scales from calibration texts, and there are none. Name some with --data."
        )
    with _parent(model, out, task, weights, revision, exports=True) as parent:
        folder = parent.folder.parent
        place = folder / "0-source"
        source_artifact = parent if parent.name == "0-source" or not is_artifact(place) else read_artifact(place)
        loaded = None if texts is None else load_data(texts, parent.manifest.task, load_tokenizer(parent.folder), seed)
        ours = run_of(folder) == STEPS
        places = [(a, folder / export_name(a, how), how) for a, how in to_export(source_artifact, parent, settings)]
        return [
            export_artifact(artifact, place, how, loaded, replace=ours)
            for artifact, place, how in places
            if ours or artifact is parent or not is_artifact(place)
        ][-1]


def verify(
    exported: str | Path, against: str | Path | None = None, *, tolerance: float | None = None, seed: int = 0
) -> ArtifactChecks:
    """Compare an export, or that of a run folder's last exported artifact, with the artifact it was made from.

    Raises VerifyError, which carries the checks, where one failed.
    """
    from squeeze.verification import VerifySettings

    export = _onnx_artifact(Path(exported))
    parent = read_artifact(Path(against)) if against is not None else parent_of(export)
    checks = verify_artifact(parent, export, VerifySettings(tolerance=tolerance), seed)
    require(checks)
    return checks


def run(
    recipe: Any, out: str | Path, *, mode: Literal["new", "resume", "fresh"] = "new", overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Run a recipe (a Recipe, or the path of a YAML file) into the folder `out`; see `squeeze.pipeline.run`."""
    from squeeze.recipe import Recipe, read_recipe

    if isinstance(recipe, Recipe) and overrides:
        raise RecipeError(
            "overrides go with the path of a recipe. Change the Recipe itself with model_copy(update=...)."
        )
    loaded = recipe if isinstance(recipe, Recipe) else read_recipe(Path(recipe), overrides)
    return run_recipe(loaded, Path(out), mode=mode, progress=progress)


def run_folder(model: str | Path, out: str | Path | None = None) -> Path:
    """Where a step made of `model` lies: in `out`, else beside the artifact that it names, else in a folder named after the model."""
    path = Path(model)
    if out is not None:
        return Path(out)
    if is_artifact(path):
        return path.resolve().parent
    return path if torch_artifacts(path) else Path(f"{path.name.replace(':', '-').removesuffix('.gguf')}-squeezed")


@contextmanager
def _parent(
    model: str | Path, out: str | Path | None, task: str | None, weights: str | None, revision: str | None, *, exports: bool = False
) -> Iterator[Artifact]:  # fmt: skip
    """The torch artifact to work on, its run folder held against other processes. With `out`, a model and an artifact alike begin a run
    of their own there; `exports`: what is made is no stage, and may lie in a recipe's run."""
    from squeeze.model import ModelSettings, task_of

    path, folder = Path(model), run_folder(model, out)
    last = path if is_artifact(path) else next(reversed(torch_artifacts(path)), None)
    if last is not None and folder.resolve() == last.resolve().parent:
        if not exports and run_of(folder) not in (None, STEPS):
            raise ArtifactError(
                f"{folder} holds a recipe's run, to which only the recipe adds stages. Give --out NEW: a run of its own, beginning with "
                f"{last.name}."
            )
        with claim(folder, "resume", None if exports else STEPS):
            yield read_artifact(last)
        return
    settings = ModelSettings(path=str(model if last is None else last), weights=weights, revision=revision)
    task = task or task_of(settings)
    with claim(folder, "resume", STEPS):
        yield keep_source(settings, task, folder / "0-source")


def _next(folder: Path, kind: str) -> Path:
    """Where the next stage of a run folder goes: 2-prune after 1-distill."""
    return folder / f"{1 + max(int(p.name.split('-')[0]) for p in torch_artifacts(folder))}-{kind}"


def _before(stage: "DistillStage", last: Artifact, texts: "Data") -> Artifact:
    """What a run folder's last artifact was made from, where this very stage made it before it was interrupted; else that artifact."""
    earlier = siblings(last.folder).get(last.manifest.parent or "")
    if earlier is None or last.manifest.record is None or last.manifest.record.kind != stage.kind:
        return last
    inputs = inputs_of(stage, earlier, texts, _teacher(stage, earlier))
    return earlier if inputs == last.manifest.inputs else last


def _teacher(stage: "DistillStage", parent: Artifact) -> Artifact | None:
    """The artifact that teaches; None where the stage names a model. Raises TrainError where the student would learn from itself, and
    for one that is cut from integers."""
    if parent.manifest.extra.get("integers") and stage.student.path is None:
        raise TrainError(
            f"{parent.folder} holds integers, which only qat can go on training. Distil {parent.folder.parent / '0-source'}, and "
            "quantize the student."
        )
    if stage.teacher is not None:
        return None
    place = parent.folder.parent / "0-source"
    if not stage.learns_from_itself:
        return parent
    if parent.name == "0-source" or not is_artifact(place):
        raise TrainError(
            f"{parent.folder} would be student and teacher at once: there is nothing to learn. Say which layers the student keeps "
            "(--layers 3), or name another student or teacher."
        )
    return read_artifact(place)


def _kept(model: str, task: str, folder: Path) -> Artifact:
    """Another teacher as an artifact that can be measured."""
    from squeeze.model import ModelSettings

    return (
        read_artifact(Path(model)) if is_artifact(Path(model)) else keep_source(ModelSettings(path=model), task, folder)
    )


def _called(artifact: Artifact, model: str | Path) -> str:
    """What a person calls an artifact: the source by the name that it was given."""
    return str(model) if artifact.name == "0-source" else str(artifact.folder)


def _onnx_artifact(path: Path) -> Artifact:
    """An export; of a run folder, the export of its last artifact. Raises ArtifactError naming what is there instead."""
    if path.is_dir() and not is_artifact(path):
        found = exports(path)
        if not found:
            raise ArtifactError(f"{path} holds no export. Make one: squeeze export {path}.")
        return read_artifact(found[-1])
    artifact = read_artifact(path)
    if artifact.manifest.format != "onnx":
        raise ArtifactError(f"{path} is a torch artifact, not an export. Make one: squeeze export {path}.")
    return artifact


__all__ = ["bench", "distill", "export", "prune", "quantize", "run", "self_check", "verify"]
