"""The table of a scan: as lines, as a file, as a grid."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from squeeze import console
from squeeze.errors import ReportError
from squeeze.report.page import render_page
from squeeze.report.schema import StageRecord, read_report, write_report
from squeeze.report.sensitivity_table import (
    CELL_HEIGHT,
    CELL_WIDTH,
    FAINTEST,
    LEFT,
    TOP,
    Scanned,
    SensitivityTable,
    heat,
    read_table,
    sensitivity_rows,
    write_table,
)


def scanned(layer: int | None, part: str, sparsity: float, loss: float, **changes: Any) -> Scanned:
    name = part if layer is None else f"h.{layer}.{part}.weight"
    fields = {"unit": name, "kind": "matrix", "layer": layer, "part": part, "names": (name,), "weights": 8}
    return Scanned(**{**fields, "sparsity": sparsity, "loss": loss, **changes})


def table(*rows: Scanned, **changes: Any) -> SensitivityTable:
    fields = {
        "source": "models/x",
        "task": "causal-lm",
        "criterion": "wanda",
        "pattern": "unstructured",
        "unit": "nats per token",
        "texts": 4,
    }
    return SensitivityTable(**{**fields, "rows": rows, **changes})  # fmt: skip


TABLE = table(
    scanned(0, "up", 0.3, 0.001), scanned(0, "up", 0.5, 0.1), scanned(1, "up", 0.3, 0.01), scanned(1, "up", 0.5, 0.0),
    scanned(0, "down", 0.5, 0.02),
)  # fmt: skip


def plain(text: str) -> str:
    return " ".join(text.replace("\u00a0", " ").split())


def test_a_line_for_each_unit_and_a_column_for_each_sparsity() -> None:
    columns, rows = sensitivity_rows(TABLE)
    assert [plain(name) for name in columns] == ["", "30 %", "50 %"]
    assert rows == [
        ("h.0.up.weight", "0.001", "0.1"), ("h.1.up.weight", "0.01", "0"), ("h.0.down.weight", "", "0.02"),
    ]  # fmt: skip
    assert TABLE.title == "each matrix alone pruned by wanda: nats per token lost, on 4 texts"
    heads = scanned(0, "heads", 0.5, 0.2, kind="heads", unit="h.0")
    both = table(heads, heads.model_copy(update={"kind": "neurons", "part": "neurons"}), pattern="2:4")
    assert [row[0] for row in sensitivity_rows(both)[1]] == ["h.0, heads", "h.0, neurons"]
    assert "attention heads of each layer, feed-forward neurons of each layer pruned by wanda 2:4" in both.title


def test_the_grid_has_layers_downwards_and_sparsities_of_each_part_to_the_right() -> None:
    drawn = heat(TABLE)
    assert drawn is not None
    places = [((c.x - LEFT) / CELL_WIDTH, (c.y - TOP) / CELL_HEIGHT) for c in drawn.cells]
    assert places == [(0, 0), (1, 0), (0, 1), (1, 1), (3, 0)]
    assert [text for _, text in drawn.rows] == ["layer 0", "layer 1"]
    assert [text for _, text in drawn.groups] == ["up", "down"]
    assert [plain(text) for _, text in drawn.columns] == ["30 %", "50 %"] * 2
    assert (drawn.width, drawn.height) == (LEFT + 4 * CELL_WIDTH, TOP + 2 * CELL_HEIGHT)
    middle = FAINTEST + (1 - FAINTEST) / 2
    assert [c.opacity for c in drawn.cells[:4]] == [pytest.approx(x) for x in (FAINTEST, 1.0, middle, 0.0)]
    assert plain(drawn.cells[1].title) == "h.0.up.weight, 50 %: 0.1 nats per token"
    assert heat(table()) is None
    flat = heat(table(scanned(None, "inner.weight", 0.5, 0.0)))
    assert flat is not None
    assert [text for _, text in flat.rows] == ["inner.weight"]


def test_a_table_reads_back_from_its_file(tmp_path: Path) -> None:
    write_table(TABLE, tmp_path / "table.json")
    assert read_table(tmp_path / "table.json") == TABLE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "table.json cannot be read"),
        ("{", "table.json is not whole JSON"),
        ('{"rows": []}', "is JSON but no table of sensitivities. Write one: squeeze inspect --sensitivity --out"),
        ('{"schema_version": 9, "rows": []}', "has version 9, newer than 1"),
        ('{"schema_version": 1, "rows": []}', "is no table of sensitivities: source: Field required"),
    ],
)
def test_a_file_that_is_no_table_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "table.json").write_text(content)
    with pytest.raises(ReportError, match=message):
        read_table(tmp_path / "table.json")


def test_a_table_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"nowhere/table.json cannot be written"):
        write_table(TABLE, tmp_path / "nowhere" / "table.json")


def test_a_report_keeps_the_table_and_the_page_draws_it(make: Any, tmp_path: Path) -> None:
    record = StageRecord(kind="prune", settings={}, seconds=1, layers=(), notes=(), sensitivity=TABLE)
    pruned = make.result.model_copy(update={"record": record})
    assert (
        pruned.digest
        == make.result.model_copy(update={"record": record.model_copy(update={"sensitivity": None})}).digest
    )
    found = make.report(manifests=(make.source, pruned))
    write_report(found, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == found
    page = render_page(found)
    assert len(re.findall(r"<rect [^>]*fill-opacity=", page)) == len(TABLE.rows)
    assert TABLE.title in page
    assert "<h2>Sensitivity" not in render_page(make.report())


def test_the_terminal_shows_a_scan(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_sensitivity(TABLE)
    shown = plain(capsys.readouterr().out)
    assert "h.0.up.weight 0.001 0.1" in shown


def test_the_json_is_plain() -> None:
    assert json.loads(TABLE.model_dump_json())["rows"][0]["unit"] == "h.0.up.weight"
