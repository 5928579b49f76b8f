"""Workloads: what a recipe may ask for, and inputs that are the same for every artifact and every run."""

import numpy as np
import pytest
from pydantic import ValidationError

from squeeze.benchmark.workload import (
    DEFAULTS,
    AnyWorkload,
    BenchSettings,
    ClosedLoop,
    DatasetWorkload,
    FixedWorkload,
    GenerateWorkload,
    OpenLoop,
    pack,
    prompts,
    random_tokens,
    unpack,
)
from squeeze.tasks import TASKS


@pytest.mark.parametrize(
    ("workload", "label"),
    [
        (FixedWorkload(batch=2, sequence=16), "2×16"),
        (DatasetWorkload(batch=50), "7 texts, batches of 50"),
        (GenerateWorkload(prompt=8, new_tokens=4), "8+4 tokens"),
        (GenerateWorkload(batch=3, prompt=8, new_tokens=4), "3×(8+4 tokens)"),
        (DatasetWorkload(batch=4, order="shuffled"), "7 texts, batches of 4, shuffled"),
        (ClosedLoop(callers=1), "1 caller, real texts"),
        (ClosedLoop(callers=4, sequence=128), "4 callers, 1×128"),
        (OpenLoop(rate=20), "20/s arriving, real texts"),
        (OpenLoop(limit_ms=50, batch=2, sequence=16), "p99 within 50 ms, 2×16"),
    ],
)
def test_a_workload_is_named_in_the_report_by_its_shape(workload: AnyWorkload, label: str) -> None:
    described = workload.described(examples=7)
    assert (described.kind, described.label) == (workload.kind, label)


def test_a_data_set_is_described_with_its_size_and_order() -> None:
    described = DatasetWorkload(batch=4, order="given").described(examples=9)
    assert (described.examples, described.batch, described.order) == (9, 4, "given")


def test_every_task_has_default_workloads_and_only_decoders_generate() -> None:
    assert set(DEFAULTS) == set(TASKS)
    generating = {task for task, works in DEFAULTS.items() if any(w.kind == "generate" for w in works)}
    assert generating == {"causal-lm"}


def test_no_task_has_two_default_workloads_of_one_name() -> None:
    for works in DEFAULTS.values():
        labels = [w.described(examples=3000).label for w in works]
        assert len(set(labels)) == len(labels)


def test_a_recipe_chooses_a_workload_by_its_kind() -> None:
    settings = BenchSettings.model_validate(
        {
            "workloads": [
                {"kind": "fixed", "batch": 1, "sequence": 16},
                {"kind": "dataset"},
                {"kind": "generate", "prompt": 8},
            ]
        }
    )
    assert settings.workloads == (FixedWorkload(batch=1, sequence=16), DatasetWorkload(), GenerateWorkload(prompt=8))


def test_a_grid_is_every_combination_and_what_is_asked_twice_is_measured_once() -> None:
    settings = BenchSettings.model_validate(
        {
            "workloads": [
                {"kind": "grid", "batch": [1, 8], "sequence": [16, 128]},
                {"kind": "fixed", "batch": 8, "sequence": 16},
                {"kind": "grid", "batch": [1, 4], "prompt": [32], "new_tokens": [8, 16]},
            ]
        }
    )
    labels = [work.described(0).label for work in settings.single_workloads("causal-lm")]
    assert labels[:4] == ["1×16", "1×128", "8×16", "8×128"]
    assert labels[4:] == ["32+8 tokens", "32+16 tokens", "4×(32+8 tokens)", "4×(32+16 tokens)"]


def test_one_value_stands_for_a_list_of_one() -> None:
    one = BenchSettings.model_validate({"device": "cpu", "threads": 1, "runtimes": "torch", "dtype": "bfloat16"})
    several = {"device": ["cpu"], "threads": [1], "runtimes": ["torch"], "dtype": ["bfloat16"]}
    assert one == BenchSettings.model_validate(several)


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"device": "tpu"}, ("device", 0)),
        ({"threads": 0}, ("threads", 0)),
        ({"repeats": 0}, ("repeats",)),
        ({"seconds_per_cell": 0}, ("seconds_per_cell",)),
        ({"warmups": 3}, ("warmups",)),
        ({"workloads": [{"kind": "fixed", "batch": 0, "sequence": 1}]}, ("workloads", 0, "fixed", "batch")),
        ({"workloads": [{"kind": "fixed", "batch": 1}]}, ("workloads", 0, "fixed", "sequence")),
        ({"workloads": [{"kind": "fixed", "prompt": 1}]}, ("workloads", 0, "fixed", "batch")),
        ({"workloads": [{"kind": "dataset", "order": "random"}]}, ("workloads", 0, "dataset", "order")),
        ({"workloads": [{"kind": "generate", "new_tokens": 1}]}, ("workloads", 0, "generate", "new_tokens")),
        ({"workloads": [{"kind": "streaming"}]}, ("workloads", 0)),
    ],
)
def test_settings_that_cannot_be_measured_are_refused_where_they_stand(
    given: dict[str, object], where: tuple[str | int, ...]
) -> None:
    with pytest.raises(ValidationError) as caught:
        BenchSettings.model_validate(given)
    assert caught.value.errors()[0]["loc"] == where


def test_fixed_inputs_are_known_tokens_of_the_shape_without_padding() -> None:
    inputs = random_tokens(3, 200, vocabulary=7, seed=0)
    assert {name: (array.shape, array.dtype) for name, array in inputs.items()} == {
        name: ((3, 200), np.dtype(np.int64)) for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    assert set(np.unique(inputs["input_ids"])) == set(range(7))
    assert inputs["attention_mask"].all()
    assert not inputs["token_type_ids"].any()


def test_one_seed_gives_the_same_tokens_and_another_gives_others() -> None:
    first, again, other = (random_tokens(2, 32, 100, seed)["input_ids"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_prompts_are_the_held_out_blocks_laid_end_to_end() -> None:
    blocks = np.arange(8).reshape(2, 4)
    assert prompts(GenerateWorkload(batch=2, prompt=3), blocks).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_prompts_go_around_where_the_blocks_do_not_suffice() -> None:
    blocks = np.array([[5, 6, 7]])
    assert prompts(GenerateWorkload(batch=2, prompt=4), blocks).tolist() == [[5, 6, 7, 5], [6, 7, 5, 6]]


def test_packed_batches_come_back_in_order_even_beyond_ten() -> None:
    given = [{"input_ids": np.full((1, n + 1), n), "index": np.array([n])} for n in range(12)]
    packed = pack(given)
    assert sorted(packed)[:3] == ["0.index", "0.input_ids", "1.index"]
    back = unpack({name: packed[name] for name in sorted(packed)})  # "10." sorts before "2."
    assert [set(batch) for batch in back] == [{"input_ids", "index"}] * 12
    for before, after in zip(given, back, strict=True):
        assert all(np.array_equal(before[name], after[name]) for name in before)
