"""A results folder: one plain JSON report a run, added and never changed, and an index that can be made from them again.

Any number of processes may add at once: each writes under a name of its own, flushes, and links the file to its final name, which
fails rather than overwrite. The index is SQLite: it is in Python's standard library, one file, and our queries are small. DuckDB
would scan columns faster, for a dependency of 40 MB and folders a thousand times larger than a team's. The index is never the
only copy: it is made anew whenever it does not equal the files.
"""

import hashlib
import os
import re
import secrets
import sqlite3
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from squeeze.errors import ReportError
from squeeze.provenance import Environment, digest_json
from squeeze.report import stats
from squeeze.report.schema import Report, read_report, sync

INDEX = "index.sqlite"
SHORT = 8
"""Hex digits of the content in a file's name."""


@dataclass(frozen=True)
class Stored:
    """One report of a results folder."""

    id: str
    path: Path
    report: Report


@dataclass(frozen=True)
class HistoryRow:
    """One quantity of one run, as the index holds it."""

    run: str
    started: str
    title: str
    machine: str
    git: str | None
    quantity: str
    unit: str
    workload: str | None
    artifact: str
    runtime: str
    device: str
    threads: int | None
    dtype: str | None
    n: int
    median: float
    error: str | None


def add(report: Report, folder: Path) -> Path:
    """Add a report to a results folder, made where it is missing; the file's path. Raises ReportError where it cannot be written."""
    content = (report.model_dump_json(indent=1) + "\n").encode("utf-8")
    digest = hashlib.sha256(content).hexdigest()
    stamp = re.sub(r"[^0-9TZ]", "", report.started.replace("+00:00", "Z"))
    temporary = folder / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            path = _link(temporary, folder, f"{stamp}-{_slug(report.title)}", digest, content)
        finally:
            temporary.unlink()
        sync(folder)
    except OSError as error:
        fault = error.strerror or error
        raise ReportError(f"{folder} cannot take a report: {fault}. What stood there before is whole.") from error
    return path


def _link(temporary: Path, folder: Path, stem: str, digest: str, content: bytes) -> Path:
    """Give the file its name; a longer one where another report has the first."""
    for length in (SHORT, 16, 64):
        path = folder / f"{stem}-{digest[:length]}.json"
        try:
            os.link(temporary, path)
        except FileExistsError:
            if path.read_bytes() != content:
                continue
        return path
    raise ReportError(f"{folder} holds another report of the same name and digest as {stem}. Move it away.")


def read_all(folder: Path) -> tuple[list[Stored], list[tuple[Path, str]]]:
    """Every whole report, oldest first, and each other .json file with the reason why it is none. Hidden files are passed over."""
    found: list[Stored] = []
    skipped: list[tuple[Path, str]] = []
    for path in _files(folder):
        try:
            found.append(Stored(path.stem, path, read_report(path)))
        except ReportError as error:
            skipped.append((path, str(error)))
    return sorted(found, key=lambda stored: (stored.report.started, stored.id)), skipped


def machine_id(environment: Environment) -> str:
    """Eight hex digits that are the same for the same kind of machine, whatever its name."""
    kind: dict[str, JsonValue] = {
        "cpu": environment.cpu, "flags": list(environment.cpu_flags), "cores": environment.cores,
        "gib": round(environment.memory_bytes / 2**30), "cuda": environment.cuda,
    }  # fmt: skip
    return digest_json(kind)[7 : 7 + SHORT]


def rebuild(folder: Path) -> Path:
    """Make the index anew from the files, aside, and put it in the old one's place. Raises ReportError."""
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder. Name a results folder: --results.")
    # Looked at before the files are read: one that is added meanwhile makes the index out of date, not wrong.
    seen = _seen(folder)
    stored, _ = read_all(folder)
    fresh = folder / f".{INDEX}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with closing(sqlite3.connect(fresh)) as base, base:
            base.executescript(TABLES)
            base.executemany("INSERT INTO files VALUES (?, ?)", seen)
            for one in stored:
                base.execute(f"INSERT INTO runs VALUES ({_marks(11)})", _run(one))
                base.executemany(f"INSERT INTO measurements VALUES ({_marks(13)})", _measurements(one))
        fresh.replace(folder / INDEX)
    except (OSError, sqlite3.Error) as error:
        raise ReportError(f"{folder / INDEX} cannot be written: {error}. The reports are untouched.") from error
    finally:
        fresh.unlink(missing_ok=True)
    return folder / INDEX


def is_current(folder: Path) -> bool:
    """Whether the index was made from exactly the files that are there, by their names and sizes."""
    try:
        with closing(_open(folder)) as base:
            return sorted(base.execute("SELECT name, bytes FROM files")) == _seen(folder)
    except (OSError, sqlite3.Error):
        return False


def index(folder: Path) -> Path:
    """The index, made anew where it is missing, torn or not equal to the files."""
    return folder / INDEX if folder.is_dir() and is_current(folder) else rebuild(folder)


def history(
    folder: Path, *, quantity: str | None = None, artifact: str | None = None, workload: str | None = None,
    machine: str | None = None, title: str | None = None,
) -> list[HistoryRow]:  # fmt: skip
    """Medians of every run, oldest first; each argument that is given must be equal."""
    index(folder)
    wanted = {"quantity": quantity, "artifact": artifact, "workload": workload, "machine": machine, "title": title}
    given = {name: value for name, value in wanted.items() if value is not None}
    where = " AND ".join(f"{name} = ?" for name in given) or "1"
    columns = ", ".join(HistoryRow.__dataclass_fields__)
    query = f"SELECT {columns} FROM measurements JOIN runs ON runs.id = run WHERE {where} ORDER BY started, run, measurements.rowid"
    with closing(_open(folder)) as base:
        return [HistoryRow(*row) for row in base.execute(query, tuple(given.values()))]


def resolve(ref: str, folder: Path) -> Report:
    """The report that is meant: a path, a folder with report.json, an id of the results folder or its beginning, `latest`,
    `latest~1`. Raises ReportError that lists the newest where there is none, or those that a beginning fits.
    """
    path = Path(ref)
    if path.is_dir() and (path / "report.json").is_file():
        return read_report(path / "report.json")
    if path.is_file():
        return read_report(path)
    stored, _ = read_all(folder)
    newest = ", ".join(one.id for one in stored[:-6:-1]) or "none"
    if latest := re.fullmatch(r"latest(?:~(\d+))?", ref):
        back = int(latest[1] or 0)
        if back >= len(stored):
            raise ReportError(f"{ref} is not there: {folder} holds {len(stored)} reports. Newest: {newest}.")
        return stored[-1 - back].report
    fitting = [one for one in stored if one.id.startswith(ref)]
    exact = [one for one in fitting if one.id == ref]
    if len(exact or fitting) == 1:
        return (exact or fitting)[0].report
    if fitting:
        raise ReportError(
            f"{ref} is the beginning of {len(fitting)} ids: {', '.join(one.id for one in fitting)}. Give more of it."
        )
    raise ReportError(f"{ref} is no report, no folder that holds one, and no id in {folder}. Newest there: {newest}.")


def _run(one: Stored) -> tuple[object, ...]:
    content, report = one.path.read_bytes(), one.report
    return (
        one.id, one.path.name, len(content), hashlib.sha256(content).hexdigest(), report.title, report.started, report.status,
        machine_id(report.environment), report.environment.cpu, report.environment.git, report.environment.squeeze,
    )  # fmt: skip


def _measurements(one: Stored) -> Iterator[tuple[object, ...]]:
    for m in one.report.measurements:
        middle = stats.median(tuple(stats.by_repeat(m).values()))
        yield (
            one.id, m.quantity, m.unit, m.workload.label if m.workload else None, m.artifact, m.artifact_digest, m.runtime,
            m.device, m.threads, m.dtype, len(m.values), middle if m.values else 0.0, m.error,
        )  # fmt: skip


def _open(folder: Path) -> sqlite3.Connection:
    path = folder / INDEX
    if not path.is_file():
        raise OSError(f"{path} is missing")
    return sqlite3.connect(f"file:{path.resolve()}?mode=ro", uri=True)


def _seen(folder: Path) -> list[tuple[str, int]]:
    return sorted((path.name, path.stat().st_size) for path in _files(folder))


def _files(folder: Path) -> Sequence[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix == ".json" and not path.name.startswith("."))


def _slug(title: str) -> str:
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode("ascii").lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].strip("-") or "run"


def _marks(count: int) -> str:
    return ", ".join("?" * count)


TABLES = """
CREATE TABLE files (name TEXT PRIMARY KEY, bytes INTEGER);
CREATE TABLE runs (
    id TEXT PRIMARY KEY, file TEXT, bytes INTEGER, sha256 TEXT, title TEXT, started TEXT, status TEXT, machine TEXT, cpu TEXT,
    git TEXT, squeeze TEXT
);
CREATE TABLE measurements (
    run TEXT REFERENCES runs (id), quantity TEXT, unit TEXT, workload TEXT, artifact TEXT, artifact_digest TEXT, runtime TEXT,
    device TEXT, threads INTEGER, dtype TEXT, n INTEGER, median REAL, error TEXT
);
CREATE INDEX by_quantity ON measurements (quantity, workload, artifact);
"""
