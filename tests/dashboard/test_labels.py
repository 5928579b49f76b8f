"""Names beside marks keep out of each other's way as far as there is room."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from squeeze.dashboard.labels import PLOT, Spot, _box, placed


def overlaps(spots: list[Spot]) -> list[float]:
    boxes = [_box(spot, place) for spot, place in zip(spots, placed(spots), strict=True)]
    return [one.shared(other) for one, other in combinations(boxes, 2)]


def test_a_name_alone_stands_right_of_its_mark() -> None:
    found = placed([Spot(0.3, 0.5, 10, "a")])[0]
    assert (found.dx, found.dy, found.align) == (15, 0, "left")


def test_a_name_at_the_right_edge_stands_left_of_its_mark() -> None:
    assert placed([Spot(0.99, 0.5, 10, "export-1-quantize")])[0].align == "right"


def test_six_marks_in_one_place_have_names_apart() -> None:
    spots = [Spot(0.5 + n / 1000, 0.5, 6, f"export-{n}-quantize") for n in range(6)]
    assert max(overlaps(spots)) == 0


@given(st.lists(st.builds(Spot, st.floats(0, 1), st.floats(0, 1), st.floats(0, 30), st.text(max_size=60)), max_size=12))
def test_every_mark_has_a_name_that_begins_inside_the_plot(spots: list[Spot]) -> None:
    found = placed(spots)
    assert len(found) == len(spots)
    for spot, place in zip(spots, found, strict=True):
        box = _box(spot, place)
        assert not spot.text or box.shared(PLOT) >= 0.3 * box.area
