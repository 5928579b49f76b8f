"""The parent: decides the cells and their order, starts one child after another, and waits without touching a core.

A cell is one artifact in one runtime. Within each repeat the cells run in a fresh seeded order, so that a slow minute of the
machine falls on all of them alike, and repeats pair up. A child that fails or is killed becomes a row with its reason, and
the others are measured. Rejected: several sessions in one process (their thread pools spin on each other's cores), and a
parent that polls (it takes the core that is being timed).
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from squeeze.artifact import Artifact
from squeeze.benchmark.workload import (
    DEFAULTS,
    AnyWorkload,
    BenchSettings,
    FixedWorkload,
    GenerateWorkload,
    fixed_inputs,
    pack,
    prompts,
)
from squeeze.data import batches
from squeeze.errors import BenchError
from squeeze.evaluate import Outputs, quality
from squeeze.report.schema import Measurement, Workload
from squeeze.runtimes import check_device, check_external_data, cores, default_runtimes
from squeeze.tasks import positions

if TYPE_CHECKING:
    from squeeze.data import Data

Progress = Callable[[str, int, int], None]
SCORE_BATCH = {"causal-lm": 1}
SCORE_BATCH_OTHER = 50


@dataclass
class Cell:
    """One artifact in one runtime, and what its children reported."""

    artifact: Artifact
    runtime: str
    scores: bool
    """Whether quality is read here: an export that onnxruntime-genai times is scored in ONNX Runtime."""
    times: bool
    results: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)
    errors: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Prepared:
    """A workload with its inputs on disk."""

    settings: AnyWorkload
    described: Workload
    file: Path

    @property
    def length(self) -> int:
        """Tokens of one text at the end of a call; 0 for real traffic, whose texts have lengths of their own."""
        described = self.described
        return (described.sequence or 0) + (described.prompt or 0) + (described.new_tokens or 0)


def bench(
    artifacts: Sequence[Artifact], settings: BenchSettings, data: "Data", tokenizer: Any, task: str, seed: int,
    progress: Progress | None = None,
) -> list[Measurement]:  # fmt: skip
    """Measure every artifact in its best runtime: latency, memory, size and quality, with all raw values.

    Raises BenchError or DeviceError before anything is measured where no cell could be; a single cell's failure is a row.
    """
    say = progress or (lambda description, done, total: None)
    threads = settings.threads or cores()
    if threads > cores():
        raise BenchError(
            f"threads = {threads} is above the {cores()} cores of this machine; the figures would mean nothing."
        )
    cells = _cells(artifacts, task, settings)
    for cell in cells:
        check_device(cell.runtime, settings.device)
        if cell.artifact.manifest.format == "onnx":
            check_external_data(cell.artifact.folder)
    with tempfile.TemporaryDirectory(prefix="squeeze-bench-") as name:
        folder = Path(name)
        prepared = _prepare(settings, data, tokenizer, task, artifacts[0], seed, folder)
        scored = _save(folder / "evaluate.npz", _batches(data, tokenizer, task))
        jobs = list(_jobs(cells, prepared, scored, settings, task, threads, seed, folder))
        for number, (cell, repeat, job) in enumerate(jobs):
            say(f"bench {cell.artifact.name} {cell.runtime}: {job['pass']}", number, len(jobs))
            outcome = run_child(job, folder / f"job-{number}.json")
            if isinstance(outcome, str):
                cell.errors.append((job["pass"], outcome))
            else:
                cell.results.append((repeat, job["pass"], outcome))
        say("bench", len(jobs), len(jobs))
        return _measurements(cells, prepared, settings, data, task, threads, folder)


def _cells(artifacts: Sequence[Artifact], task: str, settings: BenchSettings) -> list[Cell]:
    cells: list[Cell] = []
    generates = any(isinstance(w, GenerateWorkload) for w in settings.workloads or DEFAULTS[task])
    for artifact in artifacts:
        runtimes = default_runtimes(artifact.folder)
        if not generates:
            runtimes = tuple(r for r in runtimes if r != "onnxruntime-genai")
        best, last = runtimes[0], runtimes[-1]
        cells.append(Cell(artifact, best, scores=best == last, times=True))
        if best != last:
            cells.append(Cell(artifact, last, scores=True, times=False))
    return cells


def _prepare(
    settings: BenchSettings, data: "Data", tokenizer: Any, task: str, source: Artifact, seed: int, folder: Path
) -> list[Prepared]:
    split = data.split("evaluate")
    prepared = []
    for number, work in enumerate(settings.workloads or DEFAULTS[task]):
        if isinstance(work, GenerateWorkload):
            if task != "causal-lm" or split.blocks is None:
                raise BenchError(
                    f"bench.workloads[{number}] generates, which {task} does not. Use kind fixed or dataset."
                )
            inputs = [{"input_ids": prompts(work, split.blocks)}]
        elif isinstance(work, FixedWorkload):
            inputs = [fixed_inputs(work, vocabulary(source, tokenizer), seed)]
        else:
            inputs = batches(
                split, tokenizer, task, batch=work.batch, max_length=data.settings.max_length, order=work.order
            )
        prepared.append(Prepared(work, work.described(len(split)), _save(folder / f"workload-{number}.npz", inputs)))
    return prepared


def vocabulary(source: Artifact, tokenizer: Any) -> int:
    """Token numbers that random inputs may use."""
    size = source.config.get("vocab_size")
    if isinstance(size, int):
        return size
    if tokenizer is None:
        raise BenchError(f"{source.folder} has neither a vocab_size nor a tokenizer: random tokens cannot be drawn.")
    return len(tokenizer)


def _batches(data: "Data", tokenizer: Any, task: str) -> list[Any]:
    size = SCORE_BATCH.get(task, SCORE_BATCH_OTHER)
    return batches(
        data.split("evaluate"), tokenizer, task, batch=size, max_length=data.settings.max_length, order="sorted"
    )


def _save(file: Path, content: Sequence[Any]) -> Path:
    np.savez(file, **pack(content))  # type: ignore[arg-type]
    return file


def _jobs(
    cells: Sequence[Cell],
    prepared: Sequence[Prepared],
    scored: Path,
    settings: BenchSettings,
    task: str,
    threads: int,
    seed: int,
    folder: Path,
) -> Iterator[tuple[Cell, int, dict[str, Any]]]:
    """Quality once for each scoring cell; then repeats of latency and memory, cells and workloads in a new order each time."""
    rng = np.random.default_rng(seed)
    for number, cell in enumerate(cells):
        if cell.scores:
            outputs = folder / f"outputs-{number}.npz"
            yield (
                cell,
                0,
                _job(cell, settings, threads, "quality", task=task, batches=str(scored), outputs=str(outputs)),
            )
    timed = [cell for cell in cells if cell.times]
    for repeat in range(settings.repeats):
        for name in ("latency", "memory"):
            for index in rng.permutation(len(timed)):
                fitting = [w for w in prepared if _fits(w, timed[index].artifact)]
                works = [fitting[i] for i in rng.permutation(len(fitting))] if name == "latency" else _heaviest(fitting)
                if not works:
                    continue
                rows = [_row(w) for w in works]
                yield (
                    timed[index],
                    repeat,
                    _job(timed[index], settings, threads, name, workloads=rows, seconds=settings.seconds_per_cell),
                )


def _job(cell: Cell, settings: BenchSettings, threads: int, name: str, **more: Any) -> dict[str, Any]:
    return {
        "pass": name, "folder": str(cell.artifact.folder.resolve()), "runtime": cell.runtime, "device": settings.device,
        "threads": threads, **more,
    }  # fmt: skip


def _row(work: Prepared) -> dict[str, Any]:
    return {"file": str(work.file), **work.settings.model_dump(mode="json"), "label": work.described.label}


def _heaviest(prepared: Sequence[Prepared]) -> list[Prepared]:
    """The workload with the most tokens at once; real traffic only where nothing else is asked for."""

    return [max(prepared, key=lambda work: work.described.batch * work.length)] if prepared else []


def _fits(work: Prepared, artifact: Artifact) -> bool:
    limit = positions(artifact.config)
    return limit is None or work.length <= limit


def run_child(job: dict[str, Any], file: Path) -> dict[str, Any] | str:
    """Run one job in a child of its own and wait; its result, or in words why there is none."""
    result = file.with_suffix(".result")
    file.write_text(json.dumps(job | {"result": str(result)}), "utf-8")
    log = file.with_suffix(".log")
    quiet = {"OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "squeeze.benchmark.worker", str(file)], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env=os.environ | quiet, start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait()
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
    if code == 0 and result.exists():
        return json.loads(result.read_text("utf-8"))  # type: ignore[no-any-return]
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = log.read_text("utf-8", "replace").strip().splitlines()
    return f"exit code {code}: {lines[-1] if lines else 'no message'}"


def _measurements(
    cells: Sequence[Cell],
    prepared: Sequence[Prepared],
    settings: BenchSettings,
    data: "Data",
    task: str,
    threads: int,
    folder: Path,
) -> list[Measurement]:
    rows: list[Measurement] = []
    outputs = {
        n: Outputs.load(folder / f"outputs-{n}.npz", task)
        for n in range(len(cells))
        if (folder / f"outputs-{n}.npz").exists()
    }
    reference = _reference(cells, outputs)
    for number, cell in enumerate(cells):
        row = _Rows(cell, settings.device, threads)
        if cell.scores:
            labels = data.split("evaluate").labels
            if number in outputs:
                for q in quality(outputs[number], labels, None if number == reference else outputs.get(reference)):
                    rows.append(row.made(q.quantity, q.unit, q.values, weights=q.weights))
            else:
                rows.append(row.failed("quality", "", None, "quality"))
        if cell.times:
            for work in prepared:
                rows += _timings(row, work)
            rows += _sizes(row)
    return rows


def _reference(cells: Sequence[Cell], outputs: dict[int, Outputs]) -> int:
    """The cell that others are compared with: the source's export in ONNX Runtime, else the source itself."""
    scored = [n for n in range(len(cells)) if n in outputs]
    exported = [n for n in scored if cells[n].artifact.name == "export-0-source"]
    return (exported or scored or [-1])[0]


class _Rows:
    """Makes the measurements of one cell."""

    def __init__(self, cell: Cell, device: str, threads: int) -> None:
        self.cell, self.device, self.threads = cell, device, threads

    def made(
        self, quantity: str, unit: str, values: Sequence[float], workload: Workload | None = None, **more: Any
    ) -> Measurement:
        """A measurement with its values."""
        return Measurement(
            quantity=quantity, unit=unit, values=tuple(values), workload=workload, artifact=self.cell.artifact.name,
            artifact_digest=self.cell.artifact.digest, runtime=self.cell.runtime, device=self.device, threads=self.threads, **more,
        )  # fmt: skip

    def failed(self, quantity: str, unit: str, workload: Workload | None, name: str) -> Measurement:
        """A measurement that there is none of, and why."""
        reasons = [reason for kind, reason in self.cell.errors if kind == name] or ["nothing was measured"]
        return self.made(quantity, unit, (), workload, error=reasons[0])

    def over_repeats(self, name: str) -> list[tuple[int, dict[str, Any]]]:
        """(repeat, result) of every child of one pass."""
        return [(repeat, result) for repeat, kind, result in self.cell.results if kind == name]


QUANTITIES = {
    "fixed": (("latency", "s"),),
    "dataset": (("set_time", "s"),),
    "generate": (("time_to_first_token", "s"), ("decode_rate", "tokens/s")),
}


def _timings(row: _Rows, work: Prepared) -> list[Measurement]:
    kind, described = work.described.kind, work.described
    if not _fits(work, row.cell.artifact):
        reason = f"{described.label} is longer than the model's {positions(row.cell.artifact.config)} positions"
        return [row.made(quantity, unit, (), described, error=reason) for quantity, unit in QUANTITIES[kind]]
    found: list[tuple[int, dict[str, Any]]] = [
        (repeat, timed)
        for repeat, result in row.over_repeats("latency")
        for timed in result["workloads"]
        if timed["label"] == described.label
    ]
    if not found:
        return [row.failed(quantity, unit, described, "latency") for quantity, unit in QUANTITIES[kind]]
    if kind == "generate":
        repeats = tuple(repeat for repeat, timed in found for _ in timed["rate"])
        first, rates = [[value for _, timed in found for value in timed[key]] for key in ("first_token", "rate")]
        return [
            row.made("time_to_first_token", "s", first, described, repeat=repeats),
            row.made("decode_rate", "tokens/s", rates, described, repeat=repeats),
        ]
    values = [(repeat, value) for repeat, timed in found for value in timed["values"]]
    warm = tuple(value for _, timed in found for value in timed["warmups"])
    quantity, unit = QUANTITIES[kind][0]
    return [
        row.made(quantity, unit, [v for _, v in values], described, repeat=tuple(r for r, _ in values), warmups=warm)
    ]


def _sizes(row: _Rows) -> list[Measurement]:
    rows: list[Measurement] = []
    memory, latency = row.over_repeats("memory"), row.over_repeats("latency")
    for quantity in ("peak_memory", "baseline_memory"):
        if memory:
            repeats = tuple(repeat for repeat, _ in memory)
            rows.append(row.made(quantity, "bytes", [float(result[quantity]) for _, result in memory], repeat=repeats))
        else:
            rows.append(row.failed(quantity, "bytes", None, "memory"))
    if latency:
        rows.append(
            row.made(
                "load_time", "s", [result["load_time"] for _, result in latency], repeat=tuple(r for r, _ in latency)
            )
        )
    manifest = row.cell.artifact.manifest
    rows.append(row.made("weight_bytes", "bytes", [float(manifest.weight_bytes)]))
    rows.append(row.made("folder_bytes", "bytes", [float(sum(entry.bytes for entry in manifest.files.values()))]))
    return rows
