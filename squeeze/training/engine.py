"""The loop: batches in, gradients through accelerate, validations, checkpoints, and the weights that came out best.

One process or many (`accelerate launch`, `torchrun`): every process computes its share of each batch, so a run on two has the batches,
and but for rounding the gradients, of a run on one. A run that was killed goes on from its newest checkpoint and, on one CPU
process with the same number of threads, reaches the same weights bit for bit.

Rejected: `transformers.Trainer`. Teachers, caches and several losses would live in its callbacks and overridden methods, its
checkpoints are pickles, and its defaults change between releases. accelerate alone gives what differs between devices.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from squeeze.errors import DeviceError, TrainError
from squeeze.provenance import Digest
from squeeze.report.training import TrainingCurve, Validation
from squeeze.training import processes, sharding, state
from squeeze.training.examples import Examples, batches_of_epoch, by_length
from squeeze.training.schedule import factor
from squeeze.training.trace import Trace

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs
    from torch import Tensor, nn

    from squeeze.training.objective import Objective
    from squeeze.training.settings import Training

Say = Callable[[int, int, str], None]
"""Step, all steps, and how it goes: losses, metric, tokens a second, time left."""


@dataclass(frozen=True)
class Fit:
    """A training that has ended; its objective's network holds the weights that came out, in evaluation mode."""

    curve: TrainingCurve
    notes: tuple[str, ...]


def fit(
    objective: "Objective", examples: Examples, held_out: Examples | None, settings: "Training", *, workspace: Path | None = None,
    key: Digest = "", say: Say | None = None,
) -> Fit:  # fmt: skip
    """Train `objective` in place. Checkpoints go to `workspace`, where a run with the same `key` goes on from them.

    Raises TrainError for a loss that is no number (the last good checkpoint stays) and for a batch that does not fit into memory.
    """
    accelerator = _accelerator(settings)
    with _deterministic(accelerator.device):
        return _Run(
            objective, examples, held_out, settings, accelerator, workspace, key, say or (lambda i, n, text: None)
        ).go()


class _Run:
    def __init__(
        self, objective: "Objective", examples: Examples, held_out: Examples | None, settings: "Training", accelerator: "Accelerator",
        workspace: Path | None, key: Digest, say: Say,
    ) -> None:  # fmt: skip
        import torch

        self.objective, self.examples, self.settings, self.say = objective, examples, settings, say
        self.held_out = held_out if held_out is not None and len(held_out) else None
        self.accelerator, self.workspace = accelerator, workspace
        self.per_epoch = -(-len(examples) // settings.batch)
        self.steps = settings.steps or max(1, round(settings.epochs * self.per_epoch))
        self.trace = Trace()
        self.start = 0
        self.resumed = ""
        self.world, self.main = accelerator.num_processes, accelerator.is_main_process
        torch.manual_seed(settings.seed + accelerator.process_index)
        objective.requires_grad_of_trained()
        wanted = settings.sharding == "fsdp" or processes.launcher_asks_for_sharding()
        self.skeleton = sharding.divide(objective, accelerator.device) if wanted and self.world > 1 else None
        self.optimizer = torch.optim.AdamW(_groups(objective, settings), lr=settings.learning_rate, fused=True)
        self.highest = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.wrapped: nn.Module = objective
        if self.skeleton is None:
            if self.world > 1:
                accelerator.ddp_handler = self._for_all_to_know()
            self.wrapped, self.prepared = accelerator.prepare(objective, self.optimizer)
            if self.world > 1:
                self.wrapped.forward_sync_buffers = False  # type: ignore[assignment]  # tables of positions: no step changes them
        else:
            self.prepared = accelerator.prepare(self.optimizer)
        self.memory: dict[str, Tensor] | None = None
        if workspace is not None:
            if self.main:
                state.prepare(workspace, key)
            accelerator.wait_for_everyone()
            if (place := self._newest(workspace)) is not None:
                self.start, self.trace, scaler, made_by = state.load(
                    place, objective, self.optimizer, accelerator.device, accelerator.process_index, self.world
                )
                if scaler is not None and accelerator.scaler is not None:
                    accelerator.scaler.load_state_dict(scaler)
                self.resumed = f"went on from step {self.start} of {self.steps} after an interruption"
                if made_by != self.world:
                    self.resumed += f", on {self.world} processes in place of {made_by}"

    def go(self) -> Fit:
        """All steps that are left, then the weights to keep."""
        every = max(1, self.steps // self.settings.validations)
        begun = time.monotonic() - (self.trace.seconds[-1] if self.trace.seconds else 0.0)
        saved = time.monotonic()
        stopped = ""
        batches: list[Any] = []
        epoch = -1
        self.objective.train()
        for step in range(self.start, self.steps):
            if step // self.per_epoch != epoch:
                epoch = step // self.per_epoch
                batches = batches_of_epoch(self.examples.lengths, self.settings.batch, self.settings.seed, epoch)
            for group, highest in zip(self.optimizer.param_groups, self.highest, strict=True):
                group["lr"] = highest * factor(self.settings.schedule, step, self.steps, self.settings.warm_up)
            numbers = batches[step % self.per_epoch]
            shares = self._step(numbers, step)
            self.trace.add(
                int(self.examples.lengths[numbers].sum()), time.monotonic() - begun, self.optimizer.param_groups[0]["lr"], shares
            )  # fmt: skip
            if (step + 1) % self.per_epoch == 0:
                before = self.trace.seconds[-1 - self.per_epoch] if step + 1 > self.per_epoch else 0.0
                self.trace.epoch_seconds.append(self.trace.seconds[-1] - before)
            paused = time.monotonic()
            if self.held_out is not None and ((step + 1) % every == 0 or step + 1 == self.steps):
                self._validate(step + 1)
                if self._is_stale(every):
                    stopped = f"stopped at step {step + 1} of {self.steps}: {self.settings.patience} validations without a better one"
            self.say(step + 1, self.steps, self._words(step + 1))
            due = (time.monotonic() - saved) / 60 >= self.settings.checkpoint_minutes
            if self.workspace is not None and self._main_says(float(due)) and step + 1 < self.steps:
                state.save(
                    self.workspace, step + 1, self.objective, self.optimizer, self.trace, self._scaler(), self._rng(), self.main
                )  # fmt: skip
                saved = time.monotonic()
            begun += time.monotonic() - paused
            if stopped:
                break
        kept = self._settle()
        self.objective.eval().requires_grad_(False)
        curve = self.trace.curve(
            self.objective, kept, len(self.held_out or ()), self.world, str(self.accelerator.device),
            {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[self.accelerator.mixed_precision],
        )  # fmt: skip
        divided = "" if self.skeleton is None else f"weights were divided among {self.world} processes"
        return Fit(curve, tuple(note for note in (self.resumed, stopped, divided) if note))

    def _step(self, numbers: "np.ndarray[Any, np.dtype[np.int64]]", step: int) -> dict[str, float]:
        """One step of the optimizer; every loss's share of it, over all processes."""
        import torch

        parts = self._parts(numbers)
        batches = [(_on(self.examples.batch(part), self.accelerator.device), empty) for part, empty in parts]
        units = [0.0 if empty else self.objective.units(batch) for batch, empty in batches]
        total = sum(units)
        world = self.world
        if world > 1:
            total = float(
                self.accelerator.reduce(torch.tensor(total, dtype=torch.float64, device=self.accelerator.device))
            )
        sums: dict[str, Tensor] = {}
        try:
            for number, ((batch, _), weight) in enumerate(zip(batches, units, strict=True)):
                last = number == len(batches) - 1
                with self._gradients(last):
                    with self.accelerator.autocast():
                        shares = self.wrapped(batch)
                    loss: Tensor = sum(shares.values())
                    self.accelerator.backward(loss * (weight / total * world))
                for name, share in shares.items():
                    sums[name] = sums.get(name, torch.zeros((), device=share.device)) + share.detach().float() * (
                        weight / total
                    )
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            explained = _explained(error, len(parts[0][0]), self.settings)
            if explained is None:
                raise
            raise explained from error
        if world > 1:
            sums = {name: self.accelerator.reduce(value) for name, value in sorted(sums.items())}
        found = {name: float(value) for name, value in sums.items()}
        self._check(found, step)
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.settings.clip)
        self.prepared.step()
        self.prepared.zero_grad(set_to_none=True)
        return found

    def _parts(self, numbers: Any) -> list[tuple[Any, bool]]:
        """This process's parts of a batch; an empty one is an example that counts nothing, so that all take the same steps."""
        world, each = self.world, self.settings.accumulation
        split = np.array_split(numbers, world * each)
        own = split[self.accelerator.process_index * each : (self.accelerator.process_index + 1) * each]
        return [(part if len(part) else numbers[:1], len(part) == 0) for part in own if len(part) or world > 1]

    def _check(self, shares: Mapping[str, float], step: int) -> None:
        bad = [name for name, value in shares.items() if not np.isfinite(value)]
        if not bad:
            return
        kept = ""
        if self.workspace is not None:
            places = [
                p for p in (self.workspace / state.BEST, state.newest(self.workspace)) if p is not None and p.exists()
            ]
            kept = f" The last good weights are in {places[0]}." if places else ""
        raise TrainError(
            f"the loss {' and '.join(bad)} is not a number at step {step + 1} of {self.steps}; the weights before it were not touched."
            f"{kept} Lower learning_rate, or that loss's weight."
        )

    def _validate(self, step: int) -> None:
        import torch

        assert self.held_out is not None
        self.objective.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        world, rank = self.world, self.accelerator.process_index
        groups = list(
            by_length(self.held_out.lengths, max(1, self.settings.batch // self.settings.accumulation // world))
        )
        with torch.no_grad(), self.accelerator.autocast():
            for group, counts in [
                *((g, 1) for g in groups[rank::world]),
                *[(groups[0], 0)] * (rank >= len(groups) % world > 0),
            ]:
                # Divided weights are gathered by all at once: who has a batch less computes one that does not count.
                if counts or self.skeleton is not None:
                    out = self.objective(
                        _on(self.held_out.batch(group), self.accelerator.device, held_out=True), judge=True
                    )
                    sums += counts * torch.stack([out["value"].double().cpu(), out["count"].double().cpu()])
        if self.skeleton is not None:
            sharding.rest(self.objective)
        if world > 1:
            sums = self.accelerator.reduce(sums.to(self.accelerator.device)).cpu()
        self.objective.train()
        value = self.objective.figure(float(sums[0]), float(sums[1]))
        before = self.trace.validations
        self.trace.validations.append(Validation(step=step, tokens=self.trace.tokens[-1], value=value))
        best = None if self.trace.best is None else next(v.value for v in before if v.step == self.trace.best)
        if np.isfinite(value) and (
            best is None or (value > best if self.objective.better == "higher" else value < best)
        ):
            self.trace.best = step
            if self.settings.keep == "best":
                if self.workspace is not None:
                    state.save_best(self.workspace, self.objective, self.main)
                else:
                    self.memory = {name: tensor.clone() for name, tensor in state.weights(self.objective).items()}

    def _is_stale(self, every: int) -> bool:
        patience, best = self.settings.patience, self.trace.best
        return patience is not None and best is not None and self.trace.validations[-1].step - best >= patience * every

    def _settle(self) -> int | None:
        """Put the best weights back where those are to be kept; the step that they are of."""
        self.accelerator.wait_for_everyone()
        if self.settings.keep == "best" and self.trace.best is not None and self.trace.best != len(self.trace.tokens):
            if self.workspace is not None:
                state.load_best(self.workspace, self.objective)
            elif self.memory is not None:
                state.restore(self.objective, self.memory)
            kept = self.trace.best
        else:
            kept = len(self.trace.tokens)
        if self.skeleton is not None:
            self.objective.network = sharding.join(self.skeleton, state.weights(self.objective))
        return kept

    def _newest(self, workspace: Path) -> Path | None:
        """The checkpoint that the main process sees. Raises TrainError where another one does not see it."""
        mine = state.newest(workspace)
        step = int(self._main_says(0.0 if mine is None else float(mine.name.split("-")[1])))
        place = workspace / f"step-{step:09d}"
        if step and not place.exists():
            raise TrainError(
                f"{place} is not on this machine. Every machine must see the run folder: put it on a shared disk."
            )
        return place if step else None

    def _main_says(self, number: float) -> float:
        """The main process's `number`, on all processes."""
        import torch

        if self.world == 1:
            return number
        told = torch.tensor(number if self.main else 0.0, dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(told))

    def _gradients(self, last: bool) -> AbstractContextManager[None]:
        """Gradients of the parts before the last stay here; with the last one the processes add theirs up."""
        if self.skeleton is not None:
            return sharding.summed(self.objective, last)
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def _rng(self) -> "dict[str, Tensor]":
        """Random states of all processes, on all."""
        own = state.rng_of(self.accelerator.device)
        if self.world == 1:
            return own
        found: dict[str, Tensor] = {}
        for name, value in own.items():
            rows = self.accelerator.gather(value[None].to(self.accelerator.device)).cpu()
            found |= {f"{name}.{n}" if n else name: row.clone() for n, row in enumerate(rows)}
        return found

    def _for_all_to_know(self) -> "DistributedDataParallelKwargs":
        """How gradients are added up. To look for parameters without one at each step takes time: one example tells whether to."""
        import torch
        from accelerate.utils import DistributedDataParallelKwargs

        device = self.accelerator.device
        self.objective.to(device).train()
        with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
            with self.accelerator.autocast():
                losses = self.objective(_on(self.examples.batch([0]), device))
            torch.stack([value.float() for value in losses.values()]).sum().backward()
        some_without = any(p.grad is None for p in self.objective.parameters() if p.requires_grad)
        self.objective.zero_grad(set_to_none=True)
        return DistributedDataParallelKwargs(find_unused_parameters=some_without)

    def _scaler(self) -> dict[str, Any] | None:
        return None if self.accelerator.scaler is None else dict(self.accelerator.scaler.state_dict())

    def _words(self, step: int) -> str:
        recent = slice(max(0, step - 50), step)
        shares = {name: float(np.mean(values[recent])) for name, values in self.trace.shares.items()}
        text = f"loss {sum(shares.values()):.4g}"
        if len(shares) > 1:
            text += f" ({', '.join(f'{name} {value:.3g}' for name, value in shares.items())})"
        if self.trace.validations:
            text += f", {self.objective.metric} {self.trace.validations[-1].value:.4g}"
        first = max(self.start, step - 50)
        base = (self.trace.tokens[first - 1], self.trace.seconds[first - 1]) if first else (0, 0.0)
        seconds = max(self.trace.seconds[-1] - base[1], 1e-9)
        left = seconds / max(1, step - first) * (self.steps - step)
        return f"{text}, {(self.trace.tokens[-1] - base[0]) / seconds:,.0f} tokens/s, {_clock(left)} left"


def _accelerator(settings: "Training") -> "Accelerator":
    """Raises DeviceError for CUDA where there is none, and for a precision that the device lacks."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from squeeze.provenance import environment

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "training.device = cuda, and there is no CUDA here. `squeeze doctor` says why; set it to cpu or auto."
        )
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    if settings.precision == "auto":
        tiles = "amx_bf16" in environment().cpu_flags if on_cpu else torch.cuda.is_bf16_supported()
        precision = "bf16" if tiles else "no"
    else:
        precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[settings.precision]
    if on_cpu and precision == "fp16":
        raise DeviceError("training.precision = float16 has no kernels on a CPU. Set it to auto.")
    # One training after another in this process may differ in precision, device and number of processes.
    AcceleratorState._reset_state(True)
    with processes.launcher_environment():
        return Accelerator(cpu=on_cpu, mixed_precision=precision)


@contextmanager
def _deterministic(device: "torch.device") -> Iterator[None]:
    """Kernels that give the same bits every time, and no time spent on filling memory that guards against reading it unwritten."""
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]


def _groups(objective: "Objective", settings: "Training") -> "list[dict[str, Any]]":
    """Matrices decay, norms and biases do not (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    trained = [p for p in objective.parameters() if p.requires_grad]
    if not trained:
        raise TrainError("nothing is left to train: every parameter is frozen. Drop the setting that freezes them.")
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _on(batch: "Mapping[str, Tensor]", device: "torch.device", *, held_out: bool = False) -> "dict[str, Tensor]":
    """A batch where it is computed. Pinned memory lets the copy overlap with the step before. `held_out` tells caches apart."""
    import torch

    moved = {}
    for name, tensor in batch.items():
        moved[name] = tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
    if held_out:
        moved["held_out"] = torch.ones((), dtype=torch.bool)
    return moved


def _explained(error: BaseException, rows: int, settings: "Training") -> TrainError | None:
    """Memory that did not suffice, in words that help; None for any other error."""
    import torch

    text = str(error)
    if (
        not isinstance(error, torch.OutOfMemoryError | MemoryError)
        and "can't allocate memory" not in text
        and "not enough memory" not in text
    ):
        return None
    parts = next((n for n in range(settings.accumulation + 1, settings.batch + 1) if settings.batch % n == 0), None)
    mend = (
        "Shorten the texts (data.max_length, data.block_size)."
        if parts is None
        else f"Set training.accumulation to {parts} or more."
    )
    return TrainError(
        f"{rows} examples at once do not fit into memory. {mend} The result stays the same, it takes longer."
    )


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
