"""Arrays on disk, a few rows for each example, that are filled once, survive kill -9 and are read memory-mapped by any number of processes.

A store is a folder: `store.json` (what it holds, and for whom), one `.npy` file for each column, `progress.jsonl` (one line for each chunk
that stands, with the CRC-32 of its bytes in every column) and, once all is there, `complete.json`. Examples lie in the order in which they
are filled, longest first: chunks are then contiguous and files only grow, and a file cut short is shorter than its header says, so that
nothing reads it as a whole one. The rows of an example are found from the lengths of the examples alone. No padding is stored.

A chunk is written first and recorded after. Whoever goes on checks what is recorded, cuts off what is not, and computes the rest in the
same chunks: the bytes are those of an undisturbed filling. A whole store is checked each time it is opened.

The lock lies beside the store and is the kernel's (flock), released when its holder dies: shared by readers, so that no one removes what
they map, and held alone by the one who fills.
"""

import contextlib
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from squeeze.errors import TrainError
from squeeze.report.files import sync, write_atomically

RECORD, PROGRESS, COMPLETE = "store.json", "progress.jsonl", "complete.json"
PIECE = 1 << 24
"""Bytes that are checked at once."""

Per = Literal["text", "token", "place"]
"""Rows of an example: one; one for each token; one for each token that another one follows."""


@dataclass(frozen=True)
class Column:
    """One array: what a row of it is, and how many rows an example has."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    per: Per

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))

    def size(self, lengths: NDArray[np.int64]) -> int:
        """Bytes for examples of these lengths, the file's header aside."""
        return self.row_bytes * int(rows_of(lengths, self.per).sum())


def rows_of(lengths: NDArray[np.int64], per: Per) -> NDArray[np.int64]:
    """Rows that each example has."""
    if per == "text":
        return np.ones_like(lengths)
    return lengths if per == "token" else lengths - 1


class Store:
    """See the module. Examples are known by their numbers, `slots` say where in the store each lies."""

    def __init__(self, folder: Path, lengths: NDArray[np.int64], columns: tuple[Column, ...], tokens: int) -> None:
        """`tokens`: the padded tokens that a chunk has at most, unless a single example has more."""
        self.folder, self.columns, self.tokens = folder, columns, tokens
        self.order = np.argsort(-lengths, kind="stable")
        self.lengths = lengths
        self.slots = np.empty_like(self.order)
        self.slots[self.order] = np.arange(len(self.order))
        self.starts = {
            per: np.concatenate([[0], np.cumsum(rows_of(lengths[self.order], per))])
            for per in ("text", "token", "place")
        }
        self.chunks = self._cut()
        """First and end slot of every chunk."""
        self._arrays: dict[str, NDArray[Any]] = {}

    @staticmethod
    def of(folder: Path, lengths: NDArray[np.int64]) -> "Store":
        """The store in a folder as its own record tells it. Raises ValueError for a record that is not one."""
        record = read_record(folder)
        if record is None or record.get("examples") != len(lengths):
            raise ValueError(f"{folder} holds no store of {len(lengths)} examples")
        columns = tuple(Column(c["name"], c["dtype"], tuple(c["shape"]), c["per"]) for c in record["columns"])
        return Store(folder, lengths, columns, int(record["tokens"]))

    @property
    def size(self) -> int:
        """What the columns take when all is there."""
        return sum(column.size(self.lengths) for column in self.columns)

    def _cut(self) -> list[tuple[int, int]]:
        found, at = [], 0
        while at < len(self.order):
            end = min(len(self.order), at + max(1, self.tokens // int(self.lengths[self.order[at]])))
            found.append((at, end))
            at = end
        return found

    def begin(self, record: Mapping[str, Any]) -> int:
        """Make ready for filling; the chunks that stand already. What is there of them in part is cut off.

        A store whose record says another thing, or one that was whole and is damaged, is begun anew in new files: whoever maps the old
        ones keeps them.
        """
        columns = [asdict(column) for column in self.columns]
        whole = {**record, "examples": len(self.order), "tokens": self.tokens, "columns": columns}
        plain = json.loads(json.dumps(whole))
        usable = read_record(self.folder) == plain and not (self.folder / COMPLETE).exists()
        standing = self._standing() if usable else 0
        if not standing:
            remove(self.folder)
            self.folder.mkdir(parents=True)
            for column in self.columns:
                self._file(column).write_bytes(self._header(column))
            (self.folder / PROGRESS).touch()
            write_atomically(self.folder / RECORD, json.dumps(plain, indent=1) + "\n")
            return 0
        text = (self.folder / PROGRESS).read_bytes().split(b"\n")
        with (self.folder / PROGRESS).open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in text[:standing]))
        end = self.chunks[standing - 1][1]
        for column in self.columns:
            os.truncate(self._file(column), self._place(column, end))
        return standing

    def append(self, chunk: int, rows: Mapping[str, NDArray[Any]]) -> None:
        """Write the rows of a chunk, then record that they stand."""
        a, b = self.chunks[chunk]
        sums = {}
        for column in self.columns:
            array = np.ascontiguousarray(rows[column.name])
            expected = (int(self.starts[column.per][b] - self.starts[column.per][a]), *column.shape)
            if array.dtype != np.dtype(column.dtype) or array.shape != expected:
                raise ValueError(f"{column.name}: {array.dtype} {array.shape} in place of {column.dtype} {expected}")
            content = array.tobytes()
            with self._file(column).open("ab", buffering=0) as file:
                left = memoryview(content)
                while left:
                    left = left[file.write(left) :]
            sums[column.name] = zlib.crc32(content)
        with (self.folder / PROGRESS).open("ab", buffering=0) as file:
            file.write((json.dumps({"chunk": chunk, "crc": sums}) + "\n").encode())

    def finish(self, **facts: Any) -> None:
        """Say that all is there, once it is on the disk."""
        for column in self.columns:
            sync(self._file(column))
        sync(self.folder / PROGRESS)
        write_atomically(self.folder / COMPLETE, json.dumps(facts) + "\n")

    def facts(self) -> dict[str, Any] | None:
        """What `finish` was told; None for a store that is not there, not whole, or not as it was written."""
        try:
            found = json.loads((self.folder / COMPLETE).read_bytes())
        except (OSError, ValueError):
            return None
        sizes = all(
            self._file(c).is_file() and self._file(c).stat().st_size == self._place(c, len(self.order))
            for c in self.columns
        )
        return dict(found) if sizes and self._standing() == len(self.chunks) else None

    def read(self, name: str, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """The rows of these examples, one after another: a copy."""
        column = next(c for c in self.columns if c.name == name)
        if name not in self._arrays:
            empty = self.starts[column.per][-1] == 0
            self._arrays[name] = np.load(self._file(column), mmap_mode=None if empty else "r", allow_pickle=False)
        starts, slots = self.starts[column.per], self.slots[numbers]
        if column.per == "text":
            return np.asarray(self._arrays[name][slots])
        pieces = [self._arrays[name][starts[slot] : starts[slot + 1]] for slot in slots]
        return np.concatenate(pieces)

    def _file(self, column: Column) -> Path:
        return self.folder / f"{column.name}.npy"

    def _header(self, column: Column) -> bytes:
        from io import BytesIO

        shape = (int(self.starts[column.per][-1]), *column.shape)
        out = BytesIO()
        npy.write_array_header_1_0(out, {"descr": column.dtype, "fortran_order": False, "shape": shape})
        return out.getvalue()

    def _place(self, column: Column, slot: int) -> int:
        """Where the rows of a slot begin in the file."""
        return len(self._header(column)) + column.row_bytes * int(self.starts[column.per][slot])

    def _standing(self) -> int:
        """How many chunks from the first on are recorded and have the bytes that were recorded."""
        with contextlib.ExitStack() as stack:
            try:
                lines = (self.folder / PROGRESS).read_bytes().split(b"\n")[:-1]
                files = [(column, stack.enter_context(self._file(column).open("rb"))) for column in self.columns]
            except OSError:
                return 0
            if any(file.read(len(header := self._header(column))) != header for column, file in files):
                return 0
            for number, ((a, b), line) in enumerate(zip(self.chunks, lines, strict=False)):
                try:
                    record = json.loads(line)
                    sums = record["crc"] if record["chunk"] == number else {}
                except (ValueError, KeyError, TypeError):
                    return number
                for column, file in files:
                    if _crc(file, self._place(column, b) - self._place(column, a)) != sums.get(column.name):
                        return number
            return min(len(lines), len(self.chunks))


def _crc(file: Any, count: int) -> int | None:
    """Checksum of the next bytes; None where there are fewer."""
    total = 0
    while count:
        piece = file.read(min(count, PIECE))
        if not piece:
            return None
        total, count = zlib.crc32(piece, total), count - len(piece)
    return total


def read_record(folder: Path) -> dict[str, Any] | None:
    """What the store in a folder says of itself; None where there is none."""
    try:
        found = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def remove(folder: Path) -> None:
    """Remove a store, whole or not; one that is not there is removed already. Raises TrainError where the folder holds anything else."""
    if not folder.exists():
        return
    names = [path.name for path in folder.iterdir()]
    if other := [n for n in names if not n.endswith(".npy") and not n.startswith((RECORD, PROGRESS, COMPLETE))]:
        raise TrainError(f"{folder} holds {other[0]}, which is no part of a teacher's answers. Move it away.")
    shutil.rmtree(folder)


def stores(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every store in a folder with its record, the one that was begun first in front."""
    found = [(path, record) for path in root.iterdir() if path.is_dir() and (record := read_record(path)) is not None]
    yield from sorted(found, key=lambda pair: (pair[0] / RECORD).stat().st_mtime)


class Lock:
    """One lock file: held together with other readers, alone, or not at all. It stays when it is closed, empty."""

    def __init__(self, path: Path) -> None:
        self._file: int | None = None
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def take(self, *, alone: bool, wait: bool) -> bool:
        """Change what is held; False where others hold it and `wait` is not said. Then nothing is held."""
        assert self._file is not None
        kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        try:
            fcntl.flock(self._file, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Let go."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        self.close()
