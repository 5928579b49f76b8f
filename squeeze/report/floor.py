"""How close a measurement came to what the machine can do: bytes over bandwidth, operations over rate.

A floor is a time that this machine, as it was measured, cannot go below: the larger of reading every weight once and doing every
operation at the best rate seen (the roofline, Williams et al. 2009). Bandwidth is taken at the working set's own size, because
weights that fit a large cache are not bound by the memory behind it. Reached in full it would say 100 %; far below, something
else takes the time: small operators, waiting, one core.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from squeeze.report import stats
from squeeze.report.schema import Ceilings, Cost, Measurement, Report, Workload
from squeeze.report.summary import label
from squeeze.report.text import amount, percent

FLOOR_COLUMNS = ("cell", "", "measured", "floor", "bound by", "reached")
TIMED = ("latency", "time_to_first_token", "time_per_output_token")


@dataclass(frozen=True)
class FloorRow:
    """One timed cell beside its floor."""

    artifact: str
    runtime: str
    label: str
    seconds: float
    floor: float
    bound: str
    """ "memory" or "int8 operations"."""
    share: float
    """floor / seconds."""

    @property
    def cells(self) -> tuple[str, ...]:
        """As a table shows it."""
        return (
            f"{self.artifact}, {self.runtime}", self.label, amount(self.seconds, "s"), amount(self.floor, "s"), self.bound,
            percent(self.share, 0),
        )  # fmt: skip


def floors(report: Report) -> list[FloorRow]:
    """Rows for every timed cell whose cost is known, in a report whose machine was measured; on the CPU only."""
    if report.ceilings is None:
        return []
    costs = {cost.artifact_digest: cost for cost in report.costs}
    rows = []
    for m in report.measurements:
        cost = costs.get(m.artifact_digest)
        if m.quantity in TIMED and m.values and cost is not None and m.workload is not None and m.device == "cpu":
            rows.append(_row(m, m.workload, cost, report.ceilings))
    return [row for row in rows if row is not None]


def bandwidth_at(ceilings: Ceilings, size: float) -> float:
    """Bytes a second for a working set of this size, read off between the measured ones on a logarithmic scale."""
    points = ceilings.bandwidth
    below = [p for p in points if p.working_set <= size]
    above = [p for p in points if p.working_set > size]
    if not below or not above:
        return (below[-1] if below else above[0]).bytes_per_second
    low, high = below[-1], above[0]
    share = math.log(size / low.working_set) / math.log(high.working_set / low.working_set)
    return low.bytes_per_second + share * (high.bytes_per_second - low.bytes_per_second)


def cost_rows(costs: Sequence[Cost]) -> list[tuple[str, ...]]:
    """The static cost cards as a table shows them."""
    return [
        (
            cost.artifact, f"{cost.parameters:,}" if cost.parameters else "unknown", amount(cost.weight_bytes, "bytes"),
            "unknown" if cost.read_bytes is None else amount(cost.read_bytes, "bytes"), _millions(cost.operations_per_token),
            "none" if cost.cache_bytes_per_token is None else amount(cost.cache_bytes_per_token, "bytes"), cost.arithmetic,
        )
        for cost in costs
    ]  # fmt: skip


COST_COLUMNS = (
    "artifact", "parameters", "weights", "read a call or step", "operations a token", "cache a token", "arithmetic",
)  # fmt: skip


def _millions(value: float | None) -> str:
    return "unknown" if value is None else f"{value / 1e6:,.1f} million"


def _row(m: Measurement, work: Workload, cost: Cost, ceilings: Ceilings) -> FloorRow | None:
    if not cost.read_bytes:
        return None
    seconds = stats.median(tuple(stats.by_repeat(m).values()))
    in_memory = cost.read_bytes / bandwidth_at(ceilings, cost.read_bytes)
    rate = ceilings.operations.get(cost.arithmetic) or ceilings.operations.get("float32")
    operations = _operations(m.quantity, work, cost)
    computing = operations / rate if operations and rate else 0.0
    floor = max(in_memory, computing)
    bound = "memory" if in_memory >= computing else f"{cost.arithmetic} operations"
    return FloorRow(m.artifact, m.runtime, label(m), seconds, floor, bound, floor / seconds)


def _operations(quantity: str, work: Workload, cost: Cost) -> float | None:
    """Operations of one call, or of one decoding step in the middle of the generation."""
    if cost.operations_per_token is None or cost.operations_per_pair is None:
        return None
    if quantity == "time_per_output_token":
        context = (work.prompt or 0) + (work.new_tokens or 0) / 2
        return work.batch * (cost.operations_per_token + cost.operations_per_pair * context)
    length = work.sequence if quantity == "latency" else work.prompt
    if length is None:
        return None
    pairs = length * length if quantity == "latency" else length * (length + 1) / 2
    return work.batch * (cost.operations_per_token * length + cost.operations_per_pair * pairs)
