"""What an export computes, in torch: which tokens count, and that shared layers are told apart by their calls."""

from pathlib import Path

import pytest
import torch
from transformers import AlbertConfig, AlbertForSequenceClassification

from squeeze.compress.quantize import QuantizeStage
from squeeze.exporter import export_onnx
from squeeze.model import Model, load_model
from squeeze.simulation import _first_token_only, simulation
from squeeze.verification import verify


@pytest.fixture
def albert(tiny_bert_folder: Path) -> Model:
    torch.manual_seed(0)
    like = load_model(tiny_bert_folder)
    config = AlbertConfig(
        vocab_size=like.config["vocab_size"], embedding_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64,
    )  # fmt: skip
    network = AlbertForSequenceClassification(config).eval().requires_grad_(False)
    return Model(network, like.tokenizer, "text-classification", "own", network.config.to_dict())


def test_in_a_classifier_only_the_last_layer_computes_token_0_alone(tiny_bert_folder: Path) -> None:
    found = _first_token_only(load_model(tiny_bert_folder))
    narrow = {path.removeprefix("bert.encoder.layer.") for path, flags in found.items() if any(flags)}
    last = {"attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"}
    assert narrow == {f"1.{name}" for name in last}


@pytest.mark.vnni
def test_a_layer_that_runs_several_times_is_narrow_in_its_last_call_only(albert: Model, tmp_path: Path) -> None:
    found = _first_token_only(albert)
    shared = next(flags for path, flags in found.items() if path.endswith("ffn_output"))
    assert shared == (False, False, True)
    QuantizeStage(scheme="int8").apply(albert)
    export_onnx(albert, tmp_path)
    assert [check for check in verify(albert, tmp_path) if not check.passed] == []


def test_decoders_and_embeddings_compute_every_token(tiny_llama_folder: Path) -> None:
    assert _first_token_only(load_model(tiny_llama_folder)) == {}


def test_a_float_model_is_its_own_simulation(tiny_bert_folder: Path) -> None:
    model = load_model(tiny_bert_folder)
    assert simulation(model) is model.network
