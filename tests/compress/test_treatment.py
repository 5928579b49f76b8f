"""Static activations on real, tiny networks: what is written down, what is simulated, and what goes wrong in words."""

from pathlib import Path

import numpy as np
import pytest
import torch

import squeeze
from squeeze.compress.quantize import QuantizeStage
from squeeze.errors import QuantizeError
from squeeze.model import Model, load_model
from squeeze.simulation import simulation

RNG = np.random.default_rng(0)
BATCHES = [{"input_ids": RNG.integers(0, 100, (4, 24)), "attention_mask": np.ones((4, 24), np.int64)} for _ in range(3)]
FAMILIES = ["tiny_llama_folder", "tiny_bert_folder", "tiny_gpt2_folder"]


def logits(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        batch = {name: torch.from_numpy(array) for name, array in BATCHES[0].items()}
        return network(**batch).logits


def error(folder: Path, **settings: object) -> float:
    """Relative error of the logits after quantization with rounded activations."""
    model = load_model(folder)
    exact = logits(model.network)
    QuantizeStage.model_validate({"scheme": "int8-static", **settings}).apply(model, BATCHES)
    return float((logits(simulation(model)) - exact).norm() / exact.norm())


@pytest.mark.parametrize("method", ["round", "gptq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_integer_layer_outside_the_ends_has_a_fixed_range(
    family: str, method: str, request: pytest.FixtureRequest
) -> None:
    model = load_model(request.getfixturevalue(family))
    exact = logits(model.network)
    record = QuantizeStage(scheme="int8-static", method=method).apply(model, BATCHES)
    tables = {f"{n}.weight" for n, m in model.network.named_modules() if isinstance(m, torch.nn.Embedding)}
    linear = {name: w for name, w in model.integers.items() if name not in tables and w.block_size is None}
    assert linear
    assert all(weight.inputs is not None for weight in linear.values())
    rows = {row.name: row for row in record.layers}
    assert all(rows[name].output_sqnr_db > 20 for name in linear)
    after = logits(simulation(model))
    assert 0 < float((after - exact).norm() / exact.norm()) < 0.1
    assert not any(module._forward_pre_hooks for module in model.network.modules())


def test_smoothing_takes_outlier_channels_out_of_the_activations(tiny_bert_folder: Path) -> None:
    model = load_model(tiny_bert_folder)
    for layer in model.network.bert.encoder.layer:
        layer.attention.output.LayerNorm.weight.data[3] = 120.0  # a channel that dwarfs the others
    folder = tiny_bert_folder.parent / "outlier-bert"
    model.network.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    without = error(folder, smooth_alpha=0, calibrator="minmax")
    assert error(folder, smooth_alpha=0.8, calibrator="minmax") < 0.85 * without


def test_bias_correction_and_granularity_do_something(tiny_bert_folder: Path) -> None:
    assert error(tiny_bert_folder, granularity="channel") < error(tiny_bert_folder, granularity="tensor")
    one, other = (load_model(tiny_bert_folder) for _ in range(2))
    QuantizeStage(scheme="int8-static").apply(one, BATCHES)
    QuantizeStage(scheme="int8-static", bias_correction=False).apply(other, BATCHES)
    name = "bert.encoder.layer.0.intermediate.dense"
    assert not torch.equal(one.network.get_submodule(name).bias, other.network.get_submodule(name).bias)
    untouched = load_model(tiny_bert_folder).network.get_submodule(name).bias
    assert torch.equal(other.network.get_submodule(name).bias, untouched)


def test_without_texts_it_says_where_they_are_named(tiny_bert_folder: Path) -> None:
    with pytest.raises(QuantizeError, match=r"int8-static needs calibration texts.*data\.splits\.calibration"):
        QuantizeStage(scheme="int8-static").apply(load_model(tiny_bert_folder))


def test_inputs_that_are_always_zero_are_told_of(tiny_bert_folder: Path) -> None:
    model = load_model(tiny_bert_folder)
    layer = model.network.bert.encoder.layer[0].intermediate.dense
    layer.weight.data.zero_()
    layer.bias.data.zero_()  # GELU(0) = 0: the next layer reads nothing
    record = QuantizeStage(scheme="int8-static").apply(model, BATCHES)
    assert any("inputs of 1 layers were zero" in note for note in record.notes)
    assert bool(logits(simulation(model)).isfinite().all())


def test_infinite_inputs_name_the_layer(tiny_bert_folder: Path) -> None:
    model = load_model(tiny_bert_folder)
    model.network.bert.encoder.layer[1].attention.output.LayerNorm.weight.data.fill_(3e38)
    with pytest.raises(QuantizeError, match=r"inputs of bert\.encoder\.layer\.1\.intermediate\.dense are not finite"):
        QuantizeStage(scheme="int8-static").apply(model, BATCHES)


@pytest.mark.parametrize("wanted", [("int8-static", "group"), ("int4-weight", "channel"), ("int4-weight", "tensor")])
def test_a_granularity_without_a_kernel_is_refused(wanted: tuple[str, str], tiny_bert_folder: Path) -> None:
    scheme, granularity = wanted
    with pytest.raises(QuantizeError, match=f"granularity {granularity}.*has kernels for"):
        QuantizeStage.model_validate({"scheme": scheme, "granularity": granularity}).apply(
            load_model(tiny_bert_folder), BATCHES
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "int8-static", "granularity": "tensor", "method": "gptq"}, "fits a scale to each row"),
        ({"scheme": "int8", "calibrator": "minmax"}, "calibrator is for int8-static"),
        ({"scheme": "int4-weight", "bias_correction": False}, "bias_correction is for int8-static"),
    ],
)
def test_a_setting_that_nothing_would_read_is_refused(
    settings: dict[str, object], message: str, tiny_bert_folder: Path
) -> None:
    with pytest.raises(QuantizeError, match=message):
        QuantizeStage.model_validate(settings).apply(load_model(tiny_bert_folder), BATCHES)


def test_a_module_without_repeated_blocks_is_calibrated_as_a_whole() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(100, 64)
            self.middle = torch.nn.Linear(64, 64)
            self.lm_head = torch.nn.Linear(64, 100)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.lm_head(self.middle(self.embedding(input_ids)).tanh())

    torch.manual_seed(0)
    model = Model(Own().eval().requires_grad_(False), None, "causal-lm", "own", {}, factory="tests:own")
    QuantizeStage(scheme="int8-static").apply(model, BATCHES)
    assert model.integers["middle.weight"].inputs is not None
    assert model.integers["lm_head.weight"].block_size == 32


def test_a_static_artifact_is_saved_and_opened_whole(tiny_bert_folder: Path, tmp_path: Path) -> None:
    artifact = squeeze.quantize(
        tiny_bert_folder, tmp_path / "run", scheme="int8-static",
        data={"path": str(texts(tmp_path)), "label_column": "label", "splits": {"evaluate": 4, "calibration": 16}},
    )  # fmt: skip
    opened = load_model(artifact.folder)
    linear = [w for w in opened.integers.values() if w.inputs is not None]
    assert len(linear) == 2 * 6 + 1
    assert all(w.divisor is not None for w in linear)
    again = load_model(artifact.folder)
    assert torch.equal(logits(simulation(opened)), logits(simulation(again)))
    parameters = dict(opened.network.named_parameters())
    assert all(torch.equal(parameters[name], w.dequantize()) for name, w in opened.integers.items())


def texts(folder: Path) -> Path:
    """Labelled texts that the tiny tokenizers know."""
    words = ["alpha", "beta", "gamma", "delta", "the", "of", "and", "model"]
    rows = [f'"{" ".join(RNG.choice(words, 6))} {n}",{n % 2}' for n in range(40)]
    file = folder / "texts.csv"
    file.write_text("text,label\n" + "\n".join(rows) + "\n", "utf-8")
    return file
