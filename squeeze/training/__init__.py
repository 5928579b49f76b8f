"""Training: one loop on accelerate that goes through examples, checkpoints, resumes bit for bit, and keeps its curve.

It knows nothing of what is learned: distillation, recovery after pruning and quantization-aware training each bring an `Objective`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from squeeze.training.settings import Training

if TYPE_CHECKING:
    from squeeze.training.engine import Fit, fit
    from squeeze.training.examples import Examples
    from squeeze.training.objective import Objective

__all__ = ["Examples", "Fit", "Objective", "Training", "fit"]

HOMES = {"Examples": "examples", "Fit": "engine", "Objective": "objective", "fit": "engine"}


def __getattr__(name: str) -> Any:
    """What needs numpy or torch is loaded on first use: recipes read `Training`, and `squeeze doctor` runs where both are missing."""
    if name not in HOMES:
        raise AttributeError(f"module 'squeeze.training' has no attribute {name!r}")
    return getattr(import_module(f"squeeze.training.{HOMES[name]}"), name)
