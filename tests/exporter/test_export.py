"""Exports of real tiny networks: what plain ONNX Runtime gets, and that two exports are the same file."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from squeeze.compress.advice import Machine
from squeeze.compress.quantize import SCHEMES, QuantizeStage
from squeeze.errors import ExportError, QuantizeError
from squeeze.exporter import MODEL_FILE, ExportSettings, export_onnx
from squeeze.model import Model, load_model
from squeeze.provenance import digest_file
from squeeze.verification import verify

FAMILIES = [f"tiny_{name}_folder" for name in ("llama", "qwen2", "gpt2", "bert", "distilbert", "roberta", "t5")]


def calibration(model: Model) -> list[dict[str, np.ndarray]]:
    """Texts for the schemes that need some: two batches of random tokens, the last text padded, or blocks for a decoder."""
    rng, batches = np.random.default_rng(0), []
    for _ in range(2):
        ids = rng.integers(4, 200, (3, 24))
        mask = np.ones_like(ids)
        mask[-1, 16 if model.task != "causal-lm" else 24 :] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    return batches


EVERY = ("tiny_llama_folder", "tiny_bert_folder")
"""A decoder and an encoder meet every scheme, other families those that hang on how a graph is built: an export takes seconds."""
CASES = [(f, s) for f in FAMILIES for s in (None, *sorted(SCHEMES)) if f in EVERY or s in (None, "int8", "int8-static")]


@pytest.mark.parametrize(("family", "scheme"), CASES)
def test_every_family_exports_and_verifies(
    family: str, scheme: str | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = load_model(request.getfixturevalue(family))
    if scheme is not None:
        # On processors without VNNI rows of eight bits saturate, which verify finds: there weights stay within ±64.
        rows = scheme == "int8-static" or (scheme == "int8" and model.task != "causal-lm")
        stage = QuantizeStage(scheme=scheme, reduce_range=rows and Machine.here().saturates)
        stage.apply(model, calibration(model))
    export_onnx(model, tmp_path)
    checks = verify(model, tmp_path)
    assert [c for c in checks if not c.passed] == []
    onnx.checker.check_model(str(tmp_path / MODEL_FILE), full_check=False)
    assert (tmp_path / "tokenizer.json").exists()
    assert (tmp_path / "config.json").exists()


def test_a_llama_exports_by_the_dynamo_path_too_and_takes_batches(tiny_llama_folder: Path, tmp_path: Path) -> None:
    model = load_model(tiny_llama_folder)
    export_onnx(model, tmp_path, ExportSettings(graph="dynamo"))
    assert all(c.passed for c in verify(model, tmp_path))


def test_an_encoder_with_rotary_positions_takes_batches(tmp_path: Path) -> None:
    from transformers import ModernBertConfig, ModernBertModel

    config = ModernBertConfig(
        vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        local_attention=8, global_attn_every_n_layers=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    network = ModernBertModel(config).eval().requires_grad_(False)
    model = Model(network, None, "feature-extraction", "own", config.to_dict())
    export_onnx(model, tmp_path)
    assert [c for c in verify(model, tmp_path) if not c.passed] == []


def test_two_exports_are_the_same_bytes(tiny_bert_folder: Path, tmp_path: Path) -> None:
    digests = []
    for number in (1, 2):
        model = load_model(tiny_bert_folder)
        QuantizeStage().apply(model)
        folder = tmp_path / str(number)
        folder.mkdir()
        export_onnx(model, folder)
        digests.append(digest_file(folder / MODEL_FILE))
    assert digests[0] == digests[1]


def test_metadata_names_where_the_model_came_from_and_no_path_of_this_machine(
    tiny_bert_folder: Path, tmp_path: Path
) -> None:
    model = load_model(tiny_bert_folder)
    QuantizeStage().apply(model)
    export_onnx(model, tmp_path)
    properties = ir.load(tmp_path / MODEL_FILE).metadata_props
    assert properties["squeeze.source"] == str(tiny_bert_folder)
    assert {name for place in json.loads(properties["squeeze.integers"]) for name in place["layers"]} == set(
        model.integers
    )
    assert b"site-packages" not in (tmp_path / MODEL_FILE).read_bytes()


def test_the_genai_builder_is_refused_for_what_it_does_not_know(tiny_gpt2_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not know GPT2LMHeadModel"):
        export_onnx(load_model(tiny_gpt2_folder), tmp_path, ExportSettings(graph="genai"))


def test_nan_weights_are_not_exported(tiny_bert_folder: Path, tmp_path: Path) -> None:
    model = load_model(tiny_bert_folder)
    model.network.classifier.bias[0] = float("inf")
    with pytest.raises(QuantizeError, match=r"classifier\.bias \(1\)"):
        export_onnx(model, tmp_path)
    assert not (tmp_path / MODEL_FILE).exists()


class Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(200, 64)
        self.lstm = torch.nn.LSTM(64, 64, 2, batch_first=True)
        self.lm_head = torch.nn.Linear(64, 200, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.lstm(self.embedding(input_ids))[0])


@pytest.mark.parametrize("scheme", [None, *sorted(SCHEMES)])
def test_an_own_lstm_module_exports_and_verifies_in_every_scheme(scheme: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model(Recurrent().eval().requires_grad_(False), None, "causal-lm", "own", {}, factory="tests:own")
    if scheme not in (None, "fp16", "bf16") and Machine.here().saturates:
        pytest.skip("the integer LSTM saturates on a processor without VNNI, which verify finds")
    if scheme is not None:
        QuantizeStage(scheme=scheme).apply(model, calibration(model))
        lstm = {f"lstm.weight_{kind}_l{layer}" for kind in ("ih", "hh") for layer in (0, 1)}
        assert set(model.integers) == (set() if model.half else {"embedding.weight", *lstm})
    export_onnx(model, tmp_path)
    assert [c for c in verify(model, tmp_path) if not c.passed] == []
