"""Verification must fail where an export is wrong: each kind of damage is found by the check that is meant for it."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from squeeze.compress.quantize import QuantizeStage
from squeeze.exporter import MODEL_FILE, export_onnx
from squeeze.model import Model, load_model
from squeeze.report.schema import Check
from squeeze.verification import VerifySettings, verify


@pytest.fixture(scope="module")
def exported(tiny_bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    model = load_model(tiny_bert_folder)
    QuantizeStage().apply(model)
    folder = tmp_path_factory.mktemp("exported")
    export_onnx(model, folder)
    return model, folder


def failed(model: Model, folder: Path) -> set[str]:
    return {check.name.split(" ")[0] for check in verify(model, folder) if not check.passed}


def damaged(folder: Path, tmp_path: Path, initializer_ends: str, change: object) -> Path:
    graph = onnx.load(folder / MODEL_FILE)
    tensor = next(t for t in graph.graph.initializer if t.name.endswith(initializer_ends))
    array = numpy_helper.to_array(tensor).copy()
    change(array)  # type: ignore[operator]
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(graph, tmp_path / MODEL_FILE)
    return tmp_path


@pytest.mark.vnni
def test_a_whole_export_passes_every_check(exported: tuple[Model, Path]) -> None:
    assert failed(*exported) == set()


def test_one_integer_off_by_one_is_found_and_counted(exported: tuple[Model, Path], tmp_path: Path) -> None:
    model, folder = exported

    def change(array: np.ndarray) -> None:
        array[0, 0] += 1 if array[0, 0] < 100 else -1

    broken = damaged(folder, tmp_path, "intermediate.dense.weight.integers", change)
    check = next(c for c in verify(model, broken) if c.name == "integer bytes that differ")
    assert not check.passed
    assert check.value == 1


def test_a_wrong_scale_is_found(exported: tuple[Model, Path], tmp_path: Path) -> None:
    def change(array: np.ndarray) -> None:
        array *= 1.5

    assert failed(exported[0], damaged(exported[1], tmp_path, "output.dense.weight.scale", change)) >= {"integer"}


def test_a_wrong_bias_shows_in_the_outputs(exported: tuple[Model, Path], tmp_path: Path) -> None:
    def change(array: np.ndarray) -> None:
        array += 5

    assert "outputs" in failed(exported[0], damaged(exported[1], tmp_path, "classifier.bias", change))


def test_an_unused_copy_of_the_integers_does_not_count(exported: tuple[Model, Path], tmp_path: Path) -> None:
    model, folder = exported
    graph = onnx.load(folder / MODEL_FILE)
    node = next(n for n in graph.graph.node if n.op_type == "MatMulInteger")
    original = next(t for t in graph.graph.initializer if t.name == node.input[1])
    graph.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(original), "other"))
    node.input[1] = "other"
    onnx.save(graph, tmp_path / MODEL_FILE)
    check = next(c for c in verify(model, tmp_path) if c.name == "integer matrices missing")
    assert check.value == 1
    assert not check.passed


def test_the_tolerance_is_a_setting(tiny_llama_folder: Path, tmp_path: Path) -> None:
    model = load_model(tiny_llama_folder)
    export_onnx(model, tmp_path)
    strict = verify(model, tmp_path, VerifySettings(tolerance=1e-12))
    assert any(not c.passed for c in strict)
    assert all(c.limit == 1e-12 for c in strict if c.name.startswith("outputs"))


@pytest.fixture(scope="module")
def static(tiny_bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    model = load_model(tiny_bert_folder)
    rng = np.random.default_rng(0)
    batches = [{"input_ids": rng.integers(0, 100, (4, 24)), "attention_mask": np.ones((4, 24), np.int64)}]
    QuantizeStage(scheme="int8-static").apply(model, batches)
    folder = tmp_path_factory.mktemp("static")
    export_onnx(model, folder)
    return model, folder


def input_check(model: Model, folder: Path) -> Check:
    return next(c for c in verify(model, folder) if c.name == "input ranges that differ")


def test_fixed_input_ranges_are_compared_with_the_artifacts(static: tuple[Model, Path]) -> None:
    check = input_check(*static)
    assert (check.passed, check.value) == (True, 0)
    assert "13 layers' inputs" in check.detail


@pytest.mark.parametrize(
    ("end", "change"),
    [
        ("query.weight.input_scale", lambda array: np.multiply(array, 1.001, out=array)),
        ("query.weight.input_zero_point", lambda array: np.add(array, 1, out=array)),
        ("query.weight.input_factor", lambda array: np.multiply(array[3:4], 1.001, out=array[3:4])),
    ],
)
def test_a_range_or_a_divisor_that_is_a_little_off_is_found_though_the_outputs_hide_it(
    end: str, change: object, static: tuple[Model, Path], tmp_path: Path
) -> None:
    """Query, key and value read one rounded tensor: three layers are wrong."""
    model, folder = static
    broken = damaged(folder, tmp_path, end, change)
    check = input_check(model, broken)
    assert (check.passed, check.value) == (False, 3)
    assert "query" in check.detail or "key" in check.detail


def test_inputs_rounded_as_they_come_where_their_range_is_fixed_are_found(
    static: tuple[Model, Path], exported: tuple[Model, Path]
) -> None:
    assert input_check(static[0], exported[1]).value == 13


def test_a_graph_that_the_runtime_refuses_is_a_failed_check_with_its_words(
    exported: tuple[Model, Path], tmp_path: Path
) -> None:
    model, folder = exported
    graph = onnx.load(folder / MODEL_FILE)
    next(n for n in graph.graph.node if n.op_type == "Softmax" or n.op_type == "Gelu").op_type = "NoSuchOperator"
    onnx.save(graph, tmp_path / MODEL_FILE)
    check = next(c for c in verify(model, tmp_path) if c.name == "opens in onnxruntime")
    assert not check.passed
    assert "NoSuchOperator" in check.detail


@pytest.mark.vnni
def test_a_runtime_that_fails_on_an_input_is_a_failed_check_for_that_input(
    exported: tuple[Model, Path], tmp_path: Path
) -> None:
    """A table of positions cut short: long inputs fail inside ONNX Runtime, short ones pass."""
    model, folder = exported
    graph = onnx.load(folder / MODEL_FILE)
    tensor = next(t for t in graph.graph.initializer if "position_embeddings" in t.name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:10].copy(), tensor.name))
    onnx.save(graph, tmp_path / MODEL_FILE)
    checks = {c.name: c for c in verify(model, tmp_path)}
    assert checks["outputs 1×7"].passed
    assert not checks["outputs 1×33"].passed
    assert "indices" in checks["outputs 1×33"].detail
    assert checks["outputs 1×33"].value > 1e300


def test_a_bug_of_ours_keeps_its_traceback(exported: tuple[Model, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(model: Model, cache: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("squeeze.simulation.simulation", bug)
    with pytest.raises(ZeroDivisionError):
        verify(*exported)


def test_a_decoder_whose_generation_fails_is_a_failed_check(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_llama_folder)
    export_onnx(model, tmp_path)

    def fails(*_: object) -> None:
        raise RuntimeError("the cache is\n  too small")

    monkeypatch.setattr("squeeze.runtimes.onnx_session.OnnxSession.generate", fails)
    check = next(c for c in verify(model, tmp_path) if c.name == "greedy tokens, onnxruntime")
    assert (check.passed, check.detail) == (False, "RuntimeError: the cache is too small")
