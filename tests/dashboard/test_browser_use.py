"""What a reader does with the page: compares, follows links, asks for raw values, and watches it change."""

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Make, Opened, embedded, rows_of, table

Open = Callable[..., Opened]
Write = Callable[..., Path]


class TestComparison:
    def test_two_clicks_on_rows_compare_the_two(self, full_page: Path, opened: Open) -> None:
        found, report = opened(full_page), embedded(full_page)["reports"][-1]
        for place in (1, 0):
            found.page.locator("#verdicts tbody tr").nth(place).locator("td").last.click()
        assert found.fragment() == {"a": f"{report['id']}/1-quantize", "b": f"{report['id']}/0-source"}
        wanted = report["pairs"]["1-quantize|0-source"]
        assert [(row[0], row[2], row[3], row[4]) for row in table(found, "compare")] == [
            (label, before or "–", after or "–", words or "not compared")
            for label, _, before, after, words, _, _ in wanted
        ]

    def test_a_point_of_the_pareto_chart_picks_its_artifact(self, full_page: Path, opened: Open) -> None:
        found = opened(full_page)
        found.drawn("pareto")
        point = found.page.locator("#chart-pareto .points_marks path").first
        point.scroll_into_view_if_needed()
        point.click(force=True)
        found.until("() => new URLSearchParams(location.hash.slice(1)).get('a')")
        artifact = next(iter(rows_of(embedded(full_page), "pareto").values()))[0]["artifact"]
        assert found.fragment()["a"].endswith("/" + artifact)

    def test_results_of_different_reports_are_held_against_each_other(self, full_page: Path, opened: Open) -> None:
        view, found = embedded(full_page), opened(full_page)
        (first, second) = [f"{report['id']}/{report['ends'][1]}" for report in view["reports"]]
        found.page.get_by_label("Artifact A").select_option(first)
        found.page.get_by_label("Artifact B").select_option(second)
        assert [row[0] for row in table(found, "compare")] == [row[0] for row in view["across"][f"{first}|{second}"]]

    def test_a_pair_without_figures_says_why(self, full_page: Path, opened: Open) -> None:
        found, report = opened(full_page), embedded(full_page)["reports"][-1]
        found.page.get_by_label("Artifact A").select_option(f"{report['id']}/2-broken")
        found.page.get_by_label("Artifact B").select_option(f"{report['id']}/2-broken")
        assert found.texts("#compare .none") == ["A and B are the same artifact. Choose another for either."]


class TestLinks:
    def test_a_link_opens_the_view_that_it_was_copied_from(self, full_page: Path, opened: Open) -> None:
        first, view = opened(full_page), embedded(full_page)
        report = view["reports"][0]
        state = {
            "report": report["id"], "latency": list(report["rows"]["latency"])[1], "q": "latency", "sort": "-value", "theme": "dark",
            "a": f"{report['id']}/1-quantize", "b": f"{report['id']}/0-source",
        }  # fmt: skip
        first.run("state => { location.hash = new URLSearchParams(state); }", state)
        first.until("() => document.documentElement.dataset.theme === 'dark'")
        first.page.get_by_role("button", name="Copy link").click()
        link = first.until("() => window.copied")
        second = opened(full_page, "#" + link.split("#")[1])
        seen = [
            [table(one, "cells"), table(one, "compare"), one.texts("h1"), one.texts("#verdicts [aria-pressed=true]")]
            for one in (first, second)
        ]
        assert seen[0] == seen[1]
        assert second.run("() => document.documentElement.dataset.theme") == "dark"
        second.drawn("latency", state["latency"])
        assert second.page.get_by_label("Filter the cells").input_value() == "latency"

    @pytest.mark.parametrize(
        "fragment",
        [
            "#report=none&a=x/y&b=__proto__&pareto=constructor&sort=-&q=%00",
            "#%E0%A4%A",
            "#<img src=x onerror=alert(1)>",
        ],
    )
    def test_a_link_that_means_nothing_shows_the_newest_report(
        self, full_page: Path, opened: Open, fragment: str
    ) -> None:
        found = opened(full_page, fragment)
        assert found.texts("h1") == ["a run"]
        found.drawn("pareto")

    def test_another_report_is_chosen_from_a_list_that_can_be_searched(
        self, make: Make, write: Write, opened: Open
    ) -> None:
        source = make.manifest("0-source")
        cell = make.measured(source, "latency", (0.1, 0.1, 0.1))
        found = opened(
            write(
                *(
                    make.report((source,), (cell,), title=f"run-{name}", started=f"2026-11-{10 + n}T00:00:00+00:00")
                    for n, name in enumerate("abcdefghij")
                )
            )
        )
        assert found.texts("h1") == ["run-j"]
        found.page.locator("#pick").click()
        found.page.get_by_label("Filter the reports").fill("RUN-C")
        found.page.locator(".reports button").click()
        assert found.texts("h1") == ["run-c"]
        assert found.fragment() == {"report": "000000000003"}

    def test_earlier_runs_of_the_same_name_are_folded_and_found_when_searched_or_shown(
        self, make: Make, write: Write, opened: Open
    ) -> None:
        source = make.manifest("0-source")
        cell = make.measured(source, "latency", (0.1, 0.1, 0.1))
        titles = ("nightly", "nightly", "other", "nightly", "pair", "pair", "nightly")
        reports = [
            make.report((source,), (cell,), title=title, started=f"2026-11-{10 + n}T00:00:00+00:00")
            for n, title in enumerate(titles)
        ]
        found = opened(write(*reports))
        pick = found.page.locator("#pick")
        pick.click()
        assert found.texts(".reports button b") == ["nightly", "pair", "pair", "other"]
        assert found.texts(".reports summary") == ["Earlier ones of nightly (3)"]
        found.page.get_by_label("Filter the reports").fill("nightly")
        assert found.texts(".reports button b") == ["nightly"] * 4
        assert found.texts(".reports summary") == []
        found.page.get_by_label("Filter the reports").fill("")
        found.page.locator(".reports summary").click()
        found.page.locator(".reports button").filter(has_text="2026-11-11").click()
        assert found.fragment() == {"report": "000000000002"}
        pick.click()
        assert found.page.locator(".reports details[open] [aria-current]").count() == 1
        assert found.texts(".reports button b") == ["nightly"] * 4 + ["pair", "pair", "other"]


class TestRawValues:
    COUNTED = COPIED = """window.unpacked = 0; const Whole = DecompressionStream;
      window.DecompressionStream = class extends Whole { constructor(kind) { super(kind); window.unpacked += 1; } };"""

    def test_a_figure_leads_to_its_raw_values_unpacked_only_then(
        self, make: Make, full_page: Path, opened: Open
    ) -> None:
        found = opened(full_page, script=self.COUNTED)
        found.drawn("latency")
        assert found.run("window.unpacked") == 0
        found.page.locator("#filter").fill("1-quantize latency 1×128")
        found.until("() => document.querySelectorAll('#cells tbody tr').length === 1")
        found.page.locator("#cells tbody .figure").click()
        found.until("() => document.querySelector('#dialog tbody')")
        report = make.full(faster=3.0)
        (values,) = [m.values for m in report.measurements if m.quantity == "latency" and m.artifact == "1-quantize"]
        shown = [float(text) for text in found.texts("#dialog tbody td:nth-child(2)")]
        assert shown == pytest.approx(values, rel=1e-5)
        assert found.run("window.unpacked") == 1
        assert found.page.locator("#dialog circle").count() == len(values)
        found.page.keyboard.press("Escape")
        assert found.run("() => document.activeElement.className") == "figure"

    def test_an_artifact_leads_to_its_notes_and_digest(self, make: Make, full_page: Path, opened: Open) -> None:
        found = opened(full_page)
        found.page.locator("#verdicts .figure").nth(1).click()
        said = found.page.locator("#dialog").inner_text()
        assert "a stage’s note" in said
        assert make.full(faster=3.0).manifests[1].digest in said


EVERY_CHART_NEAR_IS_DRAWN = """() => [...document.querySelectorAll("figure[data-kind]")].every((figure) => {
    const { top, bottom } = figure.getBoundingClientRect();
    return figure.dataset.drawn || top > innerHeight + 500 || bottom < -500;
})"""
A_FRAME = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


class TestUpdate:
    def test_a_newer_view_is_shown_without_losing_place_focus_or_choice(self, full_page: Path, opened: Open) -> None:
        found, view = opened(full_page), embedded(full_page)
        found.page.locator("#filter").fill("latency")
        found.until("() => new URLSearchParams(location.hash.slice(1)).get('q')")
        found.drawn("pareto")
        found.page.locator("#chart-pareto summary").click()
        found.page.locator("#filter").focus()
        found.run(
            "() => { window.before = squeeze.views.get('pareto'); window.scrollTo({top: 700, behavior: 'instant'}); }"
        )
        found.until(EVERY_CHART_NEAR_IS_DRAWN)
        found.run(A_FRAME)  # in which the browser makes up for what a chart further up has moved
        report = view["reports"][-1]
        report["cells"].append(report["cells"][1] | {"label": "latency, newly measured", "id": len(report["cells"])})
        rows = report["rows"]["memory"]
        next(iter(rows.values())).pop()
        place = found.run("window.scrollY")
        found.run("view => squeeze.update(view)", view)
        assert "latency, newly measured" in [row[1] for row in table(found, "cells")]
        assert found.run(
            "() => [window.scrollY, document.activeElement.id, squeeze.views.get('pareto') === window.before]"
        ) == [place, "filter", True]
        assert found.page.locator("#chart-pareto details[open] tbody tr").count() > 0
        assert found.page.locator("#filter").input_value() == "latency"
        found.drawn("memory")
        found.until(
            "wanted => squeeze.views.get('memory').data('rows').length === wanted", len(next(iter(rows.values())))
        )

    def test_a_report_rewritten_by_its_run_stays_chosen(self, full_page: Path, opened: Open) -> None:
        view = embedded(full_page)
        first = view["reports"][0]
        found = opened(full_page, f"#report={first['id']}")
        first.update(id="feedfeedfeed", headline="now it is done")
        found.run("view => squeeze.update(view)", view)
        assert found.texts("#overview .lead") == ["now it is done"]
