"""Peak memory of this process, as the kernel counts it."""

import sys
from pathlib import Path


def peak_bytes() -> int:
    """Largest resident set so far, in bytes: VmHWM on Linux (the process's own, not its parent's at fork), else getrusage."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident set of this process now, in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)
