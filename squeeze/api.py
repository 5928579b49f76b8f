"""The Python side: one function for each command, on a model or an artifact that is already on disk.

Steps made one at a time share a *run folder* with the layout that `squeeze run` makes (0-source, 1-quantize,
export-1-quantize), so that the chain from source to export can be followed and nothing has to be named twice.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from squeeze.artifact import Artifact, claim, is_artifact, read_artifact
from squeeze.errors import ArtifactError, RecipeError
from squeeze.pipeline import (
    Progress,
    apply_stage,
    export_artifact,
    keep_source,
    make_report,
    parent_of,
    require,
    verify_artifact,
)
from squeeze.pipeline import run as run_recipe
from squeeze.provenance import digest_json
from squeeze.report.schema import ArtifactChecks, Report

STEPS = digest_json({"run": "steps made one at a time"})
"""Stands where a recipe's digest stands in a folder made by `squeeze run`, so that the two are never mixed."""


def quantize(
    model: str | Path, out: str | Path | None = None, *, scheme: str = "int8", block_size: int | None = None,
    keep: Sequence[str] = (), task: str | None = None, weights: str | None = None, revision: str | None = None,
) -> Artifact:  # fmt: skip
    """Quantize a model into the run folder `out`, or an artifact as the next stage of its own run folder.

    Returns the new artifact; its manifest's record has every layer's bits and signal-to-noise ratio.
    """
    from squeeze.compress import QuantizeStage
    from squeeze.recipe import validated

    stage = validated(QuantizeStage, {"scheme": scheme, "block_size": block_size, "keep": tuple(keep)}, "quantize")
    with _parent(model, out, task, weights, revision) as parent:
        number = 1 + max(int(p.name.split("-")[0]) for p in _torch_artifacts(parent.folder.parent))
        return apply_stage(stage, parent, parent.folder.parent / f"{number}-{stage.kind}")


def export(
    model: str | Path, out: str | Path | None = None, *, graph: Literal["auto", "genai", "dynamo"] = "auto", source: bool = True,
    task: str | None = None, weights: str | None = None, revision: str | None = None,
) -> Artifact:  # fmt: skip
    """Export a model, an artifact, or the last artifact of a run folder to ONNX; with `source` the first one as well."""
    from squeeze.exporter import ExportSettings

    settings = ExportSettings(graph=graph, source=source)
    with _parent(model, out, task, weights, revision) as parent:
        folder = parent.folder.parent
        first = folder / "0-source"
        if source and parent.name != "0-source" and is_artifact(first):
            export_artifact(read_artifact(first), folder / "export-0-source", settings)
        return export_artifact(parent, folder / f"export-{parent.name}", settings)


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


def bench(
    artifacts: Sequence[str | Path], *, data: dict[str, Any], settings: dict[str, Any] | None = None, seed: int = 0,
    progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Measure artifacts, or all that a run folder's result is compared with; `data` and `settings` as in a recipe."""
    import time
    from datetime import UTC, datetime

    from squeeze.benchmark import bench as measure
    from squeeze.benchmark.workload import BenchSettings
    from squeeze.data import DataSettings, load_data
    from squeeze.model import load_tokenizer
    from squeeze.pipeline import Step
    from squeeze.recipe import validated

    started, clock = datetime.now(UTC), time.monotonic()
    chosen = [a for path in artifacts for a in _benched(Path(path))]
    tasks = {a.manifest.task for a in chosen}
    if len(tasks) != 1:
        raise ArtifactError(
            f"the artifacts are for different tasks: {', '.join(sorted(tasks))}. Bench one task at a time."
        )
    task = tasks.pop()
    tokenizer = load_tokenizer(chosen[0].folder)
    data_settings = validated(DataSettings, data, "data")
    bench_settings = validated(BenchSettings, settings or {}, "bench")
    loaded = load_data(data_settings, task, tokenizer, seed)
    measured = measure(chosen, bench_settings, loaded, tokenizer, task, seed, progress)
    step = Step(artifacts=tuple(chosen), measurements=tuple(measured), notes=loaded.notes, data=loaded.digests)
    recipe = {
        "data": data_settings.model_dump(mode="json"),
        "bench": bench_settings.model_dump(mode="json"),
        "task": task,
        "seed": seed,
    }
    return make_report("bench", recipe, step, started, time.monotonic() - clock)


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


@contextmanager
def _parent(
    model: str | Path, out: str | Path | None, task: str | None, weights: str | None, revision: str | None
) -> Iterator[Artifact]:
    """The torch artifact to work on, its run folder held against other processes."""
    from squeeze.model import ModelSettings

    path = Path(model)
    if is_artifact(path) or _torch_artifacts(path):
        if out is not None:
            raise ArtifactError(f"{path} already lies in a run folder; the next step goes beside it. Drop --out.")
        last = path if is_artifact(path) else _torch_artifacts(path)[-1]
        with claim(last.resolve().parent, "resume", STEPS):
            yield read_artifact(last)
        return
    folder = Path(out) if out is not None else Path(f"{path.name.replace(':', '-').removesuffix('.gguf')}-squeezed")
    settings = ModelSettings(path=str(model), weights=weights, revision=revision)
    from squeeze.model import task_of

    task = task or task_of(settings)
    with claim(folder, "resume", STEPS):
        yield keep_source(settings, task, folder / "0-source")


def run_artifacts(folder: Path) -> list[Path]:
    """The artifacts of a run folder, stages first, then exports, each in order."""
    return [*_torch_artifacts(folder), *_exports(folder)]


def _exports(folder: Path) -> list[Path]:
    """The exports of a run folder's artifacts, in their order."""
    named = [folder / f"export-{p.name}" for p in _torch_artifacts(folder)]
    return [path for path in named if is_artifact(path)]


def _torch_artifacts(folder: Path) -> list[Path]:
    """The numbered artifacts of a run folder, in order."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.name.split("-")[0].isdigit() and is_artifact(p)]
    return sorted(found, key=lambda p: int(p.name.split("-")[0]))


def _onnx_artifact(path: Path) -> Artifact:
    """An export; of a run folder, the export of its last artifact. Raises ArtifactError naming what is there instead."""
    if path.is_dir() and not is_artifact(path):
        exports = _exports(path)
        if not exports:
            raise ArtifactError(f"{path} holds no export. Make one: squeeze export {path}.")
        return read_artifact(exports[-1])
    artifact = read_artifact(path)
    if artifact.manifest.format != "onnx":
        raise ArtifactError(f"{path} is a torch artifact, not an export. Make one: squeeze export {path}.")
    return artifact


def _benched(path: Path) -> list[Artifact]:
    if is_artifact(path):
        return [read_artifact(path)]
    numbered = _torch_artifacts(path)
    if not numbered:
        raise ArtifactError(
            f"{path} is neither an artifact nor a run folder. Make one: squeeze quantize MODEL --out {path}."
        )
    exports = _exports(path)
    return [read_artifact(p) for p in ([numbered[0], *exports] if exports else numbered)]


__all__ = ["bench", "export", "quantize", "run", "verify"]
