"""The int8 stage on real, tiny networks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from squeeze.compress.plan import best_block, make_plans
from squeeze.compress.quantize import SCHEMES, QuantizeStage
from squeeze.errors import QuantizeError
from squeeze.integers import Grid
from squeeze.model import load_model

BATCHES = [
    {"input_ids": np.random.default_rng(0).integers(0, 100, (4, 24)), "attention_mask": np.ones((4, 24), np.int64)}
]

WITH_INTEGERS = sorted(name for name, scheme in SCHEMES.items() if scheme.layout("").half is None)


@pytest.mark.parametrize("scheme", WITH_INTEGERS)
@pytest.mark.parametrize("family", ["tiny_llama_folder", "tiny_bert_folder", "tiny_gpt2_folder"])
def test_every_scheme_leaves_exactly_the_dequantized_weights(
    scheme: str, family: str, request: pytest.FixtureRequest
) -> None:
    model = load_model(request.getfixturevalue(family))
    record = QuantizeStage(scheme=scheme).apply(model, BATCHES)
    parameters = dict(model.network.named_parameters())
    assert model.integers
    for name, integer in model.integers.items():
        assert torch.equal(parameters[name], integer.dequantize())
    in_integers = {row.name for row in record.layers if row.bits < 32}
    assert in_integers == set(model.integers)
    assert all(row.sqnr_db is None or row.sqnr_db > (30 if row.bits > 7 else 15) for row in record.layers)
    assert all(row.note for row in record.layers)


@pytest.mark.parametrize("family", ["tiny_llama_folder", "tiny_bert_folder", "tiny_gpt2_folder"])
def test_gptq_brings_the_outputs_nearer_and_says_so_of_every_layer(family: str, request: pytest.FixtureRequest) -> None:
    model = load_model(request.getfixturevalue(family))
    record = QuantizeStage(scheme="int4-weight", method="gptq").apply(model, BATCHES)
    parameters = dict(model.network.named_parameters())
    for name, integer in model.integers.items():
        assert torch.equal(parameters[name], integer.dequantize())
    by_gptq = [row for row in record.layers if row.output_sqnr_db is not None]
    assert {model.integers[row.name].bits for row in by_gptq} == {4}
    for row in by_gptq:
        assert row.output_sqnr_db > float(row.note.split("nearest: ")[1].split(" dB")[0])
    assert any("GPTQ on" in note and "96 calibration tokens" in note for note in record.notes)


def test_gptq_twice_gives_the_same_integers_and_the_same_record(tiny_llama_folder: Path) -> None:
    models = [load_model(tiny_llama_folder) for _ in range(2)]
    one, other = (
        QuantizeStage(scheme="int4-weight", method="gptq").apply(m, BATCHES).model_dump(exclude={"seconds"})
        for m in models
    )
    assert one == other
    for name, integer in models[0].integers.items():
        assert torch.equal(integer.integers, models[1].integers[name].integers)


def test_four_bit_schemes_keep_tables_and_the_output_matrix_in_eight(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    record = QuantizeStage(scheme="int4-weight").apply(model)
    assert {n for n, w in model.integers.items() if w.bits == 8} == {"model.embed_tokens.weight"}
    assert any("int4" in note and "int8" in note for note in record.notes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "gptq"}, r"method gptq needs calibration texts\. Set data\.splits\.calibration"),
        ({"scheme": "int8-weight", "symmetric": False}, "8-bit blocks are symmetric"),
    ],
)
def test_what_cannot_be_says_how_to_mend_it(settings: dict[str, Any], message: str, tiny_llama_folder: Path) -> None:
    with pytest.raises(QuantizeError, match=message):
        QuantizeStage(**settings).apply(load_model(tiny_llama_folder))


def test_an_unknown_method_offers_the_known() -> None:
    with pytest.raises(ValidationError, match="gptq"):
        QuantizeStage(method="gtpq")


def test_tied_matrices_are_quantized_once_and_stay_tied(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    QuantizeStage().apply(model)
    assert model.network.lm_head.weight is model.network.model.embed_tokens.weight
    assert [n for n in model.integers if "embed" in n or "lm_head" in n] == ["model.embed_tokens.weight"]


def test_small_heads_stay_in_float_and_say_why(tiny_bert_folder: Path) -> None:
    model = load_model(tiny_bert_folder)
    record = QuantizeStage().apply(model)
    head = next(row for row in record.layers if row.name == "classifier.weight")
    assert head.bits == 32
    assert "3 outputs" in head.note


def test_kept_layers_do_not_change(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    before = model.network.model.layers[0].mlp.down_proj.weight.clone()
    record = QuantizeStage(keep=("*.down_proj",)).apply(model)
    assert torch.equal(before, model.network.model.layers[0].mlp.down_proj.weight)
    assert not any("down_proj" in name for name in model.integers)
    assert any("keep '*.down_proj'" in row.note for row in record.layers)


def test_a_keep_that_matches_nothing_is_an_error_that_offers_the_nearest(tiny_llama_folder: Path) -> None:
    with pytest.raises(QuantizeError, match="matches no layer"):
        QuantizeStage(keep=("model.layers.0.mlp.down_prj",)).apply(load_model(tiny_llama_folder))


def test_an_unknown_scheme_offers_the_known() -> None:
    with pytest.raises(ValidationError, match="int8"):
        QuantizeStage(scheme="int7")


def test_nan_weights_are_named_with_their_count(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    model.network.model.layers[1].mlp.up_proj.weight[0, :3] = float("nan")
    with pytest.raises(QuantizeError, match=r"layers\.1\.mlp\.up_proj\.weight \(3\)"):
        QuantizeStage().apply(model)


def test_quantizing_twice_is_refused(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    QuantizeStage().apply(model)
    with pytest.raises(QuantizeError, match="already quantized"):
        QuantizeStage().apply(model)


def test_a_block_size_for_an_encoder_is_refused(tiny_bert_folder: Path) -> None:
    with pytest.raises(QuantizeError, match="one scale per output row"):
        QuantizeStage(block_size=32).apply(load_model(tiny_bert_folder))


@pytest.mark.parametrize(
    ("columns", "largest", "expected"),
    [(576, 256, 64), (1536, 256, 256), (64, 256, 64), (384, 256, 128), (576, 32, 32), (100, 256, 256)],
)
def test_the_block_divides_the_row_where_one_can(columns: int, largest: int, expected: int) -> None:
    block = best_block(columns, largest)
    if columns == 100:
        assert -columns % block == min(-columns % size for size in (32, 64, 128, 256))
    else:
        assert block == expected


@pytest.mark.parametrize("scheme", WITH_INTEGERS)
def test_lstm_layers_are_int8_by_row_in_every_scheme_and_stay_in_float_whole(scheme: str) -> None:
    network = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(100, 64), "lstm": torch.nn.LSTM(64, 64, 2)})
    stage = QuantizeStage(scheme=scheme, keep=("lstm.weight_hh_l1",))
    plans = make_plans(network, stage, SCHEMES[scheme].layout("causal-lm"))
    for name in ("lstm.weight_ih_l0", "lstm.weight_hh_l0"):
        assert (plans[name].block_size, plans[name].grid) == (None, Grid(8, symmetric=True, unsigned=False))
    assert plans["lstm.weight_ih_l1"].grid is None
    assert plans["lstm.weight_ih_l1"].note == "kept in float with lstm.weight_hh_l1: one kernel takes both"
    assert plans["lstm.weight_hh_l1"].note == "kept in float: keep 'lstm.weight_hh_l1'"
