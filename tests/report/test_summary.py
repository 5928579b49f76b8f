"""What is compared with what, and what is claimed of it: small reports whose rows can be worked out by hand."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from squeeze.provenance import digest_bytes, environment
from squeeze.report.headline import headline
from squeeze.report.schema import Manifest, Measurement, Report, Workload, read_report
from squeeze.report.summary import SummaryRow, cells, ends, pivot, shared_where, summarize

GOLDEN = Path(__file__).with_name("golden") / "schema-1.json"
DIGEST = digest_bytes(b"x")
SHORT, LONG = Workload(kind="fixed", batch=1, sequence=16), Workload(kind="fixed", batch=8, sequence=128)


def manifest(name: str, parent: Manifest | None = None) -> Manifest:
    return Manifest(
        name=name, format="onnx" if name.startswith("export-") else "torch", task="text-classification",
        source="models/x",
        files={}, parent=parent.digest if parent else None, record=None, data={}, parameters=8, nonzero_parameters=8,
        weight_bytes=8, inputs=DIGEST, environment=environment(), created="2026-11-24T00:00:00+00:00", extra={},
    )  # fmt: skip


SOURCE = manifest("0-source")
RESULT = manifest("1-quantize", SOURCE)
SOURCE_EXPORT, RESULT_EXPORT = manifest("export-0-source", SOURCE), manifest("export-1-quantize", RESULT)
CHAIN = (SOURCE, RESULT, SOURCE_EXPORT, RESULT_EXPORT)


def measured(artifact: Manifest, quantity: str, values: Sequence[float], **changes: Any) -> Measurement:
    """A measurement with one value a repeat; without values, one that failed."""
    repeated = quantity not in ("negative_log_likelihood", "correct", "same_answer", "cosine_to_source", "weight_bytes")
    runtime = "torch" if artifact.format == "torch" else "onnxruntime"
    fields: dict[str, Any] = {
        "quantity": quantity, "unit": "s", "values": tuple(values), "workload": None, "artifact": artifact.name,
        "artifact_digest": artifact.digest, "runtime": runtime, "device": "cpu", "threads": 2,
        "repeat": tuple(range(len(values))) if repeated else (), "error": None if values else "killed by SIGKILL",
    }  # fmt: skip
    return Measurement(**{**fields, **changes})


def report(*measurements: Measurement, manifests: Sequence[Manifest] = CHAIN, **changes: Any) -> Report:
    fields: dict[str, Any] = {
        "title": "a run", "recipe": {}, "manifests": tuple(manifests), "checks": (), "measurements": measurements,
        "environment": environment(), "started": "2026-11-24T00:00:00+00:00", "seconds": 1.0, "notes": (),
        "status": "ok", "error": None,
    }  # fmt: skip
    return Report(**{**fields, **changes})


def only_row(*measurements: Measurement, manifests: Sequence[Manifest] = CHAIN) -> SummaryRow:
    (row,) = summarize(report(*measurements, manifests=manifests))
    return row


def compare(quantity: str, before: Sequence[float], after: Sequence[float], **changes: Any) -> SummaryRow:
    sides = (
        measured(m, quantity, values, **changes) for m, values in ((SOURCE_EXPORT, before), (RESULT_EXPORT, after))
    )
    return only_row(*sides)


def test_the_export_of_the_result_is_compared_with_the_export_of_the_source() -> None:
    run = report(
        measured(SOURCE, "latency", [9, 9, 9]),
        measured(RESULT_EXPORT, "latency", [1, 1, 1]),
        measured(SOURCE_EXPORT, "latency", [2, 2, 2]),
    )
    (row,) = summarize(run)
    assert ends(run) == ("export-0-source", "export-1-quantize")
    assert (row.before.artifact, row.before.value, row.after.value) == ("export-0-source", 2, 1)
    assert (row.runtime, row.verdict, row.sense) == ("onnxruntime", "2.00× faster [2.00, 2.00]", "better")


def test_a_source_that_was_not_exported_stands_in_and_both_runtimes_are_named() -> None:
    row = only_row(
        measured(SOURCE, "latency", [2, 2, 2]), measured(RESULT_EXPORT, "latency", [1, 1, 1]),
        manifests=(SOURCE, RESULT, RESULT_EXPORT),
    )  # fmt: skip
    assert (row.before.artifact, row.runtime) == ("0-source", "torch → onnxruntime")


def test_without_exports_torch_is_compared_with_torch() -> None:
    run = report(
        measured(SOURCE, "latency", [1, 1, 1]), measured(RESULT, "latency", [2, 2, 2]), manifests=(SOURCE, RESULT)
    )
    assert ends(run) == ("0-source", "1-quantize")
    assert summarize(run)[0].verdict == "2.00× slower [2.00, 2.00]"


def test_two_exports_benched_without_their_chain_are_compared_in_order() -> None:
    assert ends(report(manifests=(SOURCE_EXPORT, RESULT_EXPORT))) == ("export-0-source", "export-1-quantize")


def test_the_export_of_an_earlier_stage_does_not_pass_for_the_source() -> None:
    later = manifest("2-quantize", RESULT)
    run = report(manifests=(SOURCE, RESULT, later, RESULT_EXPORT, manifest("export-2-quantize", later)))
    assert ends(run) == ("0-source", "export-2-quantize")


def test_a_run_without_stages_compares_the_export_with_what_was_exported() -> None:
    run = report(
        measured(SOURCE, "latency", [2, 2, 2]),
        measured(SOURCE_EXPORT, "latency", [1, 1, 1]),
        manifests=(SOURCE, SOURCE_EXPORT),
    )
    assert ends(run) == ("0-source", "export-0-source")
    assert summarize(run)[0].words == "2.00× faster"


def test_the_result_is_what_squeeze_made_unless_another_tool_is_held_against_the_first() -> None:
    peer = manifest("export-peer").model_copy(update={"extra": {"made_by": "another tool"}})
    assert ends(report(manifests=(*CHAIN, peer))) == ("export-0-source", "export-1-quantize")
    assert ends(report(manifests=(SOURCE_EXPORT, peer))) == ("export-0-source", "export-peer")
    assert ends(report(manifests=(peer, SOURCE_EXPORT, RESULT_EXPORT))) == ("export-peer", "export-1-quantize")


def test_artifacts_of_two_runs_with_one_name_are_told_apart_by_their_digests() -> None:
    other = RESULT_EXPORT.model_copy(update={"nonzero_parameters": 4})
    run = report(
        measured(RESULT_EXPORT, "latency", [2, 2, 2]),
        measured(other, "latency", [1, 1, 1]),
        manifests=(RESULT_EXPORT, other),
    )
    (row,) = summarize(run)
    before, after = (f"export-1-quantize ({m.digest[7:15]})" for m in (RESULT_EXPORT, other))
    assert ends(run) == (before, after)
    assert (row.before.artifact, row.after.artifact, row.words) == (before, after, "2.00× faster")
    assert pivot(cells(run))[0] == ["", f"{before}, onnxruntime", f"{after}, onnxruntime"]


def test_what_the_bench_called_them_tells_artifacts_of_one_name_apart() -> None:
    other = RESULT_EXPORT.model_copy(update={"nonzero_parameters": 4})
    names = ("eight/export-1-quantize", "four/export-1-quantize")
    rows = [
        measured(m, "latency", [v, v, v]).model_copy(update={"artifact": name})
        for m, v, name in zip((RESULT_EXPORT, other), (2, 1), names, strict=True)
    ]
    run = report(*rows, manifests=(RESULT_EXPORT, other))
    assert ends(run) == names
    assert pivot(cells(run))[0] == ["", *(f"{name}, onnxruntime" for name in names)]


def test_of_several_runtimes_the_same_one_is_compared() -> None:
    row = only_row(
        measured(SOURCE_EXPORT, "latency", [9, 9, 9]),
        measured(SOURCE_EXPORT, "latency", [2, 2, 2], runtime="onnxruntime-genai"),
        measured(RESULT_EXPORT, "latency", [1, 1, 1], runtime="onnxruntime-genai"),
    )
    assert (row.before.value, row.runtime) == (2, "onnxruntime-genai")


@pytest.mark.parametrize("change", [{"workload": LONG}, {"threads": 1}, {"device": "cuda"}])
def test_another_workload_thread_count_or_device_is_not_compared(change: dict[str, Any]) -> None:
    row = only_row(
        measured(SOURCE_EXPORT, "latency", [2, 2, 2], workload=SHORT),
        measured(RESULT_EXPORT, "latency", [1, 1, 1], **{"workload": SHORT, **change}),
    )
    assert (row.before.text, row.words, row.sense, row.gain) == ("", "not measured for the source", "unknown", None)


def test_each_workload_is_a_row_of_its_own() -> None:
    rows = summarize(
        report(
            *(
                measured(m, "latency", [1, 1, 1], workload=w)
                for m in (SOURCE_EXPORT, RESULT_EXPORT)
                for w in (SHORT, LONG)
            )
        )
    )
    assert [row.label for row in rows] == ["latency, 1×16", "latency, 8×128"]


def test_faster_is_not_said_where_the_interval_holds_one() -> None:
    row = compare("latency", [1.0, 1.2, 0.9], [1.1, 0.9, 0.8])
    assert row.sense == "same"
    assert row.verdict.startswith("no difference shown [0.")
    assert row.gain is not None
    assert row.gain.low < 1 < row.gain.high


def test_more_tokens_in_a_second_are_faster() -> None:
    row = compare("decode_rate", [50, 51, 49], [139, 140, 138], unit="tokens/s")
    assert (row.sense, row.words, row.change) == ("better", "2.78× faster", "50.0 → 139\u00a0tokens/s")


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_repeats_make_no_claim_and_say_so(count: int) -> None:
    row = compare("latency", [2.0] * count, [1.0] * count)
    assert (row.verdict, row.sense) == (f"2.00×, too few repeats to call ({count})", "unknown")


def test_a_measurement_that_failed_is_a_row_with_its_reason() -> None:
    failed = compare("latency", [2, 2, 2], [])
    assert (failed.words, failed.sense) == ("not measured for the result: killed by SIGKILL", "failed")
    assert (failed.before.value, failed.after.text) == (2, "")
    assert compare("latency", [], [2, 2, 2]).words == "not measured for the source: killed by SIGKILL"


def test_where_quality_failed_in_the_source_s_export_torch_does_not_silently_take_its_place() -> None:
    row = only_row(
        measured(SOURCE, "correct", [1, 1, 1]),
        measured(SOURCE_EXPORT, "quality", [], error="exit code 1: NaN"),
        measured(RESULT_EXPORT, "correct", [1, 1, 0]),
    )
    assert (row.words, row.sense) == ("not measured for the source: exit code 1: NaN", "failed")


def test_quality_that_failed_in_the_result_leads_the_table() -> None:
    rows = summarize(
        report(
            measured(RESULT_EXPORT, "latency", [1, 1, 1]),
            measured(RESULT_EXPORT, "quality", [], error="exit code 1: NaN"),
        )
    )
    assert [row.label for row in rows] == ["quality", "latency"]
    assert rows[0].words == "not measured for the result: exit code 1: NaN"


def losses(extra: Sequence[float]) -> SummaryRow:
    """Ten blocks of 100 tokens; `extra` is what each loses, in nats a token."""
    before = [200.0 + 10 * n for n in range(10)]
    after = [b + 100 * extra[n % len(extra)] for n, b in enumerate(before)]
    return compare("negative_log_likelihood", before, after, unit="nats", weights=(100.0,) * 10)


def test_a_small_loss_of_perplexity_is_given_in_per_cent() -> None:
    assert losses([math.log(1.0004)]).verdict == "0.040\u00a0% worse [0.040\u00a0%, 0.040\u00a0%]"
    assert losses([math.log(1.021)]).words == "2.1\u00a0% worse"
    assert losses([math.log(0.979)]).words == "2.1\u00a0% better"


def test_a_loss_that_comes_and_goes_between_blocks_is_no_difference() -> None:
    row = losses([0.01, -0.01])
    assert (row.words, row.sense) == ("no difference shown", "same")


def test_a_ruined_model_is_a_factor_worse_and_not_some_per_cent() -> None:
    assert losses([math.log(700)]).words == "700× worse"
    assert losses([1000.0]).words == "inf× worse"


def test_two_blocks_of_text_are_too_few() -> None:
    row = compare("negative_log_likelihood", [2.0, 3.0], [2.1, 3.1], unit="nats")
    assert (row.sense, row.words) == ("unknown", "+10.5\u00a0%, too few blocks to call (2)")


def test_accuracy_changes_in_points() -> None:
    before = [1.0] * 900 + [0.0] * 100
    row = compare("correct", before, [0.0] * 50 + before[50:], unit="")
    assert (row.before.text, row.after.text, row.words, row.sense) == (
        "90.00\u00a0%",
        "85.00\u00a0%",
        "5.00 points worse",
        "worse",
    )
    assert compare("correct", before, before, unit="").verdict == "no difference shown [+0.00, +0.00] points"


@pytest.mark.parametrize(
    ("answers", "note"), [((2.0,) * 4, "the result gives the same answer to every example"), ((2.0, 2, 1, 2), "")]
)
def test_a_classifier_that_only_says_one_thing_is_pointed_out(answers: tuple[float, ...], note: str) -> None:
    correct = [measured(m, "correct", [1.0, 1.0, 0.0, 1.0], unit="") for m in (SOURCE_EXPORT, RESULT_EXPORT)]
    row = only_row(*correct, measured(RESULT_EXPORT, "answer", answers, unit="", repeat=()))
    assert row.note == note


def test_the_same_answers_are_given_with_the_interval_of_a_share() -> None:
    row = only_row(measured(RESULT_EXPORT, "same_answer", [1.0] * 2990 + [0.0] * 10, unit=""))
    assert row.after.text == "99.67\u00a0%"
    assert row.bounds == "[99.39\u00a0%, 99.82\u00a0%]"
    assert (row.before.text, row.sense) == ("", "unknown")


def test_the_worst_cosine_is_shown_beside_the_mean() -> None:
    row = only_row(measured(RESULT_EXPORT, "cosine_to_source", [1.0, 0.99, 0.98, 0.85], unit=""))
    assert row.after.text == "0.9550"
    assert row.bounds.endswith("lowest 0.8500")


def test_memory_above_the_baseline_is_a_row_below_the_peak() -> None:
    rows = summarize(
        report(
            *(
                measured(SOURCE_EXPORT, q, v, unit="bytes")
                for q, v in (("peak_memory", [9e8] * 3), ("baseline_memory", [1e8] * 3))
            ),
            *(
                measured(RESULT_EXPORT, q, v, unit="bytes")
                for q, v in (("peak_memory", [3e8] * 3), ("baseline_memory", [1e8] * 3))
            ),
        )
    )
    assert [(row.label, row.words) for row in rows] == [
        ("peak memory", "33.3\u00a0% of before"),
        ("peak memory above baseline", "25.0\u00a0% of before"),
    ]


def test_bytes_on_disk_are_counted_and_have_no_interval() -> None:
    row = compare("weight_bytes", [538e6], [144e6], unit="bytes")
    assert (row.verdict, row.evidence, row.sense) == ("26.8\u00a0% of before", "counted", "better")
    assert compare("weight_bytes", [8], [8], unit="bytes").words == "the same size"


def test_repeats_that_disagree_are_called_unsteady() -> None:
    assert compare("latency", [1.0, 1.5, 2.0], [1.0, 1.0, 1.0]).note.startswith(
        "unsteady: repeats spread by ±17\u00a0%"
    )
    assert compare("latency", [1.0, 1.01, 1.0], [1.0, 1.0, 1.0]).note == ""


def test_median_spread_calls_threads_and_device_are_shown() -> None:
    row = compare("latency", [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], repeat=(0, 0, 1, 1, 2, 2))
    assert (row.before.text, row.before.spread) == ("3.50\u00a0s", "±28.6\u00a0%")
    assert (row.evidence, row.where) == ("3 repeats of 6 calls", "cpu, 2 threads")
    assert compare("latency", [1], [1], threads=None).where == "cpu, threads not pinned"


def test_where_is_shared_only_if_every_row_agrees() -> None:
    one, other = compare("latency", [1], [1]), compare("latency", [1], [1], threads=1)
    assert (shared_where([one, one]), shared_where([one, other])) == ("cpu, 2 threads", "")


def test_one_artifact_alone_is_shown_without_a_verdict() -> None:
    run = report(measured(SOURCE, "latency", [1, 1, 1]), manifests=(SOURCE,))
    (row,) = summarize(run)
    assert (row.before.text, row.after.text, row.verdict) == ("", "1.00\u00a0s", "")
    assert headline(run) == "0-source was measured alone: there is nothing to compare it with."


def test_a_report_of_nothing_has_no_rows() -> None:
    empty = report(manifests=())
    assert (summarize(empty), cells(empty), ends(empty)) == ([], [], ("", ""))
    assert headline(empty) == "Nothing was measured."


def test_a_failed_run_has_no_verdict() -> None:
    assert headline(report(status="failed", error="a check failed")).startswith("This run failed.")


def test_several_workloads_share_one_clause_of_the_headline() -> None:
    pairs = (
        (SOURCE_EXPORT, SHORT, 2.0),
        (SOURCE_EXPORT, LONG, 3.0),
        (RESULT_EXPORT, SHORT, 1.0),
        (RESULT_EXPORT, LONG, 1.0),
    )
    run = report(*(measured(m, "latency", [v] * 3, workload=w) for m, w, v in pairs))
    assert headline(run).endswith(": answers 2.00× to 3.00× faster in 2 workloads.")


def test_the_headline_counts_what_could_not_be_measured() -> None:
    run = report(measured(SOURCE_EXPORT, "latency", [1, 1, 1]), measured(RESULT_EXPORT, "latency", []))
    assert headline(run) == "export-1-quantize against export-0-source: 1 quantity could not be measured."


def test_the_headline_claims_nothing_from_one_repeat() -> None:
    run = report(
        *(measured(m, "peak_memory", [v], unit="bytes") for m, v in ((SOURCE_EXPORT, 4e8), (RESULT_EXPORT, 1e8)))
    )
    assert "peaks at 25.0\u00a0% of the memory (too few repeats to call)" in headline(run)


def test_all_cells_are_listed_compared_or_not_with_a_column_for_each() -> None:
    run = report(
        measured(SOURCE, "latency", [9, 9, 9]),
        measured(SOURCE_EXPORT, "latency", [2, 2, 2]),
        measured(RESULT_EXPORT, "latency", []),
        measured(SOURCE, "folder_bytes", [8.0], unit="bytes"),
    )
    columns, lines = pivot(cells(run))
    assert columns == ["", "0-source, torch", "export-0-source, onnxruntime", "export-1-quantize, onnxruntime"]
    assert lines == [
        ["latency", "9.00\u00a0s ±0.0\u00a0%", "2.00\u00a0s ±0.0\u00a0%", "not measured: killed by SIGKILL"],
        ["whole folder on disk", "8.00\u00a0bytes", "", ""],
    ]


def test_a_real_run_reads_as_it_should() -> None:
    run = read_report(GOLDEN)
    rows = [
        (row.label, row.change.replace("\u00a0", " "), row.verdict.replace("\u00a0", " ")) for row in summarize(run)
    ]
    assert rows == [
        ("perplexity", "14.28 → 14.37", "0.61 % worse [0.26 %, 0.97 %]"),
        ("time to first token, 128+64 tokens", "134 → 124 ms", "no difference shown [0.73, 1.47]"),
        ("decoding speed, 128+64 tokens", "51.1 → 139 tokens/s", "2.72× faster [2.43, 3.25]"),
        ("load time", "667 → 164 ms", "4.07× faster [3.91, 4.35]"),
        ("peak memory", "851 → 318 MB", "37.3 % of before [37.3 %, 37.3 %]"),
        ("peak memory above baseline", "795 → 261 MB", "32.9 % of before [32.8 %, 32.9 %]"),
        ("weights on disk", "540 → 144 MB", "26.7 % of before"),
    ]
    assert headline(run).replace("\u00a0", " ") == (
        "export-1-quantize against export-0-source: perplexity is 0.61 % worse (14.28 → 14.37); decodes 2.72× faster "
        "[2.43, 3.25]; peaks at 37.3 % of the memory; takes 26.7 % of the disk."
    )


def test_percentiles_at_rates_of_their_own_are_listed_but_not_compared(make: Any) -> None:
    sought = Workload(kind="open", batch=1, callers=2, limit_seconds=0.05)
    rows = [
        make.measured(artifact, quantity, values, workload=sought, repeat=(0, 1, 2))
        for artifact, rate in ((make.source, 10.0), (make.result, 40.0))
        for quantity, values in (("highest_rate", [rate] * 3), ("throughput", [rate] * 3), ("request_latency", [0.01, 0.02, 0.04]))
    ]  # fmt: skip
    report = make.report(*rows)
    assert [row.label for row in summarize(report)] == ["highest rate, p99 within 50 ms, real texts"]
    assert {row.label.split(",")[0] for row in cells(report)} >= {"throughput", "request p99", "highest rate"}
