"""Silent heads: as if they were not there, through training and quantization, and not there in what is exported."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

from squeeze.compress.quantize import QuantizeStage
from squeeze.errors import TrainError
from squeeze.integers import IntegerWeight, round_to_nearest
from squeeze.model import Model
from squeeze.outliers import Outliers
from squeeze.parts import only_heads, tied_attentions
from squeeze.silence import _columns, _cut, _rows, silence_heads, speaking_heads, without_silent

KEPT = ((0, 3), (1, 2))
CONFIG: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "initializer_range": 0.2, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
IDS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))


def bert(**values: Any) -> Any:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = hf.BertForSequenceClassification(hf.BertConfig(**{**CONFIG, **values})).eval().requires_grad_(False)
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network


def as_model(network: Any) -> Model:
    return Model(network, None, "text-classification", "own", network.config.to_dict())


def out(network: Any) -> Tensor:
    with torch.no_grad():
        return network(input_ids=IDS)[0]


def test_silence_is_what_hiding_was() -> None:
    network = bert()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert speaking_heads(network) == ((0, 1, 2, 3),) * 2
    silent = silence_heads(network, KEPT)
    assert speaking_heads(silent) == KEPT
    with only_heads(network, KEPT, tied_attentions(network)):
        torch.testing.assert_close(out(silent), out(network), rtol=0, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    values = silent.bert.encoder.layer[0].attention.self.value
    assert values.weight.view(4, -1).count_nonzero(1).tolist() == [8 * 32, 0, 0, 8 * 32]
    assert values.bias.view(4, -1).count_nonzero(1).tolist() == [8, 0, 0, 8]


def test_without_them_the_network_is_narrower_and_computes_the_same() -> None:
    silent = silence_heads(bert(), KEPT)
    model = as_model(silent)
    cut, notes = without_silent(model)
    attention = cut.network.bert.encoder.layer[1].attention  # type: ignore[union-attr]
    assert attention.self.query.weight.shape == (16, 32)  # type: ignore[union-attr]
    assert attention.output.dense.weight.shape == (32, 16)  # type: ignore[union-attr]
    torch.testing.assert_close(out(cut.network), out(silent), rtol=0, atol=1e-6)
    assert notes == (
        "4 of 8 attention heads are zero in the checkpoint, whose config cannot leave them out; this graph does",
    )
    assert model.network is silent
    assert silent.bert.encoder.layer[1].attention.self.query.weight.shape == (32, 32)


def test_layers_may_lose_unequal_numbers_and_one_head_stays_whatever_happens() -> None:
    silent = silence_heads(bert(), ((1,), (0, 1, 3)))
    cut, _ = without_silent(as_model(silent))
    layers: Any = cut.network.bert.encoder.layer  # type: ignore[union-attr]
    assert [layer.attention.self.key.weight.shape[0] for layer in layers] == [8, 24]
    torch.testing.assert_close(out(cut.network), out(silent), rtol=0, atol=1e-6)
    mute = silence_heads(bert(), ((0,), (0,)))
    for name, parameter in mute.bert.encoder.layer[0].attention.named_parameters():
        parameter.mul_(0 if name.startswith("self") or name == "output.dense.weight" else 1)
    assert speaking_heads(mute) == ((), (0,))
    alone, _ = without_silent(as_model(mute))
    torch.testing.assert_close(out(alone.network), out(mute), rtol=0, atol=1e-6)


def test_a_model_whose_heads_all_speak_is_given_back() -> None:
    model = as_model(bert())
    assert without_silent(model) == (model, ())
    own = Model(torch.nn.Linear(2, 2), None, "causal-lm", "own", {}, factory="tests:own")
    assert without_silent(own) == (own, ())
    assert speaking_heads(torch.nn.Linear(2, 2)) == ()


def test_training_leaves_silent_heads_at_zero() -> None:
    """Every gradient of theirs is a product with a zero; decay keeps zeros too."""
    silent = silence_heads(bert(), KEPT).train().requires_grad_(True)
    before = silent.bert.encoder.layer[0].attention.self.query.weight.detach().clone()
    optimizer = torch.optim.AdamW(silent.parameters(), lr=0.01, weight_decay=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            silent(input_ids=IDS, labels=torch.tensor([0, 1, 2])).loss.backward()
            optimizer.step()
    assert speaking_heads(silent) == KEPT
    for site, heads in zip(tied_attentions(silent), KEPT, strict=True):
        for name in (site.queries, site.keys, site.values):
            rows = silent.get_submodule(name).weight.view(4, -1).count_nonzero(1)
            assert {n for n, count in enumerate(rows.tolist()) if count} == set(heads), name
    assert not torch.equal(before, silent.bert.encoder.layer[0].attention.self.query.weight), "others did learn"


TEXTS = [
    {
        "input_ids": IDS.numpy(),
        "attention_mask": np.ones((3, 9), np.int64),
        "token_type_ids": np.zeros((3, 9), np.int64),
    }
]
STAGES = {
    "int8": QuantizeStage(),
    "smooth": QuantizeStage(smooth_alpha=0.5),
    "outliers": QuantizeStage(outliers=2),
    "equalized": QuantizeStage(equalize=True),
    "static": QuantizeStage(scheme="int8-static"),
    "static gptq": QuantizeStage(scheme="int8-static", method="gptq"),
    "blocks": QuantizeStage(scheme="int8-weight", block_size=16),
}


@pytest.mark.parametrize("name", STAGES)
def test_integers_are_cut_as_the_weights_are(name: str) -> None:
    """Heads of 16, so that blocks of 16 end where they do."""
    silent = silence_heads(bert(hidden_size=64, intermediate_size=64), KEPT)
    model = as_model(silent)
    STAGES[name].apply(model, TEXTS)
    assert speaking_heads(model.network) == KEPT
    cut, _ = without_silent(model)
    assert cut.integers
    state = cut.network.state_dict()
    for weight, integer in cut.integers.items():
        assert torch.equal(integer.dequantize(), state[weight])
    attention = "bert.encoder.layer.0.attention"
    assert cut.integers[f"{attention}.self.query.weight"].shape == (32, 64)
    assert cut.integers[f"{attention}.output.dense.weight"].shape == (64, 32)
    assert model.integers.keys() == cut.integers.keys()
    torch.testing.assert_close(out(cut.network), out(model.network), rtol=0, atol=1e-5)


def test_a_layer_whose_blocks_cut_through_heads_keeps_them_all() -> None:
    model = as_model(silence_heads(bert(), KEPT))  # heads of 8
    name = "bert.encoder.layer.0.attention.output.dense.weight"
    weight = model.network.state_dict()[name]
    model.integers[name] = round_to_nearest(weight, 16, unsigned=True)
    model.network.state_dict()[name].copy_(model.integers[name].dequantize())
    cut, notes = without_silent(model)
    layers: Any = cut.network.bert.encoder.layer  # type: ignore[union-attr]
    assert [layer.attention.self.query.weight.shape[0] for layer in layers] == [32, 16]
    assert notes[0].startswith("2 of 8 attention heads")


def test_rows_and_columns_of_integers_by_hand() -> None:
    whole = IntegerWeight(
        torch.arange(12, dtype=torch.int8).view(3, 4), torch.tensor([[1.0], [2.0], [3.0]]), 0, None,
        divisor=torch.tensor([1.0, 2.0, 3.0, 4.0]),
        outliers=Outliers(torch.tensor([1, 3]), torch.tensor([[10.0, 11.0], [12.0, 13.0], [14.0, 15.0]])),
    )  # fmt: skip
    rows = _rows(whole, torch.tensor([0, 2]))
    torch.testing.assert_close(rows.dequantize(), whole.dequantize()[[0, 2]])
    columns = _columns(whole, torch.tensor([2, 3]))
    torch.testing.assert_close(columns.dequantize(), whole.dequantize()[:, [2, 3]])
    assert columns.outliers is not None
    assert columns.outliers.channels.tolist() == [1]
    assert _columns(whole, torch.tensor([0, 2])).outliers is None
    zeros = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.uint8)
    blocked = dataclasses.replace(
        whole, integers=whole.integers.to(torch.uint8), zero_point=zeros, block_size=2, scale=torch.rand(3, 2), divisor=None, outliers=None
    )  # fmt: skip
    torch.testing.assert_close(_columns(blocked, torch.tensor([2, 3])).dequantize(), blocked.dequantize()[:, [2, 3]])


def test_an_attention_that_cannot_be_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = bert()
    others = tuple(tuple(sorted({0, 1, 2, 3} - {*heads})) for heads in KEPT)
    monkeypatch.setattr("squeeze.silence._cut", lambda cut, sites, kept, right=_cut: right(cut, sites, others))
    with pytest.raises(TrainError, match="does not compute what this one computes without the other heads"):
        silence_heads(network, KEPT)
