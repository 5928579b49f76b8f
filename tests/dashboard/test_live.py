"""The served page in a real browser, while results come in: it changes without being loaded again, and asks its own server alone."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from squeeze.report.schema import write_report

from .conftest import Make, Opened, listen, table
from .test_running import Run
from .test_serve import SOON, Served, serving

Visit = Callable[[Served], Opened]


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    """Opens a served page. Errors, warnings and requests to anybody else are faults, and so is a second loading."""
    contexts: list[Any] = []
    every: list[Opened] = []

    def open_page(served: Served) -> Opened:
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        contexts.append(context)
        found = Opened(context.new_page())
        every.append(found)
        listen(found, lambda asked: asked.startswith(served.address))
        found.page.goto(served.address)
        found.until("() => window.squeezeReady")
        found.page.on("load", lambda: found.faults.append("loaded again"))
        return found

    yield open_page
    faults = [one.faults for one in every]
    for context in contexts:
        context.close()
    assert faults == [[] for _ in every]


def soon(found: Opened, script: str, argument: Any = None) -> None:
    """Wait until it is true. Raises AssertionError where that takes longer than a reader is promised."""
    began = time.monotonic()
    found.until(script, argument)
    assert time.monotonic() - began < SOON


def test_stages_and_cells_appear_as_they_finish_and_the_end_takes_their_place(
    make: Make, tmp_path: Path, visit: Visit
) -> None:
    going, source, result = Run(tmp_path / "run", make), make.manifest("0-source"), make.manifest("1-quantize")
    with serving(going.folder) as served:
        found = visit(served)
        soon(found, "() => document.getElementById('live').textContent === 'live'")
        assert found.texts("#overview .lead") == ["Running: starting."]
        going.file.progress("quantize int8: block 1 of 30", 2, 6)
        soon(found, "() => document.querySelector('#overview .lead').textContent.includes('block 1 of 30 (2 of 6)')")
        going.finish(source)
        soon(found, "() => document.getElementById('verdicts').innerText.includes('0-source')")
        assert "1-quantize" not in found.page.locator("#verdicts").inner_text()
        going.finish(source, result)
        soon(found, "() => document.getElementById('verdicts').innerText.includes('1-quantize')")
        going.child("a", [make.measured(source, "latency", [0.1, 0.1, 0.1])])
        soon(found, "() => document.querySelectorAll('#cells tbody tr').length === 1")
        going.child("b", [make.measured(result, "latency", [0.05, 0.05, 0.05])])
        soon(found, "() => document.querySelectorAll('#cells tbody tr').length === 2")
        assert "running" in found.page.locator("#overview").inner_text().lower()
        write_report(make.full(title="live"), going.folder / "report.json")
        going.file.remove()
        soon(found, "() => !document.querySelector('#overview .lead').textContent.startsWith('Running')")
        assert len(table(found, "cells")) > 2
        assert "running" not in found.texts("#overview .pill")
        assert found.texts("h1") == ["live"]


def test_what_a_reader_chose_stays_while_cells_come_in(make: Make, tmp_path: Path, visit: Visit) -> None:
    going, source = Run(tmp_path / "run", make), make.manifest("0-source")
    going.finish(source)
    going.child("a", [make.measured(source, "latency", [0.1] * 3), make.measured(source, "load_time", [1.0] * 3)])
    with serving(going.folder) as served:
        found = visit(served)
        found.page.locator("#filter").fill("load")
        found.until("() => document.querySelectorAll('#cells tbody tr').length === 1")
        report = found.run("() => squeeze.view.reports[0].id")
        going.child("b", [make.measured(source, "load_time", [2.0], runtime="onnxruntime")])
        soon(found, "() => document.querySelectorAll('#cells tbody tr').length === 2")
        assert found.page.locator("#filter").input_value() == "load"
        assert found.run("() => document.activeElement.id") == "filter"
        assert found.run("() => squeeze.view.reports[0].id") == report


def test_raw_values_are_asked_for_when_a_reader_asks_and_are_the_newest(
    make: Make, tmp_path: Path, visit: Visit
) -> None:
    going, source = Run(tmp_path / "run", make), make.manifest("0-source")
    going.finish(source)
    going.child("a", [make.measured(source, "latency", [0.125] * 3)])
    with serving(going.folder) as served:
        found = visit(served)
        asked: list[str] = []
        found.page.on("request", lambda request: asked.append(request.url))
        going.child("b", [make.measured(source, "latency", [0.25], repeat=(3,))])
        soon(found, "() => squeeze.view.reports[0].cells[0].n === 4")
        assert served.address + "raw" not in asked
        found.page.locator("#cells tbody .figure").first.click()
        found.until("() => document.querySelectorAll('#dialog tbody tr').length === 4")
        assert [float(text) for text in found.texts("#dialog tbody td:nth-child(2)")] == [0.125, 0.125, 0.125, 0.25]
        assert asked.count(served.address + "raw") == 1


def test_a_hostile_run_shows_its_names_and_runs_nothing(make: Make, tmp_path: Path, visit: Visit) -> None:
    name = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
    going = Run(tmp_path / "run", make, title=name)
    with serving(going.folder) as served:
        found = visit(served)
        found.page.on("dialog", lambda dialog: (found.faults.append("dialog"), dialog.dismiss()))
        assert found.texts("h1") == [f"{name} running"]
        going.file.progress(name, 1, 2)
        soon(found, "name => document.querySelector('#overview .lead').textContent.includes(name)", name)
        assert found.page.locator("img").count() == 0


def test_a_server_that_ends_is_said_on_the_page(make: Make, tmp_path: Path, browser: Any) -> None:
    write_report(make.full(), tmp_path / "report.json")
    page = browser.new_context().new_page()
    with serving(tmp_path) as served:
        page.goto(served.address)
        page.wait_for_function("() => document.getElementById('live').textContent === 'live'", timeout=20_000)
    page.wait_for_function("() => document.getElementById('live').textContent === 'connection lost'", timeout=20_000)
    assert page.locator("#cells tbody tr").count() > 10, "what was there stays"
    page.context.close()
