"""Examples in flat arrays, and the order of batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squeeze.training.examples import POOL, Examples, batches_of_epoch, by_length


def of(rows: list[list[int]], **more: object) -> Examples:
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Examples(np.array([t for row in rows for t in row], np.int32), starts, None, None, 9, **more)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=400), batch=st.integers(1, 9), seed=st.integers(0, 99),
    epoch=st.integers(0, 9),
)  # fmt: skip
def test_an_epoch_meets_every_example_once(lengths: list[int], batch: int, seed: int, epoch: int) -> None:
    given_lengths = np.array(lengths, np.int64)
    found = batches_of_epoch(given_lengths, batch, seed, epoch)
    assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths)))
    assert len(found) == -(-len(lengths) // batch)  # the engine counts on it
    assert sum(len(part) < batch for part in found) <= 1
    again = batches_of_epoch(given_lengths.copy(), batch, seed, epoch)
    assert [part.tolist() for part in found] == [part.tolist() for part in again]
    assert sorted(np.concatenate(list(by_length(given_lengths, batch))).tolist()) == list(range(len(lengths)))


def test_epochs_and_seeds_differ() -> None:
    lengths = np.ones(300, np.int64)
    orders = {
        tuple(np.concatenate(batches_of_epoch(lengths, 8, seed, epoch))) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9
    assert tuple(range(300)) not in orders


def padding(lengths: np.ndarray, groups: list[np.ndarray]) -> float:
    """Share of the padded positions that hold no token."""
    padded = sum(len(group) * int(lengths[group].max()) for group in groups)
    return 1 - int(lengths.sum()) / padded


def test_little_padding_and_batches_of_all_lengths_mixed() -> None:
    """Texts of log-normal length: batches at random are padded by half, these by less than a tenth."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(3.2, 0.7, 20_000), 2, 256).astype(np.int64)
    found = batches_of_epoch(lengths, 32, 0, 0)
    assert padding(lengths, found) < 0.1
    plain = random.permutation(len(lengths))
    assert padding(lengths, [plain[i : i + 32] for i in range(0, len(plain), 32)]) > 0.4
    means = np.array([lengths[group].mean() for group in found])
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.1  # short ones do not come first
    first = [set(batches_of_epoch(lengths, 32, 0, epoch)[0].tolist()) for epoch in range(2)]
    assert first[0] != first[1]
    assert len(lengths) > POOL * 32


def test_a_batch_is_padded_on_the_right() -> None:
    examples = of([[1, 2, 3], [4], [5, 6]])
    found = examples.batch([1, 0])
    assert found["input_ids"].tolist() == [[4, 9, 9], [1, 2, 3]]
    assert found["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert found["index"].tolist() == [1, 0]
    assert "labels" not in found
    assert "token_type_ids" not in found


def test_examples_taken_alone_are_numbered_anew() -> None:
    examples = Examples(
        np.arange(6, dtype=np.int32), np.array([0, 3, 4, 6]), np.array([0, 0, 1, 0, 1, 1], np.int8), np.array([7, 8, 9]), 0,
        ("a", "b", "c"),
    )  # fmt: skip
    found = examples.take(np.array([2, 0]))
    assert (found.tokens.tolist(), found.starts.tolist()) == ([4, 5, 0, 1, 2], [0, 2, 5])
    assert found.labels is not None
    assert (found.labels.tolist(), found.texts) == ([9, 7], ("c", "a"))
    assert found.batch([1])["token_type_ids"].tolist() == [[0, 0, 1]]
    assert found.digest != examples.digest
    assert examples.take(np.arange(3)).digest == examples.digest
    nothing = examples.take(np.arange(0))
    assert len(nothing) == 0
    assert nothing.tokens.size == 0


@pytest.mark.parametrize("change", ["tokens", "starts", "labels"])
def test_a_digest_sees_every_part(change: str) -> None:
    from dataclasses import replace

    one = Examples(np.arange(4, dtype=np.int32), np.array([0, 2, 4]), None, np.array([0, 1]), 0)
    other = {"tokens": np.array([0, 1, 2, 4], np.int32), "starts": np.array([0, 3, 4]), "labels": np.array([0, 0])}
    assert one.digest != replace(one, **{change: other[change]}).digest  # type: ignore[arg-type]
