"""Copies of texts with words replaced: what a teacher is asked about beside the texts that there are.

Jiao et al. 2019, "TinyBERT" (arXiv:1909.10351), algorithm 1: each word is replaced with probability p_t (0.4 there) by one of the K (15)
candidates for its place, drawn evenly. There, a masked language model names those of a word that is one token to it, and GloVe's nearest
vectors those of all others. Here it is one or the other: a masked language model is asked for every word, with one mask in its place
(in the original text, not the half-replaced one, so that many places are asked for at once); or the nearest words in the teacher's
own embedding table are taken (GloVe's is a download of 1 GB). A word of several tokens has no vector in that table and stays: near the
mean of its pieces lie their likes and no words of its kind (MiniLM, "unhappiness": un, ha, une, una).

Words are runs of letters; numbers, punctuation and special tokens written in a text stay as they are.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from squeeze.errors import ModelError, TrainError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from squeeze.distillation.settings import AugmentSettings
    from squeeze.model import Model

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
GROUP = 256
"""Texts that are augmented together: bounds the candidates that are held at once."""
ROWS = 64
"""Masked texts in one pass of the masked language model, and (times 16) words compared with the table at once."""


@dataclass(frozen=True)
class Word:
    """A word's place in a text."""

    start: int
    end: int
    text: str


def words_of(text: str, specials: Sequence[str] = ()) -> list[Word]:
    """The words of a text, those inside a special token ("[SEP]") left out."""
    taken = [m.span() for special in specials if special for m in re.finditer(re.escape(special), text)]
    return [
        Word(m.start(), m.end(), m[0])
        for m in WORD.finditer(text)
        if not any(a <= m.start() < b for a, b in taken)
    ]  # fmt: skip


def augmented(
    texts: Sequence[str], settings: "AugmentSettings", teacher: "Model", mask: str | None, seed: int, max_length: int = 128,
    device: str = "cpu",
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """(number of the original, copy with words replaced) for every copy in which a word changed, ordered by original.

    `mask` is the token that stands for nothing (by: mask). Each text's draws depend on seed, copy and its number alone.
    Raises TrainError where the tokenizer has no mask token, and for a model that predicts no masked words.
    """
    tokenizer = teacher.tokenizer
    specials = tuple(str(token) for token in tokenizer.all_special_tokens)
    if settings.by == "mask" and mask is None:
        raise TrainError("augment.by = mask writes the tokenizer's mask token, and it has none. Set it to neighbours.")
    near = _Neighbours(teacher, settings.candidates) if settings.by == "neighbours" else None
    guesser = None if settings.model is None else MaskedWords(settings.model, settings.candidates, max_length, device)
    for begin in range(0, len(texts), GROUP):
        group = range(begin, min(begin + GROUP, len(texts)))
        words = {n: words_of(texts[n], specials) for n in group}
        draws = {(n, c): _draw(seed, c, n, len(words[n])) for n in group for c in range(settings.copies)}
        asked = sorted({(n, int(i)) for (n, _), (u, _) in draws.items() for i in np.flatnonzero(u < settings.share)})
        if guesser is not None:
            found = guesser.candidates({(n, i): (texts[n], words[n][i]) for n, i in asked})
        elif near is not None:
            named = near.candidates(sorted({words[n][i].text for n, i in asked}))
            found = {(n, i): named[words[n][i].text] for n, i in asked}
        else:
            found = dict.fromkeys(asked, (str(mask),))
        for n in group:
            for c in range(settings.copies):
                chance, pick = draws[n, c]
                changes = [
                    (words[n][i], options[int(pick[i] * len(options))])
                    for i in np.flatnonzero(chance < settings.share).tolist()
                    if (options := found.get((n, i), ()))
                ]
                if changes:
                    yield n, _replaced(texts[n], changes)


def _draw(seed: int, copy: int, number: int, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each word of a text: whether it is replaced, and by which candidate, both uniform in [0, 1)."""
    uniform = np.random.default_rng((seed, copy, number + 1)).random((2, count))
    return uniform[0], uniform[1]


def _replaced(text: str, changes: Sequence[tuple[Word, str]]) -> str:
    """The text with those words changed; a capital at the front of one stays."""
    parts, at = [], 0
    for word, other in changes:
        parts += [text[at : word.start], other[:1].upper() + other[1:] if word.text[:1].isupper() else other]
        at = word.end
    return "".join([*parts, text[at:]])


def whole_words(tokenizer: Any) -> dict[str, int]:
    """Words of at least two letters that are one token inside a text, and that token's number."""
    special = set(tokenizer.all_special_ids)
    found: dict[str, int] = {}
    named = [
        (number, tokenizer.convert_tokens_to_string([token]).strip())
        for token, number in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
        if number not in special
    ]
    named = [(number, word) for number, word in named if len(word) > 1 and WORD.fullmatch(word)]
    for lead in (" ", ""):  # most tokenizers tell a word inside a text from one at its start
        ids = tokenizer([lead + word for _, word in named], add_special_tokens=False)["input_ids"] if named else []
        for (number, word), row in zip(named, ids, strict=True):
            if list(row) == [number]:
                found.setdefault(word, number)
    return found


class _Neighbours:
    """The words nearest to a word by cosine in the teacher's embedding table [tokens, width]."""

    def __init__(self, teacher: "Model", count: int) -> None:
        from torch.nn import functional

        self.count = count
        self.vectors = _embeddings(teacher)
        self.known = whole_words(teacher.tokenizer)
        self.words = tuple(self.known)
        if not self.words:
            raise TrainError(
                f"{teacher.source}: no token of its vocabulary is a whole word that another could be near. "
                "Set augment.by to mask."
            )
        self.table = functional.normalize(self.vectors[list(self.known.values())], dim=1)
        self.folded = np.array([word.casefold() for word in self.words])

    def candidates(self, words: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """For each word the `count` nearest others, nearest first; none for a word that is not one token."""
        found: dict[str, tuple[str, ...]] = dict.fromkeys(words, ())
        known = {word: self.known.get(word, self.known.get(word.lower(), -1)) for word in words}
        known = {word: number for word, number in known.items() if number >= 0}
        for at in range(0, len(known), ROWS * 16):
            some = list(known)[at : at + ROWS * 16]
            scores = self.vectors[[known[word] for word in some]] @ self.table.T
            near = scores.topk(min(self.count + 4, len(self.words)), dim=1).indices.tolist()
            for word, places in zip(some, near, strict=True):
                others = [self.words[p] for p in places if self.folded[p] != word.casefold()]
                found[word] = tuple(others[: self.count])
        return found


def _embeddings(teacher: "Model") -> "Tensor":
    network: Any = teacher.network
    try:
        return network.get_input_embeddings().weight.detach().float().cpu()  # type: ignore[no-any-return]
    except (AttributeError, NotImplementedError) as error:
        raise TrainError(
            f"{teacher.source} shows no embedding table to find neighbours in. Set augment.by to mask."
        ) from error


class MaskedWords:
    """A masked language model that names words for a place (Devlin et al. 2018, arXiv:1810.04805, section 3.1)."""

    def __init__(self, path: str, count: int, max_length: int, device: str = "cpu") -> None:
        """Raises TrainError for a model without that head, or whose tokenizer has no mask token."""
        self.count, self.max_length, self.device = count, max_length, device
        self.network, self.tokenizer = _load_masked(path)
        self.network.to(device)
        if self.tokenizer is None or self.tokenizer.mask_token is None:
            raise TrainError(f"augment.model = {path}: its tokenizer has no mask token. Name a masked language model.")
        words = whole_words(self.tokenizer)
        self.names, self.ids = tuple(words), np.array(list(words.values()), np.int64)

    def candidates(self, asked: Mapping[tuple[int, int], tuple[str, Word]]) -> dict[tuple[int, int], tuple[str, ...]]:
        """For each place (text, word): the `count` likeliest other words, likeliest first.

        A place that is cut off with the end of its text is missing from the answer.
        """
        import torch

        places = list(asked)
        texts = [
            text[: word.start] + str(self.tokenizer.mask_token) + text[word.end :] for text, word in map(asked.__getitem__, places)
        ]  # fmt: skip
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        columns = torch.from_numpy(self.ids).to(self.device)
        found: dict[tuple[int, int], tuple[str, ...]] = {}
        for at in range(0, len(order), ROWS):
            some = order[at : at + ROWS]
            inputs = self.tokenizer(
                [texts[n] for n in some], truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
            ).to(self.device)
            with torch.no_grad():
                logits = self.network(**inputs).logits
            masked = inputs["input_ids"] == self.tokenizer.mask_token_id
            for row, n in enumerate(some):
                if int(masked[row].sum()) != 1:  # cut off, or the text itself has a mask
                    continue
                scores = logits[row, masked[row]][0][columns]
                near = scores.topk(min(self.count + 4, len(columns))).indices.tolist()
                old = asked[places[n]][1].text.casefold()
                found[places[n]] = tuple([w for p in near if (w := self.names[p]).casefold() != old][: self.count])
        return found


def _load_masked(path: str) -> "tuple[nn.Module, Any]":
    import torch
    import transformers

    from squeeze.checkpoint import hub_errors, quiet_transformers
    from squeeze.model import ModelSettings, locate

    try:
        location = locate(ModelSettings(path=path))
        with hub_errors(location), quiet_transformers():
            network, info = transformers.AutoModelForMaskedLM.from_pretrained(
                location, dtype=torch.float32, output_loading_info=True, use_safetensors=True
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(location)
    except ModelError as error:
        raise TrainError(f"augment.model: {error}") from error
    if missing := sorted(info.get("missing_keys", ())):
        raise TrainError(
            f"augment.model = {path} predicts no masked words: it lacks {missing[0]}. Name a model that was trained to (BERT as it was "
            "published, say), or set augment.by to neighbours."
        )
    return network.eval().requires_grad_(False), tokenizer
