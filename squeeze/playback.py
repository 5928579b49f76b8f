"""How far a network that has been changed in one place is from itself, measured at the price of what comes after the change.

`Playback` runs a network on fixed texts and enters it at any of its blocks: what the blocks before gave is kept, of one block alone, so
a change in block n costs the blocks from n on. `Meter` holds the answers of the network as it was and says how far those of now
are. Both know nothing of what was changed: quantization measures what integers cost a layer with them, pruning what zeros do.
Rejected: the error of the changed layer's own outputs. It is cheaper, and does not know what a layer is for.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from squeeze.errors import QuantizeError, SqueezeError
from squeeze.evaluate import embed, probes
from squeeze.layerwise import repeated_blocks
from squeeze.model import Model, aliases, answer

Batches = Sequence[Mapping[str, NDArray[np.int64]]]
Done = Callable[[int, int], None]
Unit = TypeVar("Unit")
Value = TypeVar("Value")

UNITS = {"causal-lm": "nats per token", "text-classification": "nats per text", "feature-extraction": "1 − cosine"}
"""Of the distance between two networks' answers, for each task."""
TEXTS = {"causal-lm": 2, "text-classification": 64, "feature-extraction": 64}
TOKENS = 512
"""Positions of all blocks together at which a decoder's distributions are compared: 100 MB for a vocabulary of 49,152."""


class Playback:
    """A network on fixed texts, entered at any of its blocks; it keeps what one block gave, and no more.

    `positions`: where a decoder's logits are wanted; those that can give them there alone do so.
    """

    def __init__(self, network: nn.Module, texts: list[dict[str, Tensor]], positions: Tensor | None = None) -> None:
        self.network, self.texts = network, texts
        takes = inspect.signature(network.forward).parameters
        self.settings: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        if positions is not None and "logits_to_keep" in takes:
            self.settings["logits_to_keep"] = positions
        self.depth = 0
        """How many blocks are not run any more."""
        self.given: list[Any] = []
        """What the last of them gave for each batch of texts."""
        try:
            blocks = list(repeated_blocks(network)[1])
        except QuantizeError:
            blocks = []
        self.blocks: list[nn.Module] = blocks
        self.first_at = self._places()

    def _places(self) -> dict[nn.Module, int]:
        """For every module that is run, how many blocks have ended before. Blocks that are not run once each, in order, cannot be
        entered: then there are none."""
        ended = 0
        order: list[nn.Module] = []
        at: dict[nn.Module, int] = {}

        def starts(module: nn.Module, _: object) -> None:
            at.setdefault(module, ended)
            if module in inside:
                order.append(module)

        def ends(*_: object) -> None:
            nonlocal ended
            ended += 1

        inside = set(self.blocks)
        hooks = [module.register_forward_pre_hook(starts) for module in self.network.modules()]
        hooks += [block.register_forward_hook(ends) for block in self.blocks]
        try:
            self.run(0)
        finally:
            for hook in hooks:
                hook.remove()
        if order != self.blocks or any("forward" in vars(block) for block in self.blocks):
            self.blocks = []
            return dict.fromkeys(at, 0)
        return at

    def run(self, number: int) -> Any:
        """What the network gives for batch `number`, the blocks up to `depth` as they were when they were passed."""
        passed = self.blocks[: self.depth]
        try:
            for block in passed:
                block.forward = lambda *_, **__: _fresh(self.given[number])
            return self.network(**self.texts[number], **self.settings)
        finally:
            for block in passed:
                vars(block).pop("forward", None)

    def advance(self) -> None:
        """Pass the next block, with the network as it is now."""
        given: list[Any] = []

        def ended(_: nn.Module, __: object, output: Any) -> None:
            given.append(output)
            raise _Passed

        hook = self.blocks[self.depth].register_forward_hook(ended)
        try:
            for number in range(len(self.texts)):
                with suppress(_Passed):
                    self.run(number)
        finally:
            hook.remove()
        self.given = given
        self.depth += 1

    def rewind(self) -> None:
        """Back to the whole network."""
        self.depth, self.given = 0, []


def measured_in_order(
    playback: Playback, units: Mapping[Unit, Sequence[nn.Module]], measure: Callable[[Unit], Value], done: Done | None = None
) -> dict[Unit, Value]:  # fmt: skip
    """`measure(unit)` of each unit, called when all blocks that run before its modules have been passed, so that they are not run again.

    A unit whose modules no text reaches is left out. `done(i, n)` is called after block i of n.
    """
    at = {
        unit: min((playback.first_at.get(module, -1) for module in modules), default=-1)
        for unit, modules in units.items()
    }
    found: dict[Unit, Value] = {}
    last = len(playback.blocks)
    for depth in range(last + 1):
        found |= {unit: measure(unit) for unit in units if at[unit] == depth}
        if depth < last:
            with torch.no_grad():
                playback.advance()
        if done is not None and last:
            done(min(depth + 1, last), last)
    playback.rewind()
    return found


class _Passed(Exception):
    """The block that a pass was for has ended."""


def _fresh(output: Any) -> Any:
    """A block's output, its hidden state copied: a network may add to it in place."""
    return output.clone() if isinstance(output, Tensor) else (output[0].clone(), *output[1:])


class Meter:
    """The network's answers to some calibration texts as it is now, and how far it is from them once it has been changed.

    `length`: a decoder's blocks are cut to as many tokens, and its distributions compared at `tokens` positions of all blocks together.
    `fault` is raised where the changed network's answers are not finite.
    """

    def __init__(
        self, model: Model, calibration: Batches, texts: int | None, *, length: int | None = None, tokens: int = TOKENS,
        fault: type[SqueezeError] = QuantizeError,
    ) -> None:  # fmt: skip
        self.model, self.unit, self.fault = model, UNITS[model.task], fault
        self.batches = _some(calibration, model, texts or TEXTS[model.task])
        if length is not None and model.task == "causal-lm":
            self.batches = [{name: array[:, :length] for name, array in batch.items()} for batch in self.batches]
        self.texts = sum(len(batch["input_ids"]) for batch in self.batches)
        tensors = [{name: torch.from_numpy(a) for name, a in batch.items()} for batch in self.batches]
        self.positions: Tensor | None = None
        if model.task == "causal-lm":
            shortest = min(batch["input_ids"].shape[1] for batch in self.batches)
            self.positions = torch.from_numpy(probes(shortest, max(1, tokens // self.texts)))
        with torch.no_grad():
            self.playback = Playback(model.network, tensors, self.positions)
            self.exact = [self._answers(number) for number in range(len(self.batches))]

    def distance(self) -> float:
        """Mean over texts or tokens of how far the answers are now. Raises `fault` where they are not finite."""
        total, count = 0.0, 0
        with torch.no_grad():
            for number, exact in enumerate(self.exact):
                found = self._answers(number)
                is_embedding = self.model.task == "feature-extraction"
                apart = (found - exact).square().sum(dim=-1) / 2 if is_embedding else divergence(exact, found)
                total += float(apart.double().sum())
                count += len(apart)
        if not np.isfinite(total):
            raise self.fault(
                f"{self.model.source} answers NaN or infinity on the calibration texts. Repair the checkpoint; nothing was written."
            )
        return total / count

    def _answers(self, number: int) -> Tensor:
        """Log-probabilities [tokens or texts, classes], or unit embeddings [texts, width]."""
        batch = self.batches[number]
        out = answer(self.playback.run(number), self.model.task)
        mask = batch.get("attention_mask", np.ones_like(batch["input_ids"]))
        if self.model.task == "feature-extraction":
            return torch.from_numpy(embed(out.numpy(), mask))
        if self.positions is not None:
            out = out if "logits_to_keep" in self.playback.settings else out[:, self.positions]
            out = out[torch.from_numpy(mask).bool()[:, self.positions]]
        return out.float().log_softmax(dim=-1)


def divergence(exact: Tensor, found: Tensor) -> Tensor:
    """KL(exact ‖ found) of each row of log-probabilities [rows, classes].

    As log E[eᵈ] − E[d] with d = found − exact and expectations under `exact`: written out, Σ p (log p − log q) loses what is below
    the rounding of log p, which for a layer that hardly matters is all there is.
    """
    p, d = exact.exp(), found - exact
    d = d - (p * d).sum(dim=-1, keepdim=True) / p.sum(dim=-1, keepdim=True)
    small = torch.log1p((p * torch.expm1(d)).sum(dim=-1).clamp(min=0))
    return torch.where(small.isfinite(), small, torch.logsumexp(exact + d, dim=-1))


def _some(calibration: Batches, model: Model, count: int) -> list[dict[str, NDArray[np.int64]]]:
    """`count` texts spread evenly over the calibration batches, as the network takes them; a decoder's one by one, for their logits
    are large."""
    where = [(number, row) for number, batch in enumerate(calibration) for row in range(len(batch["input_ids"]))]
    picked = [where[i] for i in np.unique(np.linspace(0, len(where) - 1, min(count, len(where))).round().astype(int))]
    rows: dict[tuple[int, int], list[int]] = {}
    for number, row in picked:
        rows.setdefault((number, row if model.task == "causal-lm" else 0), []).append(row)
    return [
        {name: calibration[number][name][chosen] for name in model.text_inputs if name in calibration[number]}
        for (number, _), chosen in rows.items()
    ]


def readers(network: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules that hold each parameter, by its first name."""
    shared, found = aliases(network), dict[str, list[nn.Module]]()
    for path, module in network.named_modules():
        for own, _ in module.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            found.setdefault(shared.get(name, name), []).append(module)
    return found
