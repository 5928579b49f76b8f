"""Another artifact of an architecture that was traced already: the same file as by a trace of its own."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from squeeze.compress.quantize import QuantizeStage
from squeeze.exporter import MODEL_FILE, ExportSettings, export_onnx, trace, traced_before
from squeeze.model import Model, load_model
from squeeze.provenance import digest_file


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The source of every network that torch traces from here on; nothing was traced before."""
    seen: list[str] = []
    export = torch.onnx.export

    def counted(network: torch.nn.Module, *rest: object, **more: object) -> object:
        seen.append(type(network).__name__)
        return export(network, *rest, **more)

    monkeypatch.setattr(trace.torch.onnx, "export", counted)
    monkeypatch.setattr(traced_before, "_TRACES", traced_before.OrderedDict())
    return seen


def other(folder: Path, seed: int, scheme: str | None = None) -> Model:
    """The model with other weights, ties kept."""
    model = load_model(folder)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    if scheme is not None:
        QuantizeStage(scheme=scheme).apply(model)
    return model


def exported(model: Model, folder: Path) -> str:
    folder.mkdir()
    export_onnx(model, folder, ExportSettings(graph="dynamo"))
    return digest_file(folder / MODEL_FILE)


@pytest.mark.parametrize("family", ["tiny_bert_folder", "tiny_gpt2_folder"])
def test_weights_are_put_into_a_trace_of_before_and_the_file_is_that_of_a_trace_of_its_own(
    family: str, request: pytest.FixtureRequest, tmp_path: Path, traces: list[str]
) -> None:
    folder = request.getfixturevalue(family)
    first = exported(other(folder, 1), tmp_path / "first")
    reused = exported(other(folder, 2, "int8"), tmp_path / "reused")
    assert len(traces) == 1
    traced_before._TRACES.clear()
    assert exported(other(folder, 2, "int8"), tmp_path / "own") == reused != first
    assert len(traces) == 2


def test_what_a_trace_depends_on_makes_it_another(tiny_bert_folder: Path, tmp_path: Path, traces: list[str]) -> None:
    exported(other(tiny_bert_folder, 1), tmp_path / "first")
    changed = other(tiny_bert_folder, 1)
    for module in changed.network.modules():
        if hasattr(module, "intermediate_act_fn"):
            module.intermediate_act_fn = torch.nn.ReLU()
    exported(changed, tmp_path / "relu")
    buffer = other(tiny_bert_folder, 1)
    buffer.network.bert.embeddings.token_type_ids.add_(1)
    exported(buffer, tmp_path / "buffer")
    hooked = other(tiny_bert_folder, 1)
    hooked.network.classifier.register_forward_hook(lambda module, inputs, out: 2 * out)
    exported(hooked, tmp_path / "hooked")
    assert len(traces) == 4


def test_what_is_kept_holds_no_weights(tiny_bert_folder: Path, tmp_path: Path, traces: list[str]) -> None:
    model = other(tiny_bert_folder, 1)
    weight = weakref.ref(model.network.bert.encoder.layer[0].output.dense.weight)
    exported(model, tmp_path / "first")
    assert len(traced_before._TRACES) == 1
    del model
    gc.collect()
    assert weight() is None
