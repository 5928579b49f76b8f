"""Measuring what is on disk: artifacts, run folders and other tools' models, apart from any recipe."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squeeze.artifact import Artifact, chain, is_artifact, read_artifact, siblings
from squeeze.errors import ArtifactError, SqueezeError
from squeeze.pipeline import INT8_CACHE, Progress, Step, keep_report, make_report
from squeeze.report.schema import Cost, Report
from squeeze.report.store import add
from squeeze.tasks import positions

if TYPE_CHECKING:
    from squeeze.benchmark import BenchSettings
    from squeeze.compress import Stage
    from squeeze.data import Data

SELF_CHECK: dict[str, Any] = {
    "repeats": 10, "most_repeats": 200, "precision": 0.015, "budget_seconds": 60.0, "seconds_per_cell": 0.4, "quality": False,
    "memory": False, "ceilings": False, "energy": False,
}  # fmt: skip
"""A check of the machine wants many short children: processes differ more from each other than calls do."""

BRIEF: dict[str, Any] = {
    "runtimes": ("torch",), "repeats": 3, "most_repeats": 6, "budget_seconds": 10.0, "seconds_per_cell": 0.3, "memory": False,
    "ceilings": False, "energy": False,
}  # fmt: skip
"""A short look at speed beside the quality of a stage: as few children as an interval takes."""


def bench(
    artifacts: Sequence[str | Path], *, data: dict[str, Any] | None = None, settings: dict[str, Any] | None = None, seed: int = 0,
    task: str | None = None, results: str | Path | None = None, progress: Progress | None = None,
    announce: Callable[[Sequence[Cost]], None] | None = None,
) -> Report:  # fmt: skip
    """Measure artifacts, models of other tools, or all that a run folder's result is compared with.

    `data` and `settings` are as in a recipe; without data only fixed shapes and generation can be measured, and no quality. The
    report is added to the folder `results` where one is named, and a bench that is interrupted there goes on when called again.
    `announce` is called with the static cost of each artifact before anything is measured.
    """
    from squeeze.benchmark.workload import BenchSettings
    from squeeze.recipe import validated

    given = validated(BenchSettings, settings or {}, "bench")
    chosen, task = subjects(artifacts, task)
    if announce is not None:
        from squeeze.benchmark.cost import cost

        announce([cost(artifact) for artifact in chosen])
    return _report("bench", chosen, given, data, seed, task, results, progress, told=_with_origins(chosen))


def self_check(
    artifact: str | Path, *, settings: dict[str, Any] | None = None, seed: int = 0, planted: float = 0.0,
    results: str | Path | None = None, progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Bench an artifact against itself: what this machine can tell apart, and whether it sees what is not there.

    `planted` makes one of the two sleep for that share of its time, to see whether it is found. Of a run folder the last export
    is taken. `squeeze.report.self_check` reads the verdict off the report.
    """
    from squeeze.benchmark.workload import BenchSettings
    from squeeze.recipe import validated

    chosen, task = subjects([artifact], None)
    alike = [
        Artifact(chosen[-1].folder, chosen[-1].manifest.model_copy(update={"name": f"{chosen[-1].name} {side}"}))
        for side in ("A", "B")
    ]
    work = (
        {"kind": "generate", "prompt": 32, "new_tokens": 16}
        if task == "causal-lm"
        else {"kind": "fixed", "batch": 1, "sequence": 128}
    )
    given = validated(BenchSettings, {"workloads": [work], **SELF_CHECK, **(settings or {})}, "bench")
    title = "self-check" if not planted else f"self-check, {100 * planted:g} % planted"
    return _report(title, alike, given, None, seed, task, results, progress, planted)


def _report(
    title: str, chosen: Sequence[Artifact], settings: "BenchSettings", data: dict[str, Any] | None, seed: int, task: str,
    results: str | Path | None, progress: Progress | None, planted: float = 0.0, told: Sequence[Artifact] | None = None,
) -> Report:  # fmt: skip
    from squeeze.benchmark import bench as measure
    from squeeze.benchmark.journal import discard
    from squeeze.data import DataSettings, load_data
    from squeeze.recipe import validated

    started, clock = datetime.now(UTC), time.monotonic()
    tokenizer = _tokenizer(chosen)
    data_settings = None if data is None else validated(DataSettings, data, "data")
    loaded = None if data_settings is None else load_data(data_settings, task, tokenizer, seed)
    place = None if results is None else Path(results)
    measured = measure(chosen, settings, loaded, tokenizer, task, seed, progress, journal=place, planted=planted)
    notes = (*(loaded.notes if loaded else ()), *measured.notes)
    step = Step(artifacts=tuple(told or chosen), measured=measured, notes=notes, data=loaded.digests if loaded else {})
    recipe = {
        "data": None if data_settings is None else data_settings.model_dump(mode="json"),
        "bench": settings.model_dump(mode="json"), "task": task, "seed": seed, "planted": planted,
    }  # fmt: skip
    report = make_report(title, recipe, step, started, time.monotonic() - clock)
    if place is not None:
        add(report, place)
    discard(measured.journal)
    return report


def compare_stage(
    stage: "Stage", before: Artifact, after: Artifact, data: "Data", *, seed: int, began: tuple[datetime, float], timed: bool = True,
    progress: Progress | None = None,
) -> Report:  # fmt: skip
    """What a stage cost and gained: `after` against `before`, scored on the same held-out texts and, where `timed`, briefly benched.

    The report begins with `before`, goes along the chain to `after`, and is kept in the run folder. `began`: when the work started,
    as a date and on the monotonic clock. Times are of the device that the stage was trained on.
    """
    from squeeze.benchmark import bench as measure
    from squeeze.benchmark.journal import discard
    from squeeze.benchmark.workload import BenchSettings

    folder, task = after.folder.parent, after.manifest.task
    curve = after.manifest.record.training if after.manifest.record is not None else None
    device = "cuda" if curve is not None and curve.device.startswith("cuda") else "cpu"
    limits = [positions(artifact.config) for artifact in (before, after)]
    length = min([128, data.settings.block_size, *(limit for limit in limits if limit is not None)])
    works = [{"kind": "fixed", "batch": 1, "sequence": length}] if timed else []
    settings = BenchSettings.model_validate({**BRIEF, "device": (device,), "workloads": works})
    told = told_apart([before, *_line(before, after)])
    measured = measure([told[0], told[-1]], settings, data, _tokenizer(told), task, seed, progress, journal=folder)
    notes = (*data.notes, *measured.notes)
    step = Step(artifacts=tuple(told), measured=measured, notes=notes, data=data.digests)
    recipe = {
        "model": {"path": after.manifest.source}, "data": data.settings.model_dump(mode="json"), "task": task,
        "stages": [stage.model_dump(mode="json")], "bench": settings.model_dump(mode="json"), "seed": seed,
    }  # fmt: skip
    title = f"{stage.kind} {Path(after.manifest.source).name}"
    report = make_report(title, recipe, step, began[0], time.monotonic() - began[1])
    keep_report(report, folder / "report.json")
    discard(measured.journal)
    return report


def _line(before: Artifact, after: Artifact) -> list[Artifact]:
    """The chain to `after`, without what lies before `before` where that is part of it."""
    lying = siblings(after.folder)
    line = [lying[manifest.digest] for manifest in chain(after.folder)]
    digests = [artifact.digest for artifact in line]
    return line[digests.index(before.digest) + 1 :] if before.digest in digests else line


def subjects(paths: Sequence[str | Path], task: str | None) -> tuple[list[Artifact], str]:
    """What paths stand for, and the task that all are for. Raises ArtifactError where they are for several, or none is known."""
    from squeeze.benchmark.subject import foreign, is_foreign
    from squeeze.benchmark.subject import task_of as foreign_task

    own = {path: _benched(Path(path)) for path in paths if is_artifact(Path(path)) or torch_artifacts(Path(path))}
    tasks = {artifact.manifest.task for found in own.values() for artifact in found}
    others = [Path(path) for path in paths if path not in own]
    for path in others:
        if not is_foreign(path):
            raise ArtifactError(
                f"{path} is neither an artifact, a run folder nor a model file. Make one: squeeze quantize MODEL --out {path}."
            )
    if task is None and not tasks:
        tasks = {found for path in others if (found := foreign_task(path))}
    tasks |= {task} if task else set()
    if len(tasks) != 1:
        told = (
            f"for different tasks: {', '.join(sorted(tasks))}" if tasks else "for a task that their files do not tell"
        )
        raise ArtifactError(f"the artifacts are {told}. Bench one task at a time; name it with --task.")
    agreed = tasks.pop()
    chosen = [a for path in paths for a in (own[path] if path in own else [foreign(Path(path), agreed)])]
    return told_apart(chosen), agreed


def told_apart(artifacts: Sequence[Artifact]) -> list[Artifact]:
    """The same artifacts; those that share a name but not their content are called after their run folders as well."""
    digests: dict[str, set[str]] = {}
    for artifact in artifacts:
        digests.setdefault(artifact.name, set()).add(artifact.digest)
    return [
        replace(a, label=f"{a.folder.resolve().parent.name}/{a.name}") if len(digests[a.name]) > 1 else a
        for a in artifacts
    ]


def _with_origins(chosen: Sequence[Artifact]) -> list[Artifact]:
    """Those and what exports among them were made from, as far as it lies beside them: a report tells the whole chain. The first stays
    first, since everything is compared with it."""
    told = list(chosen)
    for artifact in chosen:
        if artifact.manifest.format == "onnx" and is_artifact(artifact.folder):
            lying = siblings(artifact.folder)
            for manifest in chain(artifact.folder)[:-1]:
                places = {known.digest: place for place, known in enumerate(told)}
                if manifest.digest not in places:
                    told.insert(places.get(manifest.parent or "", 0) + 1, lying[manifest.digest])
    return told


def _tokenizer(chosen: Sequence[Artifact]) -> Any:
    """The tokenizer of the first artifact that has one."""
    from squeeze.model import load_tokenizer

    for artifact in chosen:
        try:
            found = load_tokenizer(artifact.folder)
        except (SqueezeError, OSError, ValueError):
            continue
        if found is not None:
            return found
    return None


def run_artifacts(folder: Path) -> list[Path]:
    """The artifacts of a run folder, stages first, then exports, each in order."""
    return [*torch_artifacts(folder), *exports(folder)]


def exports(folder: Path) -> list[Path]:
    """The exports of a run folder's artifacts, in their order."""
    named = [folder / f"export-{p.name}{cache}" for p in torch_artifacts(folder) for cache in ("", INT8_CACHE)]
    return [path for path in named if is_artifact(path)]


def torch_artifacts(folder: Path) -> list[Path]:
    """The numbered artifacts of a run folder, in order."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.name.split("-")[0].isdigit() and is_artifact(p)]
    return sorted(found, key=lambda p: int(p.name.split("-")[0]))


def _benched(path: Path) -> list[Artifact]:
    """One artifact, or what a run folder's result is compared with. Their content is checked cell by cell, not here."""
    if is_artifact(path):
        return [read_artifact(path, check=False)]
    numbered = torch_artifacts(path)
    found = exports(path)
    return [read_artifact(p, check=False) for p in ([numbered[0], *found] if found else numbered)]
