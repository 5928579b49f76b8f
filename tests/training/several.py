"""What tests/training/test_processes.py starts twice, as rank 0 and as rank 1: jobs that both train, one after another.

    several.py FOLDER '[{"name": "ddp", "sharding": "none", …}, …]'

The main process writes FOLDER/NAME.json (curve, notes) and FOLDER/NAME.safetensors (the weights that came out).
"""

import atexit
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from squeeze.errors import TrainError
from squeeze.masks import kept_zero
from squeeze.training import Examples, Objective, Training, fit, processes

VOCABULARY, WIDTH = 50, 16


class Layer(nn.Module):
    """A feed-forward layer with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, states: torch.Tensor, drop: float) -> torch.Tensor:
        """Residual around two products."""
        inner = functional.dropout(functional.gelu(self.wide(states)), drop, self.training)
        return states + self.narrow(inner)


class Tied(nn.Module):
    """Predicts the next token; the head is the embeddings' matrix; one layer is never used, as BERT's pooler."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.pooler = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, ids: torch.Tensor, drop: float) -> torch.Tensor:
        """Logits [b, n, VOCABULARY]."""
        states = self.embedding(ids)
        for layer in self.layers:
            states = layer(states, drop)
        logits: torch.Tensor = self.head(states) * self.scale
        return logits


class Next(Objective):
    """Cross entropy of the next token, weighted by tokens: batches in parts must be weighted to give the same gradient."""

    def __init__(self, drop: float, before: Callable[[int], None], parts: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.network, self.drop = Tied(), drop
        self.before, self.parts, self.seen = before, parts, 0

    def forward(self, batch: Any, judge: bool = False) -> dict[str, torch.Tensor]:
        """See Objective."""
        mask = batch["attention_mask"].bool()[:, 1:]
        logits = self.network(batch["input_ids"], self.drop)[:, :-1][mask]
        loss = functional.cross_entropy(logits, batch["input_ids"][:, 1:][mask], reduction="sum" if judge else "mean")
        return {"value": loss, "count": mask.sum()} if judge else {"next": loss}

    def units(self, batch: Any) -> float:
        """Tokens that are predicted. The engine asks once for each part of a batch, before it computes any."""
        if self.seen % self.parts == 0:
            self.before(self.seen // self.parts + 1)
        self.seen += 1
        return float(batch["attention_mask"][:, 1:].sum())


def examples(count: int, seed: int) -> Examples:
    """Sequences of 3 to 12 tokens that mostly count upward."""
    random = np.random.default_rng(seed)
    rows = [(random.integers(VOCABULARY) + np.arange(n)) % (VOCABULARY - 1) + 1 for n in random.integers(3, 13, count)]
    starts = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
    return Examples(np.concatenate(rows).astype(np.int32), starts, None, None, 0)


def masks() -> dict[str, torch.Tensor]:
    """Half of the weights of the tied table and of the layers stay; rows do not divide evenly among processes."""
    generator = torch.Generator().manual_seed(4)
    shapes = {
        "embedding.weight": (VOCABULARY, WIDTH),
        "layers.0.wide.weight": (32, WIDTH),
        "layers.1.narrow.weight": (WIDTH, 32),
    }
    return {name: torch.rand(shape, generator=generator) > 0.5 for name, shape in shapes.items()}


def train(job: Any, folder: Path) -> None:
    """One job; `masked`: pruned; `kill`: step before which this process is gone; `fail`: rank that breaks at step 3;
    `all fail`: both do."""
    settings = Training(
        steps=10, batch=12, accumulation=2, learning_rate=0.01, precision="float32", device=job.get("device", "cpu"), validations=5,
        checkpoint_minutes=1e-9 if job.get("kill") or job.get("checkpoints") else 60, sharding=job.get("sharding", "none"),
    )  # fmt: skip

    def before(step: int) -> None:
        if step == job.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 3 and job.get("fail") == (0 if processes.is_main() else 1):
            raise TrainError("this one broke")
        if step == 3 and job.get("all fail"):
            raise TrainError("both broke")

    objective = Next(job.get("drop", 0.0), before, settings.accumulation)
    with kept_zero(objective.network, masks() if job.get("masked") else {}) as objective.kept:
        found = fit(objective, examples(100, 0), examples(31, 1), settings, workspace=folder / job["workspace"], key="k")  # fmt: skip
    if processes.is_main():
        network = objective.network
        save_file({n: p.detach().clone() for n, p in network.named_parameters()}, folder / f"{job['name']}.safetensors")
        curve = found.curve
        told = {
            "loss": curve.loss, "values": [v.value for v in curve.validations], "kept": curve.kept, "processes": curve.processes,
            "notes": found.notes, "tied": network.head.weight is network.embedding.weight, "kind": type(network.layers[0]).__name__,
            "launcher": sorted(n for n in os.environ if n in processes.LAUNCHER),
        }  # fmt: skip
        (folder / f"{job['name']}.json").write_text(json.dumps(told))


def main() -> int:
    """As `squeeze` itself does it."""
    folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    if any("fail" in words for job in jobs for words in job):
        # As gloo's threads may do once the interpreter goes down: after an error it must not come to that.
        atexit.register(os.abort)
    if not processes.join():
        return processes.follow(lambda job: train(job, folder))
    code = 1
    try:
        for job in jobs:
            with processes.together(job):
                train(job, folder)
        code = 0
    except TrainError as error:
        sys.stderr.write(f"{error}\n")
        code = error.exit_code
    finally:
        processes.dismiss(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
