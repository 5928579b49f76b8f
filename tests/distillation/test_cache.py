"""A teacher's answers from disk against those of its network, and everything that may come between."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from squeeze.distillation.answers import Answers, Needs
from squeeze.distillation.cache import CachedTeacher, open_cache
from squeeze.distillation.objective import LiveTeacher
from squeeze.distillation.packing import LOG_ERROR
from squeeze.distillation.settings import CacheSettings
from squeeze.distillation.store import PROGRESS
from squeeze.distillation.taught import Taught
from squeeze.errors import TrainError
from squeeze.model import Model, load_model
from squeeze.provenance import digest_file
from squeeze.training.examples import Examples, by_length

CPU = torch.device("cpu")
Write = Callable[..., Examples]


class Invented:
    """A teacher whose answers are told by a text's first token alone; it counts its batches."""

    def __init__(self, pause: float = 0.0) -> None:
        self.calls, self.pause = 0, pause

    def __call__(self) -> "Invented":
        return self

    def answers(self, batch: Mapping[str, torch.Tensor], needs: Needs) -> Answers:
        self.calls += 1
        time.sleep(self.pause)
        first = batch["input_ids"][:, :1].float()
        turned = torch.cat([(first * (n + 1)).sin() for n in range(8)], dim=-1)
        deep = {n: turned[:, None].expand(-1, batch["input_ids"].shape[1], -1) * n for n in needs.hidden}
        return Answers(turned[:, :3], embedding=torch.nn.functional.normalize(turned, dim=-1), hidden=deep)


def invented_examples(count: int = 200, seed: int = 0) -> Examples:
    lengths = np.random.default_rng(seed).integers(1, 30, size=count)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Examples(np.arange(starts[-1], dtype=np.int32) % 1000, starts, None, None, 0)


DEFAULT = CacheSettings()
NONE = (invented_examples(0), Needs())


def keep(
    root: Path, examples: Examples, needs: Needs, teacher: Any, *, task: str = "text-classification", digest: str = "sha256:" + "a" * 64,
    settings: CacheSettings = DEFAULT, held_out: tuple[Examples, Needs] = NONE, **more: Any,
) -> CachedTeacher:  # fmt: skip
    taught = Taught(digest, lambda: pytest.fail("loaded"))
    return open_cache(root, settings, taught, teacher, task, CPU, learned=(examples, needs), held_out=held_out, **more)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("squeeze.distillation.cache.TOKENS", 120)


def arrays(root: Path) -> dict[str, str]:
    return {
        f"{p.parent.name}/{p.name}": digest_file(p) for p in sorted(root.rglob("*")) if p.suffix in (".npy", ".jsonl")
    }


def both(
    model: Model, examples: Examples, needs: Needs, root: Path, **more: Any
) -> Iterator[tuple[Any, Answers, Answers]]:
    """Batches with live and kept answers; the network is gone before the kept ones are read."""
    live = LiveTeacher(model)
    batches = [examples.batch(numbers) for numbers in by_length(examples.lengths[::-1].copy(), 7)]
    expected = [live.answers(batch, needs) for batch in batches]
    kept = keep(root, examples, needs, lambda: live, task=model.task, **more)
    kept.live = lambda: pytest.fail("the network was run")
    for batch, answers in zip(batches, expected, strict=True):
        yield batch, answers, kept.answers(batch, needs)


def test_class_logits_are_the_networks(tmp_path: Path, tiny_bert_folder: Path, written: Write) -> None:
    model = load_model(tiny_bert_folder)
    for _, live, kept in both(model, written(model.tokenizer), Needs(logits=True), tmp_path / "c"):
        torch.testing.assert_close(
            kept.logits, live.logits, rtol=1e-4, atol=1e-5
        )  # batches differ, and so does rounding


def test_embeddings_keep_their_direction(tmp_path: Path, tiny_bert_folder: Path, written: Write) -> None:
    model = load_model(tiny_bert_folder, "feature-extraction")
    seen = []
    for _, live, kept in both(model, written(model.tokenizer), Needs(embedding=True), tmp_path / "c"):
        a, b = live.embedding.double().numpy(), kept.embedding.double().numpy()
        np.testing.assert_allclose(np.linalg.norm(b, axis=-1), 1, atol=1e-6)
        bound = a.shape[-1] * np.abs(a).max(axis=-1) ** 2 / 254**2
        missing = 1 - (a * b).sum(axis=-1)
        assert (missing <= bound + 1e-6).all()
        seen.append(missing)
    assert 1e-6 < np.concatenate(seen).mean() < 1e-4
    (size,) = [p.stat().st_size for p in tmp_path.rglob("embedding.npy")]
    assert size == 128 + 60 * 64


def test_hidden_states_are_float16_of_every_token(tmp_path: Path, tiny_bert_folder: Path, written: Write) -> None:
    model = load_model(tiny_bert_folder)
    for batch, live, kept in both(model, written(model.tokenizer), Needs(hidden=frozenset({0, 2})), tmp_path / "c"):
        mask = batch["attention_mask"].bool()
        assert kept.hidden.keys() == {0, 2}
        for layer in (0, 2):
            a, b = live.hidden[layer][mask], kept.hidden[layer][mask]
            assert ((a - b).abs() <= a.abs() * 2**-11 + 1e-5).all()
            assert (kept.hidden[layer][~mask] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_language_models_keep_their_likeliest_tokens(
    tmp_path: Path, tiny_llama_folder: Path, written: Write, temperature: float
) -> None:
    model = load_model(tiny_llama_folder)
    needs = Needs(logits=True, temperatures=frozenset({temperature}))
    settings = CacheSettings(top=12)
    examples = written(model.tokenizer)
    for batch, live, kept in both(model, examples, needs, tmp_path / "c", settings=settings):
        assert kept.logits is None
        at = batch["attention_mask"][:, 1:].bool()
        logits = live.logits[:, :-1][at].double().numpy() / temperature
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        tokens = kept.top.tokens[:, :-1][at].numpy()
        logs, rest = (x[:, :-1][at].double().numpy() for x in (kept.top.log_probabilities, kept.top.rest))
        order = np.sort(p, axis=-1)
        np.testing.assert_allclose(np.take_along_axis(p, tokens, -1), order[:, :-13:-1], rtol=1e-3)
        assert np.abs(logs - np.log(np.take_along_axis(p, tokens, -1))).max() <= LOG_ERROR + 2e-5
        assert np.abs(rest - np.log(order[:, :-12].sum(-1))).max() <= LOG_ERROR + 2e-5
        np.testing.assert_allclose(np.exp(logs).sum(-1) + np.exp(rest), 1, atol=1e-5)
        assert torch.isfinite(kept.top.log_probabilities).all()
    places = int((examples.lengths - 1).sum())
    sizes = {p.name: np.load(p).nbytes for p in tmp_path.rglob("*.npy")}
    assert sizes == {"top.tokens.npy": places * 24, "top.logs.npy": places * 24, "top.rest.npy": places * 2}


def test_what_is_no_number_is_refused(tmp_path: Path) -> None:
    class Broken(Invented):
        def answers(self, batch: Mapping[str, torch.Tensor], needs: Needs) -> Answers:
            return replace(super().answers(batch, needs), logits=torch.full((len(batch["index"]), 3), torch.nan))

    with pytest.raises(TrainError, match="no number"):
        keep(tmp_path / "c", invented_examples(5), Needs(logits=True), Broken())


def test_a_later_run_reads_and_never_asks(tmp_path: Path) -> None:
    examples, held = invented_examples(), invented_examples(20, seed=1)
    said: list[tuple[int, int, str]] = []
    needs = Needs(logits=True, embedding=True)
    first = Invented()
    kept = keep(
        tmp_path / "c", examples, needs, first, held_out=(held, Needs(logits=True)), say=lambda *a: said.append(a)
    )
    assert [n.split(", filled in")[0] for n in kept.notes] == [
        "teacher's answers: 200 examples, 4.0 kB",
        "teacher's answers: 20 held-out examples, 0.2 kB",
    ]
    assert said[-1][:2] == (20, 20)
    assert "the teacher answers 200 examples" in said[0][2]
    kept.close()
    again = keep(tmp_path / "c", examples, needs, lambda: pytest.fail("asked"), held_out=(held, Needs(logits=True)))
    assert all(note.endswith("read from an earlier run") for note in again.notes)
    ask = examples.batch([4, 190, 7])
    expected = first.answers(ask, needs)
    torch.testing.assert_close(again.answers(ask, needs).logits, expected.logits)
    judged = {**held.batch([4, 3]), "held_out": torch.ones((), dtype=torch.bool)}
    torch.testing.assert_close(
        again.answers(judged, Needs(logits=True)).logits, first.answers(judged, Needs(logits=True)).logits
    )


def test_what_is_not_kept_is_asked_live(tmp_path: Path) -> None:
    examples, teacher = invented_examples(), Invented()
    kept = keep(tmp_path / "c", examples, Needs(logits=True), teacher)
    before = teacher.calls
    batch = examples.batch([3])
    kept.answers(batch, Needs(logits=True))
    assert teacher.calls == before
    assert kept.answers(batch, Needs(hidden=frozenset({1}))).hidden[1].shape[0] == 1
    kept.answers({**batch, "held_out": torch.ones(())}, Needs(logits=True))
    assert teacher.calls == before + 2


def test_the_teacher_is_let_go_of_where_all_is_kept_and_only_there(tmp_path: Path) -> None:
    examples, made = invented_examples(), []

    def make() -> Invented:
        made.append(1)
        return Invented()

    for gigabytes, loaded in ((1.0, 2), (1e-6, 1)):
        made.clear()
        settings = CacheSettings(gigabytes=gigabytes)
        kept = keep(tmp_path / str(gigabytes), examples, Needs(logits=True), make, settings=settings)
        kept.answers(examples.batch([1]), Needs(embedding=True))
        kept.answers(examples.batch([2]), Needs(embedding=True))
        assert len(made) == loaded


@pytest.mark.parametrize("change", ["teacher", "texts", "needs"])
def test_answers_of_another_kind_are_not_read(tmp_path: Path, change: str) -> None:
    examples, needs = invented_examples(), Needs(logits=True)
    keep(tmp_path / "c", examples, needs, Invented()).close()
    teacher = Invented()
    digest = "sha256:" + ("b" if change == "teacher" else "a") * 64
    kept = keep(
        tmp_path / "c", replace(examples, tokens=examples.tokens + 1) if change == "texts" else examples,
        Needs(embedding=True) if change == "needs" else needs, teacher, digest=digest,
    )  # fmt: skip
    words = {"teacher": "another teacher's", "texts": "for other texts", "needs": "of another kind"}[change]
    assert kept.notes[0].endswith(f"s: what lay there is {words}")
    assert teacher.calls > 5


def test_attention_and_two_temperatures_leave_the_teacher_live(tmp_path: Path) -> None:
    teacher, examples = Invented(), invented_examples()
    kept = keep(tmp_path / "c", examples, Needs(logits=True, relations=frozenset({3})), teacher)
    assert kept.notes[0].startswith("teacher's answers are not kept: a loss asks for its relations")
    kept = keep(
        tmp_path / "c", examples, Needs(logits=True, temperatures=frozenset({1.0, 2.0})), teacher, task="causal-lm"
    )
    assert "at temperatures 1 and 2" in kept.notes[0]
    assert teacher.calls == 0
    assert not (tmp_path / "c").exists()


def test_too_much_is_not_kept_and_the_note_says_what_would_fit(tmp_path: Path) -> None:
    examples = invented_examples()
    tokens = int(examples.lengths.sum())
    needs = Needs(logits=True, hidden=frozenset({1}))
    teacher = Invented()
    small = CacheSettings(gigabytes=10_000 / 1e9)
    kept = keep(tmp_path / "c", examples, needs, teacher, settings=small)
    needed = 200 * 12 + tokens * 16
    assert kept.notes == (
        f"teacher's answers are not kept: they would take {needed / 1e3:.1f} kB, {(needed - 10_000) / 1e3:.1f} kB more than "
        f"cache.gigabytes = 1e-05. It runs at each step. What would fit: {200 * 10_000 // needed} examples, or all without the "
        f"hidden states, which are {tokens * 16 / 1e3:.1f} kB",
    )
    assert not list(tmp_path.rglob("*.npy"))
    batch = examples.batch([5])
    torch.testing.assert_close(kept.answers(batch, needs).hidden[1], teacher.answers(batch, needs).hidden[1])


def test_the_note_names_a_top_that_fits(tmp_path: Path, tiny_llama_folder: Path, written: Write) -> None:
    model = load_model(tiny_llama_folder)
    examples = written(model.tokenizer, 20)
    places = int((examples.lengths - 1).sum())
    bound = places * (4 * 5 + 2) / 1e9
    needs = Needs(logits=True)

    def live() -> LiveTeacher:
        return LiveTeacher(model)

    kept = keep(tmp_path / "c", examples, needs, live, task="causal-lm", settings=CacheSettings(top=6, gigabytes=bound))
    assert kept.notes[0].endswith("examples, or cache.top = 5")
    fits = keep(tmp_path / "c", examples, needs, live, task="causal-lm", settings=CacheSettings(top=5, gigabytes=bound))
    assert "filled in" in fits.notes[0]


def test_the_oldest_answers_make_room_unless_they_are_read(tmp_path: Path) -> None:
    needs, root = Needs(logits=True), tmp_path / "c"

    def sizes() -> list[str]:
        return sorted(p.parent.name for p in root.rglob("store.json"))

    read = keep(root, invented_examples(seed=1), needs, Invented())
    keep(root, invented_examples(seed=2), needs, Invented()).close()
    assert len(sizes()) == 2
    before = set(sizes())
    (held,) = [s for s in before if (root / s) == read.learned[1].folder]
    room = max(sum(p.stat().st_size for p in (root / s).iterdir()) for s in before)
    bound = CacheSettings(gigabytes=(room + 2500) / 1e9)
    third = keep(root, invented_examples(seed=3), needs, Invented(), settings=bound)
    assert held in sizes()
    assert len(sizes()) == 2
    fourth = keep(root, invented_examples(seed=4), needs, Invented(), settings=bound)
    assert "those that other runs are reading" in fourth.notes[0]
    third.close()
    read.close()
    assert "filled in" in keep(root, invented_examples(seed=4), needs, Invented(), settings=bound).notes[0]


def test_a_folder_of_something_else_is_refused_and_left(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(TrainError, match=r"holds thesis.txt and no teacher's answers.*nothing was removed"):
        keep(tmp_path, invented_examples(), Needs(logits=True), Invented())
    with pytest.raises(TrainError, match="thesis.txt is a file"):
        keep(tmp_path / "thesis.txt", invented_examples(), Needs(logits=True), Invented())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_who_waits_does_not_wait_for_the_readers_training(tmp_path: Path) -> None:
    teachers = [Invented(pause=0.01) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        opened = list(
            pool.map(lambda t: keep(tmp_path / "c", invented_examples(), Needs(logits=True), t), teachers, timeout=60)
        )
    assert sorted(t.calls > 0 for t in teachers) == [False, False, True]
    assert sum("filled in" in kept.notes[0] for kept in opened) == 1


def test_answers_that_changed_on_disk_are_computed_again(tmp_path: Path) -> None:
    examples, needs, root = invented_examples(), Needs(logits=True), tmp_path / "c"
    keep(root, examples, needs, Invented()).close()
    before = arrays(root)
    (file,) = root.rglob("logits.npy")
    content = bytearray(file.read_bytes())
    content[700] ^= 1
    file.write_bytes(bytes(content))
    assert "filled in" in keep(root, examples, needs, Invented()).notes[0]
    assert arrays(root) == before


WORKER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("test_cache", {file!r})
module = importlib.util.module_from_spec(spec); sys.modules["test_cache"] = module; spec.loader.exec_module(module)
import squeeze.distillation.cache as cache
cache.TOKENS = 120
from pathlib import Path
teacher = module.Invented(pause={pause})
print("ready", flush=True); sys.stdin.readline()
kept = module.keep(Path({root!r}), module.invented_examples(), module.Needs(logits=True, hidden=frozenset({{1}})), teacher)
print(teacher.calls, kept.notes[0])
"""


def worker(root: Path, pause: float) -> "subprocess.Popen[str]":
    code = WORKER.format(file=__file__, pause=pause, root=str(root))
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_killed_at_any_moment_it_goes_on_and_of_two_processes_one_computes(tmp_path: Path) -> None:
    needs = Needs(logits=True, hidden=frozenset({1}))
    undisturbed = Invented()
    keep(tmp_path / "whole", invented_examples(), needs, undisturbed).close()
    root = tmp_path / "killed"
    started = [worker(root, 0.05), worker(root, 0.02)]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    killed, other = started
    with killed:
        assert killed.stdin is not None
        killed.stdin.write("\n")
        killed.stdin.flush()
        end = time.monotonic() + 60
        while not any(p.stat().st_size > 0 for p in root.rglob(PROGRESS)):
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(random.random() * 0.5)
        os.kill(killed.pid, signal.SIGKILL)
    assert other.stdin is not None
    other.stdin.write("\n")
    other.stdin.flush()
    own = Invented(pause=0.02)
    kept = keep(root, invented_examples(), needs, own)
    calls, theirs = other.communicate(timeout=120)[0].split(maxsplit=1)
    assert other.returncode == 0
    kept.close()
    filled = "filled in" in kept.notes[0]
    assert filled != ("filled in" in theirs)
    filler, reader = (kept.notes[0], theirs) if filled else (theirs, kept.notes[0])
    assert "before an interruption" in filler
    assert reader.strip().endswith("read from an earlier run")
    computed = [own.calls, int(calls)]
    assert min(computed) == 0
    assert 0 < max(computed) < undisturbed.calls
    assert arrays(root) == arrays(tmp_path / "whole")
