"""The child: opens one artifact in one runtime, does one pass, writes what it measured. `python -m squeeze.benchmark.worker JOB`.

One pass each for latency, load, memory, energy, quality and profile, because each spoils the others: a timed call after a
memory-hungry one runs on other pages, and a peak is the peak of all that came before. The job and the result are files, so that
nothing a runtime prints can be mistaken for a result. Python's garbage collector is off while calls are timed, as in timeit.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from squeeze.benchmark.energy import EnergyMeter
from squeeze.benchmark.load import Trial, closed_loop, highest_rate, open_loop
from squeeze.benchmark.memory import peak_bytes, resident_bytes
from squeeze.benchmark.workload import unpack
from squeeze.evaluate import check_finite, evaluate, model_inputs
from squeeze.runtimes import RUNTIMES, Session, open_session

WARM_UP, AT_LEAST, GENERATIONS = 2, 5, 3
ENERGY_SECONDS = 5.0
"""RAPL counts in steps of a millisecond and more; this long, its steps do not matter."""

REQUESTS = 1000
"""Held-out texts that a load test draws from."""


def main() -> None:
    """Do the job in the file that the command line names."""
    _die_with_parent()
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    target = Path(job["result"])
    result = SPECIAL[job["pass"]](job) if job["pass"] in SPECIAL else _with_session(job)
    target.with_suffix(".part").write_text(json.dumps(result), "utf-8")
    target.with_suffix(".part").rename(target)


def _with_session(job: dict[str, Any]) -> dict[str, Any]:
    RUNTIMES[job["runtime"]].import_library()
    baseline = peak_bytes()
    started = time.perf_counter()
    session = open_session(
        Path(job["folder"]),
        job["runtime"],
        device=job["device"],
        threads=job["threads"],
        dtype=job["dtype"],
        check=False,
    )
    result: dict[str, Any] = {"load_time": time.perf_counter() - started, "threads": session.threads}
    result |= PASSES[job["pass"]](_slowed(session, job), job)
    return result | {"baseline_memory": baseline, "peak_memory": peak_bytes()}


def _latency(session: Session, job: dict[str, Any]) -> dict[str, Any]:
    """A first answer in the cold, always of the same workload; then every workload in the order given, warm-up apart."""
    first = _load(job["cold"]["file"])
    started = time.perf_counter()
    _once(session, job["cold"], first)
    cold = time.perf_counter() - started
    rows = [
        {"label": work["label"], **_timed(session, work, job["seconds"], job["warmup"])} for work in job["workloads"]
    ]
    return {"workloads": rows, "cold_latency": cold}


def _timed(session: Session, work: dict[str, Any], seconds: float, warmup: float) -> dict[str, Any]:
    batches = _load(work["file"])
    if work["kind"] == "generate":
        return _generations(session, batches[0]["input_ids"], work["new_tokens"])
    inputs = [model_inputs(batch) for batch in batches]
    if work["kind"] == "dataset":
        warm = [_call(session, inputs[0], check=True), _call(session, inputs[-1])]
        with _no_collector():
            started = time.perf_counter()
            for batch in inputs:
                session.forward(batch)
            return {"values": [time.perf_counter() - started], "warmups": warm}
    warm = [_call(session, inputs[0], check=True)]
    values: list[float] = []
    # Collected before the warm-up: a collection between it and the first timed call would leave that one cold caches.
    with _no_collector():
        while len(warm) < WARM_UP or sum(warm[1:]) < warmup:
            warm.append(_call(session, inputs[0]))
        while len(values) < AT_LEAST or sum(values) < seconds:
            values.append(_call(session, inputs[0]))
    return {"values": values, "warmups": warm}


def _generations(session: Session, ids: Any, new_tokens: int) -> dict[str, Any]:
    first = session.generate(ids, new_tokens)
    with _no_collector():
        done = [session.generate(ids, new_tokens) for _ in range(GENERATIONS)]
    return {
        "first_token": [g.first_token_seconds for g in done],
        "per_token": [sum(g.token_seconds) / len(g.token_seconds) for g in done],
        "rate": [len(ids) * len(g.token_seconds) / sum(g.token_seconds) for g in done],
        "warmups": [first.first_token_seconds],
    }


def _call(session: Session, batch: dict[str, Any], *, check: bool = False) -> float:
    """Seconds of one call: by CUDA events for torch on a GPU, where the clock of the host runs ahead of the device."""
    if session.device == "cuda" and session.runtime.startswith("torch"):
        import torch

        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        out = session.forward(batch)
        end.record()
        torch.cuda.synchronize()
        seconds = float(begin.elapsed_time(end)) / 1e3
    else:
        started = time.perf_counter()
        out = session.forward(batch)
        seconds = time.perf_counter() - started
    if check:
        check_finite(out, 0)
    return seconds


def _load_test(session: Session, job: dict[str, Any]) -> dict[str, Any]:
    """One load test; the raw seconds of every request, and every trial of a search."""
    (work,) = job["workloads"]
    requests = [model_inputs(batch) for batch in _load(work["file"])][:REQUESTS]
    for request in requests[: 2 * WARM_UP]:
        check_finite(session.forward(request), 0)
    with _no_collector():
        return {"label": work["label"], **_under_load(session, work, requests, job["seed"])}


def _under_load(session: Session, work: dict[str, Any], requests: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    callers, seconds = work["callers"], work["seconds"]
    if work["kind"] == "closed":
        return _described(closed_loop(session.forward, requests, callers, seconds, seed))
    if work["rate"] is not None:
        return _described(open_loop(session.forward, requests, callers, work["rate"], seconds, seed))
    best, trials = highest_rate(session.forward, requests, callers, seconds, work["limit_ms"] / 1e3, seed)
    tried = [{"rate": t.rate, "p99": None if t.hopeless else t.p99} for t in trials]
    found = {"trials": tried, "highest_rate": best.rate if best else 0.0}
    return found | (_described(best) if best else {"values": []})


def _described(trial: Trial) -> dict[str, Any]:
    return {"values": trial.latencies, "throughput": len(trial.latencies) / trial.seconds}


def _memory(session: Session, job: dict[str, Any]) -> dict[str, Any]:
    """The heaviest workload once; the peak is read afterwards."""
    (work,) = job["workloads"]
    _once(session, work, _load(work["file"]))
    gc.collect()
    found: dict[str, Any] = {"steady_memory": resident_bytes()}
    if session.device == "cuda" and session.runtime.startswith("torch"):
        import torch

        found |= {
            "cuda_allocated": torch.cuda.max_memory_allocated(),
            "cuda_reserved": torch.cuda.max_memory_reserved(),
        }
    return found


def _once(session: Session, work: dict[str, Any], batches: list[dict[str, Any]]) -> None:
    """One call of a workload: of real traffic its first batch, which is the longest where texts are sorted."""
    if work["kind"] == "generate":
        session.generate(batches[0]["input_ids"], work["new_tokens"])
    else:
        session.forward(model_inputs(batches[0]))


def _energy(session: Session, job: dict[str, Any]) -> dict[str, Any]:
    """Each workload again and again for some seconds; joules of one call."""
    found = {}
    for work in job["workloads"]:
        batches = _load(work["file"])
        _once(session, work, batches)
        meter, calls, started = EnergyMeter(job["device"]), 0, time.perf_counter()
        while time.perf_counter() - started < ENERGY_SECONDS:
            _once(session, work, batches)
            calls += 1
        found[work["label"]] = meter.joules() / calls
    return {"joules": found}


def _quality(session: Session, job: dict[str, Any]) -> dict[str, Any]:
    reference = None if job["reference"] is None else Path(job["reference"])
    outputs = evaluate(
        session, job["task"], _load(job["batches"]), reference=reference, is_reference=job["is_reference"]
    )  # fmt: skip
    outputs.save(Path(job["outputs"]))
    return {}


def _lm_eval(session: Session, job: dict[str, Any]) -> dict[str, Any]:
    from squeeze.benchmark.harness import evaluate_tasks
    from squeeze.model import load_tokenizer

    tokenizer = load_tokenizer(Path(job["tokenizer"]))
    scores = evaluate_tasks(
        session, tokenizer, job["tasks"], limit=job["limit"], max_length=job["max_length"], seed=job["seed"]
    )  # fmt: skip
    return {"scores": [{"task": s.task, "metric": s.metric, "values": list(s.values)} for s in scores]}


def _profile(job: dict[str, Any]) -> dict[str, Any]:
    from squeeze.benchmark.profiler import profile

    (work,) = job["workloads"]
    return profile(Path(job["folder"]), job["device"], job["threads"], work, _load(work["file"]), Path(job["result"]))


def _ceilings(job: dict[str, Any]) -> dict[str, Any]:
    from squeeze.benchmark.ceilings import measure

    return measure(job["threads"]).model_dump(mode="json")


class _Slowed:
    """A session that sleeps after each call for a share of its time: a planted slow-down that a bench must find."""

    def __init__(self, session: Session, share: float) -> None:
        self._session, self._share = session, share

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def forward(self, batch: Any) -> Any:
        """See Session."""
        started = time.perf_counter()
        answer = self._session.forward(batch)
        time.sleep(self._share * (time.perf_counter() - started))
        return answer


def _slowed(session: Session, job: dict[str, Any]) -> Any:
    return _Slowed(session, job["planted"]) if job.get("planted") else session


class _no_collector:
    """Collect once, then leave the collector off while calls are timed."""

    def __enter__(self) -> None:
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        gc.enable()


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
    "load": _load_test,
    "memory": _memory,
    "energy": _energy,
    "quality": _quality,
    "lm_eval": _lm_eval,
}
SPECIAL: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"profile": _profile, "ceilings": _ceilings}
"""Passes that open what they measure by themselves."""

if __name__ == "__main__":
    main()
