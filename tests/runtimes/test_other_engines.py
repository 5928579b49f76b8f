"""torch.compile, OpenVINO and llama.cpp answer as torch does, and refuse in words what they cannot do."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from squeeze.errors import DeviceError, RuntimeUnavailable
from squeeze.exporter import ExportSettings, export_onnx
from squeeze.model import load_model
from squeeze.runtimes import Session, open_session, possible_runtimes

CLOSE = 1e-4
JIT = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
"""TorchInductor uses what torch itself calls deprecated."""


def batch_of(ids: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


IDS = np.random.default_rng(0).integers(0, 50, (2, 9), dtype=np.int64)


@pytest.fixture(scope="module")
def bert_export(tiny_bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "bert"
    folder.mkdir()
    export_onnx(load_model(tiny_bert_folder), folder, ExportSettings(graph="dynamo"))
    return folder


def test_openvino_answers_a_batch_as_torch_does(tiny_bert_folder: Path, bert_export: Path) -> None:
    pytest.importorskip("openvino")
    answers = open_session(bert_export, "openvino", threads=1).forward(batch_of(IDS))
    assert np.abs(answers - open_session(tiny_bert_folder, "torch").forward(batch_of(IDS))).max() < CLOSE


def test_openvino_reads_its_own_format_and_is_the_first_choice_for_it(bert_export: Path, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    openvino.save_model(openvino.Core().read_model(bert_export / "model.onnx"), tmp_path / "openvino_model.xml", False)
    assert possible_runtimes(tmp_path) == ("openvino",)
    answers = open_session(tmp_path, "openvino", threads=1).forward(batch_of(IDS))
    assert np.abs(answers - open_session(bert_export, "onnxruntime").forward(batch_of(IDS))).max() < CLOSE


def test_openvino_refuses_what_it_cannot_do(bert_export: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(RuntimeUnavailable, match="does not generate in OpenVINO"):
        open_session(bert_export, "openvino").generate(IDS, 2)
    with pytest.raises(DeviceError, match="on the CPU only, not on cuda"):
        open_session(bert_export, "openvino", device="cuda")
    with pytest.raises(RuntimeUnavailable, match="has neither model.onnx nor openvino_model.xml"):
        open_session(tmp_path, "openvino", check=False)
    (tmp_path / "openvino_model.xml").write_text("<net>")
    with pytest.raises(RuntimeUnavailable, match="OpenVINO cannot open .*openvino_model.xml"):
        open_session(tmp_path, "openvino")


@JIT
def test_a_compiled_network_answers_as_the_eager_one(tiny_bert_folder: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    answers = open_session(tiny_bert_folder, "torch.compile", threads=1).forward(batch_of(IDS))
    assert np.abs(answers - open_session(tiny_bert_folder, "torch").forward(batch_of(IDS))).max() < CLOSE


@JIT
def test_compiling_without_a_compiler_names_what_to_install(
    tiny_bert_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeUnavailable, match=r"finds none\. Install g\+\+"):
        open_session(tiny_bert_folder, "torch.compile")


def test_torch_computes_in_the_type_that_it_is_told(tiny_bert_folder: Path) -> None:
    exact, rounded = (
        open_session(tiny_bert_folder, "torch", dtype=dtype).forward(batch_of(IDS)) for dtype in (None, "bfloat16")
    )
    assert 0 < np.abs(exact - rounded).max() < 0.1


@pytest.mark.parametrize("runtime", ["onnxruntime", "llama.cpp"])
def test_a_runtime_whose_files_hold_their_types_takes_no_other(runtime: str, bert_export: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match=f"{runtime} computes in the types that the artifact's files hold"):
        open_session(bert_export, runtime, dtype="bfloat16")


def test_an_unknown_type_is_answered_with_the_nearest(bert_export: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match="Did you mean 'bfloat16'"):
        open_session(bert_export, "torch", dtype="bfloat")


def llama(smollm2: Path) -> Session:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra that takes minutes to compile")
    return open_session(smollm2, "llama.cpp")


def test_llama_cpp_generates_the_tokens_of_torch_on_the_real_model(smollm2: Path) -> None:
    session = llama(smollm2)
    ids = np.asarray([load_model(smollm2).tokenizer("The capital of France is")["input_ids"]], np.int64)
    expected = open_session(smollm2, "torch").generate(ids, 6)
    for _ in range(2):
        done = session.generate(ids, 6)
        assert done.tokens[:, :4].tolist() == expected.tokens[:, :4].tolist()
        assert len(done.token_seconds) == 5


def test_llama_cpp_gives_the_logits_of_every_position(smollm2: Path) -> None:
    session = llama(smollm2)
    ids = np.arange(1000, 1040, dtype=np.int64)[None]
    ours, theirs = open_session(smollm2, "torch").forward(batch_of(ids)), session.forward(batch_of(ids))
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(ours) < 0.05, "llama.cpp rounds activations to 8 bits"


def test_llama_cpp_refuses_batches_and_padding(smollm2: Path) -> None:
    session = llama(smollm2)
    with pytest.raises(RuntimeUnavailable, match="one text at a time"):
        session.generate(IDS, 2)
    with pytest.raises(RuntimeUnavailable, match="without padding"):
        session.forward({"input_ids": IDS, "attention_mask": np.zeros_like(IDS)})
