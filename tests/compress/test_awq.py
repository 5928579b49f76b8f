"""AWQ: the same float function, less error of the outputs, and a plain word where no scale can be moved."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from squeeze.compress.awq import GRID, Scaler, channel_scale, clipped, error
from squeeze.compress.gptq import output_sqnr_db
from squeeze.compress.plan import Plan
from squeeze.compress.quantize import QuantizeStage
from squeeze.errors import QuantizeError
from squeeze.exporter import export_onnx
from squeeze.integers import Grid, round_to_nearest
from squeeze.model import Model, answer, load_model
from squeeze.verification import verify

INT4 = Grid(4, symmetric=False)
TOKENS = np.random.default_rng(0).integers(0, 100, (4, 24))
BATCHES = [{"input_ids": TOKENS, "attention_mask": np.ones_like(TOKENS)}]


def answered(model: Model) -> torch.Tensor:
    inputs = BATCHES[0] | {"token_type_ids": np.zeros_like(TOKENS)}
    with torch.no_grad():
        out = model.network(**{name: torch.from_numpy(inputs[name]) for name in model.text_inputs})
    return answer(out, model.task)


def change(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).norm() / before.norm())


def plant(model: Model) -> None:
    """Two channels that a norm makes large, as real decoders have them, with weights that are no larger for it."""
    for layer in model.network.model.layers:
        layer.post_attention_layernorm.weight[[3, 40]] *= 30
        layer.input_layernorm.weight[7] *= 30


@pytest.mark.parametrize(
    "family", ["tiny_llama_folder", "tiny_qwen2_folder", "tiny_gpt2_folder", "tiny_t5_folder", "tiny_bert_folder"]
)
def test_folding_changes_weights_but_not_the_function(family: str, request: pytest.FixtureRequest) -> None:
    model = load_model(request.getfixturevalue(family))
    before, weights = answered(model), {n: p.clone() for n, p in model.network.named_parameters()}
    scaler = Scaler.of(model)
    plans = {id(m): Plan(m.weight, not isinstance(m, nn.Linear), "", 64, INT4) for m in scaler.links}
    with torch.no_grad():
        for link in dict.fromkeys(scaler.links.values()):
            width = len(link.source)
            x = torch.randn(400, width, generator=torch.Generator().manual_seed(width)) * torch.linspace(0.1, 9, width)
            layers = [(f"{name}.weight", module, plans[id(module)]) for name, module in link.readers]
            scaler.fold(layers, x.T @ x / 400, x.abs().mean(dim=0))
    assert change(before, answered(model)) < 1e-3
    assert sum(alpha > 0 for alpha in scaler.alphas) >= len(scaler.alphas) / 2
    assert any(not torch.allclose(p, weights[n], rtol=0.1) for n, p in model.network.named_parameters())


@pytest.mark.parametrize("scheme", ["int4-weight", "int8-weight"])
def test_planted_outlier_channels_cost_strictly_less_than_by_rounding(scheme: str, tiny_llama_folder: Path) -> None:
    errors = {}
    for method in ("round", "awq"):
        model = load_model(tiny_llama_folder)
        plant(model)
        before = answered(model)
        QuantizeStage(scheme=scheme, method=method).apply(model, BATCHES)
        errors[method] = change(before, answered(model))
    assert errors["awq"] < 0.85 * errors["round"]


@pytest.mark.parametrize("method", ["awq", "awq-gptq"])
@pytest.mark.parametrize("family", ["tiny_llama_folder", "tiny_gpt2_folder", "tiny_bert_folder", "tiny_t5_folder"])
def test_every_family_is_left_with_exactly_the_dequantized_weights(
    method: str, family: str, request: pytest.FixtureRequest
) -> None:
    """Also where a matrix was rounded before the layer that reads it asked for its scale (value → output, up → down)."""
    model = load_model(request.getfixturevalue(family))
    record = QuantizeStage(scheme="int4-weight", method=method).apply(model, BATCHES)
    parameters = dict(model.network.named_parameters())
    for name, integer in model.integers.items():
        assert torch.equal(parameters[name], integer.dequantize())
    rows = [row for row in record.layers if row.output_sqnr_db is not None]
    assert {model.integers[row.name].bits for row in rows} == {4}
    gains = [row.output_sqnr_db - float(row.note.split("nearest: ")[1].split(" dB")[0]) for row in rows]  # type: ignore[operator]
    assert min(gains) > -0.05
    assert np.mean(gains) > (3 if method == "awq-gptq" else 0.3)


@pytest.mark.parametrize("family", ["tiny_llama_folder", "tiny_gpt2_folder", "tiny_bert_folder", "tiny_t5_folder"])
def test_scaled_networks_export_and_verify(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Norms and biases carry half of every scale: an export that took them from elsewhere would answer otherwise."""
    model = load_model(request.getfixturevalue(family))
    QuantizeStage(scheme="int4-weight", method="awq-gptq", equalize=True).apply(model, BATCHES)
    export_onnx(model, tmp_path)
    assert [c for c in verify(model, tmp_path) if not c.passed] == []


def test_awq_twice_gives_the_same_integers_and_the_same_record(tiny_llama_folder: Path) -> None:
    models = [load_model(tiny_llama_folder) for _ in range(2)]
    stage = QuantizeStage(scheme="int4-weight", method="awq")
    one, other = (stage.apply(m, BATCHES).model_dump(exclude={"seconds"}) for m in models)
    assert one == other
    assert all(torch.equal(w.integers, models[1].integers[n].integers) for n, w in models[0].integers.items())


def test_layers_that_nothing_can_be_folded_into_are_named(tiny_bert_folder: Path) -> None:
    """BERT's norms feed the residual sum as well, and its GELU lets no scale through: value → output alone is left."""
    record = QuantizeStage(scheme="int4-weight", method="awq").apply(load_model(tiny_bert_folder), BATCHES)
    assert "AWQ scaled the inputs of 2 groups" in record.notes[0]
    assert "not scaled: 2 query, 2 key, 2 value, 4 dense" in record.notes[1]
    said = {row.name.split(".", 4)[-1]: row.note for row in record.layers if "layer.0" in row.name}
    assert "nothing before it takes a scale" in said["intermediate.dense.weight"]
    assert "α = " in said["output.dense.weight"] or "α = " in said["attention.output.dense.weight"]


def test_layers_kept_in_float_are_not_scaled_and_it_is_said(tiny_bert_folder: Path) -> None:
    stage = QuantizeStage(scheme="int4-weight", method="awq", keep=("*attention.output.dense",))
    assert "AWQ scaled nothing" in stage.apply(load_model(tiny_bert_folder), BATCHES).notes[0]


def test_a_network_where_nothing_can_be_folded_is_refused(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    for module in model.network.modules():
        if isinstance(module, nn.Linear):
            module.forward = _bent(module.forward)  # type: ignore[method-assign]
    with pytest.raises(QuantizeError, match=r"in .* no scale passes .* Use method: round\."):
        QuantizeStage(scheme="int4-weight", method="awq").apply(model, BATCHES)
    assert not model.integers


def _bent(plain: Any) -> Any:
    return lambda x: torch.tanh(plain(x)) + x.mean()


@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
def test_one_scale_per_row_is_refused_with_the_remedy(scheme: str, tiny_bert_folder: Path) -> None:
    with pytest.raises(QuantizeError, match="for weights in blocks; .* Use int8-weight or int4-weight"):
        QuantizeStage(scheme=scheme, method="awq").apply(load_model(tiny_bert_folder), BATCHES)


@pytest.mark.parametrize("method", ["awq", "awq-gptq"])
def test_awq_without_calibration_names_the_setting(method: str, tiny_llama_folder: Path) -> None:
    with pytest.raises(QuantizeError, match=rf"method {method} needs calibration texts\. Set data\.splits"):
        QuantizeStage(scheme="int4-weight", method=method).apply(load_model(tiny_llama_folder))


def test_the_scale_is_the_papers_power_of_the_mean_by_hand() -> None:
    size = torch.tensor([16.0, 1.0, 4.0, 0.0])
    assert channel_scale(size, 0.5).tolist() == [2.0, 0.5, 1.0, 1.0]  # 4, 1, 2 over √(4 · 1); the last was never seen
    assert channel_scale(size, 0.0).tolist() == [1.0] * 4
    assert channel_scale(torch.zeros(3), 0.7).tolist() == [1.0] * 3


@pytest.mark.parametrize("transposed", [False, True])
def test_the_error_is_that_of_the_outputs_on_the_activations_themselves(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(300, 64, generator=generator), torch.randn(8, 64, generator=generator)
    scale = torch.linspace(0.5, 2, 64)
    rounded = round_to_nearest(weight * scale, 32, unsigned=True, bits=4, symmetric=False).dequantize()
    exact = float((x @ (rounded / scale - weight).T).square().sum() / len(x))
    plan = Plan(weight.T.contiguous() if transposed else weight, transposed, "", 32, INT4)
    assert error([plan], x.T @ x / len(x), scale) == pytest.approx(exact, rel=1e-4)
    assert error([plan, plan], x.T @ x / len(x), scale) == pytest.approx(2 * exact, rel=1e-4)


def test_the_grid_is_of_twenty_from_none_to_all() -> None:
    assert (len(GRID), GRID[0], GRID[-1]) == (20, 0.0, 1.0)


@pytest.mark.parametrize(("columns", "block"), [(128, 64), (100, 32), (64, None)])
def test_clipping_never_loses_more_of_a_blocks_output_than_the_extremes(columns: int, block: int | None) -> None:
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(500, columns, generator=generator).cumsum(dim=1)
    weight = torch.randn(12, columns, generator=generator) ** 3
    gram = x.T @ x / len(x)
    ours = clipped(weight, gram, block, INT4)
    plain = round_to_nearest(weight, block, unsigned=True, bits=4, symmetric=False)
    size = block or columns

    def lost(rounded: torch.Tensor) -> torch.Tensor:
        parts = range(0, columns, size)
        return torch.stack(
            [((rounded - weight)[:, p : p + size] @ x[:, p : p + size].T).square().sum(1) for p in parts]
        )

    assert bool((lost(ours.dequantize()) <= lost(plain.dequantize()) * (1 + 1e-4)).all())
    assert float(lost(ours.dequantize()).sum()) < 0.9 * float(lost(plain.dequantize()).sum())
    turned = clipped(weight.T.contiguous(), gram, block, INT4, transposed=True)
    assert torch.equal(turned.integers, ours.integers)
    assert output_sqnr_db(weight, ours, gram) is not None
