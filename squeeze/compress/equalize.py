"""Weight equalization across layers: a channel is made as wide where it is produced as where it is read. Needs no data.

Nagel, van Baalen, Blankevoort, Welling 2019, arXiv:1906.04721, section 4.1: for every channel i of a linked pair,
s_i = √(r1_i · r2_i) / r2_i with r1_i the range of the producer's row i and r2_i that of the readers' column i; rows are divided by s,
columns multiplied, pair after pair until nothing moves (equations 9 to 11). A norm counts as a producer whose rows are its weights.
We depart in one point: only links that the network is proven to have are used (squeeze.compress.links), so that ReLU need not be named,
and biases are scaled but not absorbed.
"""

from typing import TYPE_CHECKING

import torch

from squeeze.compress.links import Link, change, find_links, probe_answer
from squeeze.compress.smooth import EXACT
from squeeze.errors import QuantizeError

if TYPE_CHECKING:
    from squeeze.model import Model

ROUNDS = 20
SETTLED = 1e-3
"""Largest change of any channel in a round after which there are no more, as a share."""


def equalize(model: "Model") -> tuple[str, ...]:
    """Equalize every linked pair in place; what was done, in words.

    Raises QuantizeError where the network has no such pair, or where its answer would change; it computes what it did in either case.
    """
    links = find_links(model, "Drop equalize.")
    before = probe_answer(model)
    factors = [torch.ones(link.channels) for link in links]
    with torch.no_grad():
        for _round in range(ROUNDS):
            moved = 0.0
            for link, total in zip(links, factors, strict=True):
                factor = balance(link)
                link.scale(factor)
                total.mul_(factor)
                moved = max(moved, float((factor - 1).abs().max()))
            if moved < SETTLED:
                break
        changed = change(before, probe_answer(model))
        if not changed <= EXACT:
            for link, total in zip(links, factors, strict=True):
                link.scale(1 / total)
            raise QuantizeError(
                f"equalized, {model.source} answers otherwise by {changed:.2g} of its size, more than rounding. Drop equalize."
            )
    largest = max(float(torch.maximum(total, 1 / total).max()) for total in factors)
    norms = sum(link.is_norm for link in links)
    return (
        f"ranges of {len(links)} pairs equalized, {norms} of them from a norm to what reads it and {len(links) - norms} between linear "
        f"layers; the largest scale is {largest:.3g}",
    )


def balance(link: Link) -> "torch.Tensor":
    """s of equation 11, [channels]; 1 for a channel that is nowhere produced or nowhere read."""
    made = link.produced().abs().amax(dim=1)
    read = link.pooled(link.read().abs().amax(dim=0), "amax")
    factor = (made / read).sqrt()  # √(r1 r2) / r2
    return torch.where((made > 0) & (read > 0), factor, torch.ones_like(factor))
