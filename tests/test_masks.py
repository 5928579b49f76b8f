"""Zeros of pruned matrices: where they are known from, and that nothing between pruning and an exported graph moves one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from squeeze.artifact import Artifact
from squeeze.compress import QatStage, QuantizeStage
from squeeze.compress.advice import Machine
from squeeze.errors import QuantizeError
from squeeze.masks import Pruned, carried, from_rows, further_zeros, kept_zero, masks_of, to_rows
from squeeze.model import Model, load_model, save_model
from squeeze.stages import apply_stage, write

RNG = np.random.default_rng(0)
BATCHES: list[dict[str, Any]] = [
    {"input_ids": RNG.integers(4, 200, (4, 16)), "attention_mask": np.ones((4, 16), np.int64), "labels": RNG.integers(0, 3, 4)}
    for _ in range(2)
]  # fmt: skip


def by_hand(model: Model, share: float = 0.5) -> dict[str, torch.Tensor]:
    """Set the smallest weights of every linear layer in the blocks to zero; which ones stay."""
    kept = {}
    for name, parameter in model.network.named_parameters():
        if parameter.dim() == 2 and (".layer" in name or ".h." in name):
            gone = parameter.abs().flatten().argsort()[: round(share * parameter.numel())]
            with torch.no_grad():
                parameter.view(-1)[gone] = 0
            model.pruned[name] = Pruned("unstructured", share, len(gone))
            kept[name] = parameter.detach() != 0
    return kept


def stays(model: Model, kept: dict[str, torch.Tensor]) -> bool:
    """Whether all pruned weights are exactly 0 in the network and, where there are integers, in those."""
    parameters = dict(model.network.named_parameters())
    floats = all(bool((parameters[name][~keep] == 0).all()) for name, keep in kept.items())
    return floats and all(
        bool((integer.dequantize()[~kept[name]] == 0).all()) for name, integer in model.integers.items() if name in kept
    )


# Where they are known from


def test_masks_are_where_the_named_matrices_are_not_zero(tiny_bert_folder: Path) -> None:
    model = load_model(tiny_bert_folder)
    assert masks_of(model) == {}
    kept = by_hand(model)
    found = masks_of(model)
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], keep) for name, keep in kept.items())
    assert sum(one.zeros for one in model.pruned.values()) == sum(int((~keep).sum()) for keep in kept.values())
    assert further_zeros(model) == {}
    name = next(iter(kept))
    with torch.no_grad():
        dict(model.network.named_parameters())[name].view(-1)[kept[name].view(-1).nonzero()[:3]] = 0
    assert further_zeros(model) == {name: 3}


def test_a_manifest_says_what_was_pruned() -> None:
    pruned = {"a.weight": Pruned("2:4", 0.5, 8), "b.weight": Pruned("unstructured", 0.3, 5)}
    assert from_rows(json.loads(json.dumps(to_rows(pruned)))) == pruned
    assert from_rows(None) == {}


def as_artifact(model: Model, folder: Path) -> Artifact:
    extra = {"pruned": to_rows(model.pruned)}
    return write(
        folder, lambda place: save_model(model, place), model, inputs="sha256:" + "0" * 64, parent=None, extra=extra
    )


@pytest.mark.parametrize("scheme", ["int8", "int4-weight", "fp16"])
def test_every_kind_of_artifact_remembers_and_keeps(tiny_llama_folder: Path, tmp_path: Path, scheme: str) -> None:
    """Float, integers, 16 bits, written by a stage and opened again; an ordinary folder has no pruned matrix."""
    model = load_model(tiny_llama_folder)
    assert model.pruned == {}
    kept = by_hand(model, 0.1)  # so few that coarse integers make more
    parent = as_artifact(model, tmp_path / "pruned")
    assert load_model(parent.folder).pruned == model.pruned
    child = apply_stage(QuantizeStage(scheme=scheme), parent, tmp_path / "small")
    found = load_model(child.folder)
    assert found.pruned == model.pruned
    assert stays(found, kept)
    record = child.manifest.record
    assert record is not None
    rows = {row.name: row for row in record.layers}
    parameters = dict(found.network.named_parameters())
    for name in kept:
        assert rows[name].sparsity == pytest.approx(
            1 - int(parameters[name].count_nonzero()) / parameters[name].numel()
        )
        assert rows[name].sparsity >= 0.0999
    more = sum(further_zeros(found).values())
    told = [note for note in record.notes if "pruned matrices are zero still" in note]
    assert scheme == "fp16" or ("rounding made" in told[0]) == bool(more)
    assert scheme != "int4-weight" or more
    assert scheme != "int4-weight" or f"rounding made {more:,} more weights zero" in told[0]


# While a network trains


@given(
    st.integers(1, 6), st.integers(1, 9), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from(["sgd", "adamw", "rprop"]), st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_every_step_of_any_optimizer_leaves_exact_zeros(
    rows: int, columns: int, dtype: torch.dtype, kind: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(columns, rows, dtype=dtype)
    start = torch.randn(rows, columns, generator=generator).to(dtype)
    keep = torch.rand(rows, columns, generator=generator) > 0.5
    optimizer: torch.optim.Optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.3),
        "rprop": lambda p: torch.optim.Rprop(p, lr=0.3),
    }[kind](layer.parameters())
    with torch.no_grad():
        layer.weight.copy_(start)
    for _ in range(2):  # momentum from before the masks moves pruned weights without a gradient
        layer(torch.ones(1, columns, dtype=dtype)).sum().backward()
        optimizer.step()
    with kept_zero(layer, {"weight": keep}):
        assert bool((layer.weight[~keep] == 0).all())
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.ones(1, columns, dtype=dtype)).square().sum().backward()
            assert layer.weight.grad is not None
            assert bool((layer.weight.grad[~keep] == 0).all())
            optimizer.step()
            assert bool((layer.weight[~keep] == 0).all())
            assert not bool(layer.weight[~keep].signbit().any())
        assert layer.weight.dtype == dtype


def test_restore_undoes_what_anybody_did_and_the_end_lets_go() -> None:
    layer = nn.Linear(3, 2)
    keep = torch.tensor([[True, False, True], [False, True, True]])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    with kept_zero(layer, {"weight": keep}) as kept:
        with torch.no_grad():
            layer.weight.fill_(5.0)
        kept.restore()
        assert layer.weight.tolist() == [[5.0, 0.0, 5.0], [0.0, 5.0, 5.0]]
        kept.replace({"weight": keep & torch.tensor([True, True, False])})
        assert layer.weight.tolist() == [[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]]
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert layer.weight.tolist() == [[4.0, -1.0, -1.0], [-1.0, 4.0, -1.0]]


def test_what_is_cut_from_a_pruned_network_keeps_the_zeros_of_what_remains(tiny_bert_folder: Path) -> None:
    from squeeze.narrowing import keep_layers, keep_neurons

    model = load_model(tiny_bert_folder)
    by_hand(model)
    before = {n: p for n, p in model.network.named_parameters() if n in model.pruned}
    one = carried(keep_layers(model.network, (1,)), model)
    assert set(one) == {name for name in model.pruned if ".layer.0." in name}
    assert all(found == model.pruned[name.replace(".layer.0.", ".layer.1.")] for name, found in one.items())
    narrow = keep_neurons(model.network, [torch.arange(100).tolist()] * 2)
    found = carried(narrow, model)
    assert found.keys() == model.pruned.keys()
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    zeros = int((before[name][:100] == 0).sum())
    assert found[name] == Pruned("unstructured", zeros / (100 * 64), zeros)
    assert found["bert.encoder.layer.0.attention.self.query.weight"].sparsity == 0.5


# Rounding


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("tiny_llama_folder", {"scheme": "int4-weight", "method": "gptq"}),
        ("tiny_llama_folder", {"scheme": "int4-weight", "method": "awq-gptq", "symmetric": True}),
        ("tiny_llama_folder", {"scheme": "int4-weight", "method": "awq"}),
        ("tiny_llama_folder", {"scheme": "int8-static", "smooth_alpha": 0.5}),
        ("tiny_gpt2_folder", {"scheme": "int4-weight", "method": "gptq"}),
        ("tiny_bert_folder", {"scheme": "int8-static", "method": "gptq"}),
        ("tiny_bert_folder", {"scheme": "int8-static", "outliers": 4}),
        ("tiny_bert_folder", {"scheme": "int8", "mixed": {"size": 0.3}}),
        ("tiny_llama_folder", {"scheme": "int8", "equalize": True}),
    ],
)  # fmt: skip
def test_no_method_moves_a_zero(family: str, given: dict[str, Any], request: pytest.FixtureRequest) -> None:
    model = load_model(request.getfixturevalue(family))
    kept = by_hand(model)
    before = dict(model.pruned)
    QuantizeStage.model_validate(given).apply(model, BATCHES)
    assert stays(model, kept)
    assert model.pruned == before


def test_training_with_the_rounding_in_the_loop_moves_no_zero(tiny_bert_folder: Path) -> None:
    model, teacher = load_model(tiny_bert_folder), load_model(tiny_bert_folder)
    kept = by_hand(model)
    QuantizeStage(scheme="int8").apply(model)
    integers = {name: weight.integers.clone() for name, weight in model.integers.items()}
    record = QatStage(epochs=4, learning_rate=3e-3).apply(model, BATCHES, None, teacher)
    assert any(not torch.equal(weight.integers, integers[name]) for name, weight in model.integers.items())
    assert stays(model, kept)
    assert "zeros of 12 pruned matrices stayed" in record.notes[-1]


def test_gptq_prunes_in_its_own_pass(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    stage = QuantizeStage(scheme="int4-weight", method="gptq", pattern="2:4", keep=("*.1.mlp.down_proj",))
    record = stage.apply(model, BATCHES)
    assert len(model.pruned) == 13
    assert not any("embed" in name or "1.mlp.down" in name for name in model.pruned)
    for name, one in model.pruned.items():
        weight = model.integers[name].dequantize()
        assert (one.pattern, one.sparsity, one.zeros) == ("2:4", 0.5, weight.numel() // 2)
        assert int((weight.view(-1, 4) == 0).sum(1).min()) >= 2
    assert "matrices pruned in the same pass (SparseGPT, 2:4)" in " ".join(record.notes)
    with pytest.raises(QuantizeError, match=r"is pruned already \(13 matrices\).*Drop sparsity and pattern"):
        model.integers = {}
        stage.apply(model, BATCHES)
    other = load_model(tiny_llama_folder)
    with pytest.raises(
        QuantizeError, match=r"pattern 1:48: .*q_proj.weight has 64 input channels, which 48 does not divide"
    ):
        QuantizeStage(scheme="int4-weight", method="gptq", pattern="1:48").apply(other, BATCHES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": 0.5}, "sparsity 0.5 prunes while GPTQ rounds; method round only rounds"),
        ({"sparsity": 0.5, "method": "gptq", "outliers": 4}, "of which outliers keeps some in float"),
        ({"sparsity": 0.5, "method": "gptq", "mixed": {"size": 1}}, "of which mixed keeps some in float"),
        ({"pattern": "block-4x4", "method": "gptq"}, "pattern 'block-4x4' is not what GPTQ can prune in one pass"),
        ({"pattern": "4:4", "method": "gptq"}, "pattern 4:4: N of M neighbours"),
        ({"pattern": "2:128", "method": "gptq"}, "M at most 64"),
        ({"pattern": "2:4", "sparsity": 0.6, "method": "gptq"}, "a sparsity of 0.5, and sparsity says 0.6"),
        ({"sparsity": 1.0, "method": "gptq"}, "less than 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_pruned_in_one_pass_is_said(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizeStage.model_validate({"scheme": "int8-static", **given})


# The whole way


def test_from_pruning_to_the_graph_no_zero_is_lost_and_none_is_made(tiny_bert_folder: Path, tmp_path: Path) -> None:
    """Half of each linear layer's weights are zero by hand; two steps of distillation, int8-static, one export."""
    from squeeze.contents import check_zeros
    from squeeze.data import DataSettings, load_data
    from squeeze.distillation import DistillStage
    from squeeze.exporter import MODEL_FILE, export_onnx
    from squeeze.exporter.placement import integers_in_graph

    (tmp_path / "texts.csv").write_text("text,label\n" + "\n".join(f"cat {n} sat,{n % 3}" for n in range(24)), "utf-8")
    given = {
        "path": str(tmp_path / "texts.csv"),
        "label_column": "label",
        "max_length": 16,
        "splits": {"evaluate": 2, "train": 20},
    }
    model, teacher = load_model(tiny_bert_folder), load_model(tiny_bert_folder)
    kept = by_hand(model)
    data = load_data(DataSettings.model_validate(given), "text-classification", model.tokenizer, 0)
    start = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    training = {"steps": 2, "batch": 8, "device": "cpu", "precision": "float32", "learning_rate": 1e-4}
    record = DistillStage.model_validate({"training": training}).apply(model, teacher, data, None, "key")
    assert "32,768 weights of 12 pruned matrices stay zero" in record.notes
    assert any(not torch.equal(p, start[name]) for name, p in model.network.named_parameters() if name in kept)
    stage = QuantizeStage(scheme="int8-static", method="gptq", reduce_range=Machine.here().saturates)
    stage.apply(model, BATCHES)
    assert stays(model, kept)
    assert all(one.zeros == kept[name].numel() // 2 for name, one in model.pruned.items())
    (tmp_path / "export").mkdir()
    export_onnx(model, tmp_path / "export")
    graph = ir.load(tmp_path / "export" / MODEL_FILE)
    seen = {}
    for place in json.loads(graph.metadata_props["squeeze.integers"]):
        weights = [model.integers[name] for name in place["layers"]]
        value = graph.graph.initializers[place["initializer"]].const_value
        assert value is not None
        seen |= dict(zip(place["layers"], integers_in_graph(value.numpy(), place["layout"], weights), strict=True))
    for name, keep in kept.items():
        assert not seen[name][~keep.numpy()].any()
        asked = model.pruned[name].zeros + further_zeros(model).get(name, 0)
        assert int((seen[name] == 0).sum()) == asked
    assert sum(further_zeros(model).values()) < 0.02 * 32_768  # small survivors that fell on 0
    (found,) = check_zeros(graph, model)
    assert (found.name, found.value, found.passed) == ("zeros of pruned matrices lost", 0, True)
    name = next(name for name in kept if name in seen)
    where = next(p for p in json.loads(graph.metadata_props["squeeze.integers"]) if name in p["layers"])
    moved = graph.graph.initializers[where["initializer"]]
    assert moved.const_value is not None
    moved.const_value = ir.tensor(
        np.where(moved.const_value.numpy() == 0, 1, moved.const_value.numpy()).astype(np.int8)
    )
    (found,) = check_zeros(graph, model)
    assert not found.passed
    model.integers = {}
    del graph.metadata_props["squeeze.integers"]
    (found,) = check_zeros(graph, model)
    assert not found.passed
    assert found.value > 30_000  # hardly any float matrix of the graph has one
