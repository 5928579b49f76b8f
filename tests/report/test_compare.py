"""Two reports: what was measured in turn pairs up, what was not claims less, and another machine claims nothing."""

from typing import Any

import pytest

from squeeze.errors import ReportError
from squeeze.report.compare import compare


def later(make: Any, **changes: Any) -> Any:
    return make.pair("latency", [4, 4, 4], [1.5, 1.5, 1.5], started="2026-11-25T00:00:00+00:00", **changes)


def test_two_artifacts_of_one_run_pair_up(make: Any) -> None:
    run = make.pair("latency", [2, 4, 8], [1, 2, 4])
    found = compare(run, run, before_artifact="export-0-source", after_artifact="export-1-quantize")
    assert [(row.words, row.bounds) for row in found.rows] == [("2.00× faster", "[2.00, 2.00]")]
    assert found.warnings == ()


def test_two_runs_do_not_pair_up_and_the_reader_is_told(make: Any) -> None:
    before, after = make.pair("latency", [9, 9, 9], [1.0, 1.1, 0.9]), later(make)
    found = compare(before, after)
    assert found.rows[0].words == "1.50× more"
    assert found.rows[0].sense == "worse"
    assert "measured at different times" in found.warnings[0]
    drifting = compare(
        make.pair("latency", [9, 9, 9], [1, 2, 4]), make.pair("latency", [9, 9, 9], [2, 4, 8], title="b")
    )
    assert drifting.rows[0].words == "no difference shown", "paired, the same repeats would say 2×"


def test_another_machine_claims_no_speed(make: Any) -> None:
    found = compare(make.pair("latency", [9, 9, 9], [1, 1, 1]), later(make, environment=make.other_machine()))
    assert (found.rows[0].words, found.rows[0].sense) == ("other machine", "unknown")
    assert any("other machine" in text for text in found.warnings)


def test_answers_to_the_same_examples_pair_up_and_others_do_not(make: Any) -> None:
    data = {"evaluate": make.source.digest}
    before = make.pair("correct", [1] * 50, [1] * 50, data=data)
    after = make.pair("correct", [1] * 50, [0] * 25 + [1] * 25, data=data, title="b")
    assert compare(before, after).rows[0].words == "50.00 points worse"
    other = compare(before, after.model_copy(update={"data": {}}))
    assert other.rows[0].words == "measured on other data"
    assert any("other data" in text for text in other.warnings)


def test_versions_and_uncommitted_changes_are_pointed_out(make: Any) -> None:
    changed = make.environment.model_copy(update={"packages": {"onnxruntime": "0.1"}, "git": "abc-dirty"})
    warnings = compare(make.pair("latency", [1], [1]), later(make, environment=changed)).warnings
    assert any(text.startswith("onnxruntime is ") and text.endswith("0.1 in the second") for text in warnings)
    assert any("uncommitted changes" in text for text in warnings)


def test_a_failure_on_either_side_is_said(make: Any) -> None:
    failed = make.report(make.measured(make.result, "latency", []), title="b")
    whole = make.pair("latency", [1, 1, 1], [1, 1, 1])
    assert compare(whole, failed).rows[0].words == "not measured in the second: killed by SIGKILL"
    assert compare(failed, whole).rows[0].words == "not measured in the first: killed by SIGKILL"


def test_an_unknown_artifact_is_answered_with_the_nearest(make: Any) -> None:
    run = make.pair("latency", [1], [1])
    with pytest.raises(ReportError, match="Did you mean 'export-1-quantize'"):
        compare(run, run, after_artifact="export-1-quantise")
