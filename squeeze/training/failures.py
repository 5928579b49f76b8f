"""What can go wrong in the middle of a training, in words that help."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from squeeze.errors import TrainError

if TYPE_CHECKING:
    from torch import nn

    from squeeze.training.settings import Training

SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
"""What errors say that are of no class of their own: torch's allocators, oneDNN's."""


@contextmanager
def memory(rows: int, settings: "Training") -> Iterator[None]:
    """Raises TrainError for memory that does not suffice for `rows` examples at once, naming the setting that mends it."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(s in str(error) for s in SIGNS):
            raise
        parts = next((n for n in range(settings.accumulation + 1, settings.batch + 1) if settings.batch % n == 0), None)
        mend = (
            "Shorten the texts (data.max_length, data.block_size), or take a smaller student."
            if parts is None
            else f"Set training.accumulation to {parts} or more: the result stays the same, it takes longer."
        )
        raise TrainError(f"{rows} example{'s' * (rows != 1)} at once do not fit into memory. {mend}") from error


def unsound(module: "nn.Module") -> str:
    """The first parameter whose gradient is not finite; "" where all are (on another process, say)."""
    import torch

    from squeeze.training.sharding import local

    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(local(parameter.grad)).all()):
            return name
    return ""
