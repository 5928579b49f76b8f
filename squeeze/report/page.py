"""The page: one HTML file with everything in it, that opens from disk, by mail, or in a notebook's cell.

Drawn from the report alone, so that it can be drawn again later, and better. Names from models and data are text:
every value passes `visible`, then Jinja2 escapes it. A content security policy forbids every load and every script
but our own, by its digest, so that a hole in the escaping would still run nothing. Rejected: a script framework and
web fonts (a page that needs the network is not a record).
"""

import base64
import hashlib
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from squeeze.report import charts, curves
from squeeze.report.explained import curve_table, size_row, stage_label
from squeeze.report.floor import COST_COLUMNS, FLOOR_COLUMNS, cost_rows, floors
from squeeze.report.headline import headline
from squeeze.report.noise import warnings
from squeeze.report.profiles import profile_tables
from squeeze.report.schema import Manifest, Report, StageRecord
from squeeze.report.sensitivity_table import heat
from squeeze.report.summary import SummaryRow, cells, ends, shared_where, summarize
from squeeze.report.text import amount, figures, json_text, percent, visible
from squeeze.report.training import TrainingCurve, training_columns, training_rows, training_words
from squeeze.report.zeros import ZERO_COLUMNS, zero_words, zeros

CARDS = (
    "negative_log_likelihood", "correct", "cosine_to_source", "same_answer", "decode_rate", "set_time", "latency",
    "time_to_first_token", "peak_memory", "weight_bytes",
)  # fmt: skip
"""Quantities that get a card, the first measurement of each."""


def render_page(report: Report) -> str:
    """The whole document."""
    templates = _templates()
    style, script = (templates.get_template(name).render() for name in ("page.css.j2", "page.js.j2"))
    return templates.get_template("page.html.j2").render(
        title=report.title, body=Markup(_body(report)), style=Markup(style), script=Markup(script),
        style_digest=_csp_digest(style), script_digest=_csp_digest(script), raw=Markup(embedded_json(report)),
    )  # fmt: skip


def render_body(report: Report) -> str:
    """The content with its styles and without scripts, for a notebook's cell."""
    style = _templates().get_template("page.css.j2").render()
    return f"<style>{style}</style>\n{_body(report)}"


def embedded_json(report: Report) -> str:
    """The report as JSON in which no HTML parser can see a tag, a comment or the end of its script element."""
    text = json_text(report.model_dump(mode="json"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _body(report: Report) -> str:
    rows, pruned = summarize(report), zeros(report)
    axis, gains = charts.gains(rows)
    return _templates().get_template("body.html.j2").render(
        report=report, headline=headline(report, rows), ends=ends(report), where=shared_where(rows),
        rows=[(row, charts.strip(row), gain) for row, gain in zip(rows, gains, strict=True)], axis=axis,
        cards=_cards(rows), cells=cells(report), origins=_origins(report.manifests), charts=charts,
        stages=[(m.name, m.record, charts.layer_chart(m.record.layers)) for m in report.manifests if m.record],
        warnings=warnings(report), floors=floors(report), floor_columns=FLOOR_COLUMNS,
        costs=cost_rows(report.costs), cost_columns=COST_COLUMNS, profiles=[t for p in report.profiles for t in profile_tables(p)],
        trainings=[_training(m.name, m.record.training) for m in report.manifests if m.record and m.record.training], curves=curves,
        zero_rows=pruned, zero_words=zero_words(report, pruned), zero_columns=ZERO_COLUMNS,
        sensitivities=[(m.name, t, heat(t)) for m in report.manifests if m.record and (t := m.record.sensitivity) and t.rows],
        sizes={m.name: size_row(m) for m in report.manifests}, curve_table=curve_table,
        largest=max((m.weight_bytes for m in report.manifests), default=0) or 1,
    )  # fmt: skip


def _training(name: str, curve: TrainingCurve) -> dict[str, Any]:
    """One stage's training as its template reads it."""
    return {
        "name": name, "curve": curve, "loss": curves.loss_chart(curve), "metric": curves.metric_chart(curve),
        "words": training_words(curve), "columns": training_columns(curve), "rows": training_rows(curve),
    }  # fmt: skip


def _cards(rows: list[SummaryRow]) -> list[tuple[SummaryRow, tuple[float, float] | None]]:
    firsts: dict[str, SummaryRow] = {}
    for row in rows:
        firsts.setdefault(row.quantity, row)
    chosen = [firsts[name] for name in CARDS if name in firsts and firsts[name].sense != "failed"]
    return [(row, charts.bars(row)) for row in chosen]


def _origins(manifests: tuple[Manifest, ...]) -> list[tuple[Manifest, str, str]]:
    """(manifest, its digest, the name of what it was made from)."""
    names = {m.digest: m.name for m in manifests}
    return [(m, digest, names.get(m.parent or "", "")) for digest, m in zip(names, manifests, strict=False)]


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("squeeze.report", "."), autoescape=True, undefined=StrictUndefined, finalize=_shown,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "amount": amount, "figures": figures, "percent": percent, "lines": _lines, "settings": _settings,
        "stage": _stage, "json": _pretty, "place": "{:.1f}".format,
    }  # fmt: skip
    return environment


def _shown(value: Any) -> Any:
    """What Jinja2 calls with every value before it is escaped and written."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _lines(text: str) -> Markup:
    """Text whose line breaks are meant, such as an error with a line for each fault."""
    return escape(visible(text, lines=True))


def _settings(settings: dict[str, Any]) -> str:
    """A stage's settings that say something: "scheme int8, block_size 64"."""
    said = {name: value for name, value in settings.items() if name != "kind" and value not in (None, [], {}, "")}
    return ", ".join(f"{name} {value if isinstance(value, str) else json_text(value)}" for name, value in said.items())


def _stage(record: StageRecord) -> str:
    """Its kind, with those of its settings that say something."""
    return stage_label(record) if record.kind in ("distill", "prune") else f"{record.kind} {_settings(record.settings)}"


def _pretty(content: Any) -> Markup:
    return _lines(json_text(content, indent=2))


def _csp_digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
