"""A chart as a file: the format that its name says, the rows of the report that is meant, and errors that say how to go on."""

from pathlib import Path
from typing import Any

import pytest

from squeeze.dashboard import images, view
from squeeze.errors import ReportError

MAGIC = {"png": b"\x89PNG", "svg": b"<svg", "pdf": b"%PDF"}


@pytest.fixture(scope="module")
def found(make: Any) -> dict[str, Any]:
    alone = make.manifest("alone")
    later = make.report(
        [alone],
        [make.measured(alone, "weight_bytes", [1.0], repeat=())],
        started="2026-12-01T00:00:00+00:00",
        title="later",
    )
    return view.build_charts([view.Source("a" * 12, "a", make.full()), view.Source("ab" * 6, "b", later)])


@pytest.mark.parametrize("kind", sorted(MAGIC))
def test_each_format_is_what_its_name_says(found: dict[str, Any], tmp_path: Path, kind: str) -> None:
    images.draw(found, None, "pareto", None, tmp_path / f"x.{kind}")
    assert (tmp_path / f"x.{kind}").read_bytes().startswith(MAGIC[kind])


def test_a_picture_has_its_question_and_its_variant_above_it(found: dict[str, Any]) -> None:
    svg = images.picture(found, "a" * 12, "latency", "latency, 1×128", "svg").decode("utf-8")
    assert "How long do calls take, the slow ones included?" in svg
    assert "latency, 1×128" in svg


def test_the_themes_have_their_backgrounds(found: dict[str, Any]) -> None:
    light, dark = (images.drawn(found, None, "memory", None, theme=theme) for theme in ("light", "dark"))
    assert light["config"]["background"] != dark["config"]["background"]
    assert light["layer"] == dark["layer"]


def test_the_newest_report_that_has_the_chart_is_drawn_unless_told_otherwise(found: dict[str, Any]) -> None:
    chosen = images.drawn(found, None, "memory", None)["data"]["values"]
    assert chosen == next(iter(found["reports"][0]["rows"]["memory"].values()))
    assert images.drawn(found, "aaa", "memory", None)["data"]["values"] == chosen, "the beginning of an id is enough"


@pytest.mark.parametrize(
    ("report", "chart", "variant", "says"),
    [
        (None, "paretto", None, "There is no chart 'paretto'. Did you mean 'pareto'?"),
        (None, "memory", "peek", "There is no variant 'peek' of the chart memory. "),
        (None, "history", None, "There is nothing to draw as history: No title was run twice"),
        ("ababab", "memory", None, "There is nothing to draw as memory: No memory was measured."),
        ("a", "memory", None, "2 reports begin with a. Known: aaaaaaaaaaaa (a run), abababababab (later)."),
        ("ffff", "memory", None, "There is no report ffff. Known: "),
    ],
)
def test_what_cannot_be_drawn_is_answered_with_what_can(
    found: dict[str, Any], report: str | None, chart: str, variant: str | None, says: str
) -> None:
    with pytest.raises(ReportError) as told:
        images.drawn(found, report, chart, variant)
    assert str(told.value).startswith(says)


def test_another_format_and_a_folder_that_is_not_there_are_errors(found: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"Name it x\.png, \.svg or \.pdf\."):
        images.draw(found, None, "memory", None, tmp_path / "x.jpg")
    with pytest.raises(ReportError, match="cannot be written: No such file or directory"):
        images.draw(found, None, "memory", None, tmp_path / "none" / "x.svg")
