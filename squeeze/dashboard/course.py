"""Rows of the charts about trainings: each loss over the tokens, and the metric on examples that were not trained on."""

from collections.abc import Iterator

from squeeze.dashboard.readings import Readings, Row, finite
from squeeze.dashboard.rows import Axis, Variant, Variants
from squeeze.report.text import figures
from squeeze.report.training import TrainingCurve, metric_text

MOST_STRETCHES = 400
"""Of a curve; of longer ones every second stretch is drawn, or every third, and the last."""


def training(readings: Readings) -> Variants:
    """Two variants for each stage that trained."""
    found: Variants = {}
    for manifest in readings.report.manifests:
        curve = None if manifest.record is None else manifest.record.training
        if curve is None:
            continue
        key, x = readings.keys[manifest.digest], Axis("tokens trained on")
        if curve.steps:
            found[f"{key}: losses"] = Variant(f"{key}: losses", x, Axis("loss", "", "lower"), list(_losses(curve)))
        if curve.validations:
            name = f"{key}: held-out {curve.metric}"
            unit = "share" if curve.metric == "accuracy" else ""
            found[name] = Variant(name, x, Axis(f"held-out {curve.metric}", unit, curve.better), list(_metric(curve)))
    return found


def _losses(curve: TrainingCurve) -> Iterator[Row]:
    columns = {"whole": curve.loss} | (dict(curve.shares) if len(curve.shares) > 1 else {})
    kept = _stretches(len(curve.steps))
    note = "" if len(kept) == len(curve.steps) else f"{len(kept)} of {len(curve.steps)} stretches drawn"
    for name, column in columns.items():
        for n in kept:
            yield {
                "mark": "value", "series": name, "x": curve.tokens[n], "y": finite(column[n]), "step": curve.steps[n],
                "text": figures(column[n], 4), "note": note,
            }  # fmt: skip


def _stretches(count: int) -> list[int]:
    step = -(-count // MOST_STRETCHES)
    chosen = list(range(0, count, step))
    return chosen if chosen[-1] == count - 1 else [*chosen, count - 1]


def _metric(curve: TrainingCurve) -> Iterator[Row]:
    for point in curve.validations:
        kept = point.step == curve.kept
        yield {
            "mark": "kept" if kept else "value", "series": curve.metric, "x": point.tokens, "y": finite(point.value), "step": point.step,
            "text": metric_text(curve, point.value), "note": "the weights that came out" if kept else "",
        }  # fmt: skip
