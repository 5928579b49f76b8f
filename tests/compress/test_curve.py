"""The error against the number of calibration texts: on texts that calibrated none, and without touching the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from squeeze.compress.quantize import QuantizeStage
from squeeze.errors import QuantizeError
from squeeze.model import load_model
from squeeze.report.explained import curve_table

RNG = np.random.default_rng(1)


def texts(count: int, length: int = 12, batch: int = 8) -> list[dict[str, Any]]:
    ids = RNG.integers(5, 100, (count, length))
    order = RNG.permutation(count)  # as sorted by length: neighbours in a batch are not neighbours in the split
    return [
        {
            "input_ids": ids[rows],
            "attention_mask": np.ones((len(rows), length), np.int64),
            "token_type_ids": np.zeros((len(rows), length), np.int64),
            "index": rows,
        }
        for rows in np.split(order, range(batch, count, batch))
    ]


@pytest.mark.parametrize(
    ("family", "settings", "quantities"),
    [
        ("tiny_bert_folder", {"scheme": "int8-static"}, {"kl", "same"}),
        ("tiny_llama_folder", {"scheme": "int4-weight", "method": "gptq"}, {"kl", "same"}),
        ("tiny_t5_folder", {"scheme": "int8-static"}, {"cosine"}),
    ],
)
def test_a_point_for_each_count_with_the_quantities_of_its_task(
    family: str, settings: dict[str, Any], quantities: set[str], request: pytest.FixtureRequest
) -> None:
    folder, batches = request.getfixturevalue(family), texts(40)
    record = QuantizeStage.model_validate({"curve": (1, 32), **settings}).apply(model := load_model(folder), batches)
    assert [point.texts for point in record.curve] == [1, 32]
    assert {point.held_out for point in record.curve} == {8}
    for point in record.curve:
        assert point.sqnr_db is not None and point.sqnr_db > 5  # noqa: PT018
        assert {n for n in ("kl", "same", "cosine") if getattr(point, n) is not None} == quantities
    assert record.curve[1].sqnr_db > record.curve[0].sqnr_db
    plain = load_model(folder)
    QuantizeStage.model_validate(settings).apply(plain, batches)
    assert all(torch.equal(w.integers, plain.integers[name].integers) for name, w in model.integers.items())
    columns, rows = curve_table(record.curve)
    assert columns[:2] == ("calibration texts", "SQNR of answers")
    assert all(len(row) == len(columns) and all(row) for row in rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "int8", "curve": [4]}, "reads none of. Drop it"),
        ({"scheme": "int8-static", "curve": [8, 4]}, "does not rise"),
        ({"scheme": "int8-static", "curve": [4, 4]}, "does not rise"),
        ({"scheme": "int8-static", "curve": [0]}, "greater than or equal to 1"),
    ],
)
def test_a_curve_that_means_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QuantizeStage.model_validate(settings)


def test_texts_must_be_left_to_compare_on(tiny_bert_folder: Path) -> None:
    stage = QuantizeStage(scheme="int8-static", curve=(4, 16))
    with pytest.raises(
        QuantizeError, match=r"beyond the largest count, 16, and there are 16\. Set .*calibration to 80"
    ):
        stage.apply(load_model(tiny_bert_folder), texts(16))
    bare = [{name: array for name, array in batch.items() if name != "index"} for batch in texts(24)]
    with pytest.raises(QuantizeError, match='Give batches with an "index"'):
        stage.apply(load_model(tiny_bert_folder), bare)
