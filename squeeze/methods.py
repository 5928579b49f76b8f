"""What squeeze can do, read from the tables that do it; and where its own recipes lie."""

from pathlib import Path
from typing import NamedTuple

from squeeze.errors import RecipeError, nearest


class Method(NamedTuple):
    """One row of `squeeze methods`."""

    kind: str
    name: str
    summary: str
    source: str


def list_methods() -> list[Method]:
    """Every scheme, task, runtime and asset that this installation knows."""
    from squeeze.compress import METHODS, SCHEMES
    from squeeze.compress.calibrate import CALIBRATORS
    from squeeze.rows import ASSETS
    from squeeze.runtimes import RUNTIMES
    from squeeze.tasks import TASKS

    rows = [Method("scheme", name, scheme.summary, scheme.source) for name, scheme in SCHEMES.items()]
    rows += [Method("method", name, method.summary, method.source) for name, method in METHODS.items()]
    rows += [
        Method("calibrator", name, calibrator.summary, calibrator.source) for name, calibrator in CALIBRATORS.items()
    ]
    rows += [
        Method(
            "training",
            "qat",
            "goes on training a quantized model with its rounding in the loop",
            "Esser et al. 2019, arXiv:1902.08153",
        )
    ]
    rows += [Method("task", name, f"{task.head}; judged by {task.metric}", "") for name, task in TASKS.items()]
    rows += [Method("runtime", name, (kind.__doc__ or "").splitlines()[0], "") for name, kind in RUNTIMES.items()]
    rows += [
        Method("asset", name, "texts" if asset.is_data else "model", f"package {asset.package}")
        for name, asset in ASSETS.items()
    ]
    return rows


def recipe_path(name: str) -> Path:
    """A recipe that comes with squeeze: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / name).is_file():
            return folder / name
    raise RecipeError(
        f"there is no recipe {name}. {nearest(name, [p.name for p in (package.parent / 'recipes').glob('*.yaml')])}"
    )
