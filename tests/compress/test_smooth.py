"""SmoothQuant: the same float function, evener activations, and no guess about which norms may be smoothed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from squeeze.compress.quantize import QuantizeStage
from squeeze.compress.smooth import find_groups, smooth
from squeeze.errors import QuantizeError
from squeeze.model import load_model

BLOCKS = np.random.default_rng(0).integers(0, 100, (3, 24))


def answer(model: object) -> torch.Tensor:
    with torch.no_grad():
        return model.network(input_ids=torch.from_numpy(BLOCKS)).logits  # type: ignore[attr-defined]


def test_smoothing_changes_weights_but_not_the_function(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    before, weight = answer(model), model.network.model.layers[0].mlp.up_proj.weight.clone()
    assert len(smooth(model, 0.5, BLOCKS)) == 4  # two norms a layer; the last feeds the tied output and is left alone
    assert torch.linalg.norm(answer(model) - before) / torch.linalg.norm(before) < 1e-4
    assert not torch.equal(weight, model.network.model.layers[0].mlp.up_proj.weight)


def test_smoothing_evens_out_an_outlier_channel(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    model.network.model.layers[0].post_attention_layernorm.weight[3] *= 50

    def unevenness() -> float:
        peaks = [g.peaks for g in find_groups(model.network, BLOCKS)]
        return max(float(p.max() / p.median()) for p in peaks if p is not None)

    before = unevenness()
    smooth(model, 0.5, BLOCKS)
    assert unevenness() < before / 3


def test_the_tied_output_matrix_stays_as_it_is(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    before = model.network.lm_head.weight.clone()
    smooth(model, 0.5, BLOCKS)
    assert torch.equal(before, model.network.lm_head.weight)


def test_a_network_whose_norms_feed_more_than_linear_layers_is_refused_and_left_whole(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    layer = model.network.model.layers[0]
    plain = type(layer.mlp).forward

    def with_side_path(x: torch.Tensor) -> torch.Tensor:
        return plain(layer.mlp, x) + x

    layer.mlp.forward = with_side_path
    before = answer(model)
    with pytest.raises(QuantizeError, match="feed more than linear layers"):
        smooth(model, 0.5, BLOCKS)
    assert torch.linalg.norm(answer(model) - before) / torch.linalg.norm(before) < 1e-4


def test_smoothing_without_calibration_names_the_setting(tiny_llama_folder: Path) -> None:
    with pytest.raises(QuantizeError, match=r"data\.splits\.calibration"):
        QuantizeStage(smooth_alpha=0.5).apply(load_model(tiny_llama_folder))


def test_a_post_norm_encoder_is_smoothed_by_divisors_and_computes_the_same(tiny_bert_folder: Path) -> None:
    """The norm's output feeds the residual sum as well, so that the layers divide what they read themselves."""
    plain, smoothed = load_model(tiny_bert_folder), load_model(tiny_bert_folder)
    batch = [{"input_ids": BLOCKS, "attention_mask": np.ones_like(BLOCKS)}]
    QuantizeStage(smooth_alpha=0).apply(plain)
    record = QuantizeStage(smooth_alpha=0.5).apply(smoothed, batch)
    assert any("divided channel by channel" in note for note in record.notes)
    divided = [w for w in smoothed.integers.values() if w.divisor is not None]
    assert len(divided) == 2 * 6 + 1  # six products a layer, and the pooler
    for name, weight in smoothed.integers.items():
        exact = dict(load_model(tiny_bert_folder).network.named_parameters())[name]
        assert float((weight.dequantize() - exact).norm() / exact.norm()) < 0.02


def test_a_block_wise_scheme_smooths_decoders_only(tiny_bert_folder: Path) -> None:
    with pytest.raises(QuantizeError, match="for Transformers decoders"):
        QuantizeStage(scheme="int8-weight", smooth_alpha=0.5).apply(
            load_model(tiny_bert_folder), [{"input_ids": BLOCKS}]
        )
