"""torch.sparse: which layers sparse tensor cores can run, what is refused in words, and on a GPU the answers of the dense network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from squeeze.artifact import Artifact
from squeeze.errors import RuntimeUnavailable
from squeeze.masks import Pruned
from squeeze.model import ModelSettings
from squeeze.pruning.settings import PruneStage
from squeeze.runtimes import open_session
from squeeze.runtimes.sparse_session import sparse_layers
from squeeze.stages import apply_stage, keep_source

BATCH = {"input_ids": np.array([[5, 6, 7, 8, 9, 10, 11, 12]]), "attention_mask": np.ones((1, 8), np.int64)}
GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a GPU with sparse tensor cores",
)


def pruned(folder: Path, place: Path, pattern: str) -> Artifact:
    source = keep_source(ModelSettings(path=str(folder)), "causal-lm", place / "0-source")
    return apply_stage(PruneStage(pattern=pattern, criterion="magnitude"), source, place / "1-prune")


def test_only_linear_layers_that_fit_in_pattern_and_size_are_converted() -> None:
    network = nn.ModuleDict(
        {
            "fits": nn.Linear(128, 64), "sparser": nn.Linear(64, 32), "dense": nn.Linear(128, 64), "other": nn.Linear(128, 64),
            "narrow": nn.Linear(96, 64), "low": nn.Linear(128, 48), "table": nn.Embedding(64, 128),
        }
    )  # fmt: skip
    known = {f"{name}.weight": Pruned("2:4", 0.5, 1) for name in ("fits", "narrow", "low", "table")}
    known |= {"sparser.weight": Pruned("3:4", 0.75, 1), "other.weight": Pruned("4:8", 0.5, 1)}
    assert sparse_layers(network, known) == ["fits", "sparser"]


def test_processors_without_sparse_tensor_cores_are_refused(tiny_llama_folder: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match="CPUs have none. Use --device cuda, or runtime torch"):
        open_session(tiny_llama_folder, "torch.sparse")


@GPU
def test_on_a_gpu_the_answers_are_those_of_the_dense_kernels(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = pruned(tiny_llama_folder, tmp_path, "2:4").folder
    sparse, dense = (
        open_session(folder, name, "cuda", dtype="float16").forward(BATCH) for name in ("torch.sparse", "torch")
    )
    assert np.abs(sparse - dense).max() < 0.01 * np.abs(dense).max()


@GPU
def test_on_a_gpu_what_cannot_be_converted_is_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match="computes in 16 bits, and this is float32. Use --dtype float16"):
        open_session(pruned(tiny_llama_folder, tmp_path, "2:4").folder, "torch.sparse", "cuda")
    with pytest.raises(RuntimeUnavailable, match="no matrix with 2 zeros of every 4"):
        open_session(tmp_path / "0-source", "torch.sparse", "cuda", dtype="float16")
