"""What a student is trained on beside the train split: texts without labels, copies with words replaced, text of the teacher's own.

Nothing that judges comes in: texts equal to one of the evaluate split or of the train split's held-out part (but for white space) are
dropped, and so are blocks that share a run of RUN tokens (half a block where that is less) with one of theirs, wherever it stands: a
file cut at other places than the recipe's data brings no piece of a held-out block that long. The notes count them.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from squeeze.data import Data, DataSettings, Splits, read_all
from squeeze.errors import DataError, TrainError
from squeeze.provenance import Digest
from squeeze.rows import Columns, read_rows
from squeeze.training import processes
from squeeze.training.examples import NO_LABEL, Examples, from_texts, joined

if TYPE_CHECKING:
    from squeeze.distillation.on_policy import OnPolicy
    from squeeze.distillation.settings import LossTerm, UnlabelledSettings
    from squeeze.distillation.stage import DistillStage
    from squeeze.model import Model

Result = TypeVar("Result")

RUN = 32
"""Tokens in a row that are no accident: a phrase that all texts of a kind share is shorter, a copied passage longer."""


def further(
    stage: "DistillStage", data: Data, learned: Examples, judged: Examples, student: "Model", teacher: "Model",
    workspace: Path | None = None, say: Callable[[int, int, str], None] | None = None,
) -> tuple[Examples, tuple[str, ...]]:  # fmt: skip
    """`learned` with all that the stage adds, or (generate) in place of it; and notes that say what came and what was dropped.

    Raises TrainError where a setting gives nothing to train on.
    """
    notes: list[str] = []
    if student.task == "causal-lm":
        held = HeldOutBlocks(data, judged)
        if stage.unlabelled is not None:
            learned = joined([learned, _more_blocks(stage, data, learned, held, student, notes)])
        if stage.generate is not None:
            made = _teachers(stage, learned, held, teacher, workspace, say, notes)
            learned = joined([learned, made]) if stage.generate.beside else made
        return learned, tuple(notes)
    known = {_plain(text) for part in (learned, judged) for text in part.texts or ()}
    evaluate = {_plain(text) for text in _evaluate_texts(data)}
    parts = [learned]
    if stage.unlabelled is not None:
        parts.append(_more_texts(stage, data, known, evaluate, student, notes))
    if stage.augment is not None:
        parts += _copies(stage, data, learned, known, evaluate, student, teacher, notes)
    return joined(parts), tuple(notes)


def check_texts(
    stage: "DistillStage",
    terms: "Sequence[LossTerm]",
    task: str,
    data: DataSettings,
    student: "Model",
    teacher: "Model",
) -> None:
    """Raises TrainError for texts that the task, the losses or the models cannot use, naming what works in their place."""
    from squeeze.distillation.on_policy import DIVERGENCES

    kinds = {term.kind for term in terms}
    if task == "causal-lm":
        if stage.augment is not None:
            raise TrainError(
                "augment replaces words for classifiers and embeddings; a language model would learn text that says nothing. "
                "Use unlabelled, generate or on_policy."
            )
    else:
        for name, value in (("generate", stage.generate), ("on_policy", stage.on_policy)):
            if value is not None:
                raise TrainError(f"{name} is text that a language model writes; for {task} use unlabelled or augment.")
    if "sequence" in kinds and stage.generate is None:
        raise TrainError("the loss sequence learns what the teacher wrote: add `generate: {}`, or use the loss labels.")
    writes = stage.generate is not None or stage.on_policy is not None
    if (writes or stage.augment is not None) and teacher.tokenizer is None:
        raise TrainError(f"{teacher.source} has no tokenizer to write or change texts with. Use unlabelled.")
    if writes and student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise TrainError(
            "generate and on_policy need one vocabulary: the student's tokens are not the teacher's. Use unlabelled."
        )
    if stage.generate is not None and stage.generate.prompt >= data.block_size:
        raise TrainError(
            f"generate.prompt = {stage.generate.prompt} tokens leave nothing of a block of {data.block_size} to write. Lower it."
        )
    if stage.on_policy is not None:
        if not kinds & DIVERGENCES:
            raise TrainError(
                f"on_policy compares two distributions over what the student wrote: add a loss of {', '.join(sorted(DIVERGENCES))}."
            )
        if stage.on_policy.prompt > data.block_size:
            raise TrainError(
                f"on_policy.prompt = {stage.on_policy.prompt} tokens, and data.block_size is {data.block_size}. Lower it."
            )
        length = stage.on_policy.prompt + stage.on_policy.new_tokens
        for model in (student, teacher):
            if model.positions is not None and length > model.positions:
                raise TrainError(
                    f"on_policy.prompt and new_tokens make {length} tokens, and {model.source} has {model.positions} positions. "
                    "Lower one of them."
                )
    if stage.augment is not None and stage.augment.by == "mask":
        one, other = student.tokenizer.mask_token, teacher.tokenizer.mask_token
        if one is None or one != other:
            raise TrainError(
                f"augment.by = mask writes the mask token; the student's is {one}, the teacher's {other}. Set it to neighbours."
            )


def sampler(stage: "DistillStage", student: "Model", teacher: "Model") -> "OnPolicy | None":
    """What replaces batches by the student's own text, where the stage asks for it. `teacher` is asked live."""
    if stage.on_policy is None:
        return None
    from squeeze.distillation.generate import ends_of
    from squeeze.distillation.objective import LiveTeacher
    from squeeze.distillation.on_policy import OnPolicy

    pad = student.tokenizer.pad_token_id or 0
    return OnPolicy(stage.on_policy, LiveTeacher(teacher), ends_of(student), stage.training.seed, pad)


def source_digest(settings: "UnlabelledSettings") -> Digest:
    """Digest of the texts as read, which decides whether an artifact trained on them still stands."""
    found = hashlib.sha256()
    columns = Columns(settings.text_column, None, settings.encoding)
    for row in _named(lambda: list(read_rows(settings.path, columns))):
        found.update(row.text.encode() + b"\0")
    return f"sha256:{found.hexdigest()}"


class HeldOutBlocks:
    """The blocks that judge, by all runs of RUN tokens in them, or of half a block: cut elsewhere, one of two pieces is as long."""

    def __init__(self, data: Data, judged: Examples) -> None:
        split = data.splits.get("evaluate")
        size = data.settings.block_size
        blocks = [np.empty((0, size), np.int64) if split is None or split.blocks is None else split.blocks]
        blocks.append(judged.tokens.reshape(-1, size).astype(np.int64))
        self.width = min(RUN, (size + 1) // 2)
        self.factors = np.random.default_rng(0).integers(1, 2**63, self.width, dtype=np.uint64) | np.uint64(1)
        self.runs = np.unique(self._runs(np.concatenate(blocks)))

    def shared(self, blocks: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which blocks share a run with one of them [n]. Rows may end early: what is below 0 is no token."""
        found = np.zeros(len(blocks), np.bool_)
        for at in range(0, len(blocks), 4096):
            found[at : at + 4096] = np.isin(self._runs(blocks[at : at + 4096]), self.runs).any(axis=1)
        return found

    def _runs(self, blocks: NDArray[np.int64]) -> NDArray[np.uint64]:
        """A 64-bit number for each run of `width` tokens [n, length − width + 1]: a sum of products modulo 2⁶⁴."""
        count = max(0, blocks.shape[1] - self.width + 1)
        tokens = (blocks + 2).astype(np.uint64)
        total = np.zeros((len(blocks), count), np.uint64)
        for place, factor in enumerate(self.factors):
            total += tokens[:, place : place + count] * factor
        return total


def _more_blocks(
    stage: "DistillStage", data: Data, learned: Examples, held: HeldOutBlocks, student: "Model", notes: list[str]
) -> Examples:
    """Blocks of prose that has no split."""
    settings = stage.unlabelled
    assert settings is not None
    size = data.settings.block_size
    found, said = _read(settings, data.settings, student)
    assert isinstance(found, np.ndarray)
    notes += [f"unlabelled: {note}" for note in said]
    there = {block.tobytes() for block in learned.tokens.reshape(-1, size)}
    shared = held.shared(found)
    repeated = np.array([block.tobytes() in there for block in found.astype(np.int32)], np.bool_) & ~shared
    rows = _chosen(found[~shared & ~repeated], settings.count, stage.training.seed)
    dropped = f"{int(shared.sum())} share {held.width} tokens in a row with held-out blocks and {int(repeated.sum())} are train blocks"
    _check_some(len(rows), f"{settings.path} gives {len(found)} blocks of {size} tokens; of these {dropped}.")
    notes.append(f"unlabelled: {len(rows)} blocks of {settings.path}; of {len(found)} read, {dropped}")
    return Examples(
        rows.astype(np.int32).reshape(-1), np.arange(len(rows) + 1, dtype=np.int64) * size, None, None, learned.pad
    )


def _teachers(
    stage: "DistillStage", learned: Examples, held: HeldOutBlocks, teacher: "Model", workspace: Path | None,
    say: Callable[[int, int, str], None] | None, notes: list[str],
) -> Examples:  # fmt: skip
    """Blocks that the teacher has written, those out that it knew from what judges."""
    from squeeze.distillation.generate import NOTHING, generated

    assert stage.generate is not None
    size = int(learned.lengths[0])
    folder = None if workspace is None else workspace.with_name(f"{workspace.name.removesuffix('.training')}.generated")
    made = generated(
        teacher, learned.tokens.reshape(-1, size).astype(np.int64), stage.generate, stage.training.seed, folder, say,
        str(processes.device_of(stage.training.device)),
    )  # fmt: skip
    # What was given stands in the train split as it is: runs without a written token are not compared.
    first = max(0, stage.generate.prompt - held.width + 1)
    rows = np.full((len(made), size - first), NOTHING, np.int64)
    for number, row in enumerate(rows):
        tokens = made.tokens[made.starts[number] + first : made.starts[number + 1]]
        row[: len(tokens)] = tokens
    shared = held.shared(rows)
    written = int(made.lengths.sum()) - len(made) * stage.generate.prompt
    notes.append(
        f"generate: the teacher wrote {written:,} tokens after the first {stage.generate.prompt} of {len(made)} blocks; "
        f"{int(shared.sum())} repeat held-out text and were dropped"
    )
    _check_some(int((~shared).sum()), "all that the teacher wrote repeats held-out text.")
    return made.take(np.flatnonzero(~shared))


def _more_texts(
    stage: "DistillStage", data: Data, known: set[str], evaluate: set[str], student: "Model", notes: list[str]
) -> Examples:
    settings = stage.unlabelled
    assert settings is not None
    found, said = _read(settings, data.settings, student)
    notes += [f"unlabelled: {note}" for note in said]
    fresh, held, repeated = _fresh([str(text) for text in found], known, evaluate)
    dropped = f"{held} are evaluate texts and {repeated} are there already"
    rows = [fresh[n] for n in _chosen(np.arange(len(fresh)), settings.count, stage.training.seed)]
    _check_some(len(rows), f"{settings.path} gives {len(found)} texts; of these {dropped}.")
    notes.append(f"unlabelled: {len(rows)} texts of {settings.path}; of {len(found)} read, {dropped}")
    return _without_labels(rows, student, data)


def _copies(
    stage: "DistillStage", data: Data, learned: Examples, known: set[str], evaluate: set[str], student: "Model", teacher: "Model",
    notes: list[str],
) -> list[Examples]:  # fmt: skip
    """Copies of the train texts, a set that may be empty: texts of one unknown word have none."""
    from squeeze.distillation.augment import augmented

    assert stage.augment is not None
    texts = learned.texts or ()
    mask = None if student.tokenizer.mask_token is None else str(student.tokenizer.mask_token)
    device = str(processes.device_of(stage.training.device))
    made = list(
        augmented(
            texts, stage.augment, teacher, mask, stage.training.seed, data.settings.max_length, device
        )
    )  # fmt: skip
    fresh, held, repeated = _fresh([text for _, text in made], known, evaluate)
    asked = stage.augment.copies * len(texts)
    notes.append(
        f"augment: {len(fresh)} copies of {len(texts)} texts by {stage.augment.by}; in {asked - len(made)} no word was replaced, "
        f"{held} are evaluate texts and {repeated} are there already"
    )
    if not fresh:
        raise TrainError(
            f"augment made no text that is new: {notes[-1]}. Raise augment.share, or set augment.by to another of neighbours, "
            "masked-lm and mask."
        )
    examples = _without_labels(fresh, student, data)
    if stage.augment.keep_labels and learned.labels is not None:
        of = {text: number for number, text in reversed(made)}
        labels = learned.labels[[of[text] for text in fresh]]
        examples = from_texts(fresh, labels, student.tokenizer, data.settings.max_length)
    return [examples]


def _without_labels(texts: Sequence[str], student: "Model", data: Data) -> Examples:
    labels = np.full(len(texts), NO_LABEL, np.int64) if student.task == "text-classification" else None
    return from_texts(texts, labels, student.tokenizer, data.settings.max_length)


def _fresh(texts: Iterable[str], known: set[str], evaluate: set[str]) -> tuple[list[str], int, int]:
    """Texts that are neither held out nor there already, and how many were either; `known` grows by them."""
    fresh: list[str] = []
    held = repeated = 0
    for text in texts:
        plain = _plain(text)
        if plain in evaluate:
            held += 1
        elif plain in known or not plain:
            repeated += 1
        else:
            known.add(plain)
            fresh.append(text)
    return fresh, held, repeated


def _read(
    settings: "UnlabelledSettings", own: DataSettings, student: "Model"
) -> tuple[list[str] | NDArray[np.int64], tuple[str, ...]]:
    """All texts or blocks; `splits` says nothing here."""
    source = DataSettings(
        path=settings.path, text_column=settings.text_column, encoding=settings.encoding, block_size=own.block_size,
        max_length=own.max_length, splits=Splits(evaluate=1),
    )  # fmt: skip
    return _named(lambda: read_all(source, student.task, student.tokenizer))


def _named(read: Callable[[], Result]) -> Result:
    """What `read` gives; its errors say which setting they are about."""
    try:
        return read()
    except DataError as error:
        said = re.sub(r"\bdata\.(text_column|encoding)\b", r"unlabelled.\1", str(error))
        raise TrainError(f"unlabelled: {said}") from error


def _chosen(rows: NDArray[np.int64], count: int | None, seed: int) -> NDArray[np.int64]:
    """At most `count` of the rows, drawn by the seed, in the order of their source."""
    if count is None or count >= len(rows):
        return rows
    return rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:count])]


def _check_some(count: int, found: str) -> None:
    if count == 0:
        raise TrainError(f"nothing is left to train on: {found} Name other texts, or drop the setting.")


def _evaluate_texts(data: Data) -> Sequence[str]:
    split = data.splits.get("evaluate")
    return () if split is None else split.texts or ()


def _plain(text: str) -> str:
    return " ".join(text.split())
