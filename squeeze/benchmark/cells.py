"""The grid: which artifact is measured in which runtime, device, type and number of threads, and on which inputs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from squeeze.artifact import Artifact, is_artifact, read_artifact
from squeeze.benchmark.child import Outcome
from squeeze.benchmark.workload import (
    AnyWorkload,
    BenchSettings,
    DatasetWorkload,
    FixedWorkload,
    GenerateWorkload,
    pack,
    prompts,
    random_tokens,
)
from squeeze.data import batches
from squeeze.errors import BenchError, SqueezeError, nearest
from squeeze.report.partners import SCORED_IN
from squeeze.report.schema import Workload
from squeeze.runtimes import (
    RUNTIMES,
    check_device,
    check_external_data,
    cores,
    default_runtimes,
    possible_runtimes,
)
from squeeze.tasks import positions

if TYPE_CHECKING:
    from squeeze.data import Data

SCORE_BATCH = {"causal-lm": 1}
SCORE_BATCH_OTHER = 50


@dataclass
class Cell:
    """One artifact in one runtime on one device with its threads and type, and what its children reported."""

    artifact: Artifact
    runtime: str
    device: str
    threads: int
    dtype: str | None
    scores: bool
    """Whether quality can be read here: an export that onnxruntime-genai times is scored in ONNX Runtime."""
    times: bool
    blocked: str = ""
    """Why nothing can be measured here; "" where something can."""
    results: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)
    """(repeat, pass, what the child said)"""
    errors: list[tuple[str, str]] = field(default_factory=list)
    """(pass, reason)"""

    def over_repeats(self, name: str) -> list[tuple[int, dict[str, Any]]]:
        """(repeat, result) of every child of one pass."""
        return [(repeat, result) for repeat, kind, result in self.results if kind == name]

    def take(self, repeat: int, name: str, outcome: Outcome) -> None:
        """Note what a child of a pass said, or why it said nothing."""
        if outcome.result is None:
            self.errors.append((name, outcome.error or "nothing was measured"))
        else:
            self.results.append((repeat, name, outcome.result))

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from other cells, for the journal."""
        return {
            "artifact": self.artifact.digest, "name": self.artifact.name, "runtime": self.runtime, "device": self.device,
            "threads": self.threads, "dtype": self.dtype,
        }  # fmt: skip

    def job(self, name: str, **more: Any) -> dict[str, Any]:
        """A job for a child."""
        return {
            "pass": name, "folder": str(self.artifact.folder.resolve()), "artifact": self.artifact.name, "runtime": self.runtime,
            "device": self.device, "threads": self.threads, "dtype": self.dtype, **more,
        }  # fmt: skip

    def can_run(self, work: "Prepared") -> bool:
        """Whether a workload fits the model's positions."""
        limit = positions(self.artifact.config)
        return limit is None or work.length <= limit


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

    @property
    def is_load(self) -> bool:
        """Whether it is a load test, which has children of its own."""
        return self.described.kind in ("closed", "open")

    @property
    def is_sought(self) -> bool:
        """Whether it is the highest rate that is asked for."""
        return self.described.kind == "open" and self.described.rate is None

    @property
    def row(self) -> dict[str, Any]:
        """As a child reads it."""
        return {"file": str(self.file), **self.settings.model_dump(mode="json"), "label": self.described.label}


def make_cells(artifacts: Sequence[Artifact], task: str, settings: BenchSettings) -> list[Cell]:
    """Every combination; what cannot run is a blocked cell with its reason. Raises the first reason where none can."""
    for name in settings.runtimes or ():
        if name not in RUNTIMES:
            raise BenchError(f"bench.runtimes: {name!r} is unknown. {nearest(name, RUNTIMES)}")
    generates = any(isinstance(w, GenerateWorkload) for w in settings.single_workloads(task))
    cells: list[Cell] = []
    first: SqueezeError | None = None
    for artifact in artifacts:
        reason: SqueezeError | None = _reason_whole(artifact)
        scored: set[tuple[str, str, str | None]] = set()
        grid = product(_runtimes(artifact, settings, generates), settings.device, _dtypes(settings), _threads(settings))
        for (runtime, scores, times), device, dtype, threads in grid:
            if not RUNTIMES[runtime].takes_dtype:
                dtype = None
            if any(cell.artifact is artifact and _like(cell) == (runtime, device, dtype, threads) for cell in cells):
                continue
            why = reason or _reason_place(runtime, device, threads)
            first = first or why
            scores = scores and settings.reads_logits and (runtime, device, dtype) not in scored
            scored.add((runtime, device, dtype))
            cells.append(Cell(artifact, runtime, device, threads, dtype, scores, times, str(why) if why else ""))
    if not cells:
        raise BenchError(f"none of the artifacts has files for {', '.join(settings.runtimes or ())}.")
    if first is not None and all(cell.blocked for cell in cells):
        raise first
    return cells


def _like(cell: Cell) -> tuple[str, str, str | None, int]:
    return cell.runtime, cell.device, cell.dtype, cell.threads


def _runtimes(artifact: Artifact, settings: BenchSettings, generates: bool) -> list[tuple[str, bool, bool]]:
    """(runtime, scores, times) of an artifact."""
    if settings.runtimes is not None:
        chosen = [r for r in settings.runtimes if r in possible_runtimes(artifact.folder)]
    else:
        chosen = list(default_runtimes(artifact.folder))[:1] if generates else [default_runtimes(artifact.folder)[-1]]
    rows = [(runtime, runtime not in SCORED_IN, True) for runtime in chosen]
    scorers = [SCORED_IN[runtime] for runtime in chosen if runtime in SCORED_IN and settings.reads_logits]
    return rows + [(scorer, True, False) for scorer in scorers if scorer not in chosen]


def _dtypes(settings: BenchSettings) -> tuple[str | None, ...]:
    return settings.dtype or (None,)


def _threads(settings: BenchSettings) -> tuple[int, ...]:
    return settings.threads or (cores(),)


def _reason_whole(artifact: Artifact) -> SqueezeError | None:
    """Why an artifact must not be measured: its files are not what its manifest says, or lie elsewhere."""
    try:
        if is_artifact(artifact.folder):
            read_artifact(artifact.folder)
        if artifact.manifest.format == "onnx":
            check_external_data(artifact.folder)
    except SqueezeError as error:
        return error
    return None


def _reason_place(runtime: str, device: str, threads: int) -> SqueezeError | None:
    if threads > cores():
        return BenchError(
            f"threads = {threads} is above the {cores()} cores of this machine; the figures would mean nothing."
        )
    try:
        if device != "cpu":
            check_device(runtime, device)
        elif runtime in ("openvino", "llama.cpp"):
            RUNTIMES[runtime].import_library()
    except SqueezeError as error:
        return error
    return None


def prepare(
    settings: BenchSettings, data: "Data | None", tokenizer: Any, task: str, source: Artifact, seed: int, folder: Path
) -> list[Prepared]:
    """Every workload with its inputs in `folder`. Raises BenchError for one that the task or the lack of data makes impossible."""
    prepared = []
    for number, work in enumerate(settings.single_workloads(task)):
        inputs = _inputs(work, f"bench.workloads[{number}]", data, tokenizer, task, source, seed)
        examples = len(data.split("evaluate")) if data is not None else 0
        prepared.append(Prepared(work, work.described(examples), save(folder / f"workload-{number}.npz", inputs)))
    return prepared


def _inputs(
    work: AnyWorkload, where: str, data: "Data | None", tokenizer: Any, task: str, source: Artifact, seed: int
) -> list[Any]:
    if isinstance(work, GenerateWorkload):
        if task != "causal-lm":
            raise BenchError(f"{where} generates, which {task} does not. Use kind fixed or dataset.")
        if data is None:
            return [random_tokens(work.batch, work.prompt, vocabulary(source, tokenizer), seed)]
        blocks = data.split("evaluate").blocks
        if blocks is None:
            raise BenchError(f"{where} generates from blocks of tokens, and the data holds none.")
        return [{"input_ids": prompts(work, blocks)}]
    if isinstance(work, FixedWorkload):
        return [random_tokens(work.batch, work.sequence, vocabulary(source, tokenizer), seed)]
    if not isinstance(work, DatasetWorkload) and work.sequence is not None:
        return [random_tokens(work.batch, work.sequence, vocabulary(source, tokenizer), seed)]
    if data is None:
        raise BenchError(
            f"{where} needs held-out texts, and no data was named. Add --data, or give it a sequence length."
        )
    order = work.order if isinstance(work, DatasetWorkload) else "shuffled"
    return batches(
        data.split("evaluate"), tokenizer, task, batch=work.batch, max_length=data.settings.max_length, order=order, seed=seed
    )  # fmt: skip


def score_batches(data: "Data", tokenizer: Any, task: str) -> list[Any]:
    """The held-out examples as quality is read from them."""
    size = SCORE_BATCH.get(task, SCORE_BATCH_OTHER)
    return batches(
        data.split("evaluate"), tokenizer, task, batch=size, max_length=data.settings.max_length, order="sorted"
    )


def vocabulary(source: Artifact, tokenizer: Any) -> int:
    """Token numbers that random inputs may use."""
    size = source.config.get("vocab_size")
    if isinstance(size, int):
        return size
    if tokenizer is None:
        raise BenchError(f"{source.folder} has neither a vocab_size nor a tokenizer: random tokens cannot be drawn.")
    return len(tokenizer)


def heaviest(prepared: Sequence[Prepared]) -> list[Prepared]:
    """The workload with the most tokens at once; real traffic only where nothing else is asked for."""
    return [max(prepared, key=lambda work: work.described.batch * work.length)] if prepared else []


def save(file: Path, content: Sequence[Any]) -> Path:
    """Batches as .npz without pickles."""
    np.savez(file, **pack(content))  # type: ignore[arg-type]
    return file
