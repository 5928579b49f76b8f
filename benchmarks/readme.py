"""Write the README's figures from the committed reports: no number stands in prose that no report bears out.

python benchmarks/readme.py            rewrites the part of README.md between the markers
python benchmarks/readme.py --check    exits 1 if that would change anything (part of `make check`)
"""

import sys
from pathlib import Path

from squeeze.report.schema import Report, read_report
from squeeze.report.summary import ends, summarize

ROOT = Path(__file__).parent.parent
START, END = "<!-- figures: written by benchmarks/readme.py -->", "<!-- end of figures -->"


def main() -> None:
    """Rewrite README.md, or with --check only compare."""
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    if START not in text or END not in text:
        sys.exit(f"README.md lacks the lines {START} and {END}.")
    head, rest = text.split(START, 1)
    tail = rest.split(END, 1)[1]
    new = f"{head}{START}\n{figures()}{END}{tail}"
    if "--check" in sys.argv[1:]:
        if new != text:
            sys.exit("README.md differs from benchmarks/results. Run: python benchmarks/readme.py")
        return
    readme.write_text(new, "utf-8")


def figures() -> str:
    """One table for each committed report."""
    files = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))
    return "".join(_section(file, read_report(file)) for file in files)


def _section(file: Path, report: Report) -> str:
    before, after = ends(report)
    machine = f"{report.environment.cpu}, {report.environment.cores} cores"
    lines = [
        f"\n**{report.title}** ([report]({file.relative_to(ROOT).as_posix()}), {report.started[:10]}, {machine}): "
        f"{before} against {after}\n",
        "| quantity | before | after | change |",
        "|---|---|---|---|",
    ]
    lines += [f"| {row.label} | {row.before.text} | {row.after.text} | {row.verdict} |" for row in summarize(report)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
