"""One report as the dashboard reads it: every artifact under a key that is its alone, every measurement with its interval.

Keys are the names that `report.summary` gives, made safe to show and unique. Intervals of single values are new here, because reports
compare and do not need them: a chart that draws one artifact's latency as a bar must say how sure it is. They are those of
`report.stats`, asked another question: the interval of repeats is the paired one against a machine that takes one second each time,
that of a perplexity is its ratio to a model that is sure of every token.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from squeeze.provenance import Digest
from squeeze.report import stats
from squeeze.report.derived import with_memory_above_baseline, with_parameters, with_percentiles
from squeeze.report.schema import Manifest, Measurement, Report
from squeeze.report.stats import Interval
from squeeze.report.summary import QUANTITIES, TIMED, Quantity, SummaryRow, ends, names, summarize
from squeeze.report.text import MINUS, THIN, amount, figures, percent, visible

Value = str | float | int | bool | None
Row = dict[str, Value]
"""One mark of a chart and one line of its table."""

COUNTED = ("weight_bytes", "folder_bytes", "compressed_bytes", "parameters")
"""Counted and not measured: one value is the truth, and there is no interval."""
SHARES = ("correct", "same_answer")
UNREAD = ("answer", "token_log_likelihood")
"""Raw values that only make sense beside others: a median of class ids says nothing."""
UNKNOWN = Interval(math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True, eq=False)
class Reading:
    """One measurement, or what follows from one."""

    number: int
    """Place among the report's measurements; -1 where derived."""
    m: Measurement
    """Under its artifact's key."""
    kind: Quantity
    value: Interval
    text: str

    @property
    def interval(self) -> str:
        """In words: "[11.9 ms, 12.6 ms]"; "" where there is none."""
        return bounds(self.value, self.m.quantity, self.m.unit)

    @property
    def words(self) -> str:
        """The value with its interval."""
        return f"{self.text} {self.interval}".strip()


class Readings:
    """A report with what the dashboard asks of it worked out once."""

    def __init__(self, identity: str, report: Report) -> None:
        """`identity` is the report's id in the view."""
        self.identity, self.original = identity, report
        self.keys = _keys(report)
        named = [m.model_copy(update={"artifact": self.keys[m.artifact_digest]}) for m in report.measurements]
        self.report = report.model_copy(update={"measurements": tuple(named)})
        """The report, its measurements under the keys."""
        self.manifests = {m.digest: m for m in report.manifests}
        """Digest -> manifest: a digest is taken over the whole of it, and is asked for often."""
        self._numbers = {id(m): n for n, m in enumerate(named)}
        self._named = named
        self._summaries: dict[Digest, list[SummaryRow]] = {}
        self._judged: dict[tuple[Reading, Reading], str] = {}

    @cached_property
    def all(self) -> list[Reading]:
        """Every measurement in order, each followed by what follows from it."""
        whole: list[Measurement] = []
        for m in with_parameters(with_memory_above_baseline(self._named), self.report.manifests):
            # Percentiles take the place of the requests in tables; here the requests stay as well, for their raw values.
            whole += [m, *with_percentiles([m])] if m.quantity == "request_latency" and m.values else [m]
        return [_reading(self._numbers.get(id(m), -1), m) for m in whole]

    @cached_property
    def lean(self) -> Report:
        """The report with one value a repeat: what is said of pairs is the same, and worked out much faster."""
        return self.report.model_copy(update={"measurements": tuple(by_repeat(m) for m in self._named)})

    @cached_property
    def by_quantity(self) -> dict[str, list[Reading]]:
        """Quantity -> readings that have values."""
        found: dict[str, list[Reading]] = {}
        for reading in self.all:
            if reading.m.values:
                found.setdefault(reading.m.quantity, []).append(reading)
        return found

    def of(self, *quantities: str) -> list[Reading]:
        """Readings of some quantities that have values, in the order of the quantities."""
        return [reading for quantity in quantities for reading in self.by_quantity.get(quantity, ())]

    def summary(self, manifest: Manifest) -> list[SummaryRow]:
        """The before/after table of any artifact against the source."""
        digest = next(known for known, one in self.manifests.items() if one is manifest)
        if digest not in self._summaries:
            source = next(iter(self.manifests))
            both = {digest, source} | {known for known, one in self.manifests.items() if one.parent == source}
            # Only what the table can be made of: with a hundred artifacts the rest is most of the work.
            own = tuple(m for m in self._named if m.artifact_digest in both)
            self._summaries[digest] = summarize(self.report.model_copy(update={"measurements": own}), manifest)
        return self._summaries[digest]

    @cached_property
    def results(self) -> list[SummaryRow]:
        """The before/after table of the report's result."""
        result = next((m for digest, m in self.manifests.items() if self.keys[digest] == self.ends[1]), None)
        return [] if result is None else self.summary(result)

    def is_better(self, one: Reading, other: Reading) -> bool:
        """Whether `one` is shown to be better than `other`, of the same quantity, by the interval of the pair."""
        if (one, other) not in self._judged:
            judge = one.kind.judge
            self._judged[one, other] = "unknown" if judge is None else judge(by_repeat(other.m), by_repeat(one.m)).sense
        return self._judged[one, other] == "better"

    @cached_property
    def ends(self) -> tuple[str, str]:
        """Keys of source and result; "" twice where there is no artifact."""
        if not self.report.manifests:
            return "", ""
        digests = {name: digest for digest, name in names(self.original).items()}
        before, after = ends(self.original)
        return self.keys[digests[before]], self.keys[digests[after]]

    @cached_property
    def measured(self) -> list[str]:
        """Keys of the artifacts that something was measured of, in the report's order."""
        with_any = {m.artifact_digest for m in self._named}
        return [key for digest, key in self.keys.items() if digest in with_any]

    @cached_property
    def _varied(self) -> tuple[bool, bool, bool]:
        places = {(m.device, m.threads, m.dtype) for m in self._named}
        return tuple(len({place[n] for place in places}) > 1 for n in range(3))  # type: ignore[return-value]

    def series(self, m: Measurement) -> str:
        """Artifact and runtime, with device, threads and type where the report has several."""
        more = (m.device, "threads not pinned" if m.threads is None else f"{m.threads} threads", m.dtype or "as stored")
        return ", ".join(
            [m.artifact, m.runtime, *(text for text, varies in zip(more, self._varied, strict=True) if varies)]
        )


def cell(m: Measurement) -> tuple[Digest, str, str, int | None, str | None]:
    """What ran where: readings of one cell belong together."""
    return m.artifact_digest, m.runtime, m.device, m.threads, m.dtype


def by_repeat(m: Measurement) -> Measurement:
    """The measurement with one value a repeat, which is all that a comparison of repeats looks at; examples stay as they are."""
    kind = QUANTITIES.get(m.quantity, TIMED)
    if kind.examples or not m.repeat or m.quantity == "request_latency" or len(m.values) == len(set(m.repeat)):
        return m
    found = stats.by_repeat(m)
    return m.model_copy(
        update={"values": tuple(found.values()), "repeat": tuple(found), "warmups": (), "weights": None}
    )


def finite(value: float | None) -> float | None:
    """The value, or None where it is no number: JSON has neither NaN nor infinity."""
    return value if value is not None and math.isfinite(value) else None


def bounds(value: Interval, quantity: str, unit: str) -> str:
    """An interval in the quantity's own terms: "[11.9 ms, 12.6 ms]"; "" where there is none."""
    if not (math.isfinite(value.low) and math.isfinite(value.high)):
        return ""
    return f"[{shown(value.low, quantity, unit)}, {shown(value.high, quantity, unit)}]"


def thinned(values: Sequence[float], most: int) -> list[tuple[float, float]]:
    """(value, share of values up to it) in rising order; with more than `most` values, so many of them at evenly spaced ranks, the
    smallest and the largest included. Nothing is interpolated: each value is a raw one, its share exact to a millionth.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    count = len(ordered)
    ranks = np.arange(count) if count <= most else np.unique(np.linspace(0, count - 1, most).round().astype(int))
    return [(float(ordered[rank]), round((int(rank) + 1) / count, 6)) for rank in ranks]


def _keys(report: Report) -> dict[Digest, str]:
    """Digest -> key, of all manifests and then of what was measured without one."""
    named = names(report)
    for m in report.measurements:
        named.setdefault(m.artifact_digest, m.artifact)
    taken: set[str] = set()
    found: dict[Digest, str] = {}
    for digest, name in named.items():
        key = visible(name).replace("|", "¦")
        if key in taken:
            key = f"{key} ({digest[7:15]})"
        while key in taken:
            key += "′"
        taken.add(key)
        found[digest] = key
    return found


def _reading(number: int, m: Measurement) -> Reading:
    kind = QUANTITIES.get(m.quantity, TIMED)
    if not m.values or m.quantity in UNREAD:
        return Reading(number, m, kind, UNKNOWN, "")
    value, text = kind.show(m)
    return Reading(number, m, kind, _interval(m, value), text)


def _interval(m: Measurement, value: float) -> Interval:
    """The value with its 95 % interval; NaN bounds where there are too few values to give one."""
    alone = Interval(value, math.nan, math.nan, 1)
    if m.quantity in COUNTED:
        return alone
    if m.quantity == "negative_log_likelihood":
        certain = m.model_copy(update={"values": (0.0,) * len(m.values)})
        return _around(value, stats.perplexity_ratio(m, certain))
    if m.quantity in SHARES:
        return stats.share(m.values)
    if QUANTITIES.get(m.quantity, TIMED).examples:
        return _around(value, stats.mean(m.values)) if len(m.values) >= stats.FEWEST else alone
    repeats = list(stats.by_repeat(m).values())
    if len(repeats) < stats.FEWEST or min(repeats) <= 0:
        return Interval(value, math.nan, math.nan, len(repeats))
    low, high = (math.exp(end) for end in stats.paired_interval(np.log(repeats)))
    return Interval(value, min(low, value), max(high, value), len(repeats))


def _around(value: float, found: Interval) -> Interval:
    return Interval(value, min(found.low, value), max(found.high, value), found.n)


def shown(value: float, quantity: str, unit: str) -> str:
    if quantity in SHARES:
        return percent(value, 2)
    if quantity == "negative_log_likelihood":
        return figures(value, 4)
    if quantity == "kl_to_source":
        return f"{value:.2g}{THIN}nats"
    if QUANTITIES.get(quantity, TIMED).examples:
        return f"{value:.4f}".replace("-", MINUS) if abs(value) < 10 else figures(value)
    return amount(value, unit)


def unique(names: Iterable[str]) -> list[str]:
    """Each once, in order."""
    return list(dict.fromkeys(names))
