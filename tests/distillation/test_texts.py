"""What comes to the train split, and what must never come."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from squeeze.data import Data, DataSettings, Splits, load_data
from squeeze.distillation.objective import Distillation, LiveTeacher
from squeeze.distillation.settings import LossTerm, UnlabelledSettings
from squeeze.distillation.stage import DistillStage, distill
from squeeze.distillation.texts import HeldOutBlocks, check_texts, further, source_digest
from squeeze.errors import TrainError
from squeeze.model import Model, load_model
from squeeze.training.examples import NO_LABEL, Examples, from_split, joined

NOUNS = ("cat", "shop", "phone", "train", "letter", "bus", "model", "drawer", "rain", "mat", "battery", "row", "scale")
VERBS = ("opens", "closes", "sat", "looked", "answers", "read", "folded", "stored", "measured", "lasts")
TEXTS = [f"The {noun} {verb} on the {other}." for noun in NOUNS for verb in VERBS for other in NOUNS[:4]]


@pytest.fixture(scope="module")
def bert(tiny_bert_folder: Path) -> Model:
    return load_model(tiny_bert_folder, "text-classification")


@pytest.fixture(scope="module")
def llama(tiny_llama_folder: Path) -> Model:
    return load_model(tiny_llama_folder, "causal-lm")


def rows(file: Path, texts: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": t, "label": n % 3}) + "\n" for n, t in enumerate(texts)))
    return str(file)


def data_of(model: Model, path: str, evaluate: int, **settings: Any) -> Data:
    label = "label" if model.task == "text-classification" else None
    given = {"label_column": label, "max_length": 40, "block_size": 40} | settings
    own = DataSettings(path=path, splits=Splits(evaluate=evaluate, train="rest"), **given)
    return load_data(own, model.task, model.tokenizer, 0)


def parts_of(data: Data, model: Model, held: int = 5) -> tuple[Examples, Examples]:
    examples = from_split(data.split("train"), model.tokenizer, 40)
    return examples.take(np.arange(held, len(examples))), examples.take(np.arange(held))


def test_texts_without_labels_come_without_those_that_judge(bert: Model, tmp_path: Path) -> None:
    data = data_of(bert, rows(tmp_path / "own.jsonl", TEXTS[:60]), 20)
    learned, judged = parts_of(data, bert)
    spaced = [f" {text.replace(' ', '  ')} " for text in data.split("evaluate").texts or ()]
    more = rows(tmp_path / "more.jsonl", [*TEXTS[:90], *spaced, " "])
    examples, notes = further(DistillStage(unlabelled={"path": more}), data, learned, judged, bert, bert)
    assert examples.texts is not None
    assert set(examples.texts[len(learned) :]) == set(TEXTS[60:90])
    held = {*(data.split("evaluate").texts or ()), *(judged.texts or ())}
    assert not held & {" ".join(text.split()) for text in examples.texts}
    assert examples.labels is not None
    assert examples.labels[len(learned) :].tolist() == [NO_LABEL] * 30
    assert learned.labels is not None
    assert examples.labels[: len(learned)].tolist() == learned.labels.tolist()
    assert f"unlabelled: 30 texts of {more}; of 110 read, 40 are evaluate texts and 40 are there already" in notes
    batch = examples.batch([len(examples) - 1])
    own = bert.tokenizer([examples.texts[-1]])
    assert batch["input_ids"][0].tolist() == own["input_ids"][0]
    assert "unlabelled: 1 of 111 texts are blank and were dropped" in notes


def test_a_number_of_texts_is_drawn_by_the_seed(bert: Model, tmp_path: Path) -> None:
    data = data_of(bert, rows(tmp_path / "own.jsonl", TEXTS[:60]), 20)
    learned, judged = parts_of(data, bert)
    more = rows(tmp_path / "more.jsonl", TEXTS[60:160])

    def texts(seed: int) -> tuple[str, ...]:
        stage = DistillStage(unlabelled={"path": more, "count": 10}, training={"seed": seed})
        return (further(stage, data, learned, judged, bert, bert)[0].texts or ())[len(learned) :]

    assert len(texts(0)) == 10
    assert texts(0) == texts(0) != texts(1)


def test_no_text_is_left_is_an_error_that_counts(bert: Model, llama: Model, tmp_path: Path) -> None:
    own = rows(tmp_path / "own.jsonl", TEXTS[:60])
    data = data_of(bert, own, 60 - 8)
    learned, judged = parts_of(data, bert)
    with pytest.raises(TrainError, match="gives 60 texts; of these 52 are evaluate texts and 8 are there already"):
        further(DistillStage(unlabelled={"path": own}), data, learned, judged, bert, bert)
    (tmp_path / "mydata.csv").write_text("words\na\n")
    with pytest.raises(TrainError, match="unlabelled: .*mydata.csv has no column 'text'. Set unlabelled.text_column"):
        further(DistillStage(unlabelled={"path": str(tmp_path / "mydata.csv")}), data, learned, judged, bert, bert)
    blank = rows(tmp_path / "blank.jsonl", [" ", ""])
    with pytest.raises(TrainError, match="gives 0 texts"):
        further(DistillStage(unlabelled={"path": blank}), data, learned, judged, bert, bert)
    blocks = data_of(llama, rows(tmp_path / "prose.jsonl", TEXTS), 20)
    learned, judged = parts_of(blocks, llama)
    with pytest.raises(TrainError, match="gives 0 blocks of 40 tokens"):
        further(DistillStage(unlabelled={"path": blank}), blocks, learned, judged, llama, llama)


def test_blocks_that_repeat_held_out_text_are_dropped_wherever_it_stands(llama: Model, tmp_path: Path) -> None:
    data = data_of(llama, rows(tmp_path / "own.jsonl", TEXTS[:200]), 20)
    learned, judged = parts_of(data, llama)
    evaluate = data.split("evaluate").blocks
    assert evaluate is not None
    held = HeldOutBlocks(data, judged)
    random, other = np.random.default_rng(0).integers(0, 190, (2, 6, 40))
    random[1, :20] = evaluate[3, 20:]
    random[2, 5:25] = judged.tokens.reshape(-1, 40)[1, 2:22]
    random[3, :19] = evaluate[3, 21:]  # one token too few
    random[4, 1:20] = evaluate[3, :19]
    random[5, 8:] = other[0, :32]
    assert held.shared(random).tolist() == [False, True, True, False, False, False]
    # The recipe's own prose moved by a word has blocks at other offsets; all that stand in evaluate blocks must go.
    more = rows(tmp_path / "more.jsonl", ["Good morning!", *TEXTS[:200], *TEXTS[300:400]])
    examples, notes = further(DistillStage(unlabelled={"path": more}), data, learned, judged, llama, llama)
    added = examples.tokens.reshape(-1, 40)[len(learned) :]
    assert len(added) > 10
    windows = {row[n : n + 20].tobytes() for row in evaluate.astype(np.int32) for n in range(21)}
    assert not windows & {row[n : n + 20].tobytes() for row in added for n in range(21)}
    assert int(notes[-1].split(", ")[1].split()[0]) > 0
    assert "share 20 tokens in a row with held-out blocks" in notes[-1]


def test_copies_have_no_label_unless_asked_and_are_none_that_judge(bert: Model, tmp_path: Path) -> None:
    data = data_of(bert, rows(tmp_path / "own.jsonl", TEXTS[:80]), 20)
    learned, judged = parts_of(data, bert)
    held = {*(data.split("evaluate").texts or ()), *(judged.texts or ())}
    for keep in (False, True):
        stage = DistillStage(augment={"copies": 3, "share": 0.3, "candidates": 2, "keep_labels": keep})
        examples, notes = further(stage, data, learned, judged, bert, bert)
        again, _ = further(stage, data, learned, judged, bert, bert)
        assert examples.digest == again.digest
        assert examples.texts is not None
        assert examples.labels is not None
        assert learned.labels is not None
        copies, labels = examples.texts[len(learned) :], examples.labels[len(learned) :]
        assert len(copies) > 60
        assert len(set(examples.texts)) == len(examples.texts)
        assert not held & set(copies)
        assert examples.labels[: len(learned)].tolist() == learned.labels.tolist()
        assert set(labels.tolist()) == ({0, 1, 2} if keep else {NO_LABEL})
        assert notes[-1].startswith(f"augment: {len(copies)} copies of 55 texts by neighbours")


def test_texts_without_labels_bring_no_loss_of_labels(bert: Model, tmp_path: Path) -> None:
    data = data_of(bert, rows(tmp_path / "own.jsonl", TEXTS[:60]), 20)
    learned, judged = parts_of(data, bert)
    more = rows(tmp_path / "more.jsonl", TEXTS[60:80])
    examples, _ = further(DistillStage(unlabelled={"path": more}), data, learned, judged, bert, bert)
    objective = Distillation(bert, LiveTeacher(bert), [LossTerm(kind="labels")], teacher_layers=2, teacher_width=64)
    last = len(examples) - 1
    with torch.no_grad():
        shares = [float(objective(examples.batch([0, 1, other]))["labels"]) for other in (last, last - 1)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-5)
    assert shares[0] > 0.1


def test_examples_are_joined_with_what_each_lacks_filled_in() -> None:
    one = Examples(np.array([5, 6, 7], np.int32), np.array([0, 2, 3]), None, np.array([1, 0]), 0, ("a", "b"))
    two = Examples(
        np.array([8, 9], np.int32), np.array([0, 2]), np.array([0, 1], np.int8), None, 0, ("c",), np.array([1])
    )
    both = joined([one, two])
    assert both.tokens.tolist() == [5, 6, 7, 8, 9]
    assert both.lengths.tolist() == [2, 1, 2]
    assert (both.types is None, both.labels is None, both.prompt is None) == (False, False, False)
    batch = both.batch([2, 0])
    assert batch["labels"].tolist() == [NO_LABEL, 1]
    assert batch["prompt"].tolist() == [1, 0]
    assert batch["token_type_ids"].tolist() == [[0, 1], [0, 0]]
    assert both.texts == ("a", "b", "c")
    assert one.digest != both.take(np.array([0, 1])).digest


SEQUENCE = (LossTerm(kind="sequence"),)


@pytest.mark.parametrize(
    ("task", "stage", "losses", "message"),
    [
        ("bert", {"generate": {}}, (), "generate is text that a language model writes; for text-classification use unlabelled"),
        ("bert", {"on_policy": {}}, (), "on_policy is text that a language model writes"),
        ("bert", {"augment": {"by": "mask"}}, (), "the student's is None, the teacher's None. Set it to neighbours"),
        ("llama", {"augment": {}}, (), "Use unlabelled, generate or on_policy"),
        ("llama", {}, SEQUENCE, "add `generate: {}`, or use the loss labels"),
        ("llama", {"generate": {"prompt": 40}}, SEQUENCE, "leave nothing of a block of 40 to write"),
        ("llama", {"on_policy": {}}, (LossTerm(kind="labels"),), "add a loss of js, kl, reverse-kl, skewed-kl"),
        ("llama", {"on_policy": {"prompt": 41}}, (LossTerm(kind="kl"),), "on_policy.prompt = 41 tokens"),
        ("llama", {"on_policy": {"new_tokens": 100}}, (LossTerm(kind="kl"),), "make 132 tokens, and .* has 128 positions"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_what_does(
    task: str, stage: dict[str, Any], losses: tuple[LossTerm, ...], message: str, bert: Model, llama: Model
) -> None:
    model = {"bert": bert, "llama": llama}[task]
    settings = DataSettings(path="unread", block_size=40, splits=Splits(evaluate=1))
    with pytest.raises(TrainError, match=message):
        check_texts(DistillStage(**stage), losses, model.task, settings, model, model)


def test_the_digest_of_unlabelled_texts_is_of_what_they_say(tmp_path: Path) -> None:
    one = UnlabelledSettings(path=rows(tmp_path / "a.jsonl", ["x", "y"]))
    same = UnlabelledSettings(path=rows(tmp_path / "b.jsonl", ["x", "y"]))
    other = UnlabelledSettings(path=rows(tmp_path / "c.jsonl", ["xy"]))
    assert source_digest(one) == source_digest(same) != source_digest(other)
    assert UnlabelledSettings(path="asset:tweets").encoding == "latin-1"


def test_a_stage_trains_on_what_the_teacher_and_the_student_write(tiny_llama_folder: Path, tmp_path: Path) -> None:
    model, teacher = (load_model(tiny_llama_folder, "causal-lm") for _ in range(2))
    data = data_of(model, rows(tmp_path / "own.jsonl", TEXTS[:120]), 10)
    stage = DistillStage(
        student={"layers": 1}, losses=(LossTerm(kind="sequence"), LossTerm(kind="kl")), generate={"prompt": 8, "count": 24},
        on_policy={"share": 0.5, "prompt": 8, "new_tokens": 4}, training={"steps": 4, "batch": 8, "device": "cpu", "keep": "last"},
    )  # fmt: skip
    said: list[str] = []
    record = distill(stage, model, teacher, data, tmp_path / ".s.training", "k", lambda i, n, text: said.append(text))
    assert any(note.startswith("generate: the teacher wrote ") and "of 24 blocks" in note for note in record.notes)
    assert said[:2] == ["the teacher continues blocks"] * 2
    assert len(list((tmp_path / ".s.generated").glob("*.npy"))) == 2
    curve = record.training
    assert curve is not None
    due = [bool(np.random.default_rng((0, step)).random() < 0.5) for step in range(4)]
    assert [share == 0 for share in curve.shares["sequence"]] == due
    assert any(due)
    assert not all(due)
    assert all(share > 0 for share in curve.shares["kl"])


def test_an_artifact_stands_no_longer_once_the_unlabelled_texts_or_the_masked_model_change(
    tiny_bert_folder: Path, tmp_path: Path
) -> None:
    from squeeze.stages import _others

    more = rows(tmp_path / "more.jsonl", ["x", "y"])
    augment = {"by": "masked-lm", "model": str(tiny_bert_folder)}
    stage = DistillStage(unlabelled={"path": more}, augment=augment)
    before = _others(stage, None)
    assert before == _others(stage, None)
    assert any(name.endswith("model.safetensors") for name in before["files"][str(tiny_bert_folder)])
    rows(tmp_path / "more.jsonl", ["x", "z"])
    after = _others(stage, None)
    assert {name for name in before if before[name] != after[name]} == {"texts"}
