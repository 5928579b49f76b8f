"""Texts cut into explicit, disjoint, seeded and digested splits, and splits into padded batches.

The order of a file says nothing about its use, so examples are permuted once by a seeded numpy Generator and dealt
out: `evaluate` first, then `calibration`, then `train`. The held-out examples are therefore the same whatever the other
two ask for, and a model trained on `train: rest` has never seen them. Duplicates are dropped before dealing, and all
examples are compared afterwards: no split shares one with another.

Prose for causal-lm is one long text, tokenised whole and cut into blocks of equal length; the tail is dropped.
Rejected: one padded example per document (perplexity would then depend on how documents happen to be cut into rows, and
short rows would be scored with hardly any context). Rejected too: a `datasets.Dataset`. It writes caches under the
user's home and brings fingerprints of its own, where a tuple of strings is all that is needed.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from squeeze.errors import DataError, nearest
from squeeze.provenance import Digest, digest_bytes, digest_json
from squeeze.rows import ASSETS, Columns, Row, read_rows
from squeeze.tasks import positions

PIECE = 2**20
"""Prose is tokenised in pieces of about this many characters, which bounds the tokenizer's memory."""
DOCUMENT_END = "\n\n"

SplitName = Literal["evaluate", "calibration", "train"]
SPLITS: tuple[SplitName, ...] = ("evaluate", "calibration", "train")


class Splits(BaseModel):
    """How many examples (texts, or blocks of tokens for causal-lm) each split gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    evaluate: int = Field(ge=1, description="held out: scored, never calibrated or trained on")
    calibration: int = Field(default=0, ge=0, description="seen by methods that need activations")
    train: Annotated[int, Field(ge=0)] | Literal["rest"] = Field(default=0, description="number of examples, or `rest`")


class DataSettings(BaseModel):
    """Which texts, how they are read, and how they are split.

    An `asset:` name brings its own columns, encoding and labels; what a recipe says overrides them, and the settings as
    recorded always show the values used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="a .csv, .jsonl, .parquet or .txt file, or an asset: name")
    text_column: str = Field(default="text", description="column or key that holds the text (not for .txt)")
    label_column: str | None = Field(default=None, description="column or key of the label, for text-classification")
    labels: dict[str, Annotated[int, Field(ge=0)]] | None = Field(
        default=None, description="class number of each label text; without it labels must be class numbers themselves"
    )
    encoding: str = Field(default="utf-8", description="character encoding of a .csv, .jsonl or .txt file")
    block_size: int = Field(default=512, ge=2, description="tokens in one causal-lm example")
    max_length: int = Field(default=128, ge=1, description="tokens after which other tasks cut a text off")
    splits: Splits
    seed: int | None = Field(default=None, ge=0, description="seed of the split; without it the recipe's seed")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_asset(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and (asset := ASSETS.get(str(given.get("path")))):
            return {**asset.settings, **given}
        return given


@dataclass(frozen=True)
class Split:
    """Examples that serve one purpose: either `texts` (with `labels` where the task has them) or `blocks` of tokens."""

    name: SplitName
    texts: tuple[str, ...] | None
    labels: tuple[int, ...] | None
    blocks: NDArray[np.int64] | None
    """Token numbers [examples, block_size]; causal-lm only."""
    digest: Digest
    """Over texts and labels, or over the blocks; not over the name."""
    truncated: int = 0
    """Texts that are longer than max_length tokens and will be cut off."""

    def __len__(self) -> int:
        return len(self.texts) if self.texts is not None else 0 if self.blocks is None else len(self.blocks)

    def first(self, count: int | None) -> "Split":
        """The first examples of this split, which are as random as any; all where there are fewer, or `count` is None.

        The digest stays the whole split's: how many were used is in the settings of whoever asked.
        """
        return replace(
            self,
            texts=None if self.texts is None else self.texts[:count],
            labels=None if self.labels is None else self.labels[:count],
            blocks=None if self.blocks is None else self.blocks[:count],
        )


@dataclass(frozen=True)
class Data:
    """The splits of one source of texts; a split for which the settings ask no examples is absent."""

    settings: DataSettings
    task: str
    splits: dict[str, Split]
    labels: dict[str, int] | None
    """Class number of each label text; None where the task has no labels."""
    notes: tuple[str, ...] = ()
    """What was left out or cut off and how much of it, for the report."""
    seed: int = 0
    """What `load_data` was given: with `settings` and the tokenizer it makes the same splits again, in another process."""

    @property
    def digests(self) -> dict[str, Digest]:
        """Digest of each split."""
        return {name: split.digest for name, split in self.splits.items()}

    def split(self, name: str) -> Split:
        """The split of this name; DataError naming the setting that would fill it."""
        if name not in SPLITS:
            raise DataError(f"there is no split named {name!r}. {nearest(name, SPLITS)}")
        if name not in self.splits:
            raise DataError(f"the {name} split of {self.settings.path} is empty. Set data.splits.{name} to its size.")
        return self.splits[name]


def load_data(settings: DataSettings, task: str, tokenizer: Any, seed: int) -> Data:
    """Read, deduplicate, permute by `settings.seed` (or else `seed`), and deal out the splits.

    `tokenizer` is a Transformers tokenizer: it makes the blocks of causal-lm and counts the texts that will be cut off.
    Raises DataError, naming file, line and mend, for whatever cannot be read or does not suffice.
    """
    if tokenizer is None:
        raise DataError(
            f"the model has no tokenizer for the texts of {settings.path}. Put tokenizer.json beside its weights."
        )
    generator = np.random.default_rng(settings.seed if settings.seed is not None else seed)
    notes: list[str] = []
    labels: dict[str, int] | None = None
    if task == "causal-lm":
        blocks = _blocks(settings, tokenizer, notes)
        dealt = _deal(settings, len(blocks), f"blocks of {settings.block_size} tokens", generator)
        splits = [_block_split(name, blocks[numbers]) for name, numbers in dealt.items()]
    else:
        rows = _examples(
            settings, notes, label_column=_label_column(settings) if task == "text-classification" else None
        )
        if task == "text-classification":
            labels = _label_numbers(rows, settings)
        dealt = _deal(settings, len(rows), "texts", generator)
        splits = [
            _text_split(name, [rows[n] for n in numbers], labels, tokenizer, settings.max_length)
            for name, numbers in dealt.items()
        ]
        notes += [
            f"{split.truncated} of {len(split)} {split.name} texts are cut off at {settings.max_length} tokens"
            for split in splits
            if split.truncated
        ]
    check_disjoint(splits)
    return Data(settings, task, {split.name: split for split in splits}, labels, tuple(notes), seed)


def read_all(
    settings: DataSettings, task: str, tokenizer: Any
) -> tuple[list[str] | NDArray[np.int64], tuple[str, ...]]:
    """Every text, or for causal-lm every block [n, block_size], in the order of the file and each once; and notes. No splits."""
    notes: list[str] = []
    if task == "causal-lm":
        return _blocks(settings, tokenizer, notes), tuple(notes)
    return [row.text for row in _examples(settings, notes)], tuple(notes)


def check_disjoint(splits: Iterable[Split]) -> None:
    """DataError where one example stands in two splits: a score on calibrated or trained examples proves nothing."""
    owner: dict[str | bytes, SplitName] = {}
    for split in splits:
        examples: Sequence[str | bytes] = split.texts or ()
        if split.blocks is not None:
            examples = [block.tobytes() for block in split.blocks]
        shared = Counter(
            other for example in examples if (other := owner.setdefault(example, split.name)) != split.name
        )
        if shared:
            found = " and ".join(f"{count} in {other}" for other, count in shared.items())
            raise DataError(
                f"of {len(split)} {split.name} examples, {found} stand too. Splits must not share an example."
            )


def check_fits(data: Data, config: Mapping[str, Any]) -> None:
    """DataError where the data does not fit the model: more tokens than positions, or classes that its head lacks.

    `config` is the model's config.json. Class names are compared only where the head has all of the data's: a head
    whose labels are called LABEL_0, LABEL_1 … says nothing about what they mean.
    """
    setting = "block_size" if data.task == "causal-lm" else "max_length"
    length, limit = getattr(data.settings, setting), positions(config)
    if limit is not None and length > limit:
        raise DataError(
            f"data.{setting} = {length} tokens, but the model has {limit} positions. Set it to at most that."
        )
    heads = {str(name): int(number) for number, name in (config.get("id2label") or {}).items()}
    if data.labels is None or not heads:
        return
    if max(data.labels.values()) >= len(heads):
        raise DataError(
            f"{data.settings.path} has the classes {_listed(data.labels)}, but the model's head knows {len(heads)}: "
            f"{_listed(heads)}. Change data.labels, or the model."
        )
    if heads.keys() >= data.labels.keys() and any(heads[name] != number for name, number in data.labels.items()):
        raise DataError(
            f"data.labels numbers the classes {_listed(data.labels)}, but the model was trained with {_listed(heads)}. "
            "Use the model's numbers."
        )


def batches(
    split: Split,
    tokenizer: Any,
    task: str,
    *,
    batch: int,
    max_length: int,
    order: Literal["sorted", "shuffled", "given"] = "sorted",
    seed: int = 0,
) -> list[dict[str, NDArray[np.int64]]]:
    """Model inputs, `batch` examples each (the last may have fewer): int64 arrays [batch, length], and `index` [batch].

    `index` holds the examples' numbers in the split, so that outputs can be put back in order. Texts are padded on the
    right to the longest of their batch, not to max_length. `sorted` puts texts of like length together, longest first,
    so that the peak of memory comes with the first batch; `shuffled` draws an order from the seed. Blocks all have one
    length and keep their order.
    """
    if batch < 1:
        raise DataError(f"a batch of {batch} examples leaves nothing to compute. Batches start at 1.")
    if task == "causal-lm":
        return _block_batches(split, batch)
    if split.texts is None:
        raise DataError(f"the {split.name} split holds blocks of tokens, not texts. Load it with task {task}.")
    if not split.texts:
        return []
    columns = tokenizer(list(split.texts), truncation=True, max_length=max_length)
    lengths = np.array([len(tokens) for tokens in columns["input_ids"]], dtype=np.int64)
    if lengths.min() == 0:
        text = split.texts[int(lengths.argmin())]
        raise DataError(
            f"the tokenizer makes no token of {text[:60]!r} ({split.name} split). Drop that text from the data."
        )
    numbers = np.argsort(-lengths, kind="stable") if order == "sorted" else np.arange(len(lengths))
    if order == "shuffled":
        numbers = np.random.default_rng(seed).permutation(len(lengths))
    groups = [numbers[start : start + batch] for start in range(0, len(numbers), batch)]
    return [_padded(columns, group, int(lengths[group].max()), tokenizer.pad_token_id or 0) for group in groups]


def _block_batches(split: Split, batch: int) -> list[dict[str, NDArray[np.int64]]]:
    if split.blocks is None:
        raise DataError(f"the {split.name} split holds texts, not blocks of tokens. Load it with task causal-lm.")
    result = []
    for start in range(0, len(split), batch):
        tokens = split.blocks[start : start + batch]
        index = np.arange(start, start + len(tokens))
        result.append({"input_ids": tokens, "attention_mask": np.ones_like(tokens), "index": index})
    return result


def _padded(
    columns: Mapping[str, list[list[int]]], group: NDArray[np.int64], length: int, pad: int
) -> dict[str, NDArray[np.int64]]:
    """The group's lists of unequal length as arrays [len(group), length]; masks and token types are padded with 0."""
    arrays = {"index": group}
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        if name in columns:
            arrays[name] = np.full((len(group), length), pad if name == "input_ids" else 0, dtype=np.int64)
            for row, number in zip(arrays[name], group, strict=True):
                row[: len(columns[name][number])] = columns[name][number]
    return arrays


# Examples: from rows to splits


def _examples(settings: DataSettings, notes: list[str], label_column: str | None = None) -> list[Row]:
    """Rows without the blank ones, and the first row only of each text.

    Where people labelled one text twice and disagreed, the first label stands: either choice is arbitrary, and dropping
    both would make the held-out texts easier than the source.
    """
    rows = list(read_rows(settings.path, Columns(settings.text_column, label_column, settings.encoding)))
    first: dict[str, Row] = {}
    blank = repeated = disagree = 0
    for row in rows:
        if not row.text.strip():
            blank += 1
        elif (kept := first.setdefault(row.text, row)) is not row:
            repeated += 1
            disagree += kept.label != row.label
    if blank:
        notes.append(f"{blank} of {len(rows)} texts are blank and were dropped")
    if repeated:
        other = f" ({disagree} of them with another label)" if disagree else ""
        notes.append(f"{repeated} of {len(rows)} texts repeat an earlier one{other} and were dropped")
    return list(first.values())


def _blocks(settings: DataSettings, tokenizer: Any, notes: list[str]) -> NDArray[np.int64]:
    """The text as token blocks [n, block_size] without special tokens; repeated blocks and the tail are dropped."""
    if Path(settings.path).suffix.lower() == ".txt":
        lines = read_rows(settings.path, Columns(encoding=settings.encoding))
        pieces = _pieces((line.text for line in lines), "\n")
    else:
        pieces = _pieces((row.text for row in _examples(settings, notes)), DOCUMENT_END)
    tokens = [np.array(tokenizer(p, add_special_tokens=False, verbose=False)["input_ids"], np.int64) for p in pieces]
    stream = np.concatenate([np.empty(0, np.int64), *tokens])
    count = len(stream) // settings.block_size
    blocks = stream[: count * settings.block_size].reshape(count, settings.block_size)
    first: dict[bytes, int] = {}
    for number, block in enumerate(blocks):
        first.setdefault(block.tobytes(), number)
    if len(first) < count:
        notes.append(f"{count - len(first)} of {count} token blocks repeat an earlier one and were dropped")
    return blocks[list(first.values())]


def _pieces(texts: Iterable[str], separator: str) -> Iterator[str]:
    """The joined texts, cut between two of them after every PIECE characters or so."""
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= PIECE:
            yield separator.join([*held, ""])
            held, size = [], 0
    if held:
        yield separator.join(held)


def _deal(
    settings: DataSettings, count: int, what: str, generator: np.random.Generator
) -> dict[SplitName, NDArray[np.int64]]:
    """The example numbers of each split that is not empty: a seeded permutation of all, evaluate first."""
    asked = settings.splits
    train = asked.train
    if train == "rest":
        train = max(count - asked.evaluate - asked.calibration, 1)
    ends = np.cumsum([asked.evaluate, asked.calibration, train])
    if ends[-1] > count:
        raise DataError(
            f"{settings.path} gives {count} {what}, but data.splits asks for evaluate {asked.evaluate}, "
            f"calibration {asked.calibration} and train {asked.train}. Ask for fewer, or name more data."
        )
    parts = np.split(generator.permutation(count)[: ends[-1]], ends[:-1])
    return {name: part for name, part in zip(SPLITS, parts, strict=True) if len(part)}


def _block_split(name: SplitName, blocks: NDArray[np.int64]) -> Split:
    return Split(name, None, None, blocks, digest_bytes(str(blocks.shape).encode() + blocks.astype("<i8").tobytes()))


def _text_split(
    name: SplitName, rows: list[Row], numbers: Mapping[str, int] | None, tokenizer: Any, max_length: int
) -> Split:
    texts = [row.text for row in rows]
    labels = None if numbers is None else tuple(numbers[_label_text(row.label)] for row in rows)
    truncated = 0
    for start in range(0, len(texts), 1000):
        lengths = map(len, tokenizer(texts[start : start + 1000], verbose=False)["input_ids"])
        truncated += sum(length > max_length for length in lengths)
    digest = digest_json([[*texts], None if labels is None else [*labels]])
    return Split(name, tuple(texts), labels, None, digest, truncated)


def _label_column(settings: DataSettings) -> str:
    if settings.label_column is None:
        raise DataError(
            f"text-classification needs labels. Set data.label_column to the column of {settings.path} with them."
        )
    return settings.label_column


def _label_numbers(rows: list[Row], settings: DataSettings) -> dict[str, int]:
    """Class number of each label text that the data may hold; every row's label is checked against it."""
    seen = Counter(_label_text(row.label) for row in rows)
    if settings.labels is not None:
        numbers = settings.labels
        mend = "Add it to data.labels, or drop those rows."
    else:
        numbers = {label: int(label) for label in sorted(seen) if re.fullmatch(r"[0-9]{1,6}", label)}
        mend = "Number the labels in data.labels, as in {negative: 0, positive: 1}."
    for row in rows:
        if _label_text(row.label) not in numbers:
            raise DataError(
                f"{settings.path} {row.where}: label {_label_text(row.label)!r} has no class number. Known: "
                f"{_listed(numbers)}; rows in the data: {_listed(dict(seen.most_common()))}. {mend}"
            )
    return dict(numbers)


def _label_text(label: Any) -> str:
    """JSON's 1 and CSV's "1" are one label."""
    return str(label).strip()


def _listed(numbers: Mapping[str, int]) -> str:
    shown = [f"{name} {number}" for name, number in list(numbers.items())[:12]]
    return ", ".join([*shown, "…"] if len(numbers) > 12 else shown) or "none"
