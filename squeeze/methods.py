"""What squeeze can do, read from the tables that do it; and where its own recipes lie."""

from pathlib import Path
from typing import NamedTuple

from squeeze.errors import RecipeError, nearest

STUDENT_SOURCES = {
    "layers": "Sanh et al. 2019, arXiv:1910.01108",
    "choose": "Men et al. 2024, arXiv:2403.03853 (importance)",
    "heads": "Michel et al. 2019, arXiv:1905.10650",
    "neurons": "Muralidharan et al. 2024, arXiv:2407.14679",
}
"""Where the ways to cut a student come from."""


class Method(NamedTuple):
    """One row of `squeeze methods`."""

    kind: str
    name: str
    summary: str
    source: str


def list_methods() -> list[Method]:
    """Every scheme, criterion, pattern, loss, student, task, runtime and asset that this installation knows."""
    from squeeze.compress import METHODS, SCHEMES
    from squeeze.compress.calibrate import CALIBRATORS
    from squeeze.distillation.losses import ALL, LOSSES
    from squeeze.distillation.settings import StudentSettings
    from squeeze.pruning.criteria import CRITERIA
    from squeeze.pruning.patterns import PATTERNS
    from squeeze.pruning.structures import PARTS
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
        ),
        Method(
            "training",
            "distill",
            "trains a smaller student on the answers of the model, or of another teacher",
            "Hinton et al. 2015, arXiv:1503.02531",
        ),
    ]
    rows += [
        Method("student", name, field.description or "", STUDENT_SOURCES.get(name, ""))
        for name, field in StudentSettings.model_fields.items()
    ]
    for name, loss in LOSSES.items():
        tasks = "" if loss.tasks == ALL else f"; for {' and '.join(sorted(loss.tasks))}"
        rows.append(Method("loss", name, f"{loss.summary}: {loss.equation}{tasks}", loss.source))
    rows += [Method("criterion", name, criterion.summary, criterion.source) for name, criterion in CRITERIA.items()]
    rows += [Method("parts", name, criterion.summary, criterion.source) for name, criterion in PARTS.items()]
    rows += [Method("pattern", name, pattern.summary, pattern.source) for name, pattern in PATTERNS.items()]
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
