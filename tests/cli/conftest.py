"""The command as it was installed, in a process of its own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Squeeze = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def squeeze() -> Squeeze:
    """Runs `squeeze WORDS` in the folder `where` and waits."""

    def run(*words: object, where: Path) -> subprocess.CompletedProcess[str]:
        command = [Path(sys.executable).with_name("squeeze"), *map(str, words)]
        return subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=300, check=False)

    return run
