"""A decoder's cache in int8: keys and values as integers between tokens, with scales that calibration fixed beforehand.

x ≈ scale · q, q in [-128, 127], as ONNX Runtime's GroupQueryAttention keeps them (its `k_quant_type` and `v_quant_type`): one scale
for each channel of each head, or one for all keys and one for all values of a layer. Each token is rounded as it enters the cache,
keys after their rotation, and every query, the prompt's too, reads what was rounded. So the simulation below is the kernel's own
arithmetic but for the order of additions.

Scales are fixed because that kernel takes them as constants: one for each token, measured as it comes, has no kernel on a CPU.
Channels because keys have some that are large in every token (Liu et al. 2024, "KIVI", arXiv:2402.02750, section 3.1).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from squeeze.errors import ExportError
from squeeze.integers import QMAX

Granularity = Literal["channel", "tensor"]
Change = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Layer, its new keys and values [batch, heads, tokens, size] -> what goes into the cache in their place."""


@dataclass(frozen=True)
class CacheScales:
    """Scales of every layer, float32: [heads, 1, size] each, or [1] where one holds for the whole tensor."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def granularity(self) -> Granularity:
        """What shares a scale."""
        return "tensor" if self.keys[0].ndim == 1 else "channel"

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.keys)

    @property
    def digest(self) -> str:
        """SHA-256 of all scales in the order of the layers: keys, then values."""
        parts = [tensor.numpy().astype("<f4").tobytes() for tensor in (*self.keys, *self.values)]
        return hashlib.sha256(b"".join(parts)).hexdigest()


def cache_int8(x: Tensor, scale: Tensor) -> Tensor:
    """`x` [batch, heads, tokens, size] after the cache: rounded to the nearest integer (ties to even), kept within int8, and back."""
    return torch.round(x / scale).clamp(-QMAX - 1, QMAX) * scale


def calibrated(
    network: nn.Module, texts: Sequence[Mapping[str, NDArray[np.int64]]], granularity: Granularity = "channel"
) -> CacheScales:
    """Scales from the largest keys and values that these texts (input_ids, attention_mask) leave in the cache.

    A key's channel turns with its partner as positions grow, slow ones less than once in a calibration text. Each therefore gets the
    range of the pair's length, √(kᵢ² + kⱼ²), which no position exceeds: texts longer than those of the calibration do not clip.
    """
    if not texts:
        raise ExportError(
            "an int8 cache takes its scales from texts, and there are none. Name data with a calibration split (--data)."
        )
    rotated = rotary_size(network.config)
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}

    def watch(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        for seen, x in ((keys, _pair_lengths(key, rotated)), (values, value.abs())):
            peak = x.amax(dim=(0, 2))
            seen[layer] = peak if layer not in seen else torch.maximum(seen[layer], peak)
        return key, value

    handle = change_cache(network, watch)
    try:
        with torch.no_grad():
            for batch in texts:
                network(**{n: torch.from_numpy(batch[n]) for n in ("input_ids", "attention_mask") if n in batch})
    finally:
        handle.remove()
    layers = sorted(keys)
    return CacheScales(*(tuple(_scale(seen[n], granularity) for n in layers) for seen in (keys, values)))


def change_cache(network: nn.Module, change: Change) -> Any:
    """Let the network's cache pass what enters it through `change`; returns the handle that undoes it.

    Transformers' attention hands its new keys and values to the cache, and goes on with what that gives back.
    """

    class Cache(DynamicCache):
        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            key_states, value_states = change(layer_idx, key_states, value_states)
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    config: Any = network.config

    def given(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("past_key_values") is None:
            kwargs = {**kwargs, "past_key_values": Cache(config=config)}
        return args, kwargs

    return network.register_forward_pre_hook(given, with_kwargs=True)


def simulate_cache(network: nn.Module, scales: CacheScales) -> None:
    """Make the network compute with an int8 cache, as the export does; for one that only runs."""
    change_cache(
        network,
        lambda layer, key, value: (cache_int8(key, scales.keys[layer]), cache_int8(value, scales.values[layer])),
    )


def rotary_size(config: Any) -> int | None:
    """Channels of a head that are rotated, the first ones; None: all."""
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return None if share == 1 else int(size * share)


def _pair_lengths(key: Tensor, rotated: int | None) -> Tensor:
    """|k| of each channel, of rotated ones with its partner, which lies half the rotated channels further."""
    turning = key[..., :rotated]
    first, second = turning.chunk(2, dim=-1)
    length = torch.hypot(first, second)
    return torch.cat([length, length, key[..., turning.shape[-1] :].abs()], dim=-1)


def _scale(peak: Tensor, granularity: Granularity) -> Tensor:
    """float32 from peaks [heads, size]; what was never anything but zero gets scale 1."""
    peak = peak.amax().view(1) if granularity == "tensor" else peak.unsqueeze(1)
    return torch.where(peak == 0, torch.ones_like(peak), peak / QMAX).float().contiguous()
