"""Verification must fail where an export is wrong: each kind of damage is found by the check that is meant for it."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from squeeze.compress.quantize import QuantizeStage
from squeeze.exporter import MODEL_FILE, export_onnx
from squeeze.model import Model, load_model
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
