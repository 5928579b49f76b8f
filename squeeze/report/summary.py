"""Before and after in rows: what the terminal, the page and the README all show, worked out once, here, from a
report.

Like is compared with like: the same quantity, workload, device and threads, and the export of the result with the
export of the source. Where the source was not exported the source itself stands in, and the row names both runtimes.
A verdict is a claim, so it is made only where the interval excludes "no difference" and rests on three repeats or
more; a measurement that failed is a row with its reason, never a gap.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from squeeze.provenance import Digest
from squeeze.report import stats
from squeeze.report.derived import PERCENTILES, show_count, with_derived, with_parameters
from squeeze.report.partners import Groups, groups, partner
from squeeze.report.schema import Manifest, Measurement, Report
from squeeze.report.stats import Interval
from squeeze.report.text import MINUS, THIN, amount, count, figures, percent
from squeeze.report.verdict import (
    Sense,
    Verdict,
    judge_accuracy,
    judge_fewer_bytes,
    judge_less_memory,
    judge_less_time,
    judge_more_rate,
    judge_perplexity,
)

UNSTEADY = 0.1
"""Spread of the repeats, relative to their median, from which a row warns of it."""


@dataclass(frozen=True)
class Side:
    """One end of a comparison; empty text and NaN where nothing was measured."""

    text: str
    value: float
    spread: str
    """ "±2.1 %": half the distance between the quartiles of the repeats; "" with fewer than three."""
    dots: tuple[float, ...]
    """One value a repeat, for perplexity one a block; in the row's unit. () where dots would say nothing."""
    artifact: str
    runtime: str


@dataclass(frozen=True)
class SummaryRow:
    """One quantity before and after, in words for people and in numbers for charts and generated tables."""

    quantity: str
    """As in the report: "latency"."""
    label: str
    """With its workload: "latency, 1×128"."""
    unit: str
    before: Side
    after: Side
    words: str
    """ "2.72× faster", "no difference shown", "not measured for the result: killed by SIGKILL"."""
    bounds: str
    """The interval in the same terms: "[2.43, 3.25]"; "" where there is none."""
    sense: Sense
    gain: Interval | None
    """How many times better, above 1 whichever way the quantity counts; None where there is no such ratio."""
    runtime: str
    """Its name, or both: "torch → onnxruntime"."""
    where: str
    """Device and threads: "cpu, 2 threads"."""
    evidence: str
    """ "3 repeats", "3 repeats of 171 calls", "20 blocks"."""
    note: str = ""

    @property
    def verdict(self) -> str:
        """Words and bounds: "2.72× faster [2.43, 3.25]"."""
        return f"{self.words} {self.bounds}".strip()

    @property
    def change(self) -> str:
        """Both ends with their unit once, where it is the same: "51.1 → 139 tokens/s"."""
        if not self.before.text:
            return self.after.text
        old, _, unit = self.before.text.partition(THIN)
        same = unit == self.after.text.partition(THIN)[2]
        return f"{old if same else self.before.text} → {self.after.text}"

    def measured(self, where: str) -> str:
        """Runtime, evidence, spread, and what else a reader must know; `where` is the device and threads that all rows share."""
        spread = " → ".join(side.spread for side in (self.before, self.after) if side.spread)
        parts = (self.runtime, "" if where else self.where, f"{self.evidence} {spread}".strip(), self.note)
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class CellRow:
    """One measurement in words, compared or not."""

    artifact: str
    runtime: str
    label: str
    value: float
    text: str
    spread: str
    n: int
    device: str
    threads: int | None
    dtype: str
    error: str
    note: str


@dataclass(frozen=True)
class Quantity:
    """How a quantity is named, shown and judged."""

    label: str
    show: Callable[[Measurement], tuple[float, str]]
    judge: Callable[[Measurement, Measurement], Verdict] | None
    """(before, after) -> verdict; None: the value alone already compares with the source."""
    examples: str = ""
    """What a value stands for where it is not a repeat: "block"."""
    dotted: bool = False
    higher_is_better: bool = False


def ends(report: Report, result: Manifest | None = None) -> tuple[str, str]:
    """Names of the artifacts compared, source and result; the same twice where there is one, empty where there is none.

    The result is the one given, else the last export, squeeze's own before another tool's, or the last artifact. The source is
    the first artifact, or its export where the result is one.
    """
    if not report.manifests:
        return "", ""
    named, result = names(report), result or _result(report)
    return named[_sources(report, result)[0]], named[result.digest]


def summarize(report: Report, result: Manifest | None = None) -> list[SummaryRow]:
    """Rows of the before/after table: quality, speed, memory, size. No rows where nothing was measured."""
    if not report.manifests:
        return []
    measured, result = _measured(report), result or _result(report)
    sources, own = _sources(report, result), result.digest
    alone, known = own in sources, groups(measured, sources)
    rows = [
        _row(measured, None if alone else _partner(known, sources, after), after, alone=alone)
        for after in measured
        if after.artifact_digest == own and _is_compared(after)
    ]
    order = ["quality", *QUANTITIES]
    return sorted(rows, key=lambda row: order.index(row.quantity))


def _is_compared(m: Measurement) -> bool:
    """Whether before and after may stand side by side: at the highest rates of both, which differ, only those rates may."""
    own_rate = m.workload is not None and m.workload.kind == "open" and m.workload.rate is None
    return m.quantity == "highest_rate" if own_rate else m.quantity in QUANTITIES or m.quantity == "quality"


def cells(report: Report) -> list[CellRow]:
    """Every measurement of the report, also those that are compared with nothing and those that failed."""
    rows = []
    for m in _measured(report):
        value, text = _show(m)
        row = CellRow(
            artifact=m.artifact, runtime=m.runtime, label=label(m), value=value, text=text, spread=_spread(m),
            n=len(m.values), device=m.device, threads=m.threads, dtype=m.dtype or "", error=m.error or "", note=m.note,
        )  # fmt: skip
        rows.append(row)
    return rows


def pivot(rows: Sequence[CellRow]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table "all cells": a line for each quantity, a column for each artifact in a runtime."""
    columns = list(dict.fromkeys(_column(row) for row in rows))
    found = {(row.label, _column(row)): _cell_text(row) for row in rows}
    labels = dict.fromkeys(row.label for row in rows)
    lines = [[name, *(found.get((name, column), "") for column in columns)] for name in labels]
    varied = [len({column[place] for column in columns}) > 1 for place in (2, 3, 4)]
    return ["", *(_heading(column, varied) for column in columns)], lines


def _column(row: CellRow) -> tuple[str, str, str, int | None, str]:
    return row.artifact, row.runtime, row.device, row.threads, row.dtype


def _heading(column: tuple[str, str, str, int | None, str], varied: Sequence[bool]) -> str:
    """Artifact and runtime; device, threads and type only where they are not the same everywhere."""
    artifact, runtime, device, threads, dtype = column
    more = (device, "not pinned" if threads is None else count(threads, "thread"), dtype or "as stored")
    return ", ".join([artifact, runtime, *(text for text, varies in zip(more, varied, strict=True) if varies)])


def shared_where(rows: Sequence[SummaryRow]) -> str:
    """Device and threads of all rows, for a caption: "cpu, 2 threads"; "" where they differ."""
    found = {row.where for row in rows}
    return found.pop() if len(found) == 1 else ""


def label(m: Measurement) -> str:
    """The quantity's name with its workload: "latency, 1×128"."""
    kind = QUANTITIES.get(m.quantity)
    name = kind.label if kind else UNCOMPARED.get(m.quantity, m.quantity.replace("_", " "))
    return f"{name}, {m.workload.label}" if m.workload is not None else name


def names(report: Report) -> dict[Digest, str]:
    """Digest -> name. Artifacts of two runs may share a name; theirs are told apart by what the bench called them, else by digests."""
    named = {m.digest: m.name for m in report.manifests}
    called = {m.artifact_digest: m.artifact for m in report.measurements if named.get(m.artifact_digest) != m.artifact}
    several = {name for name, times in Counter(named.values()).items() if times > 1}
    return {
        digest: called.get(digest, f"{name} ({digest[7:15]})") if name in several else name
        for digest, name in named.items()
    }


def _measured(report: Report) -> list[Measurement]:
    """All measurements, each under a name that is its artifact's alone."""
    known = names(report)
    named = [m.model_copy(update={"artifact": known.get(m.artifact_digest, m.artifact)}) for m in report.measurements]
    return with_parameters(with_derived(named), report.manifests)


def _result(report: Report) -> Manifest:
    exports = [m for m in report.manifests if m.format == "onnx"]
    own = [m for m in exports if m is not report.manifests[0] and not m.is_peer]
    return (own or exports or report.manifests)[-1]


def _sources(report: Report, result: Manifest) -> list[Digest]:
    """Digests of the artifacts that stand for the source, the one most like the result first."""
    first = report.manifests[0]
    exports = [m for m in report.manifests if m.format == "onnx" and m is not result]
    source = first.digest
    if result.format == "torch" or first.format == "onnx":
        return [source]
    return [*(m.digest for m in exports if m.parent == source), source]


def _partner(known: Groups, sources: Sequence[Digest], after: Measurement) -> Measurement | None:
    return partner(known, sources, after, scored=bool(QUANTITIES.get(after.quantity, TIMED).examples))


def _cell(m: Measurement) -> tuple[object, ...]:
    return m.artifact_digest, m.runtime, m.device, m.threads, m.dtype


def _row(measured: Sequence[Measurement], before: Measurement | None, after: Measurement, *, alone: bool) -> SummaryRow:
    kind = QUANTITIES.get(after.quantity, TIMED)
    if kind.judge is None:
        before = None
    verdict = _verdict(kind, before, after, alone=alone)
    sides = (side(kind, before), side(kind, after))
    notes = [m.note for m in (before, after) if m is not None and m.note]
    notes += [note for note in (_unsteady(before, after), _stuck(measured, after), _paired(before, after)) if note]
    return SummaryRow(
        quantity=after.quantity, label=label(after), unit=after.unit, before=sides[0], after=sides[1],
        words=verdict.words, bounds=verdict.bounds, sense=verdict.sense, gain=verdict.gain,
        runtime=runtimes(before, after), where=place(after), evidence=_evidence(kind, after),
        note="; ".join(dict.fromkeys(notes)),
    )  # fmt: skip


def _verdict(kind: Quantity, before: Measurement | None, after: Measurement, *, alone: bool) -> Verdict:
    for side, m in (("source", before), ("result", after)):
        if m is not None and not m.values:
            return Verdict(f"not measured for the {side}: {m.error}", "failed")
    if kind.judge is None:
        return Verdict("", "unknown", _shown_interval(after))
    if before is None:
        return Verdict("" if alone else "not measured for the source", "unknown")
    return kind.judge(before, after)


@lru_cache(maxsize=512)
def side(kind: Quantity, m: Measurement | None) -> Side:
    """One end of a comparison, in words and numbers."""
    if m is None:
        return Side("", math.nan, "", (), "", "")
    value, text = _show(m)
    return Side(text, value, _spread(m), _dots(kind, m), m.artifact, m.runtime)


def _show(m: Measurement) -> tuple[float, str]:
    return QUANTITIES.get(m.quantity, TIMED).show(m) if m.values else (math.nan, "")


def _dots(kind: Quantity, m: Measurement) -> tuple[float, ...]:
    if not kind.dotted or not m.values:
        return ()
    if m.quantity == "negative_log_likelihood":
        pairs = zip(m.values, m.weights or (1.0,) * len(m.values), strict=True)
        return tuple(math.exp(min(700.0, value / weight)) for value, weight in pairs)
    return tuple(stats.by_repeat(m).values())


def runtimes(before: Measurement | None, after: Measurement) -> str:
    """The runtime's name, or both."""
    return after.runtime if before is None or before.runtime == after.runtime else f"{before.runtime} → {after.runtime}"


def place(m: Measurement) -> str:
    """Device and threads."""
    return f"{m.device}, {'threads not pinned' if m.threads is None else count(m.threads, 'thread')}"


def _evidence(kind: Quantity, m: Measurement) -> str:
    if not m.values:
        return ""
    if kind.examples:
        return count(len(m.values), kind.examples)
    if m.quantity.endswith("_bytes") or m.quantity == "parameters":
        return "counted"
    repeats = len(stats.by_repeat(m))
    calls = f" of {len(m.values):,} calls" if len(m.values) > repeats else ""
    return count(repeats, "repeat") + calls


def _spread(m: Measurement) -> str:
    wide = _spread_of_repeats(m)
    return "" if math.isnan(wide) else f"±{percent(wide, 1)}"


def _unsteady(before: Measurement | None, after: Measurement) -> str:
    wide = [w for m in (before, after) if m is not None and not math.isnan(w := _spread_of_repeats(m))]
    if max(wide, default=0.0) <= UNSTEADY:
        return ""
    return f"unsteady: repeats spread by ±{percent(max(wide), 0)}; close other programs, or raise repeats"


def _spread_of_repeats(m: Measurement) -> float:
    return stats.spread(tuple(stats.by_repeat(m).values())) if m.repeat else math.nan


def _stuck(measured: Sequence[Measurement], after: Measurement) -> str:
    """A broken classifier can look passable on lopsided data; that it only ever says one thing gives it away."""
    if after.quantity != "correct" or len(after.values) < stats.FEWEST:
        return ""
    answers = [m.values for m in measured if m.quantity == "answer" and _cell(m) == _cell(after)]
    return "the result gives the same answer to every example" if answers and len(set(answers[0])) == 1 else ""


def _paired(before: Measurement | None, after: Measurement) -> str:
    """Which answers changed sides (McNemar), and what the likelihood of a token lost: what an average can hide."""
    if before is None or not before.values or len(before.values) != len(after.values):
        return ""
    if after.quantity == "correct":
        lost, gained, p = stats.mcnemar(before.values, after.values)
        if not lost + gained:
            return ""
        return f"{lost} right answers lost, {gained} gained (McNemar p = {p:.2g})"
    if after.quantity == "negative_log_likelihood" and before.weights == after.weights:
        found = stats.perplexity_ratio(after, before).map(lambda ratio: -math.log(ratio) if ratio > 0 else math.nan)
        bounds = f"[{found.low:+.4f}, {found.high:+.4f}]".replace("-", MINUS)
        return f"log-likelihood of a token {f'{found.value:+.4f}'.replace('-', MINUS)} nats {bounds}"
    return ""


def _cell_text(row: CellRow) -> str:
    return f"not measured: {row.error}" if row.error else f"{row.text} {row.spread}".strip()


def _show_median(m: Measurement) -> tuple[float, str]:
    value = stats.median(tuple(stats.by_repeat(m).values()))
    return value, amount(value, m.unit)


def _show_perplexity(m: Measurement) -> tuple[float, str]:
    value = stats.perplexity(m)
    return value, figures(value, 4)


def _show_share(m: Measurement) -> tuple[float, str]:
    value = stats.share(m.values).value
    return value, percent(value, 2)


def _show_mean(m: Measurement) -> tuple[float, str]:
    value = math.fsum(m.values) / len(m.values)
    return value, f"{value:.4f}" if abs(value) < 10 else figures(value)


def _show_nats(m: Measurement) -> tuple[float, str]:
    value = math.fsum(m.values) / len(m.values)
    return value, f"{value:.2g}{THIN}nats"


def _shown_interval(m: Measurement) -> str:
    """What is said of a quantity that compares with the source by itself."""
    if m.quantity == "same_answer":
        found = stats.share(m.values)
        return f"[{percent(found.low, 2)}, {percent(found.high, 2)}]"
    if len(m.values) < stats.FEWEST:
        return ""
    found = stats.mean(m.values)
    if m.quantity == "kl_to_source":
        return f"[{found.low:.2g}, {found.high:.2g}], highest {max(m.values):.2g}"
    return f"[{found.low:.4f}, {found.high:.4f}], lowest {min(m.values):.4f}"


TIMED = Quantity("", _show_median, None)
"""How a quantity that is in no table is shown: the median of its repeats."""

QUANTITIES: dict[str, Quantity] = {
    "negative_log_likelihood": Quantity(
        "perplexity", _show_perplexity, judge_perplexity, examples="block", dotted=True
    ),
    "correct": Quantity("accuracy", _show_share, judge_accuracy, examples="example", higher_is_better=True),
    "same_answer": Quantity("same answers as the source", _show_share, None, examples="example", higher_is_better=True),
    "cosine_to_source": Quantity("cosine to the source", _show_mean, None, examples="example", higher_is_better=True),
    "kl_to_source": Quantity("KL divergence from the source", _show_nats, None, examples="place"),
    "logit_error": Quantity("relative error of the logits", _show_mean, None, examples="evaluation"),
    "set_time": Quantity("whole set", _show_median, judge_less_time, dotted=True),
    "latency": Quantity("latency", _show_median, judge_less_time, dotted=True),
    "time_to_first_token": Quantity("time to first token", _show_median, judge_less_time, dotted=True),
    "decode_rate": Quantity("decoding speed", _show_median, judge_more_rate, dotted=True, higher_is_better=True),
    "time_per_output_token": Quantity("time per output token", _show_median, judge_less_time, dotted=True),
    "throughput": Quantity("throughput", _show_median, judge_more_rate, dotted=True, higher_is_better=True),
    "highest_rate": Quantity("highest rate", _show_median, judge_more_rate, dotted=True, higher_is_better=True),
    **{f"request_p{p}": Quantity(f"request p{p}", _show_median, judge_less_time, dotted=True) for p in PERCENTILES},
    "request_latency": Quantity("request latency", _show_median, judge_less_time, dotted=True),
    "energy": Quantity("energy of a call", _show_median, judge_less_memory, dotted=True),
    "cold_latency": Quantity("first answer after loading", _show_median, judge_less_time, dotted=True),
    "load_time": Quantity("load time", _show_median, judge_less_time, dotted=True),
    "peak_memory": Quantity("peak memory", _show_median, judge_less_memory, dotted=True),
    "memory_above_baseline": Quantity("peak memory above baseline", _show_median, judge_less_memory, dotted=True),
    "steady_memory": Quantity("memory after the call", _show_median, judge_less_memory, dotted=True),
    "cuda_allocated": Quantity("CUDA memory allocated", _show_median, judge_less_memory, dotted=True),
    "cuda_reserved": Quantity("CUDA memory reserved", _show_median, judge_less_memory, dotted=True),
    "parameters": Quantity("parameters", show_count, judge_fewer_bytes, dotted=True),
    "weight_bytes": Quantity("weights on disk", _show_median, judge_fewer_bytes, dotted=True),
    "compressed_bytes": Quantity("download (zstd)", _show_median, judge_fewer_bytes, dotted=True),
}
"""In the order of the table."""

UNCOMPARED = {
    "baseline_memory": "memory before the model", "folder_bytes": "whole folder on disk", "answer": "answers",
    "token_log_likelihood": "log-likelihood of a token",
}  # fmt: skip
"""Names of what stands only among all cells."""
