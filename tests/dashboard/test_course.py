"""Curves of trainings: each loss where it was, the step that was kept, and the last stretch always."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from squeeze.dashboard.course import MOST_STRETCHES, _stretches, training
from squeeze.dashboard.readings import Readings


def test_losses_and_metric_are_those_of_the_curve(make: Any) -> None:
    found = training(Readings("0" * 12, make.full()))
    assert list(found) == ["1-quantize: losses", "1-quantize: held-out accuracy"]
    losses = {(row["series"], row["x"]): row["y"] for row in found["1-quantize: losses"].rows}
    assert losses == {
        (name, tokens): value for name, column in (("whole", (3.0, 2.0, 1.5)), ("kl", (2.0, 1.5, 1.0)), ("hidden", (1.0, 0.5, 0.5)))
        for tokens, value in zip((10, 20, 30), column, strict=True)
    }  # fmt: skip
    metric = found["1-quantize: held-out accuracy"]
    assert (metric.y.unit, metric.y.better) == ("share", "higher")
    assert [(row["mark"], row["y"], row["text"]) for row in metric.rows] == [
        ("value", 0.5, "50.00\u00a0%"),
        ("kept", 0.75, "75.00\u00a0%"),
    ]


def test_a_single_loss_is_drawn_once(make: Any) -> None:
    report = make.full()
    manifest = report.manifests[1]
    curve = manifest.record.training.model_copy(
        update={"shares": {"kl": manifest.record.training.loss}, "validations": ()}
    )
    changed = manifest.model_copy(update={"record": manifest.record.model_copy(update={"training": curve})})
    found = training(Readings("0" * 12, make.report((changed,), ())))
    assert list(found) == ["1-quantize: losses"]
    assert {row["series"] for row in found["1-quantize: losses"].rows} == {"whole"}


def test_a_long_curve_says_how_much_of_it_is_drawn(make: Any) -> None:
    manifest = make.full().manifests[1]
    n = 1000
    numbers = tuple(range(1, n + 1))
    floats = tuple(map(float, numbers))
    curve = manifest.record.training.model_copy(
        update={
            "steps": numbers,
            "tokens": numbers,
            "seconds": floats,
            "rate": floats,
            "loss": floats,
            "shares": {"kl": floats},
        }
    )
    changed = manifest.model_copy(update={"record": manifest.record.model_copy(update={"training": curve})})
    rows = training(Readings("0" * 12, make.report((changed,), ())))["1-quantize: losses"].rows
    assert rows[0]["note"] == f"{len(rows)} of 1000 stretches drawn"
    assert rows[-1]["x"] == n
    assert all(row["y"] == row["x"] for row in rows)


@given(st.integers(1, 5000))
def test_first_and_last_stretch_are_drawn_and_not_too_many(count: int) -> None:
    found = _stretches(count)
    assert (found[0], found[-1]) == (0, count - 1)
    assert len(found) == count if count <= MOST_STRETCHES else len(found) <= MOST_STRETCHES + 1
    assert found == sorted(set(found))
