"""A training in tables, charts, the page and words: every figure worked out by hand."""

import math
from typing import Any

import pytest

from squeeze.report import curves
from squeeze.report.explained import stage_label
from squeeze.report.formats import to_markdown
from squeeze.report.headline import headline
from squeeze.report.page import render_page
from squeeze.report.schema import Manifest, Report, StageRecord
from squeeze.report.summary import summarize
from squeeze.report.training import (
    TrainingCurve,
    Validation,
    distill_words,
    training_rows,
    training_table,
    training_words,
)

HOSTILE = "</svg><script>alert(1)</script>\x1b[31m"


def curve(count: int = 9, **changes: Any) -> TrainingCurve:
    """Loss 9, 8, … of which a third is `hidden`; 10 steps and 1000 tokens a stretch; validated at every second stretch."""
    loss = [float(count - n) for n in range(count)]
    fields: dict[str, Any] = {
        "steps": [10 * (n + 1) for n in range(count)], "tokens": [1000 * (n + 1) for n in range(count)],
        "seconds": [0.5 * (n + 1) for n in range(count)], "rate": [1e-4] * count, "loss": loss,
        "shares": {"kl": [v * 2 / 3 for v in loss], "hidden": [v / 3 for v in loss]}, "metric": "accuracy", "better": "higher",
        "held_out": 200, "kept": 60,
        "validations": [Validation(step=20 * n, tokens=2000 * n, value=v) for n, v in ((1, 0.5), (2, 0.7), (3, 0.8), (4, 0.75))],
        "epoch_seconds": [2.0, 2.5],
    }  # fmt: skip
    return TrainingCurve.model_validate(fields | changes)


def record(found: TrainingCurve, **settings: Any) -> StageRecord:
    given = {"kind": "distill", "student": {"layers": 3}, "losses": [{"kind": "kl"}], **settings}
    return StageRecord(kind="distill", settings=given, seconds=1, layers=(), notes=(), training=found)


def distilled(make: Any, found: TrainingCurve) -> Report:
    torch = {"format": "torch", "parameters": 100}
    source = make.manifest("0-source").model_copy(update=torch)
    student = make.manifest("1-distill").model_copy(update=torch | {"parameters": 60, "record": record(found)})
    both = [(source, 800.0), (student, 480.0)]
    measured = [make.measured(m, "weight_bytes", [size], unit="bytes", runtime="torch") for m, size in both]
    measured += [
        make.measured(source, "correct", [1.0] * 20, unit="", runtime="torch"),
        make.measured(student, "correct", [1.0] * 19 + [0.0], unit="", runtime="torch"),
    ]
    report: Report = make.report(*measured, manifests=(source, student))
    return report


def test_five_moments_show_where_the_loss_went() -> None:
    columns, rows = training_table(curve())
    assert columns == ("", "step", "tokens", "loss", "kl", "hidden", "rate", "held-out accuracy")
    assert [row[0] for row in rows] == ["start", "a quarter", "half", "three quarters", "end"]
    assert [row[1] for row in rows] == ["10", "30", "50", "70", "90"]
    half = dict(zip(columns, rows[2], strict=True))
    assert half["tokens"] == "5,000"
    assert half["loss"] == "5.000"
    assert half["kl"].replace("\u00a0", " ") == "3.33 (67 %)"
    assert half["rate"] == "0.0001"
    assert half["held-out accuracy"].replace("\u00a0", " ") == "70.00 %"  # as of step 40
    assert rows[0][-1] == ""  # nothing was validated until then


@pytest.mark.parametrize(("count", "names"), [(1, ["end"]), (2, ["half", "end"]), (3, ["start", "half", "end"])])
def test_a_short_training_says_each_stretch_once(count: int, names: list[str]) -> None:
    rows = training_table(curve(count))[1]
    assert len({row[1] for row in rows}) == len(rows) == len(names)
    assert rows[-1][0] == "end"
    assert rows[-1][1] == str(10 * count)


def test_a_single_loss_has_no_column_beside_the_whole() -> None:
    columns, rows = training_table(curve(shares={"kl": [float(9 - n) for n in range(9)]}, validations=[]))
    assert columns == ("", "step", "tokens", "loss", "rate")
    assert {len(row) for row in rows} == {5}


def test_words_say_what_was_kept_and_how_fast_it_went() -> None:
    said = training_words(curve()).replace("\u00a0", " ")
    assert "step 60, accuracy 80.00 % on 200 held-out examples, the best of 4 validations" in said
    assert "9,000 tokens in 4.50 s; 2,000 tokens/s; an epoch took 2.25 s" in said
    assert said.endswith("float32 on cpu")
    assert "the last of 4" in training_words(curve(kept=80))
    assert training_words(curve(processes=2)).endswith("2 processes")


def test_the_loss_chart_places_the_whole_above_its_parts() -> None:
    chart = curves.loss_chart(curve())
    assert chart is not None
    whole, kl, hidden = chart.lines
    assert [line.name for line in chart.lines] == ["whole", "kl", "hidden"]
    bottom = curves.HEIGHT - curves.BOTTOM
    for whole_at, kl_at, hidden_at in zip(whole.points, kl.points, hidden.points, strict=True):
        assert whole_at[0] == kl_at[0] == hidden_at[0]
        assert (bottom - kl_at[1]) + (bottom - hidden_at[1]) == pytest.approx(bottom - whole_at[1])  # parts add up
    steps = [b[0] - a[0] for a, b in zip(whole.points, whole.points[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert whole.points[-1][0] == pytest.approx(curves.WIDTH - curves.RIGHT)
    assert not chart.is_logarithmic
    assert {text: y for y, text in chart.grid}["0"] == pytest.approx(bottom)


def test_a_loss_that_fell_far_is_drawn_logarithmically() -> None:
    fallen = [10.0 ** (2 - n / 2) for n in range(9)]
    chart = curves.loss_chart(curve(loss=fallen, shares={"kl": fallen}))
    assert chart is not None
    assert chart.is_logarithmic
    drops = [b[1] - a[1] for a, b in zip(chart.lines[0].points, chart.lines[0].points[1:], strict=False)]
    assert drops == pytest.approx([drops[0]] * len(drops))  # equal ratios, equal distances
    assert [text for _, text in chart.grid] == ["0.01", "0.1", "1", "10", "100"]


def test_every_mark_lies_within_its_chart() -> None:
    zero = [0.0] * 9
    flat = [3.0] * 9
    for found in (curve(), curve(loss=flat, shares={"a": flat, "b": zero}), curve(loss=zero, shares={"a": zero})):
        for chart in (curves.loss_chart(found), curves.metric_chart(found)):
            assert chart is not None
            marks = [point for line in chart.lines for point in line.points]
            marks += [(curves.LEFT, y) for y, _ in chart.grid] + [(x, curves.TOP) for x, _ in chart.ticks]
            for x, y in marks:
                assert curves.LEFT - 0.1 <= x <= curves.WIDTH - curves.RIGHT + 0.1
                assert curves.TOP - 0.1 <= y <= curves.HEIGHT - curves.BOTTOM + 0.1
            assert 2 <= len(chart.grid) <= 8


def test_the_metric_chart_rings_what_was_kept() -> None:
    chart = curves.metric_chart(curve())
    assert chart is not None
    (line,) = chart.lines
    assert chart.kept == line.points[2]
    assert min(line.points, key=lambda point: point[1]) == line.points[2]  # the highest accuracy
    assert line.titles[2].replace("\u00a0", " ") == "step 60: accuracy 80.00 %"
    assert curves.metric_chart(curve(validations=[])) is None
    assert curves.loss_chart(curve(1)) is None


def test_the_page_has_both_charts_and_every_stretch_behind_them(make: Any) -> None:
    page = render_page(distilled(make, curve()))
    assert page.count("<polyline") == 4  # the whole, kl, hidden, accuracy
    assert "Is it still learning?" in page
    assert "Does it hold on texts that it was not trained on?" in page
    assert "1-distill: every stretch" in page
    for row in training_rows(curve()):
        assert f'<td class="r">{row[2]}</td>' in page
    assert "distill 3 layers, kl" in page
    assert "Is it still learning?" not in render_page(make.pair("correct", [1.0], [1.0]))


def test_the_page_escapes_what_a_training_names(make: Any) -> None:
    values = [float(9 - n) for n in range(9)]
    hostile = curve(shares={HOSTILE: values, "kl": values}, metric=HOSTILE, loss=[2 * v for v in values])
    page = render_page(distilled(make, hostile))
    assert "<script>alert" not in page
    assert "\x1b" not in page
    assert "&lt;/svg&gt;&lt;script&gt;alert(1)" in page


def test_the_summary_counts_parameters_where_they_changed(make: Any) -> None:
    report = distilled(make, curve())
    rows = {row.quantity: row for row in summarize(report)}
    assert rows["parameters"].words.replace("\u00a0", " ") == "60.0 % of before"
    assert (rows["parameters"].before.text, rows["parameters"].after.text) == ("100", "60")
    assert rows["parameters"].evidence == "counted"
    assert rows["parameters"].gain is not None
    assert rows["parameters"].gain.value == pytest.approx(100 / 60)
    assert "has 60.0 % of the parameters" in headline(report).replace("\u00a0", " ")
    assert "parameters" not in {row.quantity for row in summarize(make.pair("weight_bytes", [8.0], [4.0]))}


def test_markdown_has_the_table_of_the_training(make: Any) -> None:
    text = to_markdown(distilled(make, curve()))
    assert "<summary>Training of 1-distill</summary>\n\nkept the weights of step 60" in text
    assert "| half | 50 | 5,000 | 5.000 |" in text


def test_a_distillation_is_called_by_what_it_does() -> None:
    settings = {
        "student": {"layers": [0, 2], "heads": 4}, "losses": [{"kind": "kl", "temperature": 2.0}, {"kind": "hidden", "weight": 0.5}],
        "training": {"epochs": 3.0, "steps": None, "batch": 32, "learning_rate": 1e-4}, "teacher": "models/big",
    }  # fmt: skip
    assert distill_words(settings) == (
        "layers 0, 2, 4 heads, teacher models/big, kl (T 2) + 0.5 hidden, 3 epochs, batches of 32, rate 0.0001"
    )
    assert stage_label(record(curve(), losses=[])) == "distill 3 layers, kl + hidden"  # the task's own, by the curve
    plain = StageRecord(kind="quantize", settings={"scheme": "int8"}, seconds=1, layers=(), notes=())
    assert stage_label(plain) == "quantize int8"


def test_a_manifest_with_a_curve_reads_back(make: Any) -> None:
    manifest = distilled(make, curve()).manifests[1]
    again = Manifest.model_validate_json(manifest.model_dump_json())
    assert again.record is not None
    assert again.record.training == curve()
    assert math.isfinite(again.record.training.seconds[-1])
