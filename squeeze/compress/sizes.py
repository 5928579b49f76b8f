"""How many bytes weights will take, computed from shapes and grids before anything is written, and compared with the files after.

Counted apart from the code that writes: a matrix stored twice, a table that was not tied, or integers that were not packed then
show as a difference.
"""

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from squeeze.integers import IntegerWeight
    from squeeze.model import Model

FLOAT = 4
Entry = tuple[str, str, list[int], int]
"""(name, type as safetensors spells it, shape, bytes)"""


def artifact_bytes(model: "Model") -> int:
    """Of a quantized artifact: integers.safetensors and floats.safetensors, headers included."""
    integers = [entry for name, weight in model.integers.items() for entry in _entries(name, weight)]
    floats = [(name, "F32", list(t.shape), t.numel() * t.element_size()) for name, t in _float_state(model).items()]
    return _safetensors(integers) + _safetensors(floats)


def export_bytes(model: "Model", *, by_builder: bool) -> int:
    """Of an export's weights, each shared one counted once; the graph around them is not counted.

    `by_builder`: onnxruntime-genai's builder adds the cosines and sines of every position.
    """
    integers = sum(_exported(weight) for weight in model.integers.values())
    # Readers of one tensor share its factors and its outlier channels.
    factors = {w.input_factor.numpy().tobytes() for w in model.integers.values() if w.input_factor is not None}
    factors |= {w.outliers.channels.numpy().tobytes() for w in model.integers.values() if w.outliers is not None}
    quantized = {id(p) for name, p in _parameters(model).items() if name in model.integers}
    floats = sum(p.numel() for p in model.network.parameters() if id(p) not in quantized) * FLOAT
    return integers + sum(map(len, factors)) + floats + (_rotary(model) if by_builder else 0)


def _exported(weight: "IntegerWeight") -> int:
    """Integers, scales and zero points of one matrix as the kernels read them: blocks are filled up, zero points packed by rows."""
    out, columns = weight.shape
    if weight.block_size is None:
        kept = 0 if weight.outliers is None else weight.outliers.columns.numel()
        return out * columns + FLOAT * (out + kept)
    blocks = -(-columns // weight.block_size)
    zero_points = 0 if isinstance(weight.zero_point, int) else out * -(-blocks * weight.bits // 8)
    return out * blocks * weight.block_size * weight.bits // 8 + FLOAT * out * blocks + zero_points


def _rotary(model: "Model") -> int:
    """Tables of the rotary embedding, [positions, head / 2] each."""
    config = model.config
    heads = int(config.get("num_attention_heads") or 1)
    head = int(config.get("head_dim") or int(config.get("hidden_size") or 0) // heads)
    return 2 * int(config.get("max_position_embeddings") or 0) * (head // 2) * FLOAT


def _entries(name: str, weight: "IntegerWeight") -> list[Entry]:
    out, columns = weight.shape
    blocks = 1 if weight.block_size is None else -(-columns // weight.block_size)
    row = -(-columns * weight.bits // 8)
    kind = "U8" if weight.integers.dtype.is_signed is False else "I8"
    found = [
        (f"{name}.integers", kind, [out, row], out * row),
        (f"{name}.scale", "F32", [out, blocks], FLOAT * out * blocks),
    ]
    if not isinstance(weight.zero_point, int):
        found.append((f"{name}.zero_point", "U8", [out, blocks], out * blocks))
    if weight.divisor is not None:
        found.append((f"{name}.divisor", "F32", [columns], FLOAT * columns))
    if weight.outliers is not None:
        kept = len(weight.outliers.channels)
        found.append((f"{name}.outlier_channels", "I64", [kept], 8 * kept))
        found.append((f"{name}.outlier_columns", "F32", [out, kept], FLOAT * out * kept))
    if weight.inputs is not None:
        found += [(f"{name}.input_scale", "F32", [1], FLOAT), (f"{name}.input_zero_point", "U8", [1], 1)]
    return found


def _safetensors(entries: list[Entry]) -> int:
    """A file's length: 8 bytes, a JSON table filled up to a multiple of 8, the numbers."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    # In the file's own order, widest types first, then by name: offsets are written out in digits.
    for name, kind, shape, size in sorted(entries, key=lambda e: (e[1] != "I64", e[1] != "F32", e[1] != "I8", e[0])):
        table[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = len(json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-header // 8) * 8 + end


def _parameters(model: "Model") -> "dict[str, Tensor]":
    return dict(model.network.named_parameters(remove_duplicate=False))


def _float_state(model: "Model") -> "dict[str, Tensor]":
    """Parameters and buffers that stay in float, each under its first name only."""
    quantized = {id(p) for name, p in _parameters(model).items() if name in model.integers}
    own = _parameters(model)
    seen: set[int] = set()
    found = {}
    for name, tensor in model.network.state_dict().items():
        key = id(own.get(name, tensor))
        if key not in quantized and key not in seen:
            found[name] = tensor
        seen.add(key)
    return found
