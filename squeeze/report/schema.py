"""What crosses a file: manifests of artifacts, and the report with every raw value that was measured.

Raw values are kept and statistics are functions of them, so that a better interval can be drawn tomorrow from a report
of today. A value that cannot be had is a Measurement with `error`; NaN is never a measured value.

Rejected: a database (a report is one file that a colleague can be sent), and dataclasses with hand-written readers
(pydantic names the wrong field). Only pydantic is imported here: dashboards are built on laptops without torch.
"""

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from squeeze.errors import ReportError
from squeeze.provenance import Digest, Environment, digest_json
from squeeze.report.explained import CurvePoint
from squeeze.report.files import sync as sync
from squeeze.report.files import write_atomically as write_atomically
from squeeze.report.sensitivity_table import SensitivityTable
from squeeze.report.training import TrainingCurve

SCHEMA_VERSION = 2
"""2 (November 2026): load tests, child processes, ceilings, costs and profiles. Reports of version 1 are read as they are."""

Sha256 = Annotated[Digest, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class Record(BaseModel):
    """What every type here shares: frozen, no unknown fields, and JSON that any parser reads (infinity is a string)."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class LayerRow(Record):
    """What a stage did to one weight matrix."""

    name: str
    shape: tuple[int, ...]
    bits: FiniteFloat
    """Stored bits for each weight, scales included."""
    sparsity: FiniteFloat
    """Share of zeros, [0, 1]."""
    sqnr_db: FiniteFloat | None
    """Signal to quantization noise of the weights; None where nothing was lost or nothing was done, and where it means nothing:
    a method that makes one column up for another moves weights away from their nearest integers on purpose."""
    output_sqnr_db: FiniteFloat | None = None
    """The same of the layer's outputs on the calibration texts; None where they were not looked at."""
    sensitivity: FiniteFloat | None = None
    """Distance of the network's answers from the float ones where this layer alone is quantized; None where it was not measured."""
    sensitivity_unit: str = ""
    """Such as "nats per token"."""
    note: str = ""
    """Such as "kept in float: LSTM has no integer kernel yet"."""


class StageRecord(Record):
    """One stage as it was run."""

    kind: str
    settings: dict[str, JsonValue]
    seconds: FiniteFloat
    layers: tuple[LayerRow, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    """What is known to be bad about this choice, on the machine that made it, each with its remedy."""
    curve: tuple[CurvePoint, ...] = ()
    training: TrainingCurve | None = None
    """How it went, where the stage trains."""
    sensitivity: SensitivityTable | None = None
    """What each matrix lost alone, where sparsity was spread by that."""
    predicted_bytes: int | None = None
    """Of the artifact's weight files, computed before they were written; the manifest's `weight_bytes` is what came out."""


class FileEntry(Record):
    """One file of an artifact as it was written."""

    sha256: Sha256
    bytes: int = Field(ge=0)


class Manifest(Record):
    """What an artifact is and all that it came from; `squeeze.json` in its folder."""

    schema_version: int = SCHEMA_VERSION
    name: str
    """The folder's name in a run: "0-source", "1-quantize", "export-1-quantize"."""
    format: Literal["torch", "onnx", "openvino", "gguf"]
    task: str
    source: str
    """The trained model that the chain began with, as the user named it."""
    files: dict[str, FileEntry]
    """Path in the folder, with `/`, to what lies there; `squeeze.json` itself is not listed."""
    parent: Sha256 | None
    """`digest` of the artifact that this one was made from."""
    record: StageRecord | None
    data: dict[str, Sha256]
    """Digest of every split that was used."""
    parameters: int
    nonzero_parameters: int
    weight_bytes: int
    """Bytes of all weight files on disk."""
    inputs: Sha256
    """Digest of all that determined this artifact, known before it is made: equal inputs mean that it can be reused."""
    environment: Environment
    created: str
    """ISO 8601, UTC."""
    extra: dict[str, JsonValue]

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name or "\0" in name:
                raise ValueError(f"file {name!r} is not a plain path inside the folder")
        return files

    @property
    def is_peer(self) -> bool:
        """Whether another tool made it."""
        return self.extra.get("made_by") == "another tool"

    @property
    def digest(self) -> Digest:
        """Digest of the content: two runs of one recipe with one seed agree, on any day and in any folder.

        Left out: when, where and how fast it was made, and every field that has its default, so that a field added by
        a later schema does not change the digests that older children hold of their parents.
        """
        told = {"seconds", "warnings", "curve", "sensitivity", "predicted_bytes"}
        left_out: dict[str, Any] = {"schema_version": True, "environment": True, "created": True, "record": told}
        return digest_json(self.model_dump(mode="json", exclude=left_out, exclude_defaults=True))


class Check(Record):
    """One comparison of an export with its source; `value` may be infinite where there is nothing to compare."""

    name: str
    value: float
    limit: float
    passed: bool
    """value <= limit"""
    detail: str = ""


class ArtifactChecks(Record):
    """All checks of one artifact, named as in its manifest."""

    artifact: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """True where every check passed."""
        return all(check.passed for check in self.checks)


class Workload(Record):
    """What was asked of a session while it was timed. `batch` and `sequence` count texts and tokens."""

    kind: Literal["fixed", "dataset", "generate", "closed", "open"]
    batch: int
    sequence: int | None = None
    """None in a load test: held-out texts at their own lengths."""
    prompt: int | None = None
    new_tokens: int | None = None
    examples: int | None = None
    order: str | None = None
    callers: int | None = None
    """Requests that are worked on at once."""
    rate: FiniteFloat | None = None
    """Mean arrivals a second, Poisson; None where the highest rate is sought."""
    limit_seconds: FiniteFloat | None = None
    """What the 99th percentile must not exceed."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for name in NEEDED[self.kind]:
            if getattr(self, name) is None:
                raise ValueError(f"a workload of kind {self.kind!r} needs {name}")
        return self

    @property
    def label(self) -> str:
        """Short name for tables: "1×128", "3000 texts, batches of 50", "128+64 tokens", "4 callers, 1×128"."""
        if self.kind == "fixed":
            return f"{self.batch}×{self.sequence}"
        if self.kind == "dataset":
            order = "" if self.order in (None, "sorted") else f", {self.order}"
            return f"{self.examples} texts, batches of {self.batch}{order}"
        if self.kind in ("closed", "open"):
            return self._load_label
        tokens = f"{self.prompt}+{self.new_tokens} tokens"
        return tokens if self.batch == 1 else f"{self.batch}×({tokens})"

    @property
    def _load_label(self) -> str:
        what = "real texts" if self.sequence is None else f"{self.batch}×{self.sequence}"
        if self.kind == "closed":
            return f"{self.callers} caller{'' if self.callers == 1 else 's'}, {what}"
        if self.rate is not None:
            return f"{self.rate:g}/s arriving, {what}"
        return f"p99 within {1e3 * (self.limit_seconds or 0):g} ms, {what}"


NEEDED: dict[str, tuple[str, ...]] = {
    "fixed": ("sequence",),
    "dataset": ("examples",),
    "generate": ("prompt", "new_tokens"),
    "closed": ("callers",),
    "open": ("callers",),
}


class Measurement(Record):
    """One quantity of one artifact in one runtime: all raw values, or the reason why there are none.

    | quantity | unit | one value for each |
    |---|---|---|
    | latency | s | timed call of a fixed workload |
    | set_time | s | repeat over the whole data set |
    | time_to_first_token, time_per_output_token | s | generation; the latter is the mean over its later tokens |
    | decode_rate | tokens/s | generation, all texts of the batch together, first tokens left out |
    | request_latency | s | request of a load test, from its arrival (open loop) or call (closed) to its answer |
    | throughput | requests/s | repeat of a load test: requests answered a second |
    | highest_rate | requests/s | repeat: the highest arrival rate tried that kept the 99th percentile within the limit |
    | peak_memory, baseline_memory | bytes | child process; the baseline is the same child before the model is opened |
    | steady_memory | bytes | child process, resident after the workload |
    | cuda_allocated, cuda_reserved | bytes | child process, peaks as torch counts them |
    | load_time, cold_latency | s | child process; the latter is the first answer after loading |
    | energy | J | call of a fixed workload or generation: the whole package's counter, divided by calls |
    | weight_bytes, folder_bytes, compressed_bytes | bytes | artifact; compressed is zstd, what a download costs |
    | negative_log_likelihood | nats | block, summed over its tokens; weights are token counts |
    | token_log_likelihood | nats | predicted token |
    | correct | | example, 0 or 1 |
    | answer | | example, class id |
    | same_answer | | example or predicted token, 0 or 1: equal to the source's |
    | kl_to_source | nats | example, or position of a text: Σ p log(p / q), p the source's probabilities |
    | logit_error | | artifact: relative to the source's |
    | cosine_to_source | | example |
    """

    quantity: str
    unit: str
    values: tuple[FiniteFloat, ...]
    weights: tuple[FiniteFloat, ...] | None = None
    """How much each value counts; None: all alike."""
    warmups: tuple[FiniteFloat, ...] = ()
    """Values of the calls before the timed ones, kept so that a reader can judge whether they were enough."""
    workload: Workload | None
    artifact: str
    """The manifest's name."""
    artifact_digest: Sha256
    runtime: str
    device: str
    threads: int | None
    dtype: str | None = None
    """What the runtime was told to compute in; None: the types that the artifact's files hold."""
    repeat: tuple[int, ...] = ()
    """Repeat index of each value, so that the values of two artifacts pair up; () where nothing was repeated."""
    error: str | None = None
    note: str = ""

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        for name, column in (("weights", self.weights), ("repeat", self.repeat or None)):
            if column is not None and len(column) != len(self.values):
                raise ValueError(f"{self.quantity} has {len(self.values)} values but {len(column)} in {name}")
        if not self.values and self.error is None:
            raise ValueError(f"{self.quantity} has neither values nor the error that explains why")
        return self


class ChildRun(Record):
    """One child process of a bench: what it did, when, and how quiet the machine was meanwhile."""

    purpose: str
    """latency, memory, quality, load, energy, profile"""
    artifact: str
    runtime: str
    threads: int
    repeat: int
    started: FiniteFloat
    """Seconds after the bench began."""
    seconds: FiniteFloat
    cpu_seconds: FiniteFloat
    """Processor time of the child itself."""
    others: FiniteFloat | None
    """Share of the cores' time that other programs of this machine used; None where the kernel does not tell."""
    stolen: FiniteFloat | None
    """Share of the cores' time that the hypervisor gave to other guests."""
    resumed: bool = False
    """Measured before an interruption and taken over."""
    error: str | None = None


class Bandwidth(Record):
    """How fast written pages are read again and again from a working set of this size."""

    working_set: int
    """Bytes."""
    bytes_per_second: FiniteFloat


class Ceilings(Record):
    """The best that this machine was seen to do, with so many threads: `squeeze.benchmark.ceilings` measures it."""

    threads: int
    bandwidth: tuple[Bandwidth, ...]
    """Smallest working set first."""
    operations: dict[str, FiniteFloat]
    """Arithmetic ("float32", "int8", "bfloat16") to operations a second; a multiplication and its addition are two."""
    measured: str
    """ISO 8601, UTC."""


class Cost(Record):
    """What an artifact must do for a token, counted from its configuration and never measured."""

    artifact: str
    artifact_digest: Sha256
    parameters: int
    weight_bytes: int
    read_bytes: int | None
    """Weights that one decoding step, or one call of an encoder, reads: all but the unused rows of embedding tables; None where
    the configuration does not tell, as of another tool's file."""
    operations_per_token: FiniteFloat | None
    """Two for each weight that a token is multiplied with; None where the configuration does not tell."""
    operations_per_pair: FiniteFloat | None
    """Attention's operations for each pair of tokens, all layers together; in a decoder a pair is counted once."""
    cache_bytes_per_token: FiniteFloat | None
    """Key-value cache; None for models without one."""
    arithmetic: str
    """The rate of the ceilings that its matrix products can reach: float32, int8 …"""


class ProfileRow(Record):
    """One operator of one layer."""

    operator: str
    layer: str
    """As in the model's own names: "encoder.layer.0.attention"; "" where the graph does not tell."""
    seconds: FiniteFloat
    """Of one call of the workload."""
    count: FiniteFloat
    """Kernels run in one call."""


class Profile(Record):
    """Where the time goes: the runtime's own profiler, while it ran one workload."""

    artifact: str
    artifact_digest: Sha256
    runtime: str
    threads: int
    workload: Workload
    calls: int
    seconds: FiniteFloat
    """Of one call as the profiled session took it, profiling included."""
    rows: tuple[ProfileRow, ...]


class Report(Record):
    """Everything that a run did and measured; `report.json`."""

    schema_version: int = SCHEMA_VERSION
    title: str
    recipe: dict[str, JsonValue]
    """As run: defaults filled in, overrides applied."""
    manifests: tuple[Manifest, ...]
    """The whole chain, source first."""
    checks: tuple[ArtifactChecks, ...]
    measurements: tuple[Measurement, ...]
    data: dict[str, Sha256] = {}
    """Digest of every split of the data."""
    environment: Environment
    started: str
    """ISO 8601, UTC."""
    seconds: FiniteFloat
    notes: tuple[str, ...]
    status: Literal["ok", "failed"]
    error: str | None
    children: tuple[ChildRun, ...] = ()
    """In the order in which they ran."""
    ceilings: Ceilings | None = None
    costs: tuple[Cost, ...] = ()
    profiles: tuple[Profile, ...] = ()

    def _repr_html_(self) -> str:
        from squeeze.report.page import render_body

        return render_body(self)


def read_report(path: Path) -> Report:
    """A report from its file. Raises ReportError naming the file where it is absent, torn, foreign or of a newer
    schema.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(
            f"{path} is not whole JSON ({error}). Write it again: squeeze run or squeeze bench."
        ) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or "measurements" not in content:
        raise ReportError(f"{path} is JSON but not a squeeze report: it has no schema_version or no measurements.")
    if version > SCHEMA_VERSION:
        raise ReportError(f"{path} has schema {version}, newer than {SCHEMA_VERSION}. Upgrade: pip install -U squeeze.")
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        raise ReportError(f"{path} is not a squeeze report of schema {version}: {first_fault(error)}.") from error


def write_report(report: Report, path: Path) -> None:
    """Write the report so that a reader sees the old file or the new one, never half of either. Raises ReportError."""
    try:
        write_atomically(path, report.model_dump_json(indent=1) + "\n")
    except OSError as error:
        fault = error.strerror or error
        raise ReportError(f"{path} cannot be written: {fault}. What stood there before is whole.") from error


def first_fault(error: ValidationError) -> str:
    """The first fault that pydantic found, as `files.model.onnx: what is wrong`."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where}: {fault['msg']}" if where else fault["msg"]
