"""Parts go, in every family; what remains is what the larger network is without them, and loads with plain Transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from squeeze.compress.advice import Machine
from squeeze.compress.quantize import QuantizeStage
from squeeze.errors import PruneError
from squeeze.exporter import export_onnx
from squeeze.model import Model, load_model, save_model
from squeeze.parts import attentions, blocks, feed_forwards, only_layers, only_runs, tied_attentions
from squeeze.pruning.settings import RemoveSettings
from squeeze.pruning.structures import PARTS, needs_loss, needs_texts, remove_parts
from squeeze.silence import speaking_heads
from squeeze.verification import verify

WIDTH, NEURONS, LAYERS, HEADS = 32, 40, 3, 4
OWN = {"vocab_size": 200, "max_position_embeddings": 64, "initializer_range": 0.2}
COMMON = {
    **OWN, "hidden_size": WIDTH, "intermediate_size": NEURONS, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
}  # fmt: skip
ENCODER = {**COMMON, "num_labels": 3, "pad_token_id": 0}
GROUPED = {**COMMON, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
LIKE = {"roberta": "tiny_roberta_folder", "distilbert": "tiny_distilbert_folder"}
"""Whose tokenizer goes with which; else BERT's for classifiers, Llama's for others."""
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "bert": (hf.BertForSequenceClassification, hf.BertConfig, ENCODER),
    "distilbert": (
        hf.DistilBertForSequenceClassification, hf.DistilBertConfig,
        {**OWN, "dim": WIDTH, "hidden_dim": NEURONS, "n_layers": LAYERS, "n_heads": HEADS, "num_labels": 3, "pad_token_id": 0},
    ),
    "roberta": (
        hf.RobertaForSequenceClassification, hf.RobertaConfig, {**ENCODER, "max_position_embeddings": 66, "pad_token_id": 1},
    ),
    "albert": (hf.AlbertForSequenceClassification, hf.AlbertConfig, {**ENCODER, "embedding_size": 16}),
    "electra": (hf.ElectraForSequenceClassification, hf.ElectraConfig, {**ENCODER, "embedding_size": 16}),
    "gpt2": (
        hf.GPT2LMHeadModel, hf.GPT2Config,
        {**OWN, "n_positions": 64, "n_embd": WIDTH, "n_inner": NEURONS, "n_layer": LAYERS, "n_head": HEADS, "bos_token_id": 2,
         "eos_token_id": 3},
    ),
    "opt": (
        hf.OPTForCausalLM, hf.OPTConfig,
        {"vocab_size": 200, "max_position_embeddings": 64, "hidden_size": WIDTH, "ffn_dim": NEURONS, "num_hidden_layers": LAYERS,
         "num_attention_heads": HEADS, "word_embed_proj_dim": WIDTH, "init_std": 0.2, "pad_token_id": 0},
    ),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, GROUPED),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, GROUPED),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig, {**GROUPED, "num_key_value_heads": 1, "head_dim": 8}),
    "t5": (
        hf.T5EncoderModel, hf.T5Config,
        {"vocab_size": 200, "d_model": WIDTH, "d_kv": 8, "d_ff": NEURONS, "num_layers": LAYERS, "num_heads": HEADS, "pad_token_id": 0,
         "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
    ),
    "bart": (
        hf.BartForCausalLM, hf.BartConfig,
        {"vocab_size": 200, "max_position_embeddings": 64, "d_model": WIDTH, "decoder_layers": LAYERS, "encoder_layers": LAYERS,
         "decoder_ffn_dim": NEURONS, "encoder_ffn_dim": NEURONS, "decoder_attention_heads": HEADS, "encoder_attention_heads": HEADS,
         "init_std": 0.2, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
    ),
}  # fmt: skip
SILENT = ("bert", "distilbert", "roberta", "albert", "electra")
TIED = ("gpt2", "opt", "bart")
"""No heads can go: neither the config nor the attention allows fewer."""


def make(family: str, request: pytest.FixtureRequest, **values: Any) -> Model:
    """Weights drawn wide, no bias zero and no norm one: what gets lost shows."""
    kind, config, given = FAMILIES[family]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = kind(config(**{**given, **values})).eval().requires_grad_(False)
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    classifies = kind.__name__.endswith("Classification")
    task = "text-classification" if classifies else "feature-extraction" if family == "t5" else "causal-lm"
    folder = request.getfixturevalue(LIKE.get(family, "tiny_bert_folder" if classifies else "tiny_llama_folder"))
    return Model(network, hf.AutoTokenizer.from_pretrained(folder), task, f"tiny {family}", network.config.to_dict())


def texts(count: int = 4, padded: bool = True) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 200, (count, 12))
    mask = np.ones_like(ids)
    mask[-1, 8 if padded else 12 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids), "labels": ids[:, 0] % 3}
    return [{name: array[n : n + 2] for name, array in batch.items()} for n in range(0, count, 2)]


def out(network: Any, batch: dict[str, np.ndarray]) -> Tensor:
    with torch.no_grad():
        given = {name: torch.as_tensor(batch[name]) for name in ("input_ids", "attention_mask")}
        found = network(**given)[0]
        return found if found.ndim == 2 else found * given["attention_mask"][:, :, None]


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=2e-5 * float(other.abs().max()))


def idle(network: Any, heads: bool) -> None:
    """Let every other neuron, and the second and fourth head, add nothing."""
    with torch.no_grad():
        for site in feed_forwards(network):
            reader = network.get_submodule(site.reader)
            (reader.weight if isinstance(reader, nn.Linear) else reader.weight.T)[:, ::2] = 0
        for attention in (tied_attentions(network) or attentions(network)) if heads else ():
            columns = network.get_submodule(attention.output).weight.view(WIDTH, HEADS, -1)
            columns[:, 1::2] = 0


HALVED = RemoveSettings(layers=(0, 2), heads=0.5, neurons=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_adds_nothing_goes_and_nothing_changes(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = make(family, request)
    larger: Any = model.network
    before = model.parameters
    idle(larger, heads=family not in TIED)
    remove = HALVED.model_copy(update={"heads": None}) if family in TIED else HALVED
    with only_runs(larger, 2) if family == "albert" else only_layers(larger, (0, 2)):
        expected = out(larger, texts()[1])
    notes, rows = remove_parts(model, remove, texts())
    assert close(out(model.network, texts()[1]), expected)
    assert model.network is not larger
    assert model.config == model.network.config.to_dict()
    assert model.config.get("num_hidden_layers", model.config.get("n_layer", model.config.get("n_layers", 2))) == 2
    assert len(blocks(model.network)[1]) == (1 if family == "albert" else 2)
    assert feed_forwards(model.network)[0].neurons == NEURONS // 2
    assert any("keeps 20 of 40 feed-forward neurons, by activation, 100% of its sum" in note for note in notes)
    assert model.parameters < before - 2 * 20 * WIDTH
    gone = {row.name: row for row in rows if row.note.startswith("was 40")}
    assert len(gone) == sum(len(site.writers) + 1 for site in feed_forwards(model.network))
    assert all(20 in row.shape for row in gone.values())
    if family not in TIED:
        assert any("keeps 2 of 4 heads, by activation, 100% of its sum" in note for note in notes)
    if family in SILENT:
        assert speaking_heads(model.network) == ((0, 2),) * len(tied_attentions(model.network))
        assert any("checkpoint keeps the shape of 4" in note for note in notes)
        zero = [row for row in rows if row.note == "2 of 4 heads are zero; exports leave them out"]
        assert len(zero) == 4 * len(tied_attentions(model.network))
        assert {row.sparsity for row in zero} == {0.5}
    elif family not in TIED:
        assert attentions(model.network)[0].heads == 2
    save_model(model, tmp_path)
    kind: Any = {"text-classification": hf.AutoModelForSequenceClassification, "causal-lm": hf.AutoModelForCausalLM}
    plain, info = kind.get(model.task, hf.AutoModelForTextEncoding).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(plain) is type(model.network)
    assert close(out(plain, texts()[1]), expected)
    assert close(out(load_model(tmp_path, model.task).network, texts()[1]), expected)


EXPORTED = ("gpt2", "llama")
"""Two that every run of the suite exports, with BERT's int8 below; an export takes seconds."""
slow = [pytest.param(family, marks=() if family in EXPORTED else pytest.mark.slow) for family in FAMILIES]


@pytest.mark.parametrize("family", slow)
def test_every_smaller_network_exports_and_verifies(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    wide = {"hidden_size": 64, "head_dim": 16} if family in ("llama", "qwen2", "gemma") else {}  # as the kernel asks
    model = make(family, request, **wide)
    remove_parts(model, HALVED.model_copy(update={"heads": None}) if family in TIED else HALVED, texts())
    notes = export_onnx(model, tmp_path)
    assert [check for check in verify(model, tmp_path) if not check.passed] == []
    assert any("heads are zero in the checkpoint" in note for note in notes) == (family in SILENT)


@pytest.mark.parametrize("scheme", ["int8", pytest.param("int8-static", marks=pytest.mark.slow)])
def test_silent_heads_are_not_in_an_integer_export(scheme: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    import onnx_ir as ir

    model = make("bert", request)
    remove_parts(model, HALVED, texts())
    calibration = [{name: batch[name] for name in model.text_inputs} for batch in texts()]
    QuantizeStage(scheme=scheme, reduce_range=Machine.here().saturates).apply(model, calibration)
    export_onnx(model, tmp_path)
    assert [check for check in verify(model, tmp_path) if not check.passed] == []
    graph = ir.load(tmp_path / "model.onnx").graph
    wide = [v for v in graph.initializers.values() if v.dtype == ir.DataType.INT8 and "query" in (v.name or "")]
    assert {tuple(v.shape or ()) for v in wide} == {(WIDTH, WIDTH // 2)}, "queries, keys and values of half the heads"
    assert all(
        attention.attributes["q_num_heads"].as_int() == 2 for attention in graph if attention.op_type == "Attention"
    )


# How many


@pytest.mark.parametrize(
    ("family", "values", "share", "stay", "told"),
    [
        ("bert", {"num_attention_heads": 12, "hidden_size": 48}, 1 / 3, 8, None),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}, 0.3, 4, "5.6 of 8 heads; the nearest count that can stay is 4"),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}, 0.5, 4, None),
        ("t5", {}, 0.25, 3, None),
        ("gemma", {}, 0.01, 4, None),
    ],
)  # fmt: skip
def test_a_share_leaves_the_nearest_count_of_heads(
    family: str, values: dict[str, Any], share: float, stay: int, told: str | None, request: pytest.FixtureRequest
) -> None:
    model = make(family, request, **values)
    notes, _ = remove_parts(model, RemoveSettings(heads=share, criterion="random"), ())
    speaking = speaking_heads(model.network)
    assert (len(speaking[0]) if speaking else attentions(model.network)[0].heads) == stay
    assert [note for note in notes if "would leave" in note] == ([] if told is None else [notes[0]])
    assert told is None or told in notes[0]


def test_whole_numbers_stay_and_layers_are_ranked(request: pytest.FixtureRequest) -> None:
    model = make("llama", request)
    with torch.no_grad():
        blocks(model.network)[1][1].self_attn.o_proj.weight.zero_()  # type: ignore[union-attr]
        blocks(model.network)[1][1].mlp.down_proj.weight.zero_()  # type: ignore[union-attr]
    expected = out(model.network, texts()[0])
    notes, _ = remove_parts(model, RemoveSettings(layers=1 / 3, neurons=30), texts())
    assert notes[0].startswith("layers 0, 2 of 3 stay, by influence (0: ")
    assert model.config["intermediate_size"] == 30
    again = make("llama", request)
    with torch.no_grad():
        blocks(again.network)[1][1].self_attn.o_proj.weight.zero_()  # type: ignore[union-attr]
        blocks(again.network)[1][1].mlp.down_proj.weight.zero_()  # type: ignore[union-attr]
    heard: list[tuple[int, int]] = []
    told, _ = remove_parts(
        again, RemoveSettings(layers=2, criterion="taylor"), texts(), done=lambda i, n: heard.append((i, n))
    )
    assert told[0].startswith("layers 0, 2 of 3 stay, by taylor")
    assert heard == [(1, 1)]
    assert close(out(again.network, texts()[0]), expected)


def test_silent_heads_are_not_counted_again(request: pytest.FixtureRequest) -> None:
    model = make("bert", request)
    remove_parts(model, RemoveSettings(heads=0.5), texts())
    first = speaking_heads(model.network)
    remove_parts(model, RemoveSettings(heads=0.5, criterion="random"), ())
    assert [len(heads) for heads in speaking_heads(model.network)] == [1, 1, 1]
    assert all(set(now) < set(then) for now, then in zip(speaking_heads(model.network), first, strict=True))


# How they are ranked


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("family", ["bert", "llama", "albert"])
def test_every_criterion_keeps_the_parts_that_do_something(
    family: str, name: str, request: pytest.FixtureRequest
) -> None:
    """Where half of the neurons and heads add nothing, all criteria but chance find them."""
    if PARTS[name].heads is None:
        return
    model = make(family, request)
    idle(model.network, heads=True)
    expected = out(model.network, texts()[0])
    remove_parts(model, RemoveSettings(heads=2, neurons=20, criterion=name), texts())  # type: ignore[arg-type]
    assert close(out(model.network, texts()[0]), expected) == (name != "random")


def test_labels_come_beside_the_texts_or_among_them(request: pytest.FixtureRequest) -> None:
    remove = RemoveSettings(heads=2, neurons=10, criterion="taylor")
    among, beside, other = (make("bert", request) for _ in range(3))
    remove_parts(among, remove, texts())
    bare = [{name: array for name, array in batch.items() if name != "labels"} for batch in texts()]
    remove_parts(beside, remove, bare, [batch["labels"] for batch in texts()])
    remove_parts(other, remove, bare, [(batch["labels"] + 1) % 3 for batch in texts()])
    ours, theirs = among.network.state_dict(), beside.network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert any(not torch.equal(tensor, ours[name]) for name, tensor in other.network.state_dict().items())


def test_chance_follows_its_seed(request: pytest.FixtureRequest) -> None:
    found = []
    for seed in (0, 0, 1):
        model = make("t5", request)
        remove_parts(model, RemoveSettings(neurons=0.5, criterion="random"), (), seed=seed)
        found.append(model.network.state_dict()["encoder.block.0.layer.1.DenseReluDense.wo.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_what_settings_need() -> None:
    assert needs_texts(RemoveSettings(neurons=0.5))
    assert not needs_texts(RemoveSettings(layers=(0, 1)))
    assert not needs_texts(RemoveSettings(neurons=0.5, criterion="random"))
    assert needs_loss(RemoveSettings(heads=0.5, criterion="michel"))
    assert not needs_loss(RemoveSettings(heads=0.5))
    assert not needs_loss(RemoveSettings(layers=(0, 1), criterion="taylor"))


# What cannot be done


@pytest.mark.parametrize(
    ("family", "remove", "given", "message"),
    [
        ("gpt2", {"layers": 2, "heads": 2}, True, "gpt2: heads cannot be removed. .* Remove layers or neurons"),
        ("opt", {"neurons": 0.5, "heads": 0.5}, True, "opt: heads cannot be removed"),
        ("bart", {"heads": 0.5}, True, "bart: heads cannot be removed"),
        ("bert", {"layers": 2, "heads": 5}, True, r"remove.heads = 5: each layer has 4 heads, and 5 cannot stay"),
        ("llama", {"layers": 2, "heads": 3}, True, r"remove.heads = 3: each layer has 4 heads in groups .* may keep 2\."),
        ("llama", {"layers": 4}, True, r"remove.layers = 4: the model has 3 layers, and 4 cannot stay"),
        ("llama", {"layers": (1, 3)}, True, r"layers \[1, 3\] are asked for, and the model has 3"),
        ("albert", {"layers": (0, 3)}, True, r"remove.layers = \[0, 3\]: the layers that stay must rise, from 0 to at most 2"),
        ("albert", {"layers": 4}, True, "4 layers are asked for, and the model runs its one layer 3 times"),
        ("llama", {"layers": 2, "neurons": 41}, True, "remove.neurons = 41: each layer has 40"),
        ("llama", {"neurons": 0.5, "layers": 2}, False, "measured on texts, and there are none"),
        ("t5", {"heads": 0.5, "criterion": "michel"}, True, "michel needs a loss, and feature-extraction has none. Use influence"),
        ("bert", {"heads": 0.5, "criterion": "influence"}, True, "influence does not rank heads. Use activation, taylor, michel, random"),
        ("bert", {"layers": 1, "criterion": "michel"}, True, "michel does not rank layers. Use influence, taylor, random"),
        ("bert", {}, True, "remove names nothing that goes"),
    ],
)  # fmt: skip
def test_what_cannot_go_is_told_and_nothing_is_half_pruned(
    family: str, remove: dict[str, Any], given: bool, message: str, request: pytest.FixtureRequest
) -> None:
    model = make(family, request)
    network, config = model.network, dict(model.config)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(PruneError, match=message) as told:
        remove_parts(model, RemoveSettings(**remove), texts() if given else ())
    assert "student" not in str(told.value)
    assert model.network is network
    assert model.config == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_labels_that_are_missing_or_too_few_are_told(request: pytest.FixtureRequest) -> None:
    model = make("bert", request)
    bare = [{name: array for name, array in batch.items() if name != "labels"} for batch in texts()]
    remove = RemoveSettings(neurons=0.5, criterion="taylor")
    with pytest.raises(PruneError, match="criterion taylor needs the labels of the texts, and they have none"):
        remove_parts(model, remove, bare)
    with pytest.raises(PruneError, match="labels are given for 1 batches, and there are 2"):
        remove_parts(model, remove, bare, [np.zeros(2, np.int64)])


def test_layers_that_are_unlike_the_others_are_told_in_words_of_pruning(request: pytest.FixtureRequest) -> None:
    """GPT-2 can scale a layer's scores by its number: fewer layers would be scaled otherwise."""
    model = make("gpt2", request, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(PruneError, match=r"more depends on them than its config says\.$"):
        remove_parts(model, RemoveSettings(layers=(1, 2)), ())


def test_integers_are_not_cut(request: pytest.FixtureRequest) -> None:
    model = make("bert", request)
    QuantizeStage(reduce_range=True).apply(model)
    with pytest.raises(PruneError, match="tiny bert is already quantized. Remove parts of the float artifact"):
        remove_parts(model, RemoveSettings(neurons=0.5), texts())
