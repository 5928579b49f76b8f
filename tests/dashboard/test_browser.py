"""The page in a real browser: what it draws is what the view holds, and nothing that a report says is run."""

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from squeeze.dashboard import page

from .conftest import Make, Opened, canonical, embedded, rows_of, table

Open = Callable[..., Opened]
Write = Callable[..., Path]

DRAWN: dict[str, dict[str, Callable[[dict[str, Any]], bool]]] = {
    "pareto": {"points": lambda row: row["mark"] == "point", "links": lambda row: row["mark"] == "link"},
    "gains": {"points": lambda row: row["ratio"] is not None},
    "latency": {"lines": lambda row: row["mark"] == "value", "percentiles": lambda row: row["mark"] != "value"},
    "generation": {"points": lambda _: True},
    "load": {"points": lambda _: True},
    "memory": {"bars": lambda _: True},
    "floor": {"bars": lambda _: True},
    "time": {"bars": lambda _: True},
    "training": {"points": lambda row: row["mark"] == "value", "kept": lambda row: row["mark"] == "kept"},
    "layers": {"cells": lambda row: row["value"] is not None},
    "history": {"points": lambda _: True},
}
"""Kind -> layer -> the rows that it has a mark for."""

MARKS = """([kind, layer]) => {
  const found = [];
  const walk = (mark, inside) => {
    const here = inside || (mark.name || "").startsWith(layer + "_") || (mark.name || "") === layer;
    for (const item of mark.items || []) {
      if (item.items) item.items.forEach(child => walk(child, here));
      else if (here && mark.marktype !== "group") found.push(JSON.parse(JSON.stringify(item.datum)));
    }
  };
  walk(squeeze.views.get(kind).scenegraph().root, false);
  return found;
}"""
"""Data of the marks of one layer, from the scene that Vega drew."""


class TestCharts:
    @pytest.mark.parametrize("kind", DRAWN)
    def test_every_mark_is_a_row_and_every_row_a_mark(self, full_page: Path, full: Opened, kind: str) -> None:
        for variant, rows in list(rows_of(embedded(full_page), kind).items())[:2]:
            full.go(**{kind: variant})
            full.drawn(kind, variant)
            for layer, stands in DRAWN[kind].items():
                wanted = [row for row in rows if stands(row)]
                seen = full.run(MARKS, [kind, layer])
                kept = set(rows[0]) | {key for row in rows for key in row}
                assert canonical([{k: v for k, v in row.items() if k in kept} for row in seen]) == canonical(wanted), (
                    variant,
                    layer,
                )

    def test_every_kind_of_chart_has_something_to_draw_in_the_full_report(self, full_page: Path, opened: Open) -> None:
        found = opened(full_page)
        assert set(
            found.run("() => [...document.querySelectorAll('figure[data-kind]')].map(node => node.dataset.kind)")
        ) == set(DRAWN)

    def test_a_point_stands_for_a_path_in_the_drawing(self, full_page: Path, opened: Open) -> None:
        found = opened(full_page)
        found.drawn("pareto")
        first = next(iter(rows_of(embedded(full_page), "pareto").values()))
        assert found.page.locator("#chart-pareto svg .points_marks path").count() == len(
            [row for row in first if row["mark"] == "point"]
        )

    def test_switching_the_axis_draws_the_other_rows_and_goes_into_the_link(
        self, full_page: Path, opened: Open
    ) -> None:
        found, names = opened(full_page), list(rows_of(embedded(full_page), "pareto"))
        found.drawn("pareto")
        before = found.run(
            "() => [...document.querySelectorAll('#chart-pareto .role-axis-title')].map(node => node.textContent)"
        )
        found.page.locator("#chart-pareto select").select_option(names[-1])
        found.drawn("pareto", names[-1])
        after = found.run(
            "() => [...document.querySelectorAll('#chart-pareto .role-axis-title')].map(node => node.textContent)"
        )
        assert found.fragment() == {"pareto": names[-1]}
        assert before != after
        assert any("peak memory" in title or "throughput" in title for title in after)

    def test_the_table_behind_a_chart_holds_its_rows(self, full_page: Path, opened: Open) -> None:
        found, rows = opened(full_page), next(iter(rows_of(embedded(full_page), "generation").values()))
        found.page.locator("#chart-generation summary").click()
        found.page.locator("#chart-generation").get_by_role("button", name="as CSV").click()
        found.until("() => window.copied")
        copied = list(csv.DictReader(io.StringIO(found.run("window.copied"))))
        assert [float(line["prompt tokens"]) for line in copied] == [row["x"] for row in rows]
        assert [line["time"] for line in copied] == [row["text"] for row in rows]

    def test_a_chart_without_rows_says_why(self, make: Make, write: Write, opened: Open) -> None:
        source = make.manifest("0-source")
        path = write(make.report((source,), (make.measured(source, "latency", (0.1, 0.2, 0.3)),)))
        found, charts = opened(path), embedded(path)["charts"]
        said = found.texts("#charts .missing dd")
        assert charts["training"]["empty"] in said
        assert charts["pareto"]["empty"] in said

    def test_many_marks_are_drawn_on_a_canvas(self, tmp_path: Path, full_page: Path, opened: Open) -> None:
        view = embedded(full_page)
        rows = view["reports"][-1]["rows"]["latency"]
        name = next(iter(rows))
        value = next(row for row in rows[name] if row["mark"] == "value")
        rows[name] = [value | {"x": value["x"] * (1 + n / 4000), "y": n / 4000} for n in range(4000)]
        path = tmp_path / "many.html"
        path.write_text(page.render(view, {}), "utf-8")
        found = opened(path)
        found.drawn("latency", name)
        assert found.page.locator("#chart-latency canvas").count() == 1
        assert found.page.locator("#chart-latency svg").count() == 0


class TestTables:
    def test_the_cells_are_those_of_the_report(self, full_page: Path, opened: Open) -> None:
        found, cells = opened(full_page), embedded(full_page)["reports"][-1]["cells"]
        shown = table(found, "cells")
        assert len(shown) == len(cells)
        assert [row[3] for row in shown] == [cell["text"] or "failed" for cell in cells]

    def test_a_failed_cell_is_shown_with_its_reason(self, full_page: Path, opened: Open) -> None:
        failed = [row for row in table(opened(full_page), "cells") if row[0] == "2-broken"]
        assert [(row[3], row[-1]) for row in failed] == [("failed", "killed by SIGKILL")]

    def test_a_column_sorts_up_then_down_with_empty_values_last(self, full_page: Path, opened: Open) -> None:
        found = opened(full_page)
        values = [cell["value"] for cell in embedded(full_page)["reports"][-1]["cells"]]
        known = sorted(value for value in values if value is not None)
        for order, sort, wanted in (("ascending", "value", known), ("descending", "-value", known[::-1])):
            found.page.locator("#cells th").get_by_role("button", name="Value", exact=True).click()
            assert (
                found.run("() => document.querySelector('#cells th[aria-sort]:not([aria-sort=none])').ariaSort")
                == order
            )
            assert found.fragment() == {"sort": sort}
            found.page.locator("#cells").get_by_role("button", name="as CSV").click()
            found.until("() => window.copied")
            copied = [line["Value"] for line in csv.DictReader(io.StringIO(found.run("window.copied")))]
            assert [float(text) for text in copied[: len(known)]] == wanted
            assert set(copied[len(known) :]) == {""}
            found.run("() => { delete window.copied; }")

    def test_the_filter_keeps_the_cells_that_hold_every_word(self, full_page: Path, opened: Open) -> None:
        found = opened(full_page)
        found.page.locator("#filter").fill("quantize LATENCY 1×128")
        found.until("() => new URLSearchParams(location.hash.slice(1)).get('q')")
        assert {(row[0], row[1], row[2]) for row in table(found, "cells")} == {("1-quantize", "latency", "1×128")}
        assert found.texts("#cells .count") == [f"1 of {len(embedded(full_page)['reports'][-1]['cells'])} cells"]
        found.page.locator("#filter").fill("no such thing")
        found.until("() => document.querySelector('#cells .none')")
        assert found.texts("#cells .none") == ["No cell holds “no such thing”."]

    def test_copied_csv_equals_the_report(self, full_page: Path, opened: Open) -> None:
        found, cells = opened(full_page), embedded(full_page)["reports"][-1]["cells"]
        found.page.locator("#cells").get_by_role("button", name="as CSV").click()
        found.until("() => window.copied")
        copied = list(csv.DictReader(io.StringIO(found.run("window.copied"))))
        for name, key in (("Value", "value"), ("Low", "low"), ("High", "high")):
            assert [float(line[name]) if line[name] else None for line in copied] == [cell[key] for cell in cells]
        assert [line["Artifact"] for line in copied] == [cell["artifact"] for cell in cells]
        assert [int(line["Values"]) for line in copied] == [cell["n"] for cell in cells]

    def test_csv_keeps_quotes_and_lines_and_disarms_formulas(self, make: Make, write: Write, opened: Open) -> None:
        source = make.manifest('=HYPERLINK("x","y")')
        note = 'two\nlines, a "quote"'
        path = write(make.report((source,), (make.measured(source, "latency", (-0.5, -0.5, -0.5), note=note),)))
        found = opened(path)
        found.page.locator("#cells").get_by_role("button", name="as CSV").click()
        found.until("() => window.copied")
        (line,) = csv.DictReader(io.StringIO(found.run("window.copied"), newline=""))
        assert line["Artifact"] == "'" + source.name
        assert line["Note"] == note
        assert float(line["Value"]) == -0.5

    def test_markdown_holds_what_is_read_and_no_markup(self, make: Make, write: Write, opened: Open) -> None:
        source = make.manifest("a|b <img src=x onerror=alert(1)> *c*")
        found = opened(write(make.report((source,), (make.measured(source, "latency", (0.5, 0.5, 0.5)),))))
        found.page.locator("#cells").get_by_role("button", name="as Markdown").click()
        found.until("() => window.copied")
        lines = found.run("window.copied").splitlines()
        assert lines[2].startswith(r"| a¦b &lt;img src=x onerror=alert(1)&gt; \*c\* | ")
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
        assert "500 ms" in lines[2].replace("\u00a0", " ")

    def test_copying_works_where_the_browser_has_no_clipboard_for_files(self, full_page: Path, opened: Open) -> None:
        old = """Object.defineProperty(navigator, 'clipboard', {value: undefined});
          document.addEventListener('copy', () => { window.copied = document.activeElement.value; });"""
        found = opened(full_page, script=old)
        found.page.locator("#verdicts").get_by_role("button", name="as CSV").click()
        assert found.until("() => window.copied").startswith("Artifact,Made by,")
        assert found.texts("#said") == ["Copied 3 artifacts as CSV."]

    def test_ten_thousand_cells_are_listed_in_pages_and_filtered_whole(
        self, tmp_path: Path, full_page: Path, opened: Open
    ) -> None:
        view = embedded(full_page)
        report = view["reports"][-1]
        report["cells"] = [cell | {"note": f"number {n}"} for n in range(10_000) for cell in report["cells"][:1]]
        path = tmp_path / "large.html"
        path.write_text(page.render(view, {}), "utf-8")
        found = opened(path)
        assert len(table(found, "cells")) == 100
        found.page.locator("#cells .more button").click()
        assert len(table(found, "cells")) == 600
        found.page.locator("#filter").fill("9999")
        found.until("() => document.querySelectorAll('#cells tbody tr').length === 1")
