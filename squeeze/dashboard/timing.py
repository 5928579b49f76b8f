"""Rows of the charts about speed: before and after, the distribution of latencies, generation by prompt length, load."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from squeeze.dashboard.readings import Reading, Readings, Row, cell, finite, thinned
from squeeze.dashboard.rows import Axis, Variant, Variants
from squeeze.report.schema import Workload
from squeeze.report.summary import SummaryRow, label, place
from squeeze.report.text import amount, count, times

DISTRIBUTED = ("latency", "set_time", "request_latency", "time_to_first_token", "time_per_output_token")
GENERATED = {"time_to_first_token": "time to the first token", "time_per_output_token": "time for each later token"}
MARKED = (50, 95, 99)
MOST_VALUES = 2000
"""Marks of a distribution; what has more values is drawn at so many evenly spaced ranks."""
FEWEST_RANKS = 20
"""Of each line of a crowded chart."""
SENSES = {
    "better": "better", "worse": "worse", "same": "no difference shown", "unknown": "not judged", "failed": "failed",
}  # fmt: skip


def gains(readings: Readings) -> Variants:
    """Every quantity of each measured artifact against the source, the result first."""
    digests = {key: digest for digest, key in readings.keys.items()}
    found: Variants = {}
    before, result = readings.ends
    for key in sorted(readings.measured, key=lambda key: key != result):
        manifest = readings.manifests.get(digests[key])
        if manifest is None or (key == before and len(readings.measured) > 1):
            continue
        cells = {(label(r.m), r.m.runtime, place(r.m)): r.number for r in readings.all if r.m.artifact == key}
        rows = [
            _gain(row) | {"artifact": key, "cell": cells.get((row.label, row.after.runtime, row.where), -1)}
            for row in readings.summary(manifest)
        ]
        if any(row["ratio"] is not None or row["sense"] == "failed" for row in rows):
            found[key] = Variant(key, Axis("times better than the source", "×", "higher"), Axis(""), rows)
    return found


def _gain(row: SummaryRow) -> Row:
    gain = row.gain if row.gain is not None and row.gain.value > 0 else None
    return {
        "label": row.label, "runtime": row.runtime, "ratio": None if gain is None else finite(gain.value),
        "low": None if gain is None else _above_zero(gain.low), "high": None if gain is None else _above_zero(gain.high),
        "ratio_text": "" if gain is None or not math.isfinite(gain.value) else times(gain.value), "before": row.before.text,
        "after": row.after.text, "verdict": row.verdict or row.after.text, "sense": SENSES[row.sense], "evidence": row.evidence,
        "note": row.note,
        "line": f"{row.change}: {row.verdict}" if row.verdict and row.after.text else row.verdict or row.after.text,
    }  # fmt: skip


def _above_zero(value: float) -> float | None:
    """Zero has no place on a logarithmic axis."""
    return finite(value) if value > 0 else None


def latency(readings: Readings) -> Variants:
    """The share of calls that took so long or less, for each workload."""
    by_label: dict[str, list[Reading]] = {}
    for reading in readings.of(*DISTRIBUTED):
        by_label.setdefault(label(reading.m), []).append(reading)
    return {
        name: Variant(name, Axis(name, "s", "lower"), Axis("share of calls", "share"), _distribution(readings, found))
        for name, found in by_label.items()
    }


def _distribution(readings: Readings, found: Sequence[Reading]) -> list[Row]:
    whole = sum(len(reading.m.values) for reading in found)
    most = MOST_VALUES if whole <= MOST_VALUES else max(FEWEST_RANKS, MOST_VALUES // len(found))
    rows: list[Row] = []
    for reading in found:
        series = readings.series(reading.m)
        values = thinned(reading.m.values, most)
        rows += [{"mark": "value", "series": series, "x": value, "y": share} for value, share in values]
        # The first mark of a line stands for the line: it leads to the values, and says how many of them are drawn.
        rows[-len(values)] |= {
            "artifact": reading.m.artifact,
            "cell": reading.number,
            "note": _drawn(len(values), len(reading.m.values)),
        }
        rows += _percentiles(reading, series)
    return rows


def _drawn(some: int, whole: int) -> str:
    return count(whole, "call") if some == whole else f"{some:,} of {whole:,} calls drawn"


def _percentiles(reading: Reading, series: str) -> Iterator[Row]:
    found = np.quantile(reading.m.values, [percentile / 100 for percentile in MARKED]).tolist()
    for percentile, value in zip(MARKED, found, strict=True):
        yield {
            "mark": f"p{percentile}", "series": series, "x": value, "y": percentile / 100, "text": amount(value, "s"),
            "note": f"of {count(len(reading.m.values), 'call')}", "artifact": reading.m.artifact, "cell": reading.number,
        }  # fmt: skip


def generation(readings: Readings) -> Variants:
    """Time to the first token and time for each later one, by prompt length."""
    found: Variants = {}
    for quantity, name in GENERATED.items():
        rows = [_generated(readings, r, r.m.workload) for r in readings.of(quantity) if r.m.workload is not None]
        if rows:
            rows.sort(key=lambda row: (str(row["series"]), float(row["x"] or 0)))
            found[name] = Variant(name, Axis("prompt length in tokens"), Axis(name, "s", "lower"), rows)
    return found


def _generated(readings: Readings, reading: Reading, work: Workload) -> Row:
    more = f", {work.batch} texts at once" if work.batch > 1 else ""
    return {
        "series": f"{readings.series(reading.m)}, {work.new_tokens} new tokens{more}", "artifact": reading.m.artifact,
        "runtime": reading.m.runtime, "x": work.prompt, "y": finite(reading.value.value), "low": finite(reading.value.low),
        "high": finite(reading.value.high), "text": reading.words, "workload": work.label, "cell": reading.number,
    }  # fmt: skip


def load(readings: Readings) -> Variants:
    """Requests answered a second against the 99th percentile of their times, for each load test."""
    slow = {(cell(r.m), r.m.workload): r for r in readings.of("request_p99")}
    rows: list[Row] = []
    for reading in readings.of("throughput"):
        p99 = slow.get((cell(reading.m), reading.m.workload))
        if p99 is not None and reading.m.workload is not None:
            rows.append(_loaded(readings, reading, p99, reading.m.workload))
    rows.sort(key=lambda row: (str(row["series"]), float(row["x"] or 0)))
    if not rows:
        return {}
    x, y = (
        Axis("requests answered a second", "requests/s", "higher"),
        Axis("99th percentile of their times", "s", "lower"),
    )
    return {"all load tests": Variant("all load tests", x, y, rows)}


def _loaded(readings: Readings, rate: Reading, p99: Reading, work: Workload) -> Row:
    texts = "real texts" if work.sequence is None else f"{work.batch}×{work.sequence}"
    return {
        "series": f"{readings.series(rate.m)}, {texts}", "artifact": rate.m.artifact, "runtime": rate.m.runtime, "cell": rate.number,
        "workload": work.label, "callers": work.callers, "joined": work.kind == "closed",
        "kind": "as fast as answered" if work.kind == "closed" else "arriving at a rate", "x": finite(rate.value.value),
        "x_low": finite(rate.value.low), "x_high": finite(rate.value.high), "x_text": rate.words,
        "y": finite(p99.value.value), "y_low": finite(p99.value.low), "y_high": finite(p99.value.high),
        "y_text": p99.words,
        "limit": finite(work.limit_seconds), "limit_text": "" if work.limit_seconds is None else amount(work.limit_seconds, "s"),
    }  # fmt: skip
