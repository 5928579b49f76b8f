"""Layers of different precision in one export, those included that an exporter joins to one product."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from squeeze.compress.quantize import QuantizeStage
from squeeze.exporter import MODEL_FILE, ExportSettings, export_onnx
from squeeze.integers import Grid, round_to_nearest
from squeeze.model import Model, load_model
from squeeze.verification import verify

BATCHES = [
    {"input_ids": np.random.default_rng(0).integers(4, 200, (4, 24)), "attention_mask": np.ones((4, 24), np.int64)}
]


def mixed(folder: Path, scheme: str, keep: tuple[str, ...], eight: tuple[str, ...]) -> Model:
    """A model quantized by `scheme` with `keep` in float and, of the rest, layers whose names end as in `eight` in 8-bit blocks."""
    model, source = load_model(folder), load_model(folder)
    QuantizeStage(scheme=scheme, keep=keep).apply(model, BATCHES)
    floats, now = dict(source.network.named_parameters()), dict(model.network.named_parameters())
    for name in model.integers:
        if name.removesuffix(".weight").endswith(eight) and model.integers[name].bits == 4:
            integer = round_to_nearest(
                floats[name], 64, unsigned=Grid().unsigned, transposed=model.integers[name].transposed
            )
            model.integers[name] = integer
            now[name].copy_(integer.dequantize())
    return model


@pytest.mark.parametrize(
    ("scheme", "keep", "eight"),
    [
        ("int4-weight", (), ("v_proj", "up_proj", "1.self_attn.q_proj")),
        ("int4-weight", ("*.k_proj", "*.gate_proj"), ("v_proj",)),
        ("int8-static", ("*.1.*.v_proj", "*.0.*.q_proj", "*.0.*.down_proj"), ()),
    ],
)
@pytest.mark.parametrize("graph", ["genai", "dynamo"])
@pytest.mark.parametrize("family", ["tiny_llama_folder", "tiny_qwen2_folder"])
@pytest.mark.vnni
def test_a_decoder_of_mixed_precision_exports_and_verifies(
    family: str, graph: Any, scheme: str, keep: tuple[str, ...], eight: tuple[str, ...],
    request: pytest.FixtureRequest, tmp_path: Path,
) -> None:  # fmt: skip
    model = mixed(request.getfixturevalue(family), scheme, keep, eight)
    if eight:
        assert {w.bits for n, w in model.integers.items() if "_proj" in n} == {4, 8}
    export_onnx(model, tmp_path, ExportSettings(graph=graph))
    assert [c for c in verify(model, tmp_path) if not c.passed] == []
    exported = ir.load(tmp_path / MODEL_FILE)
    placed = [name for place in json.loads(exported.metadata_props["squeeze.integers"]) for name in place["layers"]]
    assert set(placed) == set(model.integers)
    assert onnxruntime.InferenceSession(tmp_path / MODEL_FILE, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "int4-weight"])
@pytest.mark.parametrize("family", ["tiny_bert_folder", "tiny_gpt2_folder"])
@pytest.mark.vnni
def test_an_encoder_and_a_decoder_with_joined_weights_leave_layers_in_float(
    family: str, scheme: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    keep = ("*.0.*.query", "*.1.intermediate.*") if "bert" in family else ("*.0.attn.c_attn", "*.1.mlp.c_proj")
    model = mixed(request.getfixturevalue(family), scheme, keep, ("value", "mlp.c_fc"))
    export_onnx(model, tmp_path)
    assert [c for c in verify(model, tmp_path) if not c.passed] == []
