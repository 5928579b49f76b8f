"""Tasks: what a checkpoint was trained for, and what it must not be opened as."""

import json
from pathlib import Path
from typing import Any

import pytest

from squeeze.errors import ModelError
from squeeze.tasks import TASKS, check_task, infer_task, positions

BERT = {"model_type": "bert"}
LLAMA = {"model_type": "llama"}
T5 = {"model_type": "t5", "is_encoder_decoder": True}
BART = {"model_type": "bart", "is_encoder_decoder": True}


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "causal-lm"),
        ("GPT2LMHeadModel", "causal-lm"),
        ("BertForSequenceClassification", "text-classification"),
        ("BertModel", "feature-extraction"),
        ("BertForMaskedLM", "feature-extraction"),
        ("T5EncoderModel", "feature-extraction"),
        ("T5Model", "feature-extraction"),
    ],
)
def test_the_architecture_in_the_config_tells_the_task(architecture: str, task: str) -> None:
    assert infer_task({"architectures": [architecture]}) == task


@pytest.mark.parametrize("config", [{}, {"architectures": None}, {"architectures": []}])
def test_without_an_architecture_the_task_must_be_given(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="Give the task: causal-lm, text-classification, feature-extraction"):
        infer_task(config)


def test_an_architecture_for_another_task_is_named() -> None:
    with pytest.raises(ModelError, match="BertForQuestionAnswering is for none of the tasks causal-lm"):
        infer_task({"architectures": ["BertForQuestionAnswering"]})


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (BERT | {"architectures": ["BertModel"]}, "feature-extraction"),
        (BERT | {"architectures": ["BertForMaskedLM"]}, "feature-extraction"),
        (BERT | {"architectures": ["BertForSequenceClassification"]}, "feature-extraction"),
        (BERT | {"architectures": ["BertForSequenceClassification"]}, "text-classification"),
        (T5 | {"architectures": ["T5Model"]}, "feature-extraction"),
        (T5 | {"architectures": ["T5ForConditionalGeneration"]}, "feature-extraction"),
        (T5, "feature-extraction"),
        (LLAMA | {"architectures": ["LlamaForCausalLM"]}, "causal-lm"),
        (LLAMA | {"architectures": ("LlamaForSequenceClassification",)}, "text-classification"),
    ],
)
def test_a_checkpoint_may_do_what_it_was_trained_for(config: dict[str, Any], task: str) -> None:
    check_task(config, task)


def test_a_head_that_is_not_in_the_checkpoint_is_refused_and_the_own_task_named() -> None:
    with pytest.raises(ModelError) as raised:
        check_task(BERT | {"architectures": ["BertModel"]}, "text-classification")
    assert str(raised.value) == (
        "BertModel has no trained head for text-classification; "
        "a random one would be measured as if it meant something. Its own task is feature-extraction. "
        "For text-classification give a checkpoint of a class that ends in ForSequenceClassification."
    )


def test_bert_is_no_causal_language_model_although_transformers_could_build_one() -> None:
    with pytest.raises(
        ModelError, match=r"BertModel has no trained head for causal-lm.* ends in ForCausalLM or LMHead"
    ):
        check_task(BERT | {"architectures": ["BertModel"]}, "causal-lm")


def test_a_head_for_no_known_task_is_refused_without_naming_one() -> None:
    with pytest.raises(ModelError) as raised:
        check_task(BERT | {"architectures": ["BertForQuestionAnswering"]}, "causal-lm")
    assert "Its own task" not in str(raised.value)


def test_a_decoder_gives_no_embeddings() -> None:
    with pytest.raises(ModelError, match=r"LlamaForCausalLM was trained to predict .* Its own task is causal-lm"):
        check_task(LLAMA | {"architectures": ["LlamaForCausalLM"]}, "feature-extraction")


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (T5 | {"architectures": ["T5ForConditionalGeneration"]}, "causal-lm"),
        (T5 | {"architectures": ["T5WithLMHeadModel"]}, "causal-lm"),
        (T5 | {"architectures": ["T5ForSequenceClassification"]}, "text-classification"),
        (T5 | {"architectures": ["T5Model"], "auto_map": {"AutoModel": "own.T5"}}, "feature-extraction"),
        (BART | {"architectures": ["BartModel"]}, "feature-extraction"),
        (BART, "text-classification"),
    ],
)
def test_of_an_encoder_decoder_only_a_known_encoder_is_opened(config: dict[str, Any], task: str) -> None:
    with pytest.raises(ModelError) as raised:
        check_task(config, task)
    assert str(raised.value) == (
        f"{config.get('architectures', ['bart'])[0]} is an encoder-decoder. Text-to-text generation is not supported yet: "
        "squeeze opens the encoder alone, with the task feature-extraction, and that of the model types mt5, t5, t5gemma, umt5."
    )


def test_an_encoder_decoder_that_generates_does_not_pass_for_its_encoder_unasked() -> None:
    with pytest.raises(
        ModelError, match="T5ForConditionalGeneration is an encoder-decoder. Text-to-text generation is"
    ):
        infer_task(T5 | {"architectures": ["T5ForConditionalGeneration"]})


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512, "pad_token_id": 0}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "gpt2", "n_positions": 1024, "pad_token_id": 50256}, 1024),
        (T5 | {"pad_token_id": 0}, None),
    ],
)
def test_rows_of_the_position_table_that_no_text_reaches_do_not_count(config: dict[str, Any], rows: int | None) -> None:
    assert positions(config) == rows


def test_an_unknown_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"task 'causal_lm' is unknown\. Did you mean 'causal-lm'\?"):
        check_task(LLAMA, "causal_lm")


def test_a_model_type_that_transformers_lacks_is_told_of_the_way_by_an_own_module() -> None:
    config = {"model_type": "lstm9", "architectures": ["Lstm9ForCausalLM"]}
    with pytest.raises(ModelError, match=r"Lstm9ForCausalLM: transformers [\d.]+ .* 'lstm9'.* package.module:factory"):
        check_task(config, "causal-lm")


def test_a_checkpoint_with_code_of_its_own_needs_no_known_model_type() -> None:
    auto_map = {"AutoModelForCausalLM": "lstm9.Lstm9ForCausalLM"}
    check_task({"model_type": "lstm9", "architectures": ["Lstm9ForCausalLM"], "auto_map": auto_map}, "causal-lm")


def test_without_an_architecture_the_model_type_must_know_the_task() -> None:
    check_task(BERT, "text-classification")
    check_task(BERT, "feature-extraction")
    with pytest.raises(ModelError, match="model type 'clip' cannot do causal-lm"):
        check_task({"model_type": "clip"}, "causal-lm")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_names_things_that_transformers_has(task: Any) -> None:
    import transformers

    assert TASKS[task.name] is task
    assert callable(getattr(transformers, task.auto_class).from_pretrained)
    assert len(getattr(transformers, task.table)) > 10


@pytest.mark.parametrize(
    ("fixture", "task"),
    [
        ("tiny_llama_folder", "causal-lm"),
        ("tiny_gpt2_folder", "causal-lm"),
        ("tiny_bert_folder", "text-classification"),
        ("tiny_t5_folder", "feature-extraction"),
    ],
)
def test_a_saved_checkpoint_tells_its_task(fixture: str, task: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert infer_task(config) == task
    check_task(config, task)
