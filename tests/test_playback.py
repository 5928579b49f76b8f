"""A network entered at its blocks, and how far it is from itself once it was changed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from squeeze.errors import PruneError, QuantizeError
from squeeze.model import load_model
from squeeze.playback import Meter, Playback, divergence, measured_in_order, readers

RNG = np.random.default_rng(0)


def batches(padded: bool) -> list[dict[str, np.ndarray]]:
    found = []
    for _ in range(2):
        ids, mask = RNG.integers(4, 200, (3, 24)), np.ones((3, 24), np.int64)
        mask[-1, 16 if padded else 24 :] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    return found


TEXTS = {"bert": batches(True), "llama": batches(False)}


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "distilbert", "qwen2"])
def test_blocks_that_are_not_run_again_change_no_answer(family: str, request: pytest.FixtureRequest) -> None:
    model = load_model(request.getfixturevalue(f"tiny_{family}_folder"))
    texts = [
        {name: torch.from_numpy(batch[name]) for name in model.text_inputs}
        for batch in TEXTS["llama" if model.task == "causal-lm" else "bert"]
    ]
    with torch.no_grad():
        playback = Playback(model.network, texts)
        assert len(playback.blocks) == 2
        exact = [playback.run(number)[0].clone() for number in range(2)]
        for depth in (1, 2):
            playback.advance()
            assert playback.depth == depth
            ran: list[torch.nn.Module] = []
            kinds = (torch.nn.Linear, Conv1D)
            firsts = [next(m for m in block.modules() if isinstance(m, kinds)) for block in playback.blocks]
            handles = [first.register_forward_hook(lambda module, *_, ran=ran: ran.append(module)) for first in firsts]
            for number in range(2):
                assert torch.equal(playback.run(number)[0], exact[number])
            assert ran == 2 * firsts[depth:]
            for handle in handles:
                handle.remove()
    assert not any("forward" in vars(block) for block in playback.blocks)


def test_a_network_that_answers_nan_is_refused(tiny_bert_folder: Path) -> None:
    model = load_model(tiny_bert_folder)
    meter = Meter(model, TEXTS["bert"], 2)
    assert meter.texts == 2
    model.network.classifier.bias[0] = float("nan")
    with pytest.raises(QuantizeError, match="answers NaN or infinity on the calibration texts"):
        meter.distance()
    other = Meter(load_model(tiny_bert_folder), TEXTS["bert"], 2, fault=PruneError)
    other.model.network.classifier.bias[0] = float("nan")
    with pytest.raises(PruneError, match="answers NaN or infinity on the calibration texts"):
        other.distance()


def test_divergence_is_exact_where_it_is_tiny_and_where_it_is_huge() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 1000, generator=generator)
    noise = torch.randn(5, 1000, generator=generator)
    for size in (1e-4, 1e-2, 1.0, 100.0):
        exact, found = logits.log_softmax(-1), (logits + size * noise).log_softmax(-1)
        p, q = logits.double().log_softmax(-1), (logits.double() + size * noise.double()).log_softmax(-1)
        expected = (p.exp() * (p - q)).sum(-1)
        assert torch.allclose(divergence(exact, found).double(), expected, rtol=0.02)


def test_a_decoder_is_measured_on_as_few_tokens_as_asked(tiny_llama_folder: Path) -> None:
    meter = Meter(load_model(tiny_llama_folder), TEXTS["llama"], 2, length=8, tokens=6)
    assert [batch["input_ids"].shape for batch in meter.batches] == [(1, 8), (1, 8)]
    assert [len(exact) for exact in meter.exact] == [3, 3]


def test_each_unit_is_measured_when_what_runs_before_it_has_been_passed(tiny_bert_folder: Path) -> None:
    model = load_model(tiny_bert_folder)
    playback = Meter(model, TEXTS["bert"], 2).playback
    names = ("bert.embeddings.word_embeddings", "bert.encoder.layer.1.output.dense", "classifier")
    held = readers(model.network)
    units = {name: held[f"{name}.weight"] for name in names} | {"nowhere": [torch.nn.Linear(1, 1)]}
    told: list[tuple[int, int]] = []
    found = measured_in_order(playback, units, lambda unit: playback.depth, lambda i, n: told.append((i, n)))
    assert found == dict(zip(names, (0, 1, 2), strict=True))
    assert told == [(1, 2), (2, 2), (2, 2)]
    assert playback.depth == 0
