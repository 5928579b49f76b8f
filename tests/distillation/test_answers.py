"""What a network shows of its layers, over families: layers mean the same, and queries, keys and values are where they are looked for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from squeeze.distillation.answers import Needs, ask, embed
from squeeze.errors import TrainError

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}
WIDE = SMALL | {"intermediate_size": 48, "max_position_embeddings": 40}
GROUPED = WIDE | {"num_key_value_heads": 2, "head_dim": 8}


Parts = Callable[[Any, int], tuple[nn.Module, list[nn.Module]]]


def bert(name: str) -> Parts:
    """Norm before the projections, and the three of them, of layer n from 0."""

    def parts(network: Any, n: int) -> tuple[nn.Module, list[nn.Module]]:
        a = getattr(network, name).encoder.layer[n].attention.self
        return nn.Identity(), [a.query, a.key, a.value]

    return parts


def distilbert(network: Any, n: int) -> tuple[nn.Module, list[nn.Module]]:
    a = network.distilbert.transformer.layer[n].attention
    return nn.Identity(), [a.q_lin, a.k_lin, a.v_lin]


def albert(network: Any, n: int) -> tuple[nn.Module, list[nn.Module]]:
    a = network.albert.encoder.albert_layer_groups[0].albert_layers[0].attention
    return nn.Identity(), [a.query, a.key, a.value]


def mpnet(network: Any, n: int) -> tuple[nn.Module, list[nn.Module]]:
    a = network.mpnet.encoder.layer[n].attention.attn
    return nn.Identity(), [a.q, a.k, a.v]


def llama(network: Any, n: int) -> tuple[nn.Module, list[nn.Module]]:
    layer = network.model.layers[n]
    return layer.input_layernorm, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]


def opt(network: Any, n: int) -> tuple[nn.Module, list[nn.Module]]:
    layer = network.model.decoder.layers[n]
    return layer.self_attn_layer_norm, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]


class Third(nn.Module):
    """A third of what GPT-2's projection gives."""

    def __init__(self, whole: nn.Module, at: int) -> None:
        super().__init__()
        self.whole, self.at = whole, at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.whole(x)[..., self.at * 32 : (self.at + 1) * 32]


def gpt2(network: Any, n: int) -> tuple[nn.Module, list[nn.Module]]:
    layer = network.transformer.h[n]
    return layer.ln_1, [Third(layer.attn.c_attn, at) for at in range(3)]


def t5(network: Any, n: int) -> tuple[nn.Module, list[nn.Module]]:
    layer = network.encoder.block[n].layer[0]
    return layer.layer_norm, [layer.SelfAttention.q, layer.SelfAttention.k, layer.SelfAttention.v]


FAMILIES: dict[str, tuple[str, dict[str, Any], Parts]] = {
    "BertForSequenceClassification": ("BertConfig", WIDE, bert("bert")),
    "RobertaForSequenceClassification": ("RobertaConfig", WIDE, bert("roberta")),
    "ElectraForSequenceClassification": ("ElectraConfig", WIDE | {"embedding_size": 16}, bert("electra")),
    "AlbertForSequenceClassification": ("AlbertConfig", WIDE | {"embedding_size": 16}, albert),
    "MPNetForSequenceClassification": ("MPNetConfig", WIDE, mpnet),
    "DistilBertForSequenceClassification": (
        "DistilBertConfig",
        {"vocab_size": 50, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40},
        distilbert,
    ),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40},
        gpt2,
    ),
    "OPTForCausalLM": (
        "OPTConfig",
        SMALL | {"ffn_dim": 48, "max_position_embeddings": 40, "word_embed_proj_dim": 32},
        opt,
    ),
    "LlamaForCausalLM": ("LlamaConfig", GROUPED, llama),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED, llama),
    "Qwen3ForCausalLM": ("Qwen3Config", GROUPED, llama),
    "GemmaForCausalLM": ("GemmaConfig", GROUPED, llama),
    "MistralForCausalLM": ("MistralConfig", GROUPED, llama),
    "T5EncoderModel": (
        "T5Config",
        {"vocab_size": 50, "d_model": 32, "num_layers": 3, "num_heads": 4, "d_kv": 8, "d_ff": 48},
        t5,
    ),
}


def make(family: str, **changes: Any) -> Any:
    config, values, _ = FAMILIES[family]
    torch.manual_seed(1)
    return getattr(transformers, family)(getattr(transformers, config)(**values | changes)).eval()


def task_of(family: str) -> str:
    if "Sequence" in family:
        return "text-classification"
    return "feature-extraction" if family.startswith("T5") else "causal-lm"


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return {"input_ids": torch.randint(5, 50, (2, 7)) * mask, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_mean_the_same_in_every_family(family: str) -> None:
    network, inputs, task = make(family), batch(), task_of(family)
    parts = FAMILIES[family][2]
    before = network.config._attn_implementation
    every, attentive = frozenset(range(4)), frozenset((1, 2, 3))
    with torch.no_grad():
        plain = ask(network, task, inputs, Needs(logits=True, embedding=True))
        found = ask(network, task, inputs, Needs(True, True, every, attentive, attentive))
        whole = network(**inputs, output_hidden_states=True)
        backbone = network if family.startswith("T5") else network.base_model
        last = backbone(**inputs).last_hidden_state
    kept = (plain.logits, found.logits) if plain.logits is not None else (plain.embedding, found.embedding)
    text = inputs["attention_mask"].bool()
    torch.testing.assert_close(*kept) if task != "causal-lm" else torch.testing.assert_close(
        kept[0][text], kept[1][text]
    )
    assert network.config._attn_implementation == before
    assert set(found.hidden) == every
    torch.testing.assert_close(found.hidden[3][text], last[text])
    for n in range(3):
        torch.testing.assert_close(found.hidden[n][text], whole.hidden_states[n][text])
        norm, projections = parts(network, n)
        with torch.no_grad():
            expected = [project(norm(found.hidden[n])) for project in projections]
        torch.testing.assert_close(list(found.relations[n + 1]), expected)
        maps = found.attentions[n + 1]
        assert maps.shape == (2, 4, 7, 7)
        torch.testing.assert_close(maps[0].sum(-1), torch.ones(4, 7))
        assert not maps[1, :, :4, 4:].any()
        assert bool((maps[0, :, 0, 1:] == 0).all()) == (task == "causal-lm")
    assert found.heads == 4


def test_keys_of_grouped_queries_are_narrower() -> None:
    found = ask(make("LlamaForCausalLM"), "causal-lm", batch(), Needs(relations=frozenset({2})))
    assert [part.shape[-1] for part in found.relations[2]] == [32, 16, 16]
    assert list(found.relations) == [2]
    assert not found.hidden
    assert not found.attentions


def test_queries_are_differentiable_and_hooks_do_not_stay() -> None:
    network = make("BertForSequenceClassification")
    found = ask(network, "text-classification", batch(), Needs(relations=frozenset({3})))
    found.relations[3][0].sum().backward()
    assert network.bert.encoder.layer[0].attention.self.query.weight.grad is not None
    assert not any(module._forward_hooks for name, module in network.named_modules() if name.endswith("query"))


@pytest.mark.parametrize("what", ["hidden", "attentions", "relations"])
def test_a_layer_that_is_not_there_is_named(what: str) -> None:
    network = make("AlbertForSequenceClassification")
    with pytest.raises(TrainError, match=r"layers \[1, 4\] are asked for"):
        ask(network, "text-classification", batch(), Needs(**{what: frozenset({1, 4})}))  # type: ignore[arg-type]
    assert network.config._attn_implementation == "sdpa"


def test_a_network_of_another_build_is_refused() -> None:
    class Own(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
            return torch.zeros(len(input_ids), 2)

    with pytest.raises(TrainError, match=r"queries, keys and values of Own are not found"):
        ask(Own(), "text-classification", batch(), Needs(relations=frozenset({1})))
    with pytest.raises(TrainError, match=r"Own is not from transformers"):
        ask(Own(), "text-classification", batch(), Needs(attentions=frozenset({1})))
    with pytest.raises(TrainError, match=r"hidden_states of layers \[1\] are asked for, and Own gives none"):
        ask(Own(), "text-classification", batch(), Needs(hidden=frozenset({1})))


def test_maps_with_holes_of_dropout_are_refused() -> None:
    network, needs = make("BertForSequenceClassification").train(), Needs(attentions=frozenset({1}))
    with pytest.raises(TrainError, match="Set dropout to false"):
        ask(network, "text-classification", batch(), needs)
    whole = make("BertForSequenceClassification", attention_probs_dropout_prob=0.0).train()
    assert ask(whole, "text-classification", batch(), needs).attentions[1].shape == (2, 4, 7, 7)


def test_needs_add_up_and_a_cache_has_one_temperature() -> None:
    one = Needs(logits=True, temperatures=frozenset({2.0}))
    assert (one | Needs(hidden=frozenset({3}))) == Needs(True, hidden=frozenset({3}), temperatures=frozenset({2.0}))
    assert one.temperature == 2
    assert Needs().temperature == 1
    with pytest.raises(TrainError, match=r"the losses ask \[1.0, 2.0\]"):
        _ = (one | Needs(temperatures=frozenset({1.0}))).temperature


def test_embedding_is_the_mean_over_the_text_of_length_one() -> None:
    states, mask = torch.randn(2, 3, 5), torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = embed(states, mask)
    expected = states[0, :2].mean(0)
    torch.testing.assert_close(found[0], expected / expected.norm())
