"""Trained models kept under benchmarks/cache, each beside the record of what determined it.

A folder is written whole under another name and then renamed, so that what stands there is never half a model; a record
whose digest is not the wanted one means that code or settings have changed since, and the model is trained again.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

CACHE = Path(__file__).parent / "cache"
"""Outside git: what lies here can be made again."""
RECORD = "training.json"


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
