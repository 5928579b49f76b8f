"""How much each part of a network matters, as a table: what pruning it alone, all else untouched, does to the network's answers.

`squeeze inspect --sensitivity` prints and writes it, an allocation (`squeeze.pruning.allocation`) reads it, and the page draws it as a
grid of layers × sparsities. One type for all of them, so that what was measured is what is drawn. Rejected: one figure for each layer.
What a layer loses at 30 % does not say what it loses at 70 %, and an allocation lives on the difference.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from squeeze.errors import ReportError
from squeeze.report.files import write_atomically
from squeeze.report.text import count, percent

TABLE_VERSION = 1
Kind = Literal["matrix", "block", "heads", "neurons"]
PRUNED_TOGETHER = {
    "matrix": "each matrix alone", "block": "all matrices of a layer together", "heads": "attention heads of each layer",
    "neurons": "feed-forward neurons of each layer",
}  # fmt: skip

CELL_WIDTH, CELL_HEIGHT, LEFT, TOP = 46.0, 15.0, 64.0, 34.0
FAINTEST = 0.07
"""Opacity of the cell that loses least."""


class Scanned(BaseModel):
    """One part of the network, pruned alone to one sparsity."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    unit: str
    """What was pruned: a parameter's name, or a layer's."""
    kind: Kind
    layer: int | None = None
    """Number of the layer it lies in; None outside the layers."""
    part: str = ""
    """What of the layer: "mlp.up_proj"; "" for all of it."""
    names: tuple[str, ...] = ()
    """The parameters that were pruned; () where parts were hidden."""
    weights: int = Field(gt=0)
    """How many weights the unit has."""
    sparsity: FiniteFloat = Field(ge=0, lt=1)
    """Share of them that was set to zero; of heads and neurons, share that was hidden."""
    loss: FiniteFloat
    """Distance of the network's answers from the unpruned ones."""


class SensitivityTable(BaseModel):
    """A scan, with all that it takes to read it."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    schema_version: int = TABLE_VERSION
    source: str
    task: str
    criterion: str
    """What chose the weights, heads or neurons."""
    pattern: str
    unit: str
    """Of `loss`: "nats per token"."""
    texts: int
    """Calibration texts that the answers were compared on."""
    rows: tuple[Scanned, ...]

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Those that were tried, rising."""
        return tuple(sorted({row.sparsity for row in self.rows}))

    @property
    def title(self) -> str:
        """What the table shows, in a line."""
        kinds = ", ".join(PRUNED_TOGETHER[kind] for kind in dict.fromkeys(row.kind for row in self.rows))
        pattern = "" if self.pattern == "unstructured" else f" {self.pattern}"
        return f"{kinds} pruned by {self.criterion}{pattern}: {self.unit} lost, on {count(self.texts, 'text')}"


def sensitivity_rows(table: SensitivityTable) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(columns, rows) as a terminal shows the table: a line for each unit, a column for each sparsity."""
    found = {(row.unit, row.kind, row.sparsity): row.loss for row in table.rows}
    units = dict.fromkeys((row.unit, row.kind) for row in table.rows)
    several = len({kind for _, kind in units}) > 1
    lines = [
        (f"{unit}, {kind}" if several else unit, *(_figure(found.get((unit, kind, s))) for s in table.sparsities))
        for unit, kind in units
    ]
    return ("", *(percent(s, 0) for s in table.sparsities)), lines


def _figure(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.2g}"


def write_table(table: SensitivityTable, path: Path) -> None:
    """Write the table as JSON. Raises ReportError where it cannot be written."""
    try:
        write_atomically(path, table.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror or error}.") from error


def read_table(path: Path) -> SensitivityTable:
    """A table from its file. Raises ReportError naming the file where it is absent, torn, foreign or of a newer version."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(
            f"{path} is not whole JSON ({error}). Write it again: squeeze inspect --sensitivity."
        ) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or "rows" not in content:
        raise ReportError(
            f"{path} is JSON but no table of sensitivities. Write one: squeeze inspect --sensitivity --out."
        )
    if version > TABLE_VERSION:
        raise ReportError(f"{path} has version {version}, newer than {TABLE_VERSION}. Upgrade: pip install -U squeeze.")
    try:
        return SensitivityTable.model_validate(content)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise ReportError(f"{path} is no table of sensitivities: {where}: {fault['msg']}.") from error


@dataclass(frozen=True)
class HeatCell:
    """One unit at one sparsity: where, how dark, and what a pointer is told."""

    x: float
    y: float
    opacity: float
    title: str


@dataclass(frozen=True)
class Heat:
    """The grid: labels as (place, text)."""

    width: float
    height: float
    groups: tuple[tuple[float, str], ...]
    """Above the columns: which part of the layer; () where whole layers were pruned."""
    columns: tuple[tuple[float, str], ...]
    rows: tuple[tuple[float, str], ...]
    cells: tuple[HeatCell, ...]


def heat(table: SensitivityTable) -> Heat | None:
    """Layers downwards, sparsities of each part to the right; darker loses more, by its logarithm. None for an empty table."""
    if not table.rows:
        return None
    parts = list(dict.fromkeys(_part(row) for row in table.rows))
    lines = list(dict.fromkeys(_line(row) for row in table.rows))
    shades = _shades([row.loss for row in table.rows])
    columns = [(part, sparsity) for part in parts for sparsity in table.sparsities]
    cells = [
        HeatCell(
            LEFT + CELL_WIDTH * columns.index((_part(row), row.sparsity)), TOP + CELL_HEIGHT * lines.index(_line(row)), shade,
            f"{row.unit}{'' if row.kind in ('matrix', 'block') else ', ' + row.kind}, {percent(row.sparsity, 0)}: "
            f"{row.loss:.2g} {table.unit}",
        )
        for row, shade in zip(table.rows, shades, strict=True)
    ]  # fmt: skip
    wide = CELL_WIDTH * len(table.sparsities)
    return Heat(
        width=LEFT + CELL_WIDTH * len(columns), height=TOP + CELL_HEIGHT * len(lines),
        groups=tuple((LEFT + wide * n, part) for n, part in enumerate(parts) if part),
        columns=tuple((LEFT + CELL_WIDTH * (n + 0.5), percent(sparsity, 0)) for n, (_, sparsity) in enumerate(columns)),
        rows=tuple((TOP + CELL_HEIGHT * (n + 0.75), line) for n, line in enumerate(lines)), cells=tuple(cells),
    )  # fmt: skip


def _part(row: Scanned) -> str:
    return row.part if row.layer is not None else ""


def _line(row: Scanned) -> str:
    return row.unit if row.layer is None else f"layer {row.layer}"


def _shades(losses: Sequence[float]) -> list[float]:
    """Opacities in [0, 1] on a logarithmic scale; what loses nothing has none."""
    known = [math.log(loss) for loss in losses if loss > 0]
    if not known:
        return [0.0] * len(losses)
    low, high = min(known), max(known)
    span = (high - low) or 1.0
    return [FAINTEST + (1 - FAINTEST) * (math.log(v) - low) / span if v > 0 else 0.0 for v in losses]
