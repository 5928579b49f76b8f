"""Ranges from streams: what each calibrator chooses, that streaming changes nothing, and what a range does to numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squeeze.compress.calibrate import CALIBRATORS, Histogram, Peaks, calibrated, input_grid
from squeeze.compress.schemes import CALIBRATOR_NAMES
from squeeze.errors import QuantizeError
from squeeze.integers import static_uint8


def histogram_of(rows: torch.Tensor, importance: torch.Tensor | None = None, parts: int = 1) -> Histogram:
    found = Histogram(min(float(rows.min()), 0.0), max(float(rows.max()), 0.0))
    for part in rows.chunk(parts):
        found.add(part, torch.ones(rows.shape[1]) if importance is None else importance)
    return found


def error(rows: torch.Tensor, histogram: Histogram, calibrator: str, percentile: float = 99.9) -> float:
    grid = calibrated(histogram, calibrator, percentile)
    return float((static_uint8(rows, grid) - rows).square().mean())


def test_the_table_and_the_names_that_settings_know_agree() -> None:
    assert tuple(CALIBRATORS) == CALIBRATOR_NAMES


@pytest.mark.parametrize("calibrator", CALIBRATOR_NAMES)
def test_streaming_in_parts_chooses_what_one_pass_chooses(calibrator: str) -> None:
    rows = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    one, many = (calibrated(histogram_of(rows, parts=parts), calibrator, 99.9) for parts in (1, 17))
    assert one == many


def test_extremes_cover_everything_and_the_others_clip_an_outlier() -> None:
    rows = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    rows[0, 0] = 60.0  # one value in 1,280,000
    histogram = histogram_of(rows)
    top = {
        name: (255 - grid.zero_point) * grid.scale
        for name in CALIBRATOR_NAMES
        for grid in [calibrated(histogram, name, 99.9)]
    }
    assert top["minmax"] == pytest.approx(60, rel=0.02)
    assert all(top[name] < 30 for name in ("percentile", "entropy", "mse"))
    assert top["percentile"] < 5


def test_least_error_is_least() -> None:
    rows = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0)).pow(3)
    histogram = histogram_of(rows)
    errors = {name: error(rows, histogram, name) for name in CALIBRATOR_NAMES}
    assert errors["mse"] <= min(errors.values()) * 1.02


def test_least_error_listens_to_the_weights_that_a_channel_meets() -> None:
    rows = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 20.0])
    deaf = calibrated(histogram_of(rows, torch.tensor([1.0, 1e-6])), "mse", 100)
    equal = calibrated(histogram_of(rows, torch.tensor([1.0, 1.0])), "mse", 100)
    assert deaf.scale < 0.5 * equal.scale


@given(st.floats(-50, 50), st.floats(-50, 50))
def test_zero_is_always_exact_and_the_range_is_covered(one: float, other: float) -> None:
    grid = input_grid(min(one, other), max(one, other))
    assert 0 <= grid.zero_point <= 255
    assert float(static_uint8(torch.zeros(1), grid)) == 0
    values = torch.tensor([min(one, other), max(one, other)], dtype=torch.float32)
    assert torch.all((static_uint8(values, grid) - values).abs() <= grid.scale * 1.001)
    assert np.float32(grid.scale) == grid.scale


def test_inputs_that_were_always_zero_get_a_range_that_divides() -> None:
    assert input_grid(0.0, 0.0).scale == 1.0


def test_peaks_of_no_texts_are_an_error() -> None:
    with pytest.raises(QuantizeError, match="no calibration text"):
        _ = Peaks().ends


def test_a_divisor_is_undone_after_rounding() -> None:
    rows = torch.randn(100, 4) * torch.tensor([1.0, 100.0, 1.0, 1.0])
    divisor = torch.tensor([1.0, 100.0, 1.0, 1.0])
    scaled = rows / divisor
    grid = input_grid(float(scaled.min()), float(scaled.max()))
    loss = (static_uint8(rows, grid, divisor) - rows).abs()
    assert float(loss[:, 0].max()) <= grid.scale
    plain = input_grid(float(rows.min()), float(rows.max()))
    assert float(loss[:, 0].mean()) < 0.05 * float((static_uint8(rows, plain) - rows).abs()[:, 0].mean())
