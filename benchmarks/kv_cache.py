"""SmolLM2's key-value cache as float32 and as int8: memory, tokens a second and perplexity, over short and long contexts.

    python benchmarks/kv_cache.py                 128, 2048 and 4032 tokens of prompt, 64 new ones; about an hour on two cores
    python benchmarks/kv_cache.py --prompts 2048  one of them

Weights are the int8 ones of recipes/smollm2-int8.yaml in both, so that only the cache differs. Perplexity is that of prompts, which
read the rounded cache as later tokens do, on blocks of `--block` tokens; scales come from blocks of 512, so that longer ones also
show whether a short calibration holds for them. Writes benchmarks/results/<machine>/kv-cache-<prompt>.json: one report for each
prompt, since the peak of memory is that of a whole process.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, when run as a file

import squeeze
from benchmarks.store import CACHE, machine
from squeeze.console import print_report, progress
from squeeze.recipe import read_recipe
from squeeze.report.schema import Report, write_report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = CACHE / "results"
RECIPE = "smollm2-int8"


def main() -> None:
    """Measure each prompt length in turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="*", default=[128, 2048, 4032], help="tokens (%(default)s)")
    parser.add_argument("--block", type=int, default=2048, help="tokens of a held-out block (%(default)s)")
    parser.add_argument("--evaluate", type=int, default=8, help="held-out blocks (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="processes of each, by turns (%(default)s)")
    parser.add_argument("--machine", default=machine(), help="folder under benchmarks/results (%(default)s)")
    given = parser.parse_args()
    for number, prompt in enumerate(given.prompts):
        with progress() as say:
            report = measured(prompt, given.block, given.evaluate if number == 0 else 0, given.repeats, say)
        report = report.model_copy(update={"title": f"kv-cache-{prompt}"})
        target = ROOT / "benchmarks" / "results" / given.machine / f"kv-cache-{prompt}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_report(report, target)
        print_report(report)


def measured(prompt: int, block: int, evaluate: int, repeats: int, say: Any) -> Report:
    """Both exports by turns; perplexity as well where there are blocks to `evaluate`."""
    recipe = read_recipe(ROOT / "recipes" / f"{RECIPE}.yaml")
    data, run = recipe.data.model_dump(mode="json"), CACHE / "runs" / "kv-cache"
    run.parent.mkdir(parents=True, exist_ok=True)
    # Steps, not the recipe's own run: no step is added to a run that a recipe made.
    squeeze.quantize(
        recipe.model.path, run, data=data, seed=recipe.seed, **recipe.stages[0].model_dump(exclude_defaults=True)
    )
    plain = squeeze.export(run, source=False).folder
    small = squeeze.export(run, kv_cache="int8", data=data, source=False).folder
    held_out = {**data, "block_size": block, "splits": {"evaluate": max(evaluate, 1), "calibration": 0, "train": 0}}
    settings = {
        "runtimes": ["onnxruntime-genai", *(["onnxruntime"] if evaluate else [])],
        "threads": 2, "repeats": repeats, "budget_seconds": 0, "quality": bool(evaluate), "ceilings": False, "energy": False,
        "workloads": [{"kind": "generate", "batch": 1, "prompt": prompt, "new_tokens": 64}],
    }  # fmt: skip
    return squeeze.bench([plain, small], data=held_out, settings=settings, results=RESULTS, progress=say)


if __name__ == "__main__":
    main()
