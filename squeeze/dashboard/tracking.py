"""A finished run in the files of MLflow, TensorBoard or Weights & Biases, for teams that collect their runs there.

Offline always: each tool writes into a folder that is named, and whoever wants the run on a server sends it there himself
(`wandb sync`, `mlflow ui`). What is logged is the same for all three (`Log`), figures as the dashboard reads them, so that no tool
shows another number than the report. None of them has a place for raw values: report.json goes along as a file. Rejected: logging while
the run goes on (a tool that is slow or down must not cost a run), and one call-back interface for all tools (each knows something the
others do not; three short functions say what becomes of it).
"""

import importlib
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from squeeze.dashboard.readings import Readings
from squeeze.errors import ReportError, nearest
from squeeze.report.headline import headline
from squeeze.report.markdown import escaped
from squeeze.report.noise import warnings
from squeeze.report.schema import Report
from squeeze.report.stats import Interval
from squeeze.report.store import machine_id
from squeeze.report.summary import label, names, summarize
from squeeze.report.text import visible

PROJECT = "squeeze"
"""MLflow's experiment and Weights & Biases' project."""
STORE = "sqlite:///{}/mlflow.db"
"""MLflow 3 refuses stores of plain files."""
UNSAFE = re.compile(r"[^\w.\- :]+")
"""What MLflow allows in no name, the slash aside, which all three read as a level."""
LONGEST_NAME, LONGEST_VALUE = 250, 500
"""Characters that MLflow's stores take, the oldest of them."""


@dataclass(frozen=True)
class Curve:
    """One quantity of one training."""

    group: str
    """ "training/1-distill"."""
    name: str
    points: tuple[tuple[int, float, float], ...]
    """(step, Unix time, value)"""


@dataclass(frozen=True)
class Log:
    """What is told of a run, whatever the tool."""

    name: str
    began: float
    """Unix time."""
    seconds: float
    failed: bool
    settings: dict[str, str | float | bool]
    """The recipe as run, flat: "stages.0.kind"."""
    figures: dict[str, float]
    """ "latency 1x128/export-1-quantize onnxruntime/median": the value and, where there is one, the ends of its interval."""
    curves: tuple[Curve, ...]
    words: dict[str, str]
    """Verdict, machine, versions, what failed."""
    file: Path
    """report.json"""


def log_to(report: Report, file: Path, target: str) -> str:
    """Log a report, read from `file`, to TOOL:FOLDER; says where it lies and how to look at it.

    Raises ReportError for an unknown tool, one that is not installed (with the pip line), and a folder that cannot be written.
    """
    tool, colon, place = target.partition(":")
    if tool not in TOOLS:
        raise ReportError(f"--log-to {target!r}: {tool!r} is unknown. {nearest(tool, TOOLS)}")
    if not colon or not place:
        raise ReportError(f"--log-to {target} names no folder. Write {tool}:FOLDER.")
    folder = Path(place).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return TOOLS[tool](told(report, file), folder.resolve())
    except OSError as error:
        raise ReportError(f"{folder} cannot take a log: {error.strerror or error}. Name another folder.") from error


def told(report: Report, file: Path) -> Log:
    """All that is logged."""
    return Log(
        name=visible(report.title), began=_moment(report.started), seconds=report.seconds, failed=report.status == "failed",
        settings=dict(_flat(report.recipe)), figures=_figures(report), curves=tuple(_curves(report)), words=_words(report), file=file,
    )  # fmt: skip


def to_mlflow(log: Log, folder: Path) -> str:
    """A run of the experiment "squeeze" in an MLflow store in that folder. Raises ReportError where MLflow refuses it."""
    if "?" in str(folder):
        raise ReportError(
            f"{folder} holds a question mark, which ends a path in MLflow's addresses. Name another folder."
        )
    # Before it is imported: it would tell its makers of each use.
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    _module("mlflow", "mlflow")
    for name in ("sqlalchemy", "alembic"):  # what its light distribution leaves to be asked for
        _module(name, "mlflow")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow.exceptions import MlflowException

    store = STORE.format(folder)
    try:
        run = _into_mlflow(log, folder, store)
    except MlflowException as error:
        raise ReportError(f"MLflow refuses {store}: {error.message}") from error
    return f"{folder}: run {run} of experiment {PROJECT}. To see it, with the whole of MLflow: mlflow ui --backend-store-uri {store}"


def _into_mlflow(log: Log, folder: Path, store: str) -> str:
    """The id of the new run."""
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name(PROJECT)
    number = (
        client.create_experiment(PROJECT, (folder / "artifacts").as_uri())
        if experiment is None
        else experiment.experiment_id
    )
    began, ended = _milliseconds(log.began), _milliseconds(log.began + log.seconds)
    run: str = client.create_run(number, start_time=began, run_name=log.name).info.run_id
    metrics = [Metric(name, value, ended, 0) for name, value in log.figures.items()]
    metrics += [
        Metric(f"{curve.group}/{curve.name}", value, _milliseconds(moment), step)
        for curve in log.curves
        for step, moment, value in curve.points
    ]
    for some in _batches(metrics, 1000):
        client.log_batch(run, metrics=some)
    for some in _batches([Param(name, str(value)) for name, value in log.settings.items()], 100):
        client.log_batch(run, params=some)
    client.log_batch(run, tags=[RunTag(name, value) for name, value in log.words.items()])
    client.log_text(run, log.file.read_text("utf-8"), "report.json")
    client.set_terminated(run, "FAILED" if log.failed else "FINISHED", ended)
    return run


def to_tensorboard(log: Log, folder: Path) -> str:
    """Scalars (32 bits, as TensorBoard keeps them), the recipe as hyperparameters, words as text, report.json beside them."""
    _module("tensorboard", "tensorboard")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    place = folder / f"{datetime.fromtimestamp(log.began, UTC):%Y%m%dT%H%M%SZ}-{_segment(log.name).replace(' ', '-')}"
    for older in place.glob("events.out.tfevents.*"):
        older.unlink()  # of the same run, logged before
    writer = EventFileWriter(str(place))

    def scalar(name: str, value: float, step: int, moment: float) -> None:
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
        writer.add_event(Event(wall_time=moment, step=step, summary=summary))

    ended = log.began + log.seconds
    writer.add_event(Event(wall_time=log.began, summary=hparams_pb(log.settings, start_time_secs=log.began)))
    for name, value in log.figures.items():
        scalar(name, value, 0, ended)
    for curve in log.curves:
        for step, moment, value in curve.points:
            scalar(f"{curve.group}/{curve.name}", value, step, moment)
    shown = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    for name, words in log.words.items():
        tensor = TensorProto(dtype=DT_STRING, string_val=[escaped(words).encode("utf-8", "backslashreplace")])
        value = Summary.Value(tag=f"squeeze/{name}", metadata=shown, tensor=tensor)
        writer.add_event(Event(wall_time=ended, summary=Summary(value=[value])))
    writer.close()
    shutil.copyfile(log.file, place / "report.json")
    return f"{place}. To see it: tensorboard --logdir {folder}"


def to_wandb(log: Log, folder: Path) -> str:
    """An offline run: nothing is sent, and no machine is described but the one in the report."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    wandb = _module("wandb", "wandb")
    settings = wandb.Settings(
        mode="offline", silent=True, console="off", disable_git=True, disable_code=True, save_code=False, x_disable_stats=True,
        x_disable_meta=True, x_save_requirements=False,
    )  # fmt: skip
    run = wandb.init(
        project=PROJECT,
        name=log.name,
        dir=str(folder),
        config=log.settings,
        notes=escaped(log.words.get("verdict", "")),
        settings=settings,
    )
    for group, steps in _by_step(log.curves).items():
        run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        for step, values in steps.items():
            run.log({f"{group}/step": step, **{f"{group}/{name}": value for name, value in values.items()}})
    run.summary.update({**log.figures, **log.words})
    kept = Path(run.dir) / "report.json"
    shutil.copyfile(log.file, kept)
    run.save(str(kept), base_path=run.dir, policy="now")
    place = Path(run.dir).parent
    run.finish(exit_code=1 if log.failed else 0)
    return f"{place}. To send it to a server: wandb sync {place}"


TOOLS: dict[str, Callable[[Log, Path], str]] = {"mlflow": to_mlflow, "tensorboard": to_tensorboard, "wandb": to_wandb}


def _module(name: str, extra: str) -> Any:
    """A tool's package. Raises ReportError with the pip line where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ReportError(f"--log-to {extra} needs the package {name}: pip install 'squeeze[{extra}]'.") from error


def _figures(report: Report) -> dict[str, float]:
    """Every quantity of every cell with its interval, how many times better the result is, and the artifacts' sizes."""
    readings = Readings("", report)
    figures = _Names()
    for reading in readings.all:
        if reading.m.values and reading.text:
            figures.add((label(reading.m), readings.series(reading.m)), reading.value)
    called = names(report)
    for manifest in report.manifests:
        for row in summarize(report, manifest):
            if row.gain is not None:
                figures.add(
                    ("times better", called[manifest.digest], f"{row.label} {row.runtime} {row.where}"), row.gain
                )
        counts = {
            "weight bytes": manifest.weight_bytes,
            "parameters": manifest.parameters,
            "nonzero parameters": manifest.nonzero_parameters,
        }
        for name, value in counts.items():
            figures.add(("artifact", called[manifest.digest], name), Interval(value, math.nan, math.nan, 1), ends=False)
    return figures.found


class _Names:
    """Figures under names that all tools take, each its own."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self._taken: set[str] = set()

    def add(self, levels: tuple[str, ...], value: Interval, *, ends: bool = True) -> None:
        """The value and the finite ends of its interval; what is no number is left out, since none of the tools can draw it."""
        plain = name = "/".join(map(_segment, levels))[: LONGEST_NAME - 16]
        number = 1
        while name in self._taken:
            number += 1
            name = f"{plain} no {number}"
        self._taken.add(name)
        parts = (
            {f"{name}/value": value.value, f"{name}/low": value.low, f"{name}/high": value.high}
            if ends
            else {name: value.value}
        )
        self.found |= {part: float(number) for part, number in parts.items() if math.isfinite(number)}


def _curves(report: Report) -> Iterator[Curve]:
    called = names(report)
    for manifest in report.manifests:
        curve = manifest.record.training if manifest.record is not None else None
        if curve is None or not curve.steps:
            continue
        group = f"training/{_segment(called[manifest.digest])}"
        began = _moment(manifest.created) - curve.seconds[-1]
        moments = [began + seconds for seconds in curve.seconds]
        columns = {
            "loss": curve.loss,
            **({f"loss {name}": v for name, v in curve.shares.items()} if len(curve.shares) > 1 else {}),
        }
        for name, values in {**columns, "rate": curve.rate, "tokens": curve.tokens}.items():
            yield Curve(group, _segment(name), tuple(zip(curve.steps, moments, map(float, values), strict=True)))
        if curve.validations:
            after = dict(zip(curve.steps, moments, strict=True))
            points = tuple((v.step, after.get(v.step, moments[-1]), v.value) for v in curve.validations)
            yield Curve(group, _segment(f"held out {curve.metric}"), points)


def _words(report: Report) -> dict[str, str]:
    found = report.environment
    failed = [f"{label(m)} of {m.artifact} in {m.runtime}: {m.error}" for m in report.measurements if m.error]
    failed += [f"check {c.name} of {group.artifact}" for group in report.checks for c in group.checks if not c.passed]
    words = {
        "verdict": headline(report), "status": report.status, "error": report.error or "", "failed": "; ".join(failed),
        "machine": f"{found.cpu}, {found.cores} cores", "machine id": machine_id(found), "git": found.git or "",
        "squeeze": found.squeeze, "packages": ", ".join(f"{name} {version}" for name, version in found.packages.items()),
        "notes": "; ".join(report.notes), "warnings": "; ".join(warnings(report)),
    }  # fmt: skip
    return {name: visible(text) for name, text in words.items() if text}


def _flat(content: Any, name: str = "") -> Iterator[tuple[str, str | float | bool]]:
    """Leaves of nested JSON under dotted names; what has none (null, an empty list) is left out."""
    if isinstance(content, Mapping | list):
        parts = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, value in parts:
            yield from _flat(value, f"{name}.{_segment(str(key))}".removeprefix("."))
    elif content is not None:
        yield name[:LONGEST_NAME], visible(content)[:LONGEST_VALUE] if isinstance(content, str) else content


def _segment(text: str) -> str:
    """One level of a name: no slash, no dots at its ends, nothing that MLflow refuses."""
    plain = UNSAFE.sub(" ", visible(text).replace("×", "x"))
    return re.sub(r"\s+", " ", plain).strip(" .") or "unnamed"


def _by_step(curves: Sequence[Curve]) -> dict[str, dict[int, dict[str, float]]]:
    """Group -> step -> quantity -> value: Weights & Biases logs all of a step at once."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for curve in curves:
        for step, _, value in curve.points:
            found.setdefault(curve.group, {}).setdefault(step, {})[curve.name] = value
    return {group: dict(sorted(steps.items())) for group, steps in found.items()}


def _batches(rows: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    return (rows[start : start + most] for start in range(0, len(rows), most))


def _moment(text: str) -> float:
    """Unix time of an ISO date; 0 where the text is none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)
