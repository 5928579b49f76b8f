"""A report for other tools: CSV with every raw value, Markdown, pytest-benchmark's JSON, github-action-benchmark's JSON.

Each is a function from a report to text and one line in the table at the foot. Rejected: writing our statistics into formats that
have places for raw values.
"""

import csv
import io
import json
import statistics
from collections.abc import Callable

import numpy as np

from squeeze.report import stats
from squeeze.report.markdown import to_markdown
from squeeze.report.schema import Measurement, Report
from squeeze.report.summary import QUANTITIES, label
from squeeze.report.text import visible

COLUMNS = (
    "started", "title", "cpu", "quantity", "unit", "workload", "artifact", "runtime", "device", "threads", "dtype", "repeat",
    "index", "value", "weight", "error",
)  # fmt: skip
SECONDS = (
    "latency",
    "set_time",
    "time_to_first_token",
    "time_per_output_token",
    "request_latency",
    "load_time",
    "cold_latency",
)
TRACKED = (*SECONDS, "peak_memory", "weight_bytes", "energy")


def to_csv(report: Report) -> str:
    """One line for each raw value. Names that a spreadsheet would take for a formula get a quote before them."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for m in report.measurements:
        head = (report.started, _plain(report.title), _plain(report.environment.cpu), _plain(m.quantity), m.unit)
        where = (
            m.workload.label if m.workload else "",
            _plain(m.artifact),
            m.runtime,
            m.device,
            m.threads,
            m.dtype or "",
        )
        for number, value in enumerate(m.values):
            repeat = m.repeat[number] if m.repeat else ""
            weight = m.weights[number] if m.weights else ""
            writer.writerow((*head, *where, repeat, number, repr(value), weight, ""))
        if not m.values:
            writer.writerow((*head, *where, "", "", "", "", _plain(m.error or "")))
    return out.getvalue()


def to_pytest_benchmark(report: Report) -> str:
    """The JSON that `pytest-benchmark compare` reads: times in seconds, one benchmark for each timed cell."""
    environment = report.environment
    content = {
        "machine_info": {
            "node": "", "processor": environment.cpu, "machine": environment.platform.split()[-1],
            "python_implementation": environment.python.split()[0], "python_version": environment.python.split()[-1],
            "system": environment.platform.split()[0], "release": "",
            "cpu": {"brand_raw": environment.cpu, "count": environment.cores, "flags": list(environment.cpu_flags)},
        },
        "commit_info": {"id": environment.git or "unversioned", "dirty": (environment.git or "").endswith("-dirty")},
        "benchmarks": [_benchmark(m) for m in report.measurements if m.quantity in SECONDS and m.values],
        "datetime": report.started,
        "version": "5.1.0",
    }  # fmt: skip
    return json.dumps(content, indent=1) + "\n"


def to_github_action(report: Report, *, bigger: bool) -> str:
    """The JSON of github-action-benchmark's custom tools, which keep what should grow apart from what should shrink."""
    growing = [name for name, kind in QUANTITIES.items() if kind.higher_is_better]
    wanted = growing if bigger else TRACKED
    rows = []
    for m in report.measurements:
        if m.quantity in wanted and m.values:
            values = list(stats.by_repeat(m).values()) if m.repeat else [statistics.fmean(m.values)]
            half = (max(values) - min(values)) / 2
            rows.append(
                {
                    "name": f"{label(m)} ({m.artifact}, {m.runtime})", "unit": m.unit or "share", "value": statistics.median(values),
                    "range": f"± {half:.3g}", "extra": f"{len(values)} repeats, {m.device}, {m.threads} threads",
                }
            )  # fmt: skip
    return json.dumps(rows, indent=1) + "\n"


def _benchmark(m: Measurement) -> dict[str, object]:
    values = sorted(m.values)
    array = np.asarray(values)
    first, middle, third = (float(q) for q in np.quantile(array, (0.25, 0.5, 0.75)))
    spread, mean = third - first, float(array.mean())
    deviation = float(array.std(ddof=1)) if len(array) > 1 else 0.0
    low, high = first - 1.5 * spread, third + 1.5 * spread
    inside = [value for value in values if low <= value <= high]
    beyond = len(values) - len(inside)
    far = int((np.abs(array - mean) > deviation).sum())
    name = f"{label(m)} ({m.artifact}, {m.runtime})"
    return {
        "group": label(m), "name": name, "fullname": name, "params": None, "param": None, "extra_info": {},
        "options": {
            "disable_gc": True, "timer": "perf_counter", "min_rounds": 5, "max_time": 1.0, "min_time": 0.000005, "warmup": True,
        },
        "stats": {
            "min": values[0], "max": values[-1], "mean": mean, "stddev": deviation, "rounds": len(values), "median": middle,
            "iqr": spread, "q1": first, "q3": third, "iqr_outliers": beyond, "stddev_outliers": far, "outliers": f"{far};{beyond}",
            "ld15iqr": inside[0], "hd15iqr": inside[-1], "ops": 1 / mean if mean else 0.0, "total": float(array.sum()),
            "iterations": 1, "data": list(m.values),
        },
    }  # fmt: skip


def _plain(text: str) -> str:
    """A name that no spreadsheet computes (CWE-1236)."""
    shown = visible(text)
    return f"'{shown}" if shown[:1] in ("=", "+", "-", "@") else shown


FORMATS: dict[str, Callable[[Report], str]] = {
    "csv": to_csv,
    "markdown": to_markdown,
    "pytest-benchmark": to_pytest_benchmark,
    "github-action-smaller": lambda report: to_github_action(report, bigger=False),
    "github-action-bigger": lambda report: to_github_action(report, bigger=True),
}
