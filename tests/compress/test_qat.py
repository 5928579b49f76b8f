"""Training with the rounding in the loop, on tiny networks: it learns, leaves integers, and refuses what it cannot do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from squeeze.compress.qat import QatStage, _learned_range
from squeeze.compress.quantize import QuantizeStage
from squeeze.errors import QuantizeError
from squeeze.integers import InputGrid, static_uint8
from squeeze.model import Model, load_model
from squeeze.simulation import simulation

RNG = np.random.default_rng(0)
BATCHES: list[dict[str, Any]] = [
    {"input_ids": RNG.integers(0, 100, (8, 16)), "attention_mask": np.ones((8, 16), np.int64), "labels": RNG.integers(0, 2, 8)}
    for _ in range(4)
]  # fmt: skip
SCHEMES = [
    ("int8-static", {"calibrator": "minmax", "smooth_alpha": 0}, 3e-4),
    ("int8-static", {"granularity": "tensor"}, 3e-4),
    ("int8", {}, 3e-4),
    ("int4-weight", {}, 2e-3),
]


def quantized(folder: Path, scheme: str, **settings: Any) -> Model:
    model = load_model(folder)
    QuantizeStage.model_validate({"scheme": scheme, **settings}).apply(model, BATCHES)
    return model


def distance(model: Model, teacher: Model) -> float:
    """Relative distance of the rounded network's answers (log-probabilities) from the teacher's, on the training texts."""
    network = simulation(model)
    with torch.no_grad():
        pairs = [
            (network(**inputs).logits, teacher.network(**inputs).logits)
            for batch in BATCHES
            for inputs in [{n: torch.from_numpy(batch[n]) for n in model.text_inputs if n in batch}]
        ]
    ours, theirs = (torch.cat(side).log_softmax(dim=-1) for side in zip(*pairs, strict=True))
    return float((ours - theirs).norm() / theirs.norm())


def test_progress_counts_blocks_where_it_walks_and_steps_where_it_trains(
    tiny_bert_folder: Path, tmp_path: Path
) -> None:
    from squeeze.api import run
    from squeeze.recipe import Recipe

    rows = "\n".join(["text,label", *(f"the cat number {n} sat on the mat,{n % 3}" for n in range(40))])
    (tmp_path / "texts.csv").write_text(rows, "utf-8")
    data = {
        "path": str(tmp_path / "texts.csv"), "label_column": "label", "max_length": 16,
        "splits": {"evaluate": 4, "calibration": 8, "train": 16},
    }  # fmt: skip
    recipe = Recipe.model_validate(
        {
            "name": "steps", "model": {"path": str(tiny_bert_folder)}, "task": "text-classification", "data": data,
            "stages": [{"kind": "quantize", "scheme": "int8-static"}, {"kind": "qat", "batch": 8}],
        }
    )  # fmt: skip
    said: list[str] = []
    run(recipe, tmp_path / "run", progress=lambda text, done, total: said.append(text))
    assert [text for text in said if " of " in text] == [
        "quantize int8-static: block 1 of 2", "quantize int8-static: block 2 of 2",
        "qat 1 epochs: step 1 of 2", "qat 1 epochs: step 2 of 2",
    ]  # fmt: skip


@pytest.mark.parametrize(("scheme", "settings", "rate"), SCHEMES)
@pytest.mark.parametrize("family", ["tiny_bert_folder", "tiny_llama_folder", "tiny_gpt2_folder"])
def test_it_comes_nearer_to_the_teacher_and_leaves_integers(
    family: str, scheme: str, settings: dict[str, Any], rate: float, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    model, teacher = quantized(folder, scheme, **settings), load_model(folder)
    before, integers = distance(model, teacher), {n: w.integers.clone() for n, w in model.integers.items()}
    record = QatStage(epochs=12, learning_rate=rate, batch=8).apply(model, BATCHES, None, teacher)
    assert distance(model, teacher) < before
    parameters = dict(model.network.named_parameters())
    for name, weight in model.integers.items():
        assert torch.equal(parameters[name], weight.dequantize())
        assert weight.integers.dtype == integers[name].dtype
    assert any(not torch.equal(w.integers, integers[n]) for n, w in model.integers.items())
    assert not any(p.requires_grad for p in model.network.parameters())
    assert not any(m._forward_pre_hooks for m in model.network.modules())
    assert "48 steps of 8 texts" in record.notes[0]


def test_two_trainings_with_one_seed_are_the_same(tiny_bert_folder: Path) -> None:
    results = []
    for _ in range(2):
        model = quantized(tiny_bert_folder, "int8-static")
        record = QatStage(learning_rate=1e-3).apply(model, BATCHES, None, load_model(tiny_bert_folder))
        results.append((record.notes, {n: w.integers for n, w in model.integers.items()}))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][n], results[1][1][n]) for n in results[0][1])


def test_labels_alone_teach_too(tiny_bert_folder: Path) -> None:
    model = quantized(tiny_bert_folder, "int8-static")
    record = QatStage(labels=1, epochs=30, learning_rate=2e-3).apply(model, BATCHES)
    first, last = (float(part.split()[0]) for part in record.notes[0].split("loss ")[1].split(" in the first tenth, "))
    assert last < 0.9 * first


def test_the_learned_range_rounds_like_the_kernel_and_passes_gradients_on() -> None:
    x = torch.linspace(-3, 6, 200, requires_grad=True)
    growth = torch.nn.Parameter(torch.zeros(()))
    y = _learned_range(growth, InputGrid(0.02, 100), None)(x)
    assert torch.allclose(y, static_uint8(x.detach(), InputGrid(0.02, 100)), atol=1e-6)
    y.sum().backward()
    inside = (x.detach() / 0.02 >= -100) & (x.detach() / 0.02 <= 155)
    assert x.grad is not None
    assert torch.equal(x.grad != 0, inside)
    assert growth.grad is not None
    assert float(growth.grad) > 0  # more is cut off above than below: a wider range would give larger sums


@pytest.mark.parametrize(
    ("stage", "texts", "teacher", "message"),
    [
        (QatStage(), [], True, r"data\.splits\.train"),
        (QatStage(), BATCHES, False, "neither a teacher nor labels"),
        (QatStage(learning_rate=1e30, epochs=4, clip=1e30), BATCHES, True, "loss of qat is nan at step"),
    ],
)
def test_what_cannot_be_trained_is_said(
    stage: QatStage, texts: list[dict[str, Any]], teacher: bool, message: str, tiny_bert_folder: Path
) -> None:
    model = quantized(tiny_bert_folder, "int8-static")
    with pytest.raises(QuantizeError, match=message):
        stage.apply(model, texts, None, load_model(tiny_bert_folder) if teacher else None)
    with pytest.raises(QuantizeError, match="not quantized yet"):
        QatStage().apply(load_model(tiny_bert_folder), BATCHES)
