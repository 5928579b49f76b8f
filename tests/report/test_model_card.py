"""Cards that huggingface_hub reads back with the report's own values."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from squeeze.errors import ReportError
from squeeze.report.model_card import MADE, model_card, told_base_model, write_card
from squeeze.report.schema import StageRecord
from squeeze.report.summary import summarize

RECIPE = {"data": {"path": "/home/me/secret/tweets.csv"}, "model": {"path": "owner/model", "revision": "main"}}


def scored(make: Any, **changes: Any) -> Any:
    rows = [
        make.measured(make.source, "correct", [1.0] * 20),
        make.measured(make.result, "correct", [1.0] * 17 + [0.0] * 3),
    ]
    rows += [
        make.measured(make.result, "same_answer", [1.0] * 19 + [0.0]),
        make.measured(make.result, "latency", [0.1, 0.1, 0.1]),
    ]
    return make.report(*rows, **{"recipe": RECIPE, "data": {"evaluate": "sha256:" + "a" * 64}, **changes})


def test_the_hub_reads_back_task_data_set_and_the_values_of_the_report(make: Any) -> None:
    report = scored(make)
    data = ModelCard(model_card(report)).data
    found = {e.metric_type: e for e in data.eval_results}
    rows = {row.quantity: row for row in summarize(report)}
    assert found["accuracy"].metric_value == rows["correct"].after.value == 0.85
    assert found["agreement_with_source"].metric_value == rows["same_answer"].after.value == 0.95
    assert set(found) == {"accuracy", "agreement_with_source"}, "what depends on a machine is no property of a model"
    for one in found.values():
        assert (one.task_type, one.dataset_type, one.dataset_split) == ("text-classification", "tweets.csv", "evaluate")
        assert one.dataset_args == {"digest": "sha256:" + "a" * 64}
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("onnx", "text-classification", "owner/model")
    assert data.tags[:2] == ["squeeze", "onnx"]
    assert "/home/me" not in model_card(report).split("---\n")[1]


def test_a_base_model_is_told_only_where_the_recipe_loaded_a_revision_or_the_author_says_so(make: Any) -> None:
    plain = scored(make, recipe={"model": {"path": "models/mine"}})
    assert told_base_model(plain) is None
    assert ModelCard(model_card(plain)).data.base_model is None
    assert ModelCard(model_card(plain, "owner/named")).data.base_model == "owner/named"
    for path in ("/models/mine", "asset:x", "mine", "a/b/c", "../mine"):
        assert told_base_model(scored(make, recipe={"model": {"path": path, "revision": "main"}})) is None
    with pytest.raises(ReportError, match=re.escape("--base-model '../mine' is no hub id. Write OWNER/NAME")):
        model_card(plain, "../mine")


def test_the_stages_become_tags_and_the_hubs_word_for_a_quantized_copy(make: Any) -> None:
    record = StageRecord(kind="quantize", settings={"scheme": "int8"}, seconds=1, layers=(), notes=())
    quantized = make.result.model_copy(update={"record": record})
    data = ModelCard(model_card(scored(make, manifests=(make.source, quantized)))).data
    assert data.tags == ["squeeze", "onnx", "quantize", "int8"]
    assert data.base_model_relation == "quantized"
    assert "base_model_relation" not in ModelCard(model_card(scored(make))).data.to_dict()


def test_a_language_model_is_for_text_generation_and_a_ruined_one_has_no_perplexity_in_the_block(make: Any) -> None:
    language = [m.model_copy(update={"task": "causal-lm", "format": "torch"}) for m in (make.source, make.result)]
    rows = [make.measured(m, "negative_log_likelihood", [20.0, 21.0, 22.0], weights=(10.0,) * 3) for m in language]
    data = ModelCard(model_card(make.report(*rows, manifests=language))).data
    assert (data.pipeline_tag, data.library_name) == ("text-generation", "transformers")
    assert [e.metric_value for e in data.eval_results] == [
        summarize(make.report(*rows, manifests=language))[0].after.value
    ]
    ruined = [make.measured(m, "negative_log_likelihood", [9e9] * 3, weights=(10.0,) * 3) for m in language]
    assert ModelCard(model_card(make.report(*ruined, manifests=language))).data.eval_results is None


def test_what_failed_or_was_not_scored_is_in_the_text_and_no_result_is_made_up(make: Any) -> None:
    report = make.report(make.measured(make.result, "correct", [], error="killed by SIGKILL"))
    card = ModelCard(model_card(report))
    assert card.data.eval_results is None
    assert "killed by SIGKILL" in card.text


def test_scores_of_the_evaluation_harness_are_results_on_their_own_data_sets(make: Any) -> None:
    score = make.measured(make.result, "arc_easy acc_norm", [1.0, 0.0, 1.0, 1.0], repeat=(), unit="", workload=None)
    card = ModelCard(model_card(make.report(score, recipe={"bench": {"lm_eval": ["arc_easy"]}})))
    (one,) = card.data.eval_results
    assert (one.dataset_type, one.metric_type, one.metric_value) == ("arc_easy", "acc_norm", 0.75)
    assert ModelCard(model_card(make.report(score))).data.eval_results is None, (
        "any other quantity is not the harness's"
    )


@pytest.mark.parametrize(
    "name",
    ["<img src=x onerror=alert(1)>", "a: b\n---\nlicense: mit", "'\"{}[]#!%@`", "\u2028汉字\u202e", "null", "- x", "~"],
)
def test_no_name_leaves_its_place_in_the_front_matter(make: Any, name: str) -> None:
    report = scored(make, title=name, recipe={"data": {"path": name}})
    plain = ModelCard(model_card(scored(make))).data.to_dict()
    card = ModelCard(model_card(report))
    assert set(card.data.to_dict()) <= set(plain)
    assert card.data.license is None
    assert card.data.eval_results[0].metric_value == 0.85
    assert "<img" not in MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(card.text)


def test_a_report_without_artifacts_has_no_card(make: Any) -> None:
    with pytest.raises(ReportError, match="holds no artifact, so there is no model to write a card for"):
        model_card(make.report(manifests=()))


def test_a_card_replaces_a_card_and_never_a_persons_readme(make: Any, tmp_path: Path) -> None:
    file, text = tmp_path / "README.md", model_card(scored(make))
    assert MADE in text
    write_card(text, file)
    write_card(text.replace("squeeze", "squeeze "), file)
    file.write_text("# My model\n", "utf-8")
    with pytest.raises(ReportError, match="README.md was not made by squeeze, and a card would replace it"):
        write_card(text, file)
    assert file.read_text("utf-8") == "# My model\n"


def test_a_card_is_made_without_torch() -> None:
    code = "import squeeze.report.model_card, huggingface_hub, sys; from huggingface_hub import ModelCardData; "
    code += "raise SystemExit(bool({'torch', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
