"""All that the page shows, as one JSON document: reports in, figures, verdicts and rows out.

The page computes nothing. What it shows is here, in words where words are shown, so that the page, an exported image and a test read
the same. Bounded: pairs of artifacts (`pairs`), marks of a distribution and stretches of a curve (`timing`, `course`); what is left out
is counted and said. Rejected: statistics in the page (they would have to be tested twice, and would differ once).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from squeeze.dashboard import pairs
from squeeze.dashboard.artifacts import artifacts
from squeeze.dashboard.datasets import datasets
from squeeze.dashboard.history import history
from squeeze.dashboard.readings import Reading, Readings, Row, finite
from squeeze.dashboard.rows import Variants
from squeeze.dashboard.running import running_report
from squeeze.dashboard.specs import CHARTS, Chart
from squeeze.dashboard.themes import CONFIGS
from squeeze.errors import ReportError
from squeeze.provenance import digest_json, environment
from squeeze.report.headline import headline
from squeeze.report.noise import warnings
from squeeze.report.schema import Report, read_report
from squeeze.report.status import STATUS
from squeeze.report.store import machine_id, read_all
from squeeze.report.summary import QUANTITIES, label, place
from squeeze.report.text import count, visible

REPORT = "report.json"
KEPT = 128
"""Reports that are worked out once for a server that shows them again and again."""
SHORT = 12
"""Hex digits of a report's id."""


@dataclass(frozen=True, eq=False)
class Source:
    """One report and where it was found. Compared by identity: an unchanged file is the same source, and is worked out once."""

    id: str
    file: str
    report: Report
    running: bool = False
    """Whether its run is still going on."""
    doing: str = ""
    """What the run does now."""

    @cached_property
    def readings(self) -> Readings:
        """The report as the dashboard reads it."""
        return Readings(self.id, self.report)

    @cached_property
    def drawn(self) -> dict[str, Variants]:
        """Chart -> its variants."""
        return datasets(self.readings)

    @property
    def rows(self) -> dict[str, dict[str, list[Row]]]:
        """Chart -> variant -> rows."""
        return {kind: {name: v.rows for name, v in variants.items()} for kind, variants in self.drawn.items()}

    @cached_property
    def judged(self) -> tuple[dict[str, list[pairs.Judged]], int]:
        """Its artifacts held against each other, and how many pairs were left out."""
        return pairs.within(self.readings)

    @cached_property
    def shown(self) -> dict[str, Any]:
        """What the view holds of it."""
        return _report(self)


@dataclass(frozen=True)
class Skipped:
    """A file that is no report, and why."""

    file: str
    reason: str


def collect(paths: Sequence[str | Path], results: Path = Path("results")) -> tuple[list[Source], list[Skipped]]:
    """The reports under files, run folders, results folders, folders of either, and ids of the results folder; oldest first.

    A file that is no whole report is passed over with its reason, and so is one that equals another. Raises ReportError for a path
    that does not exist and is no id.
    """
    found: dict[str, Source] = {}
    skipped: list[Skipped] = []
    for path in dict.fromkeys(file for name in paths for file in _files(name, results)):
        try:
            source = source_of(path)
        except ReportError as error:
            skipped.append(Skipped(str(path), str(error).removeprefix(f"{path} ")))
            continue
        if source.id in found:
            skipped.append(Skipped(str(path), f"holds the same report as {found[source.id].file}"))
        found.setdefault(source.id, source)
    return sorted(found.values(), key=lambda s: (s.report.started, s.id)), skipped


def source_of(path: Path) -> Source:
    """One report from its file, or from the run that is going on in its folder. Raises ReportError."""
    found = running_report(path.parent) if path.name == REPORT else None
    if found is not None:
        # The id stays while the report grows, so that the page stays where it is.
        place = digest_json({"folder": str(path.parent.resolve()), "started": found.report.started})[7:]
        return Source(place[:SHORT], str(path), found.report, found.is_alive, found.doing)
    try:
        seen = path.stat()
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}.") from error
    return _whole(path, seen.st_mtime_ns, seen.st_size, seen.st_ino)


@lru_cache(maxsize=KEPT)
def _whole(path: Path, *_: int) -> Source:
    """A report that is complete. Time, size and inode are part of the key: a file is read again only when it changed."""
    report = read_report(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Source(digest[:SHORT], str(path), report)


def build(sources: Sequence[Source], skipped: Sequence[Skipped] = (), title: str = "") -> dict[str, Any]:
    """The whole view, ready for `report.text.json_text`: no NaN, no infinity, every string `visible`."""
    charts = _charts(sources)
    together, told = pairs.across([source.readings for source in sources])
    left = {source.id: source.judged[1] for source in sources if source.judged[1]}
    view = {
        "title": title or _title(sources), "made": datetime.now(UTC).isoformat(timespec="seconds"), "version": environment().squeeze,
        "skipped": [{"file": one.file, "reason": one.reason} for one in skipped], "history": charts["history"],
        "across": together, "across_warnings": told, "charts": charts["charts"], "configs": CONFIGS,
        **({"pairs_left_out": left} if left else {}),
    }  # fmt: skip
    shown: dict[str, Any] = _visible(view)
    return shown | {"reports": [source.shown for source in sources]}


def build_charts(sources: Sequence[Source]) -> dict[str, Any]:
    """What `images` needs of the view, without the pairs, which take longest."""
    charts = _charts(sources)
    reports = [{"id": s.id, "title": s.report.title, "rows": s.rows} for s in sources]
    shown: dict[str, Any] = _visible({"charts": charts["charts"], "history": charts["history"], "reports": reports})
    return shown


def raw_values(sources: Sequence[Source]) -> dict[str, list[dict[str, Any]]]:
    """Report id -> its measurements as in its file, in order, under the keys that the view has for artifacts."""
    return {source.id: [m.model_dump(mode="json") for m in source.readings.report.measurements] for source in sources}


def _files(name: str | Path, results: Path) -> Iterator[Path]:
    path = Path(name)
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from _in_folder(path)
        if not _is_run(path):
            for inner in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
                if not (inner / "squeeze.json").is_file():
                    yield from _in_folder(inner)
    else:
        yield _by_id(str(name), results)


def _in_folder(folder: Path) -> list[Path]:
    """The report of a run folder, else every .json file."""
    if _is_run(folder):
        return [folder / REPORT]
    return sorted(p for p in folder.iterdir() if p.suffix == ".json" and p.is_file() and not p.name.startswith("."))


def _is_run(folder: Path) -> bool:
    return (folder / REPORT).is_file() or (folder / STATUS).is_file()


def _by_id(name: str, results: Path) -> Path:
    stored, _ = read_all(results)
    fitting = [one for one in stored if one.id == name] or [one for one in stored if one.id.startswith(name)]
    if name == "latest" and stored:
        return stored[-1].path
    if len(fitting) == 1:
        return fitting[0].path
    known = ", ".join(one.id for one in stored[:-6:-1]) or "none"
    said = "does not exist, and is no id" if not fitting else f"is the beginning of {len(fitting)} ids"
    raise ReportError(
        f"{name} {said} in {results}. Name a report.json, a run folder or a results folder. Newest in {results}: {known}."
    )


def _title(sources: Sequence[Source]) -> str:
    titles = list(dict.fromkeys(source.report.title for source in sources))
    if not titles:
        return "No reports"
    return titles[0] if len(titles) == 1 else count(len(sources), "report")


def _report(source: Source) -> dict[str, Any]:
    """What the view holds of one report."""
    report, where, readings = source.report, source.report.environment, source.readings
    content = {
        "id": source.id, "file": source.file, "title": report.title, "started": report.started, "machine": machine_id(where),
        "where": _where(readings), "git": where.git, "seconds": report.seconds, "status": "running" if source.running else report.status,
        "error": report.error, "headline": _headline(source, readings), "notes": list(report.notes), "warnings": warnings(readings.report),
        "recipe": report.recipe, "environment": where.model_dump(mode="json"), "artifacts": artifacts(readings),
        "ends": list(readings.ends),
        "cells": [_cell(reading) for reading in readings.all], "pairs": source.judged[0], "rows": source.rows,
    }  # fmt: skip
    shown: dict[str, Any] = _visible(content)
    return shown


def _headline(source: Source, readings: Readings) -> str:
    said = headline(readings.report, readings.results)
    return f"{source.doing} So far: {said}" if source.running and source.report.measurements else source.doing or said


def _where(readings: Readings) -> str:
    """The machine, and device and threads where they are the same everywhere."""
    where = readings.report.environment
    places = list(dict.fromkeys(place(m) for m in readings.report.measurements))
    machine = f"{where.cpu}, {count(where.cores, 'core')}"
    return f"{machine}; {places[0]}" if len(places) == 1 else machine


def _cell(reading: Reading) -> dict[str, Any]:
    m = reading.m
    return {
        "id": reading.number, "artifact": m.artifact, "quantity": m.quantity, "label": label(m),
        "workload": None if m.workload is None else m.workload.label, "runtime": m.runtime, "device": m.device, "threads": m.threads,
        "dtype": m.dtype, "value": finite(reading.value.value), "text": reading.text or (count(len(m.values), "value") if m.values else ""),
        "low": finite(reading.value.low), "high": finite(reading.value.high), "interval": reading.interval, "unit": m.unit,
        "n": len(m.values), "repeats": len(set(m.repeat)), "error": m.error or "", "note": m.note,
        "higher": reading.kind.higher_is_better if m.quantity in QUANTITIES else None,
    }  # fmt: skip


def _charts(sources: Sequence[Source]) -> dict[str, Any]:
    """The charts with every variant that some report has, and the history of all."""
    drawn = [source.drawn for source in sources]
    # A run that is going on is no point of a history yet.
    followed = history([source.readings for source in sources if not source.running])
    charts = {
        kind: _chart(chart, [kinds.get(kind, {}) for kinds in [*drawn, {"history": followed}]])
        for kind, chart in CHARTS.items()
    }
    return {"charts": charts, "history": [row for variant in followed.values() for row in variant.rows]}


def _chart(chart: Chart, known: Sequence[Variants]) -> dict[str, Any]:
    variants = {name: variant for some in known for name, variant in some.items()}
    return {
        "title": chart.title, "about": chart.about, "empty": chart.empty, "columns": [list(column) for column in chart.columns],
        "variants": {name: chart.spec(variant) for name, variant in variants.items()},
        "labels": {name: variant.label for name, variant in variants.items()},
    }  # fmt: skip


def _visible(content: Any) -> Any:
    if isinstance(content, str):
        return _shown(content)
    if isinstance(content, dict):
        return {_shown(key): _visible(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_visible(value) for value in content]
    return finite(content) if isinstance(content, float) else content


@lru_cache(maxsize=65536)
def _shown(text: str) -> str:
    return visible(text, lines=True)
