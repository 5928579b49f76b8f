"""Derivatives by gates, against differences of the loss."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from squeeze.errors import PruneError
from squeeze.parts import feed_forwards, tied_attentions
from squeeze.pruning.gates import layer_gates, loss_of, reader_gates

STEP = 1e-5
CONFIG: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip


def drawn(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval().double().requires_grad_(False)


@pytest.fixture(scope="module")
def bert() -> Any:
    return drawn(hf.BertForSequenceClassification, hf.BertConfig(**CONFIG, num_labels=3))


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    whole = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1])}
    return [{name: tensor[:2] for name, tensor in whole.items()}, {name: tensor[2:] for name, tensor in whole.items()}]


def alone(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Every text by itself and without padding."""
    found = []
    for batch in batches:
        for n, mask in enumerate(batch["attention_mask"].bool()):
            found.append({"input_ids": batch["input_ids"][n, mask][None], "labels": batch["labels"][n : n + 1]})
    return found


def slope(network: Any, scale: Any, text: dict[str, Tensor], task: str) -> float:
    """(L(1 + ε) − L(1 − ε)) / 2ε, where `scale(factor)` multiplies a part of the network and gives back how to undo it."""
    found = []
    for factor in (1 + STEP, 1 - STEP):
        undo = scale(factor)
        with torch.no_grad():
            logits = network(input_ids=text["input_ids"])[0]
        found.append(float(loss_of(task, "taylor", [text])(logits, text)))
        undo()
    return (found[0] - found[1]) / (2 * STEP)


def columns(weight: Tensor, part: slice) -> Any:
    """Scaling what is read is scaling the weights that read it."""

    def scale(factor: float) -> Any:
        kept = weight[:, part].clone()
        weight[:, part] = kept * factor
        return lambda: weight[:, part].copy_(kept)

    return scale


def test_gates_on_neurons_and_heads_are_slopes_of_the_loss(bert: Any, batches: list[dict[str, Tensor]]) -> None:
    loss = loss_of("text-classification", "taylor", batches)
    for sites, units in (
        ([site.reader for site in feed_forwards(bert)], 6),
        ([site.output for site in tied_attentions(bert)], 2),
    ):
        found = reader_gates(bert, sites, units, batches, "text-classification", loss)
        for name, values in zip(sites, found, strict=True):
            weight = bert.get_submodule(name).weight
            size = weight.shape[1] // units
            for unit in range(units):
                part = slice(unit * size, (unit + 1) * size)
                slopes = [slope(bert, columns(weight, part), text, "text-classification") for text in alone(batches)]
                assert float(values[unit]) == pytest.approx(sum(map(abs, slopes)) / 3, rel=1e-4, abs=1e-8)


def test_gates_on_layers_are_slopes_between_passing_on_and_computing(batches: list[dict[str, Tensor]]) -> None:
    config = hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3)
    network = drawn(hf.GPT2LMHeadModel, config)
    layers = list(network.transformer.h)
    found = layer_gates(network, layers, batches, "causal-lm", loss_of("causal-lm", "taylor", batches))

    def mixing(layer: Any) -> Any:
        def scale(factor: float) -> Any:
            return layer.register_forward_hook(lambda _, args, out: args[0] + factor * (out - args[0])).remove

        return scale

    for layer, value in zip(layers, found, strict=True):
        slopes = [slope(network, mixing(layer), text, "causal-lm") for text in alone(batches)]
        assert value == pytest.approx(sum(map(abs, slopes)) / 3, rel=1e-4)
    assert not any(layer._forward_hooks for layer in layers)


def test_gradients_that_are_no_numbers_are_told(batches: list[dict[str, Tensor]]) -> None:
    broken = drawn(hf.BertForSequenceClassification, hf.BertConfig(**CONFIG, num_labels=3))
    broken.classifier.weight[0, 0] = float("nan")
    loss = loss_of("text-classification", "taylor", batches)
    with pytest.raises(PruneError, match="gradients of the loss are not finite"):
        reader_gates(broken, [feed_forwards(broken)[0].reader], 6, batches, "text-classification", loss)
