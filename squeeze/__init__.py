"""squeeze: a trained language model in, a smaller and faster one out, with the proof of what that cost and gained.

The public names, and only they. They are loaded on first use, so that importing squeeze imports neither torch nor ONNX Runtime.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "load_model": "squeeze.model",
    "quantize": "squeeze.api",
    "distill": "squeeze.api",
    "prune": "squeeze.api",
    "export": "squeeze.api",
    "verify": "squeeze.api",
    "bench": "squeeze.api",
    "self_check": "squeeze.api",
    "run": "squeeze.api",
    "read_report": "squeeze.report.schema",
    "Model": "squeeze.model",
    "Report": "squeeze.report.schema",
    "Recipe": "squeeze.recipe",
    "SqueezeError": "squeeze.errors",
}

__all__ = sorted([*_PLACES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'squeeze' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
