"""The page as a browser and a reader would take it: parsed, not searched for strings, wherever that is possible."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from squeeze.report import charts
from squeeze.report.floor import floors
from squeeze.report.noise import warnings
from squeeze.report.page import embedded_json, render_body, render_page
from squeeze.report.schema import (
    ArtifactChecks,
    Bandwidth,
    Ceilings,
    Check,
    Cost,
    LayerRow,
    Profile,
    ProfileRow,
    Report,
    Workload,
    read_report,
)  # fmt: skip
from squeeze.report.summary import summarize

GOLDEN = Path(__file__).with_name("golden") / "schema-1.json"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>'\"&\x1b[31m\u202egpj.exe\n{{ 7*7 }}"
VOID = {"meta", "br", "img", "link", "base"}


class Parsed(HTMLParser):
    """Every element with its attributes, the text by element, and whether what was opened was closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)

    @property
    def text(self) -> str:
        shown = (piece for tag, pieces in self.texts.items() if tag not in ("script", "style") for piece in pieces)
        return " ".join(" ".join(shown).replace("\u00a0", " ").split())


@pytest.fixture(scope="module")
def golden() -> Report:
    return read_report(GOLDEN)


@pytest.fixture
def hostile(golden: Report) -> Report:
    """The golden report with a hostile text wherever one comes from outside."""
    first, second, *rest = golden.manifests
    assert second.record is not None
    layer = LayerRow(name=HOSTILE, shape=(2, 2), bits=8, sparsity=0, sqnr_db=40, note=HOSTILE)
    record = second.record.model_copy(
        update={"layers": (layer, layer), "notes": (HOSTILE,), "settings": {HOSTILE: HOSTILE}}
    )
    manifests = (first.model_copy(update={"source": HOSTILE}), second.model_copy(update={"record": record}), *rest)
    measurements = tuple(
        m.model_copy(update={"note": HOSTILE, "runtime": HOSTILE, "values": (), "repeat": (), "error": HOSTILE})
        if m.quantity == "load_time" else m
        for m in golden.measurements
    )  # fmt: skip
    check = Check(name=HOSTILE, value=math.inf, limit=1e-3, passed=False, detail=HOSTILE)
    return golden.model_copy(
        update={
            "title": HOSTILE, "manifests": manifests, "measurements": measurements, "notes": (HOSTILE,),
            "recipe": {HOSTILE: HOSTILE},
            "checks": (ArtifactChecks(artifact=HOSTILE, checks=(check,)),), "status": "failed", "error": HOSTILE,
            "environment": golden.environment.model_copy(update={"cpu": HOSTILE, "packages": {HOSTILE: HOSTILE}}),
        }
    )  # fmt: skip


def test_every_element_is_closed(golden: Report) -> None:
    assert Parsed(render_page(golden)).open == []


def test_the_page_loads_nothing_from_anywhere(golden: Report) -> None:
    page = Parsed(render_page(golden))
    loads = {"src", "srcset", "data", "action", "poster", "xlink:href", "background", "formaction"}
    assert [attrs for _, attrs in page.elements if loads & attrs.keys()] == []
    assert [attrs["href"] for _, attrs in page.elements if "href" in attrs] == ["#raw"]
    assert page.count("link") == page.count("base") == page.count("iframe") == 0
    style = "".join(page.texts["style"])
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_forbids_every_load_and_every_script_but_the_page_s_own(golden: Report) -> None:
    page = render_page(golden)
    policy = next(
        attrs["content"] for _, attrs in Parsed(page).elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for name, pattern in (("script-src", r"<script>(.*?)</script>"), ("style-src", r"<style>(.*?)</style>")):
        (content,) = re.findall(pattern, page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"


def test_no_attribute_needs_a_script_or_a_style_that_the_policy_forbids(golden: Report) -> None:
    attributes = {name for _, attrs in Parsed(render_page(golden)).elements for name in attrs}
    assert {name for name in attributes if name == "style" or name.startswith("on")} == set()


def test_the_whole_report_is_inside_and_reads_back(golden: Report, tmp_path: Path) -> None:
    (raw,) = re.findall(r'<script type="application/json" id="raw">(.*?)</script>', render_page(golden), re.DOTALL)
    (tmp_path / "report.json").write_text(raw, "utf-8")
    assert read_report(tmp_path / "report.json") == golden


def test_a_check_with_nothing_to_compare_leaves_the_embedded_json_whole(hostile: Report) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(embedded_json(hostile), parse_constant=refuse)
    assert content["checks"][0]["checks"][0]["value"] == "Infinity"


def test_hostile_names_add_no_element_and_no_script(golden: Report, hostile: Report) -> None:
    page = Parsed(render_page(hostile))
    assert page.open == []
    assert page.count("script") == Parsed(render_page(golden)).count("script") == 2
    assert page.count("img") == 0
    assert {name for _, attrs in page.elements for name in attrs if name.startswith("on")} == set()


def test_hostile_names_are_shown_as_text(hostile: Report) -> None:
    page = Parsed(render_page(hostile))
    (title,) = page.texts["h1"]
    assert (
        title == "</script><script>alert(1)</script><img src=x onerror=alert(1)>'\"&\\x1b[31m\\u202egpj.exe\\n{{ 7*7 }}"
    )


def test_no_control_or_direction_mark_is_anywhere_in_the_page(hostile: Report) -> None:
    assert set(render_page(hostile)) & set("\x1b\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200f") == set()


def test_embedded_json_has_no_character_that_html_reads(hostile: Report) -> None:
    assert set(embedded_json(hostile)) & set("<>&\u2028\u2029") == set()


def test_a_failed_run_says_so_before_anything_else(golden: Report) -> None:
    run = golden.model_copy(update={"status": "failed", "error": "outputs 1×7 differ:\n0.3 is above 0.05"})
    text = Parsed(render_page(run)).text
    assert "outputs 1×7 differ: 0.3 is above 0.05" in text
    page = render_page(run)
    assert page.index('role="alert"') < page.index('class="lead"') < page.index("<table")
    assert 'role="alert"' not in render_page(golden)


def test_failed_checks_stand_open_and_passed_ones_are_folded(golden: Report) -> None:
    checks = golden.checks[0].checks
    broken = ArtifactChecks(
        artifact="export-1-quantize", checks=(*checks, checks[0].model_copy(update={"passed": False}))
    )
    page = render_page(golden.model_copy(update={"checks": (golden.checks[0], broken)}))
    assert page.count("<details open>") == 1
    assert "1 of 11 failed" in page
    assert "all 10 passed" in page


def test_every_number_of_the_summary_is_on_the_page(golden: Report) -> None:
    text = Parsed(render_page(golden)).text
    for row in summarize(golden):
        for shown in (row.label, row.before.text, row.after.text, row.words, row.bounds, row.evidence):
            assert shown.replace("\u00a0", " ") in text


def test_artifacts_have_their_digest_short_and_whole(golden: Report) -> None:
    page = render_page(golden)
    for m in golden.manifests:
        assert f'<code title="{m.digest}">{m.digest[7:19]}</code>' in page


def test_every_layer_and_every_cell_is_listed(golden: Report) -> None:
    text = Parsed(render_page(golden)).text
    record = golden.manifests[1].record
    assert record is not None
    assert all(layer.name in text for layer in record.layers)
    assert f"{len(golden.measurements) + 3} measurements" in text


def test_sensitivities_are_a_column_where_there_are_any(golden: Report) -> None:
    assert "alone, nats" not in Parsed(render_page(golden)).text
    first, second, *rest = golden.manifests
    assert second.record is not None
    felt, *others = second.record.layers
    felt = felt.model_copy(update={"sensitivity": 0.01234, "sensitivity_unit": "nats per token"})
    record = second.record.model_copy(update={"layers": (felt, *others)})
    changed = golden.model_copy(update={"manifests": (first, second.model_copy(update={"record": record}), *rest)})
    parsed = Parsed(render_page(changed))
    assert "alone, nats per token" in parsed.text
    assert "0.012" in parsed.text
    assert parsed.open == []


def test_a_measurement_that_failed_is_shown_with_its_reason(golden: Report) -> None:
    failed = {"values": (), "repeat": (), "error": "killed by SIGKILL (out of memory?)"}
    measurements = [m.model_copy(update=failed) if m.quantity == "peak_memory" else m for m in golden.measurements]
    text = Parsed(render_page(golden.model_copy(update={"measurements": tuple(measurements)}))).text
    assert "not measured for the source: killed by SIGKILL (out of memory?)" in text


def test_a_report_of_nothing_is_a_page(golden: Report) -> None:
    empty = golden.model_copy(
        update={"manifests": (), "measurements": (), "checks": (), "notes": (), "data": {}, "recipe": {}}
    )
    page = Parsed(render_page(empty))
    assert page.open == []
    assert "Nothing was measured." in page.text


def test_a_notebook_gets_the_content_and_its_styles_without_scripts(golden: Report) -> None:
    body = Parsed(render_body(golden))
    assert (body.count("html"), body.count("script"), body.count("style")) == (0, 0, 1)
    assert golden._repr_html_() == render_body(golden)


def test_the_same_report_gives_the_same_page(golden: Report) -> None:
    assert render_page(golden) == render_page(golden)


def test_bars_start_at_zero_and_compare_by_length(golden: Report) -> None:
    disk = next(row for row in summarize(golden) if row.quantity == "weight_bytes")
    assert charts.bars(disk) == pytest.approx(
        (charts.STRIP_WIDTH, charts.STRIP_WIDTH * disk.after.value / disk.before.value)
    )


def test_every_mark_lies_inside_its_chart(golden: Report) -> None:
    rows = summarize(golden)
    axis, gains = charts.gains(rows)
    places = [place for gain in gains if gain for place in (gain.low, gain.value, gain.high)]
    assert all(0 <= place <= charts.GAIN_WIDTH for place in (axis.one, *(x for x, _ in axis.ticks), *places))
    for strip in filter(None, map(charts.strip, rows)):
        assert all(
            0 <= x <= charts.STRIP_WIDTH for x in (strip.before, strip.after, *strip.before_dots, *strip.after_dots)
        )


def test_better_lies_right_of_one_and_worse_left(golden: Report) -> None:
    rows = summarize(golden)
    axis, gains = charts.gains(rows)
    for row, gain in zip(rows, gains, strict=True):
        if gain and row.sense in ("better", "worse"):
            assert (gain.low > axis.one) == (row.sense == "better")


def test_a_layer_chart_puts_less_noise_higher() -> None:
    layers = [
        LayerRow(name=str(n), shape=(2, 2), bits=8, sparsity=0, sqnr_db=db) for n, db in enumerate((20.0, None, 45.0))
    ]
    chart = charts.layer_chart(layers)
    assert chart is not None
    assert [dot.title for dot in chart.dots] == ["0: 20.0 dB", "2: 45.0 dB"]
    assert chart.dots[0].y > chart.dots[1].y
    assert charts.layer_chart(layers[1:]) is None


def test_floors_costs_warnings_and_profiles_are_shown(make: Any) -> None:
    work = Workload(kind="fixed", batch=1, sequence=10)
    timed = make.measured(make.result, "latency", [0.1, 0.1, 0.1, 0.5], workload=work)
    ceilings = Ceilings(
        threads=2, measured="2026-11-24T00:00:00+00:00", operations={"float32": 1e9},
        bandwidth=(Bandwidth(working_set=100, bytes_per_second=1e6),),
    )  # fmt: skip
    cost = Cost(
        artifact=HOSTILE, artifact_digest=make.result.digest, parameters=1234, weight_bytes=100, read_bytes=50_000,
        operations_per_token=2e6, operations_per_pair=1e3, cache_bytes_per_token=None, arithmetic="float32",
    )  # fmt: skip
    row = ProfileRow(operator="MatMul", layer=HOSTILE, seconds=0.03, count=4)
    profile = Profile(
        artifact=HOSTILE, artifact_digest=make.result.digest, runtime="onnxruntime", threads=2, workload=work, calls=3,
        seconds=0.04, rows=(row, row.model_copy(update={"operator": "Gelu", "seconds": 0.01})),
    )  # fmt: skip
    report = make.report(timed, ceilings=ceilings, costs=(cost,), profiles=(profile,))
    page = Parsed(render_page(report))
    (near,) = floors(report)
    assert page.open == []
    assert page.count("img") == 0
    for shown in (*near.cells, *warnings(report), "1,234", "MatMul", "75.0 %", "Gelu", "25.0 %"):
        assert " ".join(shown.replace("\u00a0", " ").split()) in page.text
    assert warnings(report)


def test_without_floors_and_profiles_their_headings_are_missing(golden: Report) -> None:
    text = Parsed(render_page(golden)).text
    assert "Where the time goes" not in text
    assert "How close to this machine" not in text
