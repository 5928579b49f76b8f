"""Weights in 16 bits: which tensors of a network are held so, how they are written, and how much rounding their dtype brings.

The network in memory computes in float32 on values that are exactly 16-bit ones, as everywhere in squeeze; only files hold 16 bits.
So an evaluation on a CPU, which lacks fast 16-bit kernels, is of the weights alone, and casting there and back changes nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BITS = 16


@dataclass(frozen=True)
class Half:
    """The 16-bit type of a network's weights, and the parameters that stay in float32 all the same."""

    dtype: str
    """float16 or bfloat16."""
    kept: frozenset[str] = frozenset()
    """Names of parameters, shared ones under their first name."""
    exact: bool = True
    """Whether Transformers keeps the same parameters in float32 by itself when config.json names this dtype. Where not, config.json
    says float32, so that nobody's own choice is undone by opening the folder."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type in torch."""
        return torch.float16 if self.dtype == "float16" else torch.bfloat16

    @property
    def config_dtype(self) -> str:
        """What config.json beside the weights has to say."""
        return self.dtype if self.exact else "float32"

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next number: 2⁻¹⁰ for float16, 2⁻⁷ for bfloat16."""
        return float(torch.finfo(self.torch_dtype).eps)

    def as_row(self) -> dict[str, Any]:
        """For the manifest."""
        return {"dtype": self.dtype, "kept": sorted(self.kept), "exact": self.exact}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Half":
        """What `as_row` gave."""
        return cls(str(row["dtype"]), frozenset(row["kept"]), bool(row["exact"]))

    def tensors(self, network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that are held in 16 bits, each once under its first name."""
        for name, parameter in network.named_parameters():
            if name not in self.kept and parameter.is_floating_point():
                yield name, parameter


@contextmanager
def as_stored(network: nn.Module, half: Half | None) -> Iterator[None]:
    """The network's parameters in the types that files hold, while the `with` block lasts; then float32 again, the same values.

    In place, because a copy of a large network would need half its memory again, and copies of tied weights would not be tied.
    """
    if half is None:
        yield
        return
    config: Any = getattr(network, "config", None)
    dtype = getattr(config, "dtype", None)
    try:
        for _, parameter in half.tensors(network):
            parameter.data = parameter.data.to(half.torch_dtype)
        yield
    finally:
        for _, parameter in half.tensors(network):
            parameter.data = parameter.data.float()
        if config is not None:
            config.dtype = dtype


@contextmanager
def rounded(network: nn.Module, half: Half) -> Iterator[None]:
    """While the `with` block lasts, the network rounds what each of its modules gives to 16 bits, computing in float32.

    Blocks too, because they give the residual stream, whose few largest numbers lose most (22,000 in SmolLM2, where float16 steps
    by 16). Not what an export computes to the bit, which rounds inside modules too: a measure of what rounding to this dtype does.
    """

    def there_and_back(_module: nn.Module, _inputs: object, output: Any) -> Any:
        if type(output) is tuple:
            return tuple(there_and_back(_module, _inputs, part) for part in output)
        if isinstance(output, Tensor) and output.is_floating_point():
            return output.to(half.torch_dtype).to(output.dtype)
        return output

    hooks = [module.register_forward_hook(there_and_back) for module in network.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
