"""Every chart has rows to ask for, and rows are flat."""

from typing import Any

from squeeze.dashboard.datasets import DATASETS, datasets
from squeeze.dashboard.readings import Readings
from squeeze.dashboard.specs import CHARTS


def test_every_chart_but_the_history_has_a_dataset_and_a_full_report_fills_them(make: Any) -> None:
    assert [*DATASETS, "history"] == list(CHARTS)
    found = datasets(Readings("0" * 12, make.full()))
    assert {kind for kind, variants in found.items() if variants} == set(DATASETS)


def test_rows_are_flat_and_no_variant_is_without_any(make: Any) -> None:
    for report in (make.full(), make.report((), ())):
        for variants in datasets(Readings("0" * 12, report)).values():
            for variant in variants.values():
                assert variant.rows
                assert all(
                    isinstance(value, str | int | float | bool | None) for row in variant.rows for value in row.values()
                )


def test_a_variant_is_drawn_alike_in_whichever_report_it_is(make: Any) -> None:
    one, other = (datasets(Readings("0" * 12, report)) for report in (make.full(), make.full(faster=5.0, title="b")))
    for kind, variants in one.items():
        for name, variant in variants.items():
            assert CHARTS[kind].spec(variant) == CHARTS[kind].spec(other[kind][name])
