"""The whole benchmark on a tiny model with few texts: every quantity is there, and what fails is a row with its reason."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from squeeze.artifact import Artifact
from squeeze.benchmark.cells import Prepared, make_cells, vocabulary
from squeeze.benchmark.child import run_child
from squeeze.benchmark.journal import PREFIX, discard, open_journal
from squeeze.benchmark.rows import cell_rows
from squeeze.benchmark.runner import Measured
from squeeze.benchmark.runner import bench as whole_bench
from squeeze.benchmark.workload import BenchSettings, DatasetWorkload, FixedWorkload
from squeeze.dashboard.running import together
from squeeze.data import Data, DataSettings, load_data
from squeeze.errors import ArtifactError, BenchError, DeviceError
from squeeze.exporter import ExportSettings
from squeeze.model import ModelSettings, load_tokenizer
from squeeze.pipeline import export_artifact
from squeeze.report.schema import Measurement
from squeeze.report.status import SHOWN
from squeeze.runtimes import cores
from squeeze.stages import keep_source

SENTENCES = [
    f"The {animal} {verb} it." for animal in ("cat", "dog") for verb in ("saw", "likes it and ate", "left", "has")
]
TASK = "text-classification"


@pytest.fixture(scope="module")
def source(tiny_bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return keep_source(
        ModelSettings(path=str(tiny_bert_folder)), TASK, tmp_path_factory.mktemp("run").resolve() / "0-source"
    )


@pytest.fixture(scope="module")
def export(source: Artifact) -> Artifact:
    return export_artifact(source, source.folder.with_name("export-0-source"), ExportSettings())


@pytest.fixture(scope="module")
def broken(export: Artifact) -> Artifact:
    """A whole ONNX file that no runtime can run."""
    node = helper.make_node("Conjure", ["input_ids"], ["logits"])
    return with_graph(export, "export-broken", node, [])


@pytest.fixture(scope="module")
def successor(export: Artifact) -> Artifact:
    """A decoder whose likeliest token after n is n + 1."""
    table = np.roll(np.eye(200, dtype=np.float32), 1, axis=1)
    node = helper.make_node("Gather", ["table", "input_ids"], ["logits"])
    return with_graph(export, "export-successor", node, [numpy_helper.from_array(table, "table")])


def with_graph(export: Artifact, name: str, node: Any, tables: list[TensorProto]) -> Artifact:
    """A copy of an artifact with a graph of one node."""
    folder = export.folder.with_name(name)
    shutil.copytree(export.folder, folder, ignore=shutil.ignore_patterns("squeeze.json"))
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 200])
    graph = helper.make_graph([node], name, [ids], [logits], tables)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), folder / "model.onnx"
    )
    return Artifact(folder, export.manifest.model_copy(update={"name": name}))


@pytest.fixture(scope="module")
def tokenizer(source: Artifact) -> Any:
    return load_tokenizer(source.folder)


@pytest.fixture(scope="module")
def data(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Data:
    file = tmp_path_factory.mktemp("data") / "moods.jsonl"
    rows = [{"text": text, "mood": number % 3} for number, text in enumerate(SENTENCES)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return load_data(given_data(file, 7), TASK, tokenizer, seed=0)


def given_data(file: Path, count: int) -> DataSettings:
    return DataSettings.model_validate(
        {
            "path": str(file),
            "label_column": "mood",
            "splits": {"evaluate": count},
            "max_length": 32,
            "block_size": 8,
        }
    )


def given(**changes: Any) -> BenchSettings:
    quick = {
        "threads": 1, "repeats": 1, "most_repeats": 1, "seconds_per_cell": 1e-9, "warmup_seconds": 0,
        "ceilings": False, "energy": False, "load_repeats": 1,
    }  # fmt: skip
    return BenchSettings.model_validate(quick | changes)


def bench(*arguments: Any, **more: Any) -> list[Measurement]:
    return list(whole_bench(*arguments, **more).measurements)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bench below leaves its journal."""
    return tmp_path_factory.mktemp("journal")


@pytest.fixture(scope="module")
def measured(
    source: Artifact, export: Artifact, broken: Artifact, data: Data, tokenizer: Any, place: Path
) -> list[Measurement]:  # fmt: skip
    """Source, export and a broken export, twice over, with one workload that is too long for the model."""
    works = [
        {"kind": "fixed", "batch": 2, "sequence": 16},
        {"kind": "fixed", "batch": 1, "sequence": 65},
        {"kind": "dataset", "batch": 3},
    ]
    said: list[tuple[str, int, int]] = []
    rows = bench(
        [source, export, broken], given(repeats=2, workloads=works), data, tokenizer, TASK, 0,
        lambda text, done, total: said.append((text, done, total)), journal=place,
    )  # fmt: skip
    children = [line for line in said if line[0].startswith("bench ")]
    assert [done for _, done, _ in children] == list(range(15)), "15 children: 3 for quality, 3 × 2 passes × 2 repeats"
    assert said[-1] == ("bench", 15, 15)
    assert children[0] == ("bench export-0-source onnxruntime: quality", 0, 15), "the source's export is the reference"
    return rows


def find(rows: list[Measurement], artifact: str, quantity: str, label: str | None = None) -> Measurement:
    found = [
        row
        for row in rows
        if (row.artifact, row.quantity, row.workload.label if row.workload else None) == (artifact, quantity, label)
    ]
    assert len(found) == 1, f"{len(found)} rows of {artifact} {quantity} {label}"
    return found[0]


SIZES = [
    "peak_memory", "baseline_memory", "steady_memory", "load_time", "cold_latency", "weight_bytes", "folder_bytes", "compressed_bytes",
]  # fmt: skip
TIMES = [("latency", "2×16"), ("latency", "1×65"), ("set_time", "7 texts, batches of 3")]


def test_every_artifact_has_every_quantity_once(measured: list[Measurement]) -> None:
    listed = [(row.artifact, row.quantity, row.workload.label if row.workload else None) for row in measured]
    expected = {(name, *time) for name in ("0-source", "export-0-source", "export-broken") for time in TIMES}
    expected |= {(name, size, None) for name in ("0-source", "export-0-source", "export-broken") for size in SIZES}
    expected |= {(name, row, None) for name in ("0-source", "export-0-source") for row in ("correct", "answer")}
    expected |= {("0-source", row, None) for row in ("same_answer", "logit_error", "kl_to_source")}
    expected |= {("export-broken", "quality", None)}
    expected -= {("export-broken", "load_time", None), ("export-broken", "cold_latency", None)}
    assert set(listed) == expected
    assert len(listed) == len(expected)


def test_every_row_says_which_artifact_runtime_device_and_threads(
    measured: list[Measurement], source: Artifact, export: Artifact, broken: Artifact
) -> None:
    runtimes = {"0-source": "torch", "export-0-source": "onnxruntime", "export-broken": "onnxruntime"}
    digests = {artifact.name: artifact.digest for artifact in (source, export, broken)}
    assert len(set(digests.values())) == 3
    for row in measured:
        assert row.artifact_digest == digests[row.artifact]
        assert (row.runtime, row.device, row.threads) == (runtimes[row.artifact], "cpu", 1)


@pytest.mark.parametrize("name", ["0-source", "export-0-source"])
def test_values_pair_up_by_their_repeat(measured: list[Measurement], name: str) -> None:
    latency = find(measured, name, "latency", "2×16")
    assert latency.repeat == (0,) * 5 + (1,) * 5
    assert (len(latency.values), len(latency.warmups)) == (10, 4)
    for quantity, label in (
        ("set_time", "7 texts, batches of 3"),
        ("peak_memory", None),
        ("baseline_memory", None),
        ("load_time", None),
    ):
        row = find(measured, name, quantity, label)
        assert (row.repeat, len(row.values)) == ((0, 1), 2)
        assert all(value > 0 for value in row.values)


@pytest.mark.parametrize("name", ["0-source", "export-0-source"])
def test_each_childs_peak_is_at_least_its_baseline(measured: list[Measurement], name: str) -> None:
    peak, baseline = (find(measured, name, quantity) for quantity in ("peak_memory", "baseline_memory"))
    assert all(high >= low > 0 for high, low in zip(peak.values, baseline.values, strict=True))


def test_sizes_are_those_of_the_manifest(measured: list[Measurement], export: Artifact) -> None:
    graph = float(export.manifest.files["model.onnx"].bytes)
    assert find(measured, export.name, "weight_bytes").values == (graph,)
    assert find(measured, export.name, "folder_bytes").values == (
        float(sum((export.folder / name).stat().st_size for name in export.manifest.files)),
    )


def test_the_source_and_its_export_answer_alike_example_by_example(measured: list[Measurement], data: Data) -> None:
    before, after = (find(measured, name, "answer").values for name in ("0-source", "export-0-source"))
    assert before == after
    assert len(before) == 7
    labels = data.split("evaluate").labels
    assert labels is not None
    correct = tuple(float(a == b) for a, b in zip(before, labels, strict=True))
    assert find(measured, "0-source", "correct").values == correct
    assert find(measured, "0-source", "same_answer").values == (1,) * 7
    (error,) = find(measured, "0-source", "logit_error").values
    assert 0 <= error < 1e-5


@pytest.mark.parametrize("name", ["0-source", "export-0-source", "export-broken"])
def test_a_workload_longer_than_the_model_is_a_row_with_the_reason(measured: list[Measurement], name: str) -> None:
    row = find(measured, name, "latency", "1×65")
    assert (row.values, row.error) == ((), "1×65 is longer than the model's 64 positions")


@pytest.mark.parametrize(
    ("quantity", "label"), [("latency", "2×16"), ("set_time", "7 texts, batches of 3"), ("peak_memory", None)]
)
def test_a_model_that_cannot_be_opened_is_a_row_with_the_childs_last_words(
    measured: list[Measurement], quantity: str, label: str | None
) -> None:
    row = find(measured, "export-broken", quantity, label)
    assert row.values == ()
    assert row.error is not None
    assert row.error.startswith("exit code 1: ")
    assert "Conjure" in row.error
    quality = find(measured, "export-broken", "quality")
    assert quality.error is not None
    assert "Conjure" in quality.error


def test_where_no_workload_fits_quality_alone_is_measured(export: Artifact, data: Data, tokenizer: Any) -> None:
    works = [{"kind": "fixed", "batch": 1, "sequence": 65}]
    rows = bench([export], given(workloads=works), data, tokenizer, TASK, 0)
    assert find(rows, export.name, "latency", "1×65").error == "1×65 is longer than the model's 64 positions"
    assert not [row for row in rows if row.quantity == "peak_memory"]
    assert len(find(rows, export.name, "correct").values) == 7


def test_a_decoder_is_timed_as_it_generates_and_scored_by_its_blocks(
    successor: Artifact, tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "prose.txt"
    file.write_text("\n".join(SENTENCES), "utf-8")
    blocks = load_data(given_data(file, 3), "causal-lm", tokenizer, seed=0)
    works = [
        {"kind": "generate", "prompt": 5, "new_tokens": 3},
        {"kind": "generate", "prompt": 60, "new_tokens": 5, "batch": 2},
    ]
    rows = bench([successor], given(repeats=2, workloads=works), blocks, tokenizer, "causal-lm", 0)
    for quantity, unit in (("time_to_first_token", "s"), ("time_per_output_token", "s"), ("decode_rate", "tokens/s")):
        row = find(rows, successor.name, quantity, "5+3 tokens")
        assert (row.unit, row.repeat, len(row.values)) == (unit, (0, 0, 0, 1, 1, 1), 6)
        long = find(rows, successor.name, quantity, "2×(60+5 tokens)")
        assert (long.unit, long.error) == (unit, "2×(60+5 tokens) is longer than the model's 64 positions")
    scored = find(rows, successor.name, "negative_log_likelihood")
    assert (len(scored.values), scored.weights) == (3, (7, 7, 7))
    costs = np.log(np.e + 199) - np.array([0, 1])  # of a token that the table does not expect, and of one that it does
    assert all(7 * costs[1] - 1e-6 <= value <= 7 * costs[0] + 1e-6 for value in scored.values)


# What stops a benchmark before anything is measured


def test_more_threads_than_cores_are_refused(source: Artifact, data: Data, tokenizer: Any) -> None:
    threads = cores() + 1
    with pytest.raises(BenchError) as caught:
        bench([source], given(threads=threads), data, tokenizer, TASK, 0)
    assert str(caught.value) == (
        f"threads = {threads} is above the {cores()} cores of this machine; the figures would mean nothing."
    )


def test_a_classifier_that_is_asked_to_generate_is_refused(source: Artifact, data: Data, tokenizer: Any) -> None:
    works = [{"kind": "dataset"}, {"kind": "generate"}]
    with pytest.raises(BenchError) as caught:
        bench([source], given(workloads=works), data, tokenizer, TASK, 0)
    assert str(caught.value) == (
        "bench.workloads[1] generates, which text-classification does not. Use kind fixed or dataset."
    )


def test_a_device_that_is_not_there_is_refused(export: Artifact, data: Data, tokenizer: Any) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("the installed ONNX Runtime has CUDA")
    with pytest.raises(DeviceError, match="onnxruntime-gpu"):
        bench([export], given(device="cuda"), data, tokenizer, TASK, 0)


def test_weights_outside_an_exports_folder_are_refused(export: Artifact, data: Data, tokenizer: Any) -> None:
    table = numpy_helper.from_array(np.zeros((200, 200), np.float32), "table")
    node = helper.make_node("Gather", ["table", "input_ids"], ["logits"])
    escaping = with_graph(export, "export-escaping", node, [table])
    graph = onnx.load(escaping.folder / "model.onnx")
    tensor = graph.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../export-0-source/model.onnx")
    (escaping.folder / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(ArtifactError, match="outside its folder"):
        bench([escaping], given(), data, tokenizer, TASK, 0)


def test_random_tokens_need_a_vocabulary(source: Artifact, tokenizer: Any, tmp_path: Path) -> None:
    assert vocabulary(source, None) == 200
    bare = Artifact(tmp_path, source.manifest)
    assert vocabulary(bare, tokenizer) == len(tokenizer)
    with pytest.raises(BenchError) as caught:
        vocabulary(bare, None)
    assert str(caught.value) == (f"{tmp_path} has neither a vocab_size nor a tokenizer: random tokens cannot be drawn.")


# Cells and their order


def cells_of(folder: Path, source: Artifact, task: str, **settings: Any) -> list[tuple[str, bool, bool]]:
    cells = make_cells([Artifact(folder, source.manifest)], task, given(**settings))
    return [(cell.runtime, cell.scores, cell.times) for cell in cells]


def test_a_decoder_is_timed_in_onnxruntime_genai_and_scored_in_onnxruntime(source: Artifact, tmp_path: Path) -> None:
    for name in ("genai_config.json", "model.onnx"):
        (tmp_path / name).touch()
    split = [("onnxruntime-genai", False, True), ("onnxruntime", True, False)]
    assert cells_of(tmp_path, source, "causal-lm") == split
    fixed = [{"kind": "fixed", "batch": 1, "sequence": 8}]
    assert cells_of(tmp_path, source, "causal-lm", workloads=fixed) == [("onnxruntime", True, True)]


def test_runtimes_threads_and_types_are_a_grid_of_what_each_artifact_can_have(
    source: Artifact, export: Artifact
) -> None:
    settings = given(runtimes=["torch", "onnxruntime"], threads=[1, cores()], dtype=["float32", "bfloat16"])
    cells = make_cells([source, export], TASK, settings)
    found = [(cell.artifact.name, cell.runtime, cell.threads, cell.dtype) for cell in cells]
    threads = sorted({1, cores()})
    assert found == [
        *(("0-source", "torch", n, dtype) for dtype in ("float32", "bfloat16") for n in threads),
        *(("export-0-source", "onnxruntime", n, None) for n in threads),
    ], "an ONNX file holds its types, so that it is there once"
    assert [cell.scores for cell in cells].count(True) == 3, "quality does not depend on threads"


def test_a_cell_that_cannot_run_is_a_row_and_the_others_are_measured(
    export: Artifact, data: Data, tokenizer: Any
) -> None:
    works = [{"kind": "fixed", "batch": 1, "sequence": 8}]
    rows = bench([export], given(threads=[cores() + 1, 1], workloads=works, quality=False), data, tokenizer, TASK, 0)
    by_threads = {row.threads: row for row in rows if row.quantity == "latency"}
    assert by_threads[cores() + 1].error is not None
    assert "above the" in by_threads[cores() + 1].error
    assert len(by_threads[1].values) == 5


def test_an_artifact_that_changed_is_a_row_and_the_others_are_measured(
    source: Artifact, export: Artifact, tmp_path: Path, data: Data, tokenizer: Any
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(export.folder, changed)
    with (changed / "model.onnx").open("ab") as file:
        file.write(b"x")
    works = [{"kind": "fixed", "batch": 1, "sequence": 8}]
    renamed = Artifact(changed, export.manifest.model_copy(update={"name": "changed"}))
    rows = bench([export, renamed], given(workloads=works), data, tokenizer, TASK, 0)
    assert find(rows, export.name, "latency", "1×8").values
    error = find(rows, "changed", "latency", "1×8").error
    assert error is not None
    assert "changed after it was written" in error
    assert find(rows, "changed", "quality").error == error


def test_an_unknown_runtime_is_answered_with_the_nearest(export: Artifact) -> None:
    with pytest.raises(BenchError, match=r"'onnx-runtime' is unknown\. Did you mean 'onnxruntime'"):
        make_cells([export], TASK, given(runtimes="onnx-runtime"))
    with pytest.raises(BenchError, match=r"none of the artifacts has files for llama\.cpp\."):
        make_cells([export], TASK, given(runtimes="llama.cpp"))


# Order, repeats and resuming

FAST = [{"kind": "fixed", "batch": 1, "sequence": 8}, {"kind": "fixed", "batch": 1, "sequence": 16}]


def run_of(export: Artifact, **more: Any) -> Measured:
    """Two cells of one artifact, timed alone."""
    settings = {"workloads": FAST, "quality": False, "memory": False, "threads": [1]} | more.pop("settings", {})
    other = Artifact(export.folder, export.manifest.model_copy(update={"name": "the same again"}))
    return whole_bench([export, other], given(**settings), None, None, TASK, more.pop("seed", 0), **more)


def test_within_each_repeat_every_cell_runs_once_and_the_order_changes_with_the_seed(export: Artifact) -> None:
    settings = {"repeats": 5, "most_repeats": 5}
    orders = []
    for seed in (0, 1):
        children = run_of(export, settings=settings, seed=seed).children
        assert [child.repeat for child in children] == sorted(2 * list(range(5)))
        pairs = [tuple(child.artifact for child in children[start : start + 2]) for start in range(0, 10, 2)]
        assert all(sorted(pair) == ["export-0-source", "the same again"] for pair in pairs)
        orders.append(pairs)
    assert len(set(orders[0])) == 2
    assert orders[0] != orders[1]


def test_every_child_is_on_record_with_its_time_and_how_quiet_the_machine_was(export: Artifact) -> None:
    children = run_of(export).children
    assert [child.purpose for child in children] == ["latency", "latency"]
    for child in children:
        assert child.cpu_seconds > 0
        assert child.seconds > 0
        assert child.others is not None
        assert 0 <= child.others <= 1
    assert children[1].started >= children[0].started + children[0].seconds - 1e-3, (
        "one after the other, never together"
    )


def test_repeats_are_added_until_they_are_narrow_or_the_time_is_spent(export: Artifact) -> None:
    wide = run_of(export, settings={"repeats": 3, "most_repeats": 6, "precision": 1e-9, "budget_seconds": 1000})
    assert max(child.repeat for child in wide.children) == 5
    assert any("1×8: the repeats did not bring every interval within" in note for note in wide.notes)
    spent = run_of(export, settings={"repeats": 3, "most_repeats": 6, "precision": 1e-9, "budget_seconds": 0})
    assert max(child.repeat for child in spent.children) == 2
    narrow = run_of(export, settings={"repeats": 3, "most_repeats": 6, "precision": 0.999, "budget_seconds": 1000})
    assert max(child.repeat for child in narrow.children) < 5


class Interrupted(Exception):
    pass


def test_an_interrupted_bench_goes_on_and_measures_nothing_twice(export: Artifact, tmp_path: Path) -> None:
    settings = {"repeats": 4, "most_repeats": 4}

    def stop(_: str, done: int, __: int) -> None:
        if done == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_of(export, settings=settings, journal=tmp_path, progress=stop)
    resumed = run_of(export, settings=settings, journal=tmp_path)
    assert [child.resumed for child in resumed.children] == [True] * 5 + [False] * 3
    assert any(note.startswith("resumed: 5 of 8 child processes") for note in resumed.notes)
    again = run_of(export, settings=settings, journal=tmp_path)
    assert again.measurements == resumed.measurements, "all was taken over"
    assert [child.resumed for child in again.children] == [True] * 8
    other = run_of(export, settings=settings, journal=tmp_path, seed=1)
    assert not any(child.resumed for child in other.children), "another request has a journal of its own"
    discard(again.journal)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(PREFIX)] == [other.journal.name]


def test_what_a_watcher_is_shown_adds_up_to_what_the_bench_returns(measured: list[Measurement], place: Path) -> None:
    files = sorted(place.glob(f"{PREFIX}*/*{SHOWN}"), key=lambda path: path.stat().st_mtime_ns)
    rows = [Measurement.model_validate(row) for file in files for row in json.loads(file.read_bytes())]
    shown = {(m.artifact, m.runtime, m.quantity, m.workload): m for m in together(rows)}
    # Compressed sizes are computed at the start and told at the end.
    wanted = {(m.artifact, m.runtime, m.quantity, m.workload): m for m in measured if m.quantity != "compressed_bytes"}
    assert shown == wanted


def test_a_bench_that_cannot_be_resumed_leaves_nothing_to_watch(measured: list[Measurement], tmp_path: Path) -> None:
    for place, left in ((None, 0), (tmp_path, 1)):
        with open_journal(place, "sha256:" + "0" * 64) as journal:
            journal.show({"a": 1}, measured[:1])
            assert len(list(journal.folder.glob(f"*{SHOWN}"))) == left


def test_memory_is_measured_on_the_workload_with_the_most_tokens_at_once(export: Artifact) -> None:
    measured = run_of(export, settings={"memory": True})
    assert {row.quantity for row in measured.measurements} >= {"peak_memory", "steady_memory", "baseline_memory"}
    assert [child.purpose for child in measured.children] == ["memory"] * 2 + ["latency"] * 2


def test_a_planted_slow_down_slows_all_but_the_first(export: Artifact) -> None:
    rows = run_of(
        export, settings={"repeats": 3, "most_repeats": 3, "seconds_per_cell": 0.02}, planted=2.0
    ).measurements
    plain, slow = (
        np.median(find(list(rows), name, "latency", "1×16").values) for name in (export.name, "the same again")
    )
    assert slow > 2 * plain


# Load, profile and cost


def test_load_tests_keep_every_request_and_the_rate(export: Artifact, data: Data, tokenizer: Any) -> None:
    works = [
        {"kind": "closed", "callers": 2, "sequence": 8, "seconds": 0.2},
        {"kind": "open", "rate": 400, "seconds": 0.2},
        {"kind": "open", "limit_ms": 1000, "sequence": 8, "seconds": 0.1},
        {"kind": "open", "limit_ms": 1e-6, "sequence": 16, "seconds": 0.1},
    ]
    rows = bench([export], given(workloads=works, quality=False), data, tokenizer, TASK, 0)
    closed = find(rows, export.name, "request_latency", "2 callers, 1×8")
    (rate,) = find(rows, export.name, "throughput", "2 callers, 1×8").values
    assert rate == pytest.approx(len(closed.values) / 0.2, rel=0.2)
    assert len(find(rows, export.name, "request_latency", "400/s arriving, real texts").values) == 300
    sought = find(rows, export.name, "highest_rate", "p99 within 1000 ms, 1×8")
    assert sought.values[0] > 0
    assert "99th percentiles of the trials" in sought.note
    assert find(rows, export.name, "highest_rate", "p99 within 1e-06 ms, 1×16").values == (0,)
    impossible = find(rows, export.name, "request_latency", "p99 within 1e-06 ms, 1×16")
    assert impossible.error == "no rate that was tried kept the 99th percentile within the limit"


def test_a_profile_tells_operators_and_layers_and_no_more_time_than_the_call_took(export: Artifact) -> None:
    measured = run_of(export, settings={"profile": True})
    profiles = [profile for profile in measured.profiles if profile.artifact == export.name]
    assert [profile.workload.label for profile in profiles] == ["1×8", "1×16"]
    for profile in profiles:
        assert {"MatMul", "Attention"} & {row.operator for row in profile.rows}
        assert any("layer.0" in row.layer for row in profile.rows)
        assert 0 < sum(row.seconds for row in profile.rows) < 1.5 * profile.seconds


def test_tasks_of_the_harness_need_no_data_and_a_missing_package_is_a_row_with_its_install_line(
    export: Artifact,
) -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("lm-evaluation-harness is installed")
    measured = run_of(export, settings={"lm_eval": ["any"]})
    rows = [row for row in measured.measurements if row.quantity == "lm-eval"]
    assert len(rows) == 2
    assert all(row.error is not None and "pip install 'squeeze[lm-eval]'" in row.error for row in rows)
    assert not [row for row in measured.measurements if row.quantity == "quality"], "no quality was asked for"


def test_energy_is_a_row_of_each_workload_that_it_was_read_for(export: Artifact, tmp_path: Path) -> None:
    (cell,) = make_cells([export], TASK, given())
    works = [
        Prepared(settings, settings.described(7), tmp_path)
        for settings in (FixedWorkload(batch=1, sequence=8), DatasetWorkload())
    ]
    cell.results.append((0, "energy", {"joules": {"1×8": 2.5}}))
    rows = [row for row in cell_rows(cell, works) if row.quantity == "energy"]
    assert [(row.workload and row.workload.label, row.values, row.repeat) for row in rows] == [("1×8", (2.5,), (0,))]


def test_without_data_texts_cannot_be_measured_and_the_error_says_what_to_add(export: Artifact) -> None:
    with pytest.raises(BenchError, match="needs held-out texts, and no data was named"):
        run_of(export, settings={"workloads": [{"kind": "dataset"}]})


# Children


def job_for(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "pass": "memory", "folder": str(folder), "artifact": "nowhere", "runtime": "torch", "device": "cpu", "threads": 1,
        "dtype": None, **more,
    }  # fmt: skip


def test_a_child_that_crashes_says_its_exit_code_and_last_words(tmp_path: Path) -> None:
    outcome = run_child(job_for(tmp_path / "nowhere"), tmp_path / "job.json")
    assert outcome.result is None
    assert outcome.error is not None
    assert outcome.error.startswith("exit code 1: ")
    assert str(tmp_path / "nowhere") in outcome.error
    assert outcome.run.error == outcome.error
    assert not (tmp_path / "job.result").exists()


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGKILL, "killed by SIGKILL (out of memory?)"), (signal.SIGTERM, "killed by SIGTERM")],
)
def test_a_child_that_is_killed_says_by_what(number: signal.Signals, words: str, tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    killer = threading.Thread(target=kill_when_started, args=(file, number))
    killer.start()
    outcome = run_child(job_for(tmp_path / "nowhere"), file)
    killer.join()
    assert outcome.error == words


def kill_when_started(file: Path, number: signal.Signals) -> None:
    """Send a signal to this process's child that was given the job `file`."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for child in psutil.Process().children():
            if str(file) in child.cmdline():
                os.kill(child.pid, number)
                return
        time.sleep(0.005)
