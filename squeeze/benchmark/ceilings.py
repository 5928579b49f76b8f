"""What this machine can do at best: memory bandwidth and matrix products, measured once and kept.

Bandwidth is read from pages that were written before (untouched pages are all one page of zeros, and read at the speed of the
cache), for working sets from 16 MB to 1 GB: a model that fits a large cache is not bound by the memory behind it. Rates are the
best of several tries, because a ceiling is what was reached once. Kept in the user's cache folder under a digest of processor,
cores, threads and torch's version. Rejected: data sheets, which know neither the hypervisor nor the neighbours.
"""

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from squeeze.provenance import digest_json, environment
from squeeze.report.schema import Bandwidth, Ceilings, write_atomically

WORKING_SETS = tuple(size << 20 for size in (16, 64, 128, 256, 512, 1024))
SIDE = 1024
TRIES = 7


def kept(threads: int, folder: Path | None = None) -> Ceilings | None:
    """What was measured on this machine before with as many threads; None where it was not."""
    try:
        return Ceilings.model_validate(json.loads(_file(threads, folder).read_text("utf-8")))
    except (OSError, ValueError, ValidationError):
        return None


def keep(ceilings: Ceilings, folder: Path | None = None) -> None:
    """Keep for the next time; a cache folder that cannot be written is no error."""
    file = _file(ceilings.threads, folder)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, ceilings.model_dump_json() + "\n")
    except OSError:
        return


def measure(threads: int) -> Ceilings:
    """Measure with torch, which has kernels for every arithmetic; takes some ten seconds and 2 GB of memory at most."""
    import torch

    torch.set_num_threads(threads)
    whole = torch.ones(WORKING_SETS[-1] // 4)
    bandwidth = []
    for size in WORKING_SETS:
        part = whole[: size // 4]
        bandwidth.append(Bandwidth(working_set=size, bytes_per_second=size / _best(lambda part=part: part.sum())))  # type: ignore[misc]
    del whole
    rates = {}
    for name, make in _products().items():
        product = make()
        if product is not None:
            rates[name] = 2 * SIDE**3 / _best(product)
    return Ceilings(
        threads=threads, bandwidth=tuple(bandwidth), operations=rates, measured=datetime.now(UTC).isoformat(timespec="seconds")
    )  # fmt: skip


def _products() -> dict[str, Callable[[], Callable[[], object] | None]]:
    import torch

    def float_product(dtype: torch.dtype) -> Callable[[], object]:
        left, right = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
        return lambda: left @ right

    def int8_product() -> Callable[[], object] | None:
        left, right = (torch.randint(-128, 127, (SIDE, SIDE), dtype=torch.int8) for _ in range(2))
        try:
            torch._int_mm(left, right)
        except RuntimeError:
            return None
        return lambda: torch._int_mm(left, right)

    return {
        "float32": lambda: float_product(torch.float32),
        "bfloat16": lambda: float_product(torch.bfloat16),
        "int8": int8_product,
    }


def _best(work: Callable[[], object]) -> float:
    """The shortest of several tries, in seconds."""
    work()
    best = float("inf")
    for _ in range(TRIES):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def _file(threads: int, folder: Path | None) -> Path:
    here = environment()
    torch = here.packages.get("torch", "")
    key = digest_json(
        {"cpu": here.cpu, "flags": list(here.cpu_flags), "cores": here.cores, "threads": threads, "torch": torch}
    )
    base = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "squeeze"
    return base / f"ceilings-{key[7:19]}.json"
