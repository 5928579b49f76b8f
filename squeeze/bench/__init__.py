"""Measuring: workloads, one child process for each cell and pass, interleaved repeats, raw values."""

from squeeze.bench.runner import bench
from squeeze.bench.workload import BenchSettings

__all__ = ["BenchSettings", "bench"]
