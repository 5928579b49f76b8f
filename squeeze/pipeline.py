"""The straight line: load, stages, export, verify, bench, report. `squeeze run` and every other command are parts of it.

State lives in artifacts only: each step reads the folder that the one before wrote, so that a run that was killed and
started again computes exactly what an uninterrupted one does. Rejected: handing the network from step to step in memory
(faster by seconds, and then a resumed run is a different program).
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from squeeze import __version__
from squeeze.artifact import Artifact, claim, is_artifact, read_artifact, reusable, siblings
from squeeze.distillation.settings import CACHE
from squeeze.errors import ArtifactError, SqueezeError, VerifyError
from squeeze.provenance import Digest, digest_json, environment
from squeeze.report.schema import (
    ArtifactChecks,
    Report,
    StageRecord,
    write_atomically,
    write_report,
)
from squeeze.report.status import RunStatus, StatusFile
from squeeze.stages import apply_stage, calibration_batches, keep_source, write

if TYPE_CHECKING:
    from squeeze.benchmark import Measured
    from squeeze.data import Data
    from squeeze.exporter import ExportSettings
    from squeeze.recipe import Recipe
    from squeeze.verification import VerifySettings

Progress = Callable[[str, int, int], None]
INT8_CACHE = "-int8-cache"
"""Ends the names of exports that keep keys and values as int8."""


def run(
    recipe: "Recipe", out: Path, *, mode: Literal["new", "resume", "fresh"] = "new", progress: Progress | None = None
) -> Report:
    """Run a recipe into the folder `out`; return its report, which also lies there as report.json and report.html.

    A run that was killed continues with the artifacts that are whole. Raises VerifyError (exit code 3) where an export
    does not match its source; the report then says so, and nothing is benchmarked.
    """
    from squeeze.benchmark.journal import discard
    from squeeze.recipe import recipe_digest

    started, clock = datetime.now(UTC), time.monotonic()
    with claim(out, mode, recipe_digest(recipe)) as claimed:
        done = Step(notes=recipe.notes)
        status = _status(recipe, out, started)
        failure: SqueezeError | None = None
        try:
            for step in _steps(recipe, out, _both(status.progress, progress)):
                done = done.with_more(step)
                status.finished(tuple(a.folder.name for a in done.artifacts), done.checks, done.data, done.notes)
        except SqueezeError as error:
            failure = error
            if isinstance(error, VerifyError):
                done = done.with_more(Step(checks=error.checks))
            if not done.artifacts:
                status.remove()
                raise
        report = make_report(
            recipe.name,
            recipe.model_dump(mode="json"),
            done,
            started,
            time.monotonic() - clock,
            str(failure) if failure else None,
        )
        keep_report(report, out / "report.json")
        status.remove()
        if done.measured is not None:
            discard(done.measured.journal)
        if failure is not None:
            raise failure
        shutil.rmtree(out / CACHE, ignore_errors=True)
        claimed.finish()
    return report


def _status(recipe: "Recipe", out: Path, started: datetime) -> StatusFile:
    """What the run tells of itself while it goes on."""
    told = RunStatus(
        title=recipe.name, recipe=recipe.model_dump(mode="json"), started=started.isoformat(timespec="seconds"),
        process=os.getpid(), environment=environment(), notes=recipe.notes,
    )  # fmt: skip
    return StatusFile(out, told)


def _both(first: Progress, second: Progress | None) -> Progress:
    """Tells both of the same progress."""

    def say(description: str, done: int, total: int) -> None:
        first(description, done, total)
        if second is not None:
            second(description, done, total)

    return say


@dataclass(frozen=True)
class Step:
    """What one part of the line adds to the report."""

    artifacts: tuple[Artifact, ...] = ()
    checks: tuple[ArtifactChecks, ...] = ()
    measured: "Measured | None" = None
    notes: tuple[str, ...] = ()
    data: dict[str, Digest] = field(default_factory=dict)

    def with_more(self, more: "Step") -> "Step":
        """This and what came after it."""
        return Step(
            self.artifacts + more.artifacts, self.checks + more.checks, more.measured or self.measured,
            self.notes + more.notes, self.data | more.data,
        )  # fmt: skip


def make_report(
    title: str, recipe: dict[str, Any], done: Step, started: datetime, seconds: float, error: str | None = None
) -> Report:
    """All that was done and measured, with this machine's environment."""
    found = done.measured
    bench: dict[str, Any] = (
        {}
        if found is None
        else {
            "children": found.children,
            "ceilings": found.ceilings,
            "costs": found.costs,
            "profiles": found.profiles,
        }
    )
    return Report(
        title=title, recipe=recipe, manifests=tuple(a.manifest for a in done.artifacts), checks=done.checks,
        measurements=() if found is None else found.measurements, data=done.data, environment=environment(),
        started=started.isoformat(timespec="seconds"), seconds=seconds, notes=tuple(dict.fromkeys(done.notes)),
        status="failed" if error else "ok", error=error, **bench,
    )  # fmt: skip


def keep_report(report: Report, file: Path) -> None:
    """Write the report and, beside it with the ending .html, its page; each appears whole or not at all."""
    from squeeze.report.page import render_page

    write_report(report, file)
    write_atomically(file.with_suffix(".html"), render_page(report))


def _steps(recipe: "Recipe", out: Path, say: Progress) -> Iterator[Step]:
    """The parts in order; whoever consumes them keeps what is done when a later part fails."""
    total = (
        2
        + len(recipe.stages)
        + (0 if recipe.export is None else 2 + int(recipe.export.source))
        + int(recipe.bench is not None)
    )
    say("source model", 0, total)
    source = keep_source(recipe.model, recipe.task, out / "0-source")
    notes = tuple(str(n) for n in source.manifest.extra.get("notes", ()))  # type: ignore[union-attr]
    yield Step((source,), notes=notes)
    say("data", 1, total)
    data = _data(recipe, source)
    yield Step(notes=data.notes, data=data.digests)
    chain = [source]
    for number, stage in enumerate(recipe.stages, start=1):
        name = f"{stage.kind} {stage.scheme}"
        say(name, 1 + number, total)

        def part(
            i: int, n: int, text: str = "", name: str = name, number: int = number, noun: str = stage.progress_noun
        ) -> None:
            say(f"{name}: {noun} {i} of {n}{text and ': '}{text}", 1 + number, total)

        chain.append(apply_stage(stage, chain[-1], out / f"{number}-{stage.kind}", data, part, source))
        yield Step((chain[-1],))
    exported: list[Artifact] = []
    if recipe.export is not None:
        for artifact, settings in to_export(source, chain[-1], recipe.export):
            say(f"export {artifact.name}", len(chain) + 1 + len(exported), total)
            export = export_artifact(artifact, out / export_name(artifact, settings), settings, data)
            exported.append(export)
            yield Step((export,))
            if recipe.verify is not None:
                say(f"verify {export.name}", len(chain) + 1 + len(exported), total)
                checks = verify_artifact(artifact, export, recipe.verify, recipe.seed)
                require(checks)
                yield Step(checks=(checks,))
    if recipe.bench is not None:
        from squeeze.benchmark import bench
        from squeeze.model import load_tokenizer

        say("bench", total - 1, total)
        measured = bench(
            [source, *exported] if exported else chain,
            recipe.bench,
            data,
            load_tokenizer(source.folder),
            recipe.task,
            recipe.seed,
            say,
            journal=out,
        )
        yield Step(measured=measured, notes=measured.notes)


def to_export(source: Artifact, last: Artifact, settings: "ExportSettings") -> "list[tuple[Artifact, ExportSettings]]":
    """What is exported and how: the result, and before it the source, whose cache stays in float as it was."""
    plain = settings.model_copy(update={"kv_cache": "float32", "kv_scales": None})
    first = [(source, plain)] if settings.source and (source, plain) != (last, settings) else []
    return [*first, (last, settings)]


def export_name(artifact: Artifact, settings: "ExportSettings") -> str:
    """The folder of an export: one with an int8 cache lies beside that with a float one."""
    return f"export-{artifact.name}" + (INT8_CACHE if settings.kv_cache == "int8" else "")


def export_artifact(
    parent: Artifact, folder: Path, settings: "ExportSettings", data: "Data | None" = None, *, replace: bool = True
) -> Artifact:
    """A torch artifact as an ONNX artifact; reused where parent, settings and the texts they read are the same.

    Without `replace`, raises ArtifactError where another export of it lies there.
    """
    from squeeze.compress.sizes import export_bytes
    from squeeze.exporter import export_onnx, is_by_builder
    from squeeze.model import load_model
    from squeeze.silence import without_silent

    split = data.splits.get("calibration") if data is not None and settings.needs_data else None
    used = {} if split is None else {"calibration": split.digest}
    inputs = digest_json(
        {
            "squeeze": __version__,
            "parent": parent.digest,
            "export": settings.model_dump(mode="json", exclude={"source"}),
            "data": dict(used),
        }
    )
    found = reusable(folder, inputs)
    if found is not None:
        return found
    if not replace and is_artifact(folder):
        raise ArtifactError(
            f"{folder} is an export that the recipe of its run made otherwise. Give --out NEW: a run of its own, beginning with "
            f"{parent.name}."
        )
    model = load_model(parent.folder)
    clock = time.monotonic()
    there = without_silent(model)[0]
    predicted = export_bytes(there, by_builder=is_by_builder(model, settings))

    def fill(place: Path) -> StageRecord:
        texts = () if split is None or data is None else calibration_batches(data, split, model)
        notes = export_onnx(model, place, settings, texts)
        seconds = time.monotonic() - clock
        return StageRecord(
            kind="export",
            settings=settings.model_dump(mode="json"),
            seconds=seconds,
            layers=(),
            notes=notes,
            predicted_bytes=predicted,
        )

    return write(folder, fill, there, inputs=inputs, parent=parent.digest, extra={}, form="onnx", data=used)


def verify_artifact(parent: Artifact, export: Artifact, settings: "VerifySettings", seed: int) -> ArtifactChecks:
    """Every check of one export against the artifact it was made from."""
    from squeeze.model import load_model
    from squeeze.verification import verify

    checks = verify(load_model(parent.folder), export.folder, settings, seed)
    return ArtifactChecks(artifact=export.name, checks=tuple(checks))


def require(checks: ArtifactChecks) -> None:
    """Raise VerifyError naming the failed checks, if any failed."""
    failed = [c for c in checks.checks if not c.passed]
    if failed:
        listed = "; ".join(f"{c.name}: {c.value:.4g} is over {c.limit:.4g} ({c.detail})" for c in failed)
        raise VerifyError(
            f"{checks.artifact} failed {len(failed)} of {len(checks.checks)} checks: {listed}.", (checks,)
        )


def parent_of(export: Artifact) -> Artifact:
    """The torch artifact beside an export that the export was made from. Raises ArtifactError where it is not there."""
    found = siblings(export.folder.resolve()).get(export.manifest.parent or "")
    if found is None:
        raise ArtifactError(
            f"{export.folder} was made from {export.manifest.parent}, which is not beside it. Name it with --against."
        )
    return read_artifact(found.folder)


def _data(recipe: "Recipe", source: Artifact) -> "Data":
    from squeeze.data import check_fits, load_data
    from squeeze.model import load_tokenizer

    data = load_data(recipe.data, recipe.task, load_tokenizer(source.folder), recipe.seed)
    check_fits(data, source.config)
    return data
