"""Options that several commands share, and how they print a report."""

from pathlib import Path
from typing import Annotated, Any

import typer

from squeeze import console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Task = Annotated[
    str | None, typer.Option(help="causal-lm, text-classification or feature-extraction; none: what the model is for.")
]
Weights = Annotated[str | None, typer.Option(help="safetensors file or folder, for package.module:factory.")]
Revision = Annotated[str | None, typer.Option(help="Hub revision: branch, tag or commit.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Run folder to make; none: named after the model.")]
Seed = Annotated[int, typer.Option(help="Seed of splits, inputs and order.")]


def print_report(found: Any, json: bool) -> None:
    """As tables, or as one JSON document."""
    if json:
        console.print_json(found.model_dump(mode="json"))
    else:
        console.print_report(found)
