"""The teacher's answers on disk: computed once, read by every epoch and every later run of the same teacher on the same texts.

`packing.py` says what is kept and how exactly, `store.py` how it lies on disk. Here: for which teacher and texts, how much may be kept, and
who computes it. A folder of answers holds one store for each teacher, texts and needs; a store that does not fit any more takes the
place of the oldest ones that nobody reads. A teacher all of whose answers lie there is let go of before training begins.

Answers are computed in float32, in big batches, whatever precision the training has. Where a store cannot be had (too large, attention
is asked for, …), the teacher answers live, and a note says why.
"""

import contextlib
import errno
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from squeeze import __version__
from squeeze.distillation.answers import Answers, Needs
from squeeze.distillation.packing import Packing, kept
from squeeze.distillation.settings import CACHE
from squeeze.distillation.store import Lock, Store, remove, stores
from squeeze.errors import TrainError
from squeeze.provenance import digest_bytes, digest_json

if TYPE_CHECKING:
    from torch import Tensor

    from squeeze.distillation.objective import Teacher
    from squeeze.distillation.settings import CacheSettings
    from squeeze.distillation.taught import Taught
    from squeeze.training.examples import Examples

FORMAT = 1
MARK = "squeeze-teacher-cache.json"
TOKENS = 4096
"""Padded tokens that the teacher reads at once: enough for its products, and no more than that is lost where it is killed."""
LOGITS = 1 << 26
"""Logits of a language model that are in memory at once: 256 MiB."""
TRIES = 3
"""Times that a store is filled which then does not hold what was written."""
PATIENCE = 20
"""Attempts after which a process says that it waits."""

Say = Callable[[int, int, str], None]


@dataclass
class CachedTeacher:
    """A Teacher (objective.py) that reads what is stored and runs the network for all else."""

    learned: "tuple[Packing, Store] | None"
    held_out: "tuple[Packing, Store] | None"
    live: "Callable[[], Teacher]"
    """Loads the network the first time that it is called."""
    notes: tuple[str, ...] = ()
    locks: list[Lock] = field(default_factory=list)

    def answers(self, batch: "Mapping[str, Tensor]", needs: Needs) -> Answers:
        """See Teacher."""
        found = self.held_out if "held_out" in batch else self.learned
        if found is not None and found[0].covers(needs):
            return found[0].unpack(found[1], batch)
        return self.live().answers(batch, needs)

    def close(self) -> None:
        """Nothing is read any more: another run may remove the stores."""
        for lock in self.locks:
            lock.close()
        self.locks.clear()


@dataclass(frozen=True)
class _Wanted:
    """A store that this run would like to have."""

    examples: "Examples"
    packing: Packing
    key: dict[str, Any]
    held_out: bool

    @property
    def name(self) -> str:
        return digest_json(self.key).removeprefix("sha256:")[:16]


class _Once:
    """A teacher that is made when it is first asked for."""

    def __init__(self, make: "Callable[[], Teacher]") -> None:
        self.make = make
        self.teacher: Teacher | None = None

    def __call__(self) -> "Teacher":
        if self.teacher is None:
            self.teacher = self.make()
        return self.teacher


def open_cache(
    root: Path, settings: "CacheSettings", taught: "Taught", live: "Callable[[], Teacher]", task: str, device: torch.device, *,
    learned: "tuple[Examples, Needs]", held_out: "tuple[Examples, Needs]", say: Say | None = None,
) -> CachedTeacher:  # fmt: skip
    """The teacher's answers to both sets of examples, computed now where they do not lie in `root` yet.

    `live` makes the teacher that computes them; it is called where it is needed, and what it made is let go of where all is kept.
    `say(i, n, text)` hears of the examples that are
    answered. Raises TrainError for a folder that holds anything else.
    """
    say = say or (lambda i, n, text: None)
    once = _Once(live)
    teacher = CachedTeacher(None, None, once)
    at = sorted(learned[1].temperatures) if task == "causal-lm" else []
    if len(at) > 1:
        several = " and ".join(f"{t:g}" for t in at)
        note = f"teacher's answers are not kept: losses read them at temperatures {several}, and one can be kept. It runs at each step"
        return replace(teacher, notes=(note,))
    learned, held_out = (
        (examples, replace(needs, temperatures=frozenset(at))) for examples, needs in (learned, held_out)
    )
    if not kept(learned[1]):
        asked = " and ".join(name for name in ("attentions", "relations") if getattr(learned[1], name))
        note = f"teacher's answers are not kept: a loss asks for its {asked}, which would take too much. It runs at each step"
        return replace(teacher, notes=(note,))
    wanted = [
        _Wanted(examples, packing, _key(taught, examples, packing), held)
        for (examples, needs), held in ((learned, False), (held_out, True))
        if len(examples) and replace(needs, temperatures=frozenset()) != Needs()
        for packing in [Packing(task, needs, settings.top)]
    ]
    _enter(root)
    notes: list[str] = []
    for each in wanted:
        store, note = _obtain(root, settings, wanted, each, once, device, teacher.locks, say)
        notes.append(note)
        if store is None:
            break
        if each.held_out:
            teacher.held_out = (each.packing, store)
        else:
            teacher.learned = (each.packing, store)
    else:
        once.teacher = None
        taught.forget()
    return replace(teacher, notes=tuple(notes))


def _key(taught: "Taught", examples: "Examples", packing: Packing) -> dict[str, Any]:
    """All that the bytes of a store depend on, but for the machine."""
    needs = packing.needs
    asked: dict[str, Any] = {"embedding": needs.embedding, "hidden": sorted(needs.hidden), "logits": needs.logits}
    if packing.vocabulary:
        asked |= {"top": packing.top, "temperature": packing.temperature}
    texts = "" if examples.texts is None else digest_json(list(examples.texts))
    return {
        "squeeze": __version__, "format": FORMAT, "task": packing.task, "teacher": taught.digest,
        "texts": digest_bytes(f"{examples.digest}|{texts}".encode()), "needs": asked,
    }  # fmt: skip


def _enter(root: Path) -> None:
    """Make the folder, or make sure that it is one of answers."""
    if root.exists() and not root.is_dir():
        raise TrainError(f"{root} is a file. Name a folder for the teacher's answers (cache.folder).")
    with _explained(root):
        root.mkdir(parents=True, exist_ok=True)
    if (root / MARK).is_file():
        return
    other = [path.name for path in sorted(root.iterdir()) if not path.name.startswith(MARK)]
    if other and not (root / MARK).is_file():  # asked again: another process may have made it in between
        raise TrainError(
            f"{root} holds {other[0]} and no teacher's answers. Name a new or an empty folder in cache.folder: nothing was removed."
        )
    with _explained(root):
        (root / MARK).touch()


def _obtain(
    root: Path, settings: "CacheSettings", wanted: list[_Wanted], each: _Wanted, live: "Callable[[], Teacher]", device: torch.device,
    locks: list[Lock], say: Say,
) -> tuple[Store | None, str]:  # fmt: skip
    """A whole store, held against removal, and what to say of it; no store where there is no room."""
    folder, lengths = root / each.name, each.examples.lengths
    what = f"teacher's answers: {len(lengths):,}{' held-out' if each.held_out else ''} examples"
    waits = "waiting for another process that computes the teacher's answers"
    filled = ""
    with _explained(root):
        lock = Lock(root / f"{each.name}.lock")
    fills, waited = 0, 0
    while True:
        with _explained(root):
            if not lock.take(alone=False, wait=False):
                say(0, len(lengths), waits)
                lock.take(alone=False, wait=True)
            if (store := _whole(folder, lengths)) is not None:
                locks.append(lock)
                return store, f"{what}, {_size(store.size)}, {filled or 'read from an earlier run'}"
            # Never wait to be alone: the one who fills reads afterwards, as long as its training takes.
            alone = lock.take(alone=True, wait=False)
        if not alone:
            waited += 1
            if waited == PATIENCE:
                say(0, len(lengths), waits)
            time.sleep(random.random() * min(0.05 * waited, 2.0))
            continue
        if fills == TRIES:
            raise TrainError(f"{folder} does not keep what is written. Name a folder on another disk in cache.folder.")
        if _whole(folder, lengths) is not None:
            continue
        one = _sample(each, live, device)
        store = Store(folder, lengths, each.packing.columns(one), _tokens(each.packing, one))
        others = _others(root, each, wanted)
        if too_much := _make_room(root, settings, wanted, live, device, store):
            lock.close()
            return None, too_much
        filled = _fill(store, each, live, device, say) + others
        fills += 1


def _whole(folder: Path, lengths: Any) -> Store | None:
    """The store in a folder, if it is there and has every byte that was written."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        store = Store.of(folder, lengths)
        return None if store.facts() is None else store
    return None


def _fill(store: Store, each: _Wanted, live: "Callable[[], Teacher]", device: torch.device, say: Say) -> str:
    """Compute what does not stand yet; what to say of it."""
    begun, count = time.monotonic(), len(each.examples)
    with _explained(store.folder.parent):
        standing = store.begin({"key": each.key})
    done = store.chunks[standing - 1][1] if standing else 0
    before = f", {done:,} of them before an interruption" if done else ""
    for chunk in range(standing, len(store.chunks)):
        a, b = store.chunks[chunk]
        batch = _batch(each, store.order[a:b], device)
        answers = live().answers(batch, each.packing.needs)
        rows = each.packing.pack(answers, batch["attention_mask"], store.columns)
        with _explained(store.folder.parent):
            store.append(chunk, rows)
        gone = time.monotonic() - begun
        left = gone / (b - done) * (count - b)
        say(b, count, f"the teacher answers {count:,} examples, {left:.0f} s left")
    seconds = time.monotonic() - begun
    with _explained(store.folder.parent):
        store.finish(seconds=seconds)
    return f"filled in {seconds:.1f} s{before}"


def _batch(each: _Wanted, numbers: Any, device: torch.device) -> "dict[str, Tensor]":
    batch = {name: tensor.to(device) for name, tensor in each.examples.batch(numbers).items()}
    return batch | {"held_out": torch.ones((), dtype=torch.bool)} if each.held_out else batch


def _sample(each: _Wanted, live: "Callable[[], Teacher]", device: torch.device) -> Answers:
    """What an answer looks like: its widths."""
    shortest = int(each.examples.lengths.argmin())
    return live().answers(_batch(each, [shortest], device), each.packing.needs)


def _tokens(packing: Packing, sample: Answers) -> int:
    if packing.vocabulary and sample.logits is not None:
        return max(1, min(TOKENS, LOGITS // sample.logits.shape[-1]))
    return TOKENS


def _make_room(
    root: Path,
    settings: "CacheSettings",
    wanted: list[_Wanted],
    live: "Callable[[], Teacher]",
    device: torch.device,
    store: Store,
) -> str:
    """Remove the oldest stores of other runs that stand in the way; why there is not room all the same, or "" where there is."""
    parts = []
    for each in wanted:
        columns = each.packing.columns(_sample(each, live, device))
        parts += [(each, column, column.size(each.examples.lengths)) for column in columns]
    needed = sum(count for _, _, count in parts)
    names = {each.name for each in wanted}
    bound = int(settings.gigabytes * 1e9)
    if needed > bound:
        return _too_large(needed, bound, parts)
    others = [path for path, _ in stores(root) if path.name not in names]
    taken = {path: _bytes(path) for path in others}
    for path in others:
        if needed + sum(taken.values()) <= bound:
            break
        lock = Lock(root / f"{path.name}.lock")
        if lock.take(alone=True, wait=False):
            remove(path)
            del taken[path]
        lock.close()
    if needed + sum(taken.values()) > bound:
        return (
            f"teacher's answers are not kept: they would take {_size(needed)}, and those that other runs are reading "
            f"{_size(sum(taken.values()))} of cache.gigabytes = {settings.gigabytes:g}. It runs at each step"
        )
    missing = needed - sum(_bytes(root / name) for name in names)
    if missing > (free := shutil.disk_usage(root).free):
        return f"teacher's answers are not kept: they would take {_size(missing)} of disk, {_size(free)} are free. It runs at each step"
    return ""


def _too_large(needed: int, bound: int, parts: "list[tuple[_Wanted, Any, int]]") -> str:
    """By how much, and what would fit."""
    text = (
        f"teacher's answers are not kept: they would take {_size(needed)}, {_size(needed - bound)} more than cache.gigabytes = "
        f"{bound / 1e9:g}. It runs at each step"
    )
    fits = [
        f"{int(sum(len(e.examples) for e in {id(p[0]): p[0] for p in parts}.values()) * bound / needed):,} examples"
    ]
    top = sum(count for _, column, count in parts if column.name in ("top.tokens", "top.logs"))
    if top:
        k = next(column.shape[0] for _, column, _ in parts if column.name == "top.tokens")
        if (fewer := int((bound - (needed - top)) / (top / k))) >= 1:
            fits.append(f"cache.top = {fewer}")
    hidden = sum(count for _, column, count in parts if column.name.startswith("hidden."))
    if hidden and needed - hidden <= bound:
        fits.append(f"all without the hidden states, which are {_size(hidden)}")
    return f"{text}. What would fit: {', or '.join(fits)}"


def _others(root: Path, each: _Wanted, wanted: list[_Wanted]) -> str:
    """Words on stores that lie there and are not read; "" where there are none."""
    names = {one.name for one in wanted}
    keys = [record.get("key", {}) for path, record in stores(root) if path.name not in names]
    if not keys:
        return ""
    differs = [[name for name in ("teacher", "texts") if key.get(name) != each.key[name]] for key in keys]
    nearest = min(differs, key=len)
    of = {"teacher": "another teacher's", "texts": "for other texts"}
    return f": what lay there is {' and '.join(of[n] for n in nearest) or 'of another kind'}"


def _bytes(folder: Path) -> int:
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            total += path.stat().st_size
    return total


def _size(count: int) -> str:
    return (
        f"{count / 1e9:.2f} GB"
        if count >= 1e9
        else f"{count / 1e6:.1f} MB"
        if count >= 1e5
        else f"{count / 1e3:.1f} kB"
    )


@contextlib.contextmanager
def _explained(root: Path) -> Iterator[None]:
    """Raise TrainError in place of a disk's errors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TrainError(
                f"{root} is full. Make room, or name a folder on another disk in cache.folder. What was computed is kept."
            ) from error
        raise TrainError(
            f"{root} cannot hold the teacher's answers: {error}. Name another folder in cache.folder."
        ) from error


def place(settings: "CacheSettings | None", workspace: Path | None) -> Path | None:
    """The folder of answers: the one that is named, or one in the run folder; None where there is neither."""
    if settings is None:
        return None
    if settings.folder is not None:
        return Path(settings.folder).expanduser()
    return None if workspace is None else workspace.parent / CACHE
