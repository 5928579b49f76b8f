"""Rates against values written out by hand."""

from typing import Any

import pytest

from squeeze.training.schedule import factor


@pytest.mark.parametrize(
    ("kind", "warm_up", "expected"),
    [
        # ten steps, two of them rising: then eight that fall from 1 by an eighth each
        ("linear", 0.2, [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        # ½ (1 + cos(π n / 8))
        ("cosine", 0.2, [0.5, 1, 1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]),
        ("constant", 0.2, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        # without warming up the first step has the highest rate already
        ("linear", 0.0, [1, 1, 8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9]),
        # 2.5 steps rise
        ("linear", 0.25, [0.4, 0.8, 1, 7 / 7.5 , 6 / 7.5, 5 / 7.5, 4 / 7.5, 3 / 7.5, 2 / 7.5, 1 / 7.5]),
    ],
)  # fmt: skip
def test_ten_steps(kind: Any, warm_up: float, expected: list[float]) -> None:
    assert [factor(kind, step, 10, warm_up) for step in range(10)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 100])
@pytest.mark.parametrize("warm_up", [0.0, 0.06, 0.5, 0.99])
def test_no_step_is_wasted_and_none_is_above_the_highest(kind: Any, steps: int, warm_up: float) -> None:
    found = [factor(kind, step, steps, warm_up) for step in range(steps)]
    assert all(0 < value <= 1 for value in found)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
