"""The static cost card of real models, counted by hand."""

from pathlib import Path

import pytest

from squeeze.benchmark.compressed import compressed_bytes
from squeeze.benchmark.cost import cost
from squeeze.benchmark.subject import foreign, is_foreign, task_of
from squeeze.errors import ArtifactError
from squeeze.model import ModelSettings
from squeeze.stages import keep_source


def test_a_decoders_tied_matrix_is_multiplied_and_its_cache_counts_the_groups(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    artifact = keep_source(ModelSettings(path=str(tiny_llama_folder)), "causal-lm", tmp_path / "0-source")
    card, config = cost(artifact), artifact.config
    tied = config["tie_word_embeddings"]
    multiplied = artifact.manifest.parameters - (0 if tied else config["vocab_size"] * config["hidden_size"])
    assert card.operations_per_token == 2 * multiplied
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    assert card.cache_bytes_per_token == 2 * 4 * layers * config["num_key_value_heads"] * width
    assert card.operations_per_pair == 4 * layers * config["hidden_size"]
    assert card.arithmetic == "float32"


def test_an_encoder_does_not_multiply_with_its_tables(tiny_bert_folder: Path, tmp_path: Path) -> None:
    artifact = keep_source(ModelSettings(path=str(tiny_bert_folder)), "text-classification", tmp_path / "0-source")
    card, config = cost(artifact), artifact.config
    tables = (config["vocab_size"] + config["max_position_embeddings"] + config["type_vocab_size"]) * config[
        "hidden_size"
    ]
    assert card.operations_per_token == 2 * (artifact.manifest.parameters - tables)
    assert card.cache_bytes_per_token is None
    assert card.read_bytes < card.weight_bytes


@pytest.mark.parametrize(
    ("family", "task"),
    [("tiny_t5_folder", "feature-extraction"), ("tiny_distilbert_folder", "text-classification"), ("tiny_gpt2_folder", "causal-lm")],
)  # fmt: skip
def test_families_that_name_their_sizes_otherwise_have_a_card_too(
    family: str, task: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """All are 64 wide with 2 layers and 4 heads of 16."""
    artifact = keep_source(ModelSettings(path=str(request.getfixturevalue(family))), task, tmp_path / "0-source")
    card, config = cost(artifact), artifact.config
    rows = {
        "causal-lm": 128,
        "text-classification": config["vocab_size"] + 64,
        "feature-extraction": config["vocab_size"],
    }
    assert card.operations_per_token == 2 * (artifact.manifest.parameters - 64 * rows[task])
    assert card.operations_per_pair == 4 * 64 * 2
    assert card.read_bytes is not None
    assert card.cache_bytes_per_token == (2 * 4 * 2 * 64 if task == "causal-lm" else None)


def test_a_download_is_smaller_than_what_it_becomes_and_random_weights_hardly_shrink(
    tiny_bert_folder: Path, tmp_path: Path
) -> None:
    artifact = keep_source(ModelSettings(path=str(tiny_bert_folder)), "text-classification", tmp_path / "0-source")
    whole = sum(entry.bytes for entry in artifact.manifest.files.values())
    assert 0.5 * whole < compressed_bytes(artifact) < whole


def test_other_tools_models_stand_for_themselves_with_their_digests(tmp_path: Path) -> None:
    gguf, openvino = tmp_path / "some model.gguf", tmp_path / "ir"
    gguf.write_bytes(b"GGUF")
    openvino.mkdir()
    (openvino / "openvino_model.xml").write_text("<net/>")
    (openvino / "openvino_model.bin").write_bytes(b"12345")
    assert is_foreign(gguf)
    assert is_foreign(openvino)
    assert not is_foreign(tmp_path)
    artifact = foreign(gguf, "causal-lm")
    assert (artifact.name, artifact.manifest.format, artifact.manifest.weight_bytes) == ("some model", "gguf", 4)
    assert (foreign(openvino, "feature-extraction").manifest.weight_bytes, task_of(gguf), task_of(openvino)) == (
        5,
        "causal-lm",
        None,
    )
    before = artifact.digest
    gguf.write_bytes(b"GGUG")
    assert foreign(gguf, "causal-lm").digest != before
    with pytest.raises(ArtifactError, match="does not exist"):
        foreign(tmp_path / "nowhere.gguf", "causal-lm")


@pytest.mark.parametrize(
    ("architecture", "task"),
    [("LlamaForCausalLM", "causal-lm"), ("BertForSequenceClassification", "text-classification"), ("BertModel", "feature-extraction")],
)  # fmt: skip
def test_what_a_transformers_folder_is_for_is_read_from_its_config(
    architecture: str, task: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(f'{{"architectures": ["{architecture}"]}}')
    assert task_of(tmp_path) == task
