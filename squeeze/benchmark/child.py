"""One child process: started with a job in a file, waited for without touching a core, its surroundings looked at.

While a child is timed, its parent is blocked in the kernel. Before and after, the parent reads what all programs of the machine
used (/proc/stat) and what the child itself used (getrusage), so that a report can say how quiet it was: a slow cell on a busy
machine is the machine's fault. Rejected: a parent that polls, or samples while it waits (it takes the core that is being timed).
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from squeeze.report.schema import ChildRun


@dataclass(frozen=True)
class Outcome:
    """What became of one child: its result, or in words why there is none; and how it went."""

    result: dict[str, Any] | None
    error: str | None
    run: ChildRun


def run_child(job: dict[str, Any], file: Path, *, repeat: int = 0, began: float | None = None) -> Outcome:
    """Run one job in a child of its own and wait. `began`: monotonic time from which its start is counted."""
    result = file.with_suffix(".result")
    result.unlink(missing_ok=True)
    file.write_text(json.dumps(job | {"result": str(result)}), "utf-8")
    log = file.with_suffix(".log")
    before, started = _Usage(), time.monotonic()
    code = _wait(file, log, job["threads"])
    seconds, after = time.monotonic() - started, _Usage()
    others, stolen = after.shares_since(before, seconds)
    error = None if code == 0 and result.exists() else _reason(code, log)
    run = ChildRun(
        purpose=job["pass"], artifact=job["artifact"], runtime=job["runtime"], threads=job["threads"], repeat=repeat,
        started=started - (started if began is None else began), seconds=seconds, cpu_seconds=after.child - before.child,
        others=others, stolen=stolen, error=error,
    )  # fmt: skip
    return Outcome(None if error else json.loads(result.read_text("utf-8")), error, run)


def _wait(file: Path, log: Path, threads: int) -> int:
    quiet = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "squeeze.benchmark.worker", str(file)], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env=os.environ | quiet, start_new_session=True,
        )  # fmt: skip
        try:
            return child.wait()
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise


def _reason(code: int, log: Path) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = log.read_text("utf-8", "replace").strip().splitlines()
    return f"exit code {code}: {lines[-1] if lines else 'no message'}"


class _Usage:
    """Processor seconds used so far: by this process's finished children, by itself, and by everything on the machine."""

    def __init__(self) -> None:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.child = children.ru_utime + children.ru_stime
        self.own = time.process_time()
        self.busy: float | None = None
        self.stolen = 0.0
        try:
            first = Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:]
        except OSError:
            return
        user, nice, system, _, _, interrupts, soft, stolen, *_ = (int(ticks) / TICK for ticks in first)
        self.busy, self.stolen = user + nice + system + interrupts + soft, stolen

    def shares_since(self, before: "_Usage", seconds: float) -> tuple[float | None, float | None]:
        """Shares of all cores' time that other programs, and the hypervisor's other guests, used meanwhile."""
        if self.busy is None or before.busy is None or seconds <= 0:
            return None, None
        whole = seconds * (os.cpu_count() or 1)
        ours = self.child - before.child + self.own - before.own
        others = (self.busy - before.busy - ours) / whole
        # Ticks of 10 ms: of a short child the difference can come out a hair below zero or above one.
        return min(1.0, max(0.0, others)), min(1.0, max(0.0, (self.stolen - before.stolen) / whole))


TICK = os.sysconf("SC_CLK_TCK")
