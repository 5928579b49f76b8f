"""What the dashboard shows at its fullest: the tweet classifier and SmolLM2 through several stages.

    python benchmarks/showcase.py                       all parts, 45 minutes on two quiet cores
    python benchmarks/showcase.py classifier            or decoder
    squeeze dashboard benchmarks/results --out dashboard.html      the page that docs/*.png show

A chain's artifacts are measured in torch and exported, with profile and this machine's ceilings, the classifier's also under load and
beside what other tools make of it. Reports go to benchmarks/results/<machine>/showcase-*.json. Started again after an interruption it
goes on. The history over commits is benchmarks/history.py.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, when run as a file

from benchmarks import peers
from benchmarks.runs import (
    accuracies,
    bench,
    do_parts,
    faster,
    finetuned,
    of_each,
    recipe,
    run_into,
    tuned,
)
from squeeze.api import export
from squeeze.report import stats
from squeeze.report.schema import Report

CALLERS = (1, 2, 4)


def classifier(say: Any) -> tuple[Report, list[str]]:
    """Half of the layers, heads and neurons gone, distilled, int8: each stage in torch and exported, and two peers."""
    finetuned()
    whole = recipe("sentiment-pruned-int8")
    run = run_into("sentiment-pruned-int8", whole.model_copy(update={"bench": None}), say)
    stages = [run / name for name in ("0-source", "1-prune", "2-distill", "3-quantize")]
    exports = [export(stage, source=False).folder for stage in stages]
    others = [peers.plain_opset18(run / "0-source"), peers.quantize_dynamic(exports[0], per_channel=False)]
    report = bench(
        [*stages, *exports, *others],
        whole,
        say,
        runtimes=["torch", "onnxruntime"],
        repeats=4,
        seconds_per_cell=0.5,
        profile=True,
        workloads=[
            {"kind": "grid", "batch": [1], "sequence": [16, 64, 128]},
            {"kind": "dataset", "batch": 50, "order": "sorted"},
            *({"kind": "closed", "callers": callers, "seconds": 2} for callers in CALLERS),
        ],
    )
    times, right = (
        of_each(report, quantity, 10)[7:9] for quantity in ("set_time", "correct")
    )  # the last export, torch's own
    return report, [faster(*times, "torch's opset-18 export"), accuracies(*right)]


def decoder(say: Any) -> tuple[Report, list[str]]:
    """Eight of thirty layers gone, distilled, int8: in torch up to the student, and the exports of source, student and int8."""
    tuned(say)
    whole = recipe("smollm2-pruned-int8")
    run = run_into("smollm2-pruned-int8", whole.model_copy(update={"bench": None}), say)
    stages = [run / name for name in ("0-source", "1-prune", "2-distill")]
    exports = [export(run / name, source=False).folder for name in ("0-source", "2-distill", "3-quantize")]
    report = bench(
        [*stages, *exports],
        whole,
        say,
        runtimes=["torch", "onnxruntime-genai"],
        repeats=3,
        seconds_per_cell=0.5,
        profile=True,
    )
    rates, scored = (of_each(report, quantity, 6) for quantity in ("decode_rate", "negative_log_likelihood"))
    gain = stats.ratio(rates[-1], rates[3])
    return report, [
        f"tokens/s: {gain.value:.2f}x [{gain.low:.2f}, {gain.high:.2f}] of the source's export in onnxruntime-genai",
        f"held-out perplexity {stats.perplexity(scored[0]):.2f} before, {stats.perplexity(scored[-1]):.2f} after",
    ]


PARTS = {"classifier": classifier, "decoder": decoder}

if __name__ == "__main__":
    do_parts(PARTS, "showcase", __doc__ or "")
