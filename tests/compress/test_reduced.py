"""reduce_range: integers with which two products never leave 16 bits, all the way to the graph, and what happens without it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from squeeze.compress.plan import make_plans
from squeeze.compress.qat import QatStage
from squeeze.compress.quantize import QuantizeStage
from squeeze.compress.schemes import SCHEMES
from squeeze.errors import QuantizeError
from squeeze.exporter import export_onnx
from squeeze.integers import REDUCED, from_tensors, layout_of, round_to_nearest, to_tensors
from squeeze.model import Model, load_model
from squeeze.verification import verify

BATCHES = [
    {"input_ids": np.random.default_rng(0).integers(0, 100, (4, 24)), "attention_mask": np.ones((4, 24), np.int64)}
]


def vpmaddubsw(x: NDArray[np.uint8], w: NDArray[np.int8]) -> NDArray[np.int64]:
    """x [rows, in] · wᵀ [out, in] as AVX2 computes it: neighbouring products added in pairs in 16 bits, cut off, then summed."""
    products = x[:, None, :].astype(np.int64) * w[None].astype(np.int64)
    pairs = products[..., 0::2] + products[..., 1::2]
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=-1)


def exact(x: NDArray[np.uint8], w: NDArray[np.int8]) -> NDArray[np.int64]:
    return x.astype(np.int64) @ w.astype(np.int64).T


def reduced(folder: Path, **settings: Any) -> Model:
    model = load_model(folder)
    QuantizeStage.model_validate({"reduce_range": True, **settings}).apply(model, BATCHES)
    return model


def products(model: Model) -> dict[str, NDArray[np.int8]]:
    """The matrices that are multiplied with uint8 inputs."""
    tables = {id(m.weight) for m in model.network.modules() if isinstance(m, torch.nn.Embedding)}
    own = dict(model.network.named_parameters())
    return {
        name: weight.integers.numpy()
        for name, weight in model.integers.items()
        if weight.block_size is None and id(own[name]) not in tables
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"scheme": "int8"},
        {"scheme": "int8", "granularity": "tensor"},
        {"scheme": "int8", "smooth_alpha": 0.8},
        {"scheme": "int8-static"},
        {"scheme": "int8-static", "method": "gptq"},
    ],
)
@pytest.mark.parametrize("family", ["tiny_bert_folder", "tiny_t5_folder", "tiny_distilbert_folder"])
def test_products_stay_within_reach_and_the_export_is_verified(
    family: str, settings: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = reduced(request.getfixturevalue(family), **settings)
    matrices = products(model)
    assert matrices
    for integers in matrices.values():
        assert int(np.abs(integers.astype(int)).max()) == REDUCED
    looked_up = [w for name, w in model.integers.items() if name not in matrices]
    assert all(w.reach is None and int(w.integers.abs().max()) == 127 for w in looked_up)
    export_onnx(model, tmp_path)
    assert [check for check in verify(model, tmp_path) if not check.passed] == []


def test_saturating_arithmetic_is_exact_with_it_and_wrong_without(tiny_bert_folder: Path) -> None:
    """Inputs as GELU leaves them (all positive, the largest at 255) and as they come at worst."""
    rng = np.random.default_rng(0)
    plain = load_model(tiny_bert_folder)
    QuantizeStage(scheme="int8").apply(plain)
    wrong = 0
    for name, integers in products(reduced(tiny_bert_folder, scheme="int8")).items():
        columns = integers.shape[1]
        for x in (rng.integers(0, 256, (16, columns)).astype(np.uint8), np.full((1, columns), 255, np.uint8)):
            assert np.array_equal(vpmaddubsw(x, integers), exact(x, integers))
            full = products(plain)[name]
            wrong += int((vpmaddubsw(x, full) != exact(x, full)).sum())
    assert wrong > 0


def test_the_reach_is_the_largest_that_is_exact() -> None:
    x = np.full((1, 2), 255, np.uint8)
    for sign in (1, -1):
        within, beyond = np.full((1, 2), sign * REDUCED, np.int8), np.full((1, 2), sign * (REDUCED + 1), np.int8)
        assert np.array_equal(vpmaddubsw(x, within), exact(x, within))
        assert not np.array_equal(vpmaddubsw(x, beyond), exact(x, beyond))


def test_it_costs_one_bit_of_accuracy(tiny_bert_folder: Path) -> None:
    rows = {}
    for on in (False, True):
        record = QuantizeStage(scheme="int8", reduce_range=on).apply(load_model(tiny_bert_folder))
        rows[on] = {row.name: row.sqnr_db for row in record.layers if "one scale" in row.note}
    lost = [rows[False][name] - rows[True][name] for name in rows[True] if "embedding" not in name]
    assert lost == pytest.approx([20 * np.log10(127 / 64)] * len(lost), abs=0.7)


def test_the_reach_is_kept_in_files_and_named_only_where_there_is_one() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    kept = {
        "a": round_to_nearest(weight, None, unsigned=False, reach=REDUCED),
        "b": round_to_nearest(weight, None, unsigned=False),
    }
    layout = layout_of(kept)
    assert (layout["a"]["reach"], "reach" in layout["b"]) == (REDUCED, False)
    back = from_tensors(to_tensors(kept), layout)
    assert (back["a"].reach, back["b"].reach) == (REDUCED, None)


def test_training_on_stays_within_reach(tiny_bert_folder: Path) -> None:
    model, teacher = reduced(tiny_bert_folder, scheme="int8-static"), load_model(tiny_bert_folder)
    QatStage(epochs=4, learning_rate=3e-3, batch=4).apply(model, BATCHES, None, teacher)
    assert all(int(np.abs(w.astype(int)).max()) <= REDUCED for w in products(model).values())


def test_blocks_have_no_use_for_it(tiny_llama_folder: Path) -> None:
    with pytest.raises(QuantizeError, match=r"int8 has none here, and its blocks are summed exactly.*Drop it"):
        QuantizeStage(reduce_range=True).apply(load_model(tiny_llama_folder))


def test_lstm_layers_are_products_too() -> None:
    network = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(100, 64), "lstm": torch.nn.LSTM(64, 64, 1)})
    plans = make_plans(network, QuantizeStage(reduce_range=True), SCHEMES["int8"].layout("causal-lm"))
    assert {name: plan.grid.reach for name, plan in plans.items() if plan.grid} == {
        "embedding.weight": None, "lstm.weight_ih_l0": REDUCED, "lstm.weight_hh_l0": REDUCED,
    }  # fmt: skip
