"""Where the benchmarks keep things: reports by machine, and trained models, each beside the record of what determined it.

A folder is written whole under another name and then renamed, so that what stands there is never half a model; a record
whose digest is not the wanted one means that code or settings have changed since, and the model is trained again.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from squeeze.provenance import environment

CACHE = Path(__file__).parent / "cache"
"""Outside git: what lies here can be made again."""
RECORD = "training.json"

FOUND = "Found: "
"""How the notes of a report begin that say what was compared in it and what came out; the README shows them."""


def machine() -> str:
    """This machine's folder under benchmarks/results: make, best unit for int8 and cores, such as `xeon-amx-2core`."""
    here = environment()
    make = re.search(r"xeon|epyc|ryzen|core|graviton|neoverse|apple", here.cpu.lower())
    units = {"amx_int8": "amx", "avx512_vnni": "vnni", "avx_vnni": "vnni", "i8mm": "i8mm", "avx2": "avx2"}
    unit = next((name for flag, name in units.items() if flag in here.cpu_flags), "plain")
    return f"{make[0] if make else 'cpu'}-{unit}-{here.cores}core"


def stored(folder: Path, digest: str) -> dict[str, Any] | None:
    """The record in `folder`, if a model stands there that was trained with the settings of this digest."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return record if record.get("digest") == digest and (folder / "model.safetensors").is_file() else None


def store(folder: Path, record: dict[str, Any], fill: Callable[[Path], None]) -> None:
    """Let `fill` write a model into a fresh folder, add its record, and put it in the place of `folder`."""
    fresh, old = (folder.with_name(f"{folder.name}.{suffix}-{os.getpid()}") for suffix in ("tmp", "old"))
    try:
        fresh.mkdir(parents=True)
        fill(fresh)
        (fresh / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
