"""LSTM layers on ONNX Runtime's integer kernel: the artifact's bytes, gates in order, answers as the simulation gives them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from squeeze.compress.qat import QatStage
from squeeze.compress.quantize import QuantizeStage
from squeeze.errors import ExportError
from squeeze.exporter import MODEL_FILE, export_onnx
from squeeze.exporter.passes import remove_unused
from squeeze.exporter.placement import CONTRIB, Placer
from squeeze.exporter.recurrent import LAYOUT, lstm, lstm_integers, lstm_scales, place_lstm
from squeeze.exporter.trace import traced
from squeeze.integers import IntegerWeight, round_to_nearest
from squeeze.model import Model
from squeeze.recurrent import kernel_groups, simulate
from squeeze.verification import verify

ROWS = 50
FORMS: list[dict[str, Any]] = [
    {"batch_first": True},
    {"bidirectional": True, "num_layers": 2},
    {"batch_first": True, "bidirectional": True, "bias": False},
    {"hidden_size": 100, "num_layers": 3},  # too large for torch to fold its matrices, and an odd number of columns
]


class Tagger(nn.Module):
    """Every token from all of the text, so that states, both directions and lengths matter."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], *, hidden_size: int = 24, **form: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ROWS, 40)
        self.recurrent = kind(40, hidden_size, **form)

    def forward(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(input_ids)
        first = self.recurrent.batch_first
        y, states = self.recurrent(x if first else x.transpose(0, 1))
        y = y if first else y.transpose(0, 1)
        end = torch.stack(states).sum(dim=(0, 1)) if isinstance(states, tuple) else states.sum(dim=0)
        whole = torch.cat([end, end], dim=1) if self.recurrent.bidirectional else end
        return (y + whole.unsqueeze(1)) * (input_ids > 2).unsqueeze(2)


def tagger(kind: type[nn.LSTM] | type[nn.GRU] = nn.LSTM, **form: Any) -> Model:
    torch.manual_seed(0)
    network = Tagger(kind, **form).eval().requires_grad_(False)
    return Model(network, None, "feature-extraction", "own", {}, factory="tests:own")


def quantized(model: Model) -> dict[str, IntegerWeight]:
    """Every LSTM matrix as integers, which the network then holds the values of."""
    parameters = dict(model.network.named_parameters())
    names = [name for group in kernel_groups(model.network) for name in group]
    integers = {name: round_to_nearest(parameters[name], None, unsigned=False) for name in names}
    for name, integer in integers.items():
        parameters[name].copy_(integer.dequantize())
    return integers


@contextmanager
def placed(model: Model, integers: dict[str, IntegerWeight]) -> Iterator[tuple[ir.Model, Placer, int]]:
    """The traced graph with its LSTM nodes on the integer kernel, what wrote it, and how many nodes were replaced."""
    with traced(model, 23) as graph:
        placer = Placer(graph, integers)
        count = sum(place_lstm(placer, node) for node in list(graph.graph) if node.op_type == "LSTM")
        graph.graph.opset_imports.setdefault(CONTRIB, 1)
        remove_unused(graph)
        yield graph, placer, count


def run(graph: ir.Model, ids: Tensor, folder: Path, threads: int = 1) -> Tensor:
    ir.save(graph, folder / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(folder / "m.onnx", options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, ROWS, (batch, length), generator=torch.Generator().manual_seed(length))


def distance(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("form", FORMS)
def test_recurrent_layers_export_in_float_for_every_length(
    kind: type[nn.LSTM] | type[nn.GRU], form: dict[str, Any], tmp_path: Path
) -> None:
    model = tagger(kind, **form)
    expected = [model.network(ids(*shape)) for shape in ((1, 1), (3, 12))]
    with traced(model, 23) as graph:
        for shape, wanted in zip(((1, 1), (3, 12)), expected, strict=True):
            assert distance(run(graph, ids(*shape), tmp_path), wanted) < 1e-5
    assert "forward" not in vars(model.network.recurrent)


@pytest.mark.vnni
@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_computes_what_the_simulation_does(form: dict[str, Any], tmp_path: Path) -> None:
    model = tagger(**form)
    integers = quantized(model)
    layers = model.network.recurrent.num_layers
    with placed(model, integers) as (graph, _, count):
        assert count == layers
        assert not any(node.op_type == "LSTM" for node in graph.graph)
        for shape in ((1, 1), (1, 33), (3, 12)):
            found = run(graph, ids(*shape), tmp_path)
            exact = model.network(ids(*shape))
            network = tagger(**form).network
            network.load_state_dict(model.network.state_dict())
            simulate(network.recurrent, "recurrent", integers, {})
            simulated = network(ids(*shape))
            rounding = distance(simulated, exact)
            assert rounding > 2e-3
            assert distance(found, simulated) < 0.05 * rounding


@pytest.mark.vnni
def test_several_threads_round_parts_of_a_batch_apart_and_stay_near(tmp_path: Path) -> None:
    model = tagger(batch_first=True)
    integers = quantized(model)
    exact = model.network(ids(3, 29))
    with placed(model, integers) as (graph, _, _):
        found = [run(graph, ids(3, 29), tmp_path, threads) for threads in (1, 3)]
    simulate(model.network.recurrent, "recurrent", integers, {})
    simulated = model.network(ids(3, 29))
    rounding = distance(simulated, exact)
    assert distance(found[0], simulated) < 0.05 * rounding < distance(found[1], simulated) < rounding


@pytest.mark.parametrize("form", FORMS[1::2])
def test_the_graph_holds_the_bytes_of_the_artifact_and_no_float_matrix(form: dict[str, Any]) -> None:
    model = tagger(**form)
    integers = quantized(model)
    with placed(model, integers) as (graph, placer, _):
        found = set()
        for place in placer.places:
            assert place.layout == LAYOUT
            stored = {
                part: graph.graph.initializers[place.initializer.removesuffix("integers") + part].const_value.numpy()
                for part in ("integers", "scale")
            }
            parts = zip(place.layers, lstm_integers(stored["integers"]), lstm_scales(stored["scale"]), strict=True)
            for name, array, scale in parts:
                assert array.dtype == np.int8
                assert np.array_equal(array, integers[name].integers.numpy())
                assert np.array_equal(scale, integers[name].scale.numpy())
                found.add(name)
        assert found == set(integers)
        floats = [
            v for v in graph.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and v.const_value.size > 999
        ]
        assert [v.name for v in floats] == ["network.embedding.weight"]


def test_the_layout_orders_gates_as_onnx_does() -> None:
    matrix = torch.arange(8.0).repeat(3, 1).T.contiguous() + 1  # rows i i f f g g o o
    array = lstm([round_to_nearest(matrix, None, unsigned=False)])
    assert array["integers"].shape == (1, 3, 8)
    gates = np.round(array["scale"][0] * 127).astype(int) - 1
    assert gates.tolist() == [0, 1, 6, 7, 2, 3, 4, 5]  # i i o o f f c c


def test_a_matrix_that_differs_in_one_weight_leaves_its_layer_alone() -> None:
    model = tagger()
    integers = quantized(model)
    model.network.recurrent.weight_ih_l0[5, 5] += 1e-3
    model.network.recurrent.weight_hh_l0[7, 7] += 1e-3
    with placed(model, integers) as (graph, _, count):
        assert count == 0
        assert any(node.op_type == "LSTM" for node in graph.graph)


def test_half_a_layer_in_integers_is_an_error_that_names_it() -> None:
    model = tagger()
    integers = quantized(model)
    del integers["recurrent.weight_hh_l0"]
    with (
        pytest.raises(ExportError, match="recurrent.weight_ih_l0 is integers, but not every matrix"),
        placed(model, integers),
    ):
        pass


def test_blocks_are_refused_by_name() -> None:
    model = tagger()
    integers = quantized(model)
    name = "recurrent.weight_hh_l0"
    integers[name] = round_to_nearest(model.network.recurrent.weight_hh_l0, 16, unsigned=True)
    model.network.recurrent.weight_hh_l0.copy_(integers[name].dequantize())
    with pytest.raises(ExportError, match=f"{name} is not int8 with one scale per row"), placed(model, integers):
        pass


@pytest.mark.vnni
@pytest.mark.parametrize("form", FORMS)
def test_an_export_verifies_and_a_gate_or_scale_out_of_place_does_not(form: dict[str, Any], tmp_path: Path) -> None:
    model = tagger(**form)
    QuantizeStage().apply(model)
    notes = export_onnx(model, tmp_path)
    assert (
        f"{model.network.recurrent.num_layers} LSTM layers on DynamicQuantizeLSTM, states rounded at each step" in notes
    )
    checks = verify(model, tmp_path)
    assert [check for check in checks if not check.passed] == []
    assert all(check.value < 0.05 * check.limit for check in checks if check.name.startswith("outputs"))
    good = ir.load(tmp_path / MODEL_FILE)
    place = next(name for name in good.graph.initializers if "weight_hh_l0" in name and name.endswith(".integers"))
    for name in (place, place.replace(".integers", ".scale")):
        graph = ir.from_proto(ir.to_proto(good))
        value = graph.graph.initializers[name]
        i, o, f, c = np.split(value.const_value.numpy(), 4, axis=-1)
        value.const_value = ir.tensor(np.concatenate([i, f, o, c], axis=-1), name=name)
        ir.save(graph, tmp_path / MODEL_FILE)
        failed = [check.name for check in verify(model, tmp_path) if not check.passed]
        assert "integer bytes that differ" in failed


def test_training_on_leaves_the_matrices_of_an_lstm_what_their_integers_say() -> None:
    model = tagger()
    QuantizeStage().apply(model)
    bias = model.network.recurrent.bias_ih_l0.clone()
    QatStage(learning_rate=1e-3).apply(model, [{"input_ids": ids(4, 9).numpy()}] * 3, teacher=tagger())
    assert not torch.equal(model.network.recurrent.bias_ih_l0, bias)
    for name, integer in model.integers.items():
        assert torch.equal(model.network.get_parameter(name), integer.dequantize())
