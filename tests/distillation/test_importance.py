"""What layers, heads and neurons do, against the definitions computed the long way."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional

from squeeze.distillation.importance import block_influence, head_importance, neuron_importance
from squeeze.errors import TrainError

HEADS, SIZE = 4, 8
COMMON: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": HEADS,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture
def llama() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON, num_key_value_heads=2)).eval()


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    """Two batches of unequal lengths; the second text of the first ends in padding."""
    random = torch.Generator().manual_seed(1)
    first = torch.randint(3, 60, (2, 9), generator=random)
    mask = torch.ones_like(first)
    mask[1, 5:] = 0
    second = torch.randint(3, 60, (1, 4), generator=random)
    return [
        {"input_ids": first, "attention_mask": mask},
        {"input_ids": second, "attention_mask": torch.ones_like(second)},
    ]


def texts(batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """Every text alone, without padding."""
    return [
        ids[mask.bool()][None]
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_block_influence_is_one_minus_the_cosine(llama: Any, batches: list[dict[str, Tensor]]) -> None:
    cosines: list[list[Tensor]] = [[], [], []]
    layers = llama.model.layers
    with torch.no_grad():
        for ids in texts(batches):
            states = llama.model(input_ids=ids, output_hidden_states=True).hidden_states
            for n in range(2):  # the last of them is behind the final norm, so the last layer is run by hand below
                cosines[n].append(functional.cosine_similarity(states[n], states[n + 1], dim=-1).flatten())
            places = torch.arange(ids.shape[1])[None]
            mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)[None, None]
            turns = llama.model.rotary_emb(states[2], places)
            last = layers[2](states[2], attention_mask=mask, position_ids=places, position_embeddings=turns)
            cosines[2].append(functional.cosine_similarity(states[2], last, dim=-1).flatten())
    expected = [float((1 - torch.cat(each)).mean()) for each in cosines]
    assert block_influence(llama, batches) == pytest.approx(expected, rel=1e-4)
    assert len(torch.cat(cosines[0])) == 18


def test_a_layer_that_adds_nothing_has_no_influence(llama: Any, batches: list[dict[str, Tensor]]) -> None:
    with torch.no_grad():
        llama.model.layers[1].self_attn.o_proj.weight.zero_()
        llama.model.layers[1].mlp.down_proj.weight.zero_()
    influence = block_influence(llama, batches)
    assert influence[1] == pytest.approx(0, abs=1e-6)
    assert min(influence[0], influence[2]) > 0.01


def test_heads_and_neurons_count_what_they_add(llama: Any, batches: list[dict[str, Tensor]]) -> None:
    read: dict[str, list[Tensor]] = {"o_proj": [], "down_proj": []}
    layer = llama.model.layers[1]
    for name, module in (("o_proj", layer.self_attn.o_proj), ("down_proj", layer.mlp.down_proj)):
        module.register_forward_pre_hook(lambda _, args, name=name: read[name].append(args[0][0]))
    with torch.no_grad():
        for ids in texts(batches):
            llama(input_ids=ids)
    mixed, neurons = torch.cat(read["o_proj"]).double(), torch.cat(read["down_proj"]).double()
    out, down = layer.self_attn.o_proj.weight.double(), layer.mlp.down_proj.weight.double()
    heads = []
    for h in range(HEADS):
        at = slice(h * SIZE, (h + 1) * SIZE)
        heads.append((mixed[:, at] @ out[:, at].T).norm(dim=1).mean())
    added = torch.stack([(neurons[:, j, None] * down[:, j]).norm(dim=1).mean() for j in range(48)])
    torch.testing.assert_close(head_importance(llama, batches)[1], torch.stack(heads).detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(neuron_importance(llama, batches)[1], added.detach(), rtol=1e-5, atol=0)


def test_neurons_of_a_transposed_matrix(batches: list[dict[str, Tensor]]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gpt2 = hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_inner=40, n_positions=64, initializer_range=0.2
            )
        ).eval()
    read: list[Tensor] = []
    gpt2.transformer.h[0].mlp.c_proj.register_forward_pre_hook(lambda _, args: read.append(args[0][0]))
    with torch.no_grad():
        for ids in texts(batches):
            gpt2(input_ids=ids)
    weight = gpt2.transformer.h[0].mlp.c_proj.weight.detach()
    expected = torch.stack([(torch.cat(read)[:, j, None] * weight[j]).norm(dim=1).mean() for j in range(40)])
    torch.testing.assert_close(neuron_importance(gpt2, batches)[0], expected.double(), rtol=1e-4, atol=1e-9)


def test_no_texts_are_told(llama: Any) -> None:
    with pytest.raises(TrainError, match="measured on texts, and there are none"):
        block_influence(llama, [])
    assert not llama.model.layers[0]._forward_hooks, "hooks go whatever happens"
