"""Fine-tune MiniLM into the three-class sentiment classifier that recipes/sentiment-int8.yaml compresses.

    python benchmarks/finetune_sentiment.py

No small classifier with a free licence comes as a plain package, so the recipe's source model is made here:
all-MiniLM-L6-v2 with a fresh head, one epoch over every tweet that the recipe neither scores nor calibrates with. The
splits come from `squeeze.data.load_data` with the recipe's own settings, so a tweet that its table scores was never
trained on.

The result is an ordinary Transformers folder under benchmarks/cache, which git ignores. A second call finds it,
compares the digest of everything that determined it and returns at once. The last line on stdout is one JSON object.

Rejected: `transformers.Trainer`. Its defaults change between releases, and a short plain loop says all there is: AdamW,
linear warm-up and decay (Devlin et al. 2018, arXiv:1810.04805, appendix A.2), batches of tweets of like length.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from pydantic import JsonValue

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, when run as a file

from benchmarks.store import CACHE, store, stored
from squeeze.data import Data, DataSettings, Split, Splits, batches, load_data
from squeeze.provenance import digest_file, digest_json, environment
from squeeze.rows import asset_path

SOURCE = "asset:minilm-l6-v2"
DATA = DataSettings(path="asset:tweets", splits=Splits(evaluate=3000, calibration=300, train="rest"), seed=0)
"""The `data` section of recipes/sentiment-int8.yaml; that they are equal is what keeps the held-out tweets held out."""

EPOCHS = 1
BATCH = 32
LEARNING_RATE = 1e-4
HEAD_LEARNING_RATE = 1e-3
"""The head starts from random numbers and has one epoch to get somewhere; the encoder only has to shift."""
WARM_UP = 0.1
"""Share of the steps over which the learning rate rises from 0; it then falls linearly to 0."""
WEIGHT_DECAY = 0.01
POOL = 50
"""Batches whose tweets are sorted by length together: little padding, and still a fresh mixture every step."""
EVERY = 100
"""Steps between two lines of progress."""


def main() -> None:
    """Parse the command line, fine-tune unless the same model is already there, print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=CACHE / "sentiment-minilm", help="model folder (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of head, order and dropout, not of the splits")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="train again even if the same model is already there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    record = finetune(arguments.out, arguments.seed, fresh=arguments.fresh)
    print(json.dumps({"folder": str(arguments.out), **record}))


def finetune(folder: Path, seed: int, *, fresh: bool = False) -> dict[str, Any]:
    """Train, score on the held-out tweets, and put the model into `folder`; returns its record.

    With one seed, one machine and one number of threads the weights are the same every time.
    """
    source = asset_path(SOURCE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    data = load_data(DATA, "text-classification", tokenizer, seed)
    # bfloat16 pays only where the CPU multiplies it in tiles: without AMX it is slower than float32.
    dtype = torch.bfloat16 if "amx_bf16" in environment().cpu_flags else torch.float32
    settings: dict[str, JsonValue] = {
        "source": digest_file(source / "model.safetensors"),
        "data": {**data.digests},
        "labels": {**(data.labels or {})},
        "seed": seed,
        "epochs": EPOCHS,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "head_learning_rate": HEAD_LEARNING_RATE,
        "warm_up": WARM_UP,
        "weight_decay": WEIGHT_DECAY,
        "pool": POOL,
        "dtype": str(dtype),
        "threads": torch.get_num_threads(),
    }
    digest = digest_json(settings)
    if not fresh and (found := stored(folder, digest)):
        print(f"{folder} already holds this model; --fresh trains it again", file=sys.stderr)
        return found
    start = time.monotonic()
    network = _train(source, tokenizer, data, seed, dtype)
    seconds = time.monotonic() - start
    correct = _correct(network, tokenizer, data)
    accuracy = float(correct.mean())
    print(f"accuracy {accuracy:.2%} on {len(correct)} held-out tweets, trained in {seconds:.0f} s", file=sys.stderr)
    record = {"digest": digest, "accuracy": accuracy, "seconds": round(seconds, 1), "settings": settings}

    def fill(place: Path) -> None:
        network.config._name_or_path = ""
        network.save_pretrained(place)
        tokenizer.save_pretrained(place)

    store(folder, record, fill)
    return record


def _train(source: Path, tokenizer: Any, data: Data, seed: int, dtype: torch.dtype) -> Any:
    """The encoder of `source` with a fresh head, after EPOCHS over the train split."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory guards against kernels that read it; here it would only take a fifth of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    labels = data.labels or {}
    network = transformers.AutoModelForSequenceClassification.from_pretrained(
        source, dtype=torch.float32, label2id=labels, id2label={number: name for name, number in labels.items()}
    ).train()
    split = data.split("train")
    steps = EPOCHS * -(-len(split) // BATCH)
    optimizer = torch.optim.AdamW(_parameter_groups(network), weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    order = np.random.default_rng(seed)
    start, losses = time.monotonic(), [0.0]
    for step, (texts, classes) in enumerate((b for _ in range(EPOCHS) for b in _shuffled(split, order)), start=1):
        inputs = tokenizer(
            texts, padding=True, truncation=True, max_length=data.settings.max_length, return_tensors="pt"
        )
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = network(**inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(classes))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step} of {steps}: lower LEARNING_RATE")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses = [*losses[1 - EVERY :], loss.item()]
        if step % EVERY == 0 or step == steps:
            seconds = time.monotonic() - start
            left = seconds / step * (steps - step)
            print(
                f"step {step}/{steps}  loss {np.mean(losses):.3f}  {seconds:.0f} s, {left:.0f} s left", file=sys.stderr
            )
    return network.eval()


def _rate(step: int, steps: int) -> float:
    """Factor on the learning rates after `step` of all `steps`."""
    return min((step + 1) / (WARM_UP * steps), (steps - step) / ((1 - WARM_UP) * steps))


def _parameter_groups(network: torch.nn.Module) -> list[dict[str, Any]]:
    head = [weight for name, weight in network.named_parameters() if name.startswith("classifier.")]
    trunk = [weight for name, weight in network.named_parameters() if not name.startswith("classifier.")]
    return [{"params": trunk, "lr": LEARNING_RATE}, {"params": head, "lr": HEAD_LEARNING_RATE}]


def _shuffled(split: Split, order: np.random.Generator) -> Iterator[tuple[list[str], list[int]]]:
    """Batches of (texts, classes) in random order, each of tweets of like length."""
    texts, labels = split.texts or (), split.labels or ()
    numbers = order.permutation(len(texts))
    groups: list[list[int]] = []
    for at in range(0, len(numbers), BATCH * POOL):
        pool = sorted(numbers[at : at + BATCH * POOL], key=lambda n: len(texts[n]))
        groups += [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
    for group in order.permutation(len(groups)):
        yield [texts[n] for n in groups[group]], [labels[n] for n in groups[group]]


@torch.inference_mode()
def _correct(network: Any, tokenizer: Any, data: Data) -> NDArray[np.bool_]:
    """For each held-out tweet whether the answer, computed in float32, is the label."""
    split = data.split("evaluate")
    answers = np.empty(len(split), np.int64)
    for batch in batches(split, tokenizer, data.task, batch=50, max_length=data.settings.max_length):
        index = batch.pop("index")
        inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
        answers[index] = network(**inputs).logits.argmax(1).numpy()
    correct: NDArray[np.bool_] = answers == np.array(split.labels)
    return correct


if __name__ == "__main__":
    main()
