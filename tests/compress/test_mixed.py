"""The choice of layers, from figures alone."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squeeze.compress.mixed import Candidate, for_budget, for_size, predicted, ranked
from squeeze.errors import QuantizeError


def layer(name: str, error: float, low: int = 10, high: int | None = 40) -> Candidate:
    return Candidate((name,), error, low, high)


A, B, C = layer("a", 6.0), layer("b", 3.0, 10, 20), layer("c", 1.0)
FIXED = layer("table", 0.5, 100, None)
ALL = [C, A, FIXED, B]


def names(kept: Sequence[Candidate]) -> list[str]:
    return [one.names[0] for one in kept]


def test_layers_are_ranked_by_error_for_each_byte_and_fixed_ones_not_at_all() -> None:
    assert names(ranked(ALL)) == ["b", "a", "c"]
    assert predicted(ALL, [A, B]) == 1.5
    assert predicted(ALL, []) == 10.5


def test_a_size_is_filled_with_what_matters_most_and_never_exceeded() -> None:
    least = 7 + 130
    assert for_size(ALL, least, 7) == []
    assert names(for_size(ALL, least + 10, 7)) == ["b"]
    assert names(for_size(ALL, least + 30, 7)) == ["a"]  # b first would leave no room for a
    assert names(for_size(ALL, least + 40, 7)) == ["b", "a"]
    with pytest.raises(QuantizeError, match="with every layer in the scheme's integers the weights are 0.00 MB"):
        for_size(ALL, least - 1, 7)
    with pytest.raises(QuantizeError, match="leaves nothing to choose"):
        for_size(ALL, least + 70, 7)


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(1, 50)), min_size=2, max_size=9), st.integers(0, 60))
def test_any_size_that_can_be_is_held(layers: list[tuple[float, int]], room: int) -> None:
    candidates = [layer(str(n), error, 5, 5 + extra) for n, (error, extra) in enumerate(layers)]
    room = min(room, sum(extra for _, extra in layers) - 1)
    kept = for_size(candidates, 5 * len(layers) + room, 0)
    assert sum(one.extra_bytes for one in kept) <= room


@pytest.mark.parametrize("harm", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("budget", [0.1, 1.0, 4.0, 9.0, 30.0])
def test_a_budget_keeps_the_fewest_layers_with_which_the_whole_holds(harm: float, budget: float) -> None:
    """The whole may cost less or more than the sum says."""
    candidates = [layer(str(n), error, 10, 20) for n, error in enumerate((8.0, 4.0, 2.0, 1.0, 0.5, 0.25))]

    def measure(kept: Sequence[Candidate]) -> float:
        return harm * predicted(candidates, kept)

    kept, tried = for_budget(candidates, budget, measure, "nats")
    assert measure(kept) <= budget
    assert not kept or measure(kept[:-1]) > budget
    assert len(tried) <= 4
    assert dict(tried)[len(kept)] == measure(kept)


def test_a_budget_that_no_choice_holds_names_the_least_error() -> None:
    with pytest.raises(QuantizeError, match="budget 0.2 cannot be: .* still differ by 0.5 nats per token. Allow more"):
        for_budget(ALL, 0.2, lambda kept: predicted(ALL, kept), "nats per token")
