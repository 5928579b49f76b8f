"""What a machine can do is measured once, kept, and not believed where the file is torn or another machine's."""

from pathlib import Path

import pytest

from squeeze.benchmark import ceilings
from squeeze.report.schema import Bandwidth, Ceilings

KNOWN = Ceilings(
    threads=1,
    bandwidth=(Bandwidth(working_set=1, bytes_per_second=2.0),),
    operations={"float32": 3.0},
    measured="2026-11-24",
)


def test_what_was_measured_is_found_again_for_the_same_threads_only(tmp_path: Path) -> None:
    assert ceilings.kept(1, tmp_path) is None
    ceilings.keep(KNOWN, tmp_path)
    assert ceilings.kept(1, tmp_path) == KNOWN
    assert ceilings.kept(2, tmp_path) is None


def test_a_torn_file_is_measured_again_and_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    ceilings.keep(KNOWN, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text("{")
    assert ceilings.kept(1, tmp_path) is None
    ceilings.keep(KNOWN, file)


def test_measuring_gives_every_working_set_and_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "WORKING_SETS", (1 << 16, 1 << 18))
    monkeypatch.setattr(ceilings, "SIDE", 64)
    monkeypatch.setattr(ceilings, "TRIES", 2)
    found = ceilings.measure(1)
    assert [point.working_set for point in found.bandwidth] == [1 << 16, 1 << 18]
    assert {"float32", "bfloat16"} <= set(found.operations)
    assert all(rate > 0 for rate in found.operations.values())
