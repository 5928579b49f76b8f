"""Train the LSTM language model of benchmarks/lstm.py, and its tokenizer, on Python's own help texts: about a minute.

    python benchmarks/train_lstm.py

squeeze takes anyone's own torch.nn.Module; this makes the one that shows it. The text is `asset:pydoc-topics`, which
every CPython carries, so nothing is downloaded. Blocks are dealt by `squeeze.data.load_data` with the settings in DATA:
recipes/lstm-int8.yaml, which holds out no more than they do, scores on blocks that were never trained on. (The
tokenizer has seen them: it is a table of frequent strings, made from the whole text.)

The result is a folder under benchmarks/cache, which git ignores: model.safetensors and an ordinary tokenizer. A second
call finds it, compares the digest of everything that determined it and returns at once. The last line on stdout is one
JSON object.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue
from safetensors.torch import save_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, when run as a file

from benchmarks import lstm
from benchmarks.store import CACHE, store, stored
from squeeze.data import DataSettings, Splits, load_data
from squeeze.provenance import digest_file, digest_json
from squeeze.rows import Columns, read_rows

DATA = DataSettings(
    path="asset:pydoc-topics", block_size=128, splits=Splits(evaluate=80, calibration=24, train="rest"), seed=0
)
"""Like the `data` section of recipes/lstm-int8.yaml; its evaluate and calibration must not ask for more than this."""

EPOCHS = 8
BATCH = 8
LEARNING_RATE = 4e-3
WARM_UP = 0.05
"""Share of the steps over which the learning rate rises from 0; it then falls to 0 along half a cosine."""
WEIGHT_DECAY = 0.1
SEED = 0
END = "<|end|>"


def main() -> None:
    """Parse the command line, train unless the same model is already there, print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=CACHE / "lstm", help="model folder (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="train again even if the same model is already there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps({"folder": str(arguments.out), **train(arguments.out, fresh=arguments.fresh)}))


def train(folder: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Train, score on the held-out blocks, and put model and tokenizer into `folder`; returns its record."""
    tokenizer = train_tokenizer()
    data = load_data(DATA, "causal-lm", tokenizer, SEED)
    settings: dict[str, JsonValue] = {
        "module": digest_file(Path(lstm.__file__)),
        "data": {**data.digests},
        "epochs": EPOCHS,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "warm_up": WARM_UP,
        "weight_decay": WEIGHT_DECAY,
        "seed": SEED,
        "threads": torch.get_num_threads(),
    }
    digest = digest_json(settings)
    if not fresh and (found := stored(folder, digest)):
        print(f"{folder} already holds this model; --fresh trains it again", file=sys.stderr)
        return found
    start = time.monotonic()
    network = _train(torch.from_numpy(data.split("train").blocks))
    seconds = time.monotonic() - start
    perplexity = _perplexity(network, torch.from_numpy(data.split("evaluate").blocks))
    print(f"perplexity {perplexity:.2f} on held-out blocks, trained in {seconds:.0f} s", file=sys.stderr)
    record = {"digest": digest, "perplexity": perplexity, "seconds": round(seconds, 1), "settings": settings}

    def fill(place: Path) -> None:
        tokenizer.save_pretrained(place)
        save_model(network, str(place / "model.safetensors"))

    store(folder, record, fill)
    return record


def train_tokenizer() -> Any:
    """A byte-level BPE tokenizer with lstm.VOCABULARY entries from the whole text, as Transformers wraps it.

    Byte-level, so that no text is unknown. The trainer has no seed and breaks ties in a fixed order.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=lstm.VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row.text for row in read_rows(DATA.path, Columns())), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=END, pad_token=END
    )


def _train(blocks: Tensor) -> nn.Module:
    """The network after EPOCHS over the blocks [n, length]; each epoch deals them anew."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    # It would fill all fresh memory, as a guard against kernels that read before they write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    network = lstm.factory().train()
    steps = EPOCHS * -(-len(blocks) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
    order = np.random.default_rng(SEED)
    start = time.monotonic()
    for epoch in range(EPOCHS):
        total = 0.0
        numbers = order.permutation(len(blocks))
        for at in range(0, len(blocks), BATCH):
            batch = blocks[numbers[at : at + BATCH]]
            loss = _losses(network, batch).mean()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} in epoch {epoch}: lower LEARNING_RATE")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        seconds = time.monotonic() - start
        print(f"epoch {epoch + 1}/{EPOCHS}  loss {total / len(blocks):.3f}  {seconds:.0f} s", file=sys.stderr)
    return network.eval()


def _rate(done: float) -> float:
    """Factor on LEARNING_RATE when the share `done` of all steps is over."""
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))


def _losses(network: nn.Module, batch: Tensor) -> Tensor:
    """Negative log-likelihood in nats of every token but the first, [batch · (length - 1)]."""
    scores = network(batch[:, :-1])
    return nn.functional.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")


@torch.inference_mode()
def _perplexity(network: nn.Module, blocks: Tensor) -> float:
    losses = [_losses(network, batch) for batch in torch.split(blocks, BATCH)]
    return float(torch.cat(losses).double().mean().exp())


if __name__ == "__main__":
    main()
