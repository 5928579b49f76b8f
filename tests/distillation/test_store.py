"""Stores that are cut off, torn, damaged and asked for rows in any order."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squeeze.distillation.store import COMPLETE, PROGRESS, RECORD, Column, Lock, Store, remove, stores
from squeeze.errors import TrainError
from squeeze.provenance import Digest, digest_file

LENGTHS = np.array([3, 9, 1, 4, 4, 2, 7, 1], np.int64)
COLUMNS = (
    Column("text", "<f4", (2,), "text"),
    Column("token", "<u2", (), "token"),
    Column("place", "|i1", (3,), "place"),
)


def store(folder: Path) -> Store:
    return Store(folder, LENGTHS, COLUMNS, tokens=9)


def rows(number: int) -> dict[str, np.ndarray[Any, Any]]:
    """What example `number` has, told from its number alone."""
    n = int(LENGTHS[number])
    return {
        "text": np.array([[number, number + 0.5]], "<f4"),
        "token": (100 * number + np.arange(n)).astype("<u2"),
        "place": np.stack([np.full(n - 1, number), np.arange(n - 1), np.zeros(n - 1)], axis=-1).astype("|i1"),
    }


def fill(target: Store, chunks: int | None = None, record: dict[str, Any] | None = None) -> int:
    """Fill to the end, or some chunks; how many stood before."""
    standing = target.begin(record or {"key": {}})
    end = len(target.chunks) if chunks is None else min(standing + chunks, len(target.chunks))
    for chunk in range(standing, end):
        found = [rows(n) for n in target.order[slice(*target.chunks[chunk])]]
        target.append(chunk, {name: np.concatenate([one[name] for one in found]) for name in found[0]})
    if end == len(target.chunks):
        target.finish(seconds=1.0)
    return standing


def digests(folder: Path) -> dict[str, Digest]:
    return {path.name: digest_file(path) for path in sorted(folder.iterdir())}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    fill(store(tmp_path / "whole"))
    return tmp_path / "whole"


def test_rows_come_back_in_the_order_that_is_asked(whole: Path) -> None:
    found = Store.of(whole, LENGTHS)
    assert found.facts() == {"seconds": 1.0}
    for numbers in ([0], [6, 2, 1], [7, 7, 3]):
        for name in ("text", "token", "place"):
            expected = np.concatenate([rows(n)[name] for n in numbers])
            np.testing.assert_array_equal(found.read(name, np.array(numbers)), expected)


def test_files_are_plain_npy_without_padding(whole: Path) -> None:
    tokens = np.load(whole / "token.npy")
    assert tokens.shape == (LENGTHS.sum(),)
    np.testing.assert_array_equal(np.sort(tokens), np.sort(np.concatenate([rows(n)["token"] for n in range(8)])))
    assert Store.of(whole, LENGTHS).size == 8 * 8 + 31 * 2 + (31 - 8) * 3


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_filling_that_was_cut_goes_on_where_it_was(tmp_path: Path, whole: Path, chunks: int) -> None:
    target = store(tmp_path / "cut")
    fill(target, chunks)
    assert target.facts() is None
    assert fill(target) == chunks
    assert digests(tmp_path / "cut") == digests(whole)


@pytest.mark.parametrize("harm", ["half a chunk", "unrecorded", "half a line", "flipped", "no file", "short header"])
def test_what_is_torn_is_computed_again(tmp_path: Path, whole: Path, harm: str) -> None:
    folder = tmp_path / "torn"
    fill(store(folder), 3)
    token, progress = folder / "token.npy", folder / PROGRESS
    expected = 2
    if harm == "half a chunk":
        token.write_bytes(token.read_bytes()[:-1])
    elif harm == "unrecorded":
        expected = 3
        for name in ("text", "token"):
            with (folder / f"{name}.npy").open("ab") as file:
                file.write(b"garbage of a chunk that never was recorded")
    elif harm == "half a line":
        progress.write_bytes(progress.read_bytes()[:-5])
    elif harm == "flipped":
        content = bytearray(token.read_bytes())
        content[-1] ^= 1
        token.write_bytes(bytes(content))
    elif harm == "no file":
        expected = 0
        token.unlink()
    else:
        expected = 0
        token.write_bytes(token.read_bytes()[:20])
    assert fill(store(folder)) == expected
    assert digests(folder) == digests(whole)


@pytest.mark.parametrize("name", ["text.npy", "token.npy", "place.npy", PROGRESS])
def test_a_whole_store_that_changed_is_not_read_but_begun_anew(tmp_path: Path, whole: Path, name: str) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(whole, folder)
    reader = Store.of(folder, LENGTHS)
    before = reader.read("token", np.arange(8))
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 4
    (folder / "changed").write_bytes(bytes(content))
    (folder / "changed").rename(folder / name)
    assert Store.of(folder, LENGTHS).facts() is None
    assert fill(store(folder)) == 0
    assert digests(folder) == digests(whole)
    np.testing.assert_array_equal(reader.read("token", np.arange(8)), before)


def test_another_record_or_other_columns_begin_anew(tmp_path: Path) -> None:
    fill(store(tmp_path / "a"), 3)
    assert fill(store(tmp_path / "a"), 0, {"key": {"teacher": "another"}}) == 0
    fill(store(tmp_path / "a"), 3)
    wider = Store(tmp_path / "a", LENGTHS, (Column("text", "<f4", (3,), "text"),), tokens=9)
    assert wider.begin({"key": {}}) == 0
    assert json.loads((tmp_path / "a" / RECORD).read_text())["columns"][0]["shape"] == [3]


def test_rows_of_another_shape_are_refused(tmp_path: Path) -> None:
    target = store(tmp_path / "a")
    target.begin({"key": {}})
    (a, b) = target.chunks[0]
    assert (a, b) == (0, 1)
    found = rows(int(target.order[0]))
    with pytest.raises(ValueError, match="token: uint16 .8,. in place of <u2 .9,."):
        target.append(0, {**found, "token": found["token"][:-1]})


def test_a_store_of_other_examples_is_not_opened(whole: Path) -> None:
    with pytest.raises(ValueError, match="no store of 7 examples"):
        Store.of(whole, LENGTHS[:-1])
    assert [path for path, _ in stores(whole.parent)] == [whole]


def test_one_text_of_one_token_has_no_place(tmp_path: Path) -> None:
    target = Store(tmp_path / "one", np.array([1]), (Column("place", "<u2", (4,), "place"),), tokens=9)
    target.begin({"key": {}})
    target.append(0, {"place": np.empty((0, 4), "<u2")})
    target.finish()
    assert target.facts() == {}
    assert target.read("place", np.array([0])).shape == (0, 4)


def test_removing_spares_what_is_not_a_stores(whole: Path) -> None:
    (whole / "letter.txt").write_text("mine")
    with pytest.raises(TrainError, match="letter.txt, which is no part"):
        remove(whole)
    assert (whole / COMPLETE).exists()
    (whole / "letter.txt").unlink()
    remove(whole)
    remove(whole)
    assert not whole.exists()


def test_locks_are_shared_or_held_alone(tmp_path: Path) -> None:
    one, two = Lock(tmp_path / "l"), Lock(tmp_path / "l")
    assert one.take(alone=False, wait=False)
    assert two.take(alone=False, wait=False)
    assert not one.take(alone=True, wait=False)
    two.close()
    assert one.take(alone=True, wait=False)
    three = Lock(tmp_path / "l")
    assert not three.take(alone=False, wait=False)
    one.close()
    assert three.take(alone=False, wait=False)
    three.close()
