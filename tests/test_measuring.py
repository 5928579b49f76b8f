"""Which artifacts paths stand for, and what they are called side by side."""

from pathlib import Path

import squeeze
from squeeze.measuring import subjects


def test_two_runs_side_by_side_are_told_apart_by_their_folders(tiny_llama_folder: Path, tmp_path: Path) -> None:
    for name, scheme in (("eight", "int8"), ("four", "int4-weight")):
        squeeze.quantize(tiny_llama_folder, tmp_path / name, scheme=scheme)
    alone, _ = subjects([tmp_path / "four"], None)
    assert [a.name for a in alone] == ["0-source", "1-quantize"]
    both, task = subjects([tmp_path / "eight", tmp_path / "four"], None)
    assert task == "causal-lm"
    assert [a.name for a in both] == ["0-source", "eight/1-quantize", "0-source", "four/1-quantize"]
    assert both[3].digest == alone[1].digest
