"""Outlier channels in the graph: every family verifies, the kernels stay fused, and a wrong column or channel is seen."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from squeeze.compress.quantize import QuantizeStage
from squeeze.exporter import MODEL_FILE, ExportSettings, export_onnx
from squeeze.model import Model, call, load_model
from squeeze.simulation import simulation
from squeeze.verification import verify

ENCODERS = ("tiny_bert_folder", "tiny_distilbert_folder", "tiny_roberta_folder", "tiny_t5_folder")
DECODERS = ("tiny_gpt2_folder", "tiny_llama_folder", "tiny_qwen2_folder")
CASES = [(family, scheme, alpha) for family in ENCODERS for scheme in ("int8", "int8-static") for alpha in (0.0, 0.8)]
CASES += [(family, "int8-static", alpha) for family in DECODERS for alpha in (0.0, 0.8)]


def quantized(folder: Path, **settings: Any) -> Model:
    model, rng, texts = load_model(folder), np.random.default_rng(0), []
    for _ in range(2):
        ids = rng.integers(4, 200, (3, 24))
        texts.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)})
    QuantizeStage.model_validate({"outliers": 4, **settings}).apply(model, texts)
    return model


def outlier_initializers(graph: ir.Model) -> list[ir.Value]:
    return [v for name, v in graph.graph.initializers.items() if name.endswith(".outlier_columns")]


@pytest.mark.vnni
@pytest.mark.parametrize(("family", "scheme", "alpha"), CASES)
def test_every_family_exports_loads_and_verifies(
    family: str, scheme: str, alpha: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = quantized(request.getfixturevalue(family), scheme=scheme, smooth_alpha=alpha)
    export_onnx(model, tmp_path)
    checks = verify(model, tmp_path)
    assert [check for check in checks if not check.passed] == []
    compared = next(check for check in checks if check.name == "outlier weights that differ")
    kept = [w for w in model.integers.values() if w.outliers is not None]
    assert compared.detail.startswith(f"{len(kept)} matrices, {sum(4 * w.shape[0] for w in kept):,} float weights")
    graph = ir.load(tmp_path / MODEL_FILE)
    assert all(value.dtype == ir.DataType.FLOAT for value in outlier_initializers(graph))
    assert sum(v.shape[1] for v in outlier_initializers(graph)) == sum(w.shape[0] for w in kept)  # type: ignore[misc, index]


@pytest.mark.vnni
@pytest.mark.parametrize("graph", ["dynamo", "genai"])
def test_both_ways_to_a_decoder_take_them(graph: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    model = quantized(tiny_llama_folder, scheme="int8-static")
    export_onnx(model, tmp_path, ExportSettings.model_validate({"graph": graph}))
    assert [check for check in verify(model, tmp_path) if not check.passed] == []


@pytest.mark.vnni
@pytest.mark.parametrize("settings", [{"scheme": "int8"}, {"scheme": "int8-static", "smooth_alpha": 0}])
def test_with_planted_outliers_the_export_is_the_simulation_and_near_the_float_network(
    settings: dict[str, Any], tiny_bert_folder: Path, tmp_path: Path
) -> None:
    like = load_model(tiny_bert_folder)
    for layer in like.network.bert.encoder.layer:
        layer.attention.output.LayerNorm.weight.data[[3, 40]] = 80.0
        layer.intermediate.dense.weight.data[:, [3, 40]] *= 0.1
    folder = tmp_path / "planted"
    like.network.save_pretrained(folder)
    like.tokenizer.save_pretrained(folder)
    ids = np.random.default_rng(5).integers(4, 200, (3, 17))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    exact = call(like.network, like, inputs)
    errors = {}
    for count in (0, 2):
        model = quantized(folder, **settings, outliers=count)
        out = tmp_path / f"{count}"
        out.mkdir()
        export_onnx(model, out)
        session = onnxruntime.InferenceSession(out / MODEL_FILE, providers=["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}
        found = session.run(None, {n: a for n, a in inputs.items() if n in names})[0]
        simulated = call(simulation(model), model, inputs)
        errors[count] = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        assert np.linalg.norm(found - simulated) < 0.5 * np.linalg.norm(simulated - exact)
    assert errors[2] < 0.6 * errors[0]


@pytest.mark.parametrize(
    "settings", [{"scheme": "int8"}, {"scheme": "int8-static"}, {"scheme": "int8-static", "smooth_alpha": 0}]
)
def test_the_integer_kernels_stay_fused_and_inputs_are_gathered_once(
    settings: dict[str, Any], tiny_bert_folder: Path, tmp_path: Path
) -> None:
    model = quantized(tiny_bert_folder, **settings)
    export_onnx(model, tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(tmp_path / MODEL_FILE, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    assert "MatMulInteger" not in kinds
    assert kinds.count("DynamicQuantizeMatMul") + kinds.count("MatMulIntegerToFloat") == 13
    graph = ir.load(tmp_path / MODEL_FILE).graph
    gathers = [n for n in graph if n.op_type == "Gather" and (n.inputs[1].name or "").endswith(".outlier_channels")]
    # Query, key and value of a layer share one; the last layer's query reads the first token alone, and so does the pooler.
    assert len(gathers) == 4 + 5 + 1
    masks = [n for n in graph.initializers if n.endswith(".input_factor")]
    assert (len(masks) == 0) is (settings == {"scheme": "int8-static", "smooth_alpha": 0})


def test_verification_sees_a_wrong_weight_and_a_wrong_channel(tiny_bert_folder: Path, tmp_path: Path) -> None:
    model = quantized(tiny_bert_folder, scheme="int8-static")
    export_onnx(model, tmp_path)

    def differing() -> float:
        return next(c.value for c in verify(model, tmp_path) if c.name == "outlier weights that differ")

    assert differing() == 0
    for ending, changed in ((".outlier_columns", 1), (".outlier_channels", 1)):
        graph = ir.load(tmp_path / MODEL_FILE)
        name = next(n for n in graph.graph.initializers if n.endswith(f"1.output.dense.weight{ending}"))
        array = graph.graph.initializers[name].const_value.numpy().copy()  # type: ignore[union-attr]
        array.flat[0] = array.flat[0] + 1
        kept = graph.graph.initializers[name].const_value
        graph.graph.initializers[name].const_value = ir.tensor(array, name=name)
        ir.save(graph, tmp_path / MODEL_FILE)
        assert differing() == changed
        graph.graph.initializers[name].const_value = kept
        ir.save(graph, tmp_path / MODEL_FILE)
    assert differing() == 0


def test_the_file_holds_no_channel_twice(tiny_bert_folder: Path, tmp_path: Path) -> None:
    model = quantized(tiny_bert_folder, scheme="int8")
    export_onnx(model, tmp_path)
    graph = ir.load(tmp_path / MODEL_FILE)
    channels = {
        n: v.const_value.numpy() for n, v in graph.graph.initializers.items() if n.endswith(".outlier_channels")
    }  # type: ignore[union-attr]
    assert all(len(set(array.tolist())) == 4 and array.dtype == np.int64 for array in channels.values())
    kept = [w.outliers.channels for w in model.integers.values() if w.outliers is not None]
    assert all(any(torch.equal(torch.from_numpy(a.copy()), c) for a in channels.values()) for c in kept)
