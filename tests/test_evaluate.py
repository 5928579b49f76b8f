"""Scores worked by hand, and outputs that stay with their examples whatever order they were computed in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from squeeze.errors import BenchError
from squeeze.evaluate import (
    Outputs,
    Quality,
    divergence,
    embed,
    evaluate,
    log_probabilities,
    negative_log_likelihood,
    probes,
    quality,
)
from squeeze.runtimes import Batch, Generation, open_session

VOCABULARY = 11


class Answers:
    """A session that answers by a function of the token numbers, so that every score can be worked by hand."""

    runtime, device, threads = "by hand", "cpu", 1

    def __init__(self, answer: Callable[[NDArray[np.int64]], NDArray[np.float32]]) -> None:
        self.answer = answer
        self.seen: list[set[str]] = []

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        self.seen.append(set(batch))
        return self.answer(batch["input_ids"])

    def generate(self, input_ids: NDArray[np.int64], new_tokens: int) -> Generation:
        raise NotImplementedError

    def close(self) -> None:
        pass


def batch_of(ids: Any, index: list[int], mask: Any = None) -> dict[str, NDArray[np.int64]]:
    ids = np.array(ids, np.int64)
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids) if mask is None else np.array(mask, np.int64),
        "index": np.array(index),
    }


# Negative log-likelihood


def random_logits(length: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(2, length, VOCABULARY)).astype(np.float32)
    return logits, rng.integers(0, VOCABULARY, (2, length))


@pytest.mark.parametrize("length", [2, 3, 128, 129, 130, 300])
def test_negative_log_likelihood_is_torchs_cross_entropy_summed_over_each_block(length: int) -> None:
    logits, ids = random_logits(length)
    expected = [
        torch.nn.functional.cross_entropy(
            torch.from_numpy(row[:-1]).double(), torch.from_numpy(wanted[1:]), reduction="sum"
        )
        for row, wanted in zip(logits, ids, strict=True)
    ]
    assert negative_log_likelihood(logits, ids).sum(axis=1) == pytest.approx([float(e) for e in expected], rel=1e-12)


def test_a_model_that_knows_nothing_pays_log_of_the_vocabulary_for_each_token() -> None:
    logits = np.zeros((2, 3, 4), np.float32)
    ids = np.array([[0, 1, 2], [3, 3, 3]])
    assert negative_log_likelihood(logits, ids) == pytest.approx(np.full((2, 2), np.log(4)), rel=1e-15)


def test_two_tokens_worked_by_hand() -> None:
    logits = np.log(np.array([[[1, 3], [3, 1], [9, 1]]], np.float32))
    ids = np.array(
        [[0, 1, 0]]
    )  # p(1) = 3/4 after the first token, p(0) = 3/4 after the second; the last row predicts nothing
    assert negative_log_likelihood(logits, ids) == pytest.approx(np.full((1, 2), -np.log(0.75)), rel=1e-6)


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[[1000, 0], [0, 0]]], np.float32)
    assert negative_log_likelihood(logits, np.array([[0, 0]])).tolist() == [[0.0]]
    assert negative_log_likelihood(logits, np.array([[0, 1]])).tolist() == [[1000.0]]


# Embeddings


def test_an_embedding_is_the_mean_of_the_unpadded_states_at_length_one() -> None:
    states = np.array([[[3, 0], [3, 8], [9, 9]], [[0, 2], [7, 7], [7, 7]]], np.float32)
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    assert embed(states, mask) == pytest.approx(np.array([[0.6, 0.8], [0, 1]]), abs=1e-15)


def test_a_text_of_padding_alone_has_a_zero_embedding_and_not_nan() -> None:
    assert embed(np.ones((1, 2, 3), np.float32), np.zeros((1, 2), np.int64)).tolist() == [[0, 0, 0]]


# Evaluating a session


def test_outputs_come_back_in_the_order_of_the_split() -> None:
    session = Answers(lambda ids: np.stack([ids[:, 0], -ids[:, 0]], axis=1).astype(np.float32))
    given = [batch_of([[30, 1], [10, 1]], [3, 1]), batch_of([[20], [0]], [2, 0])]
    outputs = evaluate(session, "text-classification", given)
    assert outputs.values.tolist() == [[0, 0], [10, -10], [20, -20], [30, -30]]
    assert outputs.choices is None


def test_the_index_is_not_an_input_of_the_model() -> None:
    session = Answers(lambda ids: np.zeros((len(ids), 2), np.float32))
    evaluate(session, "text-classification", [batch_of([[1]], [0])])
    assert session.seen == [{"input_ids", "attention_mask"}]


def test_embeddings_are_pooled_by_the_mask_of_their_own_batch() -> None:
    session = Answers(lambda ids: np.eye(4, dtype=np.float32)[ids])
    given = [batch_of([[0, 3]], [1], mask=[[1, 0]]), batch_of([[2]], [0])]
    outputs = evaluate(session, "feature-extraction", given)
    assert outputs.values.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]


def test_each_predicted_token_of_a_block_has_its_likelihood_and_the_likeliest_in_its_place() -> None:
    table = np.log(np.array([[1, 2, 1], [1, 1, 6], [2, 1, 1]], np.float32))
    session = Answers(lambda ids: table[ids])
    outputs = evaluate(session, "causal-lm", [batch_of([[1, 2, 0]], [1]), batch_of([[0, 1, 1]], [0])])
    expected = -np.log([[2 / 4, 1 / 8], [6 / 8, 2 / 4]])
    assert outputs.values == pytest.approx(expected, rel=1e-6)
    assert outputs.choices is not None
    assert outputs.choices.tolist() == [[1, 2], [2, 0]]
    assert outputs.divergence is None


# Divergence from the source


def test_the_divergence_of_two_coins_worked_by_hand() -> None:
    fair, lopsided = np.log([[0.5, 0.5]]), np.log([[0.75, 0.25]])
    assert divergence(fair, lopsided) == pytest.approx([0.5 * np.log(2 / 3) + 0.5 * np.log(2)], rel=1e-12)
    assert divergence(fair, fair).tolist() == [0]


def test_log_probabilities_are_torchs_log_softmax_even_of_large_logits() -> None:
    logits = np.random.default_rng(0).normal(scale=300, size=(3, 7)).astype(np.float32)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), dim=-1).numpy()
    assert log_probabilities(logits) == pytest.approx(expected, rel=1e-12)


def test_probes_are_spread_over_what_a_block_predicts() -> None:
    assert probes(9, 3).tolist() == [0, 4, 7]
    assert probes(3, 100).tolist() == [0, 1]
    assert probes(512, 51)[-1] == 510


def test_the_source_leaves_its_distributions_and_another_model_is_compared_with_them(tmp_path: Path) -> None:
    file = tmp_path / "reference.npy"
    given = [batch_of([[1, 2, 0]], [1]), batch_of([[0, 1, 1]], [0])]
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(3, 3)).astype(np.float32) for _ in range(2)]
    first, second = (Answers(lambda ids, table=table: table[ids]) for table in tables)  # type: ignore[misc]
    assert evaluate(first, "causal-lm", given, reference=file, is_reference=True).divergence is None
    same = evaluate(first, "causal-lm", given, reference=file).divergence
    assert same is not None
    assert np.abs(same).max() < 1e-6
    other = evaluate(second, "causal-lm", given, reference=file).divergence
    logs = [log_probabilities(table) for table in tables]
    expected = divergence(logs[0], logs[1])
    assert other == pytest.approx(np.array([[expected[0], expected[1]], [expected[1], expected[2]]]), rel=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_not_numbers_are_an_error_that_names_the_example(value: float) -> None:
    session = Answers(lambda ids: np.full((len(ids), 2), value if ids[0, 0] == 9 else 0, np.float32))
    given = [batch_of([[1]], [5]), batch_of([[9], [1]], [7, 6])]
    with pytest.raises(
        BenchError, match=r"^the model answers NaN or infinity to example 7; no figure about it means anything\.$"
    ):
        evaluate(session, "text-classification", given)


def test_a_real_model_answers_alike_in_any_order(tiny_bert_folder: Path) -> None:
    session = open_session(tiny_bert_folder, "torch", threads=torch.get_num_threads())
    ids = np.random.default_rng(0).integers(4, 200, (6, 9))
    straight = evaluate(session, "text-classification", [batch_of(ids, list(range(6)))])
    order = [4, 2, 5, 0, 3, 1]
    shuffled = evaluate(session, "text-classification", [batch_of(ids[[n]], [n]) for n in order])
    assert shuffled.values == pytest.approx(straight.values, abs=1e-5)
    assert len(np.unique(straight.values.round(3), axis=0)) == 6


# Outputs on disk


@pytest.mark.parametrize("choices", [None, np.array([[3], [4]])])
def test_saved_outputs_are_read_back_exactly(choices: NDArray[np.int64] | None, tmp_path: Path) -> None:
    outputs = Outputs("causal-lm", np.array([[1.1], [2.2]]), choices)
    outputs.save(tmp_path / "outputs.npz")
    back = Outputs.load(tmp_path / "outputs.npz", "causal-lm")
    assert (back.task, back.values.tolist(), back.divergence) == ("causal-lm", [[1.1], [2.2]], None)
    assert (None if back.choices is None else back.choices.tolist()) == (None if choices is None else [[3], [4]])


# Quality


def classified(*rows: tuple[float, float]) -> Outputs:
    return Outputs("text-classification", np.array(rows))


def by_quantity(rows: list[Quality]) -> dict[str, Quality]:
    assert len({row.quantity for row in rows}) == len(rows)
    return {row.quantity: row for row in rows}


def test_a_classifier_is_compared_with_labels_and_with_the_source_example_by_example() -> None:
    reference = classified((3, 0), (0, 4), (0, 0.5))
    rows = by_quantity(quality(classified((3, 0), (4, 0), (0, 0.5)), [0, 1, 0], reference))
    assert list(rows) == ["correct", "answer", "same_answer", "kl_to_source", "logit_error"]
    assert rows["correct"].values == (1, 0, 0)
    assert rows["answer"].values == (0, 0, 1)
    assert rows["same_answer"].values == (1, 0, 1)
    expected = np.sqrt(16 + 16) / np.sqrt(9 + 16 + 0.25)
    assert rows["logit_error"].values == pytest.approx((expected,), rel=1e-15)
    assert all(type(value) is float for row in rows.values() for value in row.values)


def test_equal_logits_have_no_error() -> None:
    rows = by_quantity(quality(classified((1, 2)), None, classified((1, 2))))
    assert (rows["same_answer"].values, rows["logit_error"].values) == ((1,), (0,))


def test_a_reference_of_zeros_gives_a_finite_error() -> None:
    rows = by_quantity(quality(classified((0, 0)), None, classified((0, 0))))
    assert rows["logit_error"].values == (0,)


def test_without_labels_or_reference_only_the_answers_are_left() -> None:
    assert quality(classified((1, 2), (2, 1)), None, None) == [Quality("answer", "", (1, 0))]


def test_perplexity_weighs_each_block_by_the_tokens_that_it_predicts() -> None:
    logits, ids = random_logits(3)
    outputs = evaluate(Answers(lambda _: logits), "causal-lm", [batch_of(ids, [0, 1])])
    row, each = quality(outputs, None, reference=None)
    assert (row.quantity, row.unit, row.weights) == ("negative_log_likelihood", "nats", (2, 2))
    assert (each.quantity, len(each.values)) == ("token_log_likelihood", 4)
    assert sum(each.values) == pytest.approx(-sum(row.values), rel=1e-6)
    assert row.weights is not None
    wanted = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[:, :-1]).double().flatten(0, 1), torch.from_numpy(ids[:, 1:]).flatten()
    )
    assert np.exp(sum(row.values) / sum(row.weights)) == pytest.approx(float(wanted.exp()), rel=1e-12)


def test_a_language_model_is_compared_with_the_source_token_by_token() -> None:
    values = np.array([[1.0, 2.0], [3.0, 4.0]])
    source = Outputs("causal-lm", values, np.array([[5, 6], [7, 8]]))
    result = Outputs("causal-lm", values, np.array([[5, 0], [7, 8]]), np.array([[0.0, 0.5]]))
    rows = by_quantity(quality(result, None, source))
    assert rows["same_answer"].values == (1, 0, 1, 1)
    assert rows["kl_to_source"].values == (0, 0.5)


def test_embeddings_are_compared_with_the_source_by_their_cosine_and_alone_have_no_quality() -> None:
    outputs = Outputs("feature-extraction", np.array([[0.6, 0.8], [1.0, 0.0]]))
    reference = Outputs("feature-extraction", np.array([[0.6, 0.8], [0.0, 1.0]]))
    (row,) = quality(outputs, None, reference)
    assert (row.quantity, row.values) == ("cosine_to_source", (pytest.approx(1, abs=1e-15), 0))
    assert quality(outputs, None, None) == []
