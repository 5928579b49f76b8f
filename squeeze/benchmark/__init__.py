"""Measuring: workloads, one child process for each cell and pass, interleaved repeats, raw values."""

from squeeze.benchmark.runner import Measured, bench
from squeeze.benchmark.workload import BenchSettings

__all__ = ["BenchSettings", "Measured", "bench"]
