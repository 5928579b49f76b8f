"""Change points: a step is found where it is, noise is none, and what is counted changes exactly where it does."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from squeeze.dashboard.history import ALPHA, changes, changes_counted, history
from squeeze.dashboard.readings import Readings
from squeeze.report.schema import Workload

SHORT = Workload(kind="fixed", batch=1, sequence=128)


def noise(count: int, seed: int, spread: float = 0.02) -> np.ndarray[Any, Any]:
    return np.exp(np.random.default_rng(seed).normal(0, spread, count))


def test_steady_runs_have_no_change() -> None:
    assert changes([1.0] * 30) == []
    assert changes(list(np.linspace(1, 1, 12))) == []


def test_noise_is_called_a_change_as_seldom_as_promised() -> None:
    found = sum(bool(changes(noise(20, seed).tolist())) for seed in range(400))
    assert found <= 400 * ALPHA + 3 * (400 * ALPHA) ** 0.5, "four are expected, ten are three deviations more"


@pytest.mark.parametrize("at", [5, 8, 12, 15])
@pytest.mark.parametrize("step", [0.8, 1.2])
def test_a_step_of_a_fifth_is_found_where_it_is(at: int, step: float) -> None:
    values = noise(20, at)
    values[at:] *= step
    assert changes(values.tolist()) == [at]


def test_a_loss_that_was_mended_later_is_two_changes() -> None:
    values = noise(36, 1)
    values[12:24] *= 1.3
    assert changes(values.tolist()) == [12, 24]


def test_steps_upon_steps_are_all_found() -> None:
    values = noise(40, 1)
    for at in (10, 20, 30):
        values[at:] *= 1.3
    assert changes(values.tolist()) == [10, 20, 30]


def test_one_stalled_run_is_no_change_and_hides_none() -> None:
    values = noise(24, 2)
    values[7] *= 10
    assert changes(values.tolist()) == []
    values[12:] *= 1.2
    assert changes(values.tolist()) == [12]


def test_twelve_runs_are_the_fewest_that_can_show_a_step() -> None:
    before, after = [1.2, 1.0, 1.4, 1.1, 1.3, 1.5], [2.3, 2.0, 2.5, 2.1, 2.4, 2.2]
    assert changes([*before[:5], *after]) == []
    assert changes([*before, *after]) == [6]


@given(st.lists(st.floats(1e-6, 1e6), max_size=40))
def test_the_same_series_has_the_same_changes_in_any_unit(values: list[float]) -> None:
    found = changes(values)
    assert found == changes(values)
    assert found == changes([value * 1024 for value in values])
    assert all(0 < at < len(values) for at in found)


def test_a_step_is_placed_between_the_runs_it_parts_for_almost_all_noise() -> None:
    exact = 0
    for seed in range(100):
        values = noise(24, seed)
        values[8:16] *= 1.35
        exact += changes(values.tolist()) == [8, 16]
    assert exact >= 95


def test_what_is_counted_changes_where_its_value_does() -> None:
    assert changes_counted([4.0, 4.0, 2.0, 2.0, 4.0]) == [2, 4]
    assert changes_counted([4.0]) == []


def runs(make: Any, *latencies: float, **changes: Any) -> list[Readings]:
    source = make.manifest("a")
    return [
        Readings(f"{n:012}", make.report(
            [source],
            [
                make.measured(source, "latency", [v, v * 1.01, v * 0.99], workload=SHORT),
                make.measured(source, "weight_bytes", [4000.0 if n < 3 else 2000.0], unit="bytes", repeat=()),
            ],
            started=f"2026-11-{n + 1:02}T00:00:00+00:00", **changes,
        ))
        for n, v in enumerate(latencies)
    ]  # fmt: skip


def test_a_change_carries_what_changed_and_by_how_much(make: Any) -> None:
    found = history(runs(make, *noise(8, 3).tolist(), *(1.5 * noise(8, 4)).tolist()))
    rows = found["latency, 1×128"].rows
    assert [row["run"] for row in rows if row["change"]] == [9]
    assert rows[8]["change_text"] == "993\u00a0ms → 1.50\u00a0s (+50.8\u00a0%)", "the medians of both levels"
    assert len({row["level"] for row in rows}) == 2
    assert all(row["low"] <= row["y"] <= row["high"] for row in rows)  # type: ignore[operator]
    assert [row["run"] for row in found["weights on disk"].rows if row["change"]] == [4]


def test_of_a_long_series_the_newest_runs_are_searched(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("squeeze.dashboard.history.LONGEST", 16)
    values = [*(2 * noise(8, 3)).tolist(), *noise(8, 3).tolist(), *(1.5 * noise(8, 4)).tolist()]
    rows = history(runs(make, *values))["latency, 1×128"].rows
    assert [row["run"] for row in rows if row["change"]] == [17]
    assert len(rows) == 24


def test_one_run_is_no_history(make: Any) -> None:
    assert history(runs(make, 1.0)) == {}


def test_runs_are_followed_in_time_whatever_their_order(make: Any) -> None:
    every = runs(make, 1.0, 2.0, 3.0)
    rows = history(every[::-1])["latency, 1×128"].rows
    assert [row["y"] for row in rows] == [1.0, 2.0, 3.0]
    assert [row["x"] for row in rows] == sorted(row["x"] for row in rows)  # type: ignore[type-var]


def test_other_titles_machines_and_threads_are_other_series(make: Any) -> None:
    elsewhere = make.environment.model_copy(update={"cpu": "CPU Y"})
    every = [*runs(make, 1.0, 1.0), *runs(make, 2.0, 2.0, environment=elsewhere), *runs(make, 3.0, 3.0, title="b")]
    found = history(every)["latency, 1×128"].rows
    assert len({row["series"] for row in found}) == 3
    assert len({row["machine"] for row in found}) == 2


def test_a_start_that_cannot_be_read_is_no_crash(make: Any) -> None:
    every = [Readings(r.identity, r.report.model_copy(update={"started": "yesterday"})) for r in runs(make, 1.0, 1.0)]
    assert [row["x"] for row in history(every)["latency, 1×128"].rows] == [0.0, 0.0]
