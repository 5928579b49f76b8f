"""Load tests on a session that sleeps: what waits is counted, from when it arrived."""

import threading
import time
from typing import Any

import numpy as np
import pytest

from squeeze.benchmark.load import FEWEST, Trial, closed_loop, highest_rate, open_loop


def sleeper(seconds: float) -> Any:
    return lambda _: time.sleep(seconds)


def test_callers_of_a_closed_loop_work_at_once_and_each_asks_again() -> None:
    one, four = (closed_loop(sleeper(0.005), [0], callers, 0.3, seed=0) for callers in (1, 4))
    assert 2 < four.rate / one.rate < 5
    assert four.rate == pytest.approx(len(four.latencies) / four.seconds)
    assert min(one.latencies) >= 0.005


def test_an_open_loop_serves_every_arrival_and_at_least_as_many_as_a_percentile_needs() -> None:
    trial = open_loop(sleeper(0.0002), [0], 1, rate=2000, seconds=0.01, seed=0)
    assert len(trial.latencies) == FEWEST
    assert not trial.hopeless


def test_waiting_counts_from_arrival_where_more_comes_than_can_be_served() -> None:
    trial = open_loop(sleeper(0.002), [0], 1, rate=2000, seconds=0.05, seed=0)
    # 300 requests of 2 ms come within 150 ms: the last one waits for nearly all of the others.
    assert trial.latencies[-1] > 0.3
    assert np.median(trial.latencies) > 0.1, "each call alone takes 2 ms"


def test_one_lock_for_all_shows_in_an_open_loop_whatever_the_callers() -> None:
    lock = threading.Lock()

    def ask(_: Any) -> None:
        with lock:
            time.sleep(0.002)

    assert open_loop(ask, [0], 8, rate=2000, seconds=0.05, seed=0).latencies[-1] > 0.3


def test_a_hopeless_trial_is_given_up_early() -> None:
    started = time.perf_counter()
    trial = open_loop(sleeper(0.01), [0], 1, rate=1000, seconds=3, seed=0, limit=0.02)
    assert trial.hopeless
    assert trial.p99 == float("inf")
    assert time.perf_counter() - started < 2, "3000 requests of 10 ms would take half a minute"


def test_the_highest_rate_lies_below_capacity_and_holds_the_limit() -> None:
    best, trials = highest_rate(sleeper(0.002), [0], 1, 0.1, 0.02, seed=0)
    assert best is not None
    assert best.p99 <= 0.02
    assert best.rate == max(trial.rate for trial in trials if trial.p99 <= 0.02)
    assert 50 < best.rate < 500, "one server of 2 ms answers 500 a second at most"
    assert all(trial.rate > best.rate for trial in trials if trial.p99 > 0.02)


def test_where_no_rate_holds_there_is_none() -> None:
    best, trials = highest_rate(sleeper(0.002), [0], 1, 0.05, 0.001, seed=0)
    assert best is None
    assert all(trial.hopeless for trial in trials)


def test_what_a_session_raises_in_a_thread_reaches_the_caller() -> None:
    def ask(_: Any) -> None:
        raise ValueError("NaN")

    with pytest.raises(ValueError, match="NaN"):
        closed_loop(ask, [0], 2, 0.1, seed=0)


def test_a_trial_without_answers_has_no_percentile() -> None:
    assert Trial(1.0).p99 == float("inf")
