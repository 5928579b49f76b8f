"""What crosses a file: digests of manifests, alignment of measurements, reading and writing of reports."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from squeeze.errors import ReportError
from squeeze.provenance import digest_bytes, environment
from squeeze.report.schema import (
    ArtifactChecks,
    Check,
    FileEntry,
    LayerRow,
    Manifest,
    Measurement,
    Report,
    StageRecord,
    Workload,
    read_report,
    write_report,
)

DIGEST = digest_bytes(b"anything")


def manifest(**changes: Any) -> Manifest:
    record = StageRecord(
        kind="quantize", settings={"scheme": "int8"}, seconds=1.5, notes=(),
        layers=(LayerRow(name="a.weight", shape=(2, 4), bits=8.25, sparsity=0.0, sqnr_db=41.5),),
    )  # fmt: skip
    fields: dict[str, Any] = {
        "name": "1-quantize", "format": "torch", "task": "causal-lm", "source": "models/x", "parent": DIGEST, "record": record,
        "files": {"integers.safetensors": FileEntry(sha256=DIGEST, bytes=8)}, "data": {"evaluate": DIGEST}, "parameters": 8,
        "nonzero_parameters": 8, "weight_bytes": 8, "inputs": DIGEST, "environment": environment(),
        "created": "2026-11-24T00:00:00+00:00", "extra": {"activations": "float"},
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


def measurement(**changes: Any) -> Measurement:
    fields: dict[str, Any] = {
        "quantity": "latency", "unit": "s", "values": (0.1, 0.2), "workload": Workload(kind="fixed", batch=1, sequence=128),
        "artifact": "1-quantize", "artifact_digest": DIGEST, "runtime": "onnxruntime", "device": "cpu", "threads": 2, "repeat": (0, 1),
    }  # fmt: skip
    return Measurement(**{**fields, **changes})


def report(**changes: Any) -> Report:
    check = Check(name="outputs", value=math.inf, limit=1e-3, passed=False, detail="NaN in the outputs")
    fields: dict[str, Any] = {
        "title": "a <b> title", "recipe": {"seed": 0}, "manifests": (manifest(),), "measurements": (measurement(),),
        "checks": (ArtifactChecks(artifact="1-quantize", checks=(check,)),), "environment": environment(),
        "started": "2026-11-24T00:00:00+00:00", "seconds": 3.5, "notes": ("a note",), "status": "failed", "error": "why",
    }  # fmt: skip
    return Report(**{**fields, **changes})


def test_the_digest_ignores_when_where_and_how_fast_an_artifact_was_made() -> None:
    one = manifest()
    record = one.record.model_copy(update={"seconds": 99.0}) if one.record else None
    elsewhere = one.environment.model_copy(update={"cpu": "another", "cores": 64, "git": "abc"})
    assert manifest(created="2030-01-01T00:00:00+00:00", environment=elsewhere, record=record).digest == one.digest


@pytest.mark.parametrize(
    "change",
    [
        {"name": "2-quantize"},
        {"task": "feature-extraction"},
        {"source": "models/y"},
        {"parent": None},
        {"record": None},
        {"files": {"integers.safetensors": FileEntry(sha256=digest_bytes(b"other"), bytes=8)}},
        {"data": {}},
        {"inputs": digest_bytes(b"other")},
        {"extra": {}},
    ],
)
def test_the_digest_sees_everything_else(change: dict[str, Any]) -> None:
    assert manifest(**change).digest != manifest().digest


def test_the_digest_is_the_same_after_a_manifest_went_through_a_file() -> None:
    assert Manifest.model_validate_json(manifest().model_dump_json()).digest == manifest().digest


def test_a_field_at_its_default_does_not_count_so_that_later_schemas_keep_old_digests() -> None:
    noted = LayerRow(name="a.weight", shape=(2, 4), bits=8.25, sparsity=0.0, sqnr_db=41.5, note="")
    record = manifest().record
    assert record is not None
    assert manifest(record=record.model_copy(update={"layers": (noted,)})).digest == manifest().digest
    assert manifest(schema_version=0).digest == manifest().digest


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../b", "a\\b", "a//b", "./a", "a\0b"])
def test_a_manifest_cannot_name_a_file_outside_its_folder(name: str) -> None:
    with pytest.raises(ValidationError, match="not a plain path inside the folder"):
        manifest(files={name: FileEntry(sha256=DIGEST, bytes=1)})


@pytest.mark.parametrize(
    ("workload", "label"),
    [
        (Workload(kind="fixed", batch=1, sequence=128), "1×128"),
        (Workload(kind="dataset", batch=50, examples=3000, order="sorted"), "3000 texts, batches of 50"),
        (Workload(kind="generate", batch=1, prompt=128, new_tokens=64), "128+64 tokens"),
        (Workload(kind="generate", batch=4, prompt=128, new_tokens=64), "4×(128+64 tokens)"),
    ],
)
def test_a_workload_has_a_short_label(workload: Workload, label: str) -> None:
    assert workload.label == label


@pytest.mark.parametrize(("kind", "lacks"), [("fixed", "sequence"), ("dataset", "examples"), ("generate", "prompt")])
def test_a_workload_without_its_sizes_is_refused(kind: Any, lacks: str) -> None:
    with pytest.raises(ValidationError, match=f"a workload of kind '{kind}' needs {lacks}"):
        Workload(kind=kind, batch=1)


@pytest.mark.parametrize("changes", [{"weights": (1.0,)}, {"repeat": (0, 1, 2)}])
def test_a_column_that_does_not_pair_with_the_values_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="latency has 2 values but"):
        measurement(**changes)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_never_measured_values(value: float) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        measurement(values=(0.1, value))


def test_no_values_need_a_reason() -> None:
    with pytest.raises(ValidationError, match="neither values nor the error"):
        measurement(values=(), repeat=())
    assert measurement(values=(), repeat=(), error="killed by SIGKILL").error == "killed by SIGKILL"


def test_a_report_reads_back_as_it_was_written(tmp_path: Path) -> None:
    write_report(report(), tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == report()
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_the_file_is_json_that_any_parser_reads_even_where_a_check_is_infinite(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    write_report(report(), tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text("utf-8"), parse_constant=refuse)
    assert content["checks"][0]["checks"][0]["value"] == "Infinity"


def test_a_report_with_a_failed_check_has_not_passed() -> None:
    assert not report().checks[0].passed
    assert ArtifactChecks(artifact="x", checks=()).passed


def test_a_missing_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"report\.json cannot be read: No such file"):
        read_report(tmp_path / "report.json")


@pytest.mark.parametrize("keep", [0, 1, 100, -2])
def test_a_torn_report_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "torn.json"
    path.write_text(report().model_dump_json()[:keep], "utf-8")
    with pytest.raises(ReportError, match=r"torn\.json is not whole JSON"):
        read_report(path)


@pytest.mark.parametrize(
    "text", ["[]", "3", "{}", '{"schema_version": 1}', '{"schema_version": "1", "measurements": []}']
)
def test_foreign_json_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "foreign.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ReportError, match=r"foreign\.json is JSON but not a squeeze report"):
        read_report(path)


def test_deeply_nested_json_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 200_000, "utf-8")
    with pytest.raises(ReportError, match=r"deep\.json is not whole JSON"):
        read_report(path)


def test_a_newer_schema_asks_for_an_upgrade(tmp_path: Path) -> None:
    path = tmp_path / "new.json"
    path.write_text(json.dumps({**json.loads(report().model_dump_json()), "schema_version": 99, "new": 1}), "utf-8")
    with pytest.raises(ReportError, match=r"new\.json has schema 99, newer than 2\. Upgrade"):
        read_report(path)


def test_a_wrong_field_is_named_with_its_place(tmp_path: Path) -> None:
    content = json.loads(report().model_dump_json())
    content["measurements"][0]["threads"] = "many"
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(ReportError, match=r"wrong\.json is not a squeeze report of schema 2: measurements\.0\.threads"):
        read_report(path)


def test_a_report_that_cannot_be_written_leaves_the_old_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    write_report(report(title="old"), path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ReportError, match=r"report\.json cannot be written: No space left on device"):
        write_report(report(title="new"), path)
    assert read_report(path).title == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_report_in_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"nowhere/report\.json cannot be written: No such file"):
        write_report(report(), tmp_path / "nowhere" / "report.json")
