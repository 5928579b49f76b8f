"""Heat maps: each matrix in a place of its own, with what was measured of it or why nothing was."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squeeze.dashboard.layers import OUTSIDE, _places, layers
from squeeze.dashboard.readings import Readings
from squeeze.report.schema import LayerRow, StageRecord
from squeeze.report.sensitivity_table import Scanned, SensitivityTable


def row(name: str, **changes: Any) -> LayerRow:
    return LayerRow(**{"name": name, "shape": (4, 8), "bits": 8.5, "sparsity": 0.0, "sqnr_db": None, **changes})


def drawn(make: Any, *rows: LayerRow, **changes: Any) -> Any:
    record = StageRecord(kind="quantize", settings={}, seconds=1.0, layers=rows, notes=(), **changes)
    source = make.manifest("0-source")
    return layers(Readings("0" * 12, make.report((source, make.manifest("1-quantize", source, record=record)), ())))


@pytest.mark.parametrize(
    ("name", "layer", "part"),
    [
        ("model.layers.12.self_attn.q_proj.weight", "12", "self_attn.q_proj"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "0", "attention.output.dense"),
        ("transformer.h.3.attn.c_attn.weight", "3", "attn.c_attn"),
        ("model.embed_tokens.weight", OUTSIDE, "model.embed_tokens"),
        ("lstm.weight_ih_l0", OUTSIDE, "lstm.weight_ih_l0"),
    ],
)
def test_a_matrix_lies_in_its_layer(name: str, layer: str, part: str) -> None:
    assert _places([name]) == [(layer, part)]


def test_an_encoder_and_a_decoder_do_not_share_a_cell() -> None:
    names = [f"{side}.block.0.layer.{n}.SelfAttention.q.weight" for side in ("encoder", "decoder") for n in range(2)]
    assert _places(names) == [
        (str(0), f"{side}.block: layer.{n}.SelfAttention.q") for side in ("encoder", "decoder") for n in range(2)
    ]


@given(st.lists(st.from_regex(r"([ab]\.)?(\d\.)?[xy](\.weight)?", fullmatch=True), unique=True, max_size=20))
def test_no_two_matrices_share_a_place(names: list[str]) -> None:
    assert len(set(_places(names))) == len(names)


def test_each_measure_that_was_taken_is_a_variant(make: Any) -> None:
    found = drawn(make, row("m.0.q", sqnr_db=30.0, output_sqnr_db=25.0, sensitivity=0.01, sparsity=0.5))
    assert list(found) == [
        "1-quantize: sensitivity",
        "1-quantize: output SQNR",
        "1-quantize: weight SQNR",
        "1-quantize: sparsity",
        "1-quantize: bits",
    ]
    assert [v.rows[0]["text"] for v in found.values()] == ["0.0100", "25.0 dB", "30.0 dB", "50.0\u00a0%", "8.50 bits"]
    assert [v.rows[0]["value"] for v in found.values()] == [0.01, 25.0, 30.0, 0.5, 8.5]


def test_what_nothing_was_done_to_has_no_map(make: Any) -> None:
    assert drawn(make, row("m.0.q", bits=32.0)) == {}


def test_a_layer_that_was_not_measured_says_why(make: Any) -> None:
    found = drawn(make, row("m.0.q", sqnr_db=30.0), row("m.1.q", note="kept in float: no kernel yet"))
    kept = found["1-quantize: weight SQNR"].rows[1]
    assert (kept["value"], kept["text"], kept["note"], kept["layer"]) == (
        None,
        "not measured",
        "kept in float: no kernel yet",
        "1",
    )


def test_a_scan_shows_every_part_at_every_sparsity(make: Any) -> None:
    scanned = tuple(
        Scanned(unit=f"layer {n}", kind="block", layer=n, weights=100, sparsity=s, loss=s * (n + 1))
        for n in range(2)
        for s in (0.7, 0.3)
    )
    table = SensitivityTable(
        source="m",
        task="causal-lm",
        criterion="wanda",
        pattern="unstructured",
        unit="nats per token",
        texts=4,
        rows=scanned,
    )
    rows = drawn(make, sensitivity=table)["1-quantize: scan"].rows
    assert [(r["layer"], r["part"], r["value"]) for r in rows] == [
        ("0", "whole layer, 30\u00a0%", 0.3), ("1", "whole layer, 30\u00a0%", 0.6), ("0", "whole layer, 70\u00a0%", 0.7),
        ("1", "whole layer, 70\u00a0%", 1.4),
    ]  # fmt: skip
    assert rows[3]["text"] == "1.4 nats per token"
