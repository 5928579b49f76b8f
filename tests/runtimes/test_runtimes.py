"""Sessions on real tiny models: one answer in every runtime, and a plain refusal where there can be none."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from squeeze.errors import ArtifactError, DeviceError, RuntimeUnavailable
from squeeze.exporter import ExportSettings, export_onnx
from squeeze.model import load_model
from squeeze.runtimes import (
    GENAI_CONFIG,
    MODEL_FILE,
    RUNTIMES,
    OnnxSession,
    Session,
    check_external_data,
    cores,
    default_runtimes,
)
from squeeze.runtimes import open_session as open_it

CLOSE = 1e-4
HAS_CUDA = {
    "torch": torch.cuda.is_available(),
    "onnxruntime": "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    "onnxruntime-genai": onnxruntime_genai.is_cuda_available(),
}


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    """A torch session sets the threads of its whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama_export(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By onnxruntime-genai's builder: opens in both of ONNX's runtimes."""
    return exported(tiny_llama_folder, tmp_path_factory.mktemp("runtimes") / "llama", "genai")


@pytest.fixture(scope="module")
def gpt2_export(tiny_gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By torch's exporter, with a cache that ONNX Runtime alone opens."""
    return exported(tiny_gpt2_folder, tmp_path_factory.mktemp("runtimes") / "gpt2", "dynamo")


@pytest.fixture(scope="module")
def bert_export(tiny_bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny_bert_folder, tmp_path_factory.mktemp("runtimes") / "bert", "dynamo")


def exported(source: Path, folder: Path, graph: str) -> Path:
    folder.mkdir()
    export_onnx(load_model(source), folder, ExportSettings.model_validate({"graph": graph}))
    return folder


def tokens(batch: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(4, 190, (batch, length))


FAMILIES = [("tiny_llama_folder", "llama_export"), ("tiny_gpt2_folder", "gpt2_export")]


# Forward


@pytest.mark.parametrize(("source", "export"), [*FAMILIES, ("tiny_bert_folder", "bert_export")])
def test_torch_and_onnxruntime_give_the_same_logits(source: str, export: str, request: pytest.FixtureRequest) -> None:
    ids = tokens(3, 12)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    before = open_it(request.getfixturevalue(source), "torch").forward(batch)
    after = open_it(request.getfixturevalue(export), "onnxruntime").forward(batch)
    assert (before.dtype, after.dtype) == (np.float32, np.float32)
    assert before.shape == after.shape
    assert np.abs(before).max() > 0.1
    assert np.abs(before - after).max() < CLOSE


def test_padding_changes_no_answer_in_either_runtime(tiny_bert_folder: Path, bert_export: Path) -> None:
    ids = tokens(1, 8)
    short = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    padded = {name: np.pad(array, ((0, 0), (0, 5))) for name, array in short.items()}
    for folder, runtime in ((tiny_bert_folder, "torch"), (bert_export, "onnxruntime")):
        session = open_it(folder, runtime)
        assert np.abs(session.forward(short) - session.forward(padded)).max() < CLOSE


def test_onnxruntime_genai_gives_no_logits_and_names_the_runtime_that_does(llama_export: Path) -> None:
    session = open_it(llama_export, "onnxruntime-genai")
    with pytest.raises(RuntimeUnavailable, match=r"no logits for whole texts\. Score with runtime onnxruntime\.$"):
        session.forward({"input_ids": tokens(1, 4)})


# Generation


def best_by_forward(session: Session, ids: NDArray[np.int64], new_tokens: int) -> NDArray[np.int64]:
    """Greedy decoding without any cache: the whole text again for each token."""
    for _ in range(new_tokens):
        logits = session.forward({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        ids = np.concatenate([ids, logits[:, -1].argmax(axis=-1)[:, None]], axis=1)
    return ids[:, -new_tokens:]


@pytest.mark.parametrize(("source", "export"), FAMILIES)
def test_torch_and_onnxruntime_generate_the_same_tokens_and_exactly_as_many_as_asked(
    source: str, export: str, request: pytest.FixtureRequest
) -> None:
    ids = tokens(2, 6)
    torch_session = open_it(request.getfixturevalue(source), "torch")
    expected = best_by_forward(torch_session, ids, 16)
    assert len(np.unique(expected)) > 3
    for session in (torch_session, open_it(request.getfixturevalue(export), "onnxruntime")):
        generation = session.generate(ids, 16)
        assert (generation.tokens.shape, generation.tokens.dtype) == ((2, 16), np.int64)
        assert generation.tokens.tolist() == expected.tolist()
        assert len(generation.token_seconds) == 15
        assert generation.first_token_seconds > 0


def test_onnxruntime_genai_generates_the_tokens_of_torch(tiny_llama_folder: Path, llama_export: Path) -> None:
    ids = tokens(2, 6)
    expected = open_it(tiny_llama_folder, "torch").generate(ids, 16).tokens
    generation = open_it(llama_export, "onnxruntime-genai").generate(ids, 16)
    assert (generation.tokens.shape, len(generation.token_seconds)) == ((2, 16), 15)
    assert generation.tokens.tolist() == expected.tolist()


def test_a_session_generates_alike_twice_and_one_token_alone(tiny_llama_folder: Path, llama_export: Path) -> None:
    ids = tokens(1, 5)
    for folder, runtime in (
        (tiny_llama_folder, "torch"),
        (llama_export, "onnxruntime"),
        (llama_export, "onnxruntime-genai"),
    ):
        session = open_it(folder, runtime)
        first, again, one = (session.generate(ids, count) for count in (4, 4, 1))
        assert first.tokens.tolist() == again.tokens.tolist()
        assert one.tokens.tolist() == first.tokens[:, :1].tolist()
        assert one.token_seconds == ()


def successor(folder: Path, *, after: list[int]) -> Path:
    """A decoder without a cache whose likeliest token after n is `after[n]`: one Gather from a table."""
    table = numpy_helper.from_array(np.eye(len(after), dtype=np.float32)[after], "table")
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["logits"])],
        "successor",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", len(after)])],
        [table],
    )
    folder.mkdir(exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), folder / MODEL_FILE)
    return folder


def test_a_decoder_without_cache_generates_in_onnxruntime_too(tmp_path: Path) -> None:
    session = open_it(successor(tmp_path, after=[2, 0, 3, 1]), "onnxruntime")
    generation = session.generate(np.array([[1, 0], [2, 2]]), 5)
    assert generation.tokens.tolist() == [[2, 3, 1, 0, 2], [3, 1, 0, 2, 3]]


# Threads


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_session_records_the_threads_that_it_was_given(
    runtime: str, tiny_llama_folder: Path, llama_export: Path, smollm2: Path
) -> None:
    if runtime == "llama.cpp":
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra that takes minutes to compile")
    if runtime == "torch.sparse":
        pytest.skip("torch.sparse runs on GPUs only: tests/runtimes/test_sparse.py")
    folder = (
        smollm2
        if runtime == "llama.cpp"
        else tiny_llama_folder
        if runtime in ("torch", "torch.compile")
        else llama_export
    )
    session = open_it(folder, runtime, threads=1)
    assert (session.runtime, session.device, session.threads) == (runtime, "cpu", 1)
    if runtime == "torch":
        assert torch.get_num_threads() == 1
    session.close()


def test_without_a_number_there_is_one_thread_for_each_core_of_this_process(tiny_llama_folder: Path) -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert open_it(tiny_llama_folder, "torch").threads == cores() == torch.get_num_threads()


# Choosing a runtime and a device


def test_the_runtimes_of_a_folder_are_those_that_its_files_are_for_best_first(
    tiny_llama_folder: Path, llama_export: Path, bert_export: Path
) -> None:
    assert default_runtimes(llama_export) == ("onnxruntime-genai", "onnxruntime")
    assert default_runtimes(bert_export) == ("onnxruntime",)
    assert default_runtimes(tiny_llama_folder) == ("torch",)


def test_an_unknown_runtime_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailable) as caught:
        open_it(tmp_path, "onnx-runtime")
    assert str(caught.value) == (
        "runtime 'onnx-runtime' is unknown. Did you mean 'onnxruntime'? "
        "Known: llama.cpp, onnxruntime, onnxruntime-genai, openvino, torch, torch.compile, torch.sparse."
    )


def test_an_unknown_device_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"^device 'cuda:0' is unknown\. Did you mean 'cuda'\? Known: cpu, cuda\.$"):
        open_it(tmp_path, "torch", device="cuda:0")


@pytest.mark.parametrize(
    ("runtime", "mend"),
    [
        ("torch", "Install a CUDA build of torch (see pytorch.org)"),
        ("onnxruntime", "pip install onnxruntime-gpu in place of onnxruntime"),
        ("onnxruntime-genai", "pip install onnxruntime-genai-cuda"),
    ],
)
def test_cuda_without_cuda_is_an_error_that_names_the_package_and_never_a_run_on_the_cpu(
    runtime: str, mend: str, tiny_llama_folder: Path, llama_export: Path
) -> None:
    if HAS_CUDA[runtime]:
        pytest.skip(f"the installed {runtime} has CUDA")
    with pytest.raises(DeviceError) as caught:
        open_it(tiny_llama_folder if runtime == "torch" else llama_export, runtime, device="cuda")
    assert mend in str(caught.value)
    assert str(caught.value).endswith("or use --device cpu.")


@pytest.mark.skipif(HAS_CUDA["onnxruntime"], reason="the installed ONNX Runtime can open models on CUDA")
@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider':UserWarning")
def test_a_session_that_onnxruntime_moved_to_the_cpu_is_refused(
    bert_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where the CUDA build is installed and its libraries are not: the provider is listed, and quietly left out.
    monkeypatch.setattr(OnnxSession, "check_device", staticmethod(lambda device: None))
    with pytest.raises(DeviceError) as caught:
        open_it(bert_export, "onnxruntime", device="cuda")
    assert str(caught.value).startswith(f"ONNX Runtime opened {bert_export} without CUDAExecutionProvider.")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine")
@pytest.mark.parametrize("source", ["tiny_llama_folder", "tiny_bert_folder"])
def test_torch_on_cuda_answers_as_on_the_cpu(source: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(source)
    ids = tokens(2, 10)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    session = open_it(folder, "torch", device="cuda")
    assert session.device == "cuda"
    assert np.abs(session.forward(batch) - open_it(folder, "torch").forward(batch)).max() < 1e-3


def test_a_folder_without_genai_config_is_sent_to_onnxruntime(bert_export: Path) -> None:
    with pytest.raises(RuntimeUnavailable) as caught:
        open_it(bert_export, "onnxruntime-genai")
    assert str(caught.value) == f"{bert_export} has no {GENAI_CONFIG}. Open it with runtime onnxruntime."


def test_a_missing_onnxruntime_genai_is_named_with_its_install_line(
    llama_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(RuntimeUnavailable, match=r"pip install onnxruntime-genai\.$"):
        open_it(llama_export, "onnxruntime-genai")


# Weights outside the graph


@pytest.fixture
def external(bert_export: Path, tmp_path: Path) -> Path:
    """An export with its weights in weights.bin; room above it for files that it must not reach."""
    folder = tmp_path / "export"
    folder.mkdir()
    graph = onnx.load(bert_export / MODEL_FILE)
    onnx.save(graph, folder / MODEL_FILE, save_as_external_data=True, location="weights.bin")
    assert (folder / "weights.bin").stat().st_size > 100_000
    return folder


def move_weights(folder: Path, location: str) -> str:
    """Let every weight of the graph lie at `location`, and give the name of the first."""
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False)
    moved = [tensor for tensor in graph.graph.initializer if tensor.external_data]
    for tensor in moved:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    (folder / MODEL_FILE).write_bytes(graph.SerializeToString())
    return str(moved[0].name)


def test_weights_beside_the_graph_are_read(external: Path, bert_export: Path) -> None:
    ids = tokens(1, 6)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    whole, apart = (open_it(folder, "onnxruntime").forward(batch) for folder in (bert_export, external))
    assert np.array_equal(whole, apart)


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai"])
@pytest.mark.parametrize("place", ["../outside.bin", "inner/../../outside.bin", "absolute"])
def test_weights_outside_the_folder_are_refused_though_they_could_be_read(
    place: str, runtime: str, external: Path
) -> None:
    outside = external.parent / "outside.bin"
    (external / "weights.bin").rename(outside)
    (external / "inner").mkdir()
    location = str(outside) if place == "absolute" else place
    name = move_weights(external, location)
    with pytest.raises(ArtifactError) as caught:
        open_it(external, runtime)
    assert str(caught.value) == (
        f"{external / MODEL_FILE} keeps {name} at {location!r}, outside its folder. It was not read."
    )


def test_an_absolute_location_is_refused_even_inside_the_folder(external: Path) -> None:
    move_weights(external, str(external / "weights.bin"))
    with pytest.raises(ArtifactError, match="outside its folder"):
        check_external_data(external)


def test_a_link_to_weights_outside_the_folder_is_refused(external: Path) -> None:
    outside = external.parent / "outside.bin"
    (external / "weights.bin").rename(outside)
    (external / "weights.bin").symlink_to(outside)
    with pytest.raises(ArtifactError, match=r"at 'weights\.bin', outside its folder\. It was not read\.$"):
        check_external_data(external)


def test_a_folder_that_is_itself_reached_by_a_link_is_opened(external: Path) -> None:
    link = external.parent / "link"
    link.symlink_to(external)
    assert open_it(link, "onnxruntime").runtime == "onnxruntime"


def test_missing_weights_are_named(external: Path) -> None:
    (external / "weights.bin").unlink()
    name = move_weights(external, "weights.bin")
    with pytest.raises(ArtifactError) as caught:
        open_it(external, "onnxruntime")
    assert str(caught.value) == f"{external / MODEL_FILE} keeps {name} in weights.bin, which is missing."


def test_weights_of_a_branch_outside_the_folder_are_refused_too(tmp_path: Path) -> None:
    """A graph may hold graphs (If, Loop) and tensors as attributes of nodes (Constant)."""
    folder = tmp_path / "export"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(b"\0" * 4096)
    weight = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[1024], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="../outside.bin")
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1024])
    held = helper.make_graph([helper.make_node("Identity", ["hidden"], ["y"])], "held", [], [value], [weight])
    constant = helper.make_graph([helper.make_node("Constant", [], ["y"], value=weight)], "constant", [], [value])
    for branch in (held, constant):
        choose = helper.make_node("If", ["which"], ["y"], then_branch=branch, else_branch=branch)
        which = helper.make_tensor_value_info("which", TensorProto.BOOL, [])
        graph = helper.make_graph([choose], "outer", [which], [value])
        onnx.save(helper.make_model(graph), folder / MODEL_FILE)
        with pytest.raises(ArtifactError, match=r"keeps hidden at '\.\./outside\.bin', outside its folder"):
            check_external_data(folder)


def test_a_folder_without_a_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        open_it(tmp_path, "onnxruntime")
    assert str(caught.value) == f"{tmp_path} has no {MODEL_FILE}. Name the folder of an export."


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / MODEL_FILE).write_bytes(b"not a graph")
    with pytest.raises(ArtifactError) as caught:
        open_it(tmp_path, "onnxruntime")
    assert str(caught.value).startswith(f"{tmp_path / MODEL_FILE} is not an ONNX model: ")
