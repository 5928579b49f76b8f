"""Counters of energy as Linux lays them out, in a folder made here: this machine may have none."""

from pathlib import Path

import pytest

from squeeze.benchmark.energy import EnergyMeter


def zone(folder: Path, name: str, microjoules: int, span: int = 1_000_000) -> Path:
    place = folder / name
    place.mkdir(parents=True)
    (place / "energy_uj").write_text(f"{microjoules}\n")
    (place / "max_energy_range_uj").write_text(f"{span}\n")
    return place / "energy_uj"


def test_joules_of_all_packages_are_summed_and_their_parts_left_out(tmp_path: Path) -> None:
    counters = [zone(tmp_path, name, 100_000) for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0")]
    meter = EnergyMeter(folder=tmp_path)
    assert meter.sources == ("intel-rapl:0", "intel-rapl:1")
    for counter in counters:
        counter.write_text("600000\n")
    assert meter.joules() == pytest.approx(1.0)


def test_a_counter_that_wraps_is_followed(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", 900_000)
    meter = EnergyMeter(folder=tmp_path)
    counter.write_text("100000\n")
    assert meter.joules() == pytest.approx(0.2)
    counter.write_text("300000\n")
    assert meter.joules() == pytest.approx(0.4)


def test_no_counter_is_said_and_nothing_is_estimated(tmp_path: Path) -> None:
    meter = EnergyMeter(folder=tmp_path)
    assert (meter.sources, meter.joules()) == ((), 0.0)
    assert meter.absent == "this machine offers no RAPL counter (virtual machines rarely do)"
    assert EnergyMeter("cuda", tmp_path).absent
