"""Options that several commands share, and how they print a report."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from squeeze import console
from squeeze.errors import SqueezeError, nearest

MODEL = "Local Transformers folder, .gguf file, asset: name, squeeze artifact, run folder, hub id, or package.module:factory."
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Task = Annotated[
    str | None, typer.Option(help="causal-lm, text-classification or feature-extraction; none: what the model is for.")
]
Weights = Annotated[str | None, typer.Option(help="safetensors file or folder, for package.module:factory.")]
Revision = Annotated[str | None, typer.Option(help="Hub revision: branch, tag or commit.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Run folder to begin; none: that of an artifact, else named after the model."),
]
Seed = Annotated[int, typer.Option(help="Seed of splits, inputs and order.")]


def check_settings(given: Mapping[str, Any], known: Collection[str], place: str = "") -> None:
    """Raise SqueezeError for what `--set` gave a name that nothing reads."""
    if unknown := given.keys() - set(known):
        raise SqueezeError(f"--set {place}{min(unknown)} is unknown. {nearest(min(unknown), known)}")


def print_report(found: Any, json: bool) -> None:
    """As tables, or as one JSON document."""
    if json:
        console.print_json(found.model_dump(mode="json"))
    else:
        console.print_report(found)


def print_artifact(artifact: Any, json: bool) -> None:
    """What was made, as tables or as one JSON document."""
    from squeeze.report.explained import stage_warnings

    manifest = artifact.manifest
    if json:
        console.print_json(
            {"folder": str(artifact.folder), "digest": artifact.digest, "manifest": manifest.model_dump(mode="json")}
        )
        return
    rows = [
        ("folder", str(artifact.folder)),
        ("digest", artifact.digest),
        ("weights", console.size_of(manifest)),
    ]
    rows += [("note", note) for note in (manifest.record.notes if manifest.record else ())]
    console.table(manifest.name, ("", ""), [*rows, *(("warning", text) for text in stage_warnings(manifest))])
    console.print_training(manifest)
    if manifest.record is not None and manifest.record.layers:
        console.print_curve(manifest)
        console.print_layers(manifest.record, artifact.folder)
