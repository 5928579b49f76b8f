"""16 bits in ONNX: which tensors and operators have which type, that plain ONNX Runtime opens them, and that damage shows."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from squeeze import api
from squeeze.compress import QuantizeStage
from squeeze.exporter import MODEL_FILE, export_onnx
from squeeze.exporter.half import halve, is_exact
from squeeze.halves import Half
from squeeze.model import Model, load_model
from squeeze.runtimes import open_session
from squeeze.verification import verify

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def exported(folder: Path, place: Path, **settings: Any) -> tuple[Model, ir.Model]:
    model = load_model(folder)
    QuantizeStage(**settings).apply(model)
    export_onnx(model, place)
    return model, ir.load(place / MODEL_FILE)


def types(graph: ir.Model, least: int = 2) -> set[ir.DataType]:
    """Types of the float tensors of at least so many numbers."""
    found = {
        v.const_value.dtype
        for v in graph.graph.initializers.values()
        if v.const_value is not None and v.const_value.size >= least
    }
    return found - {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}


def test_an_encoder_computes_in_float16_from_the_table_to_the_logits(tiny_bert_folder: Path, tmp_path: Path) -> None:
    _, graph = exported(tiny_bert_folder, tmp_path, scheme="fp16")
    assert types(graph, least=1) == {FLOAT16}
    assert [v.dtype for v in graph.graph.inputs] == [ir.DataType.INT64] * 3
    assert [(v.name, v.dtype) for v in graph.graph.outputs] == [("logits", FLOAT)]
    casts = [n for n in graph.graph if n.op_type == "Cast" and n.attributes["to"].as_int() in (FLOAT, FLOAT16)]
    assert len(casts) == 1
    attentions = [n for n in graph.graph if n.op_type == "Attention"]
    assert {n.attributes["softmax_precision"].as_int() for n in attentions} == {FLOAT.value}


def test_bfloat16_is_stored_and_computed_in_float32(tiny_bert_folder: Path, tmp_path: Path) -> None:
    _, graph = exported(tiny_bert_folder, tmp_path, scheme="bf16")
    assert types(graph) == {BFLOAT16}
    for value in graph.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == BFLOAT16:
            assert {use.node.op_type for use in value.uses()} == {"Cast"}
    assert graph.metadata_props["squeeze.computes"] == "float32"


@pytest.mark.parametrize("scheme", ["fp16", "bf16"])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_the_exported_file_is_about_half(
    family: str, scheme: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    api.quantize(request.getfixturevalue(f"tiny_{family}_folder"), run, scheme=scheme)
    api.export(run)
    wide, narrow = (
        sum(
            v.const_value.nbytes
            for v in ir.load(run / name / MODEL_FILE).graph.initializers.values()
            if v.const_value is not None
        )
        for name in ("export-0-source", "export-1-quantize")
    )
    assert narrow < 0.6 * wide


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("scheme", "kind"), [("fp16", FLOAT16), ("bf16", FLOAT)])
def test_the_cache_has_the_type_that_is_computed_in(
    family: str, scheme: str, kind: ir.DataType, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    _, graph = exported(request.getfixturevalue(f"tiny_{family}_folder"), tmp_path, scheme=scheme)
    cache = [v for v in (*graph.graph.inputs, *graph.graph.outputs) if (v.name or "").startswith(("past", "present"))]
    assert len(cache) == 8
    assert {v.dtype for v in cache} == {kind}
    assert graph.graph.outputs[0].dtype == FLOAT


@pytest.mark.parametrize("scheme", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("family", "pattern"),
    [("llama", "*.down_proj"), ("llama", "*embed_tokens"), ("bert", "*.query"), ("gpt2", "*.c_fc")],
)
def test_kept_layers_stay_float32_in_the_graph(
    family: str, pattern: str, scheme: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model, graph = exported(request.getfixturevalue(f"tiny_{family}_folder"), tmp_path, scheme=scheme, keep=(pattern,))
    assert types(graph) == {FLOAT, FLOAT16 if scheme == "fp16" else BFLOAT16}
    wide = [
        v.const_value.numpy()
        for v in graph.graph.initializers.values()
        if v.const_value is not None and v.const_value.dtype == FLOAT
    ]
    weights = dict(model.network.named_parameters())
    kept = [weights[name].detach().numpy() for name in model.half.kept if weights[name].ndim == 2]  # type: ignore[union-attr]
    assert kept
    for weight in kept:
        assert any(np.array_equal(weight, array) or np.array_equal(weight.T, array) for array in wide)
    assert [c for c in verify(model, tmp_path) if not c.passed] == []


class OwnLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.lm_head = (
            nn.Embedding(50, 16),
            nn.LSTM(16, 16, 2, batch_first=True),
            nn.Linear(16, 50),
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.lstm(self.embedding(input_ids))[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("keep", [(), ("lstm",)])
def test_a_recurrent_layer_computes_in_float32_on_16_bit_weights(keep: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model(OwnLstm().eval().requires_grad_(False), None, "causal-lm", "own", {}, factory="tests:own")
    QuantizeStage(scheme="fp16", keep=keep).apply(model)
    notes = export_onnx(model, tmp_path)
    graph = ir.load(tmp_path / MODEL_FILE)
    assert "2 operators in float32" in notes[-1]
    assert types(graph) == ({FLOAT, FLOAT16} if keep else {FLOAT16})
    assert [c for c in verify(model, tmp_path) if not c.passed] == []


def test_a_number_that_differs_and_a_weight_that_is_lost_are_found(tiny_bert_folder: Path, tmp_path: Path) -> None:
    model, _ = exported(tiny_bert_folder, tmp_path, scheme="fp16")
    graph = onnx.load(tmp_path / MODEL_FILE)
    tensor = next(
        t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16 and list(t.dims) == [64, 128]
    )
    array = numpy_helper.to_array(tensor).copy()
    array[5, 7] = np.nextafter(array[5, 7], np.float16(9))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(graph, tmp_path / MODEL_FILE)
    check = next(c for c in verify(model, tmp_path) if c.name == "float16 tensors missing")
    assert (check.value, check.passed) == (1, False)
    assert "intermediate.dense.weight" in check.detail


def test_a_file_in_the_other_type_does_not_pass(tiny_bert_folder: Path, tmp_path: Path) -> None:
    model = load_model(tiny_bert_folder)
    export_onnx(model, tmp_path)
    QuantizeStage(scheme="fp16").apply(model)
    check = next(c for c in verify(model, tmp_path) if c.name == "float16 tensors missing")
    assert check.value == sum(1 for _ in model.half.tensors(model.network))  # type: ignore[union-attr]


def one_node(op: str, *constants: np.ndarray, **attributes: Any) -> ir.Model:
    x = ir.Value(name="x", shape=ir.Shape(["n", 4]), type=ir.TensorType(FLOAT))
    values = []
    for number, array in enumerate(constants):
        tensor = ir.tensor(array, name=f"c{number}")
        shape, type_ = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
        values.append(ir.Value(name=tensor.name, shape=shape, type=type_, const_value=tensor))
    node = ir.node(op, [x, *values], attributes)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(FLOAT)
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], initializers=values, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def test_a_mask_of_the_lowest_float32_becomes_the_lowest_float16_and_not_minus_infinity() -> None:
    model = one_node("Add", np.full((1, 4), np.finfo(np.float32).min, np.float32))
    halve(model, Half("float16"))
    (mask,) = (v.const_value.numpy() for v in model.graph.initializers.values() if v.uses())  # type: ignore[union-attr]
    assert mask.dtype == np.float16
    assert mask.tolist() == [[-65504.0] * 4]


def test_sums_that_cancel_are_computed_in_float32() -> None:
    model = one_node("ReduceMean", np.array([1], np.int64))
    halve(model, Half("float16"))
    (reduce,) = (node for node in model.graph if node.op_type == "ReduceMean")
    read = reduce.inputs[0]
    assert read is not None
    assert (read.dtype, reduce.outputs[0].dtype) == (FLOAT, FLOAT)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones((2, 4), np.float16)})[0].dtype == np.float32


def test_what_is_exact() -> None:
    assert is_exact(np.array([0.5, 65504], np.float32), FLOAT16)
    assert not is_exact(np.array([0.1], np.float32), FLOAT16)
    assert not is_exact(np.array([1e5], np.float32), FLOAT16)
    assert is_exact(np.array([2.0**100], np.float32), BFLOAT16)


@pytest.mark.parametrize("scheme", ["fp16", "bf16"])
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_openvino_reads_the_same_file(family: str, scheme: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    exported(request.getfixturevalue(f"tiny_{family}_folder"), tmp_path, scheme=scheme)
    batch = {"input_ids": np.arange(4, 24)[None], "attention_mask": np.ones((1, 20), np.int64)}
    batch["token_type_ids"] = np.zeros_like(batch["input_ids"])
    answers = [open_session(tmp_path, name).forward(batch) for name in ("onnxruntime", "openvino")]
    assert np.linalg.norm(answers[0] - answers[1]) < 4e-3 * np.linalg.norm(answers[0])


@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="needs ONNX Runtime with CUDA"
)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_onnx_runtime_on_a_gpu_gives_the_same_answers(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model, _ = exported(request.getfixturevalue(f"tiny_{family}_folder"), tmp_path, scheme="fp16")
    batch = {"input_ids": np.arange(4, 24)[None], "attention_mask": np.ones((1, 20), np.int64)}
    batch["token_type_ids"] = np.zeros_like(batch["input_ids"])
    answers = [open_session(tmp_path, "onnxruntime", device=device).forward(batch) for device in ("cpu", "cuda")]
    assert np.linalg.norm(answers[0] - answers[1]) < 8e-3 * np.linalg.norm(answers[0])
    assert model.half == Half("float16")
    shutil.rmtree(tmp_path)
