"""Write the figures of README.md and docs/figures.md from the committed reports: no number stands in prose that no report bears out.

python benchmarks/readme.py            rewrites docs/figures.md, and the part of README.md between the markers
python benchmarks/readme.py --check    exits 1 if that would change anything (part of `make check`)
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, when run as a file

from benchmarks.store import FOUND
from squeeze.report import stats
from squeeze.report.headline import headline
from squeeze.report.schema import Measurement, Report, read_report
from squeeze.report.summary import ends, label, summarize
from squeeze.report.text import amount, figures, percent, times

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README, FIGURES = ROOT / "README.md", ROOT / "docs" / "figures.md"
HISTORY = "-history"
"""How folders of many reports of one recipe end; the dashboard is for those."""
START, END = "<!-- figures: written by benchmarks/readme.py -->", "<!-- end of figures -->"
HEAD = """# Figures

Every committed report under `benchmarks/results`, written by `python benchmarks/readme.py` (`make check` fails when they differ). As one
page with charts and raw values: `squeeze dashboard benchmarks/results`. Ratios travel between machines better than times.
SmolLM2's weights come from a 4-bit file: 4-bit results on it flatter.
"""


def main() -> None:
    """Rewrite both files, or with --check only compare."""
    text = README.read_text("utf-8")
    if START not in text or END not in text:
        sys.exit(f"README.md lacks the lines {START} and {END}.")
    head, rest = text.split(START, 1)
    tail = rest.split(END, 1)[1]
    for file, new in ((README, f"{head}{START}\n{in_short()}{END}{tail}"), (FIGURES, HEAD + in_full())):
        if "--check" not in sys.argv[1:]:
            file.write_text(new, "utf-8")
        elif not file.exists() or file.read_text("utf-8") != new:
            sys.exit(f"{file.name} differs from benchmarks/results. Run: python benchmarks/readme.py")


def in_short() -> str:
    """What came of some reports in a sentence each, and squeeze beside its peers."""
    lines = ["| recipe | what came of it | measured |", "|---|---|---|"]
    for recipe, name in SENTENCES.items():
        report = read_report(RESULTS / name)
        said = headline(report).partition(": ")[2]
        measured = f"[report]({_link(RESULTS / name, ROOT)}), {_where(report)}"
        lines.append(f"| [{recipe}](recipes/{recipe}.yaml) | {said} | {measured} |")
    grids = [section(RESULTS / name, ROOT) for name in PEERS]
    return "\n" + "\n".join(lines) + "\n" + "".join(grids)


def in_full() -> str:
    """One table for each committed report, then what the self-checks found."""
    files = [file for file in sorted(RESULTS.rglob("*.json")) if not file.parent.name.endswith(HISTORY)]
    checks, pages = sorted(RESULTS.rglob("self-check.jsonl")), sorted(RESULTS.rglob("dashboard.jsonl"))
    parts = [section(file, FIGURES.parent) for file in files]
    return "".join([*parts, *map(_self_checks, checks), *map(_pages, pages)])


def _link(file: Path, place: Path) -> str:
    return Path(os.path.relpath(file, place)).as_posix()


def _where(report: Report) -> str:
    return f"{report.environment.cpu}, {report.environment.cores} cores"


def section(file: Path, place: Path) -> str:
    """Before and after, or for a grid of engines a line each; its link leads there from the folder `place`."""
    report = read_report(file)
    text = _grid(file, report, place) if report.title in BASES else _section(file, report, place)
    found = [note.removeprefix(FOUND) for note in report.notes if note.startswith(FOUND)]
    return text + "".join(f"\n- {line}" for line in found) + ("\n" if found else "")


def _head(file: Path, report: Report, what: str, place: Path) -> str:
    return f"\n**{report.title}** ([report]({_link(file, place)}), {report.started[:10]}, {_where(report)}): {what}\n"


def _section(file: Path, report: Report, place: Path) -> str:
    before, after = ends(report)
    rows = [f"| {row.label} | {row.before.text} | {row.after.text} | {row.verdict} |" for row in summarize(report)]
    table = ["| quantity | before | after | change |", "|---|---|---|---|", *rows] if rows else []
    return "\n".join([_head(file, report, f"{before} against {after}", place), *table]) + "\n"


def _grid(file: Path, report: Report, place: Path) -> str:
    """A line for each artifact in a runtime; each time with its speed relative to the first of BASES, where that differs."""
    rows = [m for m in report.measurements if m.quantity in COLUMNS]
    cells = list(dict.fromkeys((m.artifact, m.runtime) for m in rows if m.quantity in SPEEDS))
    columns = list(dict.fromkeys((m.quantity, label(m)) for m in sorted(rows, key=lambda m: COLUMNS.index(m.quantity))))
    base = BASES[report.title]
    found = {(m.artifact, m.runtime, m.quantity, label(m)): m for m in rows}
    scored = {(m.artifact, m.quantity, label(m)): m for m in rows}
    threads = report.measurements[0].threads
    what = f"{threads} threads everywhere; in brackets how many times as fast as {base[0]} in {base[1]}, with its 95 % interval"
    lines = [
        _head(file, report, what, place),
        f"| artifact | runtime | {' | '.join(name for _, name in columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for artifact, runtime in cells:
        texts = []
        for quantity, name in columns:
            # What onnxruntime-genai times is scored in ONNX Runtime: quality belongs to the artifact.
            other = None if quantity in SPEEDS or quantity == "peak_memory" else scored.get((artifact, quantity, name))
            texts.append(
                _cell(found.get((artifact, runtime, quantity, name), other), found.get((*base, quantity, name)))
            )
        lines.append(f"| {artifact} | {runtime} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _cell(m: Measurement | None, base: Measurement | None) -> str:
    if m is None:
        return ""
    if not m.values:
        return "not measured"
    if m.quantity == "negative_log_likelihood":
        return figures(stats.perplexity(m), 4)
    if m.quantity == "cosine_to_source":
        return f"{sum(m.values) / len(m.values):.4f}"
    if m.quantity in ("correct", "same_answer"):
        return percent(stats.share(m.values).value, 2)
    text = amount(stats.median(tuple(stats.by_repeat(m).values())), m.unit)
    if m.quantity not in SPEEDS or base is None or base is m or not base.values:
        return text
    gain = stats.ratio(base, m)
    return f"{text} ({times(gain.value)} [{gain.low:.2f}, {gain.high:.2f}])"


def _pages(file: Path) -> str:
    """How large the dashboard is and how soon it opens: the newest line of each page."""
    newest = {line["page"]: line for line in map(json.loads, file.read_text("utf-8").splitlines())}
    first = next(iter(newest.values()))
    where = f"{first['cpu']}, {first['cores']} cores, Chromium {first['browser']}"
    head = f"\n**dashboard** ([times]({_link(file, FIGURES.parent)}), {where})"
    rows = [
        f"| {name} | {amount(line['bytes'], 'bytes')} | {amount(line['ready_seconds'], 's')} | "
        f"{amount(line['drawn_seconds'], 's') if 'drawn_seconds' in line else ''} |"
        for name, line in newest.items()
    ]
    return (
        "\n".join([f"{head}\n", "| page | size | can be used after | first chart after |", "|---|---|---|---|", *rows])
        + "\n"
    )


def _self_checks(file: Path) -> str:
    runs = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    quiet, planted = ([run for run in runs if bool(run["planted"]) is which] for which in (False, True))
    share = percent(planted[0]["planted"], 0) if planted else ""
    middle = sorted(run["seconds"] for run in runs)[len(runs) // 2]
    return (
        f"\n**Self-check** ([runs]({_link(file, FIGURES.parent)}), {runs[0]['cpu']}): of {len(quiet)} benches of the classifier "
        f"against itself {sum(run['differs'] for run in quiet)} reported a difference; of {len(planted)} with a planted slow-down of "
        f"{share} {sum(run['differs'] for run in planted)} found it. Each took {min(run['seconds'] for run in runs):.0f} to "
        f"{max(run['seconds'] for run in runs):.0f} s, {middle:.0f} s in the middle.\n"
    )


SENTENCES = {
    "sentiment-pruned-int8": "epyc-avx2-2core/showcase-classifier.json",
    "smollm2-pruned-int8": "epyc-avx2-2core/showcase-decoder.json",
    "smollm2-int8-static": "epyc-vnni-2core/smollm2-int8-static.json",
    "smollm2-int8": "xeon-amx-2core/smollm2-int8.json",
    "sentiment-int8": "xeon-amx-2core/sentiment-int8.json",
    "lstm-int8": "xeon-amx-2core/lstm-int8.json",
}
"""Recipes of which the README says in a sentence what came of them, each with the report that says so."""
PEERS = ("epyc-vnni-2core/vs-peers-encoder.json", "epyc-vnni-2core/vs-peers-decoder.json")
BASES = {
    "vs-peers-encoder": ("export-0-source", "onnxruntime"),
    "vs-peers-decoder": ("export-0-source", "onnxruntime-genai"),
    "vs-peers-embeddings": ("export-0-source", "onnxruntime"),
    "showcase-classifier": ("torch-export-opset18", "onnxruntime"),
    "showcase-decoder": ("export-0-source", "onnxruntime-genai"),
    "distill-classifier": ("0-source", "torch"),
    "distill-chain": ("torch-export-opset18", "onnxruntime"),
    "distill-embeddings": ("0-source", "torch"),
    "distill-language": ("0-source", "torch"),
    "prune-criteria": ("0-source", "torch"),
    "prune-layers": ("0-source", "torch"),
    "prune-classifier": ("torch-export-opset18", "onnxruntime"),
    "prune-chain": ("torch-export-opset18", "onnxruntime"),
}
SPEEDS = ("set_time", "latency", "time_to_first_token", "time_per_output_token")
COLUMNS = ("correct", "same_answer", "cosine_to_source", "negative_log_likelihood", *SPEEDS, "peak_memory")

if __name__ == "__main__":
    main()
