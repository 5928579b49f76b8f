"""What is kept of answers, in numbers; against networks in test_cache.py."""

import numpy as np
import torch

from squeeze.distillation.answers import Answers, Needs
from squeeze.distillation.packing import Packing, top_of


def test_texts_of_one_token_have_no_place_to_predict() -> None:
    packing = Packing("causal-lm", Needs(logits=True), 8)
    answers = Answers(logits=torch.zeros(3, 1, 20))
    rows = packing.pack(answers, torch.ones(3, 1), packing.columns(answers))
    assert {name: array.shape for name, array in rows.items()} == {
        "top.tokens": (0, 8),
        "top.logs": (0, 8),
        "top.rest": (0,),
    }


def test_the_error_of_codes_is_bounded_wherever_probabilities_lie() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(scale=6, size=(400, 50))).float()
    packing = Packing("causal-lm", Needs(logits=True), 8)
    shaped = Answers(logits=logits[None])
    columns = packing.columns(shaped)
    mask = torch.ones(1, 400)
    rows = packing.pack(shaped, mask, columns)
    exact = top_of(logits[:-1].double(), 8, 1.0)
    codes = rows["top.logs"].astype(float) / -2048
    inside = exact.log_probabilities.numpy() > -31.99
    assert np.abs(codes - exact.log_probabilities.numpy())[inside].max() <= 1 / 4096 + 1e-5
    small = Answers(logits=torch.tensor([[[0.0, -1.0, -200.0], [0.0, 0.0, 0.0]]]))
    far = packing.pack(small, torch.ones(1, 2), packing.columns(small))
    assert far["top.tokens"].tolist() == [[0, 1]]
    assert far["top.rest"].tolist() == [65535]
    wide = Packing("causal-lm", Needs(logits=True), 8).columns(Answers(logits=torch.zeros(1, 1, 70_000)))
    assert [(c.dtype, c.shape) for c in wide] == [("<u4", (8,)), ("<u2", (8,)), ("<u2", ())]


def test_needs_are_covered_at_their_temperature_alone() -> None:
    held = Packing("causal-lm", Needs(logits=True, hidden=frozenset({1, 2}), temperatures=frozenset({2.0})), 8)
    assert held.covers(Needs(logits=True, temperatures=frozenset({2.0})))
    assert held.covers(Needs(hidden=frozenset({2})))
    assert not held.covers(Needs(logits=True, temperatures=frozenset({1.0})))
    assert not held.covers(Needs(hidden=frozenset({3})))
    assert not Packing("causal-lm", Needs(logits=True), 8).covers(Needs(logits=True, temperatures=frozenset({2.0})))
    assert Packing("text-classification", Needs(logits=True), 8).covers(
        Needs(logits=True, temperatures=frozenset({2.0}))
    )
