"""Which input channels of a layer stay in float: those whose size would set the ranges of all others."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from squeeze.compress.smooth import column_peaks
from squeeze.errors import QuantizeError

if TYPE_CHECKING:
    from squeeze.compress.plan import Plan
    from squeeze.compress.quantize import QuantizeStage
    from squeeze.compress.schemes import Layout


def refuse_outliers(stage: "QuantizeStage", layout: "Layout", task: str, plans: "Mapping[str, Plan]") -> None:
    """Raise QuantizeError where a scheme has no range for outliers to set, or where they are all that a layer reads."""
    if not stage.outliers:
        return
    if layout.block_size:
        raise QuantizeError(
            f"outliers is for schemes with one scale per output row; {stage.scheme} rounds the inputs of {task} block by block, where "
            "an outlier spoils its own block alone. Drop it, or choose int8-static."
        )
    for name, plan in plans.items():
        columns = plan.weight.shape[0] if plan.transposed else plan.weight.shape[1]
        if plan.grid is not None and plan.block_size is None and columns <= stage.outliers:
            raise QuantizeError(
                f"outliers: {stage.outliers}, but {name} has {columns} input channels. Lower it: 4 to 16 are usual."
            )


def outlier_channels(size: Tensor, matrices: Sequence[Tensor], count: int) -> Tensor:
    """The `count` channels with the largest product of their peak and the largest weight that they meet, [count] int64, ascending.

    `size` [in] are the peaks of the inputs, `matrices` [out, in] all weights that read them. Dividing inputs by a SmoothQuant
    divisor and multiplying the weights by it leaves the products as they are, and with it both ranges, that of the inputs and
    those of the weights, grow with them: x / s · w · s = (x w)^(1 − α) · (x w)^α.
    """
    return (size * column_peaks(matrices)).topk(count).indices.sort().values
