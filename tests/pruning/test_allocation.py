"""Allocations worked by hand, held against every other one, and what holds of all of them."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from squeeze.errors import PruneError
from squeeze.model import Model, load_model
from squeeze.pruning.allocation import (
    allocate,
    outlier_allocation,
    outlier_share,
    predicted_loss,
    spread_by_outliers,
)
from squeeze.pruning.settings import PruneStage, RemoveSettings
from squeeze.report.sensitivity_table import Kind, Scanned


def scanned(
    unit: str, losses: dict[float, float], weights: int = 100, kind: Kind = "matrix", names: tuple[str, ...] = ()
) -> list[Scanned]:
    return [
        Scanned(unit=unit, kind=kind, names=names or (unit,), weights=weights, sparsity=s, loss=loss)
        for s, loss in losses.items()
    ]


def mean(rows: list[Scanned], found: dict[str, float]) -> float:
    weights = {row.unit: row.weights for row in rows}
    return sum(found[unit] * number for unit, number in weights.items()) / sum(weights.values())


def test_two_squares_share_zeros_as_their_slopes_become_equal() -> None:
    """Losses 4 s² and 12 s²: 8 a = 24 b and a + b = 0.6, so a = 0.45 and b = 0.15, to half a step of the grid."""
    rows = scanned("a", {0.5: 1.0}) + scanned("b", {0.5: 3.0})
    found = allocate(rows, 0.3)
    assert found == {"a": pytest.approx(0.45, abs=0.006), "b": pytest.approx(0.15, abs=0.006)}
    assert mean(rows, found) == pytest.approx(0.3, abs=1e-12)


def test_no_matrix_goes_beyond_what_it_was_scanned_at() -> None:
    """The same at 0.4 would be 0.6 and 0.2, but the first was scanned at 0.5."""
    rows = scanned("a", {0.5: 1.0}) + scanned("b", {0.5: 3.0})
    assert allocate(rows, 0.4) == {"a": pytest.approx(0.5), "b": pytest.approx(0.3)}
    assert allocate(rows, 0.4, within=0.05) == {"a": pytest.approx(0.45), "b": pytest.approx(0.35)}
    assert allocate(rows, 0.3, limit=0.35) == {"a": pytest.approx(0.35), "b": pytest.approx(0.25)}


def test_a_large_matrix_that_loses_as_much_as_a_small_one_gets_more() -> None:
    """Losses 4 s² each, 300 and 100 weights: for each removed weight 8 a / 300 = 8 b / 100, so a = 3 b; 300 a + 100 b = 60."""
    rows = scanned("large", {0.5: 1.0}, 300) + scanned("small", {0.5: 1.0}, 100)
    found = allocate(rows, 0.15)
    assert found == {"large": pytest.approx(0.18, abs=0.006), "small": pytest.approx(0.06, abs=0.011)}
    assert mean(rows, found) == pytest.approx(0.15, abs=1e-12)


def test_a_block_s_sparsity_is_that_of_all_its_matrices() -> None:
    rows = scanned("h.0", {0.5: 1.0}, kind="block", names=("h.0.q", "h.0.k")) + scanned(
        "h.1", {0.5: 3.0}, kind="block", names=("h.1.q",)
    )
    found = allocate(rows, 0.3)
    assert found["h.0.q"] == found["h.0.k"] > found["h.1.q"]
    assert predicted_loss(rows, found) == pytest.approx(4 * found["h.0.q"] ** 2 + 12 * found["h.1.q"] ** 2)


def test_no_other_spread_is_predicted_to_lose_less() -> None:
    rows = (
        scanned("a", {0.2: 0.01, 0.5: 0.1, 0.8: 2.0}, 100)
        + scanned("b", {0.2: 0.001, 0.5: 0.3, 0.8: 0.9}, 300)
        + scanned("c", {0.2: 0.05, 0.5: 0.06, 0.8: 0.5}, 200)
    )
    found = allocate(rows, 0.5)
    best = predicted_loss(rows, found)
    grid = [n / 40 for n in range(33)]
    for a, b in product(grid, grid):
        c = (0.5 * 600 - 100 * a - 300 * b) / 200
        if 0 <= c <= 0.8:
            assert predicted_loss(rows, {"a": a, "b": b, "c": c}) >= best - 1e-3
    assert best < predicted_loss(rows, dict.fromkeys("abc", 0.5))


curves = st.lists(
    st.tuples(st.integers(1, 5000), st.lists(st.floats(0, 50), min_size=3, max_size=3)), min_size=1, max_size=6
)


def drawn(given_curves: list[tuple[int, list[float]]]) -> list[Scanned]:
    return [
        row
        for number, (weights, losses) in enumerate(given_curves)
        for row in scanned(f"m{number}", dict(zip((0.3, 0.6, 0.95), losses, strict=True)), weights)
    ]


@settings(max_examples=40)
@given(curves, st.floats(0, 0.95), st.floats(0, 0.95))
def test_the_mean_is_what_was_asked_and_more_is_never_less_of_any(
    curves: list[tuple[int, list[float]]], one: float, other: float
) -> None:
    rows, (low, high) = drawn(curves), sorted((one, other))
    fewer, more = allocate(rows, low), allocate(rows, high)
    assert mean(rows, fewer) == pytest.approx(low, abs=1e-9)
    assert mean(rows, more) == pytest.approx(high, abs=1e-9)
    assert all(0 <= s <= 0.95 for s in (*fewer.values(), *more.values()))
    assert all(fewer[name] <= more[name] + 1e-9 for name in fewer)


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=5),
    st.lists(st.floats(0, 50), min_size=3, max_size=3),
    st.floats(0, 0.9),
)
@example([1, 203], [0.0, 9.5625, 0.0], 0.5)  # flat but for rounding: no order comes of it
def test_equal_curves_for_each_weight_get_equal_shares(sizes: list[int], losses: list[float], sparsity: float) -> None:
    rows = [
        row
        for n, size in enumerate(sizes)
        for row in scanned(f"m{n}", dict(zip((0.3, 0.6, 0.9), (size * x for x in losses), strict=True)), size)
    ]
    assert allocate(rows, sparsity) == {f"m{n}": pytest.approx(sparsity, abs=0.02) for n in range(len(sizes))}


@given(st.floats(0, 0.9), st.integers(1, 5))
def test_curves_that_are_the_same_get_the_same(sparsity: float, number: int) -> None:
    rows = [row for n in range(number) for row in scanned(f"m{n}", {0.3: 0.01, 0.6: 0.2, 0.9: 3.0})]
    assert allocate(rows, sparsity) == {f"m{n}": pytest.approx(sparsity, abs=1e-9) for n in range(number)}


@pytest.mark.parametrize(
    ("rows", "sparsity", "message"),
    [
        ([], 0.5, "the scan has no rows"),
        (scanned("a", {0.5: 1.0}), 1.0, r"sparsity 1 is not in \[0, 1\)"),
        (scanned("a", {0.5: 1.0}), 0.7, "sparsity 0.7 is more than the scan allows: .* it is 0.5. Scan at higher"),
        (scanned("a", {0.5: 1.0}, kind="heads"), 0.5, "the scan is of heads. Scan by matrix or block"),
    ],
)
def test_what_cannot_be_spread_says_why(rows: list[Scanned], sparsity: float, message: str) -> None:
    with pytest.raises(PruneError, match=message):
        allocate(rows, sparsity)


def test_outliers_are_counted_over_all_matrices_of_a_layer() -> None:
    """Mean 20 / 10 = 2; above 5 × 2 lies only the 11: one of ten. Of the first matrix alone, none would be (mean 4.67)."""
    scores = [torch.tensor([[11.0, 2.0, 1.0]]), torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]])]
    assert outlier_share(scores) == pytest.approx(0.1)
    assert outlier_share(scores[:1]) == 0.0


def test_the_layer_with_most_outliers_keeps_most() -> None:
    """Shares 0.01, 0.02, 0.03 scale to 0, 0.08, 0.16; their mean is 0.08, so 0.5 + 0.08, 0.5 and 0.5 − 0.08."""
    shares = {"h.0": 0.01, "h.1": 0.02, "h.2": 0.03}
    members = {layer: {f"{layer}.q": 60, f"{layer}.k": 40} for layer in shares}
    found = spread_by_outliers(shares, members, 0.5)
    assert found == {
        f"{layer}.{name}": pytest.approx(value)
        for layer, value in zip(shares, (0.58, 0.5, 0.42), strict=True)
        for name in "qk"
    }


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 5000)), min_size=1, max_size=6), st.floats(0, 0.999)
)  # fmt: skip
def test_outliers_move_sparsity_and_not_its_mean(layers: list[tuple[float, int]], sparsity: float) -> None:
    shares = {f"h.{n}": share for n, (share, _) in enumerate(layers)}
    members = {f"h.{n}": {f"h.{n}.w": size} for n, (_, size) in enumerate(layers)}
    found = spread_by_outliers(shares, members, sparsity)
    whole = sum(size for _, size in layers)
    assert sum(found[f"h.{n}.w"] * size for n, (_, size) in enumerate(layers)) / whole == pytest.approx(
        sparsity, abs=1e-9
    )
    assert all(-1e-9 <= value < 1 for value in found.values())


def test_outliers_of_an_impossible_sparsity_are_refused() -> None:
    with pytest.raises(PruneError, match=r"sparsity 1.5 is not in \[0, 1\)"):
        spread_by_outliers({"h": 0.1}, {"h": {"w": 1}}, 1.5)


def test_owl_spreads_a_stage_s_sparsity_over_layers(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    with torch.no_grad():
        dict(model.network.named_parameters())["model.layers.1.mlp.up_proj.weight"][:2] *= 40
    ids = np.random.default_rng(0).integers(4, 200, (3, 24))
    told: list[tuple[int, int]] = []
    found = outlier_allocation(
        model, [{"input_ids": ids}], PruneStage(sparsity=0.5, allocation="owl"), lambda i, n: told.append((i, n))
    )
    assert told == [(1, 2), (2, 2)]
    assert len(found) == 14
    assert found["model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.58)
    assert found["model.layers.1.self_attn.q_proj.weight"] == pytest.approx(0.42)
    with pytest.raises(PruneError, match="allocation: owl spreads a sparsity, and none is given"):
        outlier_allocation(model, [{"input_ids": ids}], PruneStage(remove=RemoveSettings(neurons=0.5)))


def test_owl_needs_layers() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    model = Model(network, None, "causal-lm", "own", {}, factory="tests:own")
    with pytest.raises(PruneError, match="Sequential has no layers to spread sparsity over"):
        outlier_allocation(model, (), PruneStage(sparsity=0.5, allocation="owl"))
