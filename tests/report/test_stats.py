"""Statistics against hand-worked cases, laws that hold for any values, and simulated runs in which the truth is
known."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from squeeze.provenance import digest_bytes
from squeeze.report import stats
from squeeze.report.schema import Measurement

positive = st.floats(1e-6, 1e6)
bits = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=50)


def measured(
    values: Sequence[float], repeat: Sequence[int] | None = None, weights: Sequence[float] | None = None
) -> Measurement:
    """A measurement with one value a repeat, unless `repeat` says otherwise."""
    return Measurement(
        quantity="latency", unit="s", values=tuple(values), weights=None if weights is None else tuple(weights),
        repeat=tuple(range(len(values)) if repeat is None else repeat), workload=None, artifact="1-quantize",
        artifact_digest=digest_bytes(b"x"), runtime="onnxruntime", device="cpu", threads=2,
        error=None if len(values) else "killed",
    )  # fmt: skip


def pairs(least: int) -> st.SearchStrategy[list[tuple[float, float]]]:
    return st.lists(st.tuples(positive, positive), min_size=least, max_size=8)


def test_the_median_and_spread_of_four_values() -> None:
    assert stats.median([4.0, 1.0, 3.0, 2.0]) == 2.5
    assert stats.spread([1.0, 2.0, 3.0, 4.0]) == pytest.approx(0.75 / 2.5)


def test_there_is_no_median_of_nothing_and_no_spread_of_two() -> None:
    assert math.isnan(stats.median([]))
    assert math.isnan(stats.spread([1.0, 2.0]))


def test_a_repeat_is_the_median_of_its_calls() -> None:
    assert stats.by_repeat(measured([1, 9, 2, 5, 7], repeat=[0, 0, 0, 1, 1])) == {0: 2.0, 1: 6.0}


def test_values_without_repeat_indexes_are_one_repeat() -> None:
    assert stats.by_repeat(measured([1, 2, 9], repeat=[])) == {0: 2.0}
    assert stats.by_repeat(measured([])) == {}


def test_a_constant_ratio_has_an_interval_of_no_width() -> None:
    found = stats.ratio(measured([2, 4, 8]), measured([1, 2, 4]))
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))
    assert found.n == 3


def test_the_interval_of_a_ratio_is_student_s_on_its_logarithms() -> None:
    # Ratios 1, e, e²: their logarithms have mean 1 and standard deviation 1.
    found = stats.ratio(measured([1, math.e, math.e**2]), measured([1, 1, 1]))
    assert math.log(found.value) == pytest.approx(1)
    assert math.log(found.low) == pytest.approx(1 - 4.303 / math.sqrt(3))
    assert math.log(found.high) == pytest.approx(1 + 4.303 / math.sqrt(3))


def test_repeats_pair_up_by_index_and_not_by_place() -> None:
    found = stats.ratio(measured([2, 4, 8], repeat=[0, 1, 2]), measured([4, 1, 2], repeat=[2, 0, 1]))
    assert (found.low, found.high) == pytest.approx((2, 2))


def test_a_repeat_that_only_one_side_finished_is_left_out() -> None:
    found = stats.ratio(measured([2, 4, 100], repeat=[0, 1, 2]), measured([1, 2], repeat=[0, 1]))
    assert (found.value, found.n) == (2.0, 2)


def test_a_slow_minute_that_hits_both_cancels() -> None:
    steady = stats.ratio(measured([2.0, 2.02, 1.98]), measured([1.0, 1.0, 1.0]))
    drifting = stats.ratio(measured([2.0, 4.04, 1.98]), measured([1.0, 2.0, 1.0]))
    assert (drifting.low, drifting.high) == pytest.approx((steady.low, steady.high))


def test_one_repeat_has_a_ratio_without_an_interval() -> None:
    found = stats.ratio(measured([4]), measured([2]))
    assert (found.value, found.n) == (2.0, 1)
    assert math.isnan(found.low)
    assert not found.excludes(1)


def test_two_repeats_never_show_a_difference() -> None:
    assert not stats.ratio(measured([4, 4]), measured([2, 2])).excludes(1)
    assert stats.ratio(measured([4, 4, 4]), measured([2, 2, 2])).excludes(1)


@pytest.mark.parametrize("values", [[0.0, 1.0, 1.0], [-1.0, 1.0, 1.0], []])
def test_values_that_are_not_positive_have_no_ratio(values: list[float]) -> None:
    assert stats.ratio(measured(values), measured([1, 1, 1])).n == 0
    assert stats.ratio(measured([1, 1, 1]), measured(values)).n == 0


@given(pairs(least=1))
def test_the_ratio_the_other_way_round_is_the_inverse(values: list[tuple[float, float]]) -> None:
    a, b = (measured(side) for side in zip(*values, strict=True))
    forth, back = stats.ratio(a, b), stats.ratio(b, a).map(lambda r: 1 / r if r else math.inf)
    for one, other in ((forth.value, back.value), (forth.low, back.low), (forth.high, back.high)):
        assert one == pytest.approx(other, nan_ok=True)


@given(pairs(least=2))
def test_the_interval_of_a_ratio_holds_its_value(values: list[tuple[float, float]]) -> None:
    found = stats.ratio(*(measured(side) for side in zip(*values, strict=True)))
    assert found.low <= found.value <= found.high


@given(pairs(least=2), st.floats(0.01, 100))
def test_a_ratio_does_not_depend_on_the_unit(values: list[tuple[float, float]], scale: float) -> None:
    a, b = zip(*values, strict=True)
    before = stats.ratio(measured(a), measured(b))
    after = stats.ratio(measured([v * scale for v in a]), measured([v * scale for v in b]))
    assert (after.value, after.low, after.high) == pytest.approx((before.value, before.low, before.high))


def test_two_equal_models_are_called_different_about_one_time_in_twenty_and_a_bootstrap_would_one_in_four() -> None:
    rng = np.random.default_rng(0)
    ours, bootstrap, trials = 0, 0, 1000
    for _ in range(trials):
        a, b = np.exp(rng.normal(0, 0.05, (2, 3)))
        ours += stats.ratio(measured(a), measured(b)).excludes(1)
        picks = rng.integers(0, 3, (200, 3))
        low, high = np.quantile(np.median(a[picks], axis=1) / np.median(b[picks], axis=1), (0.025, 0.975))
        bootstrap += bool(low > 1 or high < 1)
    assert ours / trials < 0.07
    assert bootstrap / trials > 0.2


@pytest.mark.parametrize(
    ("freedom", "point"), [(1, 12.706), (2, 4.303), (4, 2.776), (5, 2.571), (9, 2.262), (29, 2.045), (1000, 1.962)]
)
def test_student_s_t_agrees_with_the_printed_table(freedom: int, point: float) -> None:
    assert stats.student_t(freedom) == pytest.approx(point, abs=0.004)


def test_perplexity_weighs_blocks_by_their_tokens() -> None:
    assert stats.perplexity(measured([3 * math.log(2)], weights=[3])) == pytest.approx(2)
    assert stats.perplexity(measured([math.log(2), 3 * math.log(4)], weights=[1, 3])) == pytest.approx(2**1.75)


def test_a_broken_model_has_infinite_perplexity_and_no_crash() -> None:
    assert stats.perplexity(measured([1e6], weights=[1])) == math.inf
    assert stats.perplexity_ratio(measured([1e6] * 3), measured([1.0] * 3)).value == math.inf


def test_a_loss_that_is_the_same_in_every_block_has_an_interval_of_no_width() -> None:
    before, after = measured([5.0, 7.0, 11.0], weights=[2, 2, 2]), measured([5.2, 7.2, 11.2], weights=[2, 2, 2])
    found = stats.perplexity_ratio(after, before)
    assert (found.value, found.low, found.high) == pytest.approx((math.exp(0.1),) * 3)


def test_other_blocks_are_not_compared() -> None:
    assert stats.perplexity_ratio(measured([1.0, 2.0]), measured([1.0])).n == 0
    assert stats.perplexity_ratio(measured([1.0], weights=[2]), measured([1.0], weights=[3])).n == 0
    assert stats.difference(measured([1.0, 0.0]), measured([1.0])).n == 0


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(1).normal(size=30).tolist()
    assert stats.mean(values, seed=5) == stats.mean(values, seed=5)
    assert stats.mean(values, seed=5) != stats.mean(values, seed=6)


def test_resampling_in_parts_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=30).tolist()
    monkeypatch.setattr(stats, "KEPT", 0)
    whole = stats.mean(values)
    monkeypatch.setattr(stats, "AT_ONCE", 100)
    assert stats.mean(values) == whole


@pytest.mark.parametrize("changed", [0.02, 0.5])
def test_a_mean_from_kept_draws_is_that_of_resampling(changed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    values = ((rng.random(400) < changed) * rng.choice([-1.0, 1.0], 400)).tolist()
    kept = stats.mean(values)
    monkeypatch.setattr(stats, "KEPT", 0)
    assert stats.mean(values) == kept, "whether all examples count or only those that changed"


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30))
def test_the_interval_of_a_mean_lies_among_the_values_and_holds_the_mean(values: list[float]) -> None:
    found = stats.mean(values)
    assert found.value == pytest.approx(sum(values) / len(values), abs=1e-9)
    if len(values) > 1:
        assert min(values) - 1e-9 <= found.low <= found.value <= found.high <= max(values) + 1e-9


def test_a_mean_of_a_thousand_draws_is_as_sure_as_the_normal_law_says() -> None:
    found = stats.mean(np.random.default_rng(2).normal(size=1000).tolist())
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(1000), rel=0.1)


def test_nothing_has_no_mean_and_no_share() -> None:
    assert (stats.mean([]).n, stats.share([]).n) == (0, 0)


def test_all_of_three_thousand_right_is_not_certainty() -> None:
    found = stats.share([1.0] * 3000)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.99872, abs=1e-5)


def test_wilson_s_interval_of_none_in_ten() -> None:
    found = stats.share([0.0] * 10)
    assert (found.value, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(0.27753, abs=1e-5)


@given(bits)
def test_a_share_and_its_bounds_are_shares(values: list[float]) -> None:
    found = stats.share(values)
    assert 0 <= found.low <= found.value <= found.high <= 1


@given(bits)
def test_the_share_of_zeros_mirrors_the_share_of_ones(values: list[float]) -> None:
    ones, zeros = stats.share(values), stats.share([1 - v for v in values])
    assert (ones.low, ones.high) == pytest.approx((1 - zeros.high, 1 - zeros.low))


# Many repeats: Wilcoxon's interval


@pytest.mark.parametrize(("n", "rank"), [(8, 3), (10, 8), (12, 13), (20, 52), (25, 89)])
def test_the_signed_rank_is_that_of_the_published_tables(n: int, rank: int) -> None:
    # Two-sided 5 % points of Wilcoxon's statistic, as every table of it has them.
    assert stats._signed_rank(n, 0.95) == rank


def test_an_interval_of_many_repeats_is_of_walsh_averages() -> None:
    low, high = stats.paired_interval([1.0, 2, 3, 4, 5, 6, 7, 8])
    assert (low, high) == (2.0, 7.0), "the fourth of 1, 1.5, 2, 2, 2.5 … from either end"


def test_one_stall_among_many_repeats_hardly_widens_the_interval() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.05, 0.01, 12)
    quiet = stats.half_width(values.tolist())
    values[3] = 1.1
    assert stats.half_width(values.tolist()) < 2 * quiet
    assert stats.half_width([0.1, 0.2]) == math.inf


@pytest.mark.parametrize("n", [5, 8, 15, 30])
def test_the_interval_misses_the_truth_at_most_about_one_time_in_twenty_even_of_heavy_tails(n: int) -> None:
    rng = np.random.default_rng(n)
    missed = sum(
        not low <= 0 <= high for low, high in (stats.paired_interval(rng.standard_t(2, n)) for _ in range(2000))
    )
    assert missed / 2000 < 0.065


# Runs that do not pair up


def test_welchs_interval_worked_by_hand() -> None:
    # Logarithms 0, 1, 2 and 0, 0, 0: their difference is 1, its standard error 1/√3, with two degrees of freedom.
    found = stats.unpaired_ratio(measured([1, math.e, math.e**2]), measured([1, 1, 1]))
    assert (found.value, found.n) == (pytest.approx(math.e), 3)
    assert math.log(found.high) == pytest.approx(1 + 4.303 / math.sqrt(3))


def test_unpaired_runs_of_one_truth_rarely_differ() -> None:
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(500):
        a, b = (measured(np.exp(rng.normal(0, spread, n)).tolist()) for spread, n in ((0.05, 5), (0.01, 9)))
        alarms += stats.unpaired_ratio(a, b).excludes(1)
    assert alarms / 500 < 0.08


# Answers that changed sides


def test_mcnemar_worked_by_hand() -> None:
    before, after = [1, 1, 1, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0, 1]
    lost, gained, p = stats.mcnemar(before, after)
    assert (lost, gained, p) == (5, 1, pytest.approx(2 * (1 + 6) / 64))
    assert stats.mcnemar([1, 0], [1, 0]) == (0, 0, 1.0)
    assert stats.mcnemar([1, 0], [0, 1])[2] == 1.0


def test_mcnemar_does_not_overflow_on_a_ruined_model() -> None:
    assert stats.mcnemar([1] * 5000, [0] * 5000)[2] == 0.0
