"""Training: one loop on accelerate that goes through examples, checkpoints, resumes bit for bit, and keeps its curve.

It knows nothing of what is learned: distillation, recovery after pruning and quantization-aware training each bring an `Objective`.
"""

from typing import TYPE_CHECKING, Any

from squeeze.training.examples import Examples
from squeeze.training.settings import Training

if TYPE_CHECKING:
    from squeeze.training.engine import Fit, fit
    from squeeze.training.objective import Objective

__all__ = ["Examples", "Fit", "Objective", "Training", "fit"]


def __getattr__(name: str) -> Any:
    """What needs torch is loaded on first use: recipes read `Training`, and are read without torch."""
    if name == "Objective":
        from squeeze.training.objective import Objective

        return Objective
    if name in ("Fit", "fit"):
        from squeeze.training import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'squeeze.training' has no attribute {name!r}")
