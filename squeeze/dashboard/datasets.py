"""Every chart's rows from one report, by kind and variant: the table of what is drawn, and nothing else.

The rows themselves are made in the file of their topic: `pareto`, `timing`, `layers`, `resources`, `course`. The history is over
reports and has a file of its own.
"""

from collections.abc import Callable

from squeeze.dashboard import course, layers, pareto, resources, timing
from squeeze.dashboard.readings import Readings
from squeeze.dashboard.rows import Variants


def datasets(readings: Readings) -> dict[str, Variants]:
    """Kind -> variants that have rows; a kind without any is there and empty."""
    return {kind: {name: v for name, v in dataset(readings).items() if v.rows} for kind, dataset in DATASETS.items()}


DATASETS: dict[str, Callable[[Readings], Variants]] = {
    "pareto": pareto.pareto, "gains": timing.gains, "latency": timing.latency, "generation": timing.generation, "load": timing.load,
    "layers": layers.layers, "time": resources.time, "training": course.training, "floor": resources.floor, "memory": resources.memory,
}  # fmt: skip
"""In the order of the page."""
