"""What pruning costs and brings on this machine: criteria side by side, sparsity spread by sensitivity, parts removed, whole chains.

    python benchmarks/pruning.py                 all parts, about two hours on two cores
    python benchmarks/pruning.py criteria        or walk, allocation, classifier, layers, chain, masks

Every model is made by `squeeze run` from a committed recipe; all of one part are then measured in one bench, so that their answers pair
up text by text. Reports go to benchmarks/results/<machine>/prune-*.json; what was compared is said in each report's notes. Started
again after an interruption it goes on.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, when run as a file

from benchmarks.runs import (
    ROOT,
    RUNS,
    accuracies,
    against_plain,
    bench,
    do_parts,
    finetuned,
    of_each,
    recipe,
    run_into,
    tuned,
)
from squeeze.artifact import read_artifact
from squeeze.masks import masks_of
from squeeze.model import load_model
from squeeze.report import stats
from squeeze.report.schema import Measurement, Report, StageRecord

CRITERIA = ("magnitude", "wanda", "sparsegpt", "wanda-2-4", "sparsegpt-2-4")
SCORES: dict[str, Any] = {"workloads": [], "memory": False, "energy": False, "ceilings": False}
"""Of a bench that scores answers and times nothing."""
GIB = 2**30


def criteria(say: Any) -> tuple[Report, list[str]]:
    """Half of SmolLM2's weights zero, by each criterion and pattern, beside the dense model; what making them took."""
    report, notes = made_by(CRITERIA, say, repeats=3)
    scored = of_each(report, "negative_log_likelihood", 1 + len(CRITERIA))
    for n in (1, 3):
        notes.append(f"{CRITERIA[n + 1]} over {CRITERIA[n]}, paired by block: {relative(scored[n + 2], scored[n + 1])}")
    return report, notes


def walk(say: Any) -> tuple[Report, list[str]]:
    """How long Wanda and SparseGPT take for the whole model, and what comes of it; nothing else is timed."""
    return made_by(("wanda", "sparsegpt"), say, **SCORES)


def made_by(names: Sequence[str], say: Any, **settings: Any) -> tuple[Report, list[str]]:
    """SmolLM2 pruned as these recipes say, beside the dense model; what each lost, and what making it took."""
    made = [alone(f"smollm2-{name}", say) for name in names]
    folders = [made[0] / "0-source", *(run / "1-prune" for run in made)]
    report = bench(folders, recipe("smollm2-wanda"), say, runtimes=["torch"], **settings)
    scored = of_each(report, "negative_log_likelihood", 1 + len(names))
    dense = stats.perplexity(scored[0])
    notes = [f"perplexity of the dense model {dense:.2f}, on {len(scored[0].values)} blocks"]
    for name, run, m in zip(names, made, scored[1:], strict=True):
        cost = json.loads((run / "cost.json").read_text("utf-8"))
        notes.append(
            f"{name}: {stats.perplexity(m):.2f}, {relative(m, scored[0])} of dense; pruned in {pruned(run).seconds:.0f} s on "
            f"{cost['threads']} threads, {cost['peak_bytes'] / GIB:.2f} GiB at most for the whole command"
        )
    return report, notes


def allocation(say: Any) -> tuple[Report, list[str]]:
    """Half of SmolLM2's weights zero, the same share of every matrix or spread by what a scan measured or by outliers."""
    uniform = alone("smollm2-wanda", say)
    spread = [alone(name, say) for name in ("smollm2-wanda-sensitivity", "smollm2-wanda-owl")]
    report = bench(
        [uniform / "0-source", *(run / "1-prune" for run in (uniform, *spread))], recipe("smollm2-wanda"), say,
        runtimes=["torch"], **SCORES,
    )  # fmt: skip
    scored = of_each(report, "negative_log_likelihood", 4)
    notes = [f"perplexity: dense {stats.perplexity(scored[0]):.2f}, uniform {stats.perplexity(scored[1]):.2f}"]
    for run, m in zip(spread, scored[2:], strict=True):
        notes.append(
            f"{run.name}: {stats.perplexity(m):.2f}, {relative(m, scored[1])} of uniform, paired by block; made in "
            f"{pruned(run).seconds:.0f} s"
        )
    return report, notes


def classifier(say: Any) -> tuple[Report, list[str]]:
    """Half of the feed-forward neurons and a third of the heads gone, one epoch of recovery, in ONNX Runtime."""
    return against_plain("sentiment-pruned", "export-2-distill", say)


def chain(say: Any) -> tuple[Report, list[str]]:
    """Parts removed, distilled, int8: one recipe, against the export that torch writes when nobody asks for more."""
    return against_plain("sentiment-pruned-int8", "export-3-quantize", say)


def layers(say: Any) -> tuple[Report, list[str]]:
    """A quarter of SmolLM2's layers gone, and what distillation mends in half an hour."""
    tuned(say)
    whole = recipe("smollm2-pruned-layers")
    run = run_into("smollm2-pruned-layers", whole.model_copy(update={"bench": None}), say)
    report = bench(
        [run / name for name in ("0-source", "1-prune", "2-distill")], whole, say, runtimes=["torch"], repeats=5
    )
    scored, rates = of_each(report, "negative_log_likelihood", 3), of_each(report, "decode_rate", 3)
    gain = stats.ratio(rates[2], rates[0])
    curve = record_of(run, "2-distill").training
    return report, [
        "held-out perplexity: "
        + ", ".join(
            f"{what} {stats.perplexity(m):.2f}" for what, m in zip(("before", "cut", "recovered"), scored, strict=True)
        ),
        f"tokens/s: {gain.value:.2f}x [{gain.low:.2f}, {gain.high:.2f}] of the whole model's in torch",
        *([] if curve is None else [f"recovered in {curve.seconds[-1] / 60:.0f} min"]),
    ]


def masks(say: Any) -> tuple[Report, list[str]]:
    """Zeros of the classifier after pruning, after training on, and in the int8 export: the same ones, counted in the files."""
    finetuned()
    whole = recipe("sentiment-sparse-int8")
    run = run_into("sentiment-sparse-int8", whole.model_copy(update={"bench": None}), say)
    report = bench(
        [run / name for name in ("export-0-source", "export-3-quantize")],
        whole,
        say,
        runtimes=["onnxruntime"],
        **SCORES,
    )
    kept = masks_of(load_model(run / "1-prune"))
    worst = max(abs(2 * int((~keep).sum()) - keep.numel()) / 2 for keep in kept.values())
    asked = sum(keep.numel() for keep in kept.values()) // 2
    notes = [
        f"{len(kept)} matrices, half of {sum(keep.numel() for keep in kept.values()):,} weights asked: {asked:,}; none is "
        f"more than {worst:g} weights off its half"
    ]
    for name in ("1-prune", "2-distill", "3-quantize"):
        values = weights_of(load_model(run / name), kept)
        zeros = sum(int((value == 0).sum()) for value in values.values())
        lost = sum(int((value[~kept[n]] != 0).sum()) for n, value in values.items())
        notes.append(f"{name}: {zeros:,} zeros; {lost} of the mask's are zero no more")
    integers = load_model(run / "3-quantize").integers
    stored = [numpy_helper.to_array(t) for t in onnx.load(run / "export-3-quantize" / "model.onnx").graph.initializer]
    notes.append(
        f"the export's int8 matrices hold {sum(int((a == 0).sum()) for a in stored if a.dtype == np.int8 and a.ndim == 2):,} zeros, those "
        f"of 3-quantize {sum(int((w.integers == 0).sum()) for w in integers.values()):,}"
    )
    return report, [*notes, accuracies(*reversed(of_each(report, "correct", 2)))]


def weights_of(model: Any, names: Iterable[str]) -> dict[str, Any]:
    """The model's matrices, as integers where they are."""
    parameters = dict(model.network.named_parameters())
    return {n: model.integers[n].integers if n in model.integers else parameters[n].detach() for n in names}


def alone(name: str, say: Any) -> Path:
    """The run folder of a recipe's stages, made by the command in a process of its own, whose peak of memory is kept beside them."""
    RUNS.mkdir(parents=True, exist_ok=True)
    run = RUNS / name
    if (run / "cost.json").is_file():
        return run
    say(name, 0, 1)
    threads = len(os.sched_getaffinity(0))
    command = [
        sys.executable,
        "-m",
        "squeeze",
        "run",
        ROOT / "recipes" / f"{name}.yaml",
        "--out",
        run,
        "--quiet",
        "--resume",
    ]
    for part in ("export", "verify", "bench"):
        command += ["--set", f"{part}=null"]
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(command, cwd=ROOT, stdout=printed)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"squeeze run {name} failed with {os.waitstatus_to_exitcode(status)}.")
    (run / "cost.json").write_text(
        json.dumps({"peak_bytes": 1024 * usage.ru_maxrss, "threads": threads}) + "\n", "utf-8"
    )
    return run


def pruned(run: Path) -> StageRecord:
    """What the prune stage wrote down."""
    return record_of(run, "1-prune")


def record_of(run: Path, artifact: str) -> StageRecord:
    """What the stage wrote down about itself."""
    record = read_artifact(run / artifact, check=False).manifest.record
    assert record is not None
    return record


def relative(one: Measurement, other: Measurement) -> str:
    """Ratio of two perplexities with its interval."""
    found = stats.perplexity_ratio(one, other)
    return f"{found.value:.3f}x [{found.low:.3f}, {found.high:.3f}]"


PARTS = {part.__name__: part for part in (criteria, walk, allocation, classifier, layers, chain, masks)}

if __name__ == "__main__":
    do_parts(PARTS, "prune", __doc__ or "")
