"""The whole view: every report that is there and every file that is none, strict JSON, safe words, and no torch."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from squeeze.dashboard import view
from squeeze.errors import ReportError
from squeeze.report.schema import read_report, write_report
from squeeze.report.store import add
from squeeze.report.text import json_text

HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "onnxruntime_genai", "openvino", "pyarrow"}
GOLDEN = Path(__file__).parent.parent / "report" / "golden"


def titles(found: tuple[list[view.Source], list[view.Skipped]]) -> list[str]:
    return [source.report.title for source in found[0]]


def strings(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield key
            yield from strings(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from strings(value)
    elif isinstance(content, str):
        yield content


def test_files_run_folders_results_folders_and_folders_of_them_are_read_oldest_first(make: Any, tmp_path: Path) -> None:
    (tmp_path / "run" / "0-source").mkdir(parents=True)
    (tmp_path / "results" / "machine").mkdir(parents=True)
    write_report(make.report((), (), title="in a run", started="2026-01-02"), tmp_path / "run" / "report.json")
    (tmp_path / "run" / "0-source" / "config.json").write_text("{}")
    write_report(make.report((), (), title="oldest", started="2026-01-01"), tmp_path / "results" / "x.json")
    write_report(make.report((), (), title="newest", started="2026-01-03"), tmp_path / "results" / "machine" / "y.json")
    (tmp_path / "results" / ".hidden.json").write_text("{")
    assert titles(view.collect([tmp_path / "run"])) == ["in a run"]
    assert titles(view.collect([tmp_path / "run" / "report.json"])) == ["in a run"]
    assert titles(view.collect([tmp_path / "results"])) == ["oldest", "newest"]
    assert titles(view.collect([tmp_path])) == ["oldest", "in a run"], "one level of folders, not two"
    found = view.collect([tmp_path / "results", tmp_path / "run", tmp_path / "results" / "x.json"])
    assert titles(found) == ["oldest", "in a run", "newest"]
    assert found[1] == []


def test_folders_of_artifacts_are_passed_over(make: Any, tmp_path: Path) -> None:
    (tmp_path / "0-source").mkdir()
    for name in ("squeeze.json", "config.json", "tokenizer.json"):
        (tmp_path / "0-source" / name).write_text("{}")
    assert view.collect([tmp_path]) == ([], [])


def test_an_id_is_looked_up_in_the_results_folder(make: Any, tmp_path: Path) -> None:
    path = add(make.report((), (), title="kept"), tmp_path)
    assert titles(view.collect([path.stem], results=tmp_path)) == ["kept"]
    assert titles(view.collect([path.stem[:10], "latest"], results=tmp_path)) == ["kept"]


def test_a_path_that_is_not_there_is_an_error_that_lists_ids(make: Any, tmp_path: Path) -> None:
    path = add(make.report((), ()), tmp_path)
    with pytest.raises(ReportError, match=f"nowhere does not exist, and is no id in .*Newest in .*: {path.stem}"):
        view.collect(["nowhere"], results=tmp_path)


def test_what_is_no_report_is_named_with_the_reason_and_the_others_are_read(make: Any, tmp_path: Path) -> None:
    write_report(make.report((), (), title="whole"), tmp_path / "a.json")
    (tmp_path / "b.json").write_bytes((tmp_path / "a.json").read_bytes()[:-40])
    (tmp_path / "c.json").write_text('{"rows": []}')
    newer = json.loads((tmp_path / "a.json").read_text()) | {"schema_version": 99}
    (tmp_path / "d.json").write_text(json.dumps(newer))
    (tmp_path / "e.json").write_bytes((tmp_path / "a.json").read_bytes())
    (tmp_path / "f.json").write_bytes(b"\xff\xfe\x00")
    sources, skipped = view.collect([tmp_path])
    assert [source.report.title for source in sources] == ["whole"]
    reasons = {Path(one.file).name: one.reason for one in skipped}
    assert list(reasons) == ["b.json", "c.json", "d.json", "e.json", "f.json"]
    assert reasons["b.json"].startswith("is not whole JSON")
    assert reasons["c.json"].startswith("is JSON but not a squeeze report")
    assert reasons["d.json"].startswith("has schema 99, newer than")
    assert reasons["e.json"] == f"holds the same report as {tmp_path / 'a.json'}"
    assert view.build(sources, skipped)["skipped"] == [{"file": one.file, "reason": one.reason} for one in skipped]


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.name)
def test_reports_of_every_schema_are_shown(path: Path) -> None:
    found = view.build([view.Source("0" * 12, str(path), read_report(path))])
    assert found["reports"][0]["cells"]


def test_an_id_is_that_of_the_content(make: Any, tmp_path: Path) -> None:
    for name, title in (("a", "one"), ("b", "two")):
        write_report(make.report((), (), title=title), tmp_path / f"{name}.json")
    one, two = (view.source_of(tmp_path / f"{name}.json").id for name in "ab")
    (tmp_path / "b.json").replace(tmp_path / "c.json")
    assert view.source_of(tmp_path / "c.json").id == two != one
    assert len(one) == 12


def test_nothing_is_still_a_view(make: Any) -> None:
    found = view.build([])
    assert (found["title"], found["reports"], found["history"]) == ("No reports", [], [])
    assert all(chart["empty"] and chart["title"] and not chart["variants"] for chart in found["charts"].values())
    assert json.loads(json_text(found)) == found


def test_a_report_without_anything_is_shown_as_such(make: Any) -> None:
    report = view.build([view.Source("0" * 12, "a", make.report((), (), status="failed", error="no memory"))])[
        "reports"
    ][0]
    assert (report["status"], report["error"], report["artifacts"], report["cells"], report["pairs"]) == (
        "failed",
        "no memory",
        [],
        [],
        {},
    )
    assert report["ends"] == ["", ""]
    assert not any(report["rows"].values())


def test_a_view_is_json_without_nan_that_says_what_the_report_says(make: Any) -> None:
    full = make.full()
    found = view.build([view.Source("0" * 12, "results/a.json", full)])
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json_text(found))
    report = found["reports"][0]
    assert (report["title"], report["where"], report["git"]) == ("a run", "CPU X, 2 cores; cpu, 2 threads", "abc")
    assert [row["key"] for row in report["artifacts"]] == ["0-source", "1-quantize", "2-broken"]
    numbered = [cell for cell in report["cells"] if cell["id"] >= 0]
    assert len(numbered) == len(full.measurements)
    for cell, m in zip(numbered, full.measurements, strict=True):
        assert (cell["quantity"], cell["n"], cell["error"], cell["artifact"]) == (
            m.quantity,
            len(m.values),
            m.error or "",
            m.artifact,
        )


def test_a_cell_says_what_it_is_whatever_became_of_it(make: Any) -> None:
    report = view.build([view.Source("0" * 12, "a", make.full())])["reports"][0]
    failed = next(cell for cell in report["cells"] if cell["error"])
    assert (failed["value"], failed["text"], failed["interval"], failed["n"]) == (None, "", "", 0)
    timed = next(cell for cell in report["cells"] if cell["quantity"] == "latency" and cell["value"])
    assert (timed["text"], timed["n"], timed["repeats"], timed["higher"]) == ("10.0\u00a0ms", 30, 3, False)
    assert timed["low"] <= timed["value"] <= timed["high"]


def test_every_word_is_safe_to_show_and_keeps_its_meaning(make: Any) -> None:
    source = make.manifest("a\u202eb<script>", extra={"x": "\u2028"})
    report = make.report(
        [source], [make.measured(source, "latency", [], error="first\nsecond\x1b[31m")], title="标题 </script>", notes=("\u2066note",),
        recipe={"na\u202eme": "\x00"},
    )  # fmt: skip
    found = view.build([view.Source("0" * 12, "a\u202e.json", report)], [view.Skipped("b\u202e", "r\x07")])
    assert not [text for text in strings(found) if any(c in text for c in "\u202e\u2066\u2028\x1b\x00\x07")]
    shown = found["reports"][0]
    assert shown["title"] == "标题 </script>"
    assert shown["artifacts"][0]["key"] == "a\\u202eb<script>"
    assert shown["cells"][0]["error"] == "first\nsecond\\x1b[31m", "line breaks are meant"


def test_variants_of_the_charts_are_all_that_some_report_has(make: Any) -> None:
    alone = make.manifest("alone")
    other = make.report([alone], [make.measured(alone, "time_to_first_token", [1.0] * 3)], title="b")
    found = view.build([view.Source("a" * 12, "a", make.full()), view.Source("b" * 12, "b", other)])
    for report in found["reports"]:
        for kind, variants in report["rows"].items():
            assert set(variants) <= set(found["charts"][kind]["variants"])
            assert set(found["charts"][kind]["variants"]) == set(found["charts"][kind]["labels"])
    assert "time to first token" in found["charts"]["latency"]["variants"]


def test_pairs_that_are_left_out_are_counted(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pairs_left_out" not in view.build([view.Source("0" * 12, "a", make.full())])
    many = [make.manifest(f"m{n}", parameters=n) for n in range(22)]
    report = make.report(many, [make.measured(m, "weight_bytes", [1.0 + n], repeat=()) for n, m in enumerate(many)])
    found = view.build([view.Source("0" * 12, "a", report)])
    assert found["pairs_left_out"] == {"0" * 12: 22 * 21 - 400}
    assert len(found["reports"][0]["pairs"]) == 400


def test_raw_values_are_those_of_the_report_in_its_order(make: Any) -> None:
    full = make.full()
    raw = view.raw_values([view.Source("0" * 12, "a", full)])
    assert [m["values"] for m in raw["0" * 12]] == [list(m.values) for m in full.measurements]
    assert {"quantity", "values", "repeat", "warmups", "weights", "artifact", "runtime"} <= set(raw["0" * 12][0])


def test_charts_alone_are_those_of_the_whole_view(make: Any) -> None:
    sources = [view.Source("0" * 12, "a", make.full())]
    whole, charts = view.build(sources), view.build_charts(sources)
    assert charts["charts"] == whole["charts"]
    assert charts["reports"][0]["rows"] == whole["reports"][0]["rows"]


def test_a_dashboard_is_built_without_a_deep_learning_package(make: Any, tmp_path: Path) -> None:
    write_report(make.full(), tmp_path / "a.json")
    code = f"""
import json, sys
from squeeze.dashboard import images, page, view
sources, skipped = view.collect([{str(tmp_path)!r}])
found = view.build(sources, skipped)
page.render(found, view.raw_values(sources))
images.picture(found, None, "pareto", None, "svg")
print(json.dumps(list(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])) & HEAVY == set()
