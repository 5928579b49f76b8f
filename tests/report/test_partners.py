"""Like is held against like, and a failure is held against what it left unmeasured."""

from typing import Any

from squeeze.report.partners import groups, partner


def test_the_same_runtime_comes_first_and_another_stands_in(make: Any) -> None:
    torch = make.measured(make.source, "latency", [1.0], runtime="torch")
    onnx = make.measured(make.source, "latency", [2.0])
    after = make.measured(make.result, "latency", [1.0])
    source = make.source.digest
    assert partner(groups([torch, onnx], [source]), [source], after, scored=False) is onnx
    assert partner(groups([torch], [source]), [source], after, scored=False) is torch


def test_other_workloads_threads_and_artifacts_are_no_partners(make: Any) -> None:
    after = make.measured(make.result, "latency", [1.0])
    source = make.source.digest
    others = [
        make.measured(make.source, "latency", [1.0], threads=1),
        make.measured(make.source, "latency", [1.0], workload=None),
    ]
    assert partner(groups([*others, after], [source]), [source], after, scored=False) is None


def test_a_failed_quality_pass_stands_for_what_would_have_come_of_it(make: Any) -> None:
    failed = make.measured(make.source, "quality", [])
    after, source = make.measured(make.result, "correct", [1.0]), make.source.digest
    assert partner(groups([failed], [source]), [source], after, scored=True) is failed
    assert partner(groups([failed], [source]), [source], after, scored=False) is None


def test_the_source_most_like_the_result_is_asked_first(make: Any) -> None:
    export = make.measured(make.result, "latency", [1.0])
    source = make.measured(make.source, "latency", [2.0])
    both = [make.result.digest, make.source.digest]
    assert (
        partner(groups([source, export], both), both, make.measured(make.result, "latency", [3.0]), scored=False)
        is export
    )
