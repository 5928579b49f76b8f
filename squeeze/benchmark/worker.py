"""The child: opens one artifact in one runtime, does one pass, writes what it measured. `python -m squeeze.benchmark.worker JOB`.

One pass each for latency, memory and quality, because each spoils the others: a timed call after a memory-hungry one runs on
other pages, and a peak is the peak of all that came before. The job and the result are files, so that nothing a runtime prints
can be mistaken for a result.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from squeeze.benchmark.memory import peak_bytes
from squeeze.benchmark.workload import unpack
from squeeze.evaluate import evaluate, model_inputs
from squeeze.runtimes import RUNTIMES, Session, open_session

WARM_UP, AT_LEAST, GENERATIONS = 2, 5, 3


def main() -> None:
    """Do the job in the file that the command line names."""
    _die_with_parent()
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    RUNTIMES[job["runtime"]].import_library()
    baseline = peak_bytes()
    started = time.perf_counter()
    session = open_session(
        Path(job["folder"]), job["runtime"], device=job["device"], threads=job["threads"], check=False
    )
    result: dict[str, Any] = {"load_time": time.perf_counter() - started, "threads": session.threads}
    result |= PASSES[job["pass"]](session, job)
    result |= {"baseline_memory": baseline, "peak_memory": peak_bytes()}
    target = Path(job["result"])
    target.with_suffix(".part").write_text(json.dumps(result), "utf-8")
    target.with_suffix(".part").rename(target)


def _latency(session: Session, job: dict[str, Any]) -> dict[str, Any]:
    """Every workload in the order given; raw seconds, warm-up apart."""
    return {
        "workloads": [{"label": work["label"], **_timed(session, work, job["seconds"])} for work in job["workloads"]]
    }


def _timed(session: Session, work: dict[str, Any], seconds: float) -> dict[str, Any]:
    batches = _load(work["file"])
    if work["kind"] == "generate":
        ids = batches[0]["input_ids"]
        session.generate(ids, work["new_tokens"])
        done = [session.generate(ids, work["new_tokens"]) for _ in range(GENERATIONS)]
        rates = [len(ids) * len(g.token_seconds) / sum(g.token_seconds) for g in done]
        return {"first_token": [g.first_token_seconds for g in done], "rate": rates}
    inputs = [model_inputs(batch) for batch in batches]
    if work["kind"] == "dataset":
        session.forward(inputs[0])
        session.forward(inputs[-1])
        started = time.perf_counter()
        for batch in inputs:
            session.forward(batch)
        return {"values": [time.perf_counter() - started], "warmups": []}
    warm = [_call(session, inputs[0]) for _ in range(WARM_UP)]
    values: list[float] = []
    while len(values) < AT_LEAST or sum(values) < seconds:
        values.append(_call(session, inputs[0]))
    return {"values": values, "warmups": warm}


def _call(session: Session, batch: dict[str, Any]) -> float:
    """Seconds of one call: by CUDA events for torch on a GPU, where the clock of the host runs ahead of the device."""
    if session.device == "cuda" and session.runtime == "torch":
        import torch

        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        session.forward(batch)
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    started = time.perf_counter()
    session.forward(batch)
    return time.perf_counter() - started


def _memory(session: Session, job: dict[str, Any]) -> dict[str, Any]:
    """The heaviest workload once; the peak is read by `main`."""
    work = job["workloads"][0]
    batches = _load(work["file"])
    if work["kind"] == "generate":
        session.generate(batches[0]["input_ids"], work["new_tokens"])
    else:
        session.forward(model_inputs(batches[-1]))
    return {}


def _quality(session: Session, job: dict[str, Any]) -> dict[str, Any]:
    evaluate(session, job["task"], _load(job["batches"])).save(Path(job["outputs"]))
    return {}


def _load(file: str) -> list[dict[str, Any]]:
    with np.load(file, allow_pickle=False) as arrays:
        return unpack({name: arrays[name] for name in arrays.files})


def _die_with_parent() -> None:
    """On Linux, ask the kernel to end this process when its parent ends (PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)


PASSES: dict[str, Callable[[Session, dict[str, Any]], dict[str, Any]]] = {
    "latency": _latency,
    "memory": _memory,
    "quality": _quality,
}

if __name__ == "__main__":
    main()
