"""Opening models: every way in, and every broken checkpoint named with its mend."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from squeeze.compress.quantize import QuantizeStage
from squeeze.errors import ModelError
from squeeze.model import ModelSettings, load_model
from squeeze.pipeline import apply_stage, keep_source


@pytest.fixture
def broken(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A copy that each test breaks in its own way."""
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), "utf-8")


def test_a_quantized_artifact_comes_back_with_equal_integers_and_weights(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    source = keep_source(ModelSettings(path=str(tiny_llama_folder)), "causal-lm", tmp_path / "0-source")
    apply_stage(QuantizeStage(), source, tmp_path / "1-quantize")
    model = load_model(tiny_llama_folder)
    QuantizeStage().apply(model)
    again = load_model(tmp_path / "1-quantize")
    assert set(again.integers) == set(model.integers)
    assert all(torch.equal(again.integers[n].integers, w.integers) for n, w in model.integers.items())
    assert all(torch.equal(p, q) for p, q in zip(again.network.parameters(), model.network.parameters(), strict=True))
    assert again.network.lm_head.weight is again.network.model.embed_tokens.weight


def test_a_real_gguf_file_opens_as_float32_with_its_tokenizer_and_its_matrices_tied() -> None:
    model = load_model("asset:smollm2-135m-instruct")
    assert model.task == "causal-lm"
    assert model.parameters == 134_515_008
    assert model.network.lm_head.weight is model.network.model.embed_tokens.weight
    assert model.network.lm_head.weight.dtype == torch.float32
    prompt = model.tokenizer("The capital of France is", return_tensors="pt")
    ids = model.network.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert model.tokenizer.decode(ids[0, -1]).strip() == "Paris"


def test_a_folder_without_a_model_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"looked for config\.json.*found notes\.txt"):
        load_model(tmp_path)


def test_a_truncated_file_is_named(broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated or corrupt"):
        load_model(broken)


def test_an_index_that_names_a_missing_shard_is_an_error(broken: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model-00002-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names model-00002-of-00002\.safetensors, which is not there"):
        load_model(broken)


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("open('sprung', 'w').close()",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("allowed", [False, True])
def test_a_pickle_is_refused_and_never_runs_code(
    broken: Path, allowed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ModelError):
        load_model(ModelSettings(path=str(broken), allow_pickle=allowed))
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_without_leave_names_the_option(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"allow_pickle"):
        load_model(broken)


def test_code_of_the_checkpoints_own_is_refused(broken: Path) -> None:
    edit(broken, auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_model(broken)


def test_an_already_quantized_checkpoint_is_recognised(broken: Path) -> None:
    edit(broken, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match=r"already quantized \(gptq\)"):
        load_model(broken)


def test_an_adapter_is_not_taken_for_a_model(broken: Path) -> None:
    (broken / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="LoRA adapter"):
        load_model(broken)


def test_a_task_that_the_architecture_has_no_head_for_is_refused(tiny_llama_folder: Path) -> None:
    with pytest.raises(ModelError, match="LlamaForCausalLM"):
        load_model(tiny_llama_folder, "text-classification")


def test_a_head_that_would_be_random_is_an_error(tiny_bert_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_bert_folder, tmp_path / "headless"))
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.startswith("classifier")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 2 weights .*classifier\.bias.*random numbers"):
        load_model(folder)


def test_an_own_module_without_weights_is_not_benchmarked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(ModelError, match="random weights"):
        load_model("benchmarks.lstm:factory")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:factory", "no_such_module"),
        ("pathlib:Path", "not a torch.nn.Module"),
        ("pathlib:nothing", "nothing"),
        ("./not/here", "does not exist"),
        ("asset:smollm", "asset:smollm2-135m-instruct"),
    ],
)
def test_a_name_that_leads_nowhere_says_so(name: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        load_model(name)


def test_a_file_that_only_claims_to_be_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        load_model(tmp_path / "x.gguf")
