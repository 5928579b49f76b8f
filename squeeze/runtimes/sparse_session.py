"""PyTorch with the sparse tensor cores of NVIDIA GPUs: matrices whose zeros lie 2:4 are multiplied without them.

A runtime of its own and not a setting of torch's, so that both stand side by side in one table: whether compressed products pay depends
on shapes and batch, and is for the clock to say (pytorch/pytorch#111339: none at a batch of one).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from squeeze.errors import RuntimeUnavailable
from squeeze.runtimes.torch_session import TorchSession

CAPABILITY = (8, 0)
"""Of the first GPUs with such cores."""
ROWS, COLUMNS = 32, 64
"""Sizes in 16 bits must be multiples of these."""
TYPES = ("float16", "bfloat16")


class HasPattern(Protocol):
    """What is known of a pruned matrix."""

    @property
    def pattern(self) -> str:
        """Such as 2:4."""
        ...


def sparse_layers(network: Any, pruned: Mapping[str, HasPattern]) -> list[str]:
    """Names of the linear layers that sparse tensor cores can run: at least 2 zeros of every 4 along the inputs, sizes that fit."""
    from torch import nn

    fit = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and (one := pruned.get(f"{name}.weight")) is not None:
            rows, columns = module.weight.shape
            if re.fullmatch("[23]:4", one.pattern) and rows % ROWS == 0 and columns % COLUMNS == 0:
                fit.append(name)
    return fit


class SparseSession(TorchSession):
    """The network with its 2:4 matrices compressed (torch.sparse.to_sparse_semi_structured), in 16 bits, on a GPU."""

    runtime = "torch.sparse"

    def __init__(self, folder: Path, device: str, threads: int, dtype: str | None = None) -> None:
        import torch

        if device != "cuda":
            raise RuntimeUnavailable(
                "torch.sparse runs on the sparse tensor cores of NVIDIA GPUs, and CPUs have none. Use --device cuda, or runtime torch."
            )
        self.check_device(device)
        here = torch.cuda.get_device_capability()
        if here < CAPABILITY:
            raise RuntimeUnavailable(
                f"this GPU has compute capability {here[0]}.{here[1]}, and sparse tensor cores came with 8.0. Use runtime torch."
            )
        super().__init__(folder, device, threads, dtype)
        found = str(next(self._network.parameters()).dtype).removeprefix("torch.")
        if found not in TYPES:
            raise RuntimeUnavailable(f"torch.sparse computes in 16 bits, and this is {found}. Use --dtype float16.")
        names = sparse_layers(self._network, self._pruned)
        if not names:
            raise RuntimeUnavailable(
                f"{folder} has no matrix with 2 zeros of every 4 whose sizes are multiples of {ROWS} and {COLUMNS}. Prune it first: "
                "squeeze prune --pattern 2:4."
            )
        for name in names:
            layer = self._network.get_submodule(name)
            compressed = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
            layer.weight = torch.nn.Parameter(compressed, requires_grad=False)
