"""Files that appear whole or not at all, and are on the disk before anyone is told of them; those for onlookers appear whole."""

import os
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by way of a sibling `<name>.tmp-<pid>`: fsync the content, rename, fsync the folder. Raises
    OSError.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk: a rename is only safe after what it renames is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leave(path: Path, text: str) -> None:
    """Replace a file that is there for onlookers alone: whole, but not synced, and a file that cannot be written is none."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with suppress(OSError):
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
