"""The parent: decides the cells and their order, starts one child after another, and waits without touching a core.

A cell is one artifact in one runtime. Within each repeat the cells run in a fresh seeded order, so that a slow minute of the
machine falls on all of them alike, and repeats pair up. Repeats are added until every comparison is as narrow as asked for or the
time is spent; the rule looks at widths and never at which side is ahead, so that looking often does not favour a claim (Chow and
Robbins 1965). A child that fails or is killed becomes a row with its reason, and the others are measured. Rejected: several
sessions in one process (their thread pools spin on each other's cores), and a parent that polls (it takes the core that is timed).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from squeeze.artifact import Artifact
from squeeze.benchmark import ceilings as machine
from squeeze.benchmark.cells import Cell, Prepared, heaviest, make_cells, prepare, save, score_batches
from squeeze.benchmark.child import run_child
from squeeze.benchmark.compressed import compressed_bytes
from squeeze.benchmark.cost import cost
from squeeze.benchmark.energy import EnergyMeter
from squeeze.benchmark.journal import Journal, open_journal
from squeeze.benchmark.rows import cell_rows, child_rows, made, quality_rows, too_long
from squeeze.benchmark.workload import BenchSettings
from squeeze.evaluate import Outputs
from squeeze.provenance import Digest, digest_json, environment
from squeeze.report import stats
from squeeze.report.schema import Ceilings, ChildRun, Cost, Measurement, Profile, ProfileRow
from squeeze.runtimes import cores

if TYPE_CHECKING:
    from squeeze.data import Data

Progress = Callable[[str, int, int], None]
MEMORY_REPEATS, ENERGY_REPEATS = 3, 3
"""A peak hardly varies between processes; three say whether it does here."""
FAILURES = 2
"""Children of one pass that may fail before the cell is left alone."""


@dataclass(frozen=True)
class Measured:
    """All that a bench adds to a report."""

    measurements: tuple[Measurement, ...]
    children: tuple[ChildRun, ...]
    ceilings: Ceilings | None
    costs: tuple[Cost, ...]
    profiles: tuple[Profile, ...]
    notes: tuple[str, ...]
    journal: Path
    """Of no more use once the report is written: `journal.discard`."""


def bench(
    artifacts: Sequence[Artifact], settings: BenchSettings, data: "Data | None", tokenizer: Any, task: str, seed: int,
    progress: Progress | None = None, *, journal: Path | None = None, planted: float = 0.0,
) -> Measured:  # fmt: skip
    """Measure every artifact in its best runtime, or in every one asked for: latency, load, memory, size and quality, raw.

    `journal`: folder in which an interrupted bench leaves what it has, for the same call to go on. `planted`: share of its time
    that every session but the first sleeps, to see whether it is found.

    Raises BenchError or DeviceError before anything is measured where no cell could be; a single cell's failure is a row.
    """
    say = progress or (lambda description, done, total: None)
    cells = make_cells(artifacts, task, settings)
    with open_journal(journal, _request(cells, settings, data, task, seed, planted)) as kept:
        return _Bench(cells, settings, data, tokenizer, task, seed, say, kept, planted).run()


def _request(
    cells: Sequence[Cell], settings: BenchSettings, data: "Data | None", task: str, seed: int, planted: float
) -> Digest:
    """Digest of all that decides what is measured and on what: only a bench of the same may be resumed."""
    here = environment().model_dump(mode="json", exclude={"git"})
    return digest_json(
        {
            "cells": [cell.key for cell in cells], "settings": settings.model_dump(mode="json"), "task": task, "seed": seed,
            "data": dict(data.digests) if data else {}, "environment": here, "planted": planted,
        }
    )  # fmt: skip


class _Bench:
    """One bench: what is fixed while it runs, and what it has found so far."""

    def __init__(
        self, cells: list[Cell], settings: BenchSettings, data: "Data | None", tokenizer: Any, task: str, seed: int, say: Progress,
        journal: Journal, planted: float,
    ) -> None:  # fmt: skip
        self.cells, self.settings, self.data, self.tokenizer = cells, settings, data, tokenizer
        self.task, self.seed, self.say, self.journal, self.planted = task, seed, say, journal, planted
        self.folder, self.began = journal.folder, time.monotonic()
        self.prepared = prepare(settings, data, tokenizer, task, cells[0].artifact, seed, self.folder)
        self.children: list[ChildRun] = []
        self.notes: list[str] = []
        self.scored: dict[int, list[Measurement]] = {}
        """Number of a cell -> its quality."""
        self.is_scored = data is not None and settings.quality
        self.expected = self._expected()

    def run(self) -> Measured:
        ceilings = self._ceilings() if self.settings.ceilings else None
        compressed = self._compressed() if self.settings.memory else {}
        self._show_impossible()
        self._quality()
        self._harness()
        self._memory()
        self._energy()
        self._times()
        self._loads()
        profiles = self._profiles() if self.settings.profile else ()
        self.say("bench", len(self.children), len(self.children))
        rows: list[Measurement] = []
        for number, cell in enumerate(self.cells):
            unscored = quality_rows(cell, None, None, None) if self.is_scored else []
            quality = self.scored.get(number, unscored)
            rows += [*quality, *cell_rows(cell, self.prepared)]
            if cell.times and cell.artifact.digest in compressed:
                rows.append(made(cell, "compressed_bytes", "bytes", [compressed.pop(cell.artifact.digest)]))
        if self.journal.reused:
            self.notes.append(
                f"resumed: {self.journal.reused} of {len(self.children)} child processes ({self.journal.earlier_seconds:.0f} s) were "
                "measured before an interruption and were not measured again."
            )
        costs = {cell.artifact.digest: cost(cell.artifact) for cell in self.cells}
        return Measured(
            tuple(rows), tuple(self.children), ceilings, tuple(costs.values()), profiles, tuple(self.notes), self.folder
        )

    def _expected(self) -> int:
        """Children at least; repeats may be added."""
        live = [cell for cell in self.cells if not cell.blocked]
        timed = sum(cell.times for cell in live)
        loads = sum(work.is_load for work in self.prepared)
        repeats = self.settings.repeats + min(MEMORY_REPEATS, self.settings.repeats)
        return sum(cell.scores for cell in live if self.is_scored) + timed * (
            repeats + loads * self.settings.load_repeats
        )

    def _child(self, cell: Cell, name: str, repeat: int, **more: Any) -> dict[str, Any] | None:
        """Run one child, or take over what it said before an interruption."""
        key = {
            **cell.key,
            "pass": name,
            "repeat": repeat,
            "labels": [work["label"] for work in more.get("workloads", ())],
        }
        self.say(
            f"bench {cell.artifact.name} {cell.runtime}: {name}",
            len(self.children),
            max(self.expected, len(self.children) + 1),
        )
        outcome = self.journal.found(key)
        if outcome is None:
            job = cell.job(name, seed=self.seed + repeat, planted=self._planted(cell), **more)
            outcome = run_child(job, self.folder / "job.json", repeat=repeat, began=self.began)
            self.journal.keep(key, outcome)
        self.children.append(outcome.run)
        cell.take(repeat, name, outcome)
        self.journal.show(key, child_rows(cell, self.prepared, repeat, name, outcome))
        return outcome.result

    def _show_impossible(self) -> None:
        """What cannot be measured is known before anything is."""
        for cell in self.cells:
            quality = quality_rows(cell, None, None, None) if self.is_scored else []
            rows = [*quality, *cell_rows(cell, self.prepared)] if cell.blocked else too_long(cell, self.prepared)
            self.journal.show(cell.key, rows)

    def _planted(self, cell: Cell) -> float:
        return 0.0 if cell is self.cells[0] else self.planted

    def _live(self, name: str) -> list[Cell]:
        """The timed cells that can still be measured in this pass."""
        return [
            cell
            for cell in self.cells
            if cell.times and not cell.blocked and sum(kind == name for kind, _ in cell.errors) < FAILURES
        ]

    def _order(self, count: int, *what: int) -> list[int]:
        """A fresh order for each pass and repeat; the same at every start of the same bench."""
        return [int(i) for i in np.random.default_rng((self.seed, *what)).permutation(count)]

    # Passes.

    def _quality(self) -> None:
        if self.data is None or not self.is_scored:
            return
        labels = self.data.split("evaluate").labels
        scored = save(self.folder / "evaluate.npz", score_batches(self.data, self.tokenizer, self.task))
        outputs: dict[int, Outputs] = {}
        reference = self._reference()
        source = self.folder / "reference.npy"
        for number in sorted(range(len(self.cells)), key=lambda n: n != reference):
            cell, file = self.cells[number], self.folder / f"outputs-{number}.npz"
            if not cell.scores or cell.blocked:
                continue
            has_source = self.task == "causal-lm" and (number == reference or source.exists())
            self._child(
                cell, "quality", 0, task=self.task, batches=str(scored), outputs=str(file),
                reference=str(source) if has_source else None, is_reference=number == reference,
            )  # fmt: skip
            if file.exists():
                outputs[number] = Outputs.load(file, self.task)
            against = None if number == reference else outputs.get(reference)
            self.scored[number] = quality_rows(cell, outputs.get(number), against, labels)
            self.journal.show({**cell.key, "scored": True}, self.scored[number])

    def _reference(self) -> int:
        """The cell that others are compared with: the source's export in ONNX Runtime, else the first that is scored."""
        scored = [n for n, cell in enumerate(self.cells) if cell.scores and not cell.blocked]
        exported = [n for n in scored if self.cells[n].artifact.manifest.name == "export-0-source"]
        return (exported or scored or [-1])[0]

    def _harness(self) -> None:
        if not self.settings.lm_eval:
            return
        length = self.data.settings.max_length if self.data is not None else 2048
        for cell in self.cells:
            if cell.scores and not cell.blocked:
                self._child(
                    cell, "lm_eval", 0, tasks=list(self.settings.lm_eval), limit=self.settings.lm_eval_limit, max_length=length,
                    tokenizer=str(self.cells[0].artifact.folder.resolve()),
                )  # fmt: skip

    def _memory(self) -> None:
        for repeat in range(min(MEMORY_REPEATS, self.settings.repeats) if self.settings.memory else 0):
            live = self._live("memory")
            for index in self._order(len(live), 1, repeat):
                works = heaviest([w for w in self.prepared if not w.is_load and live[index].can_run(w)])
                if works:
                    self._child(live[index], "memory", repeat, workloads=[w.row for w in works])

    def _energy(self) -> None:
        if not self.settings.energy:
            return
        meters: dict[str, EnergyMeter] = {device: EnergyMeter(device) for device in self.settings.device}
        for device, meter in meters.items():
            if not meter.sources:
                self.notes.append(f"energy on {device} was not measured: {meter.absent}.")
        for repeat in range(min(ENERGY_REPEATS, self.settings.repeats)):
            live = [cell for cell in self._live("energy") if meters[cell.device].sources]
            for index in self._order(len(live), 2, repeat):
                works = [
                    w
                    for w in self.prepared
                    if not w.is_load and w.described.kind != "dataset" and live[index].can_run(w)
                ]
                if works:
                    self._child(live[index], "energy", repeat, workloads=[w.row for w in works])

    def _times(self) -> None:
        """Repeats of latency: the least number always, then as long as something is wide and time is left."""
        works = [w for w in self.prepared if not w.is_load]
        added = 0.0
        for repeat in range(max(self.settings.repeats, self.settings.most_repeats) if works else 0):
            is_added = repeat >= self.settings.repeats
            wide = set(self._wide(works)) if is_added else set()
            if is_added and (not wide or added >= self.settings.budget_seconds):
                break
            live = self._live("latency")
            for index in self._order(len(live), 3, repeat):
                fitting = [w for w in works if live[index].can_run(w) and (not is_added or w.described.label in wide)]
                drawn = [fitting[i] for i in self._order(len(fitting), 4, repeat, index)]
                if drawn:
                    self._child(
                        live[index],
                        "latency",
                        repeat,
                        workloads=[w.row for w in drawn],
                        cold=works[0].row,
                        seconds=self.settings.seconds_per_cell,
                        warmup=self.settings.warmup_seconds,
                    )
                    added += self.children[-1].seconds if is_added else 0.0
        self._say_what_is_wide(works)

    def _wide(self, works: Sequence[Prepared]) -> Iterator[str]:
        """Labels of workloads of which some comparison is still wider than the precision asked for."""
        for work in works:
            if any(width > self.settings.precision for width in self._widths(work)):
                yield work.described.label

    def _widths(self, work: Prepared) -> Iterator[float]:
        """Half the interval of each timed cell's ratio to the first one; of a lone cell, of its own median."""
        logs = [logs for cell in self._live("latency") if (logs := _logs(cell, work.described.label))]
        if len(logs) == 1:
            yield stats.half_width(list(logs[0].values()))
        for other in logs[1:]:
            yield stats.half_width([other[r] - logs[0][r] for r in logs[0] if r in other])

    def _say_what_is_wide(self, works: Sequence[Prepared]) -> None:
        for label in self._wide(works):
            self.notes.append(
                f"{label}: the repeats did not bring every interval within ±{100 * self.settings.precision:.3g} %. Close other "
                "programs, or raise budget_seconds."
            )

    def _loads(self) -> None:
        for work in (w for w in self.prepared if w.is_load):
            for repeat in range(self.settings.load_repeats):
                live = [cell for cell in self._live("load") if cell.can_run(work)]
                for index in self._order(len(live), 5, repeat):
                    self._child(live[index], "load", repeat, workloads=[work.row])

    def _profiles(self) -> tuple[Profile, ...]:
        found = []
        seen: set[tuple[Digest, str, int]] = set()
        for cell in self._live("profile"):
            spot = (cell.artifact.digest, cell.device, cell.threads)
            if cell.artifact.manifest.format != "onnx" or "onnxruntime" not in cell.runtime or spot in seen:
                continue
            seen.add(spot)
            for work in self.prepared:
                if work.described.kind in ("fixed", "generate") and cell.can_run(work):
                    result = self._child(cell, "profile", 0, workloads=[work.row])
                    if result is not None:
                        found.append(_profile(cell, work, result))
        for cell in self.cells:
            self.notes += [
                f"no profile of {cell.artifact.name}: {why}" for kind, why in cell.errors if kind == "profile"
            ]
        return tuple(found)

    def _ceilings(self) -> Ceilings | None:
        threads = min(cores(), max(cell.threads for cell in self.cells))
        found = machine.kept(threads)
        if found is None:
            self.say("measuring what this machine can do (once)", 0, self.expected)
            job = {"pass": "ceilings", "artifact": "", "runtime": "torch", "threads": threads}
            outcome = run_child(job, self.folder / "job.json", began=self.began)
            if outcome.result is None:
                self.notes.append(f"the machine's ceilings could not be measured: {outcome.error}.")
                return None
            found = Ceilings.model_validate(outcome.result)
            machine.keep(found)
        return found

    def _compressed(self) -> dict[Digest, float]:
        found = {}
        for cell in self.cells:
            if cell.times and not cell.blocked and cell.artifact.digest not in found:
                self.say(f"compressing {cell.artifact.name}", 0, self.expected)
                found[cell.artifact.digest] = float(compressed_bytes(cell.artifact))
        return found


def _logs(cell: Cell, label: str) -> dict[int, float]:
    """Repeat -> logarithm of the median time that a workload took."""
    found: dict[int, list[float]] = {}
    for repeat, result in cell.over_repeats("latency"):
        for timed in result["workloads"]:
            if timed["label"] == label:
                found.setdefault(repeat, []).extend(timed.get("per_token") or timed.get("values"))
    return {repeat: float(np.log(np.median(values))) for repeat, values in found.items()}


def _profile(cell: Cell, work: Prepared, result: dict[str, Any]) -> Profile:
    rows = tuple(ProfileRow.model_validate(row) for row in result["rows"])
    return Profile(
        artifact=cell.artifact.name, artifact_digest=cell.artifact.digest, runtime="onnxruntime", threads=cell.threads,
        workload=work.described, calls=result["calls"], seconds=result["seconds"], rows=rows,
    )  # fmt: skip
