"""`squeeze report`: a report that was measured before, shown again, or written as other tools and other people want it."""

from pathlib import Path
from typing import Annotated

import typer

from squeeze import console
from squeeze.cli.options import Json, print_report
from squeeze.errors import ReportError, SqueezeError
from squeeze.report.schema import Report, read_report, write_atomically

STDOUT = "-"


def report(
    path: Annotated[Path, typer.Argument(help="report.json, or the run folder that holds it.")],
    html: Annotated[Path | None, typer.Option(help="Write the page here.")] = None,
    markdown: Annotated[
        str | None, typer.Option(help="Write Markdown for a pull request here; -: to stdout, without tables.")
    ] = None,
    model_card: Annotated[
        str | None, typer.Option(help="Write a Hugging Face model card here (README.md); -: to stdout, without tables.")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="With --model-card: hub id of the trained model, where the report does not prove it."),
    ] = None,
    log_to: Annotated[
        list[str] | None, typer.Option(help="Log the run offline: mlflow:FOLDER, tensorboard:FOLDER or wandb:FOLDER.")
    ] = None,
    json: Json = False,
) -> None:
    """Print a report that was measured before; write it as a page, as Markdown, as a model card, or into another tool's files."""
    if base_model is not None and model_card is None:
        raise SqueezeError("--base-model is told in a model card. Add --model-card README.md, or drop it.")
    if [json, markdown == STDOUT, model_card == STDOUT].count(True) > 1:
        raise SqueezeError("one document fits on stdout. Name a file for --markdown or --model-card, or drop --json.")
    file = path / "report.json" if path.is_dir() else path
    found = read_report(file)
    if html is not None:
        _write_page(found, html)
    if markdown is not None:
        _write_markdown(found, markdown)
    if model_card is not None:
        _write_model_card(found, model_card, base_model)
    for target in log_to or ():
        _log(found, file, target)
    if STDOUT not in (markdown, model_card):
        print_report(found, json)


def _write_page(report: Report, file: Path) -> None:
    """The report's own page."""
    from squeeze.report.page import render_page

    _write(file, render_page(report))


def _write_markdown(report: Report, place: str) -> None:
    """Markdown, to a file or to stdout."""
    from squeeze.report.markdown import to_markdown

    text = to_markdown(report)
    if place == STDOUT:
        console.print_document(text)
    else:
        _write(Path(place), text)


def _write_model_card(report: Report, place: str, base_model: str | None) -> None:
    """A model card, to a file or to stdout."""
    from squeeze.report.model_card import model_card, write_card

    text = model_card(report, base_model)
    if place == STDOUT:
        console.print_document(text)
    else:
        write_card(text, Path(place))


def _log(report: Report, file: Path, target: str) -> None:
    """One run in another tool's files; says where it lies and how to look at it."""
    from squeeze.dashboard.tracking import log_to

    console.message(log_to(report, file, target))


def _write(file: Path, text: str) -> None:
    try:
        write_atomically(file, text)
    except OSError as error:
        raise ReportError(f"{file} cannot be written: {error.strerror or error}. Name another file.") from error
