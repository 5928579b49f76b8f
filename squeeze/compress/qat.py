"""Quantization-aware training: go on training a quantized model while it computes with its integers.

Forward, every weight is rounded onto its grid and every input into its range; backward, rounding counts as the identity (Bengio et al.
2013, arXiv:1308.3432), and the ranges of inputs learn as well (LSQ, Esser et al. 2019, arXiv:1902.08153, eq. 3, gradients scaled by
1/√(n · q_max)). The scales of weights stay: they are the result of the stage before, which may be any.
The teacher is the run's own source model: no labels are needed, and the aim is its answers, not better ones.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from squeeze.errors import QuantizeError
from squeeze.report.schema import StageRecord
from squeeze.training.schedule import factor

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from squeeze.integers import InputGrid, IntegerWeight
    from squeeze.model import Model

    Batches = Sequence[Mapping[str, NDArray[np.int64]]]

LEVELS = 255


class QatStage(BaseModel):
    """Train a quantized model with its rounding in the loop; comes right after a quantize stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["qat"] = "qat"
    epochs: int = Field(default=1, ge=1, description="passes over the training texts")
    examples: int | None = Field(default=None, ge=1, description="texts of the train split that are used; none: all")
    batch: int = Field(default=32, ge=1, description="texts in a step")
    learning_rate: float = Field(default=2e-5, gt=0, description="highest rate, after warming up; falls to 0 linearly")
    warm_up: float = Field(default=0.1, ge=0, lt=1, description="share of the steps over which the rate rises")
    temperature: float = Field(
        default=2.0, gt=0, description="softens teacher and student (Hinton et al. 2015, arXiv:1503.02531)"
    )
    labels: float = Field(
        default=0.0, ge=0, le=1, description="share of the labels in the loss; the teacher has the rest"
    )
    learn_ranges: bool = Field(
        default=True, description="let the ranges of inputs learn, where they are fixed (int8-static)"
    )
    range_rate: float = Field(
        default=1e-2,
        gt=0,
        description="highest rate of the logarithms of those ranges: a step changes a range by about this share",
    )
    clip: float = Field(default=1.0, gt=0, description="largest norm of a gradient")
    seed: int = Field(default=0, ge=0, description="order of the batches")

    @property
    def scheme(self) -> str:
        """For progress: what the stage is about."""
        return f"{self.epochs} epochs"

    @property
    def progress_noun(self) -> str:
        """For progress: what is counted."""
        return "step"

    @property
    def needs_data(self) -> bool:
        """Always: it trains."""
        return True

    def apply(
        self, model: "Model", texts: "Batches" = (), done: Callable[[int, int], None] | None = None, teacher: "Model | None" = None
    ) -> StageRecord:  # fmt: skip
        """Train `model`, a quantized one, in place on `texts` (batches, with `labels` where the loss needs them)."""
        return train(self, model, texts, done, teacher)


def train(
    stage: QatStage, model: "Model", texts: "Batches", done: Callable[[int, int], None] | None, teacher: "Model | None"
) -> StageRecord:
    """See QatStage.apply. Raises QuantizeError for a model without integers, without texts, and for a loss that is no number."""
    import torch

    from squeeze.masks import kept_zero, masks_of

    if not model.integers:
        raise QuantizeError(f"{model.source} is not quantized yet. Put a quantize stage before qat.")
    if not texts:
        raise QuantizeError("qat trains on the train split. Set data.splits.train, to rest for all that is left over.")
    if teacher is None and not stage.labels:
        raise QuantizeError("qat has neither a teacher nor labels to learn from. Set labels above 0.")
    started = time.monotonic()
    torch.manual_seed(stage.seed)
    layers = _Layers(model)
    parameters, ranges = _trained(model), list(layers.ranges.values()) if stage.learn_ranges else []
    steps = stage.epochs * len(texts)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": stage.learning_rate}, {"params": ranges, "lr": stage.range_rate}], weight_decay=0.0
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor("linear", step, steps, stage.warm_up))
    generator = torch.Generator().manual_seed(stage.seed)
    losses: list[float] = []
    with kept_zero(model.network, masks_of(model)), layers:  # of what is zero by now, also by rounding
        for _ in range(stage.epochs):
            for number in torch.randperm(len(texts), generator=generator).tolist():
                loss = _loss(stage, model, teacher, texts[number])
                if not bool(torch.isfinite(loss)):
                    raise QuantizeError(
                        f"the loss of qat is {float(loss.detach())} at step {len(losses) + 1} of {steps}. Lower learning_rate; "
                        "nothing was written."
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_([*parameters, *ranges], stage.clip)
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
                if done is not None:
                    done(len(losses), steps)
        moved = layers.harvest()
    model.network.eval().requires_grad_(False)
    kept = (
        (f"all zeros of {len(model.pruned)} pruned matrices stayed, also those that rounding had made",)
        if model.pruned
        else ()
    )
    part = max(1, len(losses) // 10)
    notes = (
        f"{steps} steps of {stage.batch} texts; loss {_mean(losses[:part]):.4g} in the first tenth, "
        f"{_mean(losses[-part:]):.4g} in the last",
        f"{moved:.1%} of the integers changed" + (f", {len(ranges)} input ranges learned" if ranges else ""),
    )  # fmt: skip
    return StageRecord(
        kind="qat",
        settings=stage.model_dump(mode="json"),
        seconds=time.monotonic() - started,
        layers=(),
        notes=notes + kept,
    )


class _Layers:
    """The integer layers while they train: weights rounded by parametrization, inputs by hooks, both taken off again."""

    def __init__(self, model: "Model") -> None:
        import torch
        from torch import nn

        from squeeze.model import aliases

        self.model = model
        names = aliases(model.network)
        tables = {id(m.weight) for m in model.network.modules() if isinstance(m, nn.Embedding)}
        self.members: list[tuple[str, nn.Module, IntegerWeight]] = []
        self.ranges: dict[tuple[float, int], Tensor] = {}
        """Logarithms of what each scale is multiplied by: steps of the optimizer are then relative, whatever the inputs' size.
        Layers that read one tensor share one range, and so one number to learn."""
        for path, module in model.network.named_modules():
            name = names.get(f"{path}.weight", f"{path}.weight")
            integer = model.integers.get(name)
            if integer is None or isinstance(module, nn.Embedding):
                continue
            self.members.append((name, module, integer))
            if integer.inputs is not None:
                key = (integer.inputs.scale, integer.inputs.zero_point)
                self.ranges.setdefault(key, torch.nn.Parameter(torch.zeros(())))
        self.frozen = {name for name, module, _ in self.members if id(module.weight) in tables}
        self.hooks: list[Any] = []

    def __enter__(self) -> "_Layers":
        from torch.nn.utils import parametrize

        from squeeze.simulation import input_rounding

        self.model.network.eval()  # without dropout: the aim is the teacher's answers, not to generalise anew
        for name, module, integer in self.members:
            if name not in self.frozen:
                parametrize.register_parametrization(module, "weight", _rounded_weight(integer), unsafe=True)
            if integer.inputs is None:
                rounding = _straight_through(input_rounding(integer))
            else:
                growth = self.ranges[(integer.inputs.scale, integer.inputs.zero_point)]
                rounding = _learned_range(growth, integer.inputs, integer.divisor)
                rounding = rounding if integer.outliers is None else integer.outliers.around(rounding)
            self.hooks.append(
                module.register_forward_pre_hook(lambda _, x, rounding=rounding: (rounding(x[0]), *x[1:]))
            )
        return self

    def __exit__(self, *_: object) -> None:
        import torch
        from torch.nn.utils import parametrize

        for hook in self.hooks:
            hook.remove()
        for name, module, _integer in self.members:
            if name not in self.frozen:
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
                with torch.no_grad():
                    cast("nn.Parameter", module.weight).copy_(self.model.integers[name].dequantize())

    def harvest(self) -> float:
        """Write the integers and ranges as they have become into the model; return the share of integers that changed."""
        import dataclasses

        from squeeze.integers import InputGrid

        changed = total = 0
        for name, module, integer in self.members:
            new = integer
            if name not in self.frozen:
                original = cast("Any", module).parametrizations.weight.original.detach()
                new = _as_trained(original, integer)
                changed += int((new.integers != integer.integers).sum())
                total += new.integers.numel()
            if integer.inputs is not None:
                growth = self.ranges[(integer.inputs.scale, integer.inputs.zero_point)].detach()
                scale = float(integer.inputs.scale * growth.exp())
                new = dataclasses.replace(new, inputs=InputGrid(scale, integer.inputs.zero_point))
            self.model.integers[name] = new
        return changed / max(total, 1)


def _integers(weight: "Tensor", integer: "IntegerWeight") -> "Tensor":
    """The weight's nearest integers on the grid that `integer` has, [out, in] as floats; differentiable but for the rounding."""
    import torch

    from squeeze.integers import Grid

    rows = weight.T if integer.transposed else weight
    if integer.divisor is not None:
        rows = rows * integer.divisor
    if integer.outliers is not None:
        rows = rows.index_fill(1, integer.outliers.channels, 0)
    zero = integer.zero_point
    symmetric = isinstance(zero, int)
    wide = integer.wide(integer.scale)
    low, high = Grid(integer.bits, symmetric, integer.integers.dtype == torch.uint8, integer.reach).bounds
    shift = zero if isinstance(zero, int) else integer.wide(zero).float()
    return (torch.round(rows / wide) + shift).clamp(low, high)


def _as_trained(weight: "Tensor", integer: "IntegerWeight") -> "IntegerWeight":
    """`integer` with the integers, and the float columns of outlier channels, that `weight` has by now."""
    import dataclasses

    rows = weight.T if integer.transposed else weight
    outliers = None if integer.outliers is None else integer.outliers.of(rows)
    return dataclasses.replace(
        integer, integers=_integers(weight, integer).to(integer.integers.dtype), outliers=outliers
    )


def _rounded_weight(integer: "IntegerWeight") -> "nn.Module":
    from torch import nn

    class Rounded(nn.Module):
        def forward(self, weight: "Tensor") -> "Tensor":
            on_grid = _as_trained(weight.detach(), integer).dequantize()
            return weight + (on_grid - weight).detach()

    return Rounded()


def _straight_through(rounding: "Callable[[Tensor], Tensor]") -> "Callable[[Tensor], Tensor]":
    return lambda x: x + (rounding(x.detach()) - x).detach()


def _learned_range(growth: "Tensor", grid: "InputGrid", divisor: "Tensor | None") -> "Callable[[Tensor], Tensor]":
    """LSQ: rounding to uint8 that is differentiable in the inputs and in the scale, grid.scale · exp(growth)."""
    import torch

    from squeeze.integers import reciprocal

    def rounding(x: "Tensor") -> "Tensor":
        y = x if divisor is None else x * reciprocal(divisor)
        # The scale's gradient sums over all numbers; this keeps its size that of a weight's.
        weight = 1 / math.sqrt(y.numel() * LEVELS)
        slow = (growth - growth * weight).detach() + growth * weight
        s = grid.scale * slow.exp()
        places = (y / s).clamp(-grid.zero_point, LEVELS - grid.zero_point)
        y = (places + (torch.round(places) - places).detach()) * s
        return y if divisor is None else y * divisor

    return rounding


def _loss(
    stage: QatStage, model: "Model", teacher: "Model | None", batch: "Mapping[str, NDArray[np.int64]]"
) -> "Tensor":
    """(1 − labels) · T² KL(teacher ‖ student) + labels · cross entropy, over the tokens that are no padding."""
    import torch
    from torch.nn import functional

    from squeeze.model import answer

    inputs = {name: torch.from_numpy(batch[name]) for name in model.text_inputs if name in batch}
    ours = answer(model.network(**inputs), model.task)
    mask = inputs["attention_mask"].bool() if ours.dim() == 3 and "attention_mask" in inputs else None
    loss = torch.zeros(())
    if teacher is not None and stage.labels < 1:
        with torch.no_grad():
            theirs = answer(teacher.network(**inputs), model.task)
        one, other = (theirs, ours) if mask is None else (theirs[mask], ours[mask])
        if model.task == "feature-extraction":
            loss = functional.mse_loss(other, one)
        else:
            t = stage.temperature
            one, other = (functional.log_softmax(logits / t, dim=-1).flatten(0, -2) for logits in (one, other))
            loss = t * t * functional.kl_div(other, one, reduction="batchmean", log_target=True)
        loss = (1 - stage.labels) * loss
    if stage.labels:
        if model.task == "causal-lm":
            goal, scored = inputs["input_ids"][:, 1:].flatten(), ours[:, :-1].flatten(0, 1)
        elif "labels" in batch:
            goal, scored = torch.from_numpy(batch["labels"]), ours
        else:
            raise QuantizeError(
                f"labels has a share of {stage.labels:g} in the loss, but {model.task} has no labels here."
            )
        loss = loss + stage.labels * functional.cross_entropy(scored, goal)
    return loss


def _trained(model: "Model") -> "list[torch.nn.Parameter]":
    """All parameters but embeddings: their gradients cost more than a step, and their integers are those that the graph looks up.

    Nor the integers of LSTMs, whose rounding is a loop that no parametrization enters.
    """
    from torch import nn

    from squeeze.recurrent import kernel_groups

    tables = {id(m.weight) for m in model.network.modules() if isinstance(m, nn.Embedding)}
    recurrent = {name for group in kernel_groups(model.network) for name in group if name in model.integers}
    found = [p for name, p in model.network.named_parameters() if id(p) not in tables and name not in recurrent]
    for parameter in found:
        parameter.requires_grad_(True)
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
