"""A chart as a file, for papers: PNG, SVG or PDF, drawn without a browser from the specification and the rows that the page has."""

from pathlib import Path
from typing import Any

from squeeze.dashboard.specs import VEGA_LITE
from squeeze.dashboard.themes import BACKGROUNDS, CONFIGS
from squeeze.errors import ReportError, nearest

WIDTH = 640
"""Pixels of the plot, without its axes."""
SCALE = 2.0
"""Pixels of a PNG for each of the plot's."""
FORMATS = ("png", "svg", "pdf")


def draw(
    view: dict[str, Any], report_id: str | None, chart: str, variant: str | None, path: Path, *, theme: str = "light"
) -> None:
    """Write one chart; `report_id` may be a beginning, or None for the newest report that has the chart, `variant` None for the first.

    Raises ReportError for unknown names, for a chart without rows, and where the file cannot be written.
    """
    kind = path.suffix.lstrip(".").lower()
    if kind not in FORMATS:
        raise ReportError(f"{path} does not end in a format that is drawn. Name it {path.stem}.png, .svg or .pdf.")
    content = picture(view, report_id, chart, variant, kind, theme=theme)
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror or error}.") from error


def picture(
    view: dict[str, Any], report_id: str | None, chart: str, variant: str | None, kind: str, *, theme: str = "light"
) -> bytes:
    """The file's bytes; SVG is UTF-8."""
    import vl_convert

    spec = drawn(view, report_id, chart, variant, theme=theme)
    if kind == "png":
        return bytes(vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=SCALE))
    if kind == "pdf":
        return bytes(vl_convert.vegalite_to_pdf(spec, vl_version=VEGA_LITE))
    return str(vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)).encode("utf-8")


def drawn(
    view: dict[str, Any], report_id: str | None, chart: str, variant: str | None, *, theme: str = "light"
) -> dict[str, Any]:
    """The chart's specification with its rows, its width and its theme, complete in itself."""
    if chart not in view["charts"]:
        raise ReportError(f"There is no chart {chart!r}. {nearest(chart, view['charts'])}")
    found = view["charts"][chart]
    rows = _rows(view, report_id, chart)
    if not rows:
        raise ReportError(f"There is nothing to draw as {chart}: {found['empty']}")
    name = variant if variant is not None else next(iter(rows))
    if name not in rows:
        raise ReportError(f"There is no variant {name!r} of the chart {chart}. {nearest(name, rows)}")
    return {
        **found["variants"][name], "title": {"text": found["title"], "subtitle": found["labels"][name]}, "width": WIDTH,
        "autosize": "pad", "data": {"name": "rows", "values": rows[name]},
        "config": {**CONFIGS[theme], "background": BACKGROUNDS[theme]},
    }  # fmt: skip


def _rows(view: dict[str, Any], report_id: str | None, chart: str) -> dict[str, Any]:
    """Variant -> rows of the report that is meant."""
    if chart == "history":
        by_variant: dict[str, Any] = {}
        for row in view["history"]:
            by_variant.setdefault(row["variant"], []).append(row)
        return by_variant
    reports = view["reports"]
    if report_id is None:
        chosen = next((r for r in reversed(reports) if r["rows"].get(chart)), None)
        return {} if chosen is None else dict(chosen["rows"][chart])
    fitting = [r for r in reports if r["id"].startswith(report_id)]
    if len(fitting) != 1:
        known = ", ".join(f"{r['id']} ({r['title']})" for r in reports) or "none"
        said = "There is no report" if not fitting else f"{len(fitting)} reports begin with"
        raise ReportError(f"{said} {report_id}. Known: {known}.")
    return dict(fitting[0]["rows"].get(chart, {}))
