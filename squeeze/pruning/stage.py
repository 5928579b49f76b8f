"""The stage: weights become zero at once or while training, or parts are taken out."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from squeeze.errors import PruneError
from squeeze.layerwise import repeated_blocks
from squeeze.masks import Pruned
from squeeze.provenance import Digest
from squeeze.pruning.apply import prune_weights
from squeeze.pruning.criteria import CRITERIA
from squeeze.pruning.matrices import matrices
from squeeze.pruning.settings import PruneStage, RemoveSettings
from squeeze.report.schema import LayerRow, StageRecord
from squeeze.report.text import amount, percent

if TYPE_CHECKING:
    from squeeze.data import Data
    from squeeze.distillation.taught import Taught
    from squeeze.model import Model
    from squeeze.report.sensitivity_table import SensitivityTable

Batches = Sequence[Mapping[str, NDArray[np.int64]]]
Done = Callable[..., None]


def prune(
    stage: PruneStage, model: "Model", batches: Batches, done: Done | None = None, *, data: "Data | None" = None,
    teacher: "Taught | None" = None, workspace: Path | None = None, key: Digest = "",
) -> StageRecord:  # fmt: skip
    """See PruneStage.apply."""
    started = time.monotonic()
    if stage.remove is not None:
        notes, rows = _removed(model, stage, stage.remove, batches, done)
        return StageRecord(
            kind="prune", settings=stage.model_dump(mode="json"), seconds=time.monotonic() - started, layers=rows, notes=notes
        )  # fmt: skip
    if stage.schedule is not None:
        return _gradually(stage, model, batches, teacher, data, workspace, key, done, started)
    sparsities, scanned = _allocated(model, stage, batches, done)
    asked = {m.name: stage.share for m in matrices(model.network, stage.keep) if not m.note}
    asked.update(sparsities or {})
    rows = prune_weights(model, stage, batches, done, sparsities=sparsities)
    zeros = {row.name: round(row.sparsity * _size(row)) for row in rows if row.name in asked}
    for name, count in zeros.items():
        model.pruned[name] = Pruned(stage.pattern, asked[name], count)
    return StageRecord(
        kind="prune", settings=stage.model_dump(mode="json"), seconds=time.monotonic() - started, layers=rows,
        notes=_notes(model, stage, batches, rows, zeros), warnings=_warnings(model, stage, rows), sensitivity=scanned,
    )  # fmt: skip


def _gradually(
    stage: PruneStage, model: "Model", batches: Batches, teacher: "Taught | None", data: "Data | None", workspace: Path | None, key: Digest,
    done: Done | None, started: float,
) -> StageRecord:  # fmt: skip
    from squeeze.pruning.gradual import prune_gradually

    sparsities, scanned = _allocated(model, stage, batches, done)
    rows, notes, curve = prune_gradually(stage, model, teacher, data, workspace, key, done, sparsities=sparsities)
    return StageRecord(
        kind="prune", settings=stage.model_dump(mode="json"), seconds=time.monotonic() - started, layers=rows, notes=notes,
        warnings=_warnings(model, stage, rows), training=curve, sensitivity=scanned,
    )  # fmt: skip


def _removed(
    model: "Model", stage: PruneStage, remove: RemoveSettings, batches: Batches, done: Done | None
) -> tuple[tuple[str, ...], tuple[LayerRow, ...]]:
    if remove.needs_data and not batches:
        raise PruneError(
            "remove ranks parts on calibration texts, and there are none. Set data.splits.calibration, to 24 texts or blocks say; or "
            "--data. Without texts: remove.criterion: random, or layers by their numbers."
        )
    from squeeze.pruning.structures import remove_parts

    labels = [batch["labels"] for batch in batches if "labels" in batch]
    return remove_parts(model, remove, batches, labels or None, done, seed=stage.seed)


def _allocated(
    model: "Model", stage: PruneStage, batches: Batches, done: Done | None
) -> "tuple[Mapping[str, float] | None, SensitivityTable | None]":
    """Each matrix's own sparsity, by the name of its parameter, and the scan that says so; None where all have the stage's."""
    if stage.allocation == "uniform":
        return None, None
    if stage.scan_file is not None:
        return _as_scanned(model, stage, stage.scan_file)
    if not batches:
        raise PruneError(
            f"allocation {stage.allocation} is measured on calibration texts, and there are none. Set data.splits.calibration; or --data."
        )
    if stage.allocation == "owl":
        from squeeze.pruning.allocation import outlier_allocation

        return outlier_allocation(model, batches, stage, done), None
    from squeeze.pruning.allocation import allocate
    from squeeze.pruning.sensitivity import sensitivity_table

    table = sensitivity_table(model, batches, stage, (), done, by="matrix" if stage.scan == "matrix" else "block")
    return allocate(table.rows, stage.share), table


def _as_scanned(model: "Model", stage: PruneStage, path: Path) -> "tuple[Mapping[str, float], SensitivityTable]":
    from squeeze.pruning.allocation import allocate
    from squeeze.report.sensitivity_table import read_table

    table = read_table(path)
    scanned = allocate(table.rows, stage.share)
    strange = sorted(scanned.keys() ^ {m.name for m in matrices(model.network, stage.keep) if not m.note})
    if strange:
        where = "in the scan and not in what is pruned" if strange[0] in scanned else "pruned and not in the scan"
        raise PruneError(
            f"{path} is the scan of another model, or of one with other matrices kept dense: {strange[0]} is {where}. Scan this one: "
            "squeeze inspect --sensitivity --out."
        )
    if table.criterion != stage.criterion:
        raise PruneError(
            f"{path} was scanned with {table.criterion}, and weights are to be chosen by {stage.criterion}, which loses other things. "
            f"Scan again with --criterion {stage.criterion}, or prune with criterion {table.criterion}."
        )
    return scanned, table


def _size(row: LayerRow) -> int:
    return row.shape[0] * row.shape[1]


def _notes(
    model: "Model", stage: PruneStage, batches: Batches, rows: Sequence[LayerRow], zeros: Mapping[str, int]
) -> tuple[str, ...]:
    weights = sum(_size(row) for row in rows if row.name in zeros)
    gone = sum(zeros.values())
    notes = [
        f"{percent(gone / weights, 1)} of the weights of {len(zeros)} matrices are zero: {amount(gone, '')} of {amount(weights, '')}; "
        f"{percent(gone / model.parameters, 1)} of all weights"
    ]
    if stage.needs_data and batches:
        tokens = sum(int(b["attention_mask"].sum()) if "attention_mask" in b else b["input_ids"].size for b in batches)
        notes.append(f"{stage.criterion} from {tokens:,} calibration tokens")
    return tuple(notes)


def _warnings(model: "Model", stage: PruneStage, rows: Sequence[LayerRow]) -> tuple[str, ...]:
    warnings = []
    if model.task == "causal-lm" and stage.criterion in ("magnitude", "random") and stage.share >= 0.4:
        warnings.append(
            f"criterion {stage.criterion} at {percent(stage.share, 0)} leaves little of most language models: wanda and sparsegpt, which "
            "read calibration texts, keep far more"
        )
    measured = CRITERIA[stage.criterion].needs & {"norms", "gram"}
    if measured and (model.config.get("num_hidden_layers") or 0) > (sets := len(repeated_blocks(model.network)[1])):
        warnings.append(
            f"{model.config['num_hidden_layers']} layers run on {sets} set(s) of weights, and what they read was measured on the first run "
            "alone: criterion taylor looks at all of them"
        )
    empty = [row.name for row in rows if "no weights left" in row.note]
    if empty and stage.pattern != "row":
        warnings.append(
            f"outputs of {len(empty)} matrices have no weights left ({empty[0]}, …): use scope row, or a lower sparsity"
        )
    return tuple(warnings)
