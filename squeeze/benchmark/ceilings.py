"""What this machine can do at best: memory bandwidth and matrix products, measured once and kept.

Bandwidth is read from pages that were written before (untouched pages are all one page of zeros, and read at the speed of the
cache), for working sets from 16 MB to 1 GB: a model that fits a large cache is not bound by the memory behind it. Rates are the
best of several tries, sizes and libraries, because a ceiling is what was reached once: torch alone put it at half of what ONNX
Runtime then did (docs/log.md, 2026-11-25). Kept in the user's cache folder under a digest of processor, cores, threads and the
libraries' versions. Rejected: data sheets, which know neither the hypervisor nor the neighbours.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pydantic import JsonValue, ValidationError

from squeeze.provenance import digest_json, environment
from squeeze.report.schema import Bandwidth, Ceilings, write_atomically

WORKING_SETS = tuple(size << 20 for size in (16, 64, 128, 256, 512, 1024))
SIDES = (1024, 2048)
"""Rows and columns of the multiplied matrices: small ones leave the units idle at the edges, large ones leave the cache."""
TRIES = 7
SECONDS = 1.0
"""After which a product is not tried again, nor in a larger size: bfloat16 without an instruction for it runs at a hundredth of float32's
speed, and seven tries of it took five minutes."""
LIBRARIES = ("torch", "onnxruntime")


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
    """Measure bandwidth with torch and products with every library; takes some ten seconds and 2 GB of memory at most."""
    import torch

    torch.set_num_threads(threads)
    whole = torch.ones(WORKING_SETS[-1] // 4)
    bandwidth = []
    for size in WORKING_SETS:
        part = whole[: size // 4]
        bandwidth.append(Bandwidth(working_set=size, bytes_per_second=size / _best(lambda part=part: part.sum())))  # type: ignore[misc]
    del whole
    rates: dict[str, float] = {}
    slow: set[tuple[str, str]] = set()
    for side in SIDES:
        torch_products = (("torch", *each) for each in _torch_products(side))
        onnx_products = (("onnxruntime", *each) for each in _onnx_products(side, threads))
        for library, name, product in [*torch_products, *onnx_products]:
            if (library, name) in slow:
                continue
            seconds = _best(product)
            rates[name] = max(rates.get(name, 0.0), 2 * side**3 / seconds)
            if seconds >= SECONDS:
                slow.add((library, name))
    return Ceilings(
        threads=threads, bandwidth=tuple(bandwidth), operations=rates, measured=datetime.now(UTC).isoformat(timespec="seconds")
    )  # fmt: skip


def _torch_products(side: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Square products in every arithmetic that this torch has on this CPU."""
    import torch

    for name in ("float32", "bfloat16"):
        left, right = (torch.randn(side, side).to(getattr(torch, name)) for _ in range(2))
        yield name, partial(torch.matmul, left, right)
    signed, weight = (torch.randint(-128, 127, (side, side), dtype=torch.int8) for _ in range(2))
    try:
        torch._int_mm(signed[:32, :32].contiguous(), weight[:32, :32].contiguous())
    except RuntimeError:
        return
    yield "int8", partial(torch._int_mm, signed, weight)


def _onnx_products(side: int, threads: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """The same by ONNX Runtime, its right matrix a constant, which it packs once as it does a model's weights."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    floats = rng.standard_normal((side, side), dtype=np.float32)
    integers = rng.integers(-127, 128, (side, side), dtype=np.int8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    for name, kind, left, right, out in (
        ("float32", "MatMul", floats, floats, TensorProto.FLOAT),
        ("int8", "MatMulInteger", integers.view(np.uint8), integers, TensorProto.INT32),
    ):
        given = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(left.dtype), [side, side])
        result = helper.make_tensor_value_info("y", out, [side, side])
        node = helper.make_node(kind, ["x", "w"], ["y"])
        graph = helper.make_graph([node], "product", [given], [result], [numpy_helper.from_array(right, "w")])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        yield name, partial(session.run, None, {"x": left})


def _best(work: Callable[[], object]) -> float:
    """The shortest of several tries, in seconds; the first, which also warms up, may be the only one."""
    begun = time.perf_counter()
    work()
    best = time.perf_counter() - begun
    for _ in range(TRIES):
        started = time.perf_counter()
        if started - begun >= SECONDS:
            break
        work()
        best = min(best, time.perf_counter() - started)
    return best


def _file(threads: int, folder: Path | None) -> Path:
    here = environment()
    libraries: dict[str, JsonValue] = {name: here.packages.get(name, "") for name in LIBRARIES}
    key = digest_json(
        {"cpu": here.cpu, "flags": list(here.cpu_flags), "cores": here.cores, "threads": threads, **libraries}
    )
    base = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "squeeze"
    return base / f"ceilings-{key[7:19]}.json"
