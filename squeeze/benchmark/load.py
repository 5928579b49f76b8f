"""Load tests: requests that come while others are worked on.

Closed loop: each of N callers asks again when it is answered; that is capacity. Open loop: requests arrive by a Poisson process
whether or not the earlier ones are done, as users do, and a request's time runs from its *arrival*: waiting counts. A test that
starts the clock when a caller is free hides every queue (Tene's "coordinated omission"). Several callers share one session, whose
runtime releases Python's lock while it computes.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Ask = Callable[[Any], Any]

FEWEST = 300
"""Requests of a trial: below it a 99th percentile is the worst of a few."""
LOWEST, TRIALS = 0.05, 8
"""Share of capacity at which the search begins, and trials that halve what is left."""


@dataclass
class Trial:
    """One load: seconds of each request in order of arrival, and how it ended."""

    rate: float
    """Asked for, requests a second; for a closed loop, reached."""
    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0
    hopeless: bool = False
    """Given up early: more than one in a hundred of all planned requests had passed the limit."""

    @property
    def p99(self) -> float:
        """99th percentile in seconds; infinite where the trial was given up."""
        return math.inf if self.hopeless or not self.latencies else float(np.quantile(self.latencies, 0.99))


def closed_loop(ask: Ask, requests: Sequence[Any], callers: int, seconds: float, seed: int) -> Trial:
    """`callers` threads that each ask again as soon as they are answered, for `seconds`."""
    trial, lock = Trial(0.0), threading.Lock()
    started = time.perf_counter()
    end = started + seconds

    def caller(number: int) -> None:
        rng = np.random.default_rng((seed, number))
        mine: list[float] = []
        while (begun := time.perf_counter()) < end:
            ask(requests[int(rng.integers(len(requests)))])
            mine.append(time.perf_counter() - begun)
        with lock:
            trial.latencies += mine

    _in_threads(caller, callers)
    trial.seconds = time.perf_counter() - started
    trial.rate = len(trial.latencies) / trial.seconds
    return trial


def open_loop(
    ask: Ask, requests: Sequence[Any], callers: int, rate: float, seconds: float, seed: int, limit: float = math.inf
) -> Trial:
    """Poisson arrivals at `rate` a second for `seconds`, and at least 300 of them; served in order by `callers` threads."""
    rng = np.random.default_rng(seed)
    planned = max(FEWEST, math.ceil(rate * seconds))
    arrivals = np.cumsum(rng.exponential(1 / rate, planned)).tolist()
    chosen = rng.integers(len(requests), size=planned).tolist()
    trial, lock = Trial(rate, [math.nan] * planned), threading.Lock()
    late = upcoming = 0
    started = time.perf_counter()

    def caller(_: int) -> None:
        nonlocal late, upcoming
        while True:
            with lock:
                number, upcoming = upcoming, upcoming + 1
            if number >= planned or trial.hopeless:
                return
            arrival = started + arrivals[number]
            if (wait := arrival - time.perf_counter()) > 0:
                time.sleep(wait)
            ask(requests[chosen[number]])
            trial.latencies[number] = time.perf_counter() - arrival
            if trial.latencies[number] > limit:
                with lock:
                    late += 1
                    trial.hopeless = late > planned / 100

    _in_threads(caller, callers)
    trial.seconds = time.perf_counter() - started
    trial.latencies = [value for value in trial.latencies if not math.isnan(value)]
    return trial


def highest_rate(
    ask: Ask, requests: Sequence[Any], callers: int, seconds: float, limit: float, seed: int
) -> tuple[Trial | None, list[Trial]]:
    """The trial with the highest rate whose 99th percentile stayed within `limit`, and all trials.

    Capacity is measured with a closed loop; the rate is then halved between what held and what did not, on a logarithmic
    scale. None where even a twentieth of capacity does not hold.
    """
    capacity = closed_loop(ask, requests, callers, max(1.0, seconds / 5), seed).rate
    low, high = LOWEST * capacity, capacity
    best: Trial | None = None
    trials: list[Trial] = []
    for number in range(TRIALS):
        rate = low if number == TRIALS - 1 and best is None else math.sqrt(low * high)
        trial = open_loop(ask, requests, callers, rate, seconds, seed + number, limit)
        trials.append(trial)
        if trial.p99 <= limit:
            best, low = trial, rate
        else:
            high = rate
        if high / low < 1.02:
            break
    return best, trials


def _in_threads(work: Callable[[int], None], count: int) -> None:
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
