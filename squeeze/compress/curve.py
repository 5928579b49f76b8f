"""How the error falls with more calibration texts: copies of the network, quantized with the first few texts and with more.

Each copy's answers are compared with float's on texts that calibrated none of them. They come from the same split, beyond the
largest count, so that nothing has to be set aside for it and the evaluation texts are never touched.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from squeeze.errors import QuantizeError
from squeeze.evaluate import divergence, embed, log_probabilities
from squeeze.report.explained import CurvePoint

if TYPE_CHECKING:
    from squeeze.compress.quantize import QuantizeStage
    from squeeze.model import Model

Batch = Mapping[str, NDArray[np.int64]]
HELD_OUT_TEXTS, HELD_OUT_TOKENS = 128, 4096
"""Most that answers are compared on: the comparison should cost less than the quantizing that it judges."""


def calibration_curve(
    model: "Model", stage: "QuantizeStage", calibration: Sequence[Batch], done: Callable[[int, int], None] | None = None
) -> tuple[CurvePoint, ...]:
    """One point for each count in `stage.curve`; `model` stays as it is.

    `calibration` are batches with the number of each text in "index". Raises QuantizeError where no text is left to compare on.
    """
    largest = stage.curve[-1]
    if any("index" not in batch for batch in calibration):
        raise QuantizeError(
            'curve takes texts by their number. Give batches with an "index", as squeeze.data.batches does.'
        )
    texts = sum(len(batch["index"]) for batch in calibration)
    if texts <= largest:
        raise QuantizeError(
            f"curve compares on calibration texts beyond the largest count, {largest}, and there are {texts}. Set "
            f"data.splits.calibration to {largest + 64}, say."
        )
    held_out = list(_numbered(calibration, largest, _last(calibration, largest)))
    points = []
    for count in stage.curve:
        twin = copy.copy(model)
        twin.network, twin.integers = copy.deepcopy(model.network), {}
        stage.model_copy(update={"curve": ()}).apply(twin, list(_numbered(calibration, 0, count)), done)
        points.append(_point(count, model, twin, held_out))
    return tuple(points)


def _last(calibration: Sequence[Batch], largest: int) -> int:
    """The number of the text at which comparing ends."""
    longest = max(batch["input_ids"].shape[1] for batch in calibration)
    return largest + min(HELD_OUT_TEXTS, max(1, HELD_OUT_TOKENS // longest) if longest > 256 else HELD_OUT_TEXTS)


def _numbered(batches: Sequence[Batch], start: int, end: int) -> Iterator[Batch]:
    """The texts whose numbers lie in [start, end), in the batches that they stand in."""
    for batch in batches:
        rows = (batch["index"] >= start) & (batch["index"] < end)
        if rows.any():
            yield {name: array[rows] for name, array in batch.items()}


def _point(count: int, model: "Model", twin: "Model", held_out: Sequence[Batch]) -> CurvePoint:
    from squeeze.model import call
    from squeeze.simulation import simulation

    simulated = simulation(twin)
    signal = noise = 0.0
    kl: list[NDArray[np.floating]] = []
    same: list[NDArray[np.bool_]] = []
    cosine: list[NDArray[np.floating]] = []
    for batch in held_out:
        exact, found = (call(network, model, batch) for network in (model.network, simulated))
        valid = batch["attention_mask"].astype(bool) if exact.ndim == 3 else np.ones(len(exact), bool)
        signal += float(np.square(exact[valid], dtype=np.float64).sum())
        noise += float(np.square((exact - found)[valid], dtype=np.float64).sum())
        if model.task == "feature-extraction":
            ours, theirs = (embed(states, batch["attention_mask"]) for states in (found, exact))
            cosine.append((ours * theirs).sum(axis=1))
        else:
            kl.append(divergence(*(log_probabilities(side[valid]) for side in (exact, found))))
            same.append(exact[valid].argmax(axis=-1) == found[valid].argmax(axis=-1))
    return CurvePoint(
        texts=count, held_out=sum(len(batch["index"]) for batch in held_out),
        sqnr_db=10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None,
        kl=_mean(kl), same=_mean(same), cosine=_mean(cosine),
    )  # fmt: skip


def _mean(parts: "Sequence[NDArray[np.floating] | NDArray[np.bool_]]") -> float | None:
    return float(np.concatenate(parts).mean()) if parts else None
