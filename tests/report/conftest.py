"""Small reports whose rows can be worked out by hand."""

from collections.abc import Sequence
from typing import Any

import pytest

from squeeze.provenance import Environment, digest_bytes, environment
from squeeze.report.schema import Manifest, Measurement, Report, Workload

SHORT = Workload(kind="fixed", batch=1, sequence=128)


class Make:
    """Builds manifests, measurements and reports with everything that a test does not speak of filled in."""

    short = SHORT

    def __init__(self) -> None:
        self.environment = environment().model_copy(update={"git": "abc"})
        self.source = self.manifest("export-0-source")
        self.result = self.manifest("export-1-quantize")

    def manifest(self, name: str) -> Manifest:
        return Manifest(
            name=name, format="onnx", task="text-classification", source="models/x", files={}, parent=None, record=None, data={},
            parameters=8, nonzero_parameters=8, weight_bytes=8, inputs=digest_bytes(b"x"), environment=self.environment,
            created="2026-11-24T00:00:00+00:00", extra={},
        )  # fmt: skip

    def measured(self, artifact: Manifest, quantity: str, values: Sequence[float], **changes: Any) -> Measurement:
        """One value a repeat for what is repeated; without values, one that failed."""
        timed = quantity not in ("correct", "negative_log_likelihood", "weight_bytes", "same_answer")
        fields: dict[str, Any] = {
            "quantity": quantity, "unit": "s", "values": tuple(values), "workload": SHORT if quantity == "latency" else None,
            "artifact": artifact.name, "artifact_digest": artifact.digest, "runtime": "onnxruntime", "device": "cpu", "threads": 2,
            "repeat": tuple(range(len(values))) if timed else (), "error": None if values else "killed by SIGKILL",
        }  # fmt: skip
        return Measurement(**{**fields, **changes})

    def report(self, *measurements: Measurement, **changes: Any) -> Report:
        fields: dict[str, Any] = {
            "title": "a run", "recipe": {}, "manifests": (self.source, self.result), "checks": (), "measurements": measurements,
            "environment": self.environment, "started": "2026-11-24T00:00:00+00:00", "seconds": 1.0, "notes": (), "status": "ok",
            "error": None,
        }  # fmt: skip
        return Report(**{**fields, **changes})

    def pair(self, quantity: str, before: Sequence[float], after: Sequence[float], **changes: Any) -> Report:
        """Source and result with one quantity each."""
        rows = ((self.source, before), (self.result, after))
        return self.report(*(self.measured(m, quantity, values) for m, values in rows), **changes)

    def other_machine(self) -> Environment:
        return self.environment.model_copy(update={"cpu": "Another CPU"})


@pytest.fixture
def make() -> Make:
    return Make()
