"""A network of a few hundred weights with dropout and two losses; as a script, trainings of it that are killed at random moments."""

import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from squeeze.training import Examples, Objective, Training, fit

VOCABULARY, WIDTH, CLASSES = 30, 8, 3


class Toy(Objective):
    """Mean of embeddings -> tanh -> classes; cross entropy over texts, and a loss over tokens that pulls embeddings to 1."""

    metric, better = "accuracy", "higher"

    def __init__(self, dropout: float = 0.0, tell: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.network = nn.ModuleDict(
                {
                    "table": nn.Embedding(VOCABULARY, WIDTH),
                    "inner": nn.Linear(WIDTH, WIDTH),
                    "norm": nn.LayerNorm(WIDTH),
                    "dropout": nn.Dropout(dropout),
                    "head": nn.Linear(WIDTH, CLASSES),
                }
            )
            self.side = nn.Linear(WIDTH, 2, bias=False)
        self.tell = tell

    def forward(self, batch: Mapping[str, Tensor], judge: bool = False) -> dict[str, Tensor]:
        parts: Any = self.network
        mask = batch["attention_mask"].unsqueeze(-1).float()
        found = parts["table"](batch["input_ids"])
        mean = (found * mask).sum(1) / mask.sum(1)
        inner = parts["dropout"](parts["norm"](torch.tanh(parts["inner"](mean))))
        scores = parts["head"](inner)
        if judge:
            return {
                "value": (scores.argmax(-1) == batch["labels"]).sum(),
                "count": torch.tensor(len(batch["labels"])),
            }
        if self.tell is not None and torch.is_grad_enabled():
            os.write(self.tell, b"." * 4096)
        return {
            "ce": functional.cross_entropy(scores.float(), batch["labels"]),
            "side": 0.1 * (self.side(inner).float() - 1).square().mean(),
        }

    def write(self, folder: Path) -> bool:
        from safetensors.torch import save_file

        save_file(
            {name: tensor.contiguous() for name, tensor in self.network.state_dict().items()},
            folder / "toy.safetensors",
        )
        return True


def toy_examples(count: int = 60, seed: int = 0) -> Examples:
    """Random token sequences whose class is written into their first token."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 12, count)
    tokens = random.integers(CLASSES, VOCABULARY, int(lengths.sum())).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    labels = random.integers(0, CLASSES, count)
    tokens[starts[:-1]] = labels
    return Examples(tokens, starts, None, labels.astype(np.int64), 0)


def digest(module: nn.Module) -> str:
    """Over every weight's bits."""
    from squeeze.provenance import digest_bytes

    return digest_bytes(b"".join(t.detach().contiguous().numpy().tobytes() for t in module.state_dict().values()))


def train_toy(settings: dict[str, Any], workspace: Path | None, tell: int | None = None) -> dict[str, Any]:
    """What a training of it comes to: weights and curve, seconds left out."""
    toy = Toy(dropout=0.3, tell=tell)
    found = fit(toy, toy_examples(60), toy_examples(20, 1), Training(**settings), workspace=workspace, key="toy")
    curve = found.curve.model_dump(mode="json", exclude={"seconds", "epoch_seconds"})
    return {"weights": digest(toy), "curve": curve, "notes": found.notes}


def lives(settings: dict[str, Any], seed: int, place: Path) -> dict[str, Any]:
    """Train in a process of its own, undisturbed (seed 0) or killed with SIGKILL three times and more at random moments."""
    dice, kills = random.Random(seed), 0
    while True:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            result = train_toy(settings, place / "workspace", write)
            (place / "result.json").write_text(json.dumps(result))
            os._exit(0)
        os.close(write)
        budget = dice.randrange(1, 25) if seed and kills < 5 else None  # steps that this life gets
        while data := os.read(read, 4096):  # the pipe is small: a child is at most a few steps ahead of its reader
            if budget is not None:
                budget -= data.count(b".") / 4096
                if budget <= 0:
                    signal.sigtimedwait([], dice.random() * 0.01)
                    os.kill(child, signal.SIGKILL)
        os.close(read)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            continue
        assert status == 0, status
        return json.loads((place / "result.json").read_text()) | {"kills": kills}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    train_toy({"steps": 1, "device": "cpu"}, None)  # what is imported on the way is imported once, before the forks
    out = {}
    for number in asked["seeds"]:
        with tempfile.TemporaryDirectory(dir=asked["folder"]) as folder:
            out[number] = lives(asked["settings"], number, Path(folder))
    print(json.dumps(out))
