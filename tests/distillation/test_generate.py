"""What a teacher writes: against Transformers' own generation, and against loops and softmaxes written out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from squeeze.distillation import generate
from squeeze.distillation.answers import Answers
from squeeze.distillation.generate import continued, drawn, ends_of, generated, searched
from squeeze.distillation.losses import LOSSES, Place
from squeeze.distillation.settings import GenerateSettings, LossTerm
from squeeze.model import Model, load_model


def prompts(rows: int = 3, length: int = 5) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(4, 190, (rows, length)))


@pytest.fixture(scope="module", params=["tiny_llama_folder", "tiny_gpt2_folder"])
def model(request: pytest.FixtureRequest) -> Model:
    return load_model(request.getfixturevalue(request.param), "causal-lm")


@pytest.fixture(scope="module")
def llama(tiny_llama_folder: Path) -> Model:
    return load_model(tiny_llama_folder, "causal-lm")


def test_the_likeliest_tokens_are_those_of_transformers(model: Model) -> None:
    network: Any = model.network
    given = prompts()
    expected = network.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    whole, lengths = continued(network, given, 20, ends_of(model))
    assert ends_of(model) == {model.tokenizer.eos_token_id}
    assert len(set(whole[:, 5:].flatten().tolist())) > 5  # it says more than one thing
    assert torch.equal(whole, expected)
    assert all(length == 25 or whole[n, length - 1] in ends_of(model) for n, length in enumerate(lengths.tolist()))


def test_a_text_ends_with_the_token_that_ends_it(llama: Model) -> None:
    free, _ = continued(llama.network, prompts(), 12, ())
    end = int(free[1, 8])
    first = [int((row[5:] == end).int().argmax()) + 6 if bool((row[5:] == end).any()) else 17 for row in free]
    whole, lengths = continued(llama.network, prompts(), 12, [end])
    assert lengths.tolist() == first
    for row, other, length in zip(whole, free, first, strict=True):
        assert torch.equal(row[:length], other[:length])
        assert not row[length:].any()


def test_a_module_without_a_cache_writes_the_same(llama: Model) -> None:
    class Own(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = llama.network(input_ids=input_ids).logits
            return logits

    assert torch.equal(continued(Own(), prompts(), 9, ())[0], continued(llama.network, prompts(), 9, ())[0])


def test_a_beam_search_is_that_of_transformers_and_finds_likelier_texts(llama: Model) -> None:
    network: Any = llama.network
    given = prompts()
    expected = network.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=10, num_beams=4, do_sample=False, pad_token_id=0
    )
    whole, lengths = searched(network, given, 10, ends_of(llama), 4, 0)
    assert torch.equal(whole, expected)
    greedy, short = continued(network, given, 10, ends_of(llama))
    assert lengths.tolist() == short.tolist() == [15, 15, 15]

    def likelihood(rows: torch.Tensor) -> torch.Tensor:
        logs = network(input_ids=rows).logits.log_softmax(-1)[:, 4:-1]
        return logs.gather(2, rows[:, 5:, None]).sum(dim=(1, 2))

    assert float((likelihood(whole) - likelihood(greedy)).sum()) > 0


def test_tokens_are_drawn_as_often_as_the_softmax_says() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, -30.0])
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = drawn(logits.expand(count, 5), uniform, 0.7)
    weights = np.exp(np.array([0.3, -1.0, 2.0, 0.0, -30.0]) / 0.7)
    shares = np.bincount(tokens.numpy(), minlength=5) / count
    assert np.abs(shares - weights / weights.sum()).max() < 1e-4
    assert drawn(logits[None], torch.tensor([1 - 1e-16]), 1.0).item() < 5


def test_what_is_drawn_does_not_depend_on_the_batch(llama: Model) -> None:
    blocks = prompts(7, 12).numpy()
    one, other = (
        generated(llama, blocks, GenerateSettings(prompt=4, temperature=1.0, batch=size), 3) for size in (7, 2)
    )
    assert np.array_equal(one.tokens, other.tokens)
    different = generated(llama, blocks, GenerateSettings(prompt=4, temperature=1.0), 4)
    assert one.tokens.shape != different.tokens.shape or not np.array_equal(one.tokens, different.tokens)


def test_blocks_keep_their_prompts_and_say_how_long_they_are(llama: Model) -> None:
    blocks = prompts(5, 16).numpy()
    made = generated(llama, blocks, GenerateSettings(prompt=6, count=4, batch=3), 0)
    whole, lengths = continued(llama.network, torch.from_numpy(blocks[:4, :6]), 10, ends_of(llama))
    assert made.lengths.tolist() == lengths.tolist()
    assert made.prompt is not None
    assert made.prompt.tolist() == [6] * 4
    batch = made.batch([2, 0])
    assert torch.equal(batch["input_ids"][0, : int(lengths[2])], whole[2, : int(lengths[2])])
    assert batch["prompt"].tolist() == [6, 6]
    assert made.take(np.array([1])).prompt is not None


def test_a_run_that_was_killed_goes_on_with_the_batch_that_is_missing(
    llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, settings = prompts(6, 12).numpy(), GenerateSettings(prompt=4, batch=2)
    calls: list[int] = []
    real = generate.continued

    def counted(network: Any, ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(ids))
        return real(network, ids, *args, **kwargs)

    def killed(number: int, all_of_them: int, text: str) -> None:
        if number == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(generate, "continued", counted)
    whole = generated(llama, blocks, settings, 0)
    assert len(calls) == 3
    with pytest.raises(KeyboardInterrupt):
        generated(llama, blocks, settings, 0, tmp_path / "g", killed)
    assert len(list((tmp_path / "g").glob("*.npy"))) == 2
    calls.clear()
    again = generated(llama, blocks, settings, 0, tmp_path / "g")
    assert len(calls) == 1
    assert again.digest == whole.digest
    torn = sorted((tmp_path / "g").glob("*.npy"))[1]
    torn.write_bytes(torn.read_bytes()[:-8])
    assert generated(llama, blocks, settings, 0, tmp_path / "g").digest == whole.digest
    assert len(calls) == 2
    # Another teacher's blocks are not taken for these, and those of before go.
    with torch.no_grad():
        weight = next(iter(llama.network.parameters()))
        weight[7] += 1
        generated(llama, blocks, settings, 0, tmp_path / "g")
        weight[7] -= 1
    assert len(calls) == 5
    assert len(list((tmp_path / "g").iterdir())) == 3


def place(prompt: list[int]) -> tuple[Place, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (2, 6), generator=generator)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    inputs = {"input_ids": ids, "attention_mask": mask, "prompt": torch.tensor(prompt)}
    logits = torch.randn(2, 6, 11, generator=generator).requires_grad_()
    return Place("causal-lm", inputs, (), nn.ModuleDict()), logits


@pytest.mark.parametrize("smoothing", [None, 0.1])
def test_the_loss_sequence_is_the_cross_entropy_of_what_was_written(smoothing: float | None) -> None:
    where, logits = place([3, 2])
    term = LossTerm(kind="sequence", smoothing=smoothing)
    loss = LOSSES["sequence"].compute(term, Answers(logits=logits), Answers(), where)
    loss.backward()  # type: ignore[no-untyped-call]
    logs = logits.detach().log_softmax(-1).numpy()
    share, ids = smoothing or 0.0, where.inputs["input_ids"].numpy()
    scored = [(0, 3), (0, 4), (0, 5), (1, 2), (1, 3)]
    each = [(1 - share) * logs[r, n - 1, ids[r, n]] + share * logs[r, n - 1].mean() for r, n in scored]
    assert float(loss.detach()) == pytest.approx(-np.mean(each), rel=1e-5)
    assert logits.grad is not None
    touched = {(int(r), int(n) + 1) for r, n in logits.grad.abs().sum(-1).nonzero()}
    assert touched == set(scored)


@pytest.mark.parametrize("kind", ["kl", "mse", "labels"])
def test_no_loss_over_tokens_scores_a_prompt(kind: Any) -> None:
    where, logits = place([3, 2])
    LOSSES[kind].compute(
        LossTerm(kind=kind), Answers(logits=logits), Answers(logits=logits.detach() * 2), where
    ).backward()
    assert logits.grad is not None
    assert {(int(r), int(n)) for r, n in logits.grad.abs().sum(-1).nonzero()} == {
        (0, 2),
        (0, 3),
        (0, 4),
        (1, 1),
        (1, 2),
    }


def test_text_of_the_data_is_none_that_the_teacher_wrote() -> None:
    where, logits = place([0, 0])
    loss = LOSSES["sequence"].compute(LossTerm(kind="sequence"), Answers(logits=logits), Answers(), where)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()
