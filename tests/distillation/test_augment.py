"""Words replaced: by which, how many, and what stays as it is."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from squeeze.distillation.augment import MaskedWords, augmented, whole_words, words_of
from squeeze.distillation.settings import AugmentSettings
from squeeze.errors import TrainError
from squeeze.model import Model, load_model

WORDS = ["".join(pair) + tail for pair in itertools.product("bdfgklmnprst", "aeiou") for tail in ("", "n", "st")]
"""180 words of the made-up language that these texts are in."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [".", ",", "##zu", "##zi", "17"]
    vocabulary = {token: number for number, token in enumerate([*specials, *WORDS, *pieces])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


class Table(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.table = nn.Embedding(count, 16)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(count, 16, generator=torch.Generator().manual_seed(3)))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table


@pytest.fixture(scope="module")
def teacher(tokenizer: Any) -> Model:
    return Model(Table(len(tokenizer)), tokenizer, "text-classification", "made-up", {})


def texts(count: int) -> list[str]:
    random = np.random.default_rng(0)
    return [" ".join(random.choice(WORDS, 12)) + " , 17 ." for _ in range(count)]


def all_of(teacher: Model, given: list[str], seed: int = 0, **settings: Any) -> list[tuple[int, str]]:
    return list(augmented(given, AugmentSettings(**settings), teacher, "[MASK]", seed))


@pytest.mark.parametrize("by", ["neighbours", "mask"])
def test_as_many_words_are_replaced_as_asked_and_nothing_else(teacher: Model, by: str) -> None:
    given = texts(400)
    made = all_of(teacher, given, by=by, share=0.3, copies=2)
    changed = total = 0
    for number, text in made:
        old, new = given[number].split(), text.split()
        assert len(old) == len(new)
        assert new[-3:] == [",", "17", "."]
        changed += sum(a != b for a, b in zip(old, new, strict=True))
    total = 12 * 2 * len(given)
    assert changed / total == pytest.approx(0.3, abs=0.015)  # three standard errors of 9,600 draws
    if by == "mask":
        assert {b for n, t in made for a, b in zip(given[n].split(), t.split(), strict=True) if a != b} == {"[MASK]"}


def test_the_same_seed_gives_the_same_copies_and_another_others(teacher: Model) -> None:
    given = texts(300)
    one, same, other = (all_of(teacher, given, seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    # A text's copies do not hang on the texts beside it.
    assert [pair for pair in one if pair[0] < 280] == all_of(teacher, given[:280], 1)


def test_neighbours_are_the_nearest_words_by_cosine(teacher: Model, tokenizer: Any) -> None:
    table = teacher.network.get_input_embeddings().weight.detach().numpy()  # type: ignore[operator]
    numbers = tokenizer.convert_tokens_to_ids(WORDS)
    unit = table[numbers] / np.linalg.norm(table[numbers], axis=1, keepdims=True)
    order = [WORDS[n] for n in np.argsort(-(unit @ table[tokenizer.convert_tokens_to_ids("ban")]))]
    assert order[0] == "ban"
    made = all_of(teacher, ["ban"] * 200, by="neighbours", share=1.0, candidates=4)
    assert {text for _, text in made} == set(order[1:5])
    assert all_of(teacher, ["bazuzi"], share=1.0) == []  # three tokens
    assert all_of(teacher, ["xyz xyz"], share=1.0) == []  # unknown to the tokenizer: no vector, no copy


def test_special_tokens_numbers_and_capitals(teacher: Model) -> None:
    assert [w.text for w in words_of("Ban [SEP] don't 17 x_2 dast.", ("[SEP]",))] == ["Ban", "don't", "x", "dast"]
    made = all_of(teacher, ["Ban [SEP] dast 17 [MASK] kest ."] * 50, share=1.0)
    assert len(made) == 50
    for _, text in made:
        new = text.split()
        assert (new[1], new[3:5], new[6]) == ("[SEP]", ["17", "[MASK]"], ".")
        assert new[0][0].isupper()
        assert new[2] != "dast"


def test_whole_words_are_single_tokens_of_letters(tokenizer: Any, tiny_llama_folder: Path) -> None:
    assert set(whole_words(tokenizer)) == set(WORDS)
    llama = load_model(tiny_llama_folder, "causal-lm").tokenizer
    found = whole_words(llama)
    assert "the" in found
    assert all(llama(f" {word}", add_special_tokens=False)["input_ids"] == [number] for word, number in found.items())


@pytest.fixture(scope="module")
def masked(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("masked")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=40, initializer_range=0.3,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_masked_language_model_names_the_likeliest_words_for_the_place(
    teacher: Model, masked: Path, tokenizer: Any
) -> None:
    from transformers import BertForMaskedLM

    text = "ban dast , kest 17 ."
    network = BertForMaskedLM.from_pretrained(masked).eval()
    inputs = tokenizer("ban [MASK] , kest 17 .", return_tensors="pt")
    with torch.no_grad():
        scores = network(**inputs).logits[0, 2].numpy()
    numbers = dict(zip(WORDS, tokenizer.convert_tokens_to_ids(WORDS), strict=True))
    best = sorted((word for word in WORDS if word != "dast"), key=lambda word: -scores[numbers[word]])[:5]
    word = words_of(text)[1]
    found = MaskedWords(str(masked), 5, 40).candidates({(0, 1): (text, word)})
    assert list(found[0, 1]) == best
    made = all_of(teacher, [text] * 300, by="masked-lm", model=str(masked), share=0.4, candidates=5)
    assert {t.split()[1] for _, t in made} == {"dast", *best}


def test_a_masked_language_model_is_asked_for_words_of_several_pieces_too(masked: Path) -> None:
    words = MaskedWords(str(masked), 4, 40)
    one = words.candidates({(0, 0): ("bazuzi dast", words_of("bazuzi")[0])})
    assert one == words.candidates({(0, 0): ("xyz dast", words_of("xyz")[0])})
    assert len(one[0, 0]) == 4
    # A place behind the cut is not guessed at: four words and both frames are six tokens.
    long = "ban dast kest mo fust"
    found = MaskedWords(str(masked), 4, 6).candidates({(0, n): (long, word) for n, word in enumerate(words_of(long))})
    assert sorted(found) == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_a_model_without_the_head_is_refused(teacher: Model, tiny_bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="predicts no masked words: it lacks cls.predictions"):
        all_of(teacher, ["ban"], by="masked-lm", model=str(tiny_bert_folder))
    with pytest.raises(TrainError, match="augment.model: .*does not exist"):
        all_of(teacher, ["ban"], by="masked-lm", model=str(tmp_path / "none"))
    with pytest.raises(TrainError, match="it has none. Set it to neighbours"):
        list(augmented(["ban"], AugmentSettings(by="mask"), teacher, None, 0))
    with pytest.raises(ValueError, match="Name one with augment.model"):
        AugmentSettings(by="masked-lm")
