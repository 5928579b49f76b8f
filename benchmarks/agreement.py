"""Do squeeze's figures agree with those of tools that know nothing of it? Peak memory with GNU time, latency with twenty plain lines.

    python benchmarks/agreement.py [--repeats 5]

Appends one line to benchmarks/results/<machine>/agreement.jsonl. The plain script times the same ONNX file alone in a process of its
own, in turn with squeeze's children, so that a slow minute falls on both. GNU time is Debian's package `time`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, when run as a file

from benchmarks.store import machine
from benchmarks.vs_peers import ROOT, artifacts
from squeeze.benchmark.cells import make_cells, prepare
from squeeze.benchmark.child import run_child
from squeeze.benchmark.workload import BenchSettings
from squeeze.measuring import subjects
from squeeze.provenance import environment

PLAIN = """
import sys, time
from statistics import median
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = 2, 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
ids = np.random.default_rng(0).integers(0, 30522, (1, 128), dtype=np.int64)
feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
feed = {i.name: feed[i.name] for i in session.get_inputs()}
session.run(None, feed)
session.run(None, feed)
times = []
while sum(times) < 1:
    started = time.perf_counter()
    session.run(None, feed)
    times.append(time.perf_counter() - started)
print(median(times))
"""


def main() -> None:
    """Measure both ways in turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="of each way (%(default)s)")
    parser.add_argument("--machine", default=machine(), help="folder under benchmarks/results (%(default)s)")
    given = parser.parse_args()
    export = artifacts("sentiment-int8") / "export-0-source"
    settings = BenchSettings.model_validate(
        {"threads": 2, "workloads": [{"kind": "fixed", "batch": 1, "sequence": 128}]}
    )
    chosen, task = subjects([export], None)
    (cell,) = make_cells(chosen, task, settings)
    peaks, times, ours, plain = [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (work,) = prepare(settings, None, None, task, cell.artifact, 0, folder)
        for _ in range(given.repeats):
            result, outside = _with_gnu_time(cell.job("memory", workloads=[work.row], seed=0), folder)
            peaks.append(result["peak_memory"])
            times.append(outside)
            job = cell.job("latency", workloads=[work.row], cold=work.row, seconds=1.0, warmup=0.1, seed=0)
            outcome = run_child(job, folder / "job.json")
            if outcome.result is None:
                raise SystemExit(outcome.error)
            ours.append(median(outcome.result["workloads"][0]["values"]))
            done = subprocess.run(
                [sys.executable, "-c", PLAIN, export / "model.onnx"], check=True, capture_output=True, text=True
            )
            plain.append(float(done.stdout))
    line = {
        "peak_bytes": peaks, "gnu_time_bytes": times, "peak_ratio": median(peaks) / median(times),
        "latency_seconds": ours, "plain_seconds": plain, "latency_ratio": median(ours) / median(plain),
        "cpu": environment().cpu, "squeeze": environment().git,
    }  # fmt: skip
    target = ROOT / "benchmarks" / "results" / given.machine / "agreement.jsonl"
    with target.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line))


def _with_gnu_time(job: dict[str, object], folder: Path) -> tuple[dict[str, int], int]:
    """(what the child says of itself, its peak in bytes as GNU time saw it)"""
    file, result = folder / "timed.json", folder / "timed.result"
    file.write_text(json.dumps(job | {"result": str(result)}), "utf-8")
    command = ["/usr/bin/time", "-v", sys.executable, "-m", "squeeze.benchmark.worker", str(file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = re.search(r"Maximum resident set size \(kbytes\): (\d+)", done.stderr)
    if found is None:
        raise SystemExit(f"GNU time said nothing of memory: {done.stderr}")
    return json.loads(result.read_text("utf-8")), int(found[1]) * 1024


if __name__ == "__main__":
    main()
