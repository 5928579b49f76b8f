"""One distillation on one process, on two (DDP) and on two that divide its weights (FSDP2): are the curves the same?

    python benchmarks/distribution.py             60 steps; a few minutes on two cores
    python benchmarks/distribution.py --steps 4   a try

A 3-layer student of all-MiniLM-L6-v2 learns the embeddings of tweets, from the real commands, on CPUs over gloo and in float32, one thread
a process. Every run takes the same batches, whatever the number of processes; what differs is the order in which floats are added. Writes
benchmarks/results/<machine>/distribution.jsonl: commands, the three curves (losses of each stretch, held-out cosines), their largest
relative differences from the first, and seconds. Exits with 1 where one is over 1 %.

Where `accelerate launch --cpu --num_processes 2` starts one process only (accelerate 1.15 does; without MPI it knows no other way on CPUs),
`--multi_gpu` starts as many as it is told and asks for no GPU. On GPUs the same command trains over NCCL. Over several nodes, on each:

    accelerate launch --multi_gpu --num_machines 2 --machine_rank <0, 1> --num_processes 16 --main_process_ip <node 0> \\
        --main_process_port 29500 -m squeeze run RECIPE
    torchrun --nnodes 2 --node_rank <0, 1> --nproc_per_node 8 --master_addr <node 0> --master_port 29500 -m squeeze run RECIPE

with the run folder, the models and the texts on a disk that all nodes see, and for weights that are divided `--use_fsdp --fsdp_version 2`
(accelerate), or `training: {sharding: fsdp}` in the recipe.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, when run as a file

from benchmarks.store import machine
from squeeze.report.schema import read_report, write_atomically

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = 0.01
"""Largest relative difference of a curve from that of one process."""
HUNG = 1200
"""Seconds after which a command is given up."""
RECIPE = """\
# A student of three layers that learns the embeddings of tweets: long enough to compare curves, too short to be good.
name: distribution
model:
  path: asset:minilm-l6-v2
task: feature-extraction
data:
  path: asset:tweets
  max_length: 64
  splits:
    evaluate: 100
    train: 4000
stages:
  - kind: distill
    student: {layers: 3}
    training: {steps: %d, batch: 32, validations: 3, held_out: 256, learning_rate: 2.0e-4, precision: float32, device: cpu}
"""
ACCELERATE = ("-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--num_processes", "2", "--main_process_port", "0")  # fmt: skip
LAUNCHERS: dict[str, tuple[str, ...]] = {
    "1 process": (),
    "2 processes, DDP": (*ACCELERATE, "--multi_gpu"),
    "2 processes, FSDP": (*ACCELERATE, "--use_fsdp", "--fsdp_version", "2"),
}


def main() -> None:
    """Train three times, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="steps of the optimizer (%(default)s)")
    parser.add_argument("--machine", default=machine(), help="folder under benchmarks/results (%(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "distribution.yaml"
        recipe.write_text(RECIPE % given.steps, "utf-8")
        runs = [trained(name, launcher, recipe) for name, launcher in LAUNCHERS.items()]
    for run in runs:
        run["largest relative difference"] = {
            "loss": apart(run["loss"], runs[0]["loss"]), "held-out cosine": apart(run["held_out"], runs[0]["held_out"])
        }  # fmt: skip
        sys.stdout.write(f"{run['name']}: {run['largest relative difference']}, {run['seconds']:.0f} s\n")
    target = ROOT / "benchmarks" / "results" / given.machine / "distribution.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, json.dumps({"recipe": RECIPE % given.steps, "runs": runs}) + "\n")
    sys.exit(any(max(run["largest relative difference"].values()) > ALLOWED for run in runs))


def trained(name: str, launcher: tuple[str, ...], recipe: Path) -> dict[str, Any]:
    """One run of the recipe in processes of one thread each."""
    out = recipe.with_name(name.replace(" ", "-").replace(",", ""))
    arguments = [*launcher, "-m", "squeeze", "run", str(recipe), "--quiet", "--out", str(out)]
    started = time.monotonic()
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=HUNG, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stderr}")
    record = read_report(out / "report.json").manifests[-1].record
    assert record is not None
    assert record.training is not None
    curve = record.training
    command = ["accelerate launch", *launcher[2:]] if launcher else ["python"]
    return {
        "name": name, "command": " ".join([*command, "-m squeeze run", recipe.name]), "processes": curve.processes, "notes": record.notes,
        "steps": curve.steps, "loss": curve.loss, "shares": curve.shares, "held_out": [v.value for v in curve.validations],
        "held_out_steps": [v.step for v in curve.validations], "training_seconds": curve.seconds[-1], "seconds": time.monotonic() - started,
    }  # fmt: skip


def apart(one: Any, other: Any) -> float:
    """Largest relative difference of two curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main()
