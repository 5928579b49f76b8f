"""What a training minimises: the one thing that a stage brings to the engine."""

from typing import TYPE_CHECKING, Literal

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from squeeze.masks import Kept


class Objective(nn.Module):
    """The network in training with whatever is trained beside it (projections, say), as one module that engines wrap whole.

    A frozen teacher is no part of it: hold it where `nn.Module` does not look (in a tuple), or it is trained, wrapped and stored.
    """

    network: nn.Module
    metric: str = "loss"
    """What `judge` measures: accuracy, perplexity, cosine …"""
    better: Literal["higher", "lower"] = "lower"
    kept: "Kept | None" = None
    """Zeros that the training leaves as they are."""

    def forward(self, batch: "Mapping[str, Tensor]", judge: bool = False) -> "dict[str, Tensor]":
        """Every loss's share of the whole, by its name, weights included, each the mean over the batch's `units`.

        With `judge`: {"value": sum of the metric over the batch, "count": what to divide it by}, scalars.
        """
        raise NotImplementedError

    def units(self, batch: "Mapping[str, Tensor]") -> float:
        """What the losses are means over (texts, or tokens that are predicted): batches in parts and on several processes are
        weighted with it, so that they give the gradient of the whole."""
        return float(len(batch["input_ids"]))

    def requires_grad_of_trained(self) -> None:
        """Say which parameters learn: all, unless a stage freezes some."""
        self.requires_grad_(True)
        self.changed()

    def changed(self) -> None:
        """Hear that parameters were frozen, freed, or replaced by this process's shares of them."""
        if self.kept is not None:
            self.kept.watch()

    def counts(self, step: int) -> bool:
        """Whether the weights after `step` may be those that come out as the best ones."""
        return True

    def write(self, folder: "Path") -> bool:
        """Write the network as a model that people can open, into an empty folder; False where the stage knows no such form."""
        return False

    def figure(self, value: float, count: float) -> float:
        """The metric as reports name it, from the sums over all held-out examples."""
        return value / max(count, 1e-30)
