"""Training: one loop on accelerate that goes through examples, checkpoints, resumes bit for bit, and keeps its curve.

It knows nothing of what is learned: distillation, recovery after pruning and quantization-aware training each bring an `Objective`
(`objective.py`, which imports torch and is therefore not named here: recipes read settings without it).
"""

from squeeze.training.engine import Fit, fit
from squeeze.training.examples import Examples
from squeeze.training.settings import Training

__all__ = ["Examples", "Fit", "Training", "fit"]
