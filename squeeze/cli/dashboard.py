"""`squeeze dashboard`: many reports as one page, one chart as a file, or the page kept up to date on a local port."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from squeeze import console
from squeeze.cli.options import Json
from squeeze.errors import ReportError, SqueezeError

if TYPE_CHECKING:
    from squeeze.dashboard.view import Skipped, Source

MORE = (
    "A folder is read with the folders in it: squeeze dashboard benchmarks/results. Charts for papers: squeeze dashboard results "
    "--chart pareto --out pareto.svg. Files that are no whole report are named and skipped."
)
PAGE = Path("dashboard.html")


def dashboard(
    paths: Annotated[
        list[str],
        typer.Argument(help="report.json files, run folders, results folders, folders of them, or ids in --results."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write; none: dashboard.html, or CHART.svg with --chart."),
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page; none: the run's, or how many there are.")] = "",
    chart: Annotated[
        str | None, typer.Option(help="Write this one chart as .png, .svg or .pdf, such as pareto, gains or layers.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Which of the chart's variants, as its switch names it; none: the first.")
    ] = None,
    report: Annotated[
        str | None, typer.Option(help="Id of the chart's report, or its beginning; none: the newest that has it.")
    ] = None,
    theme: Annotated[str, typer.Option(help="Of an exported chart: light or dark.")] = "light",
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Show the page on a local port and keep it up to date, also while runs go on."),
    ] = False,
    host: Annotated[str, typer.Option(help="With --serve: the address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="With --serve.")] = 8765,
    results: Annotated[Path, typer.Option(help="Results folder in which ids are looked up.")] = Path("results"),
    json: Json = False,
) -> None:
    """Draw measured reports as one self-contained HTML page: charts, verdicts, tables, any two artifacts compared."""
    if chart is None and (variant is not None or report is not None):
        raise SqueezeError("--variant and --report choose what --chart draws. Name a chart, such as --chart pareto.")
    if serve:
        if chart is not None or out is not None or json:
            raise SqueezeError("--serve shows the page and writes nothing. Drop --out, --chart and --json, or --serve.")
        from squeeze.dashboard.serve import serve as served

        served(paths, host=host, port=port, title=title or None, results=results, ready=_ready)
        return
    from squeeze.dashboard.view import build, build_charts, collect

    sources, skipped = collect(paths, results)
    if chart is not None:
        file = out or Path(f"{chart}.svg")
        _draw(build_charts(sources), report, chart, variant, file, theme)
    else:
        file = out or PAGE
        _write_page(build(sources, skipped, title), sources, file)
    _tell(file, sources, skipped, json=json)


def _ready(address: str) -> None:
    console.message(f"{address} (Ctrl-C ends it)")


def _draw(view: dict[str, Any], report: str | None, chart: str, variant: str | None, file: Path, theme: str) -> None:
    from squeeze.dashboard.images import draw
    from squeeze.dashboard.themes import CONFIGS
    from squeeze.errors import nearest

    if theme not in CONFIGS:
        raise SqueezeError(f"--theme {theme} is unknown. {nearest(theme, CONFIGS)}")
    draw(view, report, chart, variant, file, theme=theme)


def _write_page(view: dict[str, Any], sources: "list[Source]", file: Path) -> None:
    from squeeze.dashboard.page import render
    from squeeze.dashboard.view import raw_values
    from squeeze.report.files import write_atomically

    try:
        write_atomically(file, render(view, raw_values(sources)))
    except OSError as error:
        raise ReportError(f"{file} cannot be written: {error.strerror or error}. Name another file: --out.") from error


def _tell(file: Path, sources: "list[Source]", skipped: "list[Skipped]", *, json: bool) -> None:
    from squeeze.report.text import amount, count

    size = file.stat().st_size
    if json:
        console.print_json({
            "file": str(file), "bytes": size, "reports": [{"id": s.id, "file": s.file, "title": s.report.title} for s in sources],
            "skipped": [{"file": one.file, "reason": one.reason} for one in skipped],
        })  # fmt: skip
    for one in skipped:
        console.message(f"skipped {one.file}: {one.reason}")
    if not sources:
        console.message("No report was found: the page says so. Measure something with squeeze bench or squeeze run.")
    without = f", {len(skipped):,} skipped" if skipped else ""
    console.message(f"{file}: {amount(size, 'bytes')}, {count(len(sources), 'report')} read{without}")
