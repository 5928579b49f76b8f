"""The loop: batches in, gradients through accelerate, validations, checkpoints, and the weights that came out best.

One process or many (`accelerate launch`, `torchrun`): every process computes its share of each batch, so a run on two has the batches,
and but for rounding the gradients, of a run on one. A run that was killed goes on from its newest checkpoint and, on one CPU
process with the same number of threads, reaches the same weights bit for bit.

Rejected: `transformers.Trainer`. Teachers, caches and several losses would live in its callbacks and overridden methods, its
checkpoints are pickles, and its defaults change between releases. accelerate alone gives what differs between devices.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from squeeze.errors import DeviceError, TrainError
from squeeze.provenance import Digest
from squeeze.report.training import TrainingCurve, Validation
from squeeze.training import processes, sharding, state
from squeeze.training.events import Events
from squeeze.training.examples import Examples, batches_of_epoch, by_length
from squeeze.training.failures import memory, unsound
from squeeze.training.schedule import factor
from squeeze.training.trace import Trace

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn

    from squeeze.training.objective import Objective
    from squeeze.training.settings import Training

Say = Callable[[int, int, str], None]
"""Step, all steps, and how it goes: losses, metric, tokens a second, time left."""
SAY_SECONDS = 0.2
"""Least time between two words of progress: the eye reads no faster, and a step of a small model takes a few milliseconds."""


@dataclass(frozen=True)
class Fit:
    """A training that has ended; its objective's network holds the weights that came out, in evaluation mode."""

    curve: TrainingCurve
    notes: tuple[str, ...]


def fit(
    objective: "Objective", examples: Examples, held_out: Examples | None, settings: "Training", *, workspace: Path | None = None,
    key: Digest = "", say: Say | None = None, events: Path | None = None,
) -> Fit:  # fmt: skip
    """Train `objective` in place. Checkpoints go to `workspace`, where a run with the same `key` goes on from them; `events` is the
    folder of TensorBoard's files where the settings want any.

    Raises TrainError for a loss, a gradient or a metric that is no number (the last good weights stay), for a batch that does not
    fit into memory, for no examples, and for a workspace that holds something else.
    """
    if not len(examples):
        raise TrainError("there is no example to train on. Set data.splits.train, or a smaller held_out.")
    if settings.tensorboard and events is None:
        raise TrainError(
            "training.tensorboard = true, and there is no folder here to write its files into. Set it to false."
        )
    accelerator = _accelerator(settings)
    with _deterministic(accelerator.device):
        run = _Run(
            objective, examples, held_out, settings, accelerator, workspace, key, say or (lambda i, n, text: None)
        )
        if settings.tensorboard and events is not None and accelerator.is_main_process:
            run.events = Events(events, run.start)
        try:
            return run.go()
        finally:
            if run.events is not None:
                run.events.close()


class _Run:
    def __init__(
        self, objective: "Objective", examples: Examples, held_out: Examples | None, settings: "Training", accelerator: "Accelerator",
        workspace: Path | None, key: Digest, say: Say,
    ) -> None:  # fmt: skip
        import torch
        from accelerate.utils import DistributedDataParallelKwargs

        self.objective, self.examples, self.settings, self.say = objective, examples, settings, say
        self.held_out = held_out if held_out is not None and len(held_out) else None
        self.accelerator, self.workspace = accelerator, workspace
        self.per_epoch = -(-len(examples) // settings.batch)
        self.steps = settings.steps_for(len(examples))
        self.trace = Trace()
        self.start = 0
        self.world, self.main = accelerator.num_processes, accelerator.is_main_process
        self.events: Events | None = None
        self.notes: tuple[str, ...] = ()
        if len(examples) < settings.batch:
            self.notes += (f"every step takes all {len(examples)} examples: a batch would have {settings.batch}",)
        torch.manual_seed(settings.seed + accelerator.process_index)
        objective.requires_grad_of_trained()
        wanted = settings.sharding == "fsdp" or processes.launcher_asks_for_sharding()
        self.skeleton = sharding.divide(objective, accelerator.device) if wanted and self.world > 1 else None
        self.optimizer = torch.optim.AdamW(_groups(objective, settings), lr=settings.learning_rate, fused=True)
        self.highest = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.wrapped: nn.Module = objective
        if self.skeleton is None:
            if self.world > 1:
                objective.to(accelerator.device)
                example = _on(examples.batch([0]), accelerator.device)
                with accelerator.autocast():
                    unused = sharding.leaves_some_out(objective, example, accelerator.device)
                accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=unused)
            self.wrapped, self.prepared = accelerator.prepare(objective, self.optimizer)
            if self.world > 1:
                self.wrapped.forward_sync_buffers = False  # type: ignore[assignment]  # tables of positions: no step changes them
        else:
            self.prepared = accelerator.prepare(self.optimizer)
        self.memory: dict[str, Tensor] | None = None
        if workspace is not None:
            if self.main:
                self.notes += state.prepare(workspace, key)
            accelerator.wait_for_everyone()
            if (place := self._newest(workspace)) is not None:
                self.start, self.trace, scaler = state.load(
                    place, objective, self.optimizer, accelerator.device, accelerator.process_index, self.world
                )
                if scaler is not None and accelerator.scaler is not None:
                    accelerator.scaler.load_state_dict(scaler)
                self.trace.resumed.append(self.start)
                if (other := state.changed(place, self.world)) and other not in self.trace.changes:
                    self.trace.changes.append(other)

    def go(self) -> Fit:
        """All steps that are left, then the weights to keep."""
        begun = time.monotonic() - (self.trace.seconds[-1] if self.trace.seconds else 0.0)
        saved, said = time.monotonic(), -SAY_SECONDS
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
            if self.held_out is not None and _is_due(step + 1, self.steps, self.settings.validations):
                self._validate(step + 1)
                if self.settings.patience is not None and self.trace.since_best() >= self.settings.patience:
                    stopped = f"stopped at step {step + 1} of {self.steps}: {self.settings.patience} validations without a better one"
            last = bool(stopped) or step + 1 == self.steps
            if last or time.monotonic() - said >= SAY_SECONDS:
                self.say(step + 1, self.steps, self.trace.words(self.objective.metric, self.start, self.steps))
                said = time.monotonic()
            if self.events is not None:
                self.events.step(self.trace, self.objective.metric)
            due = (time.monotonic() - saved) / 60 >= self.settings.checkpoint_minutes
            if self.workspace is not None and self._main_says(float(due)) and not last:
                if self.events is not None:
                    self.events.flush()
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
        divided = () if self.skeleton is None else (f"weights were divided among {self.world} processes",)
        return Fit(
            curve, (*self.notes, *divided, *self.trace.interruptions(self.steps), *([stopped] if stopped else []))
        )

    def _step(self, numbers: "np.ndarray[Any, np.dtype[np.int64]]", step: int) -> dict[str, float]:
        """One step of the optimizer; every loss's share of it, over all processes."""
        import torch

        parts = self._parts(numbers)
        batches = [(_on(self.examples.batch(part), self.accelerator.device), empty) for part, empty in parts]
        for batch, _ in batches:
            batch["step"] = torch.tensor(step)
        units = [0.0 if empty else self.objective.units(batch) for batch, empty in batches]
        total = sum(units)
        world = self.world
        if world > 1:
            total = float(
                self.accelerator.reduce(torch.tensor(total, dtype=torch.float64, device=self.accelerator.device))
            )
        if not total:
            raise TrainError(
                f"the {len(numbers)} examples of step {step + 1} have nothing to learn from: texts of one token, say. Drop them."
            )
        sums: dict[str, Tensor] = {}
        with memory(len(parts[0][0]), self.settings):
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
        if world > 1:
            sums = {name: self.accelerator.reduce(value) for name, value in sorted(sums.items())}
        found = dict(
            zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)
        )  # one wait for the device, not many
        if bad := [name for name, value in found.items() if not np.isfinite(value)]:
            self._fail(
                f"the loss {' and '.join(bad)} is not a number at step {step + 1} of {self.steps}",
                "Lower learning_rate, or that loss's weight.",
            )
        norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.settings.clip)
        if self.accelerator.scaler is None and not np.isfinite(
            float(sharding.whole(norm))
        ):  # float16's scaler passes over such a step by itself
            where = unsound(self.objective)
            self._fail(
                f"the gradient{where and ' of '}{where} is not a number at step {step + 1} of {self.steps}, and the losses are "
                f"({', '.join(f'{name} {value:.3g}' for name, value in found.items())})",
                "Lower learning_rate.",
            )
        self.prepared.step()
        self.prepared.zero_grad(set_to_none=True)
        return found

    def _parts(self, numbers: Any) -> list[tuple[Any, bool]]:
        """This process's parts of a batch; an empty one is an example that counts nothing, so that all take the same steps."""
        world, each = self.world, self.settings.accumulation
        split = np.array_split(numbers, world * each)
        own = split[self.accelerator.process_index * each : (self.accelerator.process_index + 1) * each]
        return [(part if len(part) else numbers[:1], len(part) == 0) for part in own if len(part) or world > 1]

    def _fail(self, what: str, mend: str) -> NoReturn:
        """End the training with TrainError; the last weights that are known to be good stay, as a model where that is possible."""
        self.prepared.zero_grad(set_to_none=True)
        kept = self._last_good()
        raise TrainError(f"{what}; that step was not taken.{kept} {mend}")

    def _last_good(self) -> str:
        """Put back the best weights, or those of the newest checkpoint, and say where they are."""
        from safetensors.torch import load_file

        place = None if self.workspace is None else state.newest(self.workspace)
        if self.settings.keep == "best" and self.trace.best is not None:
            self._put_back(self.trace.best)
            which = f"the best validation (step {self.trace.best})"
        elif place is not None:
            state.restore(self.objective, load_file(place / "weights.safetensors"))
            which = f"the newest checkpoint ({place.name})"
        else:
            return " No validation or checkpoint had come before it, so no weights were kept."
        self.objective.eval().requires_grad_(False)
        if self.workspace is None:
            return f" The network holds the weights of {which}."
        if self.world == 1 and (folder := state.leave(self.workspace, self.objective)) is not None:
            return f" The weights of {which} are a model in {folder}, until the next training begins there: copy it to keep it."
        return f" The weights of {which} are in {self.workspace}, until the next training begins there."

    def _validate(self, step: int) -> None:
        import torch

        assert self.held_out is not None
        self.objective.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        world, rank = self.world, self.accelerator.process_index
        groups = list(
            by_length(self.held_out.lengths, max(1, self.settings.batch // self.settings.accumulation // world))
        )
        with torch.no_grad(), self.accelerator.autocast(), memory(len(groups[0]), self.settings):
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
        if not np.isfinite(value):
            self._fail(
                f"{self.objective.metric} on the held-out examples is {value} after step {step}", "Lower learning_rate."
            )
        better = self.objective.counts(step) and self.trace.is_better(value, self.objective.better)
        self.trace.validations.append(Validation(step=step, tokens=self.trace.tokens[-1], value=value))
        if better:
            self.trace.best = step
            if self.settings.keep == "best":
                if self.workspace is not None:
                    state.save_best(self.workspace, step, self.objective, self.main)
                else:
                    self.memory = {name: tensor.clone() for name, tensor in state.weights(self.objective).items()}

    def _settle(self) -> int | None:
        """Put the best weights back where those are to be kept; the step that they are of."""
        self.accelerator.wait_for_everyone()
        if self.settings.keep == "best" and self.trace.best is not None and self.trace.best != len(self.trace.tokens):
            self._put_back(self.trace.best)
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
            raise TrainError(f"{place} is not on this machine. All must see the run folder: put it on a shared disk.")
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

    def _put_back(self, best: int) -> None:
        if self.workspace is not None:
            state.load_best(self.workspace, best, self.objective)
        elif self.memory is not None:
            state.restore(self.objective, self.memory)

    def _scaler(self) -> dict[str, Any] | None:
        return None if self.accelerator.scaler is None else dict(self.accelerator.scaler.state_dict())


def _is_due(step: int, steps: int, validations: int) -> bool:
    """Whether one of so many evenly spread validations follows `step`; the last one follows the last step."""
    return step * validations // steps > (step - 1) * validations // steps


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

    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if device.type == "cuda":
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # without it cuBLAS may add in another order each time
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
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
