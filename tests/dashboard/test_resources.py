"""Rows about the machine: pieces of memory that add up, times that add up, and the share of a floor."""

from typing import Any

import pytest

from squeeze.dashboard import resources
from squeeze.dashboard.readings import Readings
from squeeze.report.floor import floors
from squeeze.report.schema import Profile, ProfileRow, Workload

SHORT = Workload(kind="fixed", batch=1, sequence=128)


def memory(make: Any, **bytes_of: float | None) -> list[tuple[Any, ...]]:
    source = make.manifest("a")
    rows = [make.measured(source, f"{q}_memory", [v] * 3, unit="bytes") for q, v in bytes_of.items() if v is not None]
    found = resources.memory(Readings("0" * 12, make.report([source], rows)))
    return [(row["x"], row["x2"], row["piece"]) for row in found["process"].rows] if found else []


BEFORE, WITH, PEAK = "before the model is opened", "with the model, after the calls", "at the peak"


def test_pieces_of_memory_lie_end_to_end_up_to_the_peak(make: Any) -> None:
    assert memory(make, baseline=1e8, steady=3e8, peak=4e8) == [(0, 1e8, BEFORE), (1e8, 3e8, WITH), (3e8, 4e8, PEAK)]


def test_what_was_not_measured_is_no_piece(make: Any) -> None:
    assert memory(make, baseline=1e8, peak=4e8) == [(0, 1e8, BEFORE), (1e8, 4e8, PEAK)]
    assert memory(make, peak=4e8) == [(0, 4e8, PEAK)]
    assert memory(make, baseline=1e8) == []


def test_a_peak_below_what_was_held_later_is_drawn_as_it_was_measured(make: Any) -> None:
    assert memory(make, baseline=1e8, steady=4e8, peak=3.9e8) == [
        (0, 1e8, BEFORE),
        (1e8, 4e8, WITH),
        (3.9e8, 3.9e8, PEAK),
    ]


def profile(make: Any, name: str, seconds: dict[str, float]) -> Any:
    manifest = make.manifest(name)
    rows = tuple(
        ProfileRow(operator=op, layer=f"layer.{n % 2}", seconds=s, count=1.0)
        for n, (op, s) in enumerate(seconds.items())
    )
    return Profile(
        artifact=name,
        artifact_digest=manifest.digest,
        runtime="onnxruntime",
        threads=2,
        workload=SHORT,
        calls=3,
        seconds=9.0,
        rows=rows,
    )


def test_the_time_of_an_artifact_adds_up_whatever_is_folded(make: Any) -> None:
    before = profile(make, "a", {f"op{n}": 1.0 + n for n in range(20)})
    after = profile(make, "b", {f"op{n}": 0.5 for n in range(15, 20)} | {"new": 99.0})
    readings = Readings("0" * 12, make.report([make.manifest("a"), make.manifest("b")], (), profiles=(before, after)))
    found = resources.time(readings)
    assert list(found) == ["by operator, 1×128", "by layer, 1×128"]
    rows = found["by operator, 1×128"].rows
    for series, whole in (("a, onnxruntime, 2 threads", 210.0), ("b, onnxruntime, 2 threads", 101.5)):
        own = [row for row in rows if row["series"] == series]
        assert sum(row["x"] for row in own) == pytest.approx(whole)  # type: ignore[misc]
        assert sum(row["share"] for row in own) == pytest.approx(1)  # type: ignore[misc]
    names = list(dict.fromkeys(row["name"] for row in rows))
    assert len(names) == resources.MOST_NAMES + 1
    assert names[0] == "op19"
    assert "new" in names, "what is long after only has its line"
    assert rows[resources.MOST_NAMES - 1]["name"] == "(9 more)"


def test_a_layer_that_the_graph_does_not_tell_is_said_to_be_none(make: Any) -> None:
    found = profile(make, "a", {"MatMul": 1.0}).model_copy(
        update={"rows": (ProfileRow(operator="MatMul", layer="", seconds=1.0, count=1.0),)}
    )
    rows = resources.time(Readings("0" * 12, make.report([make.manifest("a")], (), profiles=(found,))))[
        "by layer, 1×128"
    ].rows
    assert [row["name"] for row in rows] == ["(no layer)"]


def test_the_share_of_a_floor_is_that_of_the_report(make: Any) -> None:
    report = make.full()
    found = resources.floor(Readings("0" * 12, report))
    expected = floors(report)
    assert set(found) == {row.label for row in expected}
    assert sorted(row["x"] for v in found.values() for row in v.rows) == sorted(row.share for row in expected)  # type: ignore[type-var]


def test_cells_of_other_threads_have_bars_of_their_own(make: Any) -> None:
    report = make.full()
    again = tuple(m.model_copy(update={"threads": 1}) for m in report.measurements if m.quantity == "latency")
    found = resources.floor(
        Readings("0" * 12, report.model_copy(update={"measurements": (*report.measurements, *again)}))
    )
    series = [row["series"] for row in found["latency, 1×128"].rows]
    assert len(set(series)) == len(series) == 4
    assert "0-source, torch, 1 threads" in series
