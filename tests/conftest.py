"""Real models small enough to train nothing: written once a session as ordinary Transformers folders.

Weights are drawn wide (0.2, not the usual 0.02), embeddings narrower, no bias is zero and no norm is one. A layer, bias
or norm that gets lost or misplaced on the way to ONNX then shows in the outputs, and greedy decoding says more than one
token over and over, which is all that a tied random model says otherwise.
"""

import contextlib
import io
import os
import runpy
import sys
import warnings
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked vnni on x86 processors without it.

    ONNX Runtime sums uint8 · int8 in pairs in 16 bits there and cuts off what is beyond: verify rightly refuses the exports that these
    tests make. What squeeze says and does about such processors has tests that run everywhere (compress/test_advice.py, test_reduced.py).
    """
    from squeeze.compress.advice import Machine

    if Machine.here().saturates:
        for item in items:
            if item.get_closest_marker("vnni"):
                item.add_marker(pytest.mark.skip(reason="rows of eight bits saturate on a processor without VNNI"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the tests measure of this machine is not kept among the user's files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _builder_in_this_process() -> Iterator[None]:
    """onnxruntime-genai's builder gets the same command line, but in this process, which has torch and Transformers imported already.

    The child process that users get is met by the tests of the commands.
    """
    import subprocess

    from squeeze.exporter import genai

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        out, error = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(sys, "argv", command[2:])
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
                try:
                    runpy.run_module(command[2], run_name="__main__", alter_sys=False)
                    code = 0
                except SystemExit as stop:
                    code = int(stop.code or 0)
                except Exception as failure:
                    error.write(f"\n{type(failure).__name__}: {failure}")
                    code = 1
        return subprocess.CompletedProcess(command, code, out.getvalue(), error.getvalue())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genai, "run_command", run)
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


@pytest.fixture(scope="session")
def tiny_distilbert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text-classification without token types, and names of its own for width, heads and layers in its config."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    tokenizer = make_tokenizer(unk="[UNK]", bos="[CLS]", eos="[SEP]", pad="[PAD]", token_types=False)
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=64,
        hidden_dim=128,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=3,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-distilbert"
    return _save(DistilBertForSequenceClassification, config, tokenizer, folder)


@pytest.fixture(scope="session")
def tiny_roberta_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text-classification whose positions are counted from the padding id, 1, on: 66 rows, 64 positions. No token types."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    tokenizer = make_tokenizer(
        unk="<unk>", bos="<s>", eos="</s>", pad="<pad>", framed=True, token_types=False, pad_id=1
    )
    assert tokenizer.pad_token_id == 1
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=66,
        type_vocab_size=1,
        initializer_range=0.2,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=3,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-roberta"
    return _save(RobertaForSequenceClassification, config, tokenizer, folder)


@pytest.fixture(scope="session")
def tiny_qwen2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """causal-lm as Llama, but with biases on query, key and value, and an output matrix of its own."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer(unk="<unk>", bos="<s>", eos="</s>", pad="<pad>")
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(Qwen2ForCausalLM, config, tokenizer, tmp_path_factory.mktemp("models") / "tiny-qwen2")


@pytest.fixture(scope="session")
def tiny_t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """feature-extraction from an encoder-decoder without a head: relative positions, RMS norms, scores that are not scaled."""
    from transformers import T5Config, T5Model

    tokenizer = make_tokenizer(unk="<unk>", bos="<s>", eos="</s>", pad="<pad>")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        initializer_factor=1.0,
        decoder_start_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(T5Model, config, tokenizer, tmp_path_factory.mktemp("models") / "tiny-t5")


def make_tokenizer(
    *,
    unk: str,
    bos: str,
    eos: str,
    pad: str,
    framed: bool | None = None,
    token_types: bool | None = None,
    pad_id: int = 0,
) -> Any:
    """A byte-pair tokenizer of 200 tokens, trained on SENTENCES; with `bos` "[CLS]" each text is framed as BERT's.

    `framed` and `token_types` say otherwise; `pad_id` is the padding token's number, from 0 to 3.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    framed = bos == "[CLS]" if framed is None else framed
    special = [unk, bos, eos]
    special.insert(pad_id, pad)
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=special, initial_alphabet=list(ALPHABET), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if framed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A {eos}",
            pair=f"{bos} $A {eos} $B:1 {eos}:1",
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in (bos, eos)],
        )
    names = {"cls_token": bos, "sep_token": eos} if framed else {"bos_token": bos, "eos_token": eos}
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * (framed if token_types is None else token_types)
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
