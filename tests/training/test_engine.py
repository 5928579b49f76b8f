"""The loop: gradients in parts, best weights and early stopping, failures in words, progress, what it refuses."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from squeeze.errors import DeviceError, TrainError
from squeeze.training import Examples, Objective, Training, engine, fit, state

QUIET: dict[str, Any] = {"device": "cpu", "precision": "float32", "warm_up": 0.0, "schedule": "constant"}


def numbers(count: int, lengths: Sequence[int] | None = None) -> Examples:
    """Examples whose tokens are their own numbers."""
    lengths = [1] * count if lengths is None else lengths
    tokens = np.repeat(np.arange(count), lengths).astype(np.int32)
    return Examples(tokens, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), None, None, 0)


def weight_of(objective: Any) -> float:
    return float(objective.network.weight.detach())


class Scripted(Objective):
    """One weight that a step of the optimizer lowers; the metric at each validation is read from a script."""

    metric = "score"

    def __init__(self, script: Sequence[float] = (), better: Any = "higher") -> None:
        super().__init__()
        self.network = nn.Module()
        self.network.weight = nn.Parameter(torch.tensor(1.0))
        self.script: Iterator[float] = iter(script)
        self.better = better
        self.seen: list[float] = []

    def forward(self, batch: Mapping[str, Tensor], judge: bool = False) -> dict[str, Tensor]:
        weight: Any = self.network.weight
        if judge:
            self.seen.append(float(weight.detach()))
            return {"value": torch.tensor(next(self.script)), "count": torch.tensor(1)}
        return {"sum": weight.abs()}

    def write(self, folder: Path) -> bool:
        (folder / "weight").write_text(repr(weight_of(self)))
        return True


def run(objective: Objective, *, workspace: Path | None = None, **settings: Any) -> engine.Fit:
    return fit(objective, numbers(8), numbers(1), Training(**(QUIET | settings)), workspace=workspace)


@pytest.mark.parametrize("kept_on_disk", [False, True])
@pytest.mark.parametrize(
    ("better", "script", "best"),
    [
        ("higher", [1, 3, 2, 3, 0], 2),  # a tie keeps the earlier
        ("lower", [1, 3, 2, 3, 0], 5),
        ("lower", [2, 1, 1, 3, 1], 2),
    ],
)
def test_the_best_weights_come_out(
    better: str, script: list[float], best: int, kept_on_disk: bool, tmp_path: Path
) -> None:
    objective = Scripted(script, better)
    workspace = tmp_path / "work" if kept_on_disk else None
    found = run(objective, steps=5, batch=8, validations=5, keep="best", workspace=workspace)
    assert [v.value for v in found.curve.validations] == script
    assert [v.step for v in found.curve.validations] == [1, 2, 3, 4, 5]
    assert found.curve.kept == best
    assert weight_of(objective) == objective.seen[best - 1]
    assert len(set(objective.seen)) == 5
    assert not objective.training
    last = Scripted(script, better)
    assert run(last, steps=5, batch=8, validations=5, keep="last").curve.kept == 5
    assert weight_of(last) == objective.seen[-1]


@pytest.mark.parametrize(
    ("patience", "script", "stops"),
    [
        (1, [1, 2, 2, 9, 9, 9], 3),  # validations 1, 2, 3: the third is no better than the second
        (2, [1, 2, 2, 3, 2, 3, 9], 6),
        (2, [5, 4, 3, 9], 3),
        (3, [1, 2, 3, 4, 5, 6, 7], None),
    ],
)
def test_patience_counts_validations(patience: int, script: list[float], stops: int | None) -> None:
    """At 20 steps and 7 validations these follow the steps 3, 6, 9, 12, 15, 18 and 20: ⌈20 n / 7⌉."""
    found = run(Scripted(script), steps=20, batch=8, validations=7, patience=patience)
    follow = [3, 6, 9, 12, 15, 18, 20]
    assert [v.step for v in found.curve.validations] == follow[:stops]
    assert found.curve.steps[-1] == (20 if stops is None else follow[stops - 1])
    notes = [f"stopped at step {follow[stops - 1]} of 20: {patience} validations without a better one"] if stops else []
    assert list(found.notes) == notes


def test_validations_are_spread_evenly_and_the_last_follows_the_last_step() -> None:
    for steps in range(1, 40):
        for asked in range(1, 45):
            due = [step for step in range(1, steps + 1) if engine._is_due(step, steps, asked)]
            assert len(due) == min(steps, asked)
            assert due[-1] == steps
            gaps = np.diff([0, *due])
            assert gaps.max() - gaps.min() <= 1


class Tokens(Objective):
    """Loss over tokens: parts of a batch have unequal units."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.network = nn.Sequential(nn.Embedding(12, 6), nn.Tanh(), nn.Linear(6, 13))

    def units(self, batch: Mapping[str, Tensor]) -> float:
        return float(batch["attention_mask"].sum())

    def forward(self, batch: Mapping[str, Tensor], judge: bool = False) -> dict[str, Tensor]:
        mask = batch["attention_mask"].bool()
        out = self.network(batch["input_ids"])[mask]
        goal = (batch["input_ids"][mask] + 3) % 12
        return {"ce": nn.functional.cross_entropy(out.float(), goal), "size": 0.01 * out.float().square().mean()}


def gradient(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[list[Tensor], float]:
    """What reaches the optimizer in the only step, and its loss."""
    caught: list[Tensor] = []

    def caught_step(self: Any, closure: Any = None) -> None:
        caught.extend(p.grad.clone() for group in self.param_groups for p in group["params"])

    objective = Tokens()
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", caught_step)
        found = fit(
            objective, numbers(12, [1, 9, 2, 3, 7, 1, 4, 2, 8, 1, 1, 5]), None,
            Training(**(QUIET | {"steps": 1, "batch": 12, "clip": 1e9, "held_out": 0} | settings)),
        )  # fmt: skip
    return caught, found.curve.loss[0]


@pytest.mark.parametrize("parts", [2, 3, 4, 12])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    whole, loss = gradient(monkeypatch)
    objective = Tokens()
    shares = objective(numbers(12, [1, 9, 2, 3, 7, 1, 4, 2, 8, 1, 1, 5]).batch(range(12)))
    sum(shares.values()).backward()  # type: ignore[union-attr]
    plain = {tuple(p.shape): p.grad for p in objective.parameters()}
    assert loss == pytest.approx(sum(float(share.detach()) for share in shares.values()), rel=1e-6)
    in_parts, loss_in_parts = gradient(monkeypatch, accumulation=parts)
    assert loss_in_parts == pytest.approx(loss, rel=1e-6)
    for one, other in zip(whole, in_parts, strict=True):
        torch.testing.assert_close(one, plain[tuple(one.shape)], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_gradients_are_clipped_to_their_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = gradient(monkeypatch)
    norm = float(torch.sqrt(sum(g.double().square().sum() for g in whole)))
    clipped, _ = gradient(monkeypatch, clip=norm / 4)
    for one, other in zip(whole, clipped, strict=True):
        torch.testing.assert_close(one / 4, other, rtol=1e-4, atol=1e-8)


def test_bfloat16_products_on_a_cpu() -> None:
    """Products are rounded to 8 bits of mantissa, weights stay float32, and the loss falls as it does in float32."""
    losses = {}
    for precision, name in (("float32", "float32"), ("bfloat16", "bfloat16")):
        objective = Tokens()
        found = fit(
            objective, numbers(12, [3] * 12), None,
            Training(**(QUIET | {"precision": precision, "steps": 30, "batch": 6, "learning_rate": 0.05, "held_out": 0})),
        )  # fmt: skip
        assert found.curve.precision == name
        assert {p.dtype for p in objective.parameters()} == {torch.float32}
        losses[precision] = found.curve.loss
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"][0] == pytest.approx(losses["float32"][0], rel=2e-2)
    assert losses["bfloat16"][-1] < 0.3 * losses["bfloat16"][0]


def test_what_a_cpu_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="float16 has no kernels on a CPU"):
        run(Scripted(), steps=1, precision="float16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no CUDA here"):
        run(Scripted(), steps=1, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_on_a_gpu(precision: str, tmp_path: Path) -> None:
    """Losses fall, weights stay float32, and a run that is cut goes on (float16: with its scaler's state)."""
    settings = Training(
        **(QUIET | {"device": "cuda", "precision": precision, "steps": 30, "batch": 6, "learning_rate": 0.05, "held_out": 0}),
        checkpoint_minutes=1e-6,
    )  # fmt: skip
    examples = numbers(12, [3] * 12)

    def cut(step: int, steps: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            Tokens(),
            examples,
            None,
            settings,
            workspace=tmp_path / "work",
            say=lambda *told: told[0] > 9 and cut(*told),
        )
    objective = Tokens()
    found = fit(objective, examples, None, settings, workspace=tmp_path / "work")
    assert any("went on from step" in note for note in found.notes)
    assert {(p.dtype, p.device.type) for p in objective.parameters()} == {(torch.float32, "cuda")}
    assert found.curve.loss[-1] < 0.3 * found.curve.loss[0]


class Failing(Scripted):
    """Something happens in the forward pass of one step, counted from 1."""

    def __init__(self, at: int, what: Any, script: Sequence[float] = (1, 2, 3, 4, 5, 6)) -> None:
        super().__init__(script)
        self.at, self.what, self.count = at, what, 0

    def forward(self, batch: Mapping[str, Tensor], judge: bool = False) -> dict[str, Tensor]:
        if judge:
            return super().forward(batch, judge)
        self.count += 1
        shares = super().forward(batch)
        if self.count == self.at:
            if isinstance(self.what, BaseException):
                raise self.what
            return self.what(shares)
        return shares | {"other": 0 * shares["sum"]}


def nan_loss(shares: dict[str, Tensor]) -> dict[str, Tensor]:
    return shares | {"other": shares["sum"] * float("nan")}


def nan_gradient(shares: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"sum": torch.sqrt(shares["sum"] * 0)}  # 0, and its slope is infinite


def test_a_loss_that_is_no_number_is_named_and_the_last_good_weights_stay(tmp_path: Path) -> None:
    objective = Failing(5, nan_loss)
    work = tmp_path / "work"
    with pytest.raises(TrainError) as caught:
        run(objective, steps=6, batch=8, validations=3, workspace=work, checkpoint_minutes=1e-6)
    text = str(caught.value)
    assert "the loss other is not a number at step 5 of 6" in text
    assert "Lower learning_rate" in text
    assert f"The weights of the best validation (step 4) are a model in {work / 'last-good'}" in text
    best = objective.seen[1]
    assert float((work / "last-good" / "weight").read_text()) == best
    assert weight_of(objective) == best
    place = state.newest(work)
    assert place is not None
    fresh = Scripted()
    optimizer = torch.optim.AdamW(fresh.parameters(), fused=True)
    step, trace, _ = state.load(place, fresh, optimizer, torch.device("cpu"))
    assert (step, len(trace.tokens), weight_of(fresh)) == (4, 4, best)
    with pytest.raises(TrainError, match="step 5 of 6"):  # the same command goes on from there, and meets it again
        run(Failing(1, nan_loss), steps=6, batch=8, validations=3, workspace=work)
    assert float((work / "last-good" / "weight").read_text()) == best


def test_without_a_validation_the_newest_checkpoint_is_what_stays(tmp_path: Path) -> None:
    objective = Failing(4, nan_loss)
    with pytest.raises(TrainError, match=r"the newest checkpoint \(step-000000003\) are a model"):
        run(objective, steps=6, batch=8, validations=1, workspace=tmp_path / "work", checkpoint_minutes=1e-6)
    with pytest.raises(TrainError, match="no weights were kept"):
        run(Failing(1, nan_loss), steps=6, batch=8, validations=1)
    kept = Failing(5, nan_loss)
    with pytest.raises(TrainError, match=r"The network holds the weights of the best validation \(step 4\)."):
        run(kept, steps=6, batch=8, validations=3)
    assert weight_of(kept) == kept.seen[-1]


def test_a_gradient_that_is_no_number_is_named_with_its_parameter() -> None:
    objective = Failing(3, nan_gradient)
    with pytest.raises(TrainError) as caught:
        run(objective, steps=6, batch=8, validations=6)
    assert "the gradient of network.weight is not a number at step 3 of 6, and the losses are (sum 0" in str(
        caught.value
    )
    assert weight_of(objective) == objective.seen[1]


def test_a_metric_that_is_no_number_ends_the_training() -> None:
    with pytest.raises(TrainError, match="score on the held-out examples is nan after step 4"):
        run(Scripted([1, float("nan")]), steps=4, batch=8, validations=2)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("batch", "now", "advice"), [(8, 1, 2), (8, 2, 4), (6, 2, 3), (7, 1, 7)])
def test_memory_that_does_not_suffice(error: BaseException, batch: int, now: int, advice: int) -> None:
    with pytest.raises(TrainError) as caught:
        run(Failing(1, error), steps=2, batch=batch, accumulation=now)
    assert f"{batch // now} examples at once do not fit into memory. Set training.accumulation to {advice}" in str(
        caught.value
    )
    assert batch % advice == 0
    assert caught.value.__cause__ is error


def test_memory_for_one_example_alone_and_other_errors() -> None:
    with pytest.raises(TrainError, match="1 example at once do.* Shorten the texts"):
        run(Failing(1, MemoryError()), steps=2, batch=4, accumulation=4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        run(Failing(1, RuntimeError("size mismatch")), steps=2)


def test_too_few_examples() -> None:
    with pytest.raises(TrainError, match="no example to train on"):
        fit(Scripted(), numbers(0), None, Training(**QUIET))
    found = fit(Scripted(), numbers(3), numbers(0), Training(**(QUIET | {"batch": 16, "accumulation": 8, "epochs": 2})))
    assert found.curve.steps == (1, 2)
    assert found.curve.tokens == (3, 6)
    assert found.curve.validations == ()
    assert found.notes == ("every step takes all 3 examples: a batch would have 16",)

    class Nothing(Scripted):
        def units(self, batch: Mapping[str, Tensor]) -> float:
            return 0.0

    with pytest.raises(TrainError, match="8 examples of step 1 have nothing to learn from"):
        run(Nothing(), steps=2, batch=8)


def test_everything_frozen_is_refused() -> None:
    class Frozen(Scripted):
        def requires_grad_of_trained(self) -> None:
            self.requires_grad_(False)

    with pytest.raises(TrainError, match="every parameter is frozen"):
        run(Frozen(), steps=1)


def test_matrices_decay_and_vectors_do_not() -> None:
    groups = engine._groups(Tokens(), Training(weight_decay=0.25))
    assert {(p.dim(), group["weight_decay"]) for group in groups for p in group["params"]} == {(2, 0.25), (1, 0.0)}


def test_progress_is_told_of_seldom_but_always_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(engine.time, "monotonic", lambda: now[0])

    class Slow(Scripted):
        def forward(self, batch: Mapping[str, Tensor], judge: bool = False) -> dict[str, Tensor]:
            now[0] += 0.03
            shares = super().forward(batch, judge)
            return shares if judge else shares | {"second": 3 * shares["sum"].detach() + 0 * shares["sum"]}

    told: list[tuple[int, int, str]] = []
    settings = Training(**(QUIET | {"steps": 30, "batch": 8, "validations": 1, "learning_rate": 1e-9}))
    fit(Slow([0.75]), numbers(8, [3] * 8), numbers(1), settings, say=lambda *words: told.append(words))
    assert [step for step, _, _ in told] == [1, 8, 15, 22, 29, 30]  # 0.2 s are 6.67 steps of 0.03 s
    assert told[1][2] == "loss 4 (sum 1, second 3), 800 tokens/s, 1 s left"  # 24 tokens in 0.03 s, 22 steps to go
    assert told[-1][2] == "loss 4 (sum 1, second 3), score 0.75, 800 tokens/s, 0 s left"
    assert re.fullmatch(r"loss \S+ \(.*\), [\d,]+ tokens/s, \d+ s left", told[0][2])
