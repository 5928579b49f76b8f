"""Peak memory: read in fresh processes, because this one's peak is whatever the tests before it needed."""

import subprocess
import sys

import psutil
import pytest

from squeeze.benchmark.memory import peak_bytes

BLOCK = 300_000_000


def printed_by(code: str) -> list[int]:
    """The integers that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_the_peak_is_in_bytes_and_at_least_what_is_resident_now() -> None:
    resident = psutil.Process().memory_info().rss
    # The kernel counts pages in batches for each thread, so that two of its own figures differ by some of them.
    assert resident - 2_000_000 <= peak_bytes() < psutil.virtual_memory().total


def test_the_peak_rises_by_what_is_allocated_and_stays_when_it_is_freed() -> None:
    code = f"""
from squeeze.benchmark.memory import peak_bytes
before = peak_bytes()
block = b"x" * {BLOCK}
held = peak_bytes()
del block
print(before, held, peak_bytes())
"""
    before, held, freed = printed_by(code)
    assert 0.95 * BLOCK < held - before < 1.2 * BLOCK
    assert freed > 0.99 * held  # the kernel's figure wavers by some pages


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's own peak from its parent's at fork")
def test_a_child_does_not_inherit_the_peak_of_a_large_parent() -> None:
    code = f"""
import subprocess, sys
block = b"x" * {BLOCK}
subprocess.run([sys.executable, "-c", "from squeeze.benchmark.memory import peak_bytes; print(peak_bytes())"], check=True)
"""
    (child,) = printed_by(code)
    assert 0 < child < BLOCK
