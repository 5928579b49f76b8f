"""Which artifacts paths stand for, and what they are called side by side."""

from pathlib import Path
from typing import Any

import squeeze
from squeeze.dashboard.artifacts import stage_of
from squeeze.dashboard.readings import Readings
from squeeze.measuring import subjects
from squeeze.report.headline import headline
from squeeze.report.summary import ends


def test_two_runs_side_by_side_are_told_apart_by_their_folders(tiny_llama_folder: Path, tmp_path: Path) -> None:
    for name, scheme in (("eight", "int8"), ("four", "int4-weight")):
        squeeze.quantize(tiny_llama_folder, tmp_path / name, scheme=scheme)
    alone, _ = subjects([tmp_path / "four"], None)
    assert [a.name for a in alone] == ["0-source", "1-quantize"]
    both, task = subjects([tmp_path / "eight", tmp_path / "four"], None)
    assert task == "causal-lm"
    assert [a.name for a in both] == ["0-source", "eight/1-quantize", "0-source", "four/1-quantize"]
    assert both[3].digest == alone[1].digest


def test_a_report_names_what_its_exports_were_made_from(tiny_llama_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    squeeze.quantize(tiny_llama_folder, run)
    squeeze.export(run)
    brief: dict[str, Any] = {
        "repeats": 1, "most_repeats": 1, "memory": False, "quality": False, "ceilings": False, "energy": False, "seconds_per_cell": 0.05,
        "runtimes": ["onnxruntime"], "workloads": [{"kind": "fixed", "batch": 1, "sequence": 8}],
    }  # fmt: skip
    report = squeeze.bench([run], settings=brief)
    assert [m.name for m in report.manifests] == ["0-source", "1-quantize", "export-0-source", "export-1-quantize"]
    assert {m.artifact for m in report.measurements if m.values} == {"export-0-source", "export-1-quantize"}
    assert ends(report) == ("export-0-source", "export-1-quantize")
    assert stage_of(report.manifests[3], Readings("", report)) == "export of 1-quantize (quantize int8)"
    alone = squeeze.bench([run / "export-1-quantize"], settings=brief)
    assert [m.name for m in alone.manifests] == ["export-1-quantize", "0-source", "1-quantize"]
    assert headline(alone) == "export-1-quantize was measured alone: there is nothing to compare it with."
