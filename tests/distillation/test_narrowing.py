"""What remains computes what the larger network computes without the rest, in every family, and survives its folder."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from squeeze.errors import TrainError
from squeeze.narrowing import best_heads, best_neurons, head_counts, keep_heads, keep_layers, keep_neurons, keep_runs
from squeeze.parts import attentions, blocks, feed_forwards, only_heads, only_layers, only_neurons

VOCABULARY, WIDTH, LAYERS, NEURONS = 60, 32, 4, 48
SHARED = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
COMMON = {
    "hidden_size": WIDTH,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
GROUPED = {**SHARED, **COMMON, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 8, "sliding_window": 4}
OWN = {**SHARED, "initializer_range": 0.2}
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "bert": (hf.BertForSequenceClassification, hf.BertConfig, {**SHARED, **COMMON}),
    "roberta": (hf.RobertaForSequenceClassification, hf.RobertaConfig, {**SHARED, **COMMON}),
    "electra": (hf.ElectraForSequenceClassification, hf.ElectraConfig, {**SHARED, **COMMON, "embedding_size": 16}),
    "distilbert": (
        hf.DistilBertForSequenceClassification, hf.DistilBertConfig,
        {**OWN, "dim": WIDTH, "hidden_dim": NEURONS, "n_layers": 4, "n_heads": 4},
    ),
    "modernbert": (
        hf.ModernBertForSequenceClassification, hf.ModernBertConfig,
        {**SHARED, **COMMON, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "t5": (
        hf.T5EncoderModel, hf.T5Config,
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": NEURONS, "num_layers": 4, "num_heads": 4,
         "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "pad_token_id": 0},
    ),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {**OWN, "n_embd": WIDTH, "n_layer": 4, "n_head": 4}),
    "opt": (
        hf.OPTForCausalLM, hf.OPTConfig,
        {**SHARED, "hidden_size": WIDTH, "ffn_dim": NEURONS, "num_hidden_layers": 4, "num_attention_heads": 4, "word_embed_proj_dim": WIDTH,
         "init_std": 0.2},
    ),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, GROUPED),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, {**GROUPED, "sliding_window": 4}),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, {**GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {**GROUPED, "head_dim": 12}),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig, {**GROUPED, "num_key_value_heads": 1, "head_dim": 8}),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, GEMMA),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, GEMMA),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config, GROUPED),
    "gpt_neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, {**SHARED, **COMMON}),
}  # fmt: skip
DECODERS = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt_neox")
HEADS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "t5")
TIED = ("bert", "roberta", "electra", "distilbert", "modernbert", "gpt2", "opt", "phi3", "gpt_neox")


def tiny(family: str, **values: Any) -> Any:
    """Weights drawn wide, no bias zero and no norm one: what gets lost shows."""
    kind, config, given = FAMILIES[family]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = kind(config(**{**given, **values})).eval()
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network


IDS = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))


def out(network: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return network(input_ids=ids)[0]


def reloaded(network: Any, folder: Path) -> Any:
    """From its folder, weights bit for bit. Outputs are only close: a file's tensors are aligned otherwise, and kernels sum so."""
    network.save_pretrained(folder)
    loaded, info = type(network).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert close(out(loaded), out(network))
    return loaded


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=2e-5 * float(other.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_kept_give_the_same_network(family: str) -> None:
    network = tiny(family)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    same = keep_layers(network, range(LAYERS))
    assert torch.equal(out(same), out(network))
    assert same.config.to_dict() == network.config.to_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not {p.data_ptr() for p in same.parameters()} & {p.data_ptr() for p in network.parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_layers_survive_a_folder_and_compute_what_the_others_left_out(family: str, tmp_path: Path) -> None:
    network = tiny(family)
    kept = (0, 3) if family == "modernbert" else (1, 3)
    student = keep_layers(network, kept)
    assert student.config.num_hidden_layers == len(blocks(student)[1]) == 2
    loaded = reloaded(student, tmp_path)
    if getattr(network.config, "layer_types", None):
        assert student.config.layer_types == loaded.config.layer_types == [network.config.layer_types[n] for n in kept]
    one = next(iter(blocks(network)[1].parameters())).data_ptr()
    assert next(iter(blocks(student)[1].parameters())).data_ptr() != one
    with only_layers(network, kept):
        assert close(out(student), out(network))
    assert not close(out(student), out(network)), "the hooks are gone"


@pytest.mark.parametrize("family", DECODERS)
def test_the_cache_of_fewer_layers_gives_what_the_whole_text_gives(family: str) -> None:
    student = keep_layers(tiny(family), (1, 3))
    with torch.no_grad():
        start = student(input_ids=IDS[:, :7], use_cache=True)
        assert len(start.past_key_values) == 2
        cache, last = start.past_key_values, start.logits[:, -1]
        for n in range(7, IDS.shape[1]):
            step = student(input_ids=IDS[:, n : n + 1], past_key_values=cache, use_cache=True)
            cache, last = step.past_key_values, step.logits[:, -1]
    assert close(last, out(student)[:, -1])


def test_layers_of_bert_run_by_hand() -> None:
    network = tiny("bert")
    student = keep_layers(network, (0, 2))
    with torch.no_grad():
        states = network.bert.embeddings(input_ids=IDS)
        for n in (0, 2):
            states = network.bert.encoder.layer[n](states, None)
        scores = network.classifier(network.bert.pooler(states))
    assert close(out(student), scores)


def test_layers_of_llama_run_by_hand() -> None:
    network = tiny("llama")
    student = keep_layers(network, (1, 2))
    length = IDS.shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    places = torch.arange(length)[None]
    with torch.no_grad():
        states = network.model.embed_tokens(IDS)
        turns = network.model.rotary_emb(states, places)
        for n in (1, 2):
            states = network.model.layers[n](
                states, attention_mask=mask, position_ids=places, position_embeddings=turns
            )
        scores = network.lm_head(network.model.norm(states))
    assert close(out(student), scores)


def zeroed(network: Any, readers: list[str], kept: list[list[int]], size: int) -> Any:
    """A copy in which what the removed heads or neurons write is multiplied by 0: the weights that read them."""
    result = copy.deepcopy(network)
    for name, numbers in zip(readers, kept, strict=True):
        reader = result.get_submodule(name)
        columns = reader.weight if isinstance(reader, nn.Linear) else reader.weight.T
        with torch.no_grad():
            for n in set(range(columns.shape[1] // size)) - set(numbers):
                columns[:, n * size : (n + 1) * size] = 0
    return result


READERS = {
    "bert": "bert.encoder.layer.{}.output.dense", "roberta": "roberta.encoder.layer.{}.output.dense",
    "electra": "electra.encoder.layer.{}.output.dense", "distilbert": "distilbert.transformer.layer.{}.ffn.lin2",
    "modernbert": "model.layers.{}.mlp.Wo", "t5": "encoder.block.{}.layer.1.DenseReluDense.wo", "gpt2": "transformer.h.{}.mlp.c_proj",
    "opt": "model.decoder.layers.{}.fc2", "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_neurons_compute_what_the_others_at_zero_compute(family: str, tmp_path: Path) -> None:
    network = tiny(family)
    readers = [READERS.get(family, "model.layers.{}.mlp.down_proj").format(n) for n in range(LAYERS)]
    have = feed_forwards(network)[0].neurons
    assert have == (4 * WIDTH if family == "gpt2" else NEURONS)
    random = torch.Generator().manual_seed(3)
    kept = [sorted(torch.randperm(have, generator=random)[:10].tolist()) for _ in range(LAYERS)]
    student = keep_neurons(network, kept)
    assert close(out(student), out(zeroed(network, readers, kept, 1)))
    assert feed_forwards(student)[0].neurons == 10
    with only_neurons(network, kept):
        assert close(out(student), out(network))
    matrices = 3 if len(feed_forwards(network)[0].writers) == 2 or family in ("modernbert", "phi3") else 2
    biases = sum(p.shape[0] == have for n, p in network.named_parameters() if n.endswith("bias")) / LAYERS
    gone = LAYERS * (have - 10) * (matrices * WIDTH + biases)
    assert sum(p.numel() for p in network.parameters()) - sum(p.numel() for p in student.parameters()) == gone
    reloaded(student, tmp_path)


def test_gated_t5_loses_gate_and_value_together() -> None:
    network = tiny("t5", feed_forward_proj="gated-gelu")
    kept = [[0, 5, 7], [1, 2, 3], [4, 5, 6], [0, 40, 47]]
    readers = [f"encoder.block.{n}.layer.1.DenseReluDense.wo" for n in range(LAYERS)]
    assert close(out(keep_neurons(network, kept)), out(zeroed(network, readers, kept, 1)))


@pytest.mark.parametrize("family", HEADS)
def test_fewer_heads_compute_what_silent_ones_compute(family: str, tmp_path: Path) -> None:
    network = tiny(family)
    site = attentions(network)[0]
    assert (site.heads, site.shared) == (4, {"gemma": 1, "t5": 4}.get(family, 2))
    kept = [[0, 2], [1, 3], [0, 3], [1, 2]]  # one of each pair that shares keys and values
    if family == "t5":
        kept = [[1, 2]] * LAYERS
    student = keep_heads(network, kept)
    readers = [each.output for each in attentions(network)]
    assert close(out(student), out(zeroed(network, readers, kept, site.size)))
    with only_heads(network, kept):
        assert close(out(student), out(network))
    after = attentions(student)[0]
    assert (after.heads, after.shared, after.size) == (2, {"gemma": 1}.get(family, 2), site.size)
    assert student.config.num_attention_heads == 2
    reloaded(student, tmp_path)
    if family in DECODERS:
        ids = IDS[:, :6]
        grown = student.generate(ids, max_new_tokens=4, do_sample=False, min_new_tokens=4)
        assert grown.shape[1] == 10
        assert grown[0, -1] == out(student, grown[:, :-1])[0, -1].index_fill(0, torch.tensor([2]), -torch.inf).argmax()


def test_whole_groups_go_where_counts_do_not_divide() -> None:
    network = tiny("llama", num_attention_heads=8, num_key_value_heads=4)
    kept = [[0, 1], [2, 3], [6, 7], [4, 5]]
    student = keep_heads(network, kept)
    assert (student.config.num_attention_heads, student.config.num_key_value_heads, student.config.head_dim) == (
        2,
        1,
        4,
    )
    assert close(out(student), out(zeroed(network, [s.output for s in attentions(network)], kept, 4)))


def test_best_heads_keep_groups_whole_or_equal() -> None:
    llama = tiny("llama", num_attention_heads=8, num_key_value_heads=4)
    assert head_counts(llama) == (2, 4), "6 is a multiple of 2 but does not divide the width of 32"
    scores = [torch.tensor([9.0, 8, 1, 2, 5, 4, 3, 3])] * LAYERS
    assert best_heads(llama, scores, 4)[0] == (0, 3, 4, 6), "the best of each pair"
    assert best_heads(llama, scores, 2)[0] == (0, 1), "the best pair"
    assert best_heads(llama, scores, 8)[0] == tuple(range(8))
    with pytest.raises(TrainError, match=r"student.heads = 3: each layer has 8 heads in groups .* keep 2, 4\."):
        best_heads(llama, scores, 3)
    t5 = tiny("t5")
    assert head_counts(t5) == (1, 2, 3)
    uneven = [torch.tensor([0.5, 0.1, 0.2, 0.2]), torch.tensor([0.0, 90, 0, 10])] + [torch.ones(4)] * 2
    assert best_heads(t5, uneven, 1) == ((1,),) * LAYERS, "shares of each layer's own sum: 0.75, 1.5, 0.7, 0.8"


def test_best_neurons() -> None:
    scores = [torch.arange(NEURONS).float(), -torch.arange(NEURONS).float()] * 2
    kept = best_neurons(tiny("llama"), scores, 2)
    assert kept == ((46, 47), (0, 1), (46, 47), (0, 1))
    with pytest.raises(TrainError, match="student.neurons = 49: each layer has 48"):
        best_neurons(tiny("llama"), scores, 49)


@pytest.mark.parametrize("family", TIED)
def test_heads_stay_where_the_config_ties_them_to_the_width(family: str) -> None:
    with pytest.raises(
        TrainError, match="no config.json describes fewer attention heads .* Llama, .* T5 can lose heads"
    ):
        attentions(tiny(family))


def test_what_cannot_be_kept_is_told() -> None:
    llama = tiny("llama")
    with pytest.raises(TrainError, match=r"layers \[1, 4\] are asked for, and the model has 4, from 0 to 3"):
        keep_layers(llama, (1, 4))
    with pytest.raises(TrainError, match=r"layers \[2, 0\] must rise"):
        keep_layers(llama, (2, 0))
    with pytest.raises(TrainError, match="equally many heads"):
        keep_heads(llama, [[0, 1], [0, 2], [0, 2], [0, 2]])
    with pytest.raises(TrainError, match="equally many neurons"):
        keep_neurons(llama, [[0], [0], [0], [0, 1]])
    with pytest.raises(TrainError, match="share one position bias must keep the same heads"):
        keep_heads(tiny("t5"), [[0], [1], [0], [0]])
    with pytest.raises(TrainError, match=r"llama does not allow num_attention_heads = 3.*not a multiple"):
        keep_heads(tiny("llama", num_key_value_heads=4), [[0, 1, 2]] * LAYERS)
    with pytest.raises(
        TrainError, match=r"modernbert: .*attn_norm.* Where its first layer is unlike the others, keep that one"
    ):
        keep_layers(tiny("modernbert"), (1, 2))


def test_albert_has_one_layer_for_all() -> None:
    albert = hf.AlbertForSequenceClassification(hf.AlbertConfig(**{**SHARED, **COMMON, "embedding_size": 16})).eval()
    with pytest.raises(TrainError, match=r"albert runs 4 layers on 1 set.* student.config: {num_hidden_layers: 2}"):
        keep_layers(albert, (0, 1))
    kept = [[1, 2, 3]]
    student = keep_neurons(albert, kept)
    reader = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output"
    assert close(out(student), out(zeroed(albert, [reader], kept, 1)))


def test_one_layer_runs_less_often() -> None:
    config = hf.AlbertConfig(**{**SHARED, **COMMON, "embedding_size": 16})
    albert = hf.AlbertForSequenceClassification(config).eval()
    fewer = keep_runs(albert, 3)
    assert (fewer.config.num_hidden_layers, albert.config.num_hidden_layers) == (3, LAYERS)
    with torch.no_grad():
        states = albert.albert.encoder.embedding_hidden_mapping_in(albert.albert.embeddings(input_ids=IDS))
        for _ in range(3):
            states = albert.albert.encoder.albert_layer_groups[0](states)
        scores = albert.classifier(albert.albert.pooler_activation(albert.albert.pooler(states[:, 0])))
    assert close(out(fewer), scores)
    with pytest.raises(TrainError, match="5 layers are asked for, and the model runs its one layer 4 times"):
        keep_runs(albert, 5)
    with pytest.raises(TrainError, match="bert: its layers are not one layer that runs several times"):
        keep_runs(tiny("bert"), 2)


def test_the_half_that_is_there_is_counted() -> None:
    """BART alone as a decoder: its config counts the layers and neurons of both halves, its cache reads the encoder's."""
    halves = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in
              {"layers": 3, "attention_heads": 4, "ffn_dim": NEURONS}.items()}  # fmt: skip
    bart = hf.BartForCausalLM(hf.BartConfig(**{**SHARED, **halves, "d_model": WIDTH, "init_std": 0.2})).eval()
    fewer = keep_neurons(keep_layers(bart, (0, 2)), [[1, 2, 3]] * 2)
    assert (fewer.config.decoder_layers, fewer.config.num_hidden_layers, fewer.config.decoder_ffn_dim) == (2, 2, 3)
    with torch.no_grad():
        assert len(fewer(input_ids=IDS, use_cache=True).past_key_values.layers) == 2


def test_modules_without_a_config() -> None:
    own = nn.Module()
    own.layers = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(TrainError, match="a module without a Transformers config"):
        keep_layers(own, (0,))
    with pytest.raises(TrainError, match="no list of layers"):
        blocks(nn.Linear(2, 2))


def test_a_family_that_reads_its_layers_numbers_is_refused() -> None:
    """GPT-2 can scale a layer's scores by its number: fewer layers would be scaled otherwise than they were trained."""
    network = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert torch.equal(out(keep_layers(network, (0, 1))), out(keep_layers(network, (0, 1))))
    with pytest.raises(TrainError, match="gpt2: a smaller network does not compute what this one computes without"):
        keep_layers(network, (1, 3))


def test_experts_are_no_neurons() -> None:
    mixture = hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=2)).eval()
    with pytest.raises(TrainError, match="0 feed-forward parts are found in layer 0"):
        feed_forwards(mixture)
    with only_layers(mixture, (1, 3)):
        expected = out(mixture)
    assert close(out(keep_layers(mixture, (1, 3))), expected)
