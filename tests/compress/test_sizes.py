"""Bytes computed beforehand against the files: artifacts to the byte, exports but for the graph around the weights."""

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from squeeze.artifact import Artifact
from squeeze.compress.quantize import QuantizeStage
from squeeze.compress.sizes import artifact_bytes
from squeeze.data import DataSettings, Splits, load_data
from squeeze.exporter import MODEL_FILE, ExportSettings
from squeeze.model import ModelSettings, load_model, load_tokenizer
from squeeze.pipeline import export_artifact
from squeeze.pruning.settings import PruneStage, RemoveSettings
from squeeze.report.explained import GRAPH_BYTES, SizeRow, size_row, size_rows, stage_warnings
from squeeze.report.schema import Manifest
from squeeze.stages import apply_stage, keep_source
from squeeze.tasks import infer_task

PAIRS = [
    ("llama", "int8"), ("gpt2", "int8"), ("bert", "int8"), ("llama", "int8-static"), ("bert", "int8-static"), ("t5", "int8-static"),
    ("distilbert", "int8-static"), ("llama", "int4-weight"), ("qwen2", "int4-weight"), ("gpt2", "int4-weight"),
]  # fmt: skip


def made(folder: Path, stage: dict[str, Any], place: Path) -> tuple[Artifact, Artifact]:
    task = infer_task(load_model(folder).config)
    source = keep_source(ModelSettings(path=str(folder)), task, place / "0-source")
    lines = [f"Text number {n}: the cat sat on mat {n * 7}." for n in range(40)]
    rows = "\n".join(["text,label", *(f'"{line}",{n % 3}' for n, line in enumerate(lines))])
    (place / "texts.csv").write_text(rows, "utf-8")
    settings = DataSettings(
        path=str(place / "texts.csv"), label_column="label" if task == "text-classification" else None, block_size=16,
        max_length=16, splits=Splits(evaluate=2, calibration=8),
    )  # fmt: skip
    data = load_data(settings, task, load_tokenizer(source.folder), 0)
    quantized = apply_stage(QuantizeStage.model_validate(stage), source, place / "1-quantize", data)
    return quantized, export_artifact(quantized, place / "export-1-quantize", ExportSettings())


@pytest.mark.parametrize(("family", "scheme"), PAIRS)
def test_sizes_come_out_as_predicted(family: str, scheme: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    quantized, export = made(request.getfixturevalue(f"tiny_{family}_folder"), {"scheme": scheme}, tmp_path)
    assert quantized.manifest.record.predicted_bytes == quantized.manifest.weight_bytes
    assert size_row(quantized.manifest).said == "as predicted"
    graph = onnx.load(export.folder / MODEL_FILE)
    weights = sum(numpy_helper.to_array(t).nbytes for t in graph.graph.initializer)
    predicted = export.manifest.record.predicted_bytes
    assert weights == pytest.approx(predicted, rel=0.02)
    assert 0 < export.manifest.weight_bytes - weights < GRAPH_BYTES
    assert list(stage_warnings(export.manifest)) == []


@pytest.mark.parametrize(("family", "scheme"), [("bert", "int8"), ("bert", "int8-static"), ("llama", "int8-static")])
def test_outlier_channels_are_counted(family: str, scheme: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    stage = {"scheme": scheme, "outliers": 4}
    quantized, export = made(request.getfixturevalue(f"tiny_{family}_folder"), stage, tmp_path)
    assert quantized.manifest.record.predicted_bytes == quantized.manifest.weight_bytes
    weights = sum(numpy_helper.to_array(t).nbytes for t in onnx.load(export.folder / MODEL_FILE).graph.initializer)
    assert weights == pytest.approx(export.manifest.record.predicted_bytes, rel=0.02)


def test_a_float_export_is_four_bytes_a_weight(tiny_bert_folder: Path, tmp_path: Path) -> None:
    source = keep_source(ModelSettings(path=str(tiny_bert_folder)), "text-classification", tmp_path / "0-source")
    export = export_artifact(source, tmp_path / "export-0-source", ExportSettings())
    assert export.manifest.record.predicted_bytes == 4 * export.manifest.parameters
    assert size_rows((source.manifest, export.manifest)) == [size_row(export.manifest)]


def test_heads_that_an_export_leaves_out_are_not_counted(tiny_bert_folder: Path, tmp_path: Path) -> None:
    source = keep_source(ModelSettings(path=str(tiny_bert_folder)), "text-classification", tmp_path / "0-source")
    whole = export_artifact(source, tmp_path / "export-0-source", ExportSettings())
    stage = PruneStage(remove=RemoveSettings(heads=0.5, criterion="random"))
    pruned = apply_stage(stage, source, tmp_path / "1-prune")
    export = export_artifact(pruned, tmp_path / "export-1-prune", ExportSettings())
    graph = onnx.load(export.folder / MODEL_FILE)
    weights = sum(numpy_helper.to_array(t).nbytes for t in graph.graph.initializer)
    assert export.manifest.record.predicted_bytes == pytest.approx(weights, rel=0.02)
    assert export.manifest.record.predicted_bytes < whole.manifest.record.predicted_bytes
    assert export.manifest.nonzero_parameters < export.manifest.parameters < pruned.manifest.parameters
    assert list(stage_warnings(export.manifest)) == []


def test_a_prediction_does_not_look_at_what_the_file_holds(tiny_bert_folder: Path) -> None:
    model = load_model(tiny_bert_folder)
    QuantizeStage().apply(model)
    before = artifact_bytes(model)
    name = next(iter(model.integers))
    del model.integers[name]
    assert artifact_bytes(model) > before  # four bytes where one was


@pytest.mark.parametrize(
    ("predicted", "measured", "is_graph", "is_off"),
    [
        (1_000_000, 1_019_000, False, False),
        (1_000_000, 1_021_000, False, True),
        (1_000_000, 979_000, False, True),
        (1_000_000, 1_400_000, True, False),
        (100_000_000, 101_900_000, True, False),
        (100_000_000, 102_100_000, True, True),
        (100_000_000, 200_000_000, True, True),
    ],
)
def test_two_percent_is_the_most_that_goes_without_a_warning(
    predicted: int, measured: int, is_graph: bool, is_off: bool
) -> None:
    assert SizeRow("export-1-quantize", predicted, measured, is_graph).is_off is is_off


def test_the_warning_names_the_artifact_and_both_sizes(make: Any) -> None:
    from squeeze.report.noise import warnings
    from squeeze.report.schema import StageRecord

    record = StageRecord(kind="export", settings={}, seconds=1, layers=(), notes=(), predicted_bytes=100_000_000)
    off: Manifest = make.result.model_copy(update={"record": record, "weight_bytes": 140_000_000})
    (told,) = warnings(make.report(manifests=(make.source, off)))
    assert told.replace("\u00a0", " ").startswith(
        "export-1-quantize: its weights take 140 MB, but 100 MB were computed beforehand (+40.00 %)"
    )
