"""Rows of the heat maps: what each stage did to each weight matrix, by its place in the network."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from squeeze.dashboard.readings import Readings, Row, finite, unique
from squeeze.dashboard.rows import Axis, Variant, Variants
from squeeze.report.schema import LayerRow, StageRecord
from squeeze.report.sensitivity_table import Scanned, SensitivityTable
from squeeze.report.text import figures, percent

OUTSIDE = "outside"
"""Of what lies in no layer: embeddings, heads."""


@dataclass(frozen=True)
class _Measure:
    name: str
    of: Callable[[LayerRow], float | None]
    text: Callable[[float], str]
    axis: Axis
    y: Axis
    tells: Callable[[Sequence[float]], bool] = bool
    """Whether these values are worth a chart."""


LINEAR, LOGARITHMIC = Axis(""), Axis("", "log")
"""Whether values lie orders of magnitude apart; the other axis of a heat map has nothing else to say."""


def _decibels(value: float) -> str:
    return f"{value:.1f} dB"


MEASURES = (
    _Measure(
        "sensitivity", lambda r: r.sensitivity, figures, Axis("distance from the float answers, this layer alone", "", "lower"),
        LOGARITHMIC,
    ),
    _Measure("output SQNR", lambda r: r.output_sqnr_db, _decibels, Axis("signal to noise of outputs", "dB", "higher"), LINEAR),
    _Measure("weight SQNR", lambda r: r.sqnr_db, _decibels, Axis("signal to noise of weights", "dB", "higher"), LINEAR),
    _Measure(
        "sparsity", lambda r: r.sparsity, lambda v: percent(v, 1), Axis("share of zeros", "share"), LINEAR, lambda v: max(v, default=0) > 0,
    ),
    _Measure(
        "bits", lambda r: r.bits, lambda v: f"{v:.2f} bits", Axis("stored bits for each weight", "bits", "lower"), LINEAR,
        lambda v: min(v, default=32) < 32,
    ),
)  # fmt: skip


def layers(readings: Readings) -> Variants:
    """A variant for each stage and measure, the result's own stages last; and one for each scan that an allocation was made from."""
    found: Variants = {}
    for manifest in readings.report.manifests:
        key, record = readings.keys[manifest.digest], manifest.record
        if record is None:
            continue
        for measure in MEASURES:
            if measure.tells([v for row in record.layers if (v := measure.of(row)) is not None]):
                name = f"{key}: {measure.name}"
                found[name] = Variant(name, measure.axis, measure.y, list(_rows(record, measure)))
        if record.sensitivity is not None and record.sensitivity.rows:
            name = f"{key}: scan"
            axis = Axis("lost where this is pruned alone", "", "lower")
            found[name] = Variant(name, axis, LOGARITHMIC, list(_scan(record.sensitivity)))
    return found


def _rows(record: StageRecord, measure: _Measure) -> Iterator[Row]:
    places = _places([row.name for row in record.layers])
    for row, (layer, part) in zip(record.layers, places, strict=True):
        value = measure.of(row)
        yield {
            "layer": layer, "part": part, "value": finite(value), "text": "not measured" if value is None else measure.text(value),
            "name": row.name, "shape": "×".join(map(str, row.shape)), "note": row.note,
        }  # fmt: skip


def _scan(table: SensitivityTable) -> Iterator[Row]:
    for row in sorted(table.rows, key=lambda row: row.sparsity):
        yield {
            "layer": OUTSIDE if row.layer is None else str(row.layer), "part": _scanned_part(row), "value": finite(row.loss),
            "text": f"{row.loss:.2g} {table.unit}", "name": row.unit, "shape": f"{row.weights:,} weights",
            "note": f"{percent(row.sparsity, 0)} pruned by {table.criterion}",
        }  # fmt: skip


def _scanned_part(row: Scanned) -> str:
    part = row.unit if row.layer is None else row.part
    named = part or (row.kind if row.kind in ("heads", "neurons") else "whole layer")
    return f"{named}, {percent(row.sparsity, 0)}"


def _places(names: Sequence[str]) -> list[tuple[str, str]]:
    """(number of the layer, part of it) of each matrix, each pair once: what stands before the number is told where it differs, as an
    encoder's and a decoder's layers do.
    """
    split = [_split(name) for name in names]
    several = len(unique(front for front, layer, _ in split if layer != OUTSIDE)) > 1
    places = [(layer, f"{front}: {part}" if several and layer != OUTSIDE else part) for front, layer, part in split]
    times = Counter(places)
    return [place if times[place] == 1 else (place[0], name) for place, name in zip(places, names, strict=True)]


def _split(name: str) -> tuple[str, str, str]:
    """ "model.layers.3.mlp.up_proj.weight" -> ("model.layers", "3", "mlp.up_proj")."""
    plain = name.removesuffix(".weight")
    found = re.match(r"(.*?)\.(\d+)\.(.+)", plain)
    return (found[1], found[2], found[3]) if found else ("", OUTSIDE, plain)
