"""How each kind of chart is drawn: layers of Vega-Lite, each with a name, over rows that they leave as they are.

No transform but filters on the row itself, no aggregate, no sample: every mark is a row. Better is towards the top left in charts with
two axes: where less is better the vertical axis runs downwards, where more is better the horizontal one runs leftwards, and titles say
so. Colours are in `themes` alone.
"""

from typing import Any

from squeeze.dashboard.rows import Axis, Variant
from squeeze.report.text import SCALES, THIN

Spec = dict[str, Any]
Layers = list[Spec]
Columns = tuple[tuple[str, str], ...]

SENSES = ("better", "worse", "no difference shown", "not judged", "failed")
SHAPES = ("triangle-up", "triangle-down", "circle", "diamond", "cross")
NAME_LIMIT = 200
"""Pixels of a name beside a mark; the whole name is in the tooltip and the table."""
LARGEST = 900
"""Area of the largest artifact's mark, in square pixels; no artifact is none."""
DASH = [4, 3]


def pareto(variant: Variant, columns: Columns) -> Layers:
    """Points in two directions, what joins them, how sure they are, and their names."""
    x = _axis("x", variant.x, reverse=variant.x.better == "higher", log=variant.x.better == "lower")
    y = _axis("y", variant.y, reverse=variant.y.better == "lower", log=variant.y.better == "lower")
    faint = {"opacity": {"condition": {"test": "datum.dominated", "value": 0.4}, "value": 0.95}}
    colour = {"color": _nominal("runtime", "runtime")}
    made = _nominal("made", "made by", domain=("squeeze", "another tool"), range=["circle", "square"])
    legend = {"direction": "horizontal", "columns": 4, "tickCount": 3, **_labels("bytes")}
    scale = {"range": [0, LARGEST], "domainMin": 0}
    size = {"field": "bytes", "type": "quantitative", "title": "size on disk", "scale": scale, "legend": legend}
    name = {
        "type": "text", "limit": NAME_LIMIT, "dx": {"expr": "datum.dx"}, "dy": {"expr": "datum.dy"}, "align": {"expr": "datum.align"},
    }  # fmt: skip
    ends = {"x2": {"field": "x2"}, "y2": {"field": "y2"}, "tooltip": _tips((("x_text", "made from"),))}
    point = "datum.mark === 'point'"
    return [
        _layer("links", _rule(1.5, opacity=0.6), {"x": x, "y": y, **ends, **colour}, "datum.mark === 'link'"),
        _layer("x_intervals", _rule(1), {**_from_to("x", x, "x_low", "x_high"), "y": y, **faint}, point, _known("x_low")),
        _layer("y_intervals", _rule(1), {**_from_to("y", y, "y_low", "y_high"), "x": x, **faint}, point, _known("y_low")),
        _layer("points", _point(), {"x": x, "y": y, **colour, "shape": made, "size": size, **faint, "tooltip": _tips(columns)}, point),
        _layer("names", name, {"x": x, "y": y, "text": {"field": "artifact"}, **faint, "tooltip": _tips(columns)}, point),
    ]  # fmt: skip


def gains(variant: Variant, columns: Columns) -> Layers:
    """A line of words for each quantity, and under it a bar from no change to the ratio, with its interval, on one scale for all."""
    x = {**_axis("ratio", variant.x), "scale": {"type": "log", "nice": False, "padding": 14}}
    y = _nominal("label")
    sense = _nominal("sense", domain=SENSES, range="sense") | {"legend": {"symbolOpacity": 1}}  # not the bars'
    shape = _nominal("sense", domain=SENSES, range=list(SHAPES))
    words = {"type": "text", "align": "left", "yOffset": -8, "limit": 1200}
    both = (_known("low"), _known("high"))
    points = {"y": y, "x": x, "color": sense, "shape": shape, "tooltip": _tips(columns)}
    one = {"datum": 1, "type": "quantitative"}
    bar, tick = ({"type": kind, "yOffset": 9, "height": 13} for kind in ("bar", "tick"))
    return [
        _layer("bars", bar | {"opacity": 0.3}, {"y": y, "x": x, "x2": {"datum": 1}, "color": sense}, _known("ratio")),
        _layer("ones", tick | {"orient": "vertical", "thickness": 1.5}, {"y": y, "x": one}, _known("ratio")),
        _layer("intervals", _rule(2, yOffset=9), {"y": y, **_from_to("x", x, "low", "high"), "color": sense}, *both),
        _layer("points", _point(90, yOffset=9), points, _known("ratio")),
        _layer("words", words, {"y": y, "x": {"value": 4}, "text": {"field": "line"}, "color": sense, "tooltip": _tips(columns)}),
    ]  # fmt: skip


def latency(variant: Variant, columns: Columns) -> Layers:
    """Steps up to one, a line for each series, and its percentiles."""
    x, y = _axis("x", variant.x, log=True), {**_axis("y", variant.y), "scale": {"domain": [0, 1]}}
    marks = ("p50", "p95", "p99")
    shape = {"shape": _nominal("mark", domain=marks, range=["circle", "square", "diamond"])}
    steps = {"type": "line", "interpolate": "step-after", "strokeWidth": 1.8}
    line = {"x": x, "y": y, **_series(), "tooltip": _tips((("series", "artifact"),))}
    percentiles = {"x": x, "y": y, "color": _series()["color"], **shape, "tooltip": _tips(columns)}
    return [
        _layer("lines", steps, line, "datum.mark === 'value'"),
        _layer("percentiles", _point(60), percentiles, "datum.mark !== 'value'"),
    ]


def generation(variant: Variant, columns: Columns) -> Layers:
    """Time by prompt length."""
    x = {**_axis("x", variant.x), "scale": {"padding": 24, "zero": False}}
    y = {**_axis("y", variant.y), "scale": {"zero": True}}
    colour = {"color": _series()["color"]}
    intervals = _layer(
        "intervals", _rule(1.5), {**_from_to("y", y, "low", "high"), "x": x, **colour}, _known("low"), _known("high")
    )
    return [_lines(x, y), intervals, _points(x, y, columns)]


def load(variant: Variant, columns: Columns) -> Layers:
    """What is answered against how long the slowest wait."""
    x, y = _from_zero(_axis("x", variant.x, reverse=True)), _axis("y", variant.y, reverse=True, log=True)
    colour = {"color": _series()["color"]}
    limit = {"x": x, "y": {**y, "field": "limit"}, "tooltip": _tips((("limit_text", "limit"), ("workload", "load")))}
    tick = {"type": "tick", "orient": "horizontal", "size": 26, "thickness": 2}
    line = _lines(x, y, "datum.joined")
    line["encoding"]["order"] = {"field": "callers", "type": "quantitative"}
    return [
        line,
        _layer("x_intervals", _rule(1.5), {**_from_to("x", x, "x_low", "x_high"), "y": y, **colour}, _known("x_low")),
        _layer("y_intervals", _rule(1.5), {**_from_to("y", y, "y_low", "y_high"), "x": x, **colour}, _known("y_low")),
        _points(x, y, columns),
        _layer("limits", tick, limit, _known("limit")),
    ]


def layers(variant: Variant, columns: Columns) -> Layers:
    """The network from its first layer to its last, and downwards what each layer is made of."""
    axis = {"labelAngle": 0, "labelOverlap": True}
    x = {"field": "layer", "type": "ordinal", "sort": None, "title": "layer of the network", "axis": axis}
    place = {"x": x, "y": _nominal("part"), "tooltip": _tips(columns)}
    scale: Spec = {"range": "heatmap"} | ({} if variant.y.unit == "" else {"type": "symlog", "constant": 1e-4})
    legend = {"gradientLength": 240, "titleLimit": 480, "direction": "horizontal", **_labels(variant.x.unit)}
    colour = {"field": "value", "type": "quantitative", "title": _titled(variant.x), "scale": scale, "legend": legend}
    return [
        _layer("cells", {"type": "rect"}, {**place, "color": colour}, _known("value")),
        _layer("missing", {"type": "text", "text": "–"}, place, f"!{_known('value')}"),
    ]


def time(variant: Variant, columns: Columns) -> Layers:
    """Bars side by side for each name."""
    x, y = {**_axis("x", variant.x), "scale": {"zero": True}}, {**_nominal("name"), "title": variant.y.title}
    beside = {"yOffset": {"field": "series", "sort": None}, "color": _nominal("series")}
    return [_layer("bars", {"type": "bar"}, {"x": x, "y": y, **beside, "tooltip": _tips(columns)})]


def training(variant: Variant, columns: Columns) -> Layers:
    """Curves over tokens, and the step that was kept."""
    x, y = _from_zero(_axis("x", variant.x)), _axis("y", variant.y)
    y["scale"]["nice"] = False  # or what is padded below nothing gets a number
    both = {"x": x, "y": y, "color": _series()["color"], "tooltip": _tips(columns)}
    kept = "datum.mark === 'kept'"
    words = {"type": "text", "dy": -14}
    return [
        _layer("lines", {"type": "line", "strokeWidth": 1.8}, {"x": x, "y": y, **_series()}),
        _layer("points", _point(16), both, "datum.mark === 'value'"),
        _layer("kept", _point(130, shape="diamond"), both, kept),
        _layer("words", words, {"x": x, "y": y, "text": {"field": "text"}, "tooltip": _tips(columns)}, kept),
    ]


def floor(variant: Variant, columns: Columns) -> Layers:
    """How far each bar reaches towards the ceiling."""
    x, y = {**_axis("x", variant.x), "scale": {"zero": True}}, _nominal("series")
    words = {"type": "text", "align": "left", "dx": 5}
    return [
        _layer("bars", {"type": "bar", "height": 12}, {"x": x, "y": y, "color": _nominal("bound", "bound by"), "tooltip": _tips(columns)}),
        _layer("words", words, {"x": x, "y": y, "text": {"field": "text"}, "tooltip": _tips(columns)}),
        _rule_at("ceiling", "x", 1),
    ]  # fmt: skip


def memory(variant: Variant, columns: Columns) -> Layers:
    """Pieces end to end."""
    x, y = {**_axis("x", variant.x), "scale": {"zero": True}}, _nominal("series")
    piece = {"x2": {"field": "x2"}, "color": _nominal("piece"), "tooltip": _tips(columns)}
    tick = {"type": "tick", "thickness": 1.5, "size": 20}
    return [
        _layer("bars", {"type": "bar", "height": 14}, {"x": x, "y": y, **piece}),
        _layer("ends", tick, {"x": {**x, "field": "x2"}, "y": y, "tooltip": _tips(columns)}),
    ]


def history(variant: Variant, columns: Columns) -> Layers:
    """Runs in time, the level of each stretch, and where a new one begins."""
    scale = {"type": "utc", "padding": 18}
    clock = "utcFormat(datum.value, utchours(datum.value) || utcminutes(datum.value) ? '%H:%M' : '%-d %b')"
    axis = {"labelOverlap": True, "labelExpr": clock}
    x = {"field": "x", "type": "temporal", "title": f"{variant.x.title} (UTC)", "scale": scale, "axis": axis}
    y, colour = _axis("y", variant.y), {"color": _series()["color"]}
    levels = {"type": "line", "interpolate": "step-after", "strokeWidth": 2.5, "opacity": 0.5}
    words = {
        "type": "text",
        "align": {"expr": "datum.align"},
        "dx": {"expr": "datum.dx"},
        "dy": -14,
        "limit": NAME_LIMIT,
    }
    both = {"x": x, "y": y, **colour, "tooltip": _tips(columns)}
    named = {"x": x, "y": y, "text": {"field": "change_text"}, "tooltip": _tips(columns)}
    return [
        _layer("levels", levels, {"x": x, "y": {**y, "field": "level"}, **_series()}),
        _layer("intervals", _rule(1), {"x": x, **_from_to("y", y, "low", "high"), **colour}, _known("low")),
        _layer("points", _point(55), both),
        _layer("changes", {"type": "point", "shape": "diamond", "size": 240, "strokeWidth": 2}, both, "datum.change"),
        _layer("words", words, named, "datum.change"),
    ]


# Marks


def _layer(name: str, mark: Spec, encoding: Spec, *filters: str) -> Spec:
    chosen = {"transform": [{"filter": test} for test in filters]} if filters else {}
    return {"name": name, **chosen, "mark": mark, "encoding": encoding}


def _rule_at(name: str, way: str, value: float) -> Spec:
    """One rule through the whole chart, with a datum of its own so that it is drawn once."""
    encoding = {way: {"datum": value, "type": "quantitative"}}
    return {"name": name, "data": {"values": [{}]}, "mark": _rule(1, strokeDash=DASH), "encoding": encoding}


def _rule(width: float, **more: Any) -> Spec:
    return {"type": "rule", "strokeWidth": width, **more}


def _point(size: int | None = None, **more: Any) -> Spec:
    return {"type": "point", "filled": True, "opacity": 1, **({} if size is None else {"size": size}), **more}


def _lines(x: Spec, y: Spec, *filters: str) -> Spec:
    return _layer(
        "lines", {"type": "line", "strokeWidth": 1.5, "opacity": 0.7}, {"x": x, "y": y, **_series()}, *filters
    )


def _points(x: Spec, y: Spec, columns: Columns) -> Spec:
    encoding = {"x": x, "y": y, "color": _series()["color"], "shape": _nominal("runtime", "runtime")}
    return _layer("points", _point(70), {**encoding, "tooltip": _tips(columns)})


# Channels


def _axis(field: str, axis: Axis, *, reverse: bool = False, log: bool = False) -> Spec:
    scale: Spec = {"padding": 18, **({"reverse": True} if reverse else {})}
    scale |= {"type": "log", "nice": False} if log else {"zero": False}
    shown = {**_labels(axis.unit), "labelOverlap": True}
    return {"field": field, "type": "quantitative", "title": _titled(axis), "scale": scale, "axis": shown}


def _from_zero(axis: Spec) -> Spec:
    """The same of what cannot be negative: its padding ends at nothing."""
    return {**axis, "scale": {**axis["scale"], "domainMin": 0, "nice": False}}


def _nominal(
    field: str, title: str | None = None, *, domain: tuple[str, ...] = (), range: str | list[str] = ""
) -> Spec:
    scale = {"scale": {"domain": list(domain), "range": range}} if domain else {}
    return {"field": field, "type": "nominal", "sort": None, "title": title, **scale}


def _series() -> Spec:
    return {"color": _nominal("series"), "strokeDash": {**_nominal("series"), "legend": None}}


def _from_to(way: str, axis: Spec, low: str, high: str) -> Spec:
    return {way: {**axis, "field": low}, f"{way}2": {"field": high}}


def _tips(columns: Columns) -> list[Spec]:
    return [{"field": field, "type": "nominal", "title": heading} for field, heading in columns]


def _known(field: str) -> str:
    return f"isValid(datum.{field})"


def _titled(axis: Axis) -> str:
    better = {"lower": "less is better", "higher": "more is better", "": ""}[axis.better]
    told = [text for text in ("" if axis.unit in (*SCALES, "share", "×") else axis.unit, better) if text]
    return f"{axis.title} ({', '.join(told)})" if told else axis.title


def _labels(unit: str) -> Spec:
    """How an axis shows its numbers: with the unit that fits each, as texts do."""
    if unit == "share":
        return {"labelExpr": f"format(100 * datum.value, '.4~r') + '{THIN}%'"}
    if unit == "×":
        return {"labelExpr": "format(datum.value, '.3~r') + '×'"}
    if unit not in SCALES:
        return {"labelExpr": "format(datum.value, abs(datum.value) < 1e4 ? '.4~r' : '.4~s')"}
    *steps, (least, smallest) = SCALES[unit]
    shown = f"format(datum.value / {least!r}, '.4~r') + '{THIN}{smallest}'"
    for size, name in reversed(steps):
        none = " || datum.value == 0" if size == 1 else ""
        shown = f"datum.value >= {size!r}{none} ? format(datum.value / {size!r}, '.4~r') + '{THIN}{name}' : {shown}"
    return {"labelExpr": shown}
