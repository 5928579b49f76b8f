"""What a chart is drawn from: rows, and what the chart must know beside them."""

from dataclasses import dataclass, field
from typing import Literal

from squeeze.dashboard.readings import Row

Better = Literal["lower", "higher", ""]


@dataclass(frozen=True)
class Axis:
    """One direction of a chart."""

    title: str
    unit: str = ""
    """As in reports; "share" for shares of 1, which are shown in per cent."""
    better: Better = ""
    """ "": neither."""


@dataclass(frozen=True)
class Variant:
    """One of a chart's datasets. Variants of equal name are drawn alike, in whichever report: their axes are equal."""

    label: str
    """For the switch."""
    x: Axis
    y: Axis
    rows: list[Row] = field(default_factory=list)


Variants = dict[str, Variant]
"""Name -> variant, in the order of the switch. Names are stable: links to the page hold them."""
