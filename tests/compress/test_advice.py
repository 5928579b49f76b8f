"""What is known to be bad is said, with its remedy, on the machines and for the choices that it is known of, and nowhere else."""

import json
from pathlib import Path
from typing import Any

import pytest

from squeeze import api
from squeeze.cli.options import print_artifact
from squeeze.compress import advice
from squeeze.compress.advice import RULES, Machine, advise
from squeeze.compress.plan import make_plans
from squeeze.compress.quantize import QuantizeStage
from squeeze.compress.schemes import SCHEMES
from squeeze.doctor import check_instructions
from squeeze.model import Model, load_model
from squeeze.report.noise import warnings
from squeeze.report.page import render_page

CPUINFO = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu sse2 {}\n\nprocessor\t: 1\nflags\t\t: fpu\n"
HASWELL = Machine.from_cpuinfo(CPUINFO.format("sse4_2 avx avx2 fma"), "x86_64")
NEHALEM = Machine.from_cpuinfo(CPUINFO.format("sse4_2"), "x86_64")
SKYLAKE = Machine.from_cpuinfo(CPUINFO.format("sse4_2 avx2 fma avx512f avx512bw avx512vl"), "x86_64")
ALDER_LAKE = Machine.from_cpuinfo(CPUINFO.format("sse4_2 avx2 fma avx_vnni"), "x86_64")
ZEN4 = Machine.from_cpuinfo(CPUINFO.format("sse4_2 avx2 avx512f avx512_vnni"), "x86_64")
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\n"
CORTEX_A72 = Machine.from_cpuinfo(ARM.format("crc32"), "aarch64")
NEOVERSE = Machine.from_cpuinfo(ARM.format("asimddp i8mm"), "aarch64")
UNKNOWN = Machine("x86_64", frozenset())

CASES: list[tuple[Machine, str, dict[str, Any], list[str]]] = [
    (HASWELL, "bert", {"scheme": "int8"}, ["saturation"]),
    (NEHALEM, "bert", {"scheme": "int8"}, ["saturation"]),
    (SKYLAKE, "bert", {"scheme": "int8-static"}, ["saturation"]),
    (HASWELL, "bert", {"scheme": "int8", "reduce_range": True}, []),
    (HASWELL, "llama", {"scheme": "int8"}, []),
    (HASWELL, "llama", {"scheme": "int8-static", "reduce_range": True}, ["static decoder"]),
    (HASWELL, "llama", {"scheme": "int4-weight", "method": "gptq"}, ["zero points"]),
    (HASWELL, "llama", {"scheme": "int4-weight", "method": "gptq", "symmetric": True}, []),
    (SKYLAKE, "llama", {"scheme": "int4-weight", "method": "gptq"}, []),
    (ALDER_LAKE, "bert", {"scheme": "int8"}, []),
    (ALDER_LAKE, "llama", {"scheme": "int4-weight", "method": "gptq"}, []),
    (ZEN4, "bert", {"scheme": "int8"}, []),
    (UNKNOWN, "bert", {"scheme": "int8"}, []),
    (CORTEX_A72, "bert", {"scheme": "int8"}, ["no dot products"]),
    (NEOVERSE, "bert", {"scheme": "int8"}, []),
    (ZEN4, "bert", {"scheme": "int8-weight"}, ["blocks on an encoder"]),
    (ZEN4, "bert", {"scheme": "int4-weight", "method": "gptq"}, ["blocks on an encoder"]),
    (ZEN4, "bert", {"scheme": "int8", "granularity": "tensor"}, ["one scale a matrix"]),
    (ZEN4, "bert", {"scheme": "int8", "smooth_alpha": 0.5}, ["weak smoothing"]),
    (ZEN4, "bert", {"scheme": "int8", "smooth_alpha": 0.8}, []),
    (ZEN4, "bert", {"scheme": "int8", "smooth_alpha": 0.0}, []),
    (ZEN4, "bert", {"scheme": "int8-static", "calibrator": "percentile", "percentile": 99.99}, ["narrow percentile"]),
    (ZEN4, "bert", {"scheme": "int8-static", "calibrator": "percentile"}, []),
    (ZEN4, "llama", {"scheme": "int4-weight"}, ["rounded to four bits"]),
    (ZEN4, "gguf", {"scheme": "int4-weight", "method": "gptq", "block_size": 32}, ["source grid"]),
    (ZEN4, "gguf", {"scheme": "int4-weight", "method": "gptq"}, ["source grid"]),
    (ZEN4, "gguf", {"scheme": "int4-weight", "method": "gptq", "symmetric": True}, []),
    (ZEN4, "gguf", {"scheme": "int4-weight", "method": "gptq", "block_size": 128}, []),
    (ZEN4, "gguf", {"scheme": "int8", "block_size": 32}, []),
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tiny_bert_folder: Path, tiny_llama_folder: Path) -> dict[str, Model]:
    found = {
        "bert": load_model(tiny_bert_folder),
        "llama": load_model(tiny_llama_folder),
        "gguf": load_model(tiny_llama_folder),
    }
    found["gguf"].source = "somewhere/model-Q4_0.gguf"
    return found  # fmt: skip


def rules_of(machine: Machine, model: Model, settings: dict[str, Any]) -> list[str]:
    stage = QuantizeStage.model_validate(settings)
    layout = SCHEMES[stage.scheme].layout(model.task)
    told = advise(model, stage, layout, make_plans(model.network, stage, layout), machine)
    return [rule.name for rule in RULES if rule.text in told]


@pytest.mark.parametrize(("machine", "model", "settings", "expected"), CASES)
def test_a_rule_speaks_where_it_holds_and_is_silent_elsewhere(
    machine: Machine, model: str, settings: dict[str, Any], expected: list[str], models: dict[str, Model]
) -> None:
    assert rules_of(machine, models[model], settings) == expected


def test_every_rule_is_tried_above_and_names_what_it_is_known_from() -> None:
    assert {name for *_, names in CASES for name in names} == {rule.name for rule in RULES}
    assert all(rule.source and rule.remedy and rule.warning[-1] != "." for rule in RULES)


def test_a_file_of_another_grid_is_not_taken_for_q4_0() -> None:
    assert advice.is_q4_0("models/Some-Model.q4_0.gguf")
    assert not advice.is_q4_0("models/Some-Model.Q8_0.gguf")
    assert not advice.is_q4_0("asset:smollm2-135m-instruct")  # Q4_1
    assert not advice.is_q4_0("models/q4_0")


def test_zero_points_hit_q4_0s_grid_and_neither_q4_1s_nor_symmetric_blocks_do() -> None:
    """The figures in the rule, on Gaussian weights: dB won by having been on the file's grid before."""
    import torch
    from gguf import GGMLQuantizationType, quants

    from squeeze.integers import round_to_nearest, sqnr_db

    def noise(weight: torch.Tensor, block: int, symmetric: bool) -> float:
        integer = round_to_nearest(weight, block, unsigned=True, bits=4, symmetric=symmetric)
        return sqnr_db(weight, integer.dequantize()) or 0.0

    plain = torch.randn(576, 576, generator=torch.Generator().manual_seed(0))
    found = {}
    for kind in (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1):
        stored = torch.tensor(quants.dequantize(quants.quantize(plain.numpy(), kind), kind))
        for block, symmetric in ((32, False), (64, False), (32, True)):
            found[kind.name, block, symmetric] = noise(stored, block, symmetric) - noise(plain, block, symmetric)
    assert found["Q4_0", 32, False] == pytest.approx(3.6, abs=0.1)
    assert found["Q4_0", 64, False] == pytest.approx(2.3, abs=0.1)
    assert abs(found["Q4_0", 32, True]) < 0.3
    assert all(abs(won) < 0.3 for (kind, *_), won in found.items() if kind == "Q4_1")


def test_without_vnni_the_warning_stands_in_the_output_the_json_the_report_and_the_page(
    tiny_bert_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: Any,
) -> None:
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: HASWELL))
    artifact = api.quantize(tiny_bert_folder, tmp_path / "run")
    monkeypatch.undo()
    (warned,) = artifact.manifest.record.warnings
    assert "cuts off what goes beyond ±32,767" in warned
    assert "reduce_range: true" in warned
    print_artifact(artifact, json=False)
    assert "no VNNI" in " ".join(capsys.readouterr().out.split())
    print_artifact(artifact, json=True)
    assert json.loads(capsys.readouterr().out)["manifest"]["record"]["warnings"] == [warned]
    report = make.report(manifests=(artifact.manifest,))
    assert f"1-quantize: {warned}" in warnings(report)
    assert "no VNNI" in render_page(report)
    assert json.loads(report.model_dump_json())["manifests"][0]["record"]["warnings"] == [warned]


def test_the_same_integers_made_elsewhere_have_the_same_digest(
    tiny_bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for machine in (HASWELL, ZEN4):
        monkeypatch.setattr(Machine, "here", classmethod(lambda cls, machine=machine: machine))
        artifact = api.quantize(tiny_bert_folder, tmp_path / str(len(digests)))
        digests.append((artifact.digest, len(artifact.manifest.record.warnings)))
    assert digests[0][0] == digests[1][0]
    assert [count for _, count in digests] == [1, 0]


def test_the_doctor_says_the_same() -> None:
    told = check_instructions("x86_64", "Some CPU", HASWELL.flags)
    assert (told.level, "--reduce-range" in told.advice, "29853" in told.advice) == ("warn", True, True)
    assert "29853" not in check_instructions("x86_64", "Some CPU", SKYLAKE.flags).advice
    assert check_instructions("x86_64", "Some CPU", ZEN4.flags).level == "ok"
    assert check_instructions("x86_64", "Some CPU", NEHALEM.flags).value == "Some CPU: sse4_2 without VNNI"
