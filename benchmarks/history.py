"""squeeze over its own commits: what each made of the tweet classifier, run and measured by that commit's own code.

    python benchmarks/history.py [--commits 14] [--first 262c7c3]       about a minute each

Each commit is checked out aside, runs recipes/sentiment-int8.yaml as it stood then with today's packages, on fewer texts and one
length, and its report goes to benchmarks/results/<machine>-history/. The dashboard draws what of it became better or worse, and where.
A commit whose report is there already is passed by, one that cannot run is named.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, when run as a file

from benchmarks.runs import ROOT, finetuned
from benchmarks.store import CACHE, machine
from squeeze.console import message

FIRST = "262c7c3"
"""The oldest that is tried: its bench measures what today's does."""
CHANGED = (
    "verify=null",  # older ones fail on processors without VNNI, where their products saturate; the accuracy shows what that costs
    "data.splits.evaluate=200",
    "bench.repeats=3",
    "bench.budget_seconds=0",
    "bench.ceilings=false",
    "bench.energy=false",
    "bench.threads=2",
    "bench.workloads=[{kind: fixed, batch: 1, sequence: 128}]",
)


def main() -> None:
    """Run those commits that have no report yet, oldest first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--commits", type=int, default=14, help="evenly among those that changed squeeze/ (%(default)s)"
    )
    parser.add_argument("--first", default=FIRST, help="the oldest (%(default)s)")
    parser.add_argument("--machine", default=machine(), help="folder under benchmarks/results (%(default)s)")
    given = parser.parse_args()
    finetuned()
    results = ROOT / "benchmarks" / "results" / f"{given.machine}-history"
    results.mkdir(parents=True, exist_ok=True)
    for commit in chosen(given.first, given.commits):
        target = results / f"{commit}.json"
        if not target.is_file():
            message(commit)
            measure(commit, target)


def chosen(first: str, count: int) -> list[str]:
    """Commits from the first to the newest, evenly among those of the main line that changed squeeze/."""
    asked = ["git", "rev-list", "--first-parent", "--reverse", "--abbrev-commit", f"{first}^..HEAD", "--", "squeeze"]
    found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    last = len(found) - 1
    return [found[round(n * last / max(1, count - 1))] for n in range(min(count, len(found)))]


def measure(commit: str, target: Path) -> None:
    """One commit's report."""
    with tempfile.TemporaryDirectory() as folder:
        tree, run = Path(folder) / "squeeze", Path(folder) / "run"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, commit], cwd=ROOT, check=True)
        try:
            (tree / "benchmarks" / "cache").symlink_to(CACHE)
            command = [
                sys.executable,
                "-m",
                "squeeze",
                "run",
                "recipes/sentiment-int8.yaml",
                "--out",
                str(run),
                "--quiet",
            ]
            for change in CHANGED:
                command += ["--set", change]
            # Its own code, in every child too, though another squeeze is installed.
            done = subprocess.run(
                command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True
            )
            if done.returncode:
                message(f"{commit} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
            else:
                shutil.copyfile(run / "report.json", target)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
