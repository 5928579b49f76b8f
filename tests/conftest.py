"""Real models small enough to train nothing: written once a session as ordinary Transformers folders.

Weights are drawn wide (0.2, not the usual 0.02), embeddings narrower, no bias is zero and no norm is one. A layer, bias
or norm that gets lost or misplaced on the way to ONNX then shows in the outputs, and greedy decoding says more than one
token over and over, which is all that a tied random model says otherwise.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports torch or the hub: both read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest

SENTENCES = (
    "The cat sat on the mat and looked at the rain.",
    "A small model answers faster than a large one, and often as well.",
    "What is not measured is not known; what is measured once is a guess.",
    "She read the letter twice, folded it, and put it back in the drawer.",
    "Good morning! The trains are late again, so take the bus.",
    "I love this phone, the battery lasts for two days.",
    "Worst service ever, nobody answered my call.",
    "The shop opens at nine and closes at five.",
    "Numbers such as 12, 345 and 67890 are split into pieces.",
    "Weights are stored as integers with one scale for each row.",
)

ALPHABET = "".join(map(chr, range(32, 127)))
"""Every printable ASCII character is in the vocabulary, so that any English text can be encoded."""


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the tests measure of this machine is not kept among the user's files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """causal-lm: 2 layers, hidden 64, 4 heads sharing 2 key-value heads, 128 positions, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(unk="<unk>", bos="<s>", eos="</s>", pad="<pad>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(LlamaForCausalLM, config, tokenizer, tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """causal-lm of another build: Conv1D for Linear (weights transposed), biases, learned positions, tied."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = make_tokenizer(unk="<unk>", bos="<s>", eos="</s>", pad="<pad>")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(GPT2LMHeadModel, config, tokenizer, tmp_path_factory.mktemp("models") / "tiny-gpt2")


@pytest.fixture(scope="session")
def tiny_bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text-classification: 2 layers, hidden 64, 4 heads, 64 positions, three labels, two token types."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = make_tokenizer(unk="[UNK]", bos="[CLS]", eos="[SEP]", pad="[PAD]")
    labels = ("negative", "neutral", "positive")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    return _save(BertForSequenceClassification, config, tokenizer, tmp_path_factory.mktemp("models") / "tiny-bert")


def make_tokenizer(*, unk: str, bos: str, eos: str, pad: str) -> Any:
    """A byte-pair tokenizer of 200 tokens, trained on SENTENCES; with `bos` "[CLS]" each text is framed as BERT's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=[pad, unk, bos, eos], initial_alphabet=list(ALPHABET), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if bos == "[CLS]":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A {eos}",
            pair=f"{bos} $A {eos} $B:1 {eos}:1",
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in (bos, eos)],
        )
    names = {"cls_token": bos, "sep_token": eos} if bos == "[CLS]" else {"bos_token": bos, "eos_token": eos}
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * (bos == "[CLS]")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, pad_token=pad, model_input_names=inputs, **names
    )


def _save(kind: Any, config: Any, tokenizer: Any, folder: Path) -> Path:
    """Draw weights with a fixed seed, narrow the embeddings, disturb norms and biases; write model and tokenizer."""
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = kind(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.get_input_embeddings().weight.mul_(0.25)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M, a .gguf file inside an installed package."""
    from squeeze.model import ModelSettings, locate

    place = locate(ModelSettings(path="asset:smollm2-135m-instruct"))
    assert isinstance(place, Path)
    return place
