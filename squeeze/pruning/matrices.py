"""Which weight matrices are pruned, and why the others stay dense.

Only what lies inside the repeated blocks is pruned. Embeddings, the output matrix, poolers and heads decide more than they weigh, and
what calibration says of an input holds for a block's layers alone. A network without repeated blocks (an LSTM, say) loses weights in
all its matrices but those that are looked up or give the answers.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from squeeze.errors import LayerwiseError, PruneError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

SMALL_HEAD = 32
"""Outside of blocks, a linear layer with fewer outputs gives the answers."""


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a network."""

    name: str
    """Of the parameter; a tied one's first name."""
    weight: "Tensor"
    transposed: bool
    """Whether it is stored [in, out]."""
    note: str
    """Why it stays dense; "" where it is pruned."""

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        one, other = self.weight.shape
        return (other, one) if self.transposed else (one, other)

    def rows(self) -> "Tensor":
        """A float32 view or copy, [out, in]; not to be written to."""
        return (self.weight.T if self.transposed else self.weight).detach().float()

    def put(self, rows: "Tensor") -> None:
        """Take [out, in] as the new values."""
        self.weight.detach().copy_(rows.T if self.transposed else rows)


def matrices(network: "nn.Module", keep: Sequence[str] = ()) -> list[Matrix]:
    """Every weight matrix once, in the network's order.

    Raises PruneError for a `keep` pattern that matches none, where nothing is left to prune, and for NaN or infinite weights (named).
    """
    bad = nonfinite(network)
    if bad:
        listed = ", ".join(f"{name} ({count})" for name, count in list(bad.items())[:5])
        raise PruneError(
            f"{len(bad)} tensors hold NaN or infinite weights: {listed}. Repair the checkpoint; nothing was changed."
        )
    found, unmatched = [], set(keep)
    for matrix in _all(network):
        kept = [p for p in keep if fnmatch(matrix.name.removesuffix(".weight"), p) or fnmatch(matrix.name, p)]
        unmatched -= set(kept)
        note = f"stays dense: keep {kept[0]!r}" if kept and not matrix.note else matrix.note
        found.append(Matrix(matrix.name, matrix.weight, matrix.transposed, note))
    if unmatched:
        names = [matrix.name.removesuffix(".weight") for matrix in found]
        raise PruneError(f"keep {min(unmatched)!r} matches no matrix. {nearest(min(unmatched), names[:400])}")
    if all(matrix.note for matrix in found):
        raise PruneError(
            f"{type(network).__name__} has no matrix to prune: {found[0].note if found else 'it has none at all'}."
        )
    return found


def nonfinite(network: "nn.Module") -> dict[str, int]:
    """How many NaN or infinite weights each tensor holds; only those that hold any."""
    counts = {name: 0 if p.sum().isfinite() else int((~p.isfinite()).sum()) for name, p in network.named_parameters()}
    return {name: count for name, count in counts.items() if count}


def sparsity_of(weight: "Tensor") -> float:
    """Share of zeros, [0, 1]."""
    return 1.0 - int(weight.count_nonzero()) / max(weight.numel(), 1)


def _all(network: "nn.Module") -> list[Matrix]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from squeeze.layerwise import repeated_blocks

    try:
        inside = f"{repeated_blocks(network)[0]}."
    except LayerwiseError:
        inside = ""
    uses = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    get = getattr(network, "get_output_embeddings", None)
    head = get() if callable(get) else getattr(network, "lm_head", None)
    found: dict[int, Matrix] = {}
    for path, module in network.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding | Conv1D | nn.RNNBase):
            continue
        for own, weight in module.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            if weight.dim() != 2 or id(weight) in found:
                continue
            if isinstance(module, nn.Embedding):
                note = "stays dense: rows of an embedding are looked up whole"
            elif weight is getattr(head, "weight", None):
                note = "stays dense: the output matrix decides the answer"
            elif uses[id(weight)] > 1:
                note = "stays dense: shared by several layers"
            elif not name.startswith(inside):
                note = "stays dense: outside of the repeated blocks"
            elif not inside and isinstance(module, nn.Linear) and module.out_features < SMALL_HEAD:
                note = f"stays dense: a head with {module.out_features} outputs decides the answer"
            else:
                note = ""
            found[id(weight)] = Matrix(name, weight, isinstance(module, Conv1D), note)
    return list(found.values())
