"""`squeeze inspect --sensitivity`: from words to a scan, and the table as it is shown and written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from squeeze import console
from squeeze.errors import SqueezeError

CALIBRATION, EVALUATE = 16, 200
"""Texts to calibrate with, and texts left aside, so that those that `squeeze bench` scores choose nothing."""


def show_sensitivity(
    model: str, data: str | None, overrides: Sequence[str], *, by: str, criterion: str, sparsities: str, out: Path | None,
    seed: int, weights: str | None, task: str | None, json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Scan, print the table (or JSON), and write it where asked."""
    from squeeze.inspection import inspect_sensitivity
    from squeeze.recipe import apply_overrides
    from squeeze.report.sensitivity_table import write_table

    if data is None:
        raise SqueezeError("--sensitivity is measured on texts. Name some with --data.")
    splits = {"evaluate": EVALUATE, "calibration": CALIBRATION}
    content: dict[str, Any] = {"data": {"path": data, "splits": splits}}
    apply_overrides(content, overrides)
    with console.progress(quiet=quiet) as say:
        table = inspect_sensitivity(
            model, content["data"], criterion=criterion, sparsities=_numbers(sparsities), by=by, task=task, weights=weights, seed=seed,
            progress=say,
        )  # fmt: skip
    if out is not None:
        write_table(table, out)
        console.message(f"table: {out}")
    if json:
        console.print_json(table.model_dump(mode="json"))
    else:
        console.print_sensitivity(table)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise SqueezeError(
            f"--sparsities {text} is not numbers with commas between them, such as 0.3,0.5,0.7."
        ) from error
