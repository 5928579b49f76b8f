"""Weight equalization: the same function, evener ranges, and no guess about which pairs there are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from squeeze.compress.equalize import balance, equalize
from squeeze.compress.links import Link, find_links
from squeeze.compress.quantize import QuantizeStage
from squeeze.errors import QuantizeError
from squeeze.model import Model, answer, load_model

TOKENS = np.random.default_rng(1).integers(0, 100, (3, 24))

LLAMA = {
    ("input_layernorm", "q_proj"), ("v_proj", "o_proj"), ("post_attention_layernorm", "gate_proj"), ("up_proj", "down_proj"),
}  # fmt: skip


def answered(model: Model) -> torch.Tensor:
    inputs = {"input_ids": TOKENS, "attention_mask": np.ones_like(TOKENS), "token_type_ids": np.zeros_like(TOKENS)}
    with torch.no_grad():
        out = model.network(**{name: torch.from_numpy(inputs[name]) for name in model.text_inputs})
    return answer(out, model.task)


def change(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).norm() / before.norm())


def ends(link: Link) -> tuple[str, str]:
    return link.path.split(".")[-1], link.readers[0][0].split(".")[-1]


def named(links: list[Link], depth: int = 2) -> set[tuple[str, str]]:
    return {(".".join(x.path.split(".")[-depth:]), ".".join(x.readers[0][0].split(".")[-depth:])) for x in links}


@pytest.mark.parametrize("family", ["tiny_llama_folder", "tiny_qwen2_folder"])
def test_a_gated_decoder_has_four_links_a_block(family: str, request: pytest.FixtureRequest) -> None:
    links = find_links(load_model(request.getfixturevalue(family)), "")
    assert len(links) == 8
    assert {ends(link) for link in links} == LLAMA


def test_query_heads_that_share_a_key_value_head_share_its_scale(tiny_llama_folder: Path) -> None:
    """4 heads of 16 channels read 2 key-value heads: heads 0 and 1 the first, 2 and 3 the second."""
    link = next(x for x in find_links(load_model(tiny_llama_folder), "") if ends(x) == ("v_proj", "o_proj"))
    first, second = list(range(16)), list(range(16, 32))
    assert link.channels == 32
    assert link.source.tolist() == first + first + second + second


def test_gpt2s_values_are_the_last_third_of_a_fused_matrix(tiny_gpt2_folder: Path) -> None:
    links = find_links(load_model(tiny_gpt2_folder), "")
    assert named(links[:3]) == {("0.ln_1", "attn.c_attn"), ("attn.c_attn", "attn.c_proj"), ("0.ln_2", "mlp.c_fc")}
    assert links[1].rows == slice(128, 192)


def test_a_relu_lets_scales_through_and_gelu_and_post_norms_do_not(
    tiny_t5_folder: Path, tiny_bert_folder: Path
) -> None:
    assert ("wi", "wo") in {ends(link) for link in find_links(load_model(tiny_t5_folder), "")}
    assert named(find_links(load_model(tiny_bert_folder), "")) == {("self.value", "output.dense")}


def test_looking_for_links_changes_nothing(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    find_links(model, "Drop it.")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.network.state_dict().items())


@pytest.mark.parametrize(
    "family",
    ["tiny_llama_folder", "tiny_qwen2_folder", "tiny_gpt2_folder", "tiny_bert_folder", "tiny_roberta_folder", "tiny_t5_folder"],
)  # fmt: skip
def test_every_family_answers_as_before_with_other_weights(family: str, request: pytest.FixtureRequest) -> None:
    model = load_model(request.getfixturevalue(family))
    before, weights = answered(model), {n: p.clone() for n, p in model.network.named_parameters()}
    notes = equalize(model)
    assert change(before, answered(model)) < 1e-3
    moved = [n for n, p in model.network.named_parameters() if not torch.allclose(p, weights[n], rtol=1e-2)]
    assert len(moved) >= 4
    assert "pairs equalized" in notes[0]


def test_both_ranges_of_every_channel_are_equal_in_the_end(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    model.network.model.layers[0].mlp.up_proj.weight[5] *= 40
    equalize(model)
    for link in find_links(model, "Drop it."):
        made, read = link.produced().abs().amax(dim=1), link.pooled(link.read().abs().amax(dim=0), "amax")
        assert torch.allclose(made, read, rtol=0.01)


def test_the_scale_is_the_papers_by_hand() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[8.0, -1.0], [0.0, 0.0]]))
        second.weight.copy_(torch.tensor([[-2.0, 3.0]]))
        link = Link("a", first, slice(0, 2), (("b", second),), torch.arange(2), lambda: torch.ones(1))
        factor = balance(link)
        assert factor.tolist() == [2.0, 1.0]  # √(8 · 2) / 2; nothing makes the other channel
        link.scale(factor)
    assert first.weight[0].tolist() == [4.0, -0.5]
    assert second.weight.tolist() == [[-4.0, 3.0]]


def test_a_planted_uneven_channel_costs_less_once_equalized(tiny_t5_folder: Path) -> None:
    """One scale for the whole matrix: the case that the paper is about."""
    errors = {}
    for setting in (False, True):
        model = load_model(tiny_t5_folder)
        mlp = model.network.encoder.block[0].layer[1].DenseReluDense
        mlp.wi.weight[3] *= 60
        mlp.wo.weight[:, 3] /= 60
        before = answered(model)
        QuantizeStage(scheme="int8", granularity="tensor", equalize=setting).apply(model)
        errors[setting] = change(before, answered(model))
    assert errors[True] < 0.7 * errors[False]


def test_a_network_without_a_link_is_refused_and_left_alone(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every linear layer's output is bent, and every norm's output is read elsewhere too."""
    model = load_model(tiny_llama_folder)
    for module in model.network.modules():
        if isinstance(module, nn.Linear):
            _bend(module, lambda plain, x: torch.tanh(plain(x)) + x.mean())
    before = model.network.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(QuantizeError, match=r"in .* no scale passes .* Drop equalize\."):
        QuantizeStage(scheme="int8-weight", equalize=True).apply(model)
    assert torch.equal(before, model.network.model.layers[0].mlp.up_proj.weight)
    assert not model.integers


def _bend(module: nn.Module, bent: Any) -> None:
    plain = module.forward
    module.forward = lambda x: bent(plain, x)  # type: ignore[method-assign]


def test_a_norm_that_feeds_more_than_its_readers_is_no_link(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    _bend(model.network.model.layers[0].mlp, lambda plain, x: plain(x) + x)
    found = [link.path for link in find_links(model, "Drop it.")]
    assert "model.layers.0.post_attention_layernorm" not in found
    assert "model.layers.1.post_attention_layernorm" in found


def test_a_network_without_blocks_is_refused_with_the_remedy(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64))
    with pytest.raises(QuantizeError, match=r"own has no repeated blocks .* Drop equalize\."):
        equalize(Model(network, None, "causal-lm", "own", {}))


def test_equalizing_is_told_in_the_record_and_needs_no_texts(tiny_llama_folder: Path) -> None:
    stage = QuantizeStage(scheme="int4-weight", equalize=True)
    assert not stage.needs_data
    assert "8 pairs equalized, 4 of them from a norm" in stage.apply(load_model(tiny_llama_folder)).notes[0]
