"""Tasks from local data give the log-likelihoods that the logits give, and refuse in words what cannot be run."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squeeze.benchmark.harness import evaluate_tasks
from squeeze.errors import DataError, RuntimeUnavailable
from squeeze.evaluate import log_probabilities
from squeeze.model import load_model
from squeeze.runtimes import open_session

ROWS = [
    {"q": f"The cat {verb}", "choices": [" it", " the dog", " ate"], "gold": n % 3}
    for n, verb in enumerate(("saw", "likes", "has", "ate"))
]
CHOICE = """
task: cats
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ANSWER = """
task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "never said"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    (tmp_path / "cats.yaml").write_text(CHOICE, "utf-8")
    (tmp_path / "answers.yaml").write_text(ANSWER, "utf-8")
    return tmp_path / "cats.yaml"


def run(folder: Path, *tasks: Path, limit: int | None = None) -> Any:
    tokenizer = load_model(folder).tokenizer
    return evaluate_tasks(
        open_session(folder, "torch"), tokenizer, [str(t) for t in tasks], limit=limit, max_length=32, seed=0
    )


@pytest.mark.filterwarnings("ignore")
def test_a_choice_is_the_likeliest_by_the_logits_themselves(tiny_llama_folder: Path, task: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra")
    model, session = load_model(tiny_llama_folder), open_session(tiny_llama_folder, "torch")
    encode = lambda text: model.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    expected = []
    for row in ROWS:
        sums = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            ids, start = encode(str(row["q"]) + choice), len(encode(row["q"]))
            logs = log_probabilities(
                session.forward({"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)})[0]
            )
            sums.append(sum(logs[place - 1, ids[place]] for place in range(start, len(ids))))
        expected.append(float(int(np.argmax(sums)) == row["gold"]))
    (score,) = run(tiny_llama_folder, task)
    assert (score.task, score.metric, score.values) == ("cats", "acc", tuple(expected))
    assert run(tiny_llama_folder, task, limit=2)[0].values == tuple(expected[:2])


@pytest.mark.filterwarnings("ignore")
def test_answers_are_generated_and_judged_one_by_one(tiny_llama_folder: Path, task: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra")
    (score,) = run(tiny_llama_folder, task.with_name("answers.yaml"))
    assert (score.metric, score.values) == ("exact_match", (0.0,) * 4)


@pytest.mark.filterwarnings("ignore")
def test_a_task_without_its_data_or_its_name_is_refused_in_words(tiny_llama_folder: Path, task: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra")
    (task.parent / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"names its data rows\.jsonl, and .* does not exist"):
        run(tiny_llama_folder, task)
    task.write_text("a: 1")
    with pytest.raises(DataError, match="has no line `task: NAME`"):
        run(tiny_llama_folder, task)
    task.write_text("task: x\ndoc_to_text: !function utils.f")
    with pytest.raises(DataError, match="not plain YAML"):
        run(tiny_llama_folder, task)
    task.write_text("task: x\ndataset_kwargs: {trust_remote_code: true}")
    with pytest.raises(DataError, match="trust_remote_code, which is never given"):
        run(tiny_llama_folder, task)


def test_without_the_package_the_line_that_installs_it_is_named(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RuntimeUnavailable, match=r"pip install 'squeeze\[lm-eval\]'"):
        run(tiny_llama_folder, tmp_path / "any.yaml")
