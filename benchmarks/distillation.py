"""What distillation keeps and gains on this machine: students beside their teacher, and beside the same students without one.

    python benchmarks/distillation.py                 all parts, about two hours on two cores
    python benchmarks/distillation.py classifier      or chain, embeddings, language, epochs

Every student is made by `squeeze run` from a committed recipe, varied only in its seed or its losses; all of one part are then
measured in one bench, so that their answers pair up text by text. Reports go to benchmarks/results/<machine>/distill-*.json; what
was compared is said in each report's notes. Started again after an interruption it goes on.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, when run as a file

from benchmarks.runs import against_plain, bench, do_parts, finetuned, of_each, recipe, run_into, share, tuned
from squeeze.recipe import Recipe
from squeeze.report import stats
from squeeze.report.schema import Report, read_report

SEEDS = (0, 1, 2)
LABELS_RATE = 2e-4
"""Of the students that see labels alone: with the taught ones' 5e-4 they do worse (docs/log.md)."""
CACHED = 12000
"""Tweets of the two epochs whose times are compared."""


def classifier(say: Any) -> tuple[Report, list[str]]:
    """Three students taught by the classifier, and the same three that only see labels, for as many steps."""
    finetuned()
    pairs = [students(n, say) for n in SEEDS]
    taught, alone = [one for one, _ in pairs], [other for _, other in pairs]
    paths = [taught[0] / "0-source", *(run / "1-distill" for run in (*taught, *alone))]
    report = bench(
        paths, recipe("sentiment-distilled-int8"), say, runtimes=["torch"], repeats=5,
        workloads=[{"kind": "dataset", "batch": 50, "order": "sorted"}],
    )  # fmt: skip
    right = of_each(report, "correct", len(paths))
    teacher = right[0]
    notes = []
    for n in SEEDS:
        ours, labels = right[1 + n], right[1 + len(SEEDS) + n]
        gain = stats.difference(ours, labels)
        notes.append(
            f"seed {n}: taught {share(ours):.2%} = {share(ours) / share(teacher):.2%} of the teacher's {share(teacher):.2%}; labels alone "
            f"{share(labels):.2%}; paired gain {100 * gain.value:+.2f} points [{100 * gain.low:+.2f}, {100 * gain.high:+.2f}]"
        )
    means = [
        [sum(m.values[i] for m in group) / len(SEEDS) for i in range(len(teacher.values))]
        for group in (right[1:4], right[4:7])
    ]
    gain = stats.mean([a - b for a, b in zip(*means, strict=True)])
    notes.append(
        f"all seeds: taught less labels alone {100 * gain.value:+.2f} points [{100 * gain.low:+.2f}, {100 * gain.high:+.2f}], by tweet"
    )
    times = of_each(report, "set_time", len(paths))
    for n in SEEDS:
        found = stats.ratio(times[0], times[1 + n])
        notes.append(
            f"seed {n}: {found.value:.2f}x the teacher's speed in torch over the whole set [{found.low:.2f}, {found.high:.2f}]"
        )
    return report, notes


def students(seed: int, say: Any) -> tuple[Path, Path]:
    """The run folders of the taught student and of the one that sees labels alone."""
    name, kept = "sentiment-distilled-int8", {"cache": {"folder": "benchmarks/cache/answers", "gigabytes": 8.0}}
    taught = made(name, f"classifier-taught-{seed}", say, seed=seed, stage=kept)  # all seeds read one teacher's answers
    return taught, made(name, f"classifier-labels-{seed}", say, seed=seed, losses=["labels"], learning_rate=LABELS_RATE)


def chain(say: Any) -> tuple[Report, list[str]]:
    """Distilled, then int8: one recipe, against the export that torch writes when nobody asks for more."""
    return against_plain("sentiment-distilled-int8", "export-2-quantize", say, folder="chain")


def embeddings(say: Any) -> tuple[Report, list[str]]:
    """The student of the recipe beside its teacher, in torch and as exported."""
    whole = recipe("embeddings-distilled")
    run = run_into("embeddings-distilled", whole.model_copy(update={"bench": None}), say)
    paths = [run / name for name in ("0-source", "1-distill", "export-0-source", "export-1-distill")]
    report = bench(paths, whole, say, repeats=5)
    notes = []
    for m in report.measurements:
        if m.quantity == "cosine_to_source" and m.values and "distill" in m.artifact:
            found = stats.mean(m.values)
            notes.append(
                f"{m.artifact}: mean cosine to the teacher {found.value:.4f} [{found.low:.4f}, {found.high:.4f}]"
            )
    return report, notes


def language(say: Any) -> tuple[Report, list[str]]:
    """The decoder's student, taught and with cross entropy alone for as many steps, by held-out perplexity; both curves are kept."""
    tuned(say)
    name = "smollm2-20-layers"
    taught = made(name, "language-taught", say)
    alone = made(name, "language-labels", say, losses=["labels"])
    cut = made(name, "language-cut", say, steps=1, learning_rate=1e-12)
    paths = [taught / "0-source", *(run / "1-distill" for run in (cut, alone, taught))]
    report = bench(paths, recipe(name), say, runtimes=["torch"], repeats=3)
    scored = of_each(report, "negative_log_likelihood", len(paths))
    found = stats.perplexity_ratio(scored[3], scored[2])
    notes = [
        f"held-out perplexity: teacher {stats.perplexity(scored[0]):.2f}, cut and not trained {stats.perplexity(scored[1]):.2f}, cross "
        f"entropy alone {stats.perplexity(scored[2]):.2f}, taught {stats.perplexity(scored[3]):.2f}",
        f"taught over cross entropy alone, paired by block: {100 * (found.value - 1):+.1f} % [{100 * (found.low - 1):+.1f}, "
        f"{100 * (found.high - 1):+.1f}]",
    ]
    for label, run in (("taught", taught), ("cross entropy alone", alone)):
        curve = squeeze_curve(report, run)
        if curve is not None:
            points = ", ".join(f"{v.tokens:,} tokens {v.value:.1f}" for v in curve.validations)
            notes.append(
                f"{label}, perplexity of {curve.held_out} other blocks by tokens seen: {points}; {curve.seconds[-1] / 60:.0f} min"
            )
    return report, notes


def epochs(say: Any) -> tuple[Report, list[str]]:
    """Two epochs with the teacher's answers kept: the second never runs the teacher."""
    finetuned()
    stage = {"cache": {}, "examples": CACHED}
    run = made(
        "sentiment-distilled-int8", "classifier-two-epochs", say, losses=["kl"], stage=stage,
        steps=None, epochs=2.0, validations=1, held_out=100,
    )  # fmt: skip
    report = read_report(run / "report.json")
    (record,) = (m.record for m in report.manifests if m.record is not None)
    curve = record.training
    assert curve is not None
    assert curve.teacher_seconds is not None
    first, second = curve.teacher_seconds + curve.epoch_seconds[0], curve.epoch_seconds[1]
    notes = [note for note in record.notes if note.startswith("teacher's answers")]
    notes.append(
        f"first epoch {first:.0f} s, {curve.teacher_seconds:.0f} of them the teacher's; second {second:.0f} s = {second / first:.0%} of it"
    )
    return report, notes


def made(
    made_from: str, name: str, say: Any, *, seed: int = 0, losses: list[str] | None = None, stage: Any = None, **training: Any
) -> Path:  # fmt: skip
    """The run folder of the recipe's distillation alone, with these settings in place of its own."""
    loaded = recipe(made_from)
    content = loaded.stages[0].model_dump() | (stage or {})
    content["training"] |= {"seed": seed, **training}
    if losses is not None:
        content["losses"] = [{"kind": kind} for kind in losses]
    whole = loaded.model_dump() | {"name": name, "stages": [content], "export": None, "verify": None, "bench": None}
    return run_into(name, Recipe.model_validate(whole), say)


def squeeze_curve(report: Report, run: Path) -> Any:
    """The training curve of the run's student, from its manifest."""
    from squeeze.artifact import read_artifact

    record = read_artifact(run / "1-distill", check=False).manifest.record
    return None if record is None else record.training


PARTS = {"classifier": classifier, "chain": chain, "embeddings": embeddings, "language": language, "epochs": epochs}

if __name__ == "__main__":
    do_parts(PARTS, "distill", __doc__ or "")
