"""Training on what the student itself writes: it learns from the teacher where its own text leads it.

Agarwal et al. 2023, "On-Policy Distillation of Language Models" (GKD, arXiv:2306.13649), algorithm 1: with probability λ a step's texts
are continued by the student instead of read, and the divergence from the teacher is taken over the tokens that it wrote. No
gradient goes through the sampling.

Every draw comes from (seed, step) and, for a token, the number of the example beside them; the engine puts the step into each batch.
No generator is carried along, so a run that went on after an interruption, or that runs on more processes, samples the same.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from squeeze.distillation.generate import continued, uniforms
from squeeze.errors import TrainError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from squeeze.distillation.objective import Teacher
    from squeeze.distillation.settings import OnPolicySettings

DIVERGENCES = frozenset({"kl", "reverse-kl", "skewed-kl", "js"})
"""Losses that say something of a text that the student wrote: all others are left out of those steps."""


class OnPolicy:
    """Which steps are sampled, and their batches. `teacher` is live: a cache knows no text that was not there before."""

    def __init__(
        self, settings: "OnPolicySettings", teacher: "Teacher", ends: frozenset[int], seed: int, pad: int
    ) -> None:
        self.settings, self.teacher, self.ends, self.seed, self.pad = settings, teacher, ends, seed, pad

    def is_due(self, step: int) -> bool:
        """Whether this step's texts are the student's: the same on every process."""
        due = step % self.settings.every == 0
        return due and bool(np.random.default_rng((self.seed, step)).random() < self.settings.share)

    def sampled(self, network: "nn.Module", batch: "Mapping[str, Tensor]") -> "tuple[dict[str, Tensor], float]":
        """The batch with the student's continuations of its first tokens, and the share of `new_tokens` that it wrote before the ends.

        `prompt` [b] marks what was given. Texts shorter than a prompt are refused, as they would be padded on the wrong side.
        """
        if is_sharded(network):
            raise TrainError(
                "on_policy samples from the whole student, and FSDP has cut it up. Train with DDP or one process, or drop on_policy."
            )
        given = batch["input_ids"][:, : self.settings.prompt]
        if not bool(batch["attention_mask"][:, : self.settings.prompt].all()) or given.shape[1] < self.settings.prompt:
            raise TrainError(
                f"on_policy.prompt = {self.settings.prompt} tokens, and some examples are shorter. Lower it."
            )
        step = int(batch["step"])
        uniform = uniforms(
            [(self.seed, step, number + 1) for number in batch["index"].tolist()], self.settings.new_tokens
        )
        was = network.training
        network.eval()
        try:
            whole, lengths = continued(
                network,
                given,
                self.settings.new_tokens,
                self.ends,
                temperature=self.settings.temperature,
                uniform=uniform,
            )
        finally:
            network.train(was)
        mask = (torch.arange(whole.shape[1], device=whole.device) < lengths[:, None]).long()
        made = {"input_ids": torch.where(mask.bool(), whole, self.pad), "attention_mask": mask, "index": batch["index"]}
        made["prompt"] = torch.full_like(lengths, self.settings.prompt)
        if "token_type_ids" in batch:
            made["token_type_ids"] = torch.zeros_like(mask)
        written = float((lengths - self.settings.prompt).sum())
        return made, written / (len(lengths) * self.settings.new_tokens)


def is_sharded(network: "nn.Module") -> bool:
    """Whether FSDP, the first or the second, holds parts of the network elsewhere."""
    names = {kind.__name__ for module in network.modules() for kind in type(module).__mro__}
    return bool(names & {"FullyShardedDataParallel", "FSDPModule"})
