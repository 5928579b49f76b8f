"""What this machine and these packages mean for squeeze: will it run, how fast, and can its timings be trusted.

Everything is read from files and package metadata and nothing heavy is imported, so that a slow or broken torch cannot
keep the doctor from speaking. Whether torch has CUDA is read from its version.py as text, and ONNX Runtime's builds are
told apart by the name of the distribution that installed them. Rejected: importing each package, or a child process
that does; a GPU machine whose driver is broken hangs there, of all places.

Each check is a function of what was read, so that a test can hand it another machine.
"""

import importlib.util
import math
import os
import platform
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from squeeze.compress.advice import Machine
from squeeze.errors import DataError
from squeeze.provenance import Environment, environment
from squeeze.rows import ASSETS, asset_path

Level = Literal["ok", "warn", "bad"]
"""ok: as it should be. warn: squeeze works, but less well or less comparably. bad: squeeze does not work."""

ROOT = Path("/")
GIB = 2**30
SCARCE_MEMORY, SCARCE_DISK = 4 * GIB, 5 * GIB
TOO_LITTLE_DISK = GIB // 2
BUSY = 0.5
"""Load for each core from which timings are called noisy."""

CUDA_BUILDS = {"onnxruntime": "onnxruntime-gpu", "onnxruntime-genai": "onnxruntime-genai-cuda"}
"""Distribution for the CPU -> the one that holds the same modules built for CUDA."""

SHOWN = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai")
"""Packages whose versions are named even where all is well."""

Versions = Callable[[str], str | None]
"""Name of a distribution -> its installed version, None where it is not installed."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what it is here, whether that is fine, and if not, what to do or to expect."""

    topic: str
    value: str
    level: Level
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything, most basic first. Changes nothing."""
    here = environment()
    memory = psutil.virtual_memory()
    return [
        check_python(platform.python_version(), _metadata("Requires-Python")),
        check_packages(_requirements(), installed_version),
        check_instructions(platform.machine(), here.cpu, here.cpu_flags),
        check_cores(here.cores, os.cpu_count() or here.cores, psutil.cpu_count(logical=False), cpu_quota()),
        check_memory(memory_limit(memory.total), memory.available),
        check_disk("disk, working folder", Path.cwd()),
        check_disk("disk, hub cache", hub_cache()),
        check_cuda(_gpu(here), torch_cuda(), installed_version),
        check_huge_pages(_read(ROOT / "sys/kernel/mm/transparent_hugepage/enabled")),
        check_hub(os.environ.get("HF_HUB_OFFLINE")),
        check_assets(ASSETS),
        check_load(os.getloadavg()[0], here.cores),
    ]


def check_python(version: str, required: str | None) -> Finding:
    """Whether this Python is one that squeeze's metadata asks for."""
    if required and not SpecifierSet(required).contains(version, prereleases=True):
        return Finding("python", version, "bad", f"squeeze needs Python {required}. Make a new environment with one.")
    return Finding("python", version, "ok")


def check_packages(requirements: Sequence[str], version: Versions) -> Finding:
    """Whether each package that squeeze requires is installed in a version that it was written for.

    A CUDA build stands in for its CPU twin. Both at once are bad: they write the same files, and the last one wins.
    """
    if not requirements:
        return Finding("packages", "squeeze is not installed", "bad", "Run in its checkout: pip install -e .")
    faults: list[str] = []
    mends: list[str] = []
    for requirement in map(Requirement, requirements):
        found, twin = version(requirement.name), CUDA_BUILDS.get(requirement.name)
        if twin and version(twin):
            if found:
                faults.append(f"{requirement.name} and {twin} overwrite each other's files")
                mends.append(f"pip uninstall -y {requirement.name} && pip install --force-reinstall --no-deps {twin}")
        elif not found:
            faults.append(f"{requirement.name} is missing")
            mends.append(f"pip install '{requirement}'")
        elif not requirement.specifier.contains(found, prereleases=True):
            faults.append(f"{requirement.name} {found} is not {requirement.specifier}")
            mends.append(f"pip install '{requirement}'")
    if faults:
        return Finding("packages", "; ".join(faults), "bad", f"Run: {' && '.join(mends)}")
    shown = [(name, version(name) or version(CUDA_BUILDS.get(name, name))) for name in SHOWN]
    listed = ", ".join(f"{name} {found}" for name, found in shown if found)
    return Finding("packages", f"all {len(requirements)} as required: {listed}", "ok")


def check_instructions(machine: str, cpu: str, flags: Iterable[str]) -> Finding:
    """Which integer products the processor has, because that decides how exact and how fast int8 activations are."""
    present = set(flags)
    dots = [flag for flag in ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp") if flag in present]
    if dots:
        return Finding(
            "cpu", f"{cpu}: {', '.join(dots)}", "ok", "int8 products are summed in 32 bits: exact, and fast."
        )
    here = Machine(machine, frozenset(present))
    if here.saturates:
        advice = (
            "uint8 × int8 products are summed in 16 bits here and can saturate: int8 activations lose accuracy that they keep "
            "on a processor with VNNI, and gain less speed. `squeeze quantize --reduce-range` keeps weights within ±64, which is "
            "exact here too; decoders' block-wise int8 is exact as it is."
        )
        if here.mistakes_zero_points:
            advice += " 4-bit blocks: --symmetric, because of onnxruntime's issue 29853. `squeeze verify` judges it on this machine."
        return Finding("cpu", f"{cpu}: {'avx2' if 'avx2' in present else 'sse4_2'} without VNNI", "warn", advice)
    return Finding(
        "cpu",
        f"{cpu} ({machine}): no integer dot products found",
        "warn",
        "int8 may be slower than float32 here. Weights still shrink; measure before you rely on the speed.",
    )


def check_cores(allowed: int, machine: int, physical: int | None, quota: float | None) -> Finding:
    """Cores that this process may use; `quota` is the control group's limit in cores, None for none."""
    value = f"{allowed} of {machine}" + (f" ({physical} physical)" if physical else "")
    if quota is not None and quota < allowed:
        return Finding(
            "cores",
            f"{value}, limited to {quota:g} by the control group",
            "warn",
            f"More threads than that get stopped in mid-timing: --set bench.threads={max(1, math.floor(quota))} in "
            "`squeeze run`, --threads in `squeeze bench`.",
        )
    if physical is not None and allowed > physical:
        return Finding(
            "cores",
            value,
            "warn",
            f"squeeze takes a thread for each, where ONNX Runtime by itself takes {physical}, one for each physical core: measure "
            f"both, with --set bench.threads={physical} in `squeeze run`, --threads in `squeeze bench`.",
        )
    return Finding("cores", value, "ok")


def check_memory(limit: int, available: int) -> Finding:
    """Memory that this process may have, and what of it is free now; bytes."""
    free = min(limit, available)
    value = f"{free / GIB:.1f} GiB free of {limit / GIB:.1f} GiB"
    if free < SCARCE_MEMORY:
        return Finding(
            "memory",
            value,
            "warn",
            "Weights are float32 while squeeze works, 4 bytes a parameter, and an export holds several copies of them.",
        )
    return Finding("memory", value, "ok")


def check_disk(topic: str, folder: Path) -> Finding:
    """Free space where `folder` is or would be made, and whether it can be written there."""
    exists = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(exists).free
    value = f"{free / GIB:.1f} GiB free in {folder}"
    if not os.access(exists, os.W_OK | os.X_OK):
        return Finding(topic, f"{value}, not writable", "warn", "Give squeeze an --out folder elsewhere.")
    if free < TOO_LITTLE_DISK:
        return Finding(topic, value, "bad", "A run keeps its source, each stage and each export. Free some space.")
    if free < SCARCE_DISK:
        return Finding(
            topic, value, "warn", "A run keeps its source, each stage and each export: several times the model."
        )
    return Finding(topic, value, "ok")


def check_cuda(gpu: str | None, torch_build: str | None, version: Versions) -> Finding:
    """Whether `--device cuda` would work: a GPU with its driver, and packages built for it."""
    builds = {"torch": f"CUDA {torch_build}" if torch_build else None}
    builds |= {twin: version(twin) for twin in CUDA_BUILDS.values()}
    listed = ", ".join(f"{name} {found}" for name, found in builds.items() if found)
    if gpu is None:
        return Finding(
            "cuda", "no NVIDIA driver" + (f" ({listed} installed)" if listed else ""), "ok", "All runs on the CPU."
        )
    missing = [name for name, found in builds.items() if not found]
    if not missing:
        return Finding("cuda", f"{gpu}; {listed}", "ok")
    mends = {
        "torch": "torch from https://pytorch.org/get-started/locally/ in a CUDA build",
        **{twin: f"{twin} in place of {cpu}" for cpu, twin in CUDA_BUILDS.items()},
    }
    return Finding(
        "cuda",
        f"{gpu}; only CPU builds of {', '.join(missing)}",
        "warn",
        f"--device cuda needs {'; '.join(mends[name] for name in missing)}. The README says how.",
    )


def check_huge_pages(setting: str | None) -> Finding:
    """The kernel's transparent huge pages: "always [madvise] never", the one in force in brackets."""
    chosen = re.search(r"\[(\w+)\]", setting or "")
    if chosen is None:
        return Finding("huge pages", "unknown", "ok")
    if chosen[1] == "never":
        return Finding(
            "huge pages",
            "never",
            "warn",
            "Weights lie in 4 KiB pages. Do not compare timings with a machine that says always or madvise.",
        )
    return Finding("huge pages", chosen[1], "ok")


def check_hub(offline: str | None) -> Finding:
    """Whether hub ids may be downloaded; the hub's own reading of HF_HUB_OFFLINE."""
    if (offline or "").upper() in {"1", "ON", "YES", "TRUE"}:
        return Finding("hub", f"HF_HUB_OFFLINE={offline}", "ok", "Hub ids are looked up in the cache only.")
    return Finding("hub", "online", "ok", "Hub ids are downloaded. HF_HUB_OFFLINE=1 stops that.")


def check_assets(names: Collection[str]) -> Finding:
    """Whether the models and texts of the demo and the benchmarks are installed."""
    missing = {name: ASSETS[name].install for name in names if not _has_asset(name)}
    if missing:
        mends = "; ".join(dict.fromkeys(missing.values()))
        return Finding("assets", f"missing: {', '.join(missing)}", "warn", f"For the demo and the benchmarks: {mends}")
    return Finding("assets", ", ".join(names), "ok")


def check_load(load: float, cores: int) -> Finding:
    """Whether something else is running: the load average over the last minute."""
    value = f"{load:.2f} on {cores} core{'s' * (cores != 1)}"
    if load > BUSY * cores:
        return Finding("load", value, "warn", "Other work is running: timings taken now will be noisy.")
    return Finding("load", value, "ok")


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, from its metadata."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def torch_cuda() -> str | None:
    """CUDA version that the installed torch was built with, from its version.py; None for a CPU build or no torch."""
    spec = importlib.util.find_spec("torch")
    places = spec.submodule_search_locations if spec else None
    return parse_torch_cuda(_read(Path(places[0]) / "version.py") or "") if places else None


def parse_torch_cuda(version_py: str) -> str | None:
    """`cuda: Optional[str] = '13.0'` -> "13.0"."""
    found = re.search(r"""^cuda\b[^=]*=\s*['"]([^'"]+)['"]""", version_py, re.MULTILINE)
    return found[1] if found else None


def cpu_quota(root: Path = ROOT) -> float | None:
    """The control groups' limit on processor time, in cores; None for none. Reads cgroup v2 and v1."""
    texts = _group_files("cpu.max", "cpu", root)
    periods = _group_files("cpu.cfs_period_us", "cpu", root)
    texts += map(" ".join, zip(_group_files("cpu.cfs_quota_us", "cpu", root), periods, strict=False))
    return min((quota for text in texts if (quota := parse_quota(text))), default=None)


def parse_quota(text: str) -> float | None:
    """`200000 100000` (microseconds granted in each period) -> 2.0 cores; `max 100000` and `-1 100000` -> None."""
    granted, _, period = text.partition(" ")
    if not granted.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return int(granted) / int(period)


def memory_limit(machine: int, root: Path = ROOT) -> int:
    """Bytes that this process may have: the `machine`'s, or the least of its control groups'."""
    texts = _group_files("memory.max", "memory", root) + _group_files("memory.limit_in_bytes", "memory", root)
    return min([machine, *(int(text) for text in texts if text.isdigit())])


def hub_cache() -> Path:
    """Where the hub keeps its downloads, by the hub's own rules."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return (Path(home) / "hub").expanduser()


def _group_files(name: str, controller: str, root: Path) -> list[str]:
    """What `name` holds in this process's control group and in each one around it, innermost first."""
    found: list[str] = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controllers and controller)
        inner = top / path.lstrip("/")
        places = [inner, *inner.parents]
        texts = (_read(place / name) for place in places[: places.index(top) + 1])
        found += [text.strip() for text in texts if text is not None]
    return found


def _gpu(here: Environment) -> str | None:
    """The first GPU by nvidia-smi's name, or the driver where that program is missing (as in many containers)."""
    driver = (_read(ROOT / "proc/driver/nvidia/version") or "").partition("\n")[0].strip()
    return here.cuda or driver or None


def _has_asset(name: str) -> bool:
    try:
        return asset_path(name).exists()
    except DataError:
        return False


def _metadata(field: str) -> str | None:
    try:
        return metadata.metadata("squeeze")[field]
    except (metadata.PackageNotFoundError, KeyError):
        return None


def _requirements() -> list[str]:
    """What squeeze requires without any extra, as pyproject.toml says; empty where squeeze is not installed."""
    try:
        lines = metadata.requires("squeeze") or []
    except metadata.PackageNotFoundError:
        return []
    return [line for line in lines if (marker := Requirement(line).marker) is None or marker.evaluate({"extra": ""})]


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return None
