"""What is kept of every step, told as progress and put into stretches."""

import numpy as np
import pytest

from squeeze.report.training import Validation
from squeeze.training import Objective
from squeeze.training.trace import STRETCHES, Trace


def made(steps: int, seconds: float = 0.5, tokens: int = 40) -> Trace:
    trace = Trace()
    for n in range(steps):
        trace.add(tokens, (n + 1) * seconds, 0.1, {"kl": 1.0 / (n + 1), "hidden": 2.0})
    return trace


def test_words_of_a_first_step() -> None:
    assert made(1).words("accuracy", 0, 11) == "loss 3 (kl 1, hidden 2), 80 tokens/s, 5 s left"


def test_words_speak_of_the_last_fifty_steps() -> None:
    """Losses are means over them, so is speed; the metric is the newest."""
    trace = made(80)
    trace.seconds = [s + 100 * (n >= 20) for n, s in enumerate(trace.seconds)]  # a slow start, long ago
    trace.validations = [Validation(step=40, tokens=1600, value=0.5), Validation(step=80, tokens=3200, value=0.625)]
    mean = float(np.mean([1 / n for n in range(31, 81)]))
    assert trace.words("accuracy", 0, 1080) == (
        f"loss {mean + 2:.4g} (kl {mean:.3g}, hidden 2), accuracy 0.625, 80 tokens/s, 8 min left"
    )


def test_words_measure_speed_since_this_process_took_over() -> None:
    """70 slow steps of a killed run, then 10 of a tenth of a second each."""
    trace = made(70, seconds=10.0)
    for n in range(10):
        trace.add(40, 700 + (n + 1) * 0.1, 0.1, {"kl": 1.0, "hidden": 2.0})
    assert trace.words("loss", 70, 40_080).endswith("400 tokens/s, 67 min left")
    assert trace.words("loss", 70, 400_080).endswith("400 tokens/s, 11.1 h left")


def test_one_loss_is_told_once() -> None:
    trace = Trace()
    trace.add(10, 1.0, 0.1, {"kl": 1234.56})
    assert trace.words("loss", 0, 1) == "loss 1235, 10 tokens/s, 0 s left"


def test_stretches_are_means_that_add_up() -> None:
    """1000 steps in 200 stretches of five."""
    trace = made(1000)
    curve = trace.curve(Objective(), 1000, 0, 1, "cpu", "float32")
    assert len(curve.steps) == STRETCHES
    assert curve.steps[:2] == (5, 10)
    assert curve.steps[-1] == 1000
    assert curve.shares["kl"][0] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 5)
    assert curve.loss == pytest.approx([a + b for a, b in zip(curve.shares["kl"], curve.shares["hidden"], strict=True)])
    assert curve.tokens[-1] == 40_000
    assert curve.seconds[-1] == 500


def test_a_loss_that_comes_late_counts_nothing_before() -> None:
    trace = Trace()
    trace.add(1, 1.0, 0.1, {"kl": 1.0})
    trace.add(1, 2.0, 0.1, {"kl": 1.0, "late": 4.0})
    trace.add(1, 3.0, 0.1, {"late": 4.0})
    assert trace.shares == {"kl": [1.0, 1.0, 0.0], "late": [0.0, 4.0, 4.0]}
