"""Scans of tiny networks: each figure against the network pruned so and run whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from squeeze import parts
from squeeze.errors import PruneError
from squeeze.model import Model, load_model
from squeeze.playback import divergence
from squeeze.pruning import sensitivity
from squeeze.pruning.allocation import allocate
from squeeze.pruning.sensitivity import default_sparsities, scan, sensitivity_table
from squeeze.pruning.settings import PruneStage, RemoveSettings

RNG = np.random.default_rng(0)
SPARSITIES = (0.3, 0.6)


def texts(task: str) -> list[dict[str, np.ndarray]]:
    found = []
    for _ in range(2):
        ids, mask = RNG.integers(4, 200, (3, 24)), np.ones((3, 24), np.int64)
        mask[-1, 16 if task != "causal-lm" else 24 :] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    return found


TEXTS = {task: texts(task) for task in ("causal-lm", "text-classification", "feature-extraction")}
FOLDERS = ["tiny_llama_folder", "tiny_gpt2_folder", "tiny_bert_folder"]


def opened(name: str, request: pytest.FixtureRequest) -> Model:
    return load_model(request.getfixturevalue(name))


def logits(model: Model, batch: dict[str, np.ndarray]) -> Tensor:
    inputs = {name: torch.from_numpy(batch[name]) for name in model.text_inputs}
    with torch.no_grad():
        found: Tensor = model.network(**inputs).logits
    return found.log_softmax(-1)


def test_a_classifier_s_matrix_costs_what_the_network_pruned_so_says(request: pytest.FixtureRequest) -> None:
    model, stage = opened("tiny_bert_folder", request), PruneStage(sparsity=0.5, criterion="magnitude")
    rows = scan(model, TEXTS[model.task], stage, SPARSITIES)
    assert {row.sparsity for row in rows} == set(SPARSITIES)
    (row,) = (r for r in rows if r.unit == "bert.encoder.layer.1.output.dense.weight" and r.sparsity == 0.6)
    assert (row.layer, row.part, row.weights) == (1, "output.dense", 64 * 128)
    exact = [logits(model, batch) for batch in TEXTS[model.task]]
    weight = dict(model.network.named_parameters())[row.unit]
    with torch.no_grad():
        limit = weight.abs().flatten().sort().values[round(0.6 * weight.numel())]
        weight.mul_(weight.abs() >= limit)
    found = [logits(model, batch) for batch in TEXTS[model.task]]
    assert row.loss == pytest.approx(float(divergence(torch.cat(exact), torch.cat(found)).mean()), rel=1e-3)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_matrix_of_the_layers_is_scanned_and_the_network_stays_as_it_was(
    folder: str, request: pytest.FixtureRequest
) -> None:
    model = opened(folder, request)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    told: list[tuple[int, int]] = []
    rows = scan(model, TEXTS[model.task], PruneStage(sparsity=0.5), SPARSITIES, lambda i, n: told.append((i, n)))
    names = {row.unit for row in rows}
    assert len(names) == {"tiny_llama_folder": 14, "tiny_gpt2_folder": 8, "tiny_bert_folder": 12}[folder]
    assert len(rows) == 2 * len(names)
    assert told[-1] == (2, 2)
    losses = {(row.unit, row.sparsity): row.loss for row in rows}
    assert all(0 < losses[name, 0.3] < losses[name, 0.6] for name in names)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.network.modules())
    assert set(allocate(rows, 0.4)) == names


def test_a_block_is_all_its_matrices_at_once(request: pytest.FixtureRequest) -> None:
    model = opened("tiny_llama_folder", request)
    keep = ("*.mlp.down_proj",)
    rows = scan(model, TEXTS[model.task], PruneStage(sparsity=0.5, keep=keep), (0.5,), by="block")
    assert [(row.unit, row.layer, row.kind, row.part) for row in rows] == [
        ("model.layers.0", 0, "block", ""),
        ("model.layers.1", 1, "block", ""),
    ]
    assert all(len(row.names) == 6 and not any("down_proj" in name for name in row.names) for row in rows)
    alone = scan(model, TEXTS[model.task], PruneStage(sparsity=0.5, keep=keep), (0.5,))
    for row in rows:
        assert row.weights == sum(one.weights for one in alone if one.layer == row.layer)
        assert row.loss > max(one.loss for one in alone if one.layer == row.layer)


@pytest.mark.parametrize("by", ["heads", "neurons"])
def test_hidden_parts_cost_what_the_network_without_them_says(by: Any, request: pytest.FixtureRequest) -> None:
    model = opened("tiny_llama_folder", request)
    rows = scan(model, TEXTS[model.task], PruneStage(sparsity=0.5), (0.2, 0.25, 0.5), by=by)
    wanted = {"heads": {0.2, 0.5}, "neurons": {0.2, 0.25, 0.5}}[by]  # of four heads, 0.25 hides the one that 0.2 hides
    assert {(row.unit, row.sparsity) for row in rows} == {(f"model.layers.{n}", s) for n in (0, 1) for s in wanted}
    assert all(row.kind == by == row.part and row.names == () and row.loss > 0 for row in rows)
    (row,) = (row for row in rows if row.layer == 1 and row.sparsity == 0.5)
    tensors = [{"input_ids": torch.from_numpy(batch["input_ids"])} for batch in TEXTS["causal-lm"]]
    network = model.network
    scores = getattr(sensitivity, f"{by[:-1]}_importance")(network, tensors)
    number = len(scores[1])
    kept = [tuple(range(number)), tuple(sorted(scores[1].topk(number // 2).indices.tolist()))]
    meter = sensitivity._meter(model, TEXTS["causal-lm"], None)
    with getattr(parts, f"only_{by}")(network, kept):
        assert row.loss == pytest.approx(meter.distance(), rel=1e-4)


def test_a_table_says_how_it_was_measured_and_two_runs_give_one(request: pytest.FixtureRequest) -> None:
    model = opened("tiny_llama_folder", request)
    stage = PruneStage(sparsity=0.5)
    one, other = (sensitivity_table(model, TEXTS[model.task], stage, by="block") for _ in range(2))
    assert one == other
    assert one.sparsities == (0.3, 0.5, 0.7)
    assert (one.criterion, one.pattern, one.unit, one.texts) == ("wanda", "unstructured", "nats per token", 4)


def test_sparsities_are_chosen_around_the_target_and_for_the_pattern() -> None:
    assert default_sparsities(PruneStage(sparsity=0.5)) == (0.3, 0.5, 0.7)
    assert default_sparsities(PruneStage(remove=RemoveSettings(neurons=0.5))) == (0.3, 0.5, 0.7)
    assert default_sparsities(PruneStage(sparsity=0.9)) == (0.7, 0.9, 0.95)
    assert default_sparsities(PruneStage(pattern="3:4")) == (0.75,)


@pytest.mark.parametrize(
    ("changes", "sparsities", "message"),
    [
        ({}, (), "no sparsity is given: a scan needs shares"),
        ({}, (0.5, 1.0), r"sparsity 1 is not in \(0, 1\)"),
        (
            {"keep": ("*.nothing",)},
            (0.5,),
            r"keep '\*.nothing' matches no matrix",
        ),
        ({"keep": ("*",)}, (0.5,), "BertForSequenceClassification has no matrix to prune"),
    ],
)
def test_what_cannot_be_scanned_says_how_to_mend_it(
    changes: dict[str, Any], sparsities: tuple[float, ...], message: str, request: pytest.FixtureRequest
) -> None:
    model = opened("tiny_bert_folder", request)
    with pytest.raises(PruneError, match=message):
        scan(model, TEXTS[model.task], PruneStage(sparsity=0.5, **changes), sparsities)


def test_no_texts_and_integers_are_refused(tiny_bert_folder: Path) -> None:
    from squeeze.compress import QuantizeStage

    model = load_model(tiny_bert_folder)
    with pytest.raises(PruneError, match="measured on calibration texts, and there are none"):
        scan(model, (), PruneStage(sparsity=0.5), (0.5,))
    QuantizeStage().apply(model)
    with pytest.raises(PruneError, match="is quantized. Scan the float artifact"):
        scan(model, TEXTS[model.task], PruneStage(sparsity=0.5), (0.5,))


def test_a_network_without_layers_is_scanned_but_for_what_answers() -> None:
    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(200, 16)
            self.inner = torch.nn.Linear(16, 40)
            self.lm_head = torch.nn.Linear(40, 200)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.lm_head(self.inner(self.embedding(input_ids)).relu())

    torch.manual_seed(0)
    model = Model(Flat().eval().requires_grad_(False), None, "causal-lm", "own", {}, factory="tests:own")
    rows = scan(model, TEXTS["causal-lm"], PruneStage(sparsity=0.5), (0.5,), by="block")
    assert [(row.unit, row.layer, row.kind) for row in rows] == [("inner.weight", None, "matrix")]
