"""What the benchmarks of distillation and of pruning share: recipes run under a cache, one bench over what they made, findings as notes."""

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import squeeze
from benchmarks import peers
from benchmarks.store import CACHE, FOUND, machine
from squeeze.console import message, print_report, progress
from squeeze.recipe import Recipe, read_recipe
from squeeze.report import stats
from squeeze.report.schema import Measurement, Report, write_report

ROOT = Path(__file__).resolve().parents[1]
RUNS, RESULTS = CACHE / "runs", CACHE / "results"
Part = Callable[[Any], tuple[Report, list[str]]]
"""Takes a progress function; returns a report, and what was found as sentences."""


def do_parts(parts: Mapping[str, Part], prefix: str, described: str) -> None:
    """Do the parts named on the command line, or all; each writes benchmarks/results/<machine>/<prefix>-<part>.json."""
    parser = argparse.ArgumentParser(description=described.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="none: all")
    parser.add_argument("--machine", default=machine(), help="folder under benchmarks/results (%(default)s)")
    given = parser.parse_args()
    for part in given.parts or parts:
        with progress(quiet=not sys.stderr.isatty()) as say:
            report, notes = parts[part](say)
        report = report.model_copy(
            update={"title": f"{prefix}-{part}", "notes": (*report.notes, *(FOUND + note for note in notes))}
        )
        target = ROOT / "benchmarks" / "results" / given.machine / f"{prefix}-{part}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_report(report, target)
        print_report(report)
        for line in notes:
            message(line)


def finetuned() -> None:
    """The sentiment classifier that recipes start from, trained where it is not there yet."""
    subprocess.run([sys.executable, ROOT / "benchmarks" / "finetune_sentiment.py"], check=True, cwd=ROOT)


def tuned(say: Any) -> None:
    """SmolLM2 tuned to the manual, which recipes start from, trained where it is not there yet."""
    folder = CACHE / "smollm2-manual"
    if not (folder / "1-distill").is_dir():
        squeeze.run(recipe("smollm2-manual"), folder, mode="resume", progress=say)


def recipe(name: str) -> Recipe:
    """A committed recipe."""
    return read_recipe(ROOT / "recipes" / f"{name}.yaml")


def run_into(name: str, recipe: Recipe, say: Any) -> Path:
    """Run a recipe into its folder, or take what an earlier call left there."""
    RUNS.mkdir(parents=True, exist_ok=True)
    squeeze.run(recipe, RUNS / name, mode="resume", progress=say)
    return RUNS / name


def bench(paths: list[Path], recipe: Recipe, say: Any, **settings: Any) -> Report:
    """Measure artifacts side by side, on the recipe's texts and workloads, with two threads and as many repeats as `settings` say."""
    asked: dict[str, Any] = {
        "threads": 2, "budget_seconds": 0, "workloads": [w.model_dump() for w in (recipe.bench and recipe.bench.workloads) or ()],
    }  # fmt: skip
    return squeeze.bench(paths, data=recipe.data.model_dump(), settings=asked | settings, results=RESULTS, progress=say)


def of_each(report: Report, quantity: str, count: int) -> list[Measurement]:
    """That quantity of each of `count` artifacts, in their order. Raises SystemExit where one was not measured."""
    found: dict[str, Measurement] = {}
    for m in report.measurements:
        if m.quantity == quantity and m.values:
            found.setdefault(m.artifact, m)
    if len(found) != count:
        sys.exit(f"{quantity} was measured of {', '.join(found) or 'nothing'}; {count} artifacts were asked for.")
    return list(found.values())


def share(m: Measurement) -> float:
    """Mean of zeros and ones."""
    return sum(m.values) / len(m.values)


def accuracies(one: Measurement, other: Measurement) -> str:
    """Share of right answers of the one, in per cent of the other's, and the paired difference, text by text."""
    found = stats.difference(one, other)
    return (
        f"accuracy {share(one):.2%} = {share(one) / share(other):.2%} of {share(other):.2%}, {100 * found.value:+.2f} points "
        f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}], paired"
    )


def faster(one: Measurement, other: Measurement, than: str) -> str:
    """How many times as fast the one is as the other, both in seconds."""
    found = stats.ratio(other, one)
    return f"whole set: {found.value:.2f}x the speed of {than} [{found.low:.2f}, {found.high:.2f}]"


def against_plain(name: str, export: str, say: Any, folder: str | None = None) -> tuple[Report, list[str]]:
    """A classifier's recipe, its last export beside the dense one and beside what torch writes when nobody asks for more."""
    finetuned()
    whole = recipe(name)
    run = run_into(folder or name, whole.model_copy(update={"bench": None}), say)
    paths = [peers.plain_opset18(run / "0-source"), run / "export-0-source", run / export]
    report = bench(paths, whole, say, runtimes=["onnxruntime"], repeats=6, seconds_per_cell=0.5)
    times, right = of_each(report, "set_time", 3), of_each(report, "correct", 3)
    return report, [
        faster(times[2], times[0], "torch's opset-18 export"),
        faster(times[2], times[1], "squeeze's own fp32 export"),
        accuracies(right[2], right[0]),
    ]
