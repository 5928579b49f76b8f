"""Single weights become zero: each matrix is measured, scored and masked, in the order in which the network runs.

What a layer reads is measured behind layers that are pruned already, as it will be when all is done, in one walk (`layerwise.walk`) that
measures only what the criterion needs. Where weights of all matrices are ranked together, all must be scored before any is pruned: those
statistics are the dense network's. Rejected: measuring all layers beforehand in every case, which for SparseGPT means that no layer makes
up for the ones before it.

A matrix that cannot be pruned as asked is found before anything is changed; should a later step fail, every weight is put back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from squeeze.errors import PruneError
from squeeze.layerwise import Site, walk, width
from squeeze.model import aliases
from squeeze.pruning.criteria import CRITERIA, Criterion, Seen
from squeeze.pruning.gradients import Sum, block_gradients, loss_gradients, named, single
from squeeze.pruning.matrices import Matrix, matrices, sparsity_of
from squeeze.pruning.patterns import check_fits, keep_mask, lowest
from squeeze.pruning.settings import DATA_FREE, WITH_GRADIENTS, PruneStage
from squeeze.pruning.sparsegpt import sparsegpt
from squeeze.report.schema import LayerRow
from squeeze.report.text import percent
from squeeze.second_order import decibels, lost_db

if TYPE_CHECKING:
    from squeeze.model import Model

Batches = Sequence[Mapping[str, NDArray[np.int64]]]
Done = Callable[[int, int], None]


def prune_weights(
    model: "Model", stage: PruneStage, batches: Batches, done: Done | None = None, *, sparsities: Mapping[str, float] | None = None
) -> tuple[LayerRow, ...]:  # fmt: skip
    """Prune `model` in place; one row for every matrix, also those that stay dense, with the reason.

    `batches` are calibration texts as the network takes them, with `labels` where the criterion reads gradients of a classifier's loss.
    `sparsities` gives matrices, by parameter name, another sparsity than the stage's. Raises PruneError, and leaves the model as it was,
    where a shape does not fit the pattern, nothing of a matrix would stay, texts or labels are missing, or a matrix is not reached.
    """
    if model.integers or model.half is not None:
        raise PruneError(
            f"{model.source} is quantized: integers have no gradients, and zeros belong in before rounding. Prune the float model "
            "(0-source in its run folder), then quantize."
        )
    if stage.criterion not in DATA_FREE and not batches:
        raise PruneError(
            f"criterion {stage.criterion} reads calibration texts, and there are none. Set data.splits.calibration, to 24 texts or blocks "
            f"say; or --data. Without texts: {', '.join(sorted(DATA_FREE))}."
        )
    every = matrices(model.network, stage.keep)
    chosen = {matrix.name: matrix for matrix in every if not matrix.note}
    if strange := sorted(set(sparsities or ()) - set(chosen)):
        raise PruneError(f"{strange[0]} is given a sparsity, and is no matrix that is pruned here.")
    asked = {name: (sparsities or {}).get(name, stage.share) for name in chosen}
    for name, matrix in chosen.items():
        check_fits(name, matrix.shape, asked[name], stage.pattern)
    before = {name: matrix.weight.detach().clone() for name, matrix in chosen.items()}
    try:
        with torch.no_grad():
            active = {name: matrix for name, matrix in chosen.items() if asked[name] > 0}
            found = _Pruning(model, stage, active, asked).run(batches, done)
    except BaseException:
        for name, matrix in chosen.items():
            matrix.weight.detach().copy_(before[name])
        raise
    return tuple(_row(matrix, asked.get(matrix.name), found.get(matrix.name)) for matrix in every)


@dataclass
class _Outcome:
    """What came of one matrix."""

    rows: int
    """Outputs whose weights are all zero, and were not before."""
    output_db: float | None


class _Pruning:
    """The matrices of one network while they are pruned."""

    def __init__(
        self, model: "Model", stage: PruneStage, chosen: Mapping[str, Matrix], asked: Mapping[str, float]
    ) -> None:
        self.model, self.stage, self.chosen, self.asked = model, stage, chosen, asked
        self.criterion: Criterion = CRITERIA[stage.criterion]
        self.scope = stage.scope or self.criterion.scope
        self.names = aliases(model.network)
        self.weights = {name: matrix.weight for name, matrix in chosen.items()}
        self.gradients: Sum | None = None
        self.scores: dict[str, Tensor] = {}
        self.found: dict[str, _Outcome] = {}

    def run(self, batches: Batches, done: Done | None) -> dict[str, _Outcome]:
        """Prune all; what came of each."""
        if not self.chosen:
            return {}
        needs = self.criterion.needs
        if "gradient" in needs:
            without = [name for name in CRITERIA if name not in WITH_GRADIENTS]
            self.gradients = loss_gradients(
                self.model, batches, self.weights, squares=self.criterion.squares, without=without, done=done
            )
        if needs & {"norms", "gram"}:
            regional = "block gradient" in needs
            texts = [
                {name: batch[name] for name in self.model.text_inputs if name in batch}
                for batch in (single(batches) if regional else batches)
            ]
            walk(self.model.network, texts, self._treat, done, enter=self._enter if regional else None)
        else:
            for name in self.chosen:
                self._score(name, Seen())
        missed = [name for name in self.chosen if name not in self.found and name not in self.scores]
        if missed:
            others = f" and {len(missed) - 1} others" if missed[1:] else ""
            raise PruneError(
                f"the calibration texts do not reach {missed[0]}{others}, so its weights cannot be ranked. Give more texts, keep "
                "it dense (keep), or use criterion magnitude."
            )
        if self.scores:
            self._together()
        return self.found

    def _enter(
        self, _: str, block: nn.Module, runs: Sequence[Callable[[], object]], valid: Sequence[Tensor | None]
    ) -> None:
        self.gradients = block_gradients(named(block, self.weights), runs, valid)

    def _treat(self, layers: list[tuple[str, nn.Module]], site: Site) -> None:
        names = [self.names.get(f"{path}.weight", "") for path, _ in layers]
        names = [name for name in names if name in self.chosen]
        if not names:
            return
        if "gram" in self.criterion.needs:
            gram = site.gram().matrix
            for name in names:
                self._score(name, Seen(gram=gram, norms=gram.diagonal().clamp(min=0).sqrt()))
            return
        squares, tokens, first = torch.zeros(width(site.module)), 0, torch.empty(0)

        def add(rows: Tensor) -> None:
            nonlocal tokens, first
            first = rows if not tokens else first
            squares.add_(rows.square().sum(dim=0))
            tokens += len(rows)

        site.stream(add)
        for name in names:
            self._score(name, Seen(norms=(squares / tokens).sqrt()), first)

    def _score(self, name: str, seen: Seen, inputs: Tensor | None = None) -> None:
        """Score one matrix, and prune it unless all are ranked together; `inputs` [tokens, in] are some that it reads."""
        matrix = self.chosen[name]
        before = matrix.rows()
        if self.criterion.updates and seen.gram is not None:
            after, _ = sparsegpt(before, seen.gram, self.asked[name], self.stage.pattern, self.scope)
            self._put(matrix, before, after, seen, inputs)
            return
        gradient = None
        if self.gradients is not None:
            gradient = self.gradients.mean(name)
            gradient = gradient.T if matrix.transposed else gradient
        seed = torch.Generator().manual_seed((crc32(name.encode()) ^ self.stage.seed) % 2**63)
        scores = self.criterion.score(before, Seen(seen.norms, seen.gram, gradient, seed))
        if not bool(scores.isfinite().all()):
            raise PruneError(
                f"{name}: {int((~scores.isfinite()).sum())} scores by {self.stage.criterion} are not finite. Repair the checkpoint, or use "
                "criterion magnitude."
            )
        if self.scope == "global":
            self.scores[name] = scores
            return
        keep = keep_mask(scores, self.asked[name], self.stage.pattern, self.scope)
        self._put(matrix, before, before.masked_fill(~keep, 0), seen, inputs)

    def _put(self, matrix: Matrix, before: Tensor, after: Tensor, seen: Seen, inputs: Tensor | None) -> None:
        if not bool(after.isfinite().all()):
            raise PruneError(
                f"{matrix.name}: {self.stage.criterion} leaves weights that are not finite. Use another criterion."
            )
        error = None
        if seen.gram is not None:
            error = lost_db(before, after, seen.gram)
        elif inputs is not None:
            signal, noise = (float((inputs @ m.T).square().sum()) for m in (before, before - after))
            error = decibels(signal, noise)
        empty = (after == 0).all(dim=1) & (before != 0).any(dim=1)
        self.found[matrix.name] = _Outcome(int(empty.sum()), error)
        matrix.put(after)

    def _together(self) -> None:
        """Prune by one threshold over all matrices."""
        total = sum(scores.numel() for scores in self.scores.values())
        gone = lowest(torch.cat([scores.flatten() for scores in self.scores.values()]), round(self.stage.share * total))
        masks = {}
        for name, scores in self.scores.items():
            masks[name], gone = gone[: scores.numel()].reshape(scores.shape), gone[scores.numel() :]
            if bool(masks[name].all()):
                raise PruneError(
                    f"{name}: one threshold over all matrices leaves none of its weights. Lower sparsity, use scope layer, or "
                    "keep this matrix dense (keep)."
                )
        for name, mask in masks.items():
            before = self.chosen[name].rows()
            self._put(self.chosen[name], before, before.masked_fill(mask, 0), Seen(), None)


def _row(matrix: Matrix, asked: float | None, outcome: _Outcome | None) -> LayerRow:
    reached = sparsity_of(matrix.weight)
    notes = [matrix.note]
    if asked is not None:
        notes = [f"zeros: {percent(asked, 1)} asked, {percent(reached, 1)} reached"]
        if outcome is not None and outcome.rows:
            notes.append(f"{outcome.rows} outputs have no weights left")
    return LayerRow(
        name=matrix.name, shape=tuple(matrix.weight.shape), bits=8 * matrix.weight.element_size(), sparsity=reached, sqnr_db=None,
        output_sqnr_db=None if outcome is None else outcome.output_db, note="; ".join(notes),
    )  # fmt: skip
