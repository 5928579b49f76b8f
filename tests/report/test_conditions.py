"""A gate for CI fires beyond chance, never by it, and never sleeps because nobody spoke of what it watches."""

from collections.abc import Sequence
from typing import Any

import pytest

from squeeze.errors import ReportError
from squeeze.report.conditions import parse, violated
from squeeze.report.summary import summarize


def fires(make: Any, text: str, quantity: str, before: Sequence[float], after: Sequence[float]) -> bool:
    return bool(violated(parse(text), summarize(make.pair(quantity, before, after))))


@pytest.mark.parametrize(
    ("text", "quantity", "before", "after", "expected"),
    [
        ("latency > 1.05x", "latency", [1, 1, 1], [1.2, 1.2, 1.2], True),
        ("latency > 1.05x", "latency", [1, 1, 1], [1.04, 1.04, 1.04], False),
        ("latency > 1.05x", "latency", [1, 1, 1], [1.2, 1.0, 1.4], False),
        ("latency, 1x128 > 1.05x", "latency", [1, 1, 1], [1.2, 1.2, 1.2], True),
        ("latency > 5%", "latency", [1, 1, 1], [1.2, 1.2, 1.2], True),
        ("latency < 0.9x", "latency", [1, 1, 1], [0.5, 0.5, 0.5], True),
        ("latency > 500 ms", "latency", [1, 1, 1], [0.4, 0.4, 0.4], False),
        ("latency > 300 ms", "latency", [1, 1, 1], [0.4, 0.4, 0.4], True),
        ("decode_rate < 0.95x", "decode_rate", [10, 10, 10], [8, 8, 8], True),
        ("decoding speed < 0.95x", "decode_rate", [10, 10, 10], [12, 12, 12], False),
        ("accuracy < -0.5 points", "correct", [1] * 100, [0] * 20 + [1] * 80, True),
        ("accuracy < -0.5 points", "correct", [1] * 100, [0] + [1] * 99, False),
        ("weight_bytes > 0.5x", "weight_bytes", [100], [60], True),
        ("weight_bytes > 0.7x", "weight_bytes", [100], [60], False),
        ("peak_memory > 50 MB", "peak_memory", [9e7] * 3, [6e7] * 3, True),
        ("latency > 1.05x", "latency", [1, 1, 1], [], True),
    ],
)  # fmt: skip
def test_a_condition_holds_where_the_whole_interval_lies_beyond_it(
    text: str, quantity: str, before: Sequence[float], after: Sequence[float], expected: bool, make: Any
) -> None:
    assert fires(make, text, quantity, before, after) is expected


def test_a_condition_that_speaks_of_nothing_measured_is_an_error(make: Any) -> None:
    with pytest.raises(ReportError, match="speaks of nothing that was measured. Measured: latency, 1×128"):
        fires(make, "throughput < 0.9x", "latency", [1], [1])
    with pytest.raises(ReportError, match="speaks of nothing"):
        fires(make, "latency, 8x128 > 1.05x", "latency", [1], [1])


def test_a_ratio_of_an_artifact_alone_is_an_error(make: Any) -> None:
    alone = make.report(make.measured(make.source, "latency", [1, 1, 1]), manifests=(make.source,))
    with pytest.raises(ReportError, match="has no ratio to a source"):
        violated(parse("latency > 1.05x"), summarize(alone))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("latency", "is not understood. Write QUANTITY"),
        ("latency >= 1x", "is not understood"),
        ("latncy > 1x", "Did you mean 'latency'"),
        ("latency > 1 lightyear", "the unit 'lightyear' is unknown"),
    ],
)
def test_what_is_not_understood_says_how_to_write_it(text: str, told: str) -> None:
    with pytest.raises(ReportError, match=told):
        parse(text)
