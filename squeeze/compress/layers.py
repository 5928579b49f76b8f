"""The weight matrices of a network: which there are, which must stay in float and why, and whether all are numbers."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from squeeze.errors import QuantizeError
from squeeze.pruning.matrices import nonfinite, sparsity_of
from squeeze.report.schema import LayerRow

if TYPE_CHECKING:
    from torch import Tensor, nn

    from squeeze.model import Model

SMALL_HEAD = 32
"""A linear layer with fewer outputs stays in float: its integers save nothing, and it decides the answer."""
SMALL_EMBEDDING = 0.01
"""An embedding with a smaller share of all weights stays in float (position and type tables)."""


def weights(network: "nn.Module") -> Iterator[tuple[str, "Tensor", bool, str]]:
    """Every weight matrix once: (name, tensor, transposed, why it must stay in float or '').

    Tied matrices come once, under their first name. Norms and biases are not matrices and are not listed.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from squeeze.recurrent import why_float

    total = sum(p.numel() for p in network.parameters())
    seen: set[int] = set()
    for path, module in network.named_modules():
        if isinstance(module, nn.RNNBase):
            reason = why_float(module)
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 2 and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{path}.{name}", parameter, False, reason
            continue
        if not isinstance(module, nn.Linear | nn.Embedding | Conv1D) or id(module.weight) in seen:
            continue
        seen.add(id(module.weight))
        name = f"{path}.weight" if path else "weight"
        yield name, module.weight, isinstance(module, Conv1D), _why_float(module, total)


def _why_float(module: "nn.Module", total: int) -> str:
    from torch import nn

    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, nn.Embedding):
        share = weight.numel() / total
        return f"kept in float: {share:.1%} of the weights" if share < SMALL_EMBEDDING else ""
    if isinstance(module, nn.Linear) and module.out_features < SMALL_HEAD:
        return f"kept in float: a head with {module.out_features} outputs decides the answer and saves nothing"
    return ""


def output_matrices(network: "nn.Module") -> set[str]:
    """Names of the matrices that give the logits: what get_output_embeddings() says, else a layer named lm_head."""
    get = getattr(network, "get_output_embeddings", None)
    head = get() if callable(get) else getattr(network, "lm_head", None)
    target = getattr(head, "weight", None)
    return {name for name, weight, _, _ in weights(network) if weight is target}


def refuse_nonfinite(network: "nn.Module") -> None:
    """Raise QuantizeError naming the tensors with NaN or infinite values, with their counts."""
    bad = nonfinite(network)
    if bad:
        listed = ", ".join(f"{name} ({count})" for name, count in list(bad.items())[:5])
        raise QuantizeError(
            f"{len(bad)} tensors hold NaN or infinite weights: {listed}. Repair the checkpoint; nothing was written."
        )


def weight_rows(model: "Model") -> list[LayerRow]:
    """Every weight matrix as it is now, without changing it."""
    rows = []
    for name, weight, _, _ in weights(model.network):
        integer = model.integers.get(name)
        bits = 8 * integer.stored_bytes / weight.numel() if integer is not None else 8 * weight.element_size()
        if model.half is not None and name not in model.half.kept:
            bits = 16
        rows.append(
            LayerRow(name=name, shape=tuple(weight.shape), bits=bits, sparsity=sparsity_of(weight), sqnr_db=None)
        )
    return rows
