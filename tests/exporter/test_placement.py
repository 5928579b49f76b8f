"""Integers in the graph: found by content, written once, byte for byte."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from squeeze.compress.quantize import QuantizeStage
from squeeze.errors import ExportError
from squeeze.exporter import MODEL_FILE, ExportSettings, export_onnx
from squeeze.exporter.placement import LAYOUTS, Placer, integers_in_graph, place_integers, scales_in_graph
from squeeze.integers import block_int8, round_to_nearest
from squeeze.model import load_model

SEED = torch.Generator().manual_seed(0)


def linear_graph(weight: np.ndarray, outputs: int) -> ir.Model:
    """y = x · W as a graph of one MatMul; W is [in, out]."""
    tensor = ir.tensor(weight, name="w")
    w = ir.Value(name="w", shape=ir.Shape(weight.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    x = ir.val("x", ir.DataType.FLOAT, ["batch", weight.shape[0]])
    node = ir.node("MatMul", [x, w], name="product")
    node.outputs[0].name, node.outputs[0].shape = "y", ir.Shape(["batch", outputs])
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], initializers=[w], opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, x: np.ndarray, tmp_path: Path) -> np.ndarray:
    ir.save(model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_layout_gives_back_the_integers(layout: str) -> None:
    unsigned = layout == "blocks"
    parts = [
        round_to_nearest(torch.randn(n, 40, generator=SEED), 16 if unsigned else None, unsigned=unsigned)
        for n in ((8, 8) if layout == "lstm" else (3, 5))  # four gates, and directions of one size
    ]
    parts = parts[:1] if layout == "rows" else parts
    array = LAYOUTS[layout](parts)["integers"]
    for found, part in zip(integers_in_graph(array, layout, parts), parts, strict=True):
        assert np.array_equal(found, part.integers.numpy())
    scales = scales_in_graph(LAYOUTS[layout](parts)["scale"], layout)
    assert np.array_equal(scales, np.concatenate([part.scale.numpy().ravel() for part in parts]))


@pytest.mark.parametrize("activations", ["block-int8", "dynamic-uint8"])
@pytest.mark.vnni
def test_a_product_of_stacked_layers_equals_the_float_product(activations: str, tmp_path: Path) -> None:
    block = 32 if activations == "block-int8" else None
    parts = {
        n: round_to_nearest(torch.randn(16, 64, generator=SEED), block, unsigned=block is not None)
        for n in ("q", "k", "v")
    }
    weight = torch.cat([p.dequantize() for p in parts.values()]).T.contiguous().numpy()
    model = linear_graph(weight, 48)
    places, _ = place_integers(model, parts, activations)
    assert [p["layers"] for p in places] == [["q", "k", "v"]]
    x = torch.randn(7, 64, generator=SEED).numpy()
    y = run(model, x, tmp_path)
    assert np.linalg.norm(y - x @ weight) / np.linalg.norm(x @ weight) < 0.02
    assert not any(v.const_value is not None and v.const_value.dtype == ir.DataType.FLOAT and v.const_value.size > 999
                   for v in model.graph.initializers.values() if v.uses())  # fmt: skip


@pytest.mark.parametrize("columns", [64, 72])
def test_the_block_kernel_rounds_activations_as_the_simulation_does(columns: int, tmp_path: Path) -> None:
    part = round_to_nearest(torch.randn(48, columns, generator=SEED), 32, unsigned=True)
    weight = part.dequantize()
    model = linear_graph(weight.T.contiguous().numpy(), 48)
    place_integers(model, {"a": part}, "block-int8")
    x = torch.randn(7, columns, generator=SEED) * torch.logspace(-2, 1, columns)
    found, simulated = run(model, x.numpy(), tmp_path), block_int8(x, 32) @ weight.T
    unrounded = float(torch.linalg.norm(x @ weight.T - simulated))
    assert float(np.linalg.norm(found - simulated.numpy())) < 0.02 * unrounded


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [64, 96, 72])
def test_four_bits_with_and_without_zero_points_multiply_as_the_simulation_does(
    symmetric: bool, columns: int, tmp_path: Path
) -> None:
    parts = {
        n: round_to_nearest(
            torch.randn(16, columns, generator=SEED) + 0.3, 32, unsigned=True, bits=4, symmetric=symmetric
        )
        for n in ("q", "k")
    }
    weight = torch.cat([p.dequantize() for p in parts.values()])
    model = linear_graph(weight.T.contiguous().numpy(), 32)
    places, _ = place_integers(model, parts, "block-int8")
    initializers = model.graph.initializers
    assert ("q+k.zero_point" in initializers) is not symmetric
    stored = initializers["q+k.integers"].const_value.numpy()
    assert stored.nbytes == 32 * -(-columns // 32) * 16
    for found, part in zip(
        integers_in_graph(stored, places[0]["layout"], list(parts.values())), parts.values(), strict=True
    ):
        assert np.array_equal(found, part.integers.numpy())
    x = torch.randn(7, columns, generator=SEED)
    found, simulated = run(model, x.numpy(), tmp_path), block_int8(x, 32) @ weight.T
    unrounded = float(torch.linalg.norm(x @ weight.T - simulated))
    assert float(np.linalg.norm(found - simulated.numpy())) < 0.05 * unrounded


def test_a_table_of_four_bits_is_refused_by_name() -> None:
    table = round_to_nearest(torch.randn(40, 32, generator=SEED), 32, unsigned=True, bits=4)
    tensor = ir.tensor(table.dequantize().numpy(), name="t")
    value = ir.Value(name="t", shape=ir.Shape((40, 32)), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    ids = ir.val("ids", ir.DataType.INT64, ["n"])
    node = ir.node("Gather", [value, ids], name="look_up")
    graph = ir.Graph([ids], [node.outputs[0]], nodes=[node], initializers=[value], opset_imports={"": 23}, name="g")
    with pytest.raises(ExportError, match="embed is a table of 4-bit rows"):
        place_integers(ir.Model(graph, ir_version=10), {"embed": table}, "block-int8")


def test_integers_without_a_place_are_an_error() -> None:
    model = linear_graph(np.ones((64, 8), np.float32), 8)
    with pytest.raises(ExportError, match="found no place in the graph, first lost"):
        place_integers(
            model, {"lost": round_to_nearest(torch.randn(8, 64, generator=SEED), None, unsigned=False)}, "dynamic-uint8"
        )


def test_a_matrix_that_differs_in_one_weight_is_not_taken_for_the_layer() -> None:
    integer = round_to_nearest(torch.randn(8, 64, generator=SEED), None, unsigned=False)
    placer = Placer(linear_graph(np.ones((64, 8), np.float32), 8), {"a": integer})
    matrix = integer.dequantize().numpy().copy()
    assert placer.find(matrix) == ("a",)
    matrix[7, 63] += 1e-6
    assert placer.find(matrix) is None


def test_layers_of_several_kinds_in_one_product_are_runs_and_the_product_is_split(tmp_path: Path) -> None:
    four, eight = (
        round_to_nearest(torch.randn(16, 64, generator=SEED), 32, unsigned=True, bits=bits, symmetric=bits == 8)
        for bits in (4, 8)
    )
    again = round_to_nearest(torch.randn(16, 64, generator=SEED), 32, unsigned=True, bits=8)
    floats = torch.randn(8, 64, generator=SEED)
    weight = torch.cat([four.dequantize(), floats, eight.dequantize(), again.dequantize()])
    model = linear_graph(weight.T.contiguous().numpy(), 56)
    integers = {"q": four, "k": eight, "v": again}
    runs = [(("q",), 16), ((), 8), (("k", "v"), 32)]
    assert Placer(model, integers).runs(weight.numpy()) == runs
    places, _ = place_integers(model, integers, "block-int8")
    assert [place["layers"] for place in places] == [["q"], ["k", "v"]]
    assert [node.op_type for node in model.graph] == ["MatMulNBits", "MatMul", "MatMulNBits", "Concat"]
    assert len({node.name for node in model.graph}) == 4
    x = torch.randn(7, 64, generator=SEED)
    found, exact = run(model, x.numpy(), tmp_path), x @ weight.T
    assert np.allclose(found[:, 16:24], exact[:, 16:24], atol=1e-4)
    assert np.linalg.norm(found - exact.numpy()) / np.linalg.norm(exact) < 0.02


def test_input_and_output_share_one_copy_where_they_are_tied(tiny_llama_folder: Path, tmp_path: Path) -> None:
    model = load_model(tiny_llama_folder)
    QuantizeStage().apply(model)
    for graph in ("dynamo", "genai"):
        folder = tmp_path / graph
        folder.mkdir()
        export_onnx(model, folder, ExportSettings(graph=graph))
        exported = ir.load(folder / MODEL_FILE)
        shared = exported.graph.initializers["model.embed_tokens.weight.integers"]
        assert {use.node.op_type for use in shared.uses()} == {"MatMulNBits", "GatherBlockQuantized"}
        assert exported.opset_imports[""] == 23


def test_a_plain_session_runs_the_encoder_with_fused_integer_kernels(tiny_bert_folder: Path, tmp_path: Path) -> None:
    model = load_model(tiny_bert_folder)
    QuantizeStage().apply(model)
    export_onnx(model, tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(tmp_path / MODEL_FILE, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    assert "MatMulInteger" not in kinds
    assert kinds.count("DynamicQuantizeMatMul") + kinds.count("MatMulIntegerToFloat") == len(
        [n for n in model.integers if "embeddings" not in n]
    )
    assert "SkipLayerNormalization" not in kinds
