"""Weights cast to 16 bits: half the file, and the type that GPUs multiply fastest.

All parameters become 16-bit ones, norms and biases too, as in every 16-bit checkpoint on the hub. What Transformers itself keeps in
float32 for a dtype (T5's `wo`, whose outputs overflow float16) stays so, and what `keep` names. Rejected: scaling weights that
overflow, which nothing would undo in other people's programs; they are refused by name.
"""

import time
from fnmatch import fnmatch
from typing import TYPE_CHECKING

import torch

from squeeze.compress.layers import refuse_nonfinite, weights
from squeeze.errors import QuantizeError, nearest
from squeeze.halves import BITS, Half
from squeeze.integers import sqnr_db
from squeeze.pruning.matrices import sparsity_of
from squeeze.report.schema import LayerRow, StageRecord

if TYPE_CHECKING:
    from torch import nn

    from squeeze.compress.quantize import QuantizeStage
    from squeeze.model import Model

USERS = "kept in float32: keep {!r}"
DECLARED = "kept in float32: Transformers declares {} too sensitive for {}"


def halve_model(model: "Model", stage: "QuantizeStage", dtype: str) -> StageRecord:
    """Round every parameter of `model` to `dtype`, to nearest and ties to even, in place; the network goes on in float32.

    Raises QuantizeError for a `keep` pattern that matches nothing, and, nothing changed, for tensors with values that `dtype` lacks.
    """
    started = time.monotonic()
    refuse_nonfinite(model.network)
    kept, exact = _kept(model.network, stage.keep, dtype)
    half = Half(dtype, frozenset(kept), exact)
    _refuse_overflow(model.network, half)
    before = {name: weight.detach().clone() for name, weight, _, _ in weights(model.network)}
    tiny = count = 0
    with torch.no_grad():
        for _, parameter in half.tensors(model.network):
            nonzero = int(parameter.count_nonzero())
            parameter.copy_(parameter.to(half.torch_dtype))
            tiny += nonzero - int(parameter.count_nonzero())
            count += parameter.numel()
    model.half = half
    rows = []
    for name, weight, _, _ in weights(model.network):
        noise = None if name in kept else sqnr_db(before[name], weight)
        row = LayerRow(
            name=name, shape=tuple(weight.shape), bits=32 if name in kept else BITS, sparsity=sparsity_of(weight), sqnr_db=noise,
            note=kept.get(name, f"{dtype}, rounded to nearest"),
        )  # fmt: skip
        rows.append(row)
    notes = [f"{count / model.parameters:.1%} of all weights are {dtype}, norms and biases too"]
    if kept:
        notes.append(f"{len(kept)} tensors are kept in float32, first {next(iter(kept))}")
    if tiny:
        notes.append(f"{tiny:,} weights were too small for {dtype} and are zero now")
    if not torch.cuda.is_available():
        notes.append(
            f"on this machine, which has no CUDA device, {stage.scheme} halves the file and speeds nothing up: int8 does both. "
            "Use --scheme int8 for this CPU"
        )
    return StageRecord(
        kind="quantize", settings=stage.model_dump(mode="json"), seconds=time.monotonic() - started,
        layers=tuple(rows), notes=tuple(notes),
    )  # fmt: skip


def _kept(network: "nn.Module", patterns: tuple[str, ...], dtype: str) -> tuple[dict[str, str], bool]:
    """Parameters that stay in float32, each with the reason, and whether Transformers would keep the very same ones."""
    sensitive = set(getattr(network, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == "float16":
        sensitive |= set(getattr(network, "_keep_in_fp32_modules", None) or ())
    unmatched, names, kept, exact = set(patterns), [], {}, True
    for name, _ in network.named_parameters():
        path = name.rpartition(".")[0]
        names.append(path)
        found = [pattern for pattern in patterns if fnmatch(path, pattern) or fnmatch(name, pattern)]
        unmatched -= set(found)
        declared = sorted(part for part in sensitive if f".{part}." in f".{name}.")
        if declared:
            kept[name] = DECLARED.format(declared[0], dtype)
        elif found:
            kept[name], exact = USERS.format(found[0]), False
    if unmatched:
        worst = sorted(unmatched)[0]
        raise QuantizeError(f"keep {worst!r} matches no layer. {nearest(worst, list(dict.fromkeys(names))[:400])}")
    return kept, exact


def _refuse_overflow(network: "nn.Module", half: Half) -> None:
    """Raise QuantizeError naming the tensors with values beyond the largest number of the type."""
    bad = {}
    for name, parameter in half.tensors(network):
        count = int(parameter.to(half.torch_dtype).isinf().sum())
        if count:
            bad[name] = f"{name} ({count} values, largest {float(parameter.abs().max()):.4g})"
    if not bad:
        return
    largest = torch.finfo(half.torch_dtype).max
    other = "choose bf16, or " if half.dtype == "float16" else ""
    raise QuantizeError(
        f"{len(bad)} tensors hold values beyond {largest:.6g}, the largest {half.dtype}: {', '.join(list(bad.values())[:5])}. "
        f"Nothing was changed; {other}keep them in float32 with keep."
    )
