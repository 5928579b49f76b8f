"""The page of `squeeze dashboard`: one HTML file that makes no request, with Vega in it, drawn from a view.

Three inline scripts, each admitted by its digest: the page's own, Vega's bundle as `vl_convert` puts it together when
the page is built, and one line that says that Vega is there. The own script comes first, so that headline and tables
can be read and used while the browser still compiles a megabyte of charts. Vega evaluates its expressions with its
interpreter (`ast`), so the content security policy needs no `unsafe-eval`; and no string of a report is markup or an
expression anywhere: the page's script writes text nodes only, and rows reach Vega as data.

Rejected: drawing the charts here as SVG (no switching of axes, no tooltips, no marks that lead to their raw values),
a script framework, and compressing Vega (a compressed script has to be evaluated from text, which the policy forbids).
"""

import base64
import gzip
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from squeeze.dashboard.palette import DARK, LIGHT
from squeeze.report.text import json_text, visible

FONT = 'ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
VEGA = "window.vegaEmbed = vegaEmbed;"
READY = "window.squeeze.charts();"


def render(view: Mapping[str, Any], raw: Mapping[str, Sequence[Mapping[str, Any]]], live: bool = False) -> str:
    """The whole document; `raw` holds the measurements of each report by its id.

    A live page may ask the server that it came from (`connect-src 'self'`) for newer views; any other asks nobody.
    """
    templates = _templates()
    style = templates.get_template("page.css.j2").render(light=LIGHT, dark=DARK, font=Markup(FONT))
    script = templates.get_template("page.js.j2").render(
        live=live, palette=Markup(_inert({"light": LIGHT, "dark": DARK}))
    )
    scripts = [script, _vega(), READY]
    return templates.get_template("page.html.j2").render(
        title=view["title"], live=live, style=Markup(style), scripts=[Markup(text) for text in scripts],
        style_digest=_csp_digest(style), script_digests=" ".join(map(_csp_digest, scripts)),
        view=Markup(_inert(view)), raw=Markup(packed(raw)), light=LIGHT, dark=DARK,
    )  # fmt: skip


def packed(raw: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Raw values as base64 of gzip of JSON, the same bytes for the same values; the page unpacks it when it is asked."""
    return base64.b64encode(gzip.compress(json_text(dict(raw)).encode("ascii"), mtime=0)).decode("ascii")


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script that ends no script element."""
    import vl_convert  # not needed by whoever only reads this module's palette and configuration

    text: str = vl_convert.javascript_bundle(VEGA)
    if "</script" in text.lower() or "<!--" in text:
        raise ValueError(
            "Vega's bundle of this vl-convert-python would end its script element; install the version in .ci/constraints.txt."
        )
    return text


def _inert(content: Any) -> str:
    """JSON in which no HTML parser sees a tag, a comment or the end of a script, and no JavaScript parser a line's end."""
    text = json_text(content)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("squeeze.dashboard", "."), autoescape=True, undefined=StrictUndefined, finalize=_shown,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _shown(value: Any) -> Any:
    """What Jinja2 calls with every value before it is escaped and written."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _csp_digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
