"""Does a bench survive what happens to long runs? A kill half-way through twenty cells, and two benches that write to one folder.

    python benchmarks/robustness.py [interrupt] [writers] [training] [--seconds 60]

`interrupt` starts `squeeze bench` on a grid of twenty cells, interrupts it after a third of its children and kills it after two thirds
(SIGINT, then SIGKILL), starts it a third time, and counts which children were run again. `writers` lets two loops of
`squeeze bench` write to one results folder for a minute, while the index is made and read. `training` kills `squeeze run` of a distillation
three times at random moments (SIGKILL) and compares the student's weights with those of a run that nobody disturbed. Each appends
one line to benchmarks/results/<machine>/robustness.jsonl and ends with exit code 1 where anything was lost, torn, other or measured twice.
"""

import argparse
import json
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, when run as a file

from benchmarks import peers
from benchmarks.store import machine
from benchmarks.vs_peers import ROOT, artifacts
from squeeze.console import message
from squeeze.provenance import environment
from squeeze.report.schema import read_report
from squeeze.report.status import SHOWN
from squeeze.report.store import INDEX, history, read_all, rebuild

COMMAND = [str(Path(sys.executable).with_name("squeeze")), "bench"]
CELLS, REPEATS = 20, 2
STEPS = 150
STUDENT = f"""\
name: student
model: {{path: "asset:minilm-l6-v2"}}
task: feature-extraction
data: {{path: "asset:tweets", splits: {{evaluate: 100, train: 3000}}}}
stages:
  - kind: distill
    student: {{layers: 3}}
    cache: {{}}
    training: {{steps: {STEPS}, batch: 16, held_out: 200, validations: 4, checkpoint_minutes: 0.05, device: cpu}}
"""
SHORT = ["--set", "bench.quality=false", "--set", "bench.memory=false", "--set", "bench.energy=false"]


def main() -> None:
    """Do what the command line names, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="none: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the two writers go on (%(default)s)")
    parser.add_argument("--machine", default=machine(), help="folder under benchmarks/results (%(default)s)")
    given = parser.parse_args()
    target = ROOT / "benchmarks" / "results" / given.machine / "robustness.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    is_well = True
    for part in given.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="squeeze-robustness-") as name:
            found = PARTS[part](Path(name), given.seconds)
        here = environment()
        line = {"part": part, **found, "date": f"{datetime.now(UTC):%Y-%m-%d}", "cpu": here.cpu, "squeeze": here.git}
        with target.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line))
        is_well = is_well and bool(found["holds"])
    sys.exit(not is_well)


def interrupt(folder: Path, _: float) -> dict[str, Any]:
    """Twenty cells, stopped twice; every child that had finished must be taken over, and the report must say so."""
    run = artifacts("sentiment-int8")
    export = run / "export-0-source"
    others = [peers.quantize_dynamic(export, per_channel=which) for which in (False, True)]
    command = [
        *COMMAND, str(run / "0-source"), str(export), str(run / "export-1-quantize"), *map(str, others), "--results", str(folder),
        "--threads", "1", "--threads", "2", "--repeats", str(REPEATS), *SHORT, "--quiet", "--set", "bench.seconds_per_cell=0.2",
        "--set", "bench.workloads=[{kind: fixed, batch: 1, sequence: 64}]",
    ]  # fmt: skip
    for runtime in ("torch", "torch.compile", "onnxruntime", "openvino"):
        command += ["--runtime", runtime]
    kept, codes = [], []
    for number, after in ((signal.SIGINT, CELLS * REPEATS // 3), (signal.SIGKILL, 2 * CELLS * REPEATS // 3)):
        code, finished = _stopped(command, folder, number, after)
        codes.append(code)
        kept.append(finished)
        message(
            f"stopped by {number.name} with exit code {code}: {len(finished)} of {CELLS * REPEATS} children had finished"
        )
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (file,) = (path for path in folder.glob("*.json"))
    report = read_report(file)
    children = [child for child in report.children if child.purpose == "latency"]
    cells = {(m.artifact, m.runtime, m.threads) for m in report.measurements if m.quantity == "latency"}
    resumed = sum(child.resumed for child in children)
    note = next((text for text in report.notes if text.startswith("resumed:")), "")
    is_kept = all(kept[1].get(name) == content for name, content in kept[0].items())
    return {
        "cells": len(cells), "children": len(children), "after_sigint": len(kept[0]), "after_sigkill": len(kept[1]),
        "taken_over": resumed, "measured_now": len(children) - resumed, "note": note, "seconds": round(time.monotonic() - started, 1),
        "exit_codes": [*codes, done.returncode],
        "holds": done.returncode == 0 and codes[0] == 130 and len(cells) == CELLS and resumed == len(kept[1]) and is_kept and bool(note),
    }  # fmt: skip


def _stopped(command: Sequence[str], folder: Path, number: signal.Signals, after: int) -> tuple[int, dict[str, bytes]]:
    """Start, send the signal once `after` children have finished; the exit code, and what the journal then holds."""
    # A shell's background job ignores SIGINT, and its children would inherit that.
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while process.poll() is None and len(_finished(folder)) < after:
        time.sleep(0.2)
    process.send_signal(number)
    code = process.wait()
    time.sleep(1.0)  # the child that was at work ends with its parent
    return code, _finished(folder)


def _finished(folder: Path) -> dict[str, bytes]:
    """Name and content of the journal's entries, one for each finished child."""
    entries = (
        path for path in folder.glob(".bench-*/*.json") if path.name != "job.json" and not path.name.endswith(SHOWN)
    )
    return {path.name: path.read_bytes() for path in entries if path.exists()}


def training(folder: Path, _: float) -> dict[str, Any]:
    """A student of MiniLM that learns from answers on disk: killed at random three times, and left alone."""
    recipe = folder / "student.yaml"
    recipe.write_text(STUDENT, "utf-8")
    command = [str(Path(sys.executable).with_name("squeeze")), "run", str(recipe), "--quiet", "--out"]
    begun = time.monotonic()
    subprocess.run([*command, str(folder / "whole")], check=True)
    seconds = time.monotonic() - begun
    draw, waits, codes = random.Random(), [], []
    for _number in range(3):
        waits.append(round(draw.uniform(0.3, 0.45) * seconds, 2))
        process = subprocess.Popen([*command, str(folder / "killed")], stderr=subprocess.DEVNULL)
        try:
            codes.append(process.wait(waits[-1]))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(process.wait())
    last = subprocess.run([*command, str(folder / "killed")], capture_output=True, text=True, check=False)
    found = [read_report(folder / name / "report.json").manifests[-1] for name in ("whole", "killed")]
    digests = [manifest.files["model.safetensors"].sha256 for manifest in found]
    notes = [note for manifest in found[1:] if manifest.record is not None for note in manifest.record.notes]
    return {
        "steps": STEPS, "undisturbed_seconds": round(seconds, 1), "killed_after_seconds": waits, "exit_codes": [*codes, last.returncode],
        "digests": digests, "notes": notes, "holds": last.returncode == 0 and codes == [-signal.SIGKILL] * 3 and len(set(digests)) == 1,
    }  # fmt: skip


def writers(folder: Path, seconds: float) -> dict[str, Any]:
    """Two loops of `squeeze bench` at once; afterwards every bench that ended well has one whole report, and the index equals them."""
    export = artifacts("sentiment-int8") / "export-1-quantize"
    command = [
        *COMMAND, str(export), "--results", str(folder), "--repeats", "1", *SHORT, "--quiet", "--json", "--set", "bench.ceilings=false",
        "--set", "bench.seconds_per_cell=0.05", "--set", "bench.workloads=[{kind: fixed, batch: 1, sequence: 16}]",
    ]  # fmt: skip
    end = time.monotonic() + seconds
    running: dict[int, subprocess.Popen[bytes]] = {}
    codes: list[int] = []
    started = reads = 0
    while running or time.monotonic() < end:
        for writer in (0, 1):
            process = running.get(writer)
            if process is not None and process.poll() is not None:
                codes.append(running.pop(writer).returncode)
            if writer not in running and time.monotonic() < end:
                # The same seed now and then in both: two benches of the same request must not share a journal.
                running[writer] = subprocess.Popen([*command, "--seed", str(started // 2)], stdout=subprocess.DEVNULL)
                started += 1
        if folder.is_dir():
            history(folder)
            reads += 1
        time.sleep(0.1)
    stored, skipped = read_all(folder)
    rebuild(folder)
    with closing(sqlite3.connect(folder / INDEX)) as base:
        indexed = {(row[0], row[1]) for row in base.execute("SELECT file, bytes FROM runs")}
    files = {(one.path.name, one.path.stat().st_size) for one in stored}
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return {
        "seconds": seconds, "benches": started, "ended_well": codes.count(0), "reports": len(stored), "torn": len(skipped),
        "index_equals_files": indexed == files, "left_behind": left, "index_reads_meanwhile": reads,
        "holds": codes.count(0) == started == len(stored) and not skipped and indexed == files and not left,
    }  # fmt: skip


PARTS = {"interrupt": interrupt, "writers": writers, "training": training}

if __name__ == "__main__":
    main()
