"""How many zeros each matrix gets, where not all get the same: by what was measured of it, or by its outliers.

By measurement: a scan (`sensitivity.py`) says what a matrix loses alone at some sparsities. Losses of matrices are taken to add up, and
the sum is least, for a given number of zeros, where every matrix loses as much for its next zero. So zeros go one after another to
the matrix that loses least by the next one: on convex curves this greedy order is the optimum. What the assumption is worth is for a
measurement of the whole network to say, not for this file.

By outliers: OWL (Yin et al. 2023, arXiv:2310.05175) measures no answers at all.

Rejected: an evolutionary search over whole networks. It pays hundreds of evaluations for what is mostly in the curves already.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import Tensor

from squeeze.errors import PruneError
from squeeze.model import Model
from squeeze.playback import Batches, Done
from squeeze.pruning.settings import PruneStage
from squeeze.pruning.statistics import layers_of, places, readings
from squeeze.report.sensitivity_table import Scanned

LIMIT = 0.95
"""No matrix is emptied further, whatever it seems to be worth."""
STEP = 0.01
"""How finely curves are read off between measured sparsities."""
STEEPEST = 8.0
"""Largest exponent of a curve below its first measured sparsity."""
OUTLIER, SPREAD = 5.0, 0.08
"""OWL's M and λ: a score so many times the mean is an outlier; no layer's sparsity is further than about this from the target."""
ALIKE, NOISE = 1e-9, 1e-12
"""Two slopes are taken for one where they differ by less than this share of themselves, or of the largest loss (rounding, near 0)."""


def allocate(
    rows: Sequence[Scanned], sparsity: float, *, limit: float = LIMIT, within: float | None = None
) -> dict[str, float]:
    """Parameter name -> sparsity in [0, limit]; their mean, weighted by weights, is `sparsity`, and the summed loss the least.

    No matrix goes beyond what it was scanned at, nor, where `within` is given, further than that from `sparsity`. Raises PruneError for
    rows that are not of matrices, and where the scan did not go as far as is asked.
    """
    if not 0 <= sparsity < 1:
        raise PruneError(f"sparsity {sparsity:g} is not in [0, 1). It is the share of weights set to zero.")
    foreign = sorted({row.kind for row in rows} - {"matrix", "block"})
    if foreign:
        raise PruneError(f"sparsity is spread over matrices, and the scan is of {foreign[0]}. Scan by matrix or block.")
    units = {row.unit: row for row in rows}
    if not units:
        raise PruneError(
            "there is nothing to spread sparsity over: the scan has no rows. Scan at one sparsity or more."
        )
    low = 0.0 if within is None else max(0.0, sparsity - within)
    points = {unit: {r.sparsity: max(0.0, r.loss) for r in rows if r.unit == unit and r.sparsity > 0} for unit in units}
    top = {
        unit: min(limit, max(found, default=0.0), 1.0 if within is None else sparsity + within)
        for unit, found in points.items()
    }
    total = sum(row.weights for row in units.values())
    reach = sum(top[unit] * row.weights for unit, row in units.items()) / total
    if sparsity > reach + 1e-12:
        raise PruneError(
            f"sparsity {sparsity:g} is more than the scan allows: with every matrix at the most that it was scanned at (and at "
            f"{limit:g} at most) it is {reach:.3g}. Scan at higher sparsities too."
        )
    room = sparsity * total
    zeros = {unit: min(low, top[unit]) * row.weights for unit, row in units.items()}
    room -= sum(zeros.values())
    pieces = [
        (slope / row.weights, unit, width * row.weights)
        for unit, row in units.items()
        for slope, width in _slopes(points[unit], min(low, top[unit]), top[unit])
    ]
    pieces.sort(key=lambda piece: piece[0])
    noise = NOISE * max((max(points[unit].values(), default=0.0) / row.weights for unit, row in units.items()))
    at = 0
    while room > 0 and at < len(pieces):
        end = at + 1
        while end < len(pieces) and pieces[end][0] <= pieces[at][0] * (1 + ALIKE) + noise:
            end += 1
        same = pieces[at:end]
        size = sum(piece[2] for piece in same)
        share = min(1.0, room / size)
        for _, unit, weights in same:
            zeros[unit] += share * weights
        room -= share * size
        at = end
    found = {unit: min(top[unit], zeros[unit] / row.weights) for unit, row in units.items()}
    return {name: found[unit] for unit, row in units.items() for name in row.names or (unit,)}


def predicted_loss(rows: Sequence[Scanned], sparsities: Mapping[str, float]) -> float:
    """Sum of what each unit loses alone at its sparsity, read off its curve: what an allocation is chosen by."""
    total = 0.0
    for unit, first in {row.unit: row for row in rows}.items():
        points = {row.sparsity: max(0.0, row.loss) for row in rows if row.unit == unit and row.sparsity > 0}
        total += _read(points, sparsities[(first.names or (unit,))[0]])
    return total


def _slopes(points: Mapping[float, float], low: float, top: float) -> list[tuple[float, float]]:
    """(loss for each unit of sparsity, width) of the pieces of the curve's lower convex hull from `low` to `top`, rising."""
    if top <= low:
        return []
    steps = max(1, math.ceil((top - low) / STEP - 1e-9))
    grid = [low + (top - low) * k / steps for k in range(steps + 1)]
    hull: list[tuple[float, float]] = []
    for point in [(s, _read(points, s)) for s in grid]:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return [(max(0.0, _slope(a, b)), b[0] - a[0]) for a, b in pairwise(hull)]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _read(points: Mapping[float, float], sparsity: float) -> float:
    """The curve at `sparsity`: a power of it between measured points, as losses grow by orders of magnitude; nothing is lost at 0.

    Below the first point the power is that between the first two, or 2 where there is one: KL divergence is a square of small errors.
    """
    known = sorted(points.items())
    if sparsity <= 0:
        return 0.0
    above = next((n for n, (s, _) in enumerate(known) if s >= sparsity), None)
    if above is None:
        return known[-1][1]
    s1, l1 = known[above]
    if above == 0:
        power = _power(known[0], known[1]) if len(known) > 1 else 2.0
        return float(l1 * (sparsity / s1) ** min(max(power, 1.0), STEEPEST))
    s0, l0 = known[above - 1]
    if l0 <= 0 or l1 <= 0:
        return l0 + (l1 - l0) * (sparsity - s0) / (s1 - s0)
    return math.exp(math.log(l0) + _power(known[above - 1], known[above]) * math.log(sparsity / s0))


def _power(a: tuple[float, float], b: tuple[float, float]) -> float:
    if a[1] <= 0 or b[1] <= 0:
        return 1.0
    return (math.log(b[1]) - math.log(a[1])) / math.log(b[0] / a[0])


def outlier_allocation(model: Model, batches: Batches, stage: PruneStage, done: Done | None = None) -> dict[str, float]:
    """OWL's sparsities for the stage: parameter name -> sparsity, lower for layers with more outliers among Wanda's scores |w| · ‖x‖.

    Raises PruneError for a stage without a sparsity, and a network without repeated blocks.
    """
    if stage.sparsity is None:
        raise PruneError("allocation: owl spreads a sparsity, and none is given. Set sparsity, to 0.5 say.")
    found = places(model.network, stage.keep)
    if found[0].layer is None:
        raise PruneError(
            f"{type(model.network).__name__} has no layers to spread sparsity over. Use allocation: uniform."
        )
    read = readings(model, batches, found, with_gram=False)
    layers = layers_of(model.network, found)
    shares = {}
    for number, (layer, members) in enumerate(layers.items(), start=1):
        shares[layer] = outlier_share([place.matrix.rows().abs() * read.of(place).norms for place in members])
        if done is not None:
            done(number, len(layers))
    sizes = {layer: {place.name: place.weights for place in members} for layer, members in layers.items()}
    return spread_by_outliers(shares, sizes, stage.sparsity)


def outlier_share(scores: Sequence[Tensor], times: float = OUTLIER) -> float:
    """Share of a layer's scores, all its matrices together, above `times` their mean: D in OWL's section 3.2."""
    number = sum(each.numel() for each in scores)
    mean = sum(float(each.double().sum()) for each in scores) / number
    return sum(int((each > times * mean).sum()) for each in scores) / number


def spread_by_outliers(
    shares: Mapping[str, float], members: Mapping[str, Mapping[str, int]], sparsity: float, *, spread: float = SPREAD,
    limit: float = LIMIT,
) -> dict[str, float]:  # fmt: skip
    """Parameter name -> sparsity: lower for layers with more outliers, 2·spread from the one to the other end.

    `shares`: layer -> its `outlier_share`; `members`: layer -> its parameters with how many weights they have. OWL as its authors run it:
    shares are scaled to [0, 2λ] and centred on the target. Departures: the mean is weighted by weights, so that the target is met
    exactly, and λ shrinks where a layer would leave [0, limit]. Raises PruneError for a sparsity outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise PruneError(f"sparsity {sparsity:g} is not in [0, 1). It is the share of weights set to zero.")
    sizes = {layer: sum(members[layer].values()) for layer in shares}
    low, high = min(shares.values()), max(shares.values())
    scaled = {
        layer: 2 * spread * (share - low) / (high - low) if high > low else 0.0 for layer, share in shares.items()
    }
    middle = sum(scaled[layer] * size for layer, size in sizes.items()) / sum(sizes.values())
    moves = {layer: middle - value for layer, value in scaled.items()}
    up, down = max(moves.values()), -min(moves.values())
    room = [1.0]
    if up > 0:
        room.append(max(0.0, limit - sparsity) / up)
    if down > 0:
        room.append(sparsity / down)
    return {name: sparsity + min(room) * moves[layer] for layer in shares for name in members[layer]}
