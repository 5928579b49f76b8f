"""Where the names beside marks go, so that they do not lie on each other: chosen beforehand, because Vega-Lite puts them all on one side.

Each name takes, in order, the first of some places around its mark that is free of other names and marks and inside the plot; where none
is, the one that covers least. Sizes are those of a plot of WIDTH by HEIGHT: on a narrower one names come nearer, and may touch.
Rejected: leaving names out where it is narrow (a point without a name is a riddle).
"""

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640.0, 400.0
LETTER, LINE = 6.1, 14.0
"""Pixels of a letter on average, and of a line."""
LIMIT = 200.0
GAP = 5.0


@dataclass(frozen=True)
class Spot:
    """A mark and its name: shares of the plot's width from the left and of its height from the top, radius in pixels."""

    x: float
    y: float
    radius: float
    text: str


@dataclass(frozen=True)
class Placed:
    """Offsets of a text mark from its point."""

    dx: float
    dy: float
    align: str


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def shared(self, other: "_Box") -> float:
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, wide) * max(0.0, high)

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)


PLOT = _Box(0, -LINE, WIDTH, HEIGHT)


def placed(spots: Sequence[Spot]) -> list[Placed]:
    """A place for each name, in the order given."""
    marks = [_mark(spot) for spot in spots]
    taken: list[_Box] = []
    found = []
    for number, spot in enumerate(spots):
        others = [*taken, *(mark for n, mark in enumerate(marks) if n != number)]
        choices = [(place, _box(spot, place)) for place in _around(spot.radius)]
        place, box = min(choices, key=lambda choice: _covered(choice[1], others))
        taken.append(box)
        found.append(place)
    return found


def _around(radius: float) -> list[Placed]:
    """Places from near to far."""
    side, found = radius + GAP, []
    for step in range(5):
        for dy in (step * LINE, -step * LINE) if step else (0.0,):
            found += [Placed(side, dy, "left"), Placed(-side, dy, "right")]
        if step == 0:
            found += [Placed(0.0, -side - LINE / 3, "center"), Placed(0.0, side + LINE / 3, "center")]
    return found


def _covered(box: _Box, others: Sequence[_Box]) -> float:
    return sum(box.shared(other) for other in others) + 2 * (box.area - box.shared(PLOT))


def _mark(spot: Spot) -> _Box:
    x, y = spot.x * WIDTH, spot.y * HEIGHT
    return _Box(x - spot.radius, y - spot.radius, x + spot.radius, y + spot.radius)


def _box(spot: Spot, place: Placed) -> _Box:
    wide = min(LIMIT, LETTER * len(spot.text))
    start = {"left": 0.0, "center": wide / 2, "right": wide}[place.align]
    left, middle = spot.x * WIDTH + place.dx - start, spot.y * HEIGHT + place.dy
    return _Box(left, middle - LINE / 2, left + wide, middle + LINE / 2)
