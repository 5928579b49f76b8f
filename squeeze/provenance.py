"""Where a result came from: digests of bytes and settings, and the machine and packages that computed it.

A digest names content and nothing else: no times, no paths, no machine. The environment is recorded beside it, so that
two machines may agree on a digest and a reader still sees which one made which file. The host's name is left out on
purpose: reports get published. Package versions come from their metadata, because importing torch to ask for its
version takes seconds, and a bench child that measures ONNX Runtime's memory must not import it at all.
"""

import hashlib
import json
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue

Digest = str
"""`sha256:` and 64 hex digits."""

CHUNK_BYTES = 1 << 20

PACKAGES = (
    "datasets", "numpy", "onnx", "onnxruntime", "onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-gpu",
    "onnxscript", "pyarrow", "pydantic", "safetensors", "tokenizers", "torch", "transformers",
)  # fmt: skip
"""What can change a number or a file; recorded where installed."""

CPU_FLAGS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "neon", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
"""The instruction sets that decide which float and integer kernels a runtime picks; Linux's spelling."""


class Environment(BaseModel):
    """The machine and the packages that a result was computed with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    squeeze: str
    python: str
    platform: str
    cpu: str
    cpu_flags: tuple[str, ...]
    cores: int
    """Cores that this process may use, hyper-threads counted."""
    memory_bytes: int
    packages: dict[str, str]
    cuda: str | None
    """The first GPU's name and driver; None without one."""
    git: str | None
    """Commit of the squeeze checkout in use, `-dirty` where files differ; None for an installed package."""


def digest_bytes(content: bytes) -> Digest:
    """Digest of bytes in memory."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def digest_file(path: Path) -> Digest:
    """Digest of a file's bytes, read in pieces: weights need not fit in memory."""
    hasher = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
    return f"sha256:{hasher.hexdigest()}"


def digest_json(value: JsonValue) -> Digest:
    """Digest of a JSON value in canonical form: keys sorted, no spaces, UTF-8, so equal values have equal digests.

    Raises ValueError for NaN and infinity, which JSON does not have.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return digest_bytes(text.encode("utf-8", "surrogatepass"))


@cache
def environment() -> Environment:
    """This machine and these packages; asked once for each process. Imports nothing heavy, never fails."""
    cpu, flags = _cpu()
    return Environment(
        squeeze=_version("squeeze") or "0+unknown",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=cpu,
        cpu_flags=flags,
        cores=_cores(),
        memory_bytes=_memory_bytes(),
        packages={name: version for name in PACKAGES if (version := _version(name))},
        cuda=_cuda(),
        git=_git(),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> tuple[str, tuple[str, ...]]:
    """(model name, the interesting flags present), from /proc/cpuinfo; elsewhere the name alone."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine() or "unknown", ()
    name, flags = parse_cpuinfo(text)
    return name or platform.machine(), flags


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """(model name or "", the interesting flags present) of what Linux writes into /proc/cpuinfo, on x86 and on ARM."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), value.strip())
    present = set(fields.get("flags", fields.get("features", "")).split())
    return fields.get("model name", ""), tuple(flag for flag in CPU_FLAGS if flag in present)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int:
    """Bytes that this process may have: the machine's, or its control group's where that is less; 0 if unknown."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
    try:
        group = Path("/sys/fs/cgroup/memory.max").read_text("ascii").strip()
    except OSError:
        return machine
    return min(machine, int(group)) if group.isdigit() else machine


def _cuda() -> str | None:
    first = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    return first.splitlines()[0] if first else None


def _git() -> str | None:
    """The commit, only where this file lies in a checkout of squeeze itself and not merely inside somebody's
    repository.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    if not commit:
        return None
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}-dirty" if changed else commit


def _output(command: list[str]) -> str | None:
    """What a short command prints, stripped; None where it is missing, fails or takes over five seconds."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=5, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
