"""Every way to make a student, what is said of it, and every refusal; the models are the folders of tests/conftest.py."""

import copy
import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from squeeze.data import DataSettings, Splits, load_data
from squeeze.distillation.losses import LOSSES
from squeeze.distillation.settings import LossTerm, StudentSettings
from squeeze.distillation.stage import DistillStage
from squeeze.distillation.students import (
    check_pair,
    derived,
    first,
    last,
    make_student,
    needs_texts,
    pinned,
    same_tokenizer,
    shrink_notes,
    spread,
    strongest,
)  # fmt: skip
from squeeze.errors import DataError, ModelError, TrainError
from squeeze.model import Model, load_model, save_model
from squeeze.training.settings import Training


def texts(model: Model, count: int = 4) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 190, (count, 12), generator=random)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "index": torch.arange(count)}
    return [{name: value[n : n + 2] for name, value in batch.items()} for n in range(0, count, 2)]


def out(model: Model) -> Tensor:
    with torch.no_grad():
        return model.network(input_ids=texts(model)[0]["input_ids"])[0]


def test_choices_of_layers() -> None:
    assert spread(6, 12) == (0, 2, 4, 6, 8, 10)
    assert (first(2, 5), last(2, 5)) == ((0, 1), (3, 4))
    assert strongest((0.3, 0.1, 0.5, 0.3), 2) == (0, 2)
    assert strongest((0.1, 0.4, 0.5, 0.3), 2, always=(0,)) == (0, 2)
    for choose in (spread, first, last):
        with pytest.raises(TrainError, match="asks for 6 layers, the model has 5"):
            choose(6, 5)
    with pytest.raises(TrainError, match="asks for 2 layers, the model has 1"):
        strongest((0.1,), 2)


def test_layers_heads_and_neurons_together(tiny_llama_folder: Path, tmp_path: Path) -> None:
    model = load_model(tiny_llama_folder)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    settings = StudentSettings(layers=1, choose="last", heads=2, neurons=50)
    assert needs_texts(settings)
    student, notes = make_student(settings, model, texts(model))
    config: Any = student.network.config
    assert (
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
    ) == (1, 2, 2, 50)
    assert notes[0] == "the student keeps layers 1 of 2"
    assert "each layer keeps 2 of 4 heads and 2 of 2 key-value heads" in notes[1]
    assert "each layer keeps 50 of 128 feed-forward neurons" in notes[2]
    assert student.config == config.to_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items())
    save_model(student, tmp_path)
    torch.testing.assert_close(out(load_model(tmp_path)), out(student))


def test_importance_keeps_the_layer_that_does_something(tiny_gpt2_folder: Path) -> None:
    model = load_model(tiny_gpt2_folder)
    network: Any = model.network
    with torch.no_grad():
        for matrix in (network.transformer.h[0].attn.c_proj, network.transformer.h[0].mlp.c_proj):
            matrix.weight.zero_()
            matrix.bias.zero_()
    student, notes = make_student(StudentSettings(layers=1, choose="importance"), model, texts(model))
    assert notes[0] == "the student keeps layers 1 of 2"
    assert notes[1].startswith("block influence of layers, 1 − cos(in, out): 0: ")
    torch.testing.assert_close(out(student), out(model))


def test_the_most_important_heads_and_neurons_stay(tiny_llama_folder: Path) -> None:
    """Where all others add nothing, nothing changes."""
    model = load_model(tiny_llama_folder)
    network: Any = model.network
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight[:, :16] = 0  # head 0 of the first pair
            layer.self_attn.o_proj.weight[:, 48:] = 0  # head 3, of the second
            layer.mlp.down_proj.weight[:, 7:] = 0
    student, notes = make_student(StudentSettings(heads=2, neurons=7), model, texts(model))
    torch.testing.assert_close(out(student), out(model), rtol=1e-4, atol=1e-4)
    assert "100% of what the heads add; by layer: 1,2; 1,2" in notes[0]
    assert "100% of what they add" in notes[1]


def test_a_path_opens_a_model_of_its_own(tiny_bert_folder: Path, tiny_distilbert_folder: Path) -> None:
    model = load_model(tiny_bert_folder)
    student, notes = make_student(StudentSettings(path=str(tiny_distilbert_folder)), model)
    torch.testing.assert_close(out(student), out(load_model(tiny_distilbert_folder)))
    assert student.task == "text-classification"
    assert notes == (f"the student is {tiny_distilbert_folder}",)
    with pytest.raises(ModelError, match="does not exist"):
        make_student(StudentSettings(path="./nowhere/at-all"), model)


def test_a_path_of_another_task_is_refused(tiny_bert_folder: Path, tiny_gpt2_folder: Path) -> None:
    with pytest.raises(ModelError, match="no trained head for text-classification"):
        make_student(StudentSettings(path=str(tiny_gpt2_folder)), load_model(tiny_bert_folder))


def test_a_config_starts_anew(tiny_llama_folder: Path, tmp_path: Path) -> None:
    model = load_model(tiny_llama_folder)
    torch.manual_seed(0)
    student, notes = make_student(
        StudentSettings(config={"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}), model
    )
    config: Any = student.network.config
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim, config.intermediate_size) == (32, 3, 16, 128)
    assert student.tokenizer is model.tokenizer
    assert "the student starts from random weights, with hidden_size = 32, num_hidden_layers = 3" in notes[0]
    save_model(student, tmp_path)
    torch.testing.assert_close(out(load_model(tmp_path)), out(student))
    same, _ = make_student(StudentSettings(config={}), model)
    ours, theirs = same.network.get_input_embeddings().weight, model.network.get_input_embeddings().weight  # type: ignore[operator]
    assert ours.shape == theirs.shape
    assert not torch.equal(ours, theirs), "random, not copied"


def test_a_config_derives_what_its_class_computes(tiny_llama_folder: Path, tiny_qwen2_folder: Path) -> None:
    assert "head_dim" in derived(load_model(tiny_llama_folder).network.config)
    qwen2 = load_model(tiny_qwen2_folder)
    assert "layer_types" in derived(qwen2.network.config)
    student, _ = make_student(StudentSettings(config={"num_hidden_layers": 5}), qwen2)
    assert student.network.config.layer_types == ["full_attention"] * 5  # type: ignore[union-attr]
    explicit, _ = make_student(
        StudentSettings(config={"hidden_size": 32, "head_dim": 8}), load_model(tiny_llama_folder)
    )
    assert explicit.network.config.head_dim == 8  # type: ignore[union-attr]


def test_a_familys_own_names_and_the_common_ones(tiny_distilbert_folder: Path) -> None:
    model = load_model(tiny_distilbert_folder)
    for name in ("n_layers", "num_hidden_layers"):
        student, _ = make_student(StudentSettings(config={name: 1}), model)
        assert student.config["n_layers"] == 1
        assert len(student.config["id2label"]) == 3, "the teacher's classes"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"num_hiden_layers": 1}, r"bert has no 'num_hiden_layers'. Did you mean 'num_hidden_layers'\?"),
        ({"model_type": "gpt2"}, "model_type says which network it is"),
        ({"hidden_size": "wide"}, "bert does not allow hidden_size = wide: .*expected int"),
        ({"hidden_size": 30}, r"cannot be built as asked: The hidden size \(30\) is not a multiple"),
        ({"vocab_size": 100}, "vocab_size = 100, and the model's tokenizer, which the student shares, has 200 tokens"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be(values: dict[str, Any], told: str, tiny_bert_folder: Path) -> None:
    with pytest.raises(TrainError, match=told):
        make_student(StudentSettings(config=values), load_model(tiny_bert_folder))


def test_nothing_said_is_the_model_itself(tiny_bert_folder: Path) -> None:
    model = load_model(tiny_bert_folder)
    student, notes = make_student(StudentSettings(), model)
    assert student.network is model.network
    assert student is not model
    assert notes == ("the student is the model as the stage gets it",)


def test_importance_without_texts(tiny_llama_folder: Path) -> None:
    for settings in (
        StudentSettings(layers=1, choose="importance"),
        StudentSettings(heads=2),
        StudentSettings(neurons=2),
    ):
        with pytest.raises(TrainError, match="measured on texts, and there are none"):
            make_student(settings, load_model(tiny_llama_folder))
    assert not needs_texts(StudentSettings(layers=(0,), choose="importance"))
    assert not needs_texts(StudentSettings(layers=1))


def test_refusals_of_the_architecture_reach_the_reader(tiny_bert_folder: Path) -> None:
    model = load_model(tiny_bert_folder)
    with pytest.raises(TrainError, match="bert: no config.json describes fewer attention heads"):
        make_student(StudentSettings(heads=2), model, texts(model))
    with pytest.raises(TrainError, match="asks for 3 layers, the model has 2"):
        make_student(StudentSettings(layers=3), model)
    own = nn.Module()
    own.forward = lambda input_ids: input_ids  # type: ignore[method-assign]
    mine = Model(own, model.tokenizer, "causal-lm", "mine:net", {}, factory="mine:net")
    for settings in (StudentSettings(layers=1), StudentSettings(config={"hidden_size": 8})):
        with pytest.raises(TrainError, match="a module without a Transformers config"):
            make_student(settings, mine, texts(model))


def test_modernberts_first_layer_is_pinned() -> None:
    import transformers as hf

    config = hf.ModernBertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    assert pinned(hf.ModernBertModel(config)) == (0,)
    assert (
        pinned(hf.BertModel(hf.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)))
        == ()
    )


# Student and teacher


def test_tokenizers_are_told_apart(
    tiny_bert_folder: Path, tiny_distilbert_folder: Path, tiny_llama_folder: Path
) -> None:
    bert, distilbert, llama = (
        load_model(f).tokenizer for f in (tiny_bert_folder, tiny_distilbert_folder, tiny_llama_folder)
    )
    assert same_tokenizer(bert, load_model(tiny_bert_folder).tokenizer)
    assert same_tokenizer(bert, distilbert)
    assert not same_tokenizer(bert, llama)
    assert not same_tokenizer(bert, None)
    assert same_tokenizer(None, None)
    lower = copy.deepcopy(bert)
    from tokenizers import normalizers

    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert lower.get_vocab() == bert.get_vocab()
    assert not same_tokenizer(bert, lower), "one vocabulary, other numbers for the same text"


def _losses(*names: str) -> list[Any]:
    return [LOSSES[name] for name in names]


def test_pairs_that_do_not_go_together(
    tiny_bert_folder: Path, tiny_roberta_folder: Path, tiny_llama_folder: Path
) -> None:
    bert, roberta, llama = load_model(tiny_bert_folder), load_model(tiny_roberta_folder), load_model(tiny_llama_folder)
    check_pair(bert, bert, _losses("kl", "hidden"))
    check_pair(
        roberta, bert, _losses("kl", "mse", "labels")
    )  # LABEL_0 … says nothing against negative, neutral, positive
    with pytest.raises(
        TrainError,
        match="different tokens, and the losses compare hidden states.* only losses that compare whole texts",
    ):
        check_pair(roberta, bert, _losses("kl", "hidden"))

    def with_labels(*names: str) -> Model:
        return dataclasses.replace(bert, config=bert.config | {"id2label": dict(enumerate(names))})

    with pytest.raises(TrainError, match="has 2 classes, the teacher .* 3"):
        check_pair(with_labels("no", "yes"), bert, _losses("kl"))
    with pytest.raises(
        TrainError, match="classes are positive, neutral, negative, the teacher's negative, neutral, positive"
    ):
        check_pair(with_labels("positive", "neutral", "negative"), bert, _losses("kl"))
    other = copy.deepcopy(llama.tokenizer)
    other.add_tokens(["<extra>"])
    with pytest.raises(
        TrainError, match="compare the next token token by token. Name a student with the teacher's tokenizer"
    ):
        check_pair(dataclasses.replace(llama, tokenizer=other), llama, _losses("kl"))


def test_sizes_are_told_and_a_larger_student_warned_of(tiny_bert_folder: Path) -> None:
    teacher = load_model(tiny_bert_folder)
    smaller, _ = make_student(StudentSettings(layers=1), teacher)
    notes, warnings = shrink_notes(smaller, teacher)
    assert warnings == ()
    share = smaller.parameters / teacher.parameters
    assert notes == (
        f"parameters: {smaller.parameters:,} in the student, {teacher.parameters:,} in the teacher ({share:.1%})",
    )
    larger, _ = make_student(StudentSettings(config={"intermediate_size": 256}), teacher)
    assert "the student is larger than its teacher" in shrink_notes(larger, teacher)[1][0]


# In the stage


WORDS = ("good", "bad", "late", "early", "phone", "letter", "rain", "bus", "shop", "model")


@pytest.fixture
def reviews(tmp_path: Path) -> DataSettings:
    file = tmp_path / "reviews.csv"
    random = np.random.default_rng(0)
    with file.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["text", "label"])
        for n in range(60):
            writer.writerow([" ".join(random.choice(WORDS, size=3 + n % 9)) + f" {n}", n % 3])
    return DataSettings(path=str(file), label_column="label", max_length=24, splits=Splits(evaluate=10, train=50))


def _stage(**values: Any) -> DistillStage:
    return DistillStage(training=Training(steps=3, batch=8, held_out=8, validations=1), **values)


def test_a_teacher_of_another_tokenizer_reads_the_texts_its_own_way(
    tiny_bert_folder: Path, tiny_roberta_folder: Path, reviews: DataSettings
) -> None:
    from squeeze.distillation.answers import Needs
    from squeeze.distillation.objective import LiveTeacher
    from squeeze.training.examples import from_texts

    teacher = load_model(tiny_bert_folder)
    learned, judged = ("The cat sat.", "A small model answers faster"), ("late again", "I love this phone, the battery")
    own = tuple(from_texts(t, None, teacher.tokenizer, 24) for t in (learned, judged))
    live = LiveTeacher(teacher, (own[0], own[1]))
    batch = {"input_ids": torch.ones(2, 30, dtype=torch.int64), "index": torch.tensor([1, 0])}
    for held, source in ((False, learned), (True, judged)):
        given = batch | ({"held_out": torch.ones((), dtype=torch.bool)} if held else {})
        found = live.answers(given, Needs(logits=True)).logits
        for row, n in enumerate((1, 0)):
            with torch.no_grad():
                alone = teacher.network(**teacher.tokenizer(source[n], return_tensors="pt")).logits[0]
            torch.testing.assert_close(found[row], alone, rtol=1e-4, atol=1e-4)  # type: ignore[index]

    student = load_model(tiny_bert_folder)
    data = load_data(reviews, "text-classification", student.tokenizer, seed=0)
    stage = _stage(student=StudentSettings(path=str(tiny_roberta_folder)), losses=(LossTerm(kind="kl"),))
    record = stage.apply(student, teacher, data, None, "key")
    assert type(student.network).__name__ == "RobertaForSequenceClassification"
    assert not same_tokenizer(student.tokenizer, teacher.tokenizer)
    assert any(note.startswith("parameters: ") for note in record.notes)
    with pytest.raises(TrainError, match="cut texts into different tokens"):
        _stage(student=StudentSettings(path=str(tiny_roberta_folder))).apply(
            load_model(tiny_bert_folder), teacher, data, None, "key"
        )


def test_a_stage_measures_and_warns(tiny_bert_folder: Path, reviews: DataSettings) -> None:
    model, teacher = load_model(tiny_bert_folder), load_model(tiny_bert_folder)
    data = load_data(reviews, "text-classification", model.tokenizer, seed=0)
    record = _stage(student=StudentSettings(layers=1, choose="importance", neurons=32)).apply(
        model, teacher, data, None, "k"
    )
    assert (model.network.config.num_hidden_layers, model.network.config.intermediate_size) == (1, 32)  # type: ignore[union-attr]
    assert sum("block influence" in note or "feed-forward neurons" in note for note in record.notes) == 2
    assert record.warnings == ()
    larger = _stage(student=StudentSettings(config={"num_hidden_layers": 3}))
    record = larger.apply(load_model(tiny_bert_folder), teacher, data, None, "k")
    assert "larger than its teacher" in record.warnings[0]
    short = StudentSettings(config={"max_position_embeddings": 16})
    with pytest.raises(DataError, match="max_length = 24 tokens, but the model has 16 positions"):
        _stage(student=short).apply(load_model(tiny_bert_folder), teacher, data, None, "k")
