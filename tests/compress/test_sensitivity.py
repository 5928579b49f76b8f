"""Sensitivity measured on tiny networks, and what is chosen by it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from squeeze.compress.mixed import MixedSettings
from squeeze.compress.plan import make_plans
from squeeze.compress.quantize import SCHEMES, QuantizeStage
from squeeze.compress.sensitivity import quantized
from squeeze.errors import QuantizeError
from squeeze.exporter import export_onnx
from squeeze.model import Model, load_model
from squeeze.playback import Meter
from squeeze.report.schema import LayerRow, StageRecord
from squeeze.simulation import simulate_activations
from squeeze.verification import verify

RNG = np.random.default_rng(0)
PLANTED = {
    "bert": ("bert.encoder.layer.0.attention.self.value", "bert.encoder.layer.0.attention.output.dense.weight"),
    "llama": ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj.weight"),
}
OUTLIERS = {family: after for family, (_, after) in PLANTED.items()}


def batches(padded: bool) -> list[dict[str, np.ndarray]]:
    found = []
    for _ in range(2):
        ids, mask = RNG.integers(4, 200, (3, 24)), np.ones((3, 24), np.int64)
        mask[-1, 16 if padded else 24 :] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    return found


TEXTS = {"bert": batches(True), "llama": batches(False)}


def planted(family: str, folder: Path) -> Model:
    """A network that computes the same, one of whose layers no integers fit: one input comes a hundred times smaller from the layer
    before and meets weights a hundred times larger, beside which the others round to nothing."""
    model = load_model(folder)
    parameters = dict(model.network.named_parameters())
    before, after = PLANTED[family]
    parameters[f"{before}.weight"][5] /= 100
    if f"{before}.bias" in parameters:
        parameters[f"{before}.bias"][5] /= 100
    parameters[after][:, 5] *= 100
    return model


def mostly(record: StageRecord) -> float:
    """Half of what all layers cost, each alone."""
    return sum(errors(record).values()) / 2


def apply(model: Model, family: str, **settings: Any) -> StageRecord:
    return QuantizeStage.model_validate(settings).apply(model, TEXTS[family])


def errors(record: StageRecord) -> dict[str, float]:
    return {row.name: row.sensitivity for row in record.layers if row.sensitivity is not None}


def only(rows: tuple[LayerRow, ...], words: str) -> list[str]:
    return [row.name for row in rows if words in row.note]


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("bert", "int8"),
        ("bert", "int8-static"),
        ("bert", "int4-weight"),
        ("llama", "int4-weight"),
        ("llama", "int8-static"),
    ],
)
def test_the_layer_with_outliers_is_the_most_sensitive_and_the_one_that_is_kept(
    family: str, scheme: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    plain = planted(family, folder)
    apply(plain, family, scheme=scheme, smooth_alpha=0)
    full = sum(w.stored_bytes for w in plain.integers.values()) + 4 * (
        plain.parameters - sum(w.integers.numel() for w in plain.integers.values())
    )
    model = planted(family, folder)
    room = 4 * dict(model.network.named_parameters())[OUTLIERS[family]].numel()  # bytes of that one layer in float
    mixed = {"size": (full + room) / 1e6, "fallback": "float"}
    record = apply(model, family, scheme=scheme, smooth_alpha=0, mixed=mixed)
    found = errors(record)
    assert found[OUTLIERS[family]] > 2 * max(error for name, error in found.items() if name != OUTLIERS[family])
    assert OUTLIERS[family] in only(record.layers, "kept in float: alone, its integers cost")
    assert OUTLIERS[family] not in model.integers
    assert {row.sensitivity_unit for row in record.layers if row.sensitivity is not None} == {
        "nats per text" if family == "bert" else "nats per token"
    }


def test_in_four_bits_what_is_kept_goes_to_eight_and_the_whole_comes_within_the_budget(tiny_llama_folder: Path) -> None:
    model, free = planted("llama", tiny_llama_folder), planted("llama", tiny_llama_folder)
    loose = apply(free, "llama", scheme="int4-weight", mixed={"budget": 50})
    assert only(loose.layers, "kept at 8 bits") == []
    budget = mostly(loose)
    record = apply(model, "llama", scheme="int4-weight", mixed={"budget": budget})
    kept = only(record.layers, "kept at 8 bits")
    assert OUTLIERS["llama"] in kept
    assert {name for name, w in model.integers.items() if w.bits == 8} == {*kept, "model.embed_tokens.weight"}
    saved = float(record.notes[-2].removeprefix("as saved: ").split()[0])
    assert saved <= budget
    meter = Meter(again := planted("llama", tiny_llama_folder), TEXTS["llama"], None)
    with quantized(again, model.integers, {}, model.activations):
        assert meter.distance() == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
def test_a_layer_costs_what_the_network_with_that_layer_quantized_says(scheme: str, tiny_bert_folder: Path) -> None:
    """Against the long way: a copy in which the others are kept by name, run whole."""
    record = apply(load_model(tiny_bert_folder), "bert", scheme=scheme, smooth_alpha=0, bias_correction=True,
                   calibrator="minmax" if scheme == "int8-static" else "mse", mixed={"budget": 1.0})  # fmt: skip
    for name in ("bert.encoder.layer.0.attention.self.value.weight", "bert.encoder.layer.1.output.dense.weight"):
        others = tuple(one for one in errors(record) if one != name)
        alone, source = load_model(tiny_bert_folder), load_model(tiny_bert_folder)
        apply(alone, "bert", scheme=scheme, smooth_alpha=0, keep=others,
              calibrator="minmax" if scheme == "int8-static" else "mse")  # fmt: skip
        simulate_activations(alone)
        exact, found = [], []
        with torch.no_grad():
            for batch in TEXTS["bert"]:
                inputs = {key: torch.from_numpy(array) for key, array in batch.items()}
                exact.append(source.network(**inputs).logits.double().log_softmax(-1))
                found.append(alone.network(**inputs).logits.double().log_softmax(-1))
        p, q = torch.cat(exact), torch.cat(found)
        expected = float((p.exp() * (p - q)).sum(-1).mean())
        if scheme == "int8":
            assert errors(record)[name] == pytest.approx(expected, rel=0.02)
        else:  # its range comes from a trial in which the layers before it are quantized, too
            assert 0.5 < errors(record)[name] / expected < 2


def test_measuring_leaves_the_network_as_it_was(tiny_bert_folder: Path) -> None:
    model = load_model(tiny_bert_folder)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    stage = QuantizeStage(scheme="int8")
    plans = make_plans(model.network, stage, SCHEMES["int8"].layout(model.task))
    meter = Meter(model, TEXTS["bert"], None)
    assert meter.distance() == 0
    integers = {name: plan.to_nearest() for name, plan in plans.items() if plan.grid is not None}
    with quantized(model, integers, {}, "dynamic-uint8"):
        assert meter.distance() > 0
    assert meter.distance() == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.network.modules())


def test_two_runs_give_one_record(tiny_llama_folder: Path) -> None:
    one, other = (
        apply(load_model(tiny_llama_folder), "llama", scheme="int4-weight", method="gptq", mixed={"budget": 0.05})
        for _ in range(2)
    )
    assert one.model_dump(exclude={"seconds"}) == other.model_dump(exclude={"seconds"})


@pytest.mark.vnni
@pytest.mark.parametrize(
    ("family", "scheme"), [("llama", "int4-weight"), ("bert", "int8-static"), ("qwen2", "int4-weight")]
)
def test_what_was_chosen_exports_and_verifies(
    family: str, scheme: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, texts = request.getfixturevalue(f"tiny_{family}_folder"), "bert" if family == "bert" else "llama"
    budget = mostly(apply(load_model(folder), texts, scheme=scheme, mixed={"budget": 50}))
    model = load_model(folder)
    record = apply(model, texts, scheme=scheme, method="gptq", mixed={"budget": budget})
    assert only(record.layers, "alone, its integers cost")
    export_onnx(model, tmp_path)
    assert [c for c in verify(model, tmp_path) if not c.passed] == []


@pytest.mark.parametrize("scheme", ["int8", "int4-weight"])
def test_the_matrices_of_one_recurrent_layer_are_one_unit(scheme: str) -> None:
    class Recurrent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(200, 64)
            self.lstm = torch.nn.LSTM(64, 64, 2, batch_first=True)
            self.lm_head = torch.nn.Linear(64, 200, bias=False)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.lm_head(self.lstm(self.embedding(input_ids))[0])

    torch.manual_seed(0)
    model = Model(Recurrent().eval().requires_grad_(False), None, "causal-lm", "own", {}, factory="tests:own")
    model.network.lstm.weight_hh_l1[:, 3] *= 300
    record = apply(model, "llama", scheme=scheme, mixed={"size": 0.2, "fallback": "float"})
    found = errors(record)
    assert found["lstm.weight_ih_l1"] == found["lstm.weight_hh_l1"] > 10 * found["lstm.weight_ih_l0"] > 0
    assert {"lstm.weight_ih_l1", "lstm.weight_hh_l1"} <= set(only(record.layers, "kept in float"))
    assert "forward" not in vars(model.network.lstm)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixed": {"size": 0.01}}, r"size 0.01 MB cannot be: with every layer .* weights are 0\.\d\d MB\. Allow"),
        ({"mixed": {"size": 50}}, "size 50 MB leaves nothing to choose"),
        ({"mixed": {"budget": 1e-12}}, "budget 1e-12 leaves no layer to quantize"),
        ({"mixed": {"budget": 1, "fallback": "int8"}}, "mixed.fallback int8 is for 4-bit schemes; int8 has 8 bits"),
        ({"scheme": "int4-weight", "mixed": {"budget": 1e-12}}, "still differ by .* nats per text. Allow more"),
    ],
)
def test_what_cannot_be_says_how_to_mend_it(settings: dict[str, Any], message: str, tiny_bert_folder: Path) -> None:
    with pytest.raises(QuantizeError, match=message):
        apply(load_model(tiny_bert_folder), "bert", **settings)


def test_no_texts_and_no_goal_or_two_are_refused(tiny_bert_folder: Path) -> None:
    stage = QuantizeStage(mixed=MixedSettings(budget=0.1))
    assert stage.needs_data
    with pytest.raises(QuantizeError, match="mixed needs calibration texts"):
        stage.apply(load_model(tiny_bert_folder))
    for wrong in ({}, {"budget": 0.1, "size": 3}):
        with pytest.raises(ValueError, match="exactly one"):
            MixedSettings.model_validate(wrong)
