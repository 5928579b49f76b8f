"""Does the tool see what is not there, and what is? Twenty self-checks of the classifier, and twenty with a planted slow-down.

    python benchmarks/self_check.py [--runs 20] [--plant 0.05]

Appends one line for each run to benchmarks/results/<machine>/self-check.jsonl and prints the counts. In a quiet run a reported
difference is a false alarm; in a planted one (every call of one side sleeps for that share of its time) a missing one is a miss.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, when run as a file

import squeeze
from benchmarks.store import machine
from benchmarks.vs_peers import ROOT, artifacts
from squeeze.console import message
from squeeze.report.self_check import self_checks


def main() -> None:
    """Run both kinds in turn, so that a bad hour falls on both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="of each kind (%(default)s)")
    parser.add_argument(
        "--plant", type=float, default=0.05, help="share of its time that one side sleeps (%(default)s)"
    )
    parser.add_argument("--machine", default=machine(), help="folder under benchmarks/results (%(default)s)")
    given = parser.parse_args()
    run = artifacts("sentiment-int8")
    target = ROOT / "benchmarks" / "results" / given.machine / "self-check.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    found = {0.0: 0, given.plant: 0}
    spent = []
    for number in range(given.runs):
        for planted in found:
            started = time.monotonic()
            report = squeeze.self_check(run / "export-0-source", seed=number, planted=planted)
            seconds = time.monotonic() - started
            (row,) = self_checks(report)
            found[planted] += row.differs
            spent.append(seconds)
            line = {
                "started": report.started, "seed": number, "planted": planted, "differs": row.differs, "ratio": row.ratio.value,
                "low": row.ratio.low, "high": row.ratio.high, "repeats": row.ratio.n, "resolves": row.resolves,
                "seconds": round(seconds, 1), "cpu": report.environment.cpu, "squeeze": report.environment.git,
            }  # fmt: skip
            with target.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            message(f"{number + 1}/{given.runs} planted {planted:g}: {json.dumps(line)}")
    print(
        json.dumps({"runs": given.runs, "false_alarms": found[0.0], "found": found[given.plant], "longest_seconds": max(spent)})
    )  # fmt: skip


if __name__ == "__main__":
    main()
