"""A model card for the Hugging Face hub: front matter that the hub reads, then what a person reads.

The front matter is put together by huggingface_hub itself, so that it is what the hub's own reader takes apart again; that package
comes with Transformers and imports no torch. Evaluation results hold quality alone: accuracy belongs to a model and a data set,
whereas latency and memory belong to a machine, and a leaderboard that lists them without it would mislead. They stand in the text,
with their machine. Nothing is invented: no licence, no language, and a base model only where the report proves it, or its author
names it.
"""

import math
import re
from pathlib import Path, PurePath
from typing import Any

from squeeze import __version__
from squeeze.errors import ReportError
from squeeze.report.explained import stage_label
from squeeze.report.headline import headline
from squeeze.report.markdown import (
    artifact_table,
    escaped,
    failures,
    folded,
    joined,
    measured_on,
    verdict_table,
    warned,
)
from squeeze.report.schema import Manifest, Measurement, Report, write_atomically
from squeeze.report.summary import ends, names, summarize
from squeeze.report.text import visible

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
PIPELINES = {"causal-lm": "text-generation"}
"""squeeze's task -> the hub's, where they differ."""
LIBRARIES = {"torch": "transformers"}
"""An artifact's format -> the hub's library, where they differ."""
METRICS = {
    "negative_log_likelihood": "perplexity", "correct": "accuracy", "same_answer": "agreement_with_source",
    "cosine_to_source": "cosine_similarity_to_source", "kl_to_source": "kl_divergence_from_source",
}  # fmt: skip
"""Quantities that a model and a data set have, on whatever machine -> the hub's name, or one of ours."""
MADE = "<!-- made by squeeze report --model-card -->"
"""Tells a card that may be written over from somebody's README."""


def model_card(report: Report, base_model: str | None = None) -> str:
    """The card of the report's result. `base_model`: hub id of the trained model, where the author knows it.

    Raises ReportError for a report without artifacts, and for a base model that is no hub id.
    """
    from huggingface_hub import EvalResult, ModelCardData

    if not report.manifests:
        raise ReportError(
            "the report holds no artifact, so there is no model to write a card for. Give the report of squeeze run."
        )
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise ReportError(
            f"--base-model {base_model!r} is no hub id. Write OWNER/NAME, as in HuggingFaceTB/SmolLM2-135M."
        )
    result, known = _result(report), base_model or told_base_model(report)
    found = [EvalResult(**fields) for fields in evaluations(report, result)]
    data = ModelCardData(
        base_model=known, library_name=LIBRARIES.get(result.format, result.format),
        pipeline_tag=PIPELINES.get(result.task, result.task), tags=_tags(report, result),
        model_name=visible(report.title) if found else None, eval_results=found or None, **_relation(report, known),
    )  # fmt: skip
    return f"---\n{data.to_yaml().strip()}\n---\n\n{_body(report, result)}"


def write_card(text: str, file: Path) -> None:
    """Write the card. Raises ReportError where the file holds what squeeze did not write: a README is a person's work."""
    try:
        if file.exists() and MADE not in file.read_text("utf-8", "replace"):
            raise ReportError(
                f"{file} was not made by squeeze, and a card would replace it. Name another file, or move it away."
            )
        write_atomically(file, text)
    except OSError as error:
        raise ReportError(f"{file} cannot be written: {error.strerror or error}. Name another file.") from error


def told_base_model(report: Report) -> str | None:
    """The hub id that the recipe loaded a revision of; None where the name may as well be a folder: "models/mine" looks alike."""
    model = report.recipe.get("model")
    if not isinstance(model, dict) or not model.get("revision"):
        return None
    path = model.get("path")
    return path if isinstance(path, str) and HUB_ID.fullmatch(path) else None


def _relation(report: Report, base_model: str | None) -> dict[str, Any]:
    """The hub's word for what became of the base model; it has one for quantized ones and none for pruned ones."""
    kinds = {m.record.kind for m in report.manifests if m.record is not None}
    return {"base_model_relation": "quantized"} if base_model and "quantize" in kinds else {}


def evaluations(report: Report, result: Manifest) -> list[dict[str, Any]]:
    """Fields of one EvalResult for each measured quality of the result; what failed, or is not finite, is not among them."""
    where, pipeline = _data_set(report), PIPELINES.get(result.task, result.task)
    found: list[dict[str, Any]] = [
        {
            "metric_type": METRICS[r.quantity],
            "metric_value": r.after.value,
            "metric_name": f"{r.label} ({r.after.runtime})",
            **where,
        }
        for r in summarize(report)
        if r.quantity in METRICS
    ]
    for m in _harness(report, result):
        task, _, metric = visible(m.quantity).rpartition(" ")
        mean = math.fsum(m.values) / len(m.values)
        fields = {"metric_type": metric, "metric_value": mean, "metric_name": f"{metric} ({m.runtime})"}
        found.append(
            {**fields, "dataset_type": task, "dataset_name": task, "dataset_args": {"examples": len(m.values)}}
        )
    return [
        {"task_type": pipeline, "task_name": pipeline.replace("-", " ")} | fields
        for fields in found
        if math.isfinite(fields["metric_value"])
    ]


def _data_set(report: Report) -> dict[str, Any]:
    """Which texts quality was read from: the name without its folders, which are nobody's business, and the digest of the split."""
    data = report.recipe.get("data")
    path = str(data.get("path")) if isinstance(data, dict) and data.get("path") else ""
    name = visible(path.removeprefix("asset:") if path.startswith("asset:") else PurePath(path).name) or "unnamed texts"
    digest = report.data.get("evaluate")
    args = {"dataset_args": {"digest": digest}} if digest else {}
    return {"dataset_type": name, "dataset_name": f"{name}, held out", "dataset_split": "evaluate", **args}


def _harness(report: Report, result: Manifest) -> list[Measurement]:
    """What EleutherAI's harness said of the result: quantities named "TASK METRIC", with a value for each example."""
    bench = report.recipe.get("bench")
    if not isinstance(bench, dict) or not bench.get("lm_eval"):
        return []
    own = [m for m in report.measurements if m.artifact_digest == result.digest and m.values and not m.repeat]
    return [m for m in own if " " in m.quantity]


def _result(report: Report) -> Manifest:
    """The manifest of the artifact that the before/after table calls after."""
    after = ends(report)[1]
    digest = next(digest for digest, name in names(report).items() if name == after)
    return next(m for m in report.manifests if m.digest == digest)


def _tags(report: Report, result: Manifest) -> list[str]:
    """squeeze, the format, and what was done: "quantize", "int8"."""
    done = [m.record for m in report.manifests if m.record is not None]
    words = [word for record in done for word in (record.kind, record.settings.get("scheme")) if isinstance(word, str)]
    return [visible(tag) for tag in dict.fromkeys(["squeeze", result.format, *words])]


def _body(report: Report, result: Manifest) -> str:
    stages = [stage_label(m.record) for m in report.manifests if m.record is not None and m.record.kind != "export"]
    made = f"Made by squeeze {__version__} from {result.source}" + (f": {'; '.join(stages)}." if stages else ".")
    trouble = [*failures(report), "", *warned(report)]
    parts = [
        [f"# {escaped(report.title)}", "", MADE],
        [escaped(headline(report)), "", escaped(made)],
        ["## Before and after", "", *(verdict_table(report) or ["Nothing was measured."]), "", measured_on(report)],
        ["## Artifacts", "", *artifact_table(report)],
        ["## What to know", "", *trouble] if any(trouble) else [],
    ]
    return joined(parts, folded(report))
