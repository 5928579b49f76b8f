"""What crosses a file: manifests of artifacts, and the report with every raw value that was measured.

Raw values are kept and statistics are functions of them, so that a better interval can be drawn tomorrow from a report
of today. A value that cannot be had is a Measurement with `error`; NaN is never a measured value.

Rejected: a database (a report is one file that a colleague can be sent), and dataclasses with hand-written readers
(pydantic names the wrong field). Only pydantic is imported here: dashboards are built on laptops without torch.
"""

import json
import os
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

SCHEMA_VERSION = 1

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
    """Signal to quantization noise; None where nothing was lost or nothing was done."""
    note: str = ""
    """Such as "kept in float: LSTM has no integer kernel yet"."""


class StageRecord(Record):
    """One stage as it was run."""

    kind: str
    settings: dict[str, JsonValue]
    seconds: FiniteFloat
    layers: tuple[LayerRow, ...]
    notes: tuple[str, ...]


class FileEntry(Record):
    """One file of an artifact as it was written."""

    sha256: Sha256
    bytes: int = Field(ge=0)


class Manifest(Record):
    """What an artifact is and all that it came from; `squeeze.json` in its folder."""

    schema_version: int = SCHEMA_VERSION
    name: str
    """The folder's name in a run: "0-source", "1-quantize", "export-1-quantize"."""
    format: Literal["torch", "onnx"]
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
    def digest(self) -> Digest:
        """Digest of the content: two runs of one recipe with one seed agree, on any day and in any folder.

        Left out: when, where and how fast it was made, and every field that has its default, so that a field added by
        a later schema does not change the digests that older children hold of their parents.
        """
        left_out: dict[str, Any] = {"schema_version": True, "environment": True, "created": True, "record": {"seconds"}}
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

    kind: Literal["fixed", "dataset", "generate"]
    batch: int
    sequence: int | None = None
    prompt: int | None = None
    new_tokens: int | None = None
    examples: int | None = None
    order: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for name in NEEDED[self.kind]:
            if getattr(self, name) is None:
                raise ValueError(f"a workload of kind {self.kind!r} needs {name}")
        return self

    @property
    def label(self) -> str:
        """Short name for tables: "1×128", "3000 texts, batches of 50", "128+64 tokens"."""
        if self.kind == "fixed":
            return f"{self.batch}×{self.sequence}"
        if self.kind == "dataset":
            return f"{self.examples} texts, batches of {self.batch}"
        tokens = f"{self.prompt}+{self.new_tokens} tokens"
        return tokens if self.batch == 1 else f"{self.batch}×({tokens})"


NEEDED: dict[str, tuple[str, ...]] = {
    "fixed": ("sequence",),
    "dataset": ("examples",),
    "generate": ("prompt", "new_tokens"),
}


class Measurement(Record):
    """One quantity of one artifact in one runtime: all raw values, or the reason why there are none.

    | quantity | unit | one value for each |
    |---|---|---|
    | latency | s | timed call of a fixed workload |
    | set_time | s | repeat over the whole data set |
    | time_to_first_token | s | generation |
    | decode_rate | tokens/s | generation |
    | peak_memory, baseline_memory | bytes | child process; the baseline is the same child before the model is opened |
    | load_time | s | child process |
    | weight_bytes, folder_bytes | bytes | artifact |
    | negative_log_likelihood | nats | block, summed over its tokens; weights are token counts |
    | correct | | example, 0 or 1 |
    | answer | | example, class id |
    | same_answer | | example, 0 or 1: equal to the source's |
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
