"""What other tools' own readers find in the files that `squeeze report --log-to` writes."""

import json
import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from squeeze.dashboard.readings import Readings
from squeeze.dashboard.tracking import TOOLS, log_to, told
from squeeze.errors import ReportError
from squeeze.report.schema import Report, write_report

RECIPE = {"name": "a run", "stages": [{"kind": "quantize", "scheme": "int8", "keep": []}], "seed": 0, "export": None}
LOSSES = [(1, 3.0), (2, 2.0), (3, 1.5)]


@pytest.fixture(scope="module")
def logged(make: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """A report with a training, a failed cell and a name that no tool takes as it is, in its file."""
    report = make.full(title="a run <img> ../x", recipe=RECIPE)
    file = tmp_path_factory.mktemp("run") / "report.json"
    write_report(report, file)
    return report, file


def latency(report: Report) -> tuple[float, float, float]:
    """Median and interval of the result's latency as the dashboard shows them."""
    reading = next(r for r in Readings("", report).of("latency") if r.m.artifact == "1-quantize")
    return reading.value.value, reading.value.low, reading.value.high


def test_every_tool_gets_medians_with_intervals_sizes_curves_recipe_and_words(logged: tuple[Report, Path]) -> None:
    report, file = logged
    log = told(report, file)
    name = "latency 1x128/1-quantize torch"
    assert tuple(log.figures[f"{name}/{part}"] for part in ("value", "low", "high")) == latency(report)
    assert log.figures["artifact/1-quantize/weight bytes"] == 1000
    assert log.figures["artifact/1-quantize/nonzero parameters"] == 900
    assert log.figures["times better/1-quantize/latency 1x128 torch cpu 2 threads/value"] == pytest.approx(2.0)
    assert log.settings == {"name": "a run", "stages.0.kind": "quantize", "stages.0.scheme": "int8", "seed": 0}
    loss = next(c for c in log.curves if c.name == "loss")
    assert loss.group == "training/1-quantize"
    assert [(step, value) for step, _, value in loss.points] == LOSSES
    assert [moment for _, moment, _ in loss.points] == sorted(moment for _, moment, _ in loss.points)
    assert "latency, 1×128 of 2-broken in torch: killed by SIGKILL" in log.words["failed"]
    assert all(math.isfinite(value) for value in log.figures.values())


def test_two_names_that_become_one_stay_two_figures(make: Any, tmp_path: Path) -> None:
    one, other = make.manifest("a,b"), make.manifest("a;b", parameters=2000)
    report = make.report((one, other), [make.measured(m, "latency", [v] * 3) for m, v in ((one, 1.0), (other, 2.0))])
    figures = told(report, tmp_path).figures
    assert (figures["latency/a b torch/value"], figures["latency/a b torch no 2/value"]) == (1.0, 2.0)


def test_a_run_that_failed_is_logged_as_failed_and_a_report_without_anything_can_be(make: Any, tmp_path: Path) -> None:
    log = told(make.report((), (), status="failed", error="out of memory", started="no date"), tmp_path)
    assert (log.failed, log.figures, log.words["error"]) == (True, {}, "out of memory")


def test_tensorboard_reads_the_figures_curves_recipe_and_words(logged: tuple[Report, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs: pip install 'squeeze[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

    report, file = logged
    said = log_to(report, file, f"tensorboard:{tmp_path / 'logs'}")
    log_to(report, file, f"tensorboard:{tmp_path / 'logs'}")
    (place,) = (tmp_path / "logs").iterdir()
    assert place.name == "20261124T000000Z-a-run-img-..-x"
    assert str(place) in said
    assert f"tensorboard --logdir {tmp_path / 'logs'}" in said
    found = EventAccumulator(str(place), {"scalars": 0, "tensors": 0}).Reload()
    (value,) = found.Scalars("latency 1x128/1-quantize torch/value")
    assert value.value == pytest.approx(latency(report)[0], rel=1e-6)
    assert [(event.step, event.value) for event in found.Scalars("training/1-quantize/loss")] == LOSSES
    assert (
        found.Tensors("squeeze/failed")[0].tensor_proto.string_val[0].decode().startswith("latency, 1×128 of 2-broken")
    )
    start = found.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    assert parse_session_start_info_plugin_data(start).hparams["stages.0.scheme"].string_value == "int8"
    assert (place / "report.json").read_bytes() == file.read_bytes()


def test_mlflow_reads_the_figures_curves_recipe_and_the_report(
    logged: tuple[Report, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    for name in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(name, reason="needs: pip install 'squeeze[mlflow]'")
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "true")
    from mlflow.tracking import MlflowClient

    report, file = logged
    said = log_to(report, file, f"mlflow:{tmp_path / 'store'}")
    log_to(report.model_copy(update={"status": "failed"}), file, f"mlflow:{tmp_path / 'store'}")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'store'}/mlflow.db")
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path / 'store'}/mlflow.db" in said
    runs = client.search_runs(
        [client.get_experiment_by_name("squeeze").experiment_id], order_by=["attributes.status DESC"]
    )
    assert [run.info.status for run in runs] == ["FINISHED", "FAILED"]
    data = runs[0].data
    assert data.metrics["latency 1x128/1-quantize torch/value"] == latency(report)[0]
    assert data.metrics["latency 1x128/1-quantize torch/low"] == latency(report)[1]
    assert data.params["stages.0.scheme"] == "int8"
    assert data.tags["verdict"] == told(report, file).words["verdict"]
    history = client.get_metric_history(runs[0].info.run_id, "training/1-quantize/loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == LOSSES
    kept = client.download_artifacts(runs[0].info.run_id, "report.json", str(tmp_path))
    assert Path(kept).read_bytes() == file.read_bytes()


def records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file, which is a LevelDB log: blocks of 32 kB, each part with checksum, length and kind. The tool's own
    reader is inside its binary and only sends them to a server.
    """
    assert content[:4] == b":W&B"
    place, whole = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a record in one part, or its last part
            yield whole
            whole = b""


def test_an_offline_run_of_weights_and_biases_holds_figures_curve_recipe_and_the_report(
    logged: tuple[Report, Path], tmp_path: Path
) -> None:
    pytest.importorskip("wandb", reason="needs: pip install 'squeeze[wandb]'")
    from wandb.proto.wandb_internal_pb2 import Record

    report, file = logged
    # In a process of its own: the tool keeps a service running that outlives the call.
    code = "import sys; from pathlib import Path; from squeeze.report.schema import read_report; "
    code += "from squeeze.dashboard.tracking import log_to; "
    code += "file = Path(sys.argv[1]); print(log_to(read_report(file), file, sys.argv[2]))"
    command = [sys.executable, "-W", "error", "-c", code, str(file), f"wandb:{tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (place,) = tmp_path.glob("wandb/offline-run-*")
    assert f"wandb sync {place}" in done.stdout
    summary: dict[str, Any] = {}
    config: dict[str, Any] = {}
    losses = []
    for content in records(next(place.glob("*.wandb")).read_bytes()):
        record = Record()
        record.ParseFromString(content)
        summary |= {u.key or u.nested_key[0]: json.loads(u.value_json) for u in record.summary.update}
        config |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if "training/1-quantize/loss" in row:
            losses.append((row["training/1-quantize/step"], row["training/1-quantize/loss"]))
    assert summary["latency 1x128/1-quantize torch/value"] == latency(report)[0]
    assert config["stages.0.scheme"] == "int8"
    assert losses == LOSSES
    assert (place / "files" / "report.json").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_that_is_not_installed_is_named_with_its_pip_line(
    tool: str, logged: tuple[Report, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    for name in [name for name in sys.modules if name.split(".")[0] == tool]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, tool, None)
    with pytest.raises(
        ReportError, match=rf"--log-to {tool} needs the package {tool}: pip install 'squeeze\[{tool}\]'."
    ):
        log_to(*logged, f"{tool}:{tmp_path}")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mlflo:x", "'mlflo' is unknown. Did you mean 'mlflow'? Known: mlflow, tensorboard, wandb."),
        ("mlflow", "--log-to mlflow names no folder. Write mlflow:FOLDER."),
        ("wandb:", "--log-to wandb: names no folder. Write wandb:FOLDER."),
    ],
)
def test_a_target_that_is_none_is_explained(target: str, message: str, logged: tuple[Report, Path]) -> None:
    with pytest.raises(ReportError) as raised:
        log_to(*logged, target)
    assert message in str(raised.value)


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated")
def test_words_that_tensorboard_reads_as_markdown_show_as_text(make: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs: pip install 'squeeze[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    report = make.report(
        (), (), status="failed", error="![x](http://evil.example/x.png) <img src=x> [a](http://evil.example)"
    )
    write_report(report, tmp_path / "report.json")
    log_to(report, tmp_path / "report.json", f"tensorboard:{tmp_path / 'logs'}")
    (place,) = (tmp_path / "logs").iterdir()
    found = EventAccumulator(str(place), {"tensors": 0}).Reload()
    shown = markdown_to_safe_html(found.Tensors("squeeze/error")[0].tensor_proto.string_val[0])
    assert "<img" not in shown
    assert "href" not in shown


def test_a_folder_that_mlflow_cannot_address_is_refused(logged: tuple[Report, Path], tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="holds a question mark"):
        log_to(*logged, f"mlflow:{tmp_path}/a?b")


def test_a_folder_that_is_a_file_is_named(logged: tuple[Report, Path]) -> None:
    with pytest.raises(ReportError, match="report.json cannot take a log: File exists. Name another folder."):
        log_to(*logged, f"tensorboard:{logged[1]}")
