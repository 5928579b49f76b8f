"""squeeze beside other engines and other tools' models: one grid, one run, every runtime on the same pinned threads.

    make peers                        sets up .venv-peers with OpenVINO, NNCF and llama.cpp, then runs this
    python benchmarks/vs_peers.py     in an environment that has them; name encoder, decoder or load to do a part

Writes benchmarks/results/<machine>/vs-peers-*.json, from which the README's tables are made, and prints how the ratios compare with
those that were measured on another machine (see EXPECTED). An interrupted run goes on when started again.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, when run as a file

import squeeze
from benchmarks import peers
from benchmarks.store import CACHE, machine
from squeeze.console import message, print_report, progress
from squeeze.data import DataSettings, batches, load_data
from squeeze.errors import ArtifactError
from squeeze.model import ModelSettings, load_tokenizer, locate
from squeeze.recipe import read_recipe
from squeeze.report import stats
from squeeze.report.schema import Measurement, Report, write_report

ROOT = Path(__file__).resolve().parents[1]
RUNS, RESULTS = CACHE / "runs", CACHE / "results"
CALIBRATION = 300

EXPECTED: dict[str, tuple[tuple[str, str, str, str, str, float], ...]] = {
    "encoder": (
        ("openvino-nncf-int8", "openvino", "export-0-source", "onnxruntime", "whole set", 19.5 / 8.95),
        ("openvino-nncf-int8", "openvino", "export-0-source", "openvino", "1×128", 17.5 / 8.0),
        ("openvino-nncf-int8", "openvino", "export-0-source", "openvino", "8×128", 118 / 54),
        ("export-0-source", "openvino", "export-0-source", "onnxruntime", "1×128", 15 / 17.5),
    ),
    "decoder": (
        ("smollm2-int8/export-1-quantize", "onnxruntime-genai", "export-0-source", "onnxruntime-genai", "128+64 tokens", 125 / 36.5),
        ("export-0-source", "onnxruntime-genai", "0-source", "torch", "128+64 tokens", 36.5 / 21.5),
        ("llama.cpp F32", "llama.cpp", "export-0-source", "onnxruntime-genai", "128+64 tokens", 35 / 36.5),
        ("llama.cpp Q8_0", "llama.cpp", "llama.cpp F32", "llama.cpp", "128+64 tokens", 71.5 / 35),
        ("llama.cpp Q4_0", "llama.cpp", "llama.cpp F32", "llama.cpp", "128+64 tokens", 103.5 / 35),
    ),
}  # fmt: skip
"""(artifact, runtime, compared with artifact, runtime, workload, speed ratio) as another project's notes give them for 2 cores of a
Xeon with VNNI and without AMX. A machine with other units has other ratios; the run says which come out again within a quarter."""


def main() -> None:
    """Do the parts named on the command line, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="none: all")
    parser.add_argument("--machine", default=machine(), help="folder under benchmarks/results (%(default)s)")
    given = parser.parse_args()
    for part in given.parts or PARTS:
        with progress() as say:
            report = PARTS[part](say)
        report = report.model_copy(update={"title": f"vs-peers-{part}"})
        target = ROOT / "benchmarks" / "results" / given.machine / f"vs-peers-{part}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_report(report, target)
        print_report(report)
        for line in held_against(report, part):
            message(line)


def encoder(say: Any) -> Report:
    """The tweet classifier, float32 and int8, in both engines, beside NNCF's int8."""
    static, trained = artifacts("sentiment-int8-static"), artifacts("sentiment-int8-qat")
    export, texts = static / "export-0-source", calibration(static, "sentiment-int8-static")
    plain = peers.plain_opset18(static / "0-source")
    # NNCF on the graph that its users have, and on squeeze's, which computes the first token only after the last attention.
    others = [peers.nncf_int8(plain, texts), peers.nncf_int8(export, texts, name="openvino-nncf-int8-squeeze-graph")]
    recipe = read_recipe(ROOT / "recipes" / "sentiment-int8-static.yaml")
    settings = {
        "runtimes": ["onnxruntime", "openvino"], "threads": 2, "repeats": 8, "budget_seconds": 0,
        "seconds_per_cell": 0.5, "workloads": [w.model_dump() for w in (recipe.bench and recipe.bench.workloads) or ()],
    }  # fmt: skip
    paths = [plain, export, static / "export-1-quantize", trained / "export-2-qat", *others]
    return squeeze.bench(paths, data=recipe.data.model_dump(), settings=settings, results=RESULTS, progress=say)


def embeddings(say: Any) -> Report:
    """MiniLM as published, judged by the cosine of its token vectors to the original's."""
    run = artifacts("embeddings-int8-static")
    export = run / "export-0-source"
    others = [
        peers.nncf_int8(export, calibration(run, "embeddings-int8-static"), name="openvino-nncf-int8-embeddings"),
        peers.quantize_dynamic(export, per_channel=False, name="ort-quantize-dynamic-embeddings"),
    ]
    recipe = read_recipe(ROOT / "recipes" / "embeddings-int8-static.yaml")
    settings = {
        "runtimes": ["onnxruntime", "openvino"], "threads": 2, "repeats": 8, "budget_seconds": 0, "seconds_per_cell": 0.5,
        "workloads": [w.model_dump() for w in (recipe.bench and recipe.bench.workloads) or ()],
    }  # fmt: skip
    paths = [export, run / "export-1-quantize", *others]
    return squeeze.bench(paths, data=recipe.data.model_dump(), settings=settings, results=RESULTS, progress=say)


def qat(say: Any) -> Report:
    """What training with the rounding in the loop mends of int8-static in its plainest form."""
    run = artifacts("sentiment-minmax-qat")
    recipe = read_recipe(ROOT / "recipes" / "sentiment-minmax-qat.yaml")
    settings = {
        "runtimes": ["torch"], "threads": 2, "repeats": 3, "budget_seconds": 0,
        "workloads": [{"kind": "fixed", "batch": 1, "sequence": 16}],
    }  # fmt: skip
    paths = [run / "0-source", run / "1-quantize", run / "2-qat"]
    return squeeze.bench(paths, data=recipe.data.model_dump(), settings=settings, results=RESULTS, progress=say)


def decoder(say: Any) -> Report:
    """SmolLM2-135M in onnxruntime-genai, torch and llama.cpp."""
    run, four = artifacts("smollm2-int8"), artifacts("smollm2-int4")
    source = locate(ModelSettings(path="asset:smollm2-135m-instruct"))
    files = [peers.gguf(Path(source), kind) for kind in ("F32", "Q8_0", "Q4_0")]
    recipe = read_recipe(ROOT / "recipes" / "smollm2-int8.yaml")
    settings = {
        "runtimes": ["torch", "onnxruntime-genai", "llama.cpp"], "threads": 2, "repeats": 8, "budget_seconds": 0,
        "workloads": [w.model_dump() for w in (recipe.bench and recipe.bench.workloads) or ()],
    }  # fmt: skip
    paths = [run / "0-source", run / "export-0-source", run / "export-1-quantize", four / "export-1-quantize", *files]
    return squeeze.bench(paths, data=recipe.data.model_dump(), settings=settings, results=RESULTS, progress=say)


def load(say: Any) -> Report:
    """The classifier under load: tweets that arrive at random, and the rate at which 99 of 100 are answered within 50 ms."""
    run = artifacts("sentiment-int8")
    recipe = read_recipe(ROOT / "recipes" / "sentiment-int8.yaml")
    settings = {
        "threads": 2, "repeats": 3, "budget_seconds": 0, "quality": False,
        "workloads": [
            {"kind": "closed", "callers": 1, "seconds": 5}, {"kind": "closed", "callers": 4, "seconds": 5},
            {"kind": "open", "limit_ms": 50, "seconds": 6}, {"kind": "open", "limit_ms": 50, "seconds": 6, "sequence": 128},
        ],
    }  # fmt: skip
    paths = [run / "export-0-source", run / "export-1-quantize"]
    return squeeze.bench(paths, data=recipe.data.model_dump(), settings=settings, results=RESULTS, progress=say)


def artifacts(name: str) -> Path:
    """The run folder of a recipe, without its bench; the classifier is trained first where it is not there.

    What an older squeeze left there, whose recipes had other settings, is made again.
    """
    if name.startswith("sentiment-"):
        subprocess.run([sys.executable, ROOT / "benchmarks" / "finetune_sentiment.py"], check=True, cwd=ROOT)
    recipe = read_recipe(ROOT / "recipes" / f"{name}.yaml").model_copy(update={"bench": None})
    RUNS.mkdir(parents=True, exist_ok=True)
    try:
        squeeze.run(recipe, RUNS / name, mode="resume")
    except ArtifactError:
        squeeze.run(recipe, RUNS / name, mode="fresh")
    return RUNS / name


def calibration(run: Path, name: str = "sentiment-int8") -> list[dict[str, Any]]:
    """The recipe's calibration tweets, one a batch."""
    recipe = read_recipe(ROOT / "recipes" / f"{name}.yaml")
    settings = DataSettings.model_validate(recipe.data.model_dump())
    tokenizer = load_tokenizer(run / "0-source")
    split = load_data(settings, recipe.task, tokenizer, 0).split("calibration")
    rows = batches(split, tokenizer, recipe.task, batch=1, max_length=settings.max_length, order="given")
    return [{name: array for name, array in row.items() if name != "index"} for row in rows[:CALIBRATION]]


def held_against(report: Report, part: str) -> list[str]:
    """For each expected ratio, what came out here."""
    lines = []
    for artifact, runtime, other, other_runtime, work, expected in EXPECTED.get(part, ()):
        fast, slow = (_timed(report, *side, work) for side in ((artifact, runtime), (other, other_runtime)))
        if fast is None or slow is None:
            lines.append(f"{artifact} in {runtime} against {other} in {other_runtime}, {work}: not measured")
            continue
        found = stats.ratio(slow, fast)
        close = "comes out again" if 0.75 <= found.value / expected <= 1.25 else "does NOT come out again"
        lines.append(
            f"{artifact} in {runtime} against {other} in {other_runtime}, {work}: {found.value:.2f}x [{found.low:.2f}, {found.high:.2f}], "
            f"expected {expected:.2f}x: {close}"
        )
    return lines


def _timed(report: Report, artifact: str, runtime: str, work: str) -> Measurement | None:
    quantities = ("latency", "set_time", "time_per_output_token")
    for m in report.measurements:
        label = "whole set" if m.quantity == "set_time" else m.workload.label if m.workload else ""
        if (m.artifact, m.runtime, label) == (artifact, runtime, work) and m.quantity in quantities and m.values:
            return m
    return None


PARTS = {"encoder": encoder, "embeddings": embeddings, "qat": qat, "decoder": decoder, "load": load}

if __name__ == "__main__":
    main()
