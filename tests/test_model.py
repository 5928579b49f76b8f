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
from squeeze.stages import apply_stage, keep_source


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


@pytest.fixture
def t5(tmp_path: Path, tiny_t5_folder: Path) -> Path:
    """T5 as it is published: made to generate, and opened for its encoder on request."""
    from transformers import T5ForConditionalGeneration

    folder = Path(shutil.copytree(tiny_t5_folder, tmp_path / "t5"))
    T5ForConditionalGeneration.from_pretrained(tiny_t5_folder).save_pretrained(folder)
    return folder


def test_of_an_encoder_decoder_the_encoder_alone_is_opened(t5: Path) -> None:
    from transformers import T5Model

    model = load_model(t5, "feature-extraction")
    whole = T5Model.from_pretrained(t5).eval()
    assert model.parameters == sum(p.numel() for p in whole.encoder.parameters())
    assert model.notes == ("t5 is an encoder-decoder; its encoder alone is opened, the decoder left out",)
    inputs = model.tokenizer(["A small model.", "The trains are late again."], padding=True, return_tensors="pt")
    found, expected = model.network(**inputs), whole.get_encoder()(**inputs)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)


def test_an_encoder_decoder_says_what_it_can_be_opened_for(t5: Path) -> None:
    for task in (None, "causal-lm", "text-classification"):
        with pytest.raises(ModelError, match=r"T5ForConditionalGeneration is an encoder-decoder.* feature-extraction"):
            load_model(t5, task)
    config = json.loads((t5 / "config.json").read_text("utf-8"))
    del config["is_encoder_decoder"]
    (t5 / "config.json").write_text(json.dumps(config | {"architectures": ["T5ForSequenceClassification"]}), "utf-8")
    with pytest.raises(ModelError, match="T5ForSequenceClassification is an encoder-decoder"):
        load_model(t5)


def test_artifacts_of_an_encoder_come_back_without_the_decoder(t5: Path, tmp_path: Path) -> None:
    source = keep_source(ModelSettings(path=str(t5)), "feature-extraction", tmp_path / "0-source")
    apply_stage(QuantizeStage(), source, tmp_path / "1-quantize")
    model = load_model(t5, "feature-extraction")
    for folder in ("0-source", "1-quantize"):
        again = load_model(tmp_path / folder)
        assert again.network.encoder.embed_tokens.weight is again.network.shared.weight
        assert not hasattr(again.network, "decoder")
        assert all(
            torch.equal(p, q) for p, q in zip(again.network.parameters(), model.network.parameters(), strict=True)
        )
        if not model.integers:
            QuantizeStage().apply(model)
    assert set(again.integers) == set(model.integers)


def test_a_text_may_be_as_long_as_robertas_positions_and_no_longer(tiny_roberta_folder: Path) -> None:
    model = load_model(tiny_roberta_folder)
    assert model.positions == 64
    model.network(torch.full((1, 64), 9))
    with pytest.raises(RuntimeError, match="index 66 is out of bounds"):
        model.network(torch.full((1, 65), 9))


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


def test_a_value_that_the_config_class_refuses_is_named(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text("utf-8"))
    (broken / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}), "utf-8")
    with pytest.raises(
        ModelError, match=r"config\.json is not what its class takes: .*hidden_size.*Correct that value\."
    ):
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
