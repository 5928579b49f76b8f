"""The page for everybody: hostile names, almost no results, keyboards, screen readers, phones, paper."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from squeeze.report.schema import Report

from .conftest import KINDS, Make, Opened, opening, table

Open = Callable[..., Opened]
Write = Callable[..., Path]


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "a\u2028b",
    "\u202egnp.exe",
    "模型",
    "${alert(1)}",
    "{{ 7 * 7 }}",
    "__proto__",
]
SHOWN = {"a\u2028b": "a\\u2028b", "\u202egnp.exe": "\\u202egnp.exe"}


@pytest.fixture(scope="module")
def hostile(browser: Any, make: Make, write: Write) -> Iterator[Opened]:
    """A report for each name, which stands everywhere where a report has room for one."""
    with opening(browser) as open_file:
        yield open_file(write(*(_named(make, name) for name in HOSTILE)))


def _named(make: Make, name: str) -> Report:
    source, result = make.manifest(name), make.manifest(name + "2", extra={"made_by": "another tool"})
    cells = [
        make.measured(m, quantity, values, runtime=name, note=name)
        for m, values in ((source, (0.1,) * 5), (result, (0.2,) * 5))
        for quantity in ("latency", "peak_memory")
    ]
    cells.append(make.measured(result, "set_time", (), error=name))
    return make.report(
        (source, result), cells, title=name, recipe={"name": name}, notes=(name,), status="failed", error=name
    )


class TestForeignText:
    @pytest.mark.parametrize("number", range(len(HOSTILE)), ids=HOSTILE)
    def test_a_name_is_shown_as_it_is_and_never_run(self, hostile: Opened, number: int) -> None:
        wanted = SHOWN.get(HOSTILE[number], HOSTILE[number])
        hostile.go(report=f"{number + 1:012x}")
        hostile.drawn("memory")
        hostile.drawn("latency")
        charts = "document.querySelector('#chart-{} svg').textContent"
        hostile.until(
            f"name => {charts.format('latency')}.includes(name) && {charts.format('memory')}.includes(name)", wanted[:9]
        )
        hostile.page.locator("#recipe, #origin summary").first.click()
        hostile.page.locator("#verdicts .figure").first.click()
        assert hostile.run("() => document.querySelector('h1').firstChild.textContent") == wanted
        assert hostile.run("() => document.querySelector('#dialog h2').textContent") == wanted
        hostile.page.keyboard.press("Escape")
        counts = "['img', 'script:not([type])'].map(name => document.querySelectorAll(name).length)"
        assert hostile.run(f"() => {counts}") == [0, 3]
        assert hostile.faults == []

    def test_a_script_that_got_in_would_not_run(self, full_page: Path, browser: Any) -> None:
        context = browser.new_context()
        tab = context.new_page()
        said: list[str] = []
        tab.on("console", lambda message: said.append(message.text))
        tab.goto(full_page.as_uri())
        make = "const made = document.createElement('script'); made.textContent = 'window.ran = true'"
        tab.evaluate(f"() => {{ {make}; document.body.append(made); }}")
        ran = tab.evaluate("() => window.ran")
        context.close()
        assert ran is None
        assert any("Content Security Policy" in text for text in said)


class TestSmallPages:
    def test_no_report_at_all_is_said_with_every_file_that_was_passed_over(self, write: Write, opened: Open) -> None:
        from squeeze.dashboard.view import Skipped

        found = opened(write(skipped=[Skipped("<b>.json", "is torn\nhere")]))
        assert found.texts(".lead") == ["None of these files is a report that can be read."]
        assert table(found, "overview") == [["<b>.json", "is torn\\nhere"]]
        assert found.page.locator("section:visible").count() == 1

    def test_a_single_measurement_is_a_page(self, make: Make, write: Write, opened: Open) -> None:
        source = make.manifest("0-source")
        found = opened(write(make.report((source,), (make.measured(source, "latency", (0.25,), workload=None),))))
        assert [row[3].replace("\u00a0", " ") for row in table(found, "cells")] == ["250 ms"]
        found.drawn("latency")

    def test_a_run_without_any_result_shows_what_stopped_it(self, make: Make, write: Write, opened: Open) -> None:
        found = opened(write(make.report((), (), status="failed", error="out of memory\nat block 3")))
        assert found.texts("[role=alert]") == ["This run failed. out of memory\nat block 3"]


class TestEverybody:
    @pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 1280), ("light", 360)])
    def test_axe_finds_nothing_serious(self, full_page: Path, opened: Open, axe: str, theme: str, width: int) -> None:
        found = opened(full_page, f"#theme={theme}", viewport={"width": width, "height": 800}, reduced_motion="reduce")
        for kind in KINDS:
            found.drawn(kind)
        found.run("() => document.querySelectorAll('details').forEach(one => { one.open = true; })")
        found.page.wait_for_timeout(50)
        assert list(violations(found, axe)) == []
        found.page.locator("#verdicts .figure").nth(1).click()
        assert list(violations(found, axe, "#dialog")) == []

    @pytest.mark.parametrize("width", [320, 360, 768])
    def test_nothing_is_wider_than_the_window(self, full_page: Path, opened: Open, width: int) -> None:
        found = opened(full_page, viewport={"width": width, "height": 780})
        for kind in KINDS:
            found.drawn(kind)
        assert found.run("() => document.documentElement.scrollWidth") == width

    def test_the_keyboard_reaches_and_does_everything(self, full_page: Path, opened: Open) -> None:
        found = opened(full_page)
        found.page.keyboard.press("Tab")
        assert found.run("() => document.activeElement.textContent") == "Skip to the report"
        found.page.keyboard.press("Enter")
        assert found.run("() => document.activeElement.id") == "title"
        assert found.fragment() == {}
        found.page.get_by_role("button", name="Dark").focus()
        found.page.keyboard.press("Enter")
        assert found.run("() => [document.documentElement.dataset.theme, document.activeElement.textContent]") == [
            "dark",
            "Dark",
        ]
        found.page.locator("#verdicts thead button").first.focus()
        found.page.keyboard.press("Space")
        assert found.run("() => document.activeElement.closest('th').ariaSort") == "ascending"
        found.page.get_by_role("button", name="B: compare 0-source").focus()
        found.page.keyboard.press("Enter")
        assert found.fragment()["b"].endswith("/0-source")

    def test_a_drawn_chart_follows_the_theme_and_prints_in_light(self, full_page: Path, opened: Open) -> None:
        found = opened(full_page, "#theme=light")
        found.drawn("pareto")
        ink = "() => getComputedStyle(document.querySelector('#chart-pareto .names_marks text')).fill"
        light = found.run(ink)
        found.page.get_by_role("button", name="Dark").click()
        assert found.run(ink) != light
        found.page.emulate_media(media="print")
        assert found.run(ink) == light

    def test_it_prints_on_one_page(self, full_page: Path, opened: Open) -> None:
        found = opened(full_page)
        for kind in ("pareto", "gains", "latency", "generation"):
            found.drawn(kind)
        assert len(re.findall(rb"/Type\s*/Page\b(?!s)", found.page.pdf(prefer_css_page_size=True))) == 1


def violations(found: Opened, axe: str, part: str = "html") -> Iterator[str]:
    """What axe-core calls serious or critical, with the elements."""
    found.run(f"() => {{ {axe}; return true; }}")
    for one in found.run("part => axe.run(part, {resultTypes: ['violations']})", part)["violations"]:
        if one["impact"] in ("serious", "critical"):
            yield f"{one['id']}: {[node['html'][:160] for node in one['nodes'][:3]]}"
