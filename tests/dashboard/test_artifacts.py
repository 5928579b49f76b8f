"""One sentence for each artifact, true, with its interval; and where it comes from."""

from typing import Any

import pytest

from squeeze.dashboard.artifacts import artifacts
from squeeze.dashboard.readings import Readings
from squeeze.report.schema import ArtifactChecks, Check, StageRecord, Workload

SHORT = Workload(kind="fixed", batch=1, sequence=128)
QUANTIZED = StageRecord(
    kind="quantize", settings={"scheme": "int8"}, seconds=3.0, layers=(), notes=("a note",), warnings=("beware",)
)


def rows_of(
    make: Any, *measured: tuple[str, list[float], list[float], dict[str, Any]], **changes: Any
) -> dict[str, dict[str, Any]]:
    """Key -> row, of a source and a result with some quantities each."""
    source = make.manifest("0-source")
    result = make.manifest("1-quantize", source, record=QUANTIZED)
    rows = [
        make.measured(m, quantity, values, **more)
        for quantity, before, after, more in measured
        for m, values in ((source, before), (result, after))
    ]
    return {row["key"]: row for row in artifacts(Readings("0" * 12, make.report((source, result), rows, **changes)))}


LATENCY = {"workload": SHORT}
RIGHT = {"unit": "", "repeat": ()}
BYTES = {"unit": "bytes", "repeat": ()}


def test_speed_quality_and_size_stand_in_one_sentence(make: Any) -> None:
    same = [1.0] * 80 + [0.0] * 20
    other = [1.0] * 79 + [0.0] * 19 + [1.0, 0.0]
    found = rows_of(
        make, ("latency", [3.0, 3.1, 3.2], [1.0, 1.0, 1.1], LATENCY), ("correct", same, other, RIGHT),
        ("weight_bytes", [4000.0], [1000.0], BYTES),
    )["1-quantize"]  # fmt: skip
    assert found["verdict"] == (
        "3.10× faster [2.77, 3.25] (latency, 1×128); accuracy +0.00 points [−3.00, +3.00], not distinguishable; "
        "25.0\u00a0% of the disk."
    )
    assert found["sense"] == "better"


def test_what_was_lost_and_gained_at_once_is_mixed(make: Any) -> None:
    found = rows_of(
        make,
        ("latency", [3.0, 3.1, 3.2], [1.0, 1.0, 1.1], LATENCY),
        ("correct", [1.0] * 100, [0.0] * 50 + [1.0] * 50, RIGHT),
    )["1-quantize"]
    assert "accuracy 50.00 points worse" in found["verdict"]
    assert found["sense"] == "mixed"


def test_nothing_is_called_faster_that_the_interval_does_not_show(make: Any) -> None:
    found = rows_of(make, ("latency", [1.0, 1.2, 0.9], [1.0, 0.9, 1.1], LATENCY))["1-quantize"]
    assert found["verdict"].startswith("No difference in speed shown [")
    assert found["sense"] == "same"
    few = rows_of(make, ("latency", [1.0, 1.2], [0.1, 0.1], LATENCY))["1-quantize"]
    assert "too few repeats to call (2)" in few["verdict"]
    assert few["sense"] == "unknown"


def test_a_perplexity_that_cannot_be_told_apart_is_told_with_its_interval(make: Any) -> None:
    more = {"unit": "nats", "weights": (10.0,) * 4, "repeat": ()}
    found = rows_of(make, ("negative_log_likelihood", [20.0, 30.0, 25.0, 22.0], [20.1, 29.9, 25.1, 21.9], more))[
        "1-quantize"
    ]
    assert found["verdict"].startswith("Perplexity 0.00\u00a0% [")
    assert found["verdict"].endswith("not distinguishable.")


def test_answers_that_are_all_the_same_are_unchanged_and_a_few_bytes_are_no_loss(make: Any) -> None:
    more = {"unit": "nats", "weights": (10.0,) * 4, "repeat": ()}
    almost = [20.0, 30.0, 25.0, 22.0000001]
    for quality in (
        ("correct", [1.0, 0.0, 1.0], [1.0, 0.0, 1.0], RIGHT),
        ("negative_log_likelihood", [20.0, 30.0, 25.0, 22.0], almost, more),
    ):
        found = rows_of(make, quality, ("weight_bytes", [4000.0], [4004.0], BYTES))["1-quantize"]
        assert found["verdict"].endswith(" unchanged; 100.1\u00a0% of the disk.")
        assert found["sense"] == "same"


def test_an_export_is_held_against_the_source_s_export_and_says_so(make: Any) -> None:
    record = QUANTIZED.model_copy(update={"kind": "export", "settings": {}})
    source = make.manifest("0-source")
    stage = make.manifest("1-quantize", source, record=QUANTIZED)
    exports = [make.manifest(f"export-{m.name}", m, record=record, format="onnx") for m in (source, stage)]
    every = (source, stage, *exports)
    rows = [
        make.measured(m, "latency", [v, v, v * 1.01], workload=SHORT)
        for m, v in zip(every, (4.0, 3.0, 2.0, 1.0), strict=True)
    ]
    found = {row["key"]: row["verdict"] for row in artifacts(Readings("0" * 12, make.report(every, rows)))}
    assert found["1-quantize"] == "1.33× faster [1.33, 1.33] (latency, 1×128)."
    assert found["export-0-source"] == "2.00× faster [2.00, 2.00] (latency, 1×128)."
    assert found["export-1-quantize"] == "2.00× faster [2.00, 2.00] (latency, 1×128) (against export-0-source)."


def test_load_speaks_for_speed_where_nothing_else_was_timed(make: Any) -> None:
    work = Workload(kind="closed", batch=1, callers=4)
    found = rows_of(
        make, ("throughput", [10.0, 10.0, 10.1], [20.0, 20.0, 20.2], {"workload": work, "unit": "requests/s"})
    )["1-quantize"]
    assert found["verdict"] == "2.00× faster [2.00, 2.00] (throughput, 4 callers, real texts)."


def test_the_source_and_what_was_not_measured_and_what_failed_are_said_to_be_so(make: Any) -> None:
    found = rows_of(make, ("latency", [1.0, 1.0, 1.0], [], LATENCY))
    assert found["0-source"]["verdict"] == "The source."
    assert (found["1-quantize"]["verdict"], found["1-quantize"]["sense"]) == (
        "Every measurement failed: killed by SIGKILL.",
        "failed",
    )
    assert rows_of(make)["1-quantize"]["verdict"] == "Not measured."


def test_one_failure_among_other_quantities_is_told_beside_them(make: Any) -> None:
    found = rows_of(
        make, ("latency", [3.0, 3.1, 3.2], [1.0, 1.0, 1.1], LATENCY), ("peak_memory", [1e8] * 3, [], {"unit": "bytes"})
    )["1-quantize"]
    assert found["verdict"].endswith("; peak memory failed.")
    assert found["sense"] == "better"


def test_every_artifact_says_what_made_it(make: Any) -> None:
    source = make.manifest("0-source")
    stage = make.manifest("1-quantize", source, record=QUANTIZED)
    exported = QUANTIZED.model_copy(update={"kind": "export", "settings": {}})
    export = make.manifest("export-1-quantize", stage, record=exported, format="onnx")
    peer = make.manifest("other", extra={"made_by": "another tool"})
    every = (source, stage, export, peer, make.manifest("plain"))
    stray = make.measured(make.manifest("stray"), "latency", [1.0])
    found = {row["key"]: row for row in artifacts(Readings("0" * 12, make.report(every, [stray])))}
    assert {key: row["stage"] for key, row in found.items()} == {
        "0-source": "source", "1-quantize": "quantize int8", "export-1-quantize": "export of 1-quantize (quantize int8)",
        "other": "made by another tool", "plain": "another source", "stray": "made elsewhere",
    }  # fmt: skip
    assert [key for key, row in found.items() if row["peer"]] == ["other"]
    assert {key: row["parent"] for key, row in found.items() if row["parent"]} == {
        "1-quantize": "0-source",
        "export-1-quantize": "1-quantize",
    }
    assert (found["1-quantize"]["seconds"], found["1-quantize"]["notes"], found["1-quantize"]["warnings"]) == (
        3.0,
        ["a note"],
        ["beware"],
    )
    assert "manifest is not in this report" in found["stray"]["verdict"]
    first = artifacts(Readings("0" * 12, make.report((peer,), ())))[0]
    assert first["stage"] == "source (made by another tool)"


def test_a_check_with_nothing_to_compare_has_no_value(make: Any) -> None:
    checks = (Check(name="tokens", value=float("inf"), limit=0.5, passed=False, detail="none"),)
    found = rows_of(make, checks=(ArtifactChecks(artifact="1-quantize", checks=checks),))["1-quantize"]
    assert found["checks"] == [{"name": "tokens", "value": None, "limit": 0.5, "passed": False, "detail": "none"}]


@pytest.mark.parametrize("quantity", ["cosine_to_source", "same_answer"])
def test_agreement_with_the_source_speaks_for_quality_where_nothing_else_does(make: Any, quantity: str) -> None:
    values = [1.0] * 50 if quantity == "same_answer" else [0.99, 0.98, 0.97] * 10
    found = rows_of(make, (quantity, [], values, RIGHT))["1-quantize"]
    assert "source " in found["verdict"]
    assert found["verdict"].count("[") == 1
    assert found["sense"] == "unknown", "whether that is much or little is the reader's to say"
