"""What the command chooses where nothing is said, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from squeeze.data import Data, DataSettings, Split
from squeeze.distillation.choices import class_numbers, complete, loss_term, plan, softened
from squeeze.distillation.settings import LossTerm
from squeeze.distillation.stage import DistillStage
from squeeze.errors import DataError, TrainError
from squeeze.provenance import digest_bytes
from squeeze.rows import Row

HEADS = {"id2label": {"0": "negative", "1": "neutral", "2": "positive"}, "max_position_embeddings": 64}


def rows(*labels: str) -> list[Row]:
    return [Row(f"line {n}", f"text {n}", label) for n, label in enumerate(labels)]


def settings(path: Path, **more: Any) -> DataSettings:
    return DataSettings.model_validate({"path": str(path), "splits": {"evaluate": 1, "train": "rest"}, **more})


def table(folder: Path, count: int, label: str = "{}") -> Path:
    file = folder / "texts.csv"
    lines = [f"text number {n},{label.format(('positive', 'negative')[n % 2])}" for n in range(count)]
    file.write_text("\n".join(["text,label", *lines, lines[0]]), "utf-8")
    return file


def test_a_loss_is_a_name_with_or_without_its_weight() -> None:
    assert loss_term("kl") == {"kind": "kl"}
    assert loss_term("hidden=0.5") == {"kind": "hidden", "weight": 0.5}
    assert loss_term(" mse = 2e-1 ") == {"kind": "mse", "weight": 0.2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hiden", "Did you mean 'hidden'"),
        ("kl=heavy", "'heavy' is no weight"),
        ("kl=0", "no weight above 0"),
        ("kl=-1", "no weight above 0"),
        ("kl=", "no weight above 0"),
    ],
)
def test_a_loss_that_is_none_is_refused_with_what_is_meant(text: str, said: str) -> None:
    with pytest.raises(TrainError, match=said):
        loss_term(text)


def test_a_temperature_goes_to_the_losses_that_read_one_and_have_none() -> None:
    terms = (LossTerm(kind="kl"), LossTerm(kind="hidden", weight=0.5), LossTerm(kind="kl", temperature=9))
    assert [term.temperature for term in softened(terms, "text-classification", 4.0)] == [4.0, None, 9.0]
    assert softened((), "causal-lm", 3.0) == (LossTerm(kind="kl", temperature=3.0),)
    with pytest.raises(TrainError, match=r"temperature = 4 is read by none of the losses hidden\. Add one .*kl"):
        softened((LossTerm(kind="hidden"),), "text-classification", 4.0)


def test_class_names_are_found_in_the_model_s_head_whatever_their_case() -> None:
    assert class_numbers(rows("Positive", "negative", "2"), HEADS, "x.csv") == {"Positive": 2, "negative": 0, "2": 2}
    assert class_numbers(rows("0", "2", "7"), HEADS, "x.csv") is None  # numbers: check_fits judges them


@pytest.mark.parametrize("config", [HEADS, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, {}])
def test_class_names_that_the_head_does_not_know_are_named(config: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=f"'spam'.*, but the model's head knows {len(config.get('id2label', ()))} classes"
    ):
        class_numbers(rows("spam", "0", "1"), config, "x.csv")


def test_a_tenth_of_the_texts_is_scored_and_lengths_fit_the_model(tmp_path: Path) -> None:
    found = complete(settings(table(tmp_path, 57)), None, "text-classification", HEADS, None, 0)
    assert found.splits.evaluate == 5  # 57 different texts, and a repeated one
    assert found.max_length == 64
    assert found.label_column == "label"
    assert found.labels == {"positive": 2, "negative": 0}


def test_at_most_a_thousand_texts_are_scored(tmp_path: Path) -> None:
    file = table(tmp_path, 10_500)
    assert complete(settings(file), None, "feature-extraction", {}, None, 0).splits.evaluate == 1000


def test_what_was_said_stays(tmp_path: Path) -> None:
    given = settings(table(tmp_path, 30), max_length=40, labels={"positive": 1, "negative": 0}, label_column="label")
    found = complete(given, 7, "text-classification", HEADS, None, 0)
    assert (found.max_length, found.labels, found.splits.evaluate) == (40, {"positive": 1, "negative": 0}, 7)
    too_long = complete(settings(table(tmp_path, 30), max_length=400), 7, "text-classification", HEADS, None, 0)
    assert too_long.max_length == 400  # check_fits says so


def test_blocks_of_a_language_model_are_counted(tmp_path: Path, tiny_llama_folder: Path) -> None:
    from squeeze.model import load_tokenizer

    file = tmp_path / "prose.txt"
    file.write_text("\n".join(f"The cat number {n} sat on mat {n * 7}." for n in range(150)), "utf-8")
    tokenizer = load_tokenizer(tiny_llama_folder)
    found = complete(settings(file), None, "causal-lm", {"max_position_embeddings": 16}, tokenizer, 0)
    tokens = len(tokenizer(file.read_text("utf-8"), add_special_tokens=False)["input_ids"])
    assert found.block_size == 16
    assert abs(found.splits.evaluate - tokens // 160) <= 1


def data_of(count: int, task: str = "text-classification") -> Data:
    given = DataSettings.model_validate({"path": "tweets.csv", "splits": {"evaluate": 10, "train": "rest"}})
    splits = {
        name: Split(name, tuple(f"{name} {n}" for n in range(size)), None, None, digest_bytes(b""))  # type: ignore[arg-type]
        for name, size in (("evaluate", 10), ("train", count))
    }
    return Data(given, task, splits, None)


def test_the_plan_says_what_the_engine_will_do() -> None:
    stage = DistillStage.model_validate(
        {
            "student": {"layers": 3}, "losses": [{"kind": "kl"}, {"kind": "hidden", "weight": 0.5}],
            "training": {"epochs": 2, "batch": 16, "held_out": 30, "learning_rate": 3e-5},
        }
    )  # fmt: skip
    told = dict(plan(stage, data_of(200), {"num_hidden_layers": 12}, "models/big"))
    assert told["teacher"] == "models/big"
    assert told["student"] == "3 of 12 layers (spread)"
    assert told["losses"] == "kl (T 2) + 0.5 hidden"
    assert told["trains on"].startswith("170 texts of tweets.csv, and 30 more")
    assert told["length"] == "2 epochs of batches of 16: 22 steps"  # ⌈170 / 16⌉ = 11 a pass
    assert told["rate"].startswith("3e-05, linear")
    assert told["compared on"].startswith("10 texts")


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({"layers": [0, 4]}, "layers 0, 4 of 6"),
        ({"layers": 2, "choose": "last", "heads": 4}, "2 of 6 layers (last), 4 heads"),
        ({"path": "models/small"}, "models/small"),
        ({"config": {"n_layers": 2}}, "a new network with n_layers 2"),
        ({}, "the model as it is"),
    ],
)
def test_the_plan_names_every_kind_of_student(student: dict[str, Any], said: str) -> None:
    stage = DistillStage.model_validate({"student": student})
    assert dict(plan(stage, data_of(50), {"n_layers": 6}, "big"))["student"] == said


def test_the_plan_counts_steps_where_steps_are_given_and_only_the_examples_that_are_used() -> None:
    stage = DistillStage.model_validate({"examples": 50, "training": {"steps": 70, "held_out": 1000}})
    told = dict(plan(stage, data_of(200), {}, "big", "1-prune"))
    assert told["trains on"].startswith("40 texts of tweets.csv, and 10 more")
    assert told["length"] == "70 steps of batches of 32: 70 steps"
    assert told["student"] == "the model as it is of 1-prune"


def test_the_plan_names_the_texts_that_no_split_holds() -> None:
    stage = DistillStage.model_validate({"unlabelled": {"path": "more.txt"}, "augment": {}})
    told = dict(plan(stage, data_of(200), {}, "big"))
    assert told["beside them"] == "unlabelled texts of more.txt, copies with words replaced"
    assert told["length"].endswith("steps, and more for the texts beside them")
    assert "beside them" not in dict(plan(DistillStage(), data_of(200), {}, "big"))
