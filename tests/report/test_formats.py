"""Other tools' formats carry the raw values, and no name in them does harm."""

import csv
import io
import json
from typing import Any

from squeeze.report.formats import FORMATS
from squeeze.report.markdown import to_markdown


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


def test_markdown_is_that_of_a_pull_request(make: Any) -> None:
    report = make.pair("latency", [2, 2, 2], [1, 1, 1], title="a|b <script>")
    assert FORMATS["markdown"](report) == to_markdown(report)


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
