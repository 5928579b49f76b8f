"""TensorBoard's own reader finds in the event files what the curve has, once each, also after an interruption."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from squeeze.errors import TrainError
from squeeze.training import Training, fit

STEPS = 12
SETTINGS = Training(
    steps=STEPS, batch=20, learning_rate=0.01, validations=3, checkpoint_minutes=1e-6, tensorboard=True, device="cpu",
    precision="float32", keep="last",
)  # fmt: skip


class Cut(Exception):
    """Ends a training from outside."""


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    found = reader.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def train(toy: Any, workspace: Path | None, events: Path | None, cut: int = 0) -> Any:
    def say(step: int, steps: int, text: str) -> None:
        if step == cut:
            raise Cut

    objective, learned, judged = toy.Toy(dropout=0.3), toy.toy_examples(60), toy.toy_examples(20, 1)
    return fit(objective, learned, judged, SETTINGS, workspace=workspace, key="toy", say=say, events=events).curve


def test_scalars_of_every_step(toy: Any, tmp_path: Path) -> None:
    """Losses, rate, speed and metric as in the curve, which has a stretch for each step here."""
    curve = train(toy, None, tmp_path)
    found = read(tmp_path)
    steps = list(range(1, STEPS + 1))
    columns = {
        "loss/total": curve.loss,
        "loss/ce": curve.shares["ce"],
        "loss/side": curve.shares["side"],
        "rate": curve.rate,
    }
    seconds, tokens = (0.0, *curve.seconds), (0, *curve.tokens)
    columns["tokens per second"] = tuple(
        (tokens[n] - tokens[n - 1]) / max(seconds[n] - seconds[n - 1], 1e-9) for n in steps
    )
    assert found.keys() == {*columns, "held out/accuracy"}
    for tag, values in columns.items():
        assert [step for step, _ in found[tag]] == steps
        assert [value for _, value in found[tag]] == pytest.approx(values, rel=1e-6)
    assert [step for step, _ in found["held out/accuracy"]] == [4, 8, 12]
    assert [v for _, v in found["held out/accuracy"]] == pytest.approx([v.value for v in curve.validations])


def test_a_run_that_goes_on_neither_doubles_nor_misses_a_step(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut at step 10 with checkpoints of 8 and 9, of which 9 is lost: its events were written already."""
    monkeypatch.setattr("squeeze.training.engine.SAY_SECONDS", 0.0)
    work, events = tmp_path / "work", tmp_path / "events"
    with pytest.raises(Cut):
        train(toy, work, events, cut=10)
    assert sorted(p.name for p in work.glob("step-*")) == ["step-000000008", "step-000000009"]
    assert read(events)["rate"][-1][0] == 9
    shutil.rmtree(work / "step-000000009")  # the older one is gone on from: the events of step 9 must go
    curve = train(toy, work, events)
    found = read(events)
    assert len(list(events.iterdir())) == 2
    for tag in ("loss/total", "rate", "tokens per second"):
        assert [step for step, _ in found[tag]] == list(range(1, STEPS + 1))
    assert [value for _, value in found["loss/total"]] == pytest.approx(curve.loss, rel=1e-6)
    assert [step for step, _ in found["held out/accuracy"]] == [4, 8, 12]


def test_a_run_from_the_beginning_leaves_none_of_an_earlier_one(toy: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    train(toy, None, tmp_path)
    train(toy, None, tmp_path)
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    assert (tmp_path / "mine.txt").exists()
    assert len(read(tmp_path)["rate"]) == STEPS


def test_without_the_package_it_says_so_before_it_trains(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "tensorboard" or n.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(TrainError, match=r"pip install 'squeeze\[tensorboard\]'"):
        train(toy, None, tmp_path)
    with pytest.raises(TrainError, match="no folder here"):
        train(toy, None, None)
