"""What a machine can do is measured once, kept, and not believed where the file is torn or another machine's."""

import time
from functools import partial
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


def test_a_ceiling_is_the_best_of_all_libraries_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "WORKING_SETS", (1 << 16,))
    monkeypatch.setattr(ceilings, "SIDES", (32, 64))
    monkeypatch.setattr(ceilings, "SECONDS", 100.0)
    seconds = iter([1.0, 4.0, 2.0, 8.0, 1.0])  # of the working set; side 32: torch, ONNX Runtime; side 64: the same
    monkeypatch.setattr(ceilings, "_best", lambda work: next(seconds))
    for library in ("_torch_products", "_onnx_products"):
        monkeypatch.setattr(ceilings, library, lambda *_: [("float32", print)])
    assert ceilings.measure(1).operations == {"float32": 2 * 64**3 / 1.0}


def test_a_slow_product_is_tried_once_and_in_no_larger_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "WORKING_SETS", (1 << 16,))
    monkeypatch.setattr(ceilings, "SIDES", (32, 64))
    monkeypatch.setattr(ceilings, "SECONDS", 0.05)
    calls = {"slow": 0, "fast": 0}

    def work(name: str) -> None:
        calls[name] += 1
        time.sleep(0.06 * (name == "slow"))

    monkeypatch.setattr(ceilings, "_torch_products", lambda *_: [(n, partial(work, n)) for n in ("slow", "fast")])
    monkeypatch.setattr(ceilings, "_onnx_products", lambda *_: [])
    found = ceilings.measure(1).operations
    assert calls == {"slow": 1, "fast": 2 * (1 + ceilings.TRIES)}
    assert found["slow"] < 2 * 32**3 / 0.05


def test_onnx_runtime_multiplies_what_was_asked() -> None:
    products = dict(ceilings._onnx_products(32, 1))
    assert set(products) == {"float32", "int8"}
    assert products["float32"]()[0].shape == products["int8"]()[0].shape == (32, 32)


def test_measuring_gives_every_working_set_and_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "WORKING_SETS", (1 << 16, 1 << 18))
    monkeypatch.setattr(ceilings, "SIDES", (32, 64))
    monkeypatch.setattr(ceilings, "TRIES", 2)
    found = ceilings.measure(1)
    assert [point.working_set for point in found.bandwidth] == [1 << 16, 1 << 18]
    assert {"float32", "bfloat16", "int8"} <= set(found.operations)
    assert all(rate > 0 for rate in found.operations.values())
