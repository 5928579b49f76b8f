"""Data: splits that share nothing and come out the same every time, and batches that can be put back in order."""

import dataclasses
import json
import runpy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from squeeze import data as module
from squeeze.data import Data, DataSettings, Split, Splits, batches, check_disjoint, check_fits, load_data
from squeeze.errors import DataError
from squeeze.recipe import read_recipe
from squeeze.rows import Columns, asset_path, read_rows

ROOT = Path(__file__).parents[1]
HELD_OUT_TWEETS = "sha256:b2b3dd04fd90135766acdc5c3b4b323b607d474c5b854976f7a4bbd8d1a5b321"


@pytest.fixture(scope="module")
def tokenizer(tiny_bert_folder: Path) -> Any:
    """Frames each text as [CLS] … [SEP] and gives token types."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_bert_folder)


def given_data(path: Path, **changes: Any) -> DataSettings:
    return DataSettings.model_validate({"path": str(path), "splits": {"evaluate": 2}, "label_column": "mood"} | changes)


def write_labelled(path: Path, rows: Iterable[tuple[str, Any]]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "mood": mood}) + "\n" for text, mood in rows), "utf-8")
    return path


def every_text(data: Data) -> list[str]:
    return [text for split in data.splits.values() for text in split.texts or ()]


@pytest.fixture
def moods(tmp_path: Path) -> Path:
    """Ten different texts, labelled in turn 0, 1 and 2."""
    return write_labelled(tmp_path / "moods.jsonl", [(f"text number {n}", n % 3) for n in range(10)])


# Settings


def test_an_asset_brings_its_own_columns_and_labels_and_they_are_recorded() -> None:
    tweets = DataSettings(path="asset:tweets", splits=Splits(evaluate=3000))
    assert (tweets.label_column, tweets.encoding) == ("sentiment", "latin-1")
    assert tweets.labels == {"negative": 0, "neutral": 1, "positive": 2}
    assert DataSettings.model_validate(tweets.model_dump(mode="json")) == tweets


def test_what_a_recipe_says_overrides_the_asset() -> None:
    labels = {"negative": 0, "neutral": 0, "positive": 1}
    assert DataSettings(path="asset:tweets", splits=Splits(evaluate=1), labels=labels).labels == labels


@pytest.mark.parametrize(
    "splits",
    [{"evaluate": 0}, {"evaluate": 1, "calibration": -1}, {"evaluate": 1, "train": "most"}, {"evaluate": 1, "x": 1}],
)
def test_splits_that_cannot_be_are_refused(splits: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Splits.model_validate(splits)


# Splits


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 30),
    evaluate=st.integers(1, 10),
    calibration=st.integers(0, 10),
    train=st.integers(0, 10) | st.just("rest"),
    seed=st.integers(0, 2**32),
)
def test_splits_are_disjoint_have_the_sizes_asked_for_and_hold_out_the_same(
    count: int, evaluate: int, calibration: int, train: Any, seed: int, tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(f"line {n}" for n in range(count)))
    asked = Splits(evaluate=evaluate, calibration=calibration, train=train)
    if count < evaluate + calibration + (1 if train == "rest" else train):
        with pytest.raises(DataError, match=f"gives {count} texts, but data.splits asks for evaluate {evaluate}"):
            load_data(DataSettings(path=str(file), splits=asked), "feature-extraction", tokenizer, seed)
        return
    data = load_data(DataSettings(path=str(file), splits=asked), "feature-extraction", tokenizer, seed)
    sizes = {"evaluate": evaluate, "calibration": calibration, "train": train}
    if train == "rest":
        sizes["train"] = count - evaluate - calibration
    assert {name: len(split) for name, split in data.splits.items()} == {name: n for name, n in sizes.items() if n}
    assert len(set(every_text(data))) == len(every_text(data)) == sum(sizes.values())
    alone = load_data(
        DataSettings(path=str(file), splits=Splits(evaluate=evaluate)), "feature-extraction", tokenizer, seed
    )
    assert alone.split("evaluate") == data.split("evaluate")


def test_one_seed_gives_one_digest_and_another_seed_another(moods: Path, tokenizer: Any) -> None:
    def digests(seed: int, own_seed: int | None = None) -> dict[str, str]:
        return load_data(given_data(moods, seed=own_seed), "text-classification", tokenizer, seed).digests

    assert digests(1) == digests(1) == digests(0, own_seed=1)
    assert digests(1) != digests(2)


def test_a_digest_follows_labels_and_texts(tmp_path: Path, tokenizer: Any) -> None:
    def digest(rows: list[tuple[str, int]]) -> str:
        file = write_labelled(tmp_path / "x.jsonl", rows)
        return load_data(given_data(file), "text-classification", tokenizer, 0).split("evaluate").digest

    found = [digest([("a", 0), ("b", 1)]), digest([("a", 0), ("b", 0)]), digest([("a", 0), ("c", 1)])]
    assert len(set(found)) == 3


def test_repeated_and_blank_texts_are_dropped_counted_and_the_first_label_stands(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [("a", 0), (" ", 1), ("b", 1), ("a", 0), ("a", 2), ("", 0)]
    data = load_data(given_data(write_labelled(tmp_path / "x.jsonl", rows)), "text-classification", tokenizer, 0)
    split = data.split("evaluate")
    assert dict(zip(split.texts or (), split.labels or (), strict=True)) == {"a": 0, "b": 1}
    assert data.notes == (
        "2 of 6 texts are blank and were dropped",
        "2 of 6 texts repeat an earlier one (1 of them with another label) and were dropped",
    )


def test_texts_that_will_be_cut_off_are_counted_by_split(tmp_path: Path, tokenizer: Any) -> None:
    rows = [("short", 0), ("a long text that has far more than ten tokens", 1)]
    file = write_labelled(tmp_path / "x.jsonl", rows)
    data = load_data(given_data(file, max_length=10), "text-classification", tokenizer, 0)
    assert data.split("evaluate").truncated == 1
    assert data.notes == ("1 of 2 evaluate texts are cut off at 10 tokens",)


def test_splits_that_share_an_example_are_refused() -> None:
    first = Split("evaluate", ("a", "b", "c"), None, None, "sha256:1")
    with pytest.raises(DataError, match="of 2 train examples, 1 in evaluate stand too"):
        check_disjoint([first, Split("train", ("d", "b"), None, None, "sha256:2")])
    blocks = np.arange(8, dtype=np.int64).reshape(2, 4)
    with pytest.raises(DataError, match="of 1 calibration examples, 1 in evaluate stand too"):
        check_disjoint(
            [
                Split("evaluate", None, None, blocks, "sha256:1"),
                Split("calibration", None, None, blocks[1:], "sha256:2"),
            ]
        )


def test_an_absent_split_names_the_setting_that_fills_it(moods: Path, tokenizer: Any) -> None:
    data = load_data(given_data(moods), "text-classification", tokenizer, 0)
    with pytest.raises(DataError, match=r"moods.jsonl is empty. Set data.splits.calibration to its size"):
        data.split("calibration")
    with pytest.raises(DataError, match=r"no split named 'eval'. Did you mean 'evaluate'\?"):
        data.split("eval")


def test_a_model_without_a_tokenizer_is_refused(moods: Path) -> None:
    with pytest.raises(DataError, match=r"the model has no tokenizer for the texts of .*Put tokenizer.json beside"):
        load_data(given_data(moods), "causal-lm", None, 0)


# Labels


def test_labels_are_numbered_by_the_mapping(tmp_path: Path, tokenizer: Any) -> None:
    file = write_labelled(tmp_path / "x.jsonl", [("a", "bad"), ("b", " good ")])
    data = load_data(given_data(file, labels={"good": 1, "bad": 0}), "text-classification", tokenizer, 0)
    split = data.split("evaluate")
    assert dict(zip(split.texts or (), split.labels or (), strict=True)) == {"a": 0, "b": 1}
    assert data.labels == {"good": 1, "bad": 0}


def test_labels_that_are_class_numbers_need_no_mapping(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "x.csv").write_text("mood,text\n1,a\n0,b\n")
    written = write_labelled(tmp_path / "x.jsonl", [("a", 1), ("b", 0)])
    first, second = (
        load_data(given_data(file), "text-classification", tokenizer, 0) for file in (tmp_path / "x.csv", written)
    )
    assert first.labels == second.labels == {"0": 0, "1": 1}
    assert first.digests == second.digests


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (
            None,
            "line 2: label 'fair' has no class number. Known: 0 0; rows in the data: 0 1, fair 1. Number the labels",
        ),
        ({"0": 0, "good": 1}, "Known: 0 0, good 1; rows in the data: 0 1, fair 1. Add it to data.labels"),
    ],
)
def test_a_label_without_a_number_is_named_with_all_labels_seen(
    labels: dict[str, int] | None, says: str, tmp_path: Path, tokenizer: Any
) -> None:
    file = write_labelled(tmp_path / "x.jsonl", [("a", 0), ("b", "fair")])
    with pytest.raises(DataError) as raised:
        load_data(given_data(file, labels=labels), "text-classification", tokenizer, 0)
    assert says in str(raised.value)


def test_many_labels_are_not_all_listed(tmp_path: Path, tokenizer: Any) -> None:
    file = write_labelled(tmp_path / "x.jsonl", [(f"text {n}", f"label {n}") for n in range(20)])
    with pytest.raises(DataError, match=r"Known: none; rows in the data: label 0 1, .*label 11 1, …\."):
        load_data(given_data(file), "text-classification", tokenizer, 0)


def test_classification_without_a_label_column_is_refused(moods: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"Set data.label_column to the column of .*moods.jsonl"):
        load_data(given_data(moods, label_column=None), "text-classification", tokenizer, 0)


def test_embeddings_need_no_labels_even_where_there_are_some(moods: Path, tokenizer: Any) -> None:
    data = load_data(given_data(moods), "feature-extraction", tokenizer, 0)
    assert data.labels is data.split("evaluate").labels is None


# Fit to the model


@pytest.fixture
def classified(moods: Path, tokenizer: Any) -> Data:
    """Labels named negative, neutral and positive by number."""
    data = load_data(given_data(moods), "text-classification", tokenizer, 0)
    return dataclasses.replace(data, labels={"negative": 0, "neutral": 1, "positive": 2})


@pytest.mark.parametrize(
    "names", [("negative", "neutral", "positive"), ("LABEL_0", "LABEL_1", "LABEL_2"), ("a", "b", "c", "d"), ()]
)
def test_a_head_with_the_same_or_with_nameless_classes_fits(names: tuple[str, ...], classified: Data) -> None:
    check_fits(classified, {"id2label": {str(n): name for n, name in enumerate(names)}})


def test_a_head_with_too_few_classes_does_not_fit(classified: Data) -> None:
    with pytest.raises(DataError, match="negative 0, neutral 1, positive 2, but the model's head knows 2: no 0, yes 1"):
        check_fits(classified, {"id2label": {"0": "no", "1": "yes"}})


def test_a_head_with_the_same_classes_in_another_order_does_not_fit(classified: Data) -> None:
    with pytest.raises(DataError, match="but the model was trained with positive 0, neutral 1, negative 2"):
        check_fits(classified, {"id2label": {"0": "positive", "1": "neutral", "2": "negative"}})


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions"])
def test_texts_longer_than_the_position_table_do_not_fit(name: str, classified: Data) -> None:
    check_fits(classified, {name: 128})
    with pytest.raises(DataError, match=r"data.max_length = 128 tokens, but the model has 64 positions"):
        check_fits(classified, {name: 64})
    prose = dataclasses.replace(classified, task="causal-lm", labels=None)
    with pytest.raises(DataError, match=r"data.block_size = 512 tokens, but the model has 128 positions"):
        check_fits(prose, {name: 128})


# Prose


def test_prose_is_tokenised_whole_without_special_tokens_and_cut_into_blocks(tmp_path: Path, tokenizer: Any) -> None:
    text = "\n".join(f"Line {n} says {n * n}.\n" for n in range(40))
    (tmp_path / "prose.txt").write_text(text)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    count = len(tokens) // 16
    asked = given_data(tmp_path / "prose.txt", block_size=16, splits={"evaluate": 3, "train": "rest"})
    data = load_data(asked, "causal-lm", tokenizer, 0)
    found = np.concatenate([split.blocks for split in data.splits.values() if split.blocks is not None])
    expected = np.array(tokens[: count * 16]).reshape(count, 16)
    assert found.dtype == np.int64
    assert sorted(found.tolist()) == sorted(expected.tolist())
    assert len(data.split("evaluate")) == 3


def test_pieces_put_together_are_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 10)
    texts = [f"line {n}" for n in range(9)]
    pieces = list(module._pieces(texts, "\n"))
    assert "".join(pieces) == "\n".join(texts)
    assert len(pieces) == 5
    assert list(module._pieces([], "\n")) == []


def test_rows_of_prose_are_joined_by_a_blank_line(tmp_path: Path, tokenizer: Any) -> None:
    texts = ["The cat sat on the mat.", "It looked at the rain.", "The cat sat on the mat."]
    file = write_labelled(tmp_path / "x.jsonl", [(text, 0) for text in texts])
    tokens = tokenizer("\n\n".join(texts[:2]), add_special_tokens=False)["input_ids"]
    asked = given_data(file, block_size=len(tokens), splits={"evaluate": 1})
    data = load_data(asked, "causal-lm", tokenizer, 0)
    blocks = data.split("evaluate").blocks
    assert blocks is not None
    assert blocks.tolist() == [tokens]
    assert data.notes == ("1 of 3 texts repeat an earlier one and were dropped",)


def test_a_block_that_repeats_another_is_dropped_so_that_splits_cannot_share_it(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "x.txt").write_text("\n".join(["x"] * 400))
    asked = given_data(tmp_path / "x.txt", block_size=4)
    data = load_data(asked, "causal-lm", tokenizer, 0)
    assert data.notes == ("198 of 200 token blocks repeat an earlier one and were dropped",)
    with pytest.raises(DataError, match=r"x.txt gives 2 blocks of 4 tokens, but data.splits asks for evaluate 3"):
        load_data(asked.model_copy(update={"splits": Splits(evaluate=3)}), "causal-lm", tokenizer, 0)


def test_too_little_prose_is_answered_with_counts(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "x.txt").write_text("Too little.")
    with pytest.raises(
        DataError, match=r"gives 0 blocks of 512 tokens, but data.splits asks for evaluate 2, calibration 0"
    ):
        load_data(given_data(tmp_path / "x.txt"), "causal-lm", tokenizer, 0)


# Batches


def texts_split(*texts: str) -> Split:
    return Split("evaluate", texts, None, None, "sha256:0")


def test_sorted_batches_begin_with_the_longest_and_index_restores_the_order(tokenizer: Any) -> None:
    texts = ("a", "a long text about rain", "b", "one more text", "c")
    found = batches(texts_split(*texts), tokenizer, "feature-extraction", batch=2, max_length=64)
    assert [len(batch["index"]) for batch in found] == [2, 2, 1]
    lengths = np.concatenate([batch["attention_mask"].sum(axis=1) for batch in found])
    assert (np.diff(lengths) <= 0).all()
    tokens: dict[int, list[int]] = {}
    for batch in found:
        assert set(batch) == {"index", "input_ids", "attention_mask", "token_type_ids"}
        assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
        assert batch["attention_mask"].sum(axis=1).max() == batch["input_ids"].shape[1]
        assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
        for number, row, mask in zip(batch["index"], batch["input_ids"], batch["attention_mask"], strict=True):
            tokens[int(number)] = row[mask == 1].tolist()
    assert [tokens[n] for n in range(5)] == tokenizer(list(texts))["input_ids"]


def test_given_batches_keep_the_order(tokenizer: Any) -> None:
    split = texts_split("a", "a long text about rain", "b")
    found = batches(split, tokenizer, "feature-extraction", batch=2, max_length=64, order="given")
    assert [batch["index"].tolist() for batch in found] == [[0, 1], [2]]


def test_batches_cut_off_at_max_length(tokenizer: Any) -> None:
    split = texts_split("a long text about the rain in the street")
    [batch] = batches(split, tokenizer, "feature-extraction", batch=8, max_length=5)
    assert batch["input_ids"].shape == (1, 5)


def test_block_batches_have_no_padding_and_keep_the_order() -> None:
    blocks = np.arange(12, dtype=np.int64).reshape(3, 4)
    split = Split("evaluate", None, None, blocks, "sha256:0")
    found = batches(split, None, "causal-lm", batch=2, max_length=1)
    assert [batch["index"].tolist() for batch in found] == [[0, 1], [2]]
    assert np.array_equal(np.concatenate([batch["input_ids"] for batch in found]), blocks)
    assert all((batch["attention_mask"] == 1).all() for batch in found)


def test_batches_of_nothing_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="a batch of 0 examples"):
        batches(texts_split("a"), tokenizer, "feature-extraction", batch=0, max_length=8)
    assert batches(texts_split(), tokenizer, "feature-extraction", batch=4, max_length=8) == []


def test_a_text_of_no_tokens_is_named(tiny_llama_folder: Path) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(tiny_llama_folder)
    assert plain("")["input_ids"] == []
    with pytest.raises(DataError, match=r"makes no token of '' \(evaluate split\)"):
        batches(texts_split("a", ""), plain, "feature-extraction", batch=4, max_length=8)


def test_a_split_of_the_other_kind_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"holds texts, not blocks of tokens. Load it with task causal-lm"):
        batches(texts_split("a"), tokenizer, "causal-lm", batch=1, max_length=8)
    blocks = Split("train", None, None, np.zeros((1, 4), dtype=np.int64), "sha256:0")
    with pytest.raises(DataError, match=r"holds blocks of tokens, not texts. Load it with task text-classification"):
        batches(blocks, tokenizer, "text-classification", batch=1, max_length=8)


# The real data


@pytest.fixture(scope="module")
def tweets() -> Data:
    """As the sentiment recipe splits them."""
    from transformers import AutoTokenizer

    recipe = read_recipe(ROOT / "recipes" / "sentiment-int8.yaml")
    minilm = AutoTokenizer.from_pretrained(asset_path("asset:minilm-l6-v2"))
    return load_data(recipe.data, recipe.task, minilm, recipe.seed)


def test_the_held_out_tweets_are_the_same_3000_on_every_machine(tweets: Data) -> None:
    assert tweets.digests["evaluate"] == HELD_OUT_TWEETS
    assert {name: len(split) for name, split in tweets.splits.items()} == {
        "evaluate": 3000,
        "calibration": 300,
        "train": 33943,
    }
    assert tweets.notes[0] == (
        "915 of 38158 texts repeat an earlier one (456 of them with another label) and were dropped"
    )


def test_every_tweet_of_the_source_is_in_one_split(tweets: Data) -> None:
    source = {row.text for row in read_rows(tweets.settings.path, Columns(encoding="latin-1"))}
    assert source == set(every_text(tweets))


def test_the_classifier_is_trained_with_the_data_section_of_its_recipe() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "finetune_sentiment.py"))
    recipe = read_recipe(ROOT / "recipes" / "sentiment-int8.yaml")
    assert script["DATA"] == recipe.data.model_copy(update={"seed": recipe.seed})


def test_the_lstm_was_trained_on_no_block_that_its_recipe_scores() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "train_lstm.py"))
    recipe = read_recipe(ROOT / "recipes" / "lstm-int8.yaml")
    tokenizer = script["train_tokenizer"]()
    trained = load_data(script["DATA"], "causal-lm", tokenizer, 0).split("train").blocks
    scored = load_data(recipe.data, "causal-lm", tokenizer, recipe.seed).splits.values()
    used = {block.tobytes() for split in scored if split.blocks is not None for block in split.blocks}
    assert trained is not None
    assert used.isdisjoint(block.tobytes() for block in trained)


def test_the_help_texts_give_enough_blocks_for_a_perplexity(tokenizer: Any) -> None:
    asked = DataSettings(path="asset:pydoc-topics", splits=Splits(evaluate=20, calibration=24, train="rest"))
    data = load_data(asked, "causal-lm", tokenizer, 0)
    assert sum(len(split) for split in data.splits.values()) > 200
