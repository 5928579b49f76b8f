"""Outlier channels on tiny networks: planted ones are found, errors fall, artifacts keep them, and what cannot be is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from squeeze.compress.outliers import outlier_channels
from squeeze.compress.qat import QatStage
from squeeze.compress.quantize import QuantizeStage
from squeeze.errors import QuantizeError
from squeeze.model import Model, load_model, save_model
from squeeze.simulation import simulation

RNG = np.random.default_rng(0)
BATCHES = [{"input_ids": RNG.integers(4, 100, (4, 24)), "attention_mask": np.ones((4, 24), np.int64)} for _ in range(2)]
TRAIN = [{"input_ids": RNG.integers(0, 100, (8, 16)), "attention_mask": np.ones((8, 16), np.int64)} for _ in range(4)]
PLANTED = (3, 17, 40)


def planted(folder: Path) -> Model:
    """The tiny BERT with three channels that dwarf the others, as post-norm encoders have them."""
    model = load_model(folder)
    for layer in model.network.bert.encoder.layer:
        layer.attention.output.LayerNorm.weight.data[list(PLANTED)] = torch.tensor([40.0, 60.0, 50.0])
        # As in trained networks, what reads them is small: they add no more to the outputs than others do.
        layer.intermediate.dense.weight.data[:, list(PLANTED)] *= 0.1
    return model


def logits(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(**{name: torch.from_numpy(array) for name, array in BATCHES[0].items()}).logits


def distance(model: Model, teacher: Model) -> float:
    """Relative distance of the rounded network's log-probabilities from the teacher's, on the training texts."""
    network = simulation(model)
    with torch.no_grad():
        pairs = [
            (network(**inputs).logits, teacher.network(**inputs).logits)
            for batch in TRAIN
            for inputs in [{name: torch.from_numpy(array) for name, array in batch.items()}]
        ]
    ours, theirs = (torch.cat(side).log_softmax(dim=-1) for side in zip(*pairs, strict=True))
    return float((ours - theirs).norm() / theirs.norm())


def error(folder: Path, **settings: Any) -> float:
    """Relative error of the logits of the planted network after quantization with rounded activations."""
    model = planted(folder)
    exact = logits(model.network)
    QuantizeStage.model_validate(settings).apply(model, BATCHES)
    return float((logits(simulation(model)) - exact).norm() / exact.norm())


@pytest.mark.parametrize("method", ["round", "gptq"])
@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
def test_the_planted_channels_are_found_and_the_error_falls_strictly(
    scheme: str, method: str, tiny_bert_folder: Path
) -> None:
    common: dict[str, Any] = {"scheme": scheme, "method": method, "smooth_alpha": 0}
    assert error(tiny_bert_folder, **common, outliers=3) < 0.6 * error(tiny_bert_folder, **common)
    noise: dict[int, list[float]] = {}
    for count in (0, 1, 3):
        model = planted(tiny_bert_folder)
        record = QuantizeStage(**common, outliers=count).apply(model, BATCHES)
        readers = [row for row in record.layers if row.name.endswith("intermediate.dense.weight")]
        noise[count] = [row.output_sqnr_db or 0 for row in readers]
    for none, one, three in zip(*noise.values(), strict=True):
        assert none < one < three
        assert three > none + 10
    for layer in range(2):
        kept = model.integers[f"bert.encoder.layer.{layer}.intermediate.dense.weight"].outliers
        assert kept is not None
        assert tuple(kept.channels.tolist()) == PLANTED
    assert any("3 input channels of 13 layers stay in float (LLM.int8())" in note for note in record.notes)
    row = next(row for row in record.layers if row.name.endswith("1.intermediate.dense.weight"))
    assert "3 input channels in float" in row.note
    assert row.bits > 8 + 3 * 32 / 64


def test_the_integers_are_zero_there_and_the_columns_are_the_weights(tiny_bert_folder: Path) -> None:
    model = planted(tiny_bert_folder)
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    QuantizeStage(scheme="int8-static", outliers=3).apply(model, BATCHES)
    seen = 0
    for name, integer in model.integers.items():
        if integer.outliers is not None:
            channels = integer.outliers.channels
            assert not bool(integer.integers[:, channels].any())
            assert torch.equal(dict(model.network.named_parameters())[name][:, channels], before[name][:, channels])
            seen += 1
    assert seen == 13


def test_products_of_peak_and_weight_decide() -> None:
    size, matrices = torch.tensor([1.0, 9.0, 2.0, 5.0]), [torch.tensor([[1.0, 0.1, 3.0, 0.0], [0.0, -0.2, 1.0, 1.0]])]
    assert outlier_channels(size, matrices, 2).tolist() == [2, 3]
    assert outlier_channels(size, [*matrices, torch.tensor([[0.0, 2.0, 0.0, 0.0]])], 2).tolist() == [1, 2]


@pytest.mark.parametrize("calibrator", ["minmax", "percentile", "entropy", "mse"])
def test_ranges_are_those_of_the_other_channels(calibrator: str, tiny_bert_folder: Path) -> None:
    common: dict[str, Any] = {"scheme": "int8-static", "smooth_alpha": 0, "calibrator": calibrator}
    found = []
    for count in (0, 3):
        model = planted(tiny_bert_folder)
        QuantizeStage(**common, outliers=count).apply(model, BATCHES)
        inputs = model.integers["bert.encoder.layer.1.intermediate.dense.weight"].inputs
        assert inputs is not None
        found.append(inputs.scale)
    assert found[1] < 0.25 * found[0]


@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
def test_an_artifact_keeps_them(scheme: str, tiny_gpt2_folder: Path, tiny_bert_folder: Path, tmp_path: Path) -> None:
    model = load_model(tiny_gpt2_folder if scheme == "int8-static" else tiny_bert_folder)
    QuantizeStage(scheme=scheme, outliers=4).apply(model, BATCHES)
    save_model(model, tmp_path)
    from safetensors.torch import load_file

    from squeeze.integers import from_tensors, layout_of

    back = from_tensors(load_file(tmp_path / "integers.safetensors"), layout_of(model.integers))
    assert any(weight.outliers is not None for weight in back.values())
    parameters = dict(model.network.named_parameters())
    assert all(torch.equal(weight.dequantize(), parameters[name]) for name, weight in back.items())


@pytest.mark.parametrize(
    ("family", "scheme"),
    [("tiny_bert_folder", "int8"), ("tiny_bert_folder", "int8-static"), ("tiny_gpt2_folder", "int8-static")],
)
def test_training_moves_the_float_columns_too(family: str, scheme: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    model, teacher = load_model(folder), load_model(folder)
    QuantizeStage(scheme=scheme, outliers=4, granularity="tensor").apply(model, TRAIN)
    before, start = dict(model.integers), distance(model, teacher)
    QatStage(epochs=12, learning_rate=3e-4, batch=8).apply(model, TRAIN, None, teacher)
    assert distance(model, teacher) < start
    parameters, moved = dict(model.network.named_parameters()), 0
    for name, integer in model.integers.items():
        assert torch.equal(parameters[name], integer.dequantize())
        old, new = before[name].outliers, integer.outliers
        if old is not None:
            assert old.same_channels(new)
            assert new is not None
            assert not bool(integer.integers[:, new.channels].any())
            moved += not torch.equal(old.columns, new.columns)
    assert moved


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"scheme": "int8-weight", "outliers": 4},
            "outliers is for schemes with one scale per output row; int8-weight",
        ),
        ({"scheme": "int4-weight", "outliers": 4}, "an outlier spoils its own block alone. Drop it"),
        ({"scheme": "int8", "outliers": 64}, r"outliers: 64, but .* has 64 input channels. Lower it"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_touched(
    settings: dict[str, Any], message: str, tiny_bert_folder: Path
) -> None:
    model = load_model(tiny_bert_folder)
    before = logits(model.network)
    with pytest.raises(QuantizeError, match=message):
        QuantizeStage.model_validate(settings).apply(model, BATCHES)
    assert torch.equal(logits(model.network), before)


def test_a_decoder_in_int8_is_block_wise_and_says_so(tiny_llama_folder: Path) -> None:
    with pytest.raises(QuantizeError, match="int8 rounds the inputs of causal-lm block by block.*choose int8-static"):
        QuantizeStage(scheme="int8", outliers=4).apply(load_model(tiny_llama_folder), BATCHES)


def test_without_texts_it_says_which_setting_wants_them(tiny_bert_folder: Path) -> None:
    with pytest.raises(QuantizeError, match=r"outliers needs calibration texts.*data\.splits\.calibration"):
        QuantizeStage(scheme="int8", outliers=4).apply(load_model(tiny_bert_folder))


def test_a_network_without_a_layer_for_them_says_so() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(100, 64)
            self.head = torch.nn.Linear(64, 100, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(input_ids).tanh())

    model = Model(Own().eval().requires_grad_(False), None, "feature-extraction", "own", {}, factory="tests:own")
    with pytest.raises(QuantizeError, match="no layer of own can keep outliers in float"):
        QuantizeStage(scheme="int8", outliers=4).apply(model, [{"input_ids": BATCHES[0]["input_ids"]}])
