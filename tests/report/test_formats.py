"""Other tools' formats carry the raw values, and no name in them does harm."""

import csv
import io
import json
from typing import Any

from squeeze.report.formats import FORMATS


def test_csv_has_a_line_for_each_raw_value_and_one_for_each_failure(make: Any) -> None:
    report = make.report(
        make.measured(make.source, "latency", [0.1, 0.25]), make.measured(make.result, "latency", []), title="=1+1"
    )
    rows = list(csv.DictReader(io.StringIO(FORMATS["csv"](report))))
    assert [(row["artifact"], row["repeat"], row["value"], row["error"]) for row in rows] == [
        ("export-0-source", "0", "0.1", ""), ("export-0-source", "1", "0.25", ""), ("export-1-quantize", "", "", "killed by SIGKILL"),
    ]  # fmt: skip
    assert {row["title"] for row in rows} == {"'=1+1"}, "a spreadsheet would compute it"
    assert {row["workload"] for row in rows} == {"1×128"}


def test_markdown_shows_the_verdict_and_no_name_breaks_its_table(make: Any) -> None:
    text = FORMATS["markdown"](make.pair("latency", [2, 2, 2], [1, 1, 1], title="a|b <script>"))
    assert "a\\|b &lt;script>" in text
    assert "| latency, 1×128 | 2.00\u00a0s | 1.00\u00a0s | 2.00× faster [2.00, 2.00] |" in text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("| latency")}
    assert widths <= {4, 5}


def test_pytest_benchmark_finds_its_statistics_and_the_raw_values(make: Any) -> None:
    content = json.loads(FORMATS["pytest-benchmark"](make.pair("latency", [1, 2, 3, 10], [1, 1, 1])))
    first = content["benchmarks"][0]
    assert first["name"] == "latency, 1×128 (export-0-source, onnxruntime)"
    stats = first["stats"]
    assert (stats["min"], stats["max"], stats["median"], stats["mean"], stats["rounds"]) == (1, 10, 2.5, 4, 4)
    assert (stats["data"], stats["total"], stats["ops"], stats["outliers"]) == ([1, 2, 3, 10], 16, 0.25, "1;1")
    assert {"machine_info", "commit_info", "datetime", "version"} <= set(content)


def test_github_action_keeps_what_should_grow_apart_from_what_should_shrink(make: Any) -> None:
    report = make.report(
        make.measured(make.source, "latency", [1, 3]),
        make.measured(make.source, "decode_rate", [5, 7], unit="tokens/s"),
    )
    smaller, bigger = (json.loads(FORMATS[f"github-action-{kind}"](report)) for kind in ("smaller", "bigger"))
    assert [(row["unit"], row["value"], row["range"]) for row in smaller] == [("s", 2, "± 1")]
    assert [(row["unit"], row["value"]) for row in bigger] == [("tokens/s", 6)]
