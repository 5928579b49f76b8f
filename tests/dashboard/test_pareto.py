"""Points with what joins them, and which of them another one makes superfluous beyond doubt."""

from typing import Any

from squeeze.dashboard.pareto import pareto
from squeeze.dashboard.readings import Readings
from squeeze.provenance import digest_bytes
from squeeze.report.schema import Manifest, StageRecord, Workload

SHORT = Workload(kind="fixed", batch=1, sequence=128)
NAME = "accuracy against latency, 1×128"


def right(share: float) -> list[float]:
    return [1.0] * round(100 * share) + [0.0] * (100 - round(100 * share))


def chart(make: Any, *points: tuple[Manifest, list[float], list[float]], name: str = NAME, **changes: Any) -> Any:
    """The variant of a report with (manifest, latencies, right answers) for each artifact."""
    rows = [
        row for manifest, seconds, answers in points for row in (
            make.measured(manifest, "latency", seconds, workload=SHORT), make.measured(manifest, "correct", answers, unit="", repeat=()),
            make.measured(manifest, "weight_bytes", [float(manifest.weight_bytes)], unit="bytes", repeat=()),
        )
    ]  # fmt: skip
    return pareto(Readings("0" * 12, make.report([m for m, _, _ in points], rows, **changes)))[name]


def standing(variant: Any) -> dict[str, bool]:
    return {row["artifact"]: row["dominated"] for row in variant.rows if row["mark"] == "point"}


def links(variant: Any) -> set[str]:
    return {row["x_text"] for row in variant.rows if row["mark"] == "link"}


def test_a_point_holds_both_values_with_their_intervals_and_its_size(make: Any) -> None:
    found = chart(make, (make.manifest("a", weight_bytes=4000), [1.0, 2.0, 4.0], right(0.5)))
    row = found.rows[0]
    assert (row["x"], row["y"], row["bytes"], row["size"]) == (2.0, 0.5, 4000, "4.00\u00a0kB")
    assert row["x_low"] < 2.0 < row["x_high"]
    assert row["y_low"] < 0.5 < row["y_high"]
    assert (found.x.better, found.y.better, found.y.unit) == ("lower", "higher", "share")


def test_what_is_shown_to_be_worse_in_one_and_no_better_in_the_other_is_dominated(make: Any) -> None:
    fast, slow = make.manifest("fast"), make.manifest("slow", inputs=digest_bytes(b"2"))
    found = chart(make, (fast, [1.0, 1.0, 1.01], right(0.8)), (slow, [2.0, 2.0, 2.01], right(0.8)))
    assert standing(found) == {"fast": False, "slow": True}
    assert [row["standing"] for row in found.rows] == ["not dominated", "dominated by fast, torch"]


def test_of_two_that_cannot_be_told_apart_neither_is_dominated(make: Any) -> None:
    one, two = make.manifest("one"), make.manifest("two", inputs=digest_bytes(b"2"))
    assert standing(chart(make, (one, [1.0, 1.3, 0.9], right(0.8)), (two, [1.1, 1.0, 1.2], right(0.79)))) == {
        "one": False,
        "two": False,
    }


def test_what_is_faster_and_worse_is_not_dominated(make: Any) -> None:
    one, two = make.manifest("one"), make.manifest("two", inputs=digest_bytes(b"2"))
    assert standing(chart(make, (one, [2.0, 2.0, 2.01], right(0.9)), (two, [1.0, 1.0, 1.01], right(0.5)))) == {
        "one": False,
        "two": False,
    }


def test_what_only_generates_is_placed_by_the_score_of_the_same_graph(make: Any) -> None:
    one, other = make.manifest("one"), make.manifest("two", inputs=digest_bytes(b"2"))
    rows = [
        row for m, scorer, timer in ((one, "onnxruntime", "onnxruntime-genai"), (other, "torch", "onnxruntime-genai")) for row in (
            make.measured(m, "decode_rate", [10.0, 10.0, 10.1], unit="tokens/s", runtime=timer),
            make.measured(m, "correct", right(0.8), unit="", repeat=(), runtime=scorer),
        )
    ]  # fmt: skip
    found = pareto(Readings("0" * 12, make.report((one, other), rows)))["accuracy against decoding speed"]
    assert [(row["artifact"], row["runtime"]) for row in found.rows] == [("one", "onnxruntime-genai")]
    assert found.rows[0]["y_text"].endswith("(in onnxruntime)")


def test_more_is_better_where_it_is_and_the_axis_knows(make: Any) -> None:
    slow, fast = make.manifest("slow"), make.manifest("fast", inputs=digest_bytes(b"2"))
    rows = [
        row for m, rate in ((slow, 10.0), (fast, 30.0)) for row in (
            make.measured(m, "decode_rate", [rate, rate, rate * 1.01], unit="tokens/s"),
            make.measured(m, "correct", right(0.8), unit="", repeat=()),
        )
    ]  # fmt: skip
    found = pareto(Readings("0" * 12, make.report((slow, fast), rows)))["accuracy against decoding speed"]
    assert standing(found) == {"slow": True, "fast": False}
    assert found.x.better == "higher"


def test_a_line_joins_each_artifact_with_the_nearest_that_it_was_made_from(make: Any) -> None:
    source = make.manifest("0-source")
    first = make.manifest("1-prune", source)
    unmeasured = make.manifest("2-distill", first)
    last = make.manifest("3-quantize", unmeasured)
    branch = make.manifest("1-other", source)
    point = ([1.0, 1.0, 1.0], right(0.5))
    rows = [
        row for m in (source, first, last, branch) for row in (
            make.measured(m, "latency", point[0], workload=SHORT), make.measured(m, "correct", point[1], unit="", repeat=()),
        )
    ]  # fmt: skip
    found = pareto(Readings("0" * 12, make.report((source, first, unmeasured, last, branch), rows)))[NAME]
    assert links(found) == {"0-source → 1-prune", "1-prune → 3-quantize", "0-source → 1-other"}


def test_exports_are_joined_along_the_chain_that_they_were_made_from(make: Any) -> None:
    record = StageRecord(kind="export", settings={}, seconds=1.0, layers=(), notes=())
    source = make.manifest("0-source")
    stage = make.manifest("1-quantize", source)
    exports = [make.manifest(f"export-{m.name}", m, record=record, format="onnx") for m in (source, stage)]
    every = (source, stage, *exports)
    assert links(chart(make, *((m, [1.0, 1.0, 1.0], right(0.5)) for m in every))) == {
        "0-source → 1-quantize", "export-0-source → export-1-quantize",
    }  # fmt: skip


def test_exports_without_their_origins_are_joined_with_the_export_of_their_source(make: Any) -> None:
    record = StageRecord(kind="export", settings={}, seconds=1.0, layers=(), notes=())
    exports = [
        make.manifest(f"export-{n}-{name}", make.manifest(f"gone{n}"), record=record, format="onnx", source=source)
        for n, name, source in ((0, "source", "m"), (1, "quantize", "m"), (2, "qat", "other"))
    ]
    assert links(chart(make, *((m, [1.0, 1.0, 1.0], right(0.5)) for m in exports))) == {
        "export-0-source → export-1-quantize"
    }


def test_an_artifact_in_another_runtime_is_another_point_and_lines_stay_in_one(make: Any) -> None:
    source = make.manifest("0-source")
    result = make.manifest("1-quantize", source)
    rows = [
        row for m, runtime in ((source, "torch"), (result, "onnxruntime")) for row in (
            make.measured(m, "latency", [1.0, 1.0, 1.0], workload=SHORT, runtime=runtime),
            make.measured(m, "correct", right(0.5), unit="", repeat=(), runtime=runtime),
        )
    ]  # fmt: skip
    found = pareto(Readings("0" * 12, make.report((source, result), rows)))[NAME]
    assert links(found) == set()
    assert len(found.rows) == 2


def test_what_another_tool_made_is_told_apart(make: Any) -> None:
    peer = make.manifest("peer", extra={"made_by": "another tool"})
    found = chart(make, (make.manifest("ours"), [1.0] * 3, right(0.5)), (peer, [1.0] * 3, right(0.5)))
    assert [row["made"] for row in found.rows] == ["squeeze", "another tool"]


def test_each_cost_is_a_variant_and_one_without_quality_is_none(make: Any) -> None:
    source = make.manifest("0-source")
    alone = pareto(
        Readings("0" * 12, make.report((source,), [make.measured(source, "latency", [1.0], workload=SHORT)]))
    )
    assert alone == {}
    assert list(pareto(Readings("0" * 12, make.full()))) == [
        "perplexity against latency, 1×128", "perplexity against time per output token, 32+16 tokens",
        "perplexity against time per output token, 128+16 tokens", "perplexity against time to first token, 32+16 tokens",
        "perplexity against time to first token, 128+16 tokens", "perplexity against weights on disk", "perplexity against peak memory",
        "perplexity against throughput, 1 caller, real texts", "perplexity against throughput, 4 callers, real texts",
    ]  # fmt: skip
