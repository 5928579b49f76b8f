"""How charts look in light and in dark: Vega configs, with the colours of `palette`."""

from typing import Any

from squeeze.dashboard.palette import CATEGORIES, RAMP, THEMES

BACKGROUNDS = {theme: colours["card"] for theme, colours in THEMES.items()}
SENSES = ("good", "bad", "soft", "soft", "lost")
"""better, worse, no difference shown, not judged, failed"""
SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Noto Sans CJK SC', 'DejaVu Sans', sans-serif"


def config(theme: str) -> dict[str, Any]:
    """Vega's config for "light" or "dark"."""
    colours = THEMES[theme]
    ink, soft, line = colours["ink"], colours["soft"], colours["line"]
    words = {
        "labelColor": soft,
        "titleColor": soft,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
    }
    ramp = list(RAMP[theme])
    return {
        "background": "transparent", "font": SANS, "padding": 4,
        "view": {"stroke": None}, "text": {"color": ink, "fontSize": 11}, "rule": {"color": soft}, "tick": {"color": ink},
        "point": {"color": colours["c1"]}, "bar": {"color": colours["c1"], "cornerRadiusEnd": 1.5},
        "line": {"color": colours["c1"], "strokeJoin": "round"},
        "rect": {"color": soft},
        "axis": words | {
            "domainColor": line, "tickColor": line, "gridColor": line, "labelLimit": 220, "labelPadding": 5, "titlePadding": 9,
            "titleLimit": 520, "tickSize": 4,
        },
        "axisY": {"domain": False, "ticks": False},
        "legend": words | {
            "labelColor": ink, "labelLimit": 320, "orient": "top", "columns": 2, "symbolStrokeWidth": 2, "titlePadding": 4, "rowPadding": 3,
            "columnPadding": 16, "symbolSize": 64, "symbolBaseFillColor": soft, "symbolBaseStrokeColor": soft,
            "layout": {"top": {"anchor": "start", "bounds": "full", "margin": 24}},
        },
        "title": {"color": ink, "subtitleColor": soft, "fontSize": 14, "subtitleFontSize": 12, "anchor": "start", "offset": 10},
        "header": {"labelColor": ink, "titleColor": ink},
        "range": {
            "category": [colours[name] for name in CATEGORIES], "sense": [colours[name] for name in SENSES], "heatmap": ramp, "ramp": ramp,
        },
    }  # fmt: skip


CONFIGS = {theme: config(theme) for theme in THEMES}
