"""The walk through the blocks: every layer once, in order, with the inputs that it really reads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from squeeze import layerwise
from squeeze.errors import QuantizeError
from squeeze.layerwise import Gram, Site, repeated_blocks, walk
from squeeze.model import load_model

RNG = np.random.default_rng(0)
BLOCKS = [{"input_ids": RNG.integers(0, 100, (2, 24)), "attention_mask": np.ones((2, 24), np.int64)} for _ in range(2)]
FAMILIES = ["tiny_llama_folder", "tiny_gpt2_folder", "tiny_bert_folder", "tiny_t5_folder"]


def grams(network: nn.Module, batches: list[dict[str, np.ndarray]]) -> dict[str, Gram]:
    found: dict[str, Gram] = {}
    walk(network, batches, lambda layers, site: found.update({name: site.gram() for name, _ in layers}))
    return found


def read_by(network: nn.Module, path: str, batches: list[dict[str, np.ndarray]]) -> torch.Tensor:
    """All that a layer reads in plain calls of the whole network, without padding."""
    rows: list[torch.Tensor] = []
    mask = torch.empty(0)
    hook = network.get_submodule(path).register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0][mask]))
    with torch.no_grad():
        for batch in batches:
            mask = torch.from_numpy(batch["attention_mask"]).bool()
            network(**{n: torch.from_numpy(a) for n, a in batch.items()})
    hook.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_every_block_comes_once_with_what_it_reads(family: str, request: pytest.FixtureRequest) -> None:
    """T5 makes its position bias in the first block and hands it on: blocks differ in what they get beside the hidden state."""
    network = load_model(request.getfixturevalue(family)).network
    batches = [dict(batch) for batch in BLOCKS]
    batches[1]["attention_mask"] = np.array([[1] * 24, [1] * 9 + [0] * 15])
    found = grams(network, batches)
    name, layers = repeated_blocks(network)
    kinds = {"Linear", "Conv1D"}
    assert set(found) == {f"{name}.{path}" for path, module in layers.named_modules() if type(module).__name__ in kinds}
    for path, gram in found.items():
        x = read_by(network, path, batches)
        assert gram.tokens == len(x) == 24 * 3 + 9
        assert torch.allclose(gram.matrix, x.T @ x / len(x), rtol=1e-3, atol=1e-5)


def test_layers_that_read_one_tensor_come_together_and_in_order(tiny_llama_folder: Path) -> None:
    groups: list[list[str]] = []
    walk(
        load_model(tiny_llama_folder).network,
        BLOCKS,
        lambda layers, _: groups.append([n.split(".")[-1] for n, _ in layers]),
    )
    assert groups == 2 * [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize("way", ["waiting", "anew", "too much to hold"])
@pytest.mark.parametrize("family", FAMILIES)
def test_later_layers_see_what_was_done_to_earlier_ones(
    family: str, way: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, biases and hooks that a layer gets reach all that come after it, whether runs wait or are made anew."""
    network = load_model(request.getfixturevalue(family)).network
    if way == "too much to hold":
        monkeypatch.setattr(layerwise, "HELD", 0)

    def change(layers: list[tuple[str, nn.Module]], site: Site) -> None:
        site.stream(lambda _: None, batches=1)
        seen.update({name: site.gram().matrix.clone() for name, _ in layers})
        for _, module in layers:
            module.weight.mul_(0.5)
            if module.bias is not None:
                module.bias.add_(0.1)
            module.register_forward_pre_hook(lambda _, x: (x[0] * 1.5, *x[1:]))

    seen: dict[str, torch.Tensor] = {}
    walk(network, BLOCKS, change, alone=way != "anew")
    for path, gram in seen.items():
        # All before it has been changed by now; its own hook comes after the one that reads.
        x = read_by(network, path, BLOCKS) / 1.5
        assert torch.allclose(gram, x.T @ x / len(x), rtol=1e-3, atol=1e-5), path


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_computes_once_for_each_batch(family: str, request: pytest.FixtureRequest) -> None:
    """But for the first batch, on which the blocks' calls and each block's groups are found; and T5, whose first block makes what the
    others get, so that the others cannot be passed by."""
    network = load_model(request.getfixturevalue(family)).network
    computed: dict[str, int] = {}
    for path, module in repeated_blocks(network)[1].named_modules():
        if hasattr(module, "weight") and module.weight.dim() == 2:
            module.register_forward_hook(lambda *_, path=path: computed.update({path: computed.get(path, 0) + 1}))
    walk(network, 5 * BLOCKS[:1], lambda layers, site: site.gram())
    first = {count for path, count in computed.items() if path.startswith("0.")}
    last = {count for path, count in computed.items() if path.startswith("1.")}
    assert last == {5 + 1}
    assert first == ({5 + 1 + 5} if "t5" in family else {5 + 1 + 1})


def test_a_step_that_fails_leaves_the_network_as_it_runs(tiny_llama_folder: Path) -> None:
    network = load_model(tiny_llama_folder).network
    before = read_by(network, "model.layers.1.mlp.down_proj", BLOCKS)

    def fail(layers: list[tuple[str, nn.Module]], site: Site) -> None:
        site.gram()
        if layers[0][0].endswith("o_proj"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk(network, BLOCKS, fail)
    assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in network.modules())
    assert torch.equal(read_by(network, "model.layers.1.mlp.down_proj", BLOCKS), before)


def test_progress_counts_the_blocks(tiny_bert_folder: Path) -> None:
    said: list[tuple[int, int]] = []
    walk(load_model(tiny_bert_folder).network, BLOCKS, lambda *_: None, lambda i, n: said.append((i, n)))
    assert said == [(1, 2), (2, 2)]


def test_inputs_that_are_not_finite_name_the_layer(tiny_llama_folder: Path) -> None:
    network = load_model(tiny_llama_folder).network
    network.model.layers[1].input_layernorm.weight[3] = float("inf")
    with pytest.raises(QuantizeError, match=r"inputs of model\.layers\.1\.self_attn\.q_proj are not finite"):
        grams(network, BLOCKS)


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(QuantizeError, match="no repeated blocks"):
        repeated_blocks(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4)))


def test_a_gram_matrix_is_the_mean_however_it_is_fed() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    gram = Gram(torch.zeros(6, 6))
    for part in (x[:7], x[7:7], x[7:].view(43, 1, 6)):
        gram.add(part)
    assert gram.tokens == 50
    assert torch.allclose(gram.matrix, x.T @ x / 50, atol=1e-6)
