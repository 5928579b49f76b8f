"""`squeeze bench`: measure, and what is done with what was measured. `squeeze bench ARTIFACT …` is `squeeze bench measure ARTIFACT …`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from squeeze import console
from squeeze.cli.options import Json, Quiet, Seed, Task, print_report
from squeeze.errors import BenchError, SqueezeError, nearest

MORE = (
    "Also: squeeze bench compare A B; squeeze bench history; squeeze bench export REPORT --format csv; squeeze bench index; "
    "squeeze bench machine. Each takes --help. An interrupted bench goes on when the same command is given again."
)


class _MeasureFirst(TyperGroup):
    """A group whose first command is meant where none is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = bool(args) and args[0] in self.commands
        return super().parse_args(ctx, args if named else ["measure", *args])


bench = typer.Typer(
    cls=_MeasureFirst, help="Measure artifacts; compare, follow and export what was measured.", rich_markup_mode=None
)

Results = Annotated[Path, typer.Option(help="Folder of reports, one a run; made where it is missing.")]
RESULTS = Path("results")


@bench.command(epilog=MORE, no_args_is_help=True)
def measure(
    artifacts: Annotated[
        list[Path],
        typer.Argument(help="Artifacts, a run folder, a .gguf file, or a folder of OpenVINO, ONNX or Transformers."),
    ],
    data: Annotated[
        str | None,
        typer.Option(help="Texts: an asset: name, or a .csv, .jsonl, .parquet or .txt file; none: no quality."),
    ] = None,
    evaluate: Annotated[int, typer.Option(help="Held-out examples to score.")] = 200,
    runtime: Annotated[
        list[str] | None,
        typer.Option(help="A runtime in `squeeze methods`; several make a grid. None: the best for each."),
    ] = None,
    device: Annotated[list[str] | None, typer.Option(help="cpu or cuda; several make a grid.")] = None,
    threads: Annotated[
        list[int] | None, typer.Option(help="Threads of every runtime; several make a grid. None: one for each core.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16 or float16, for torch and OpenVINO.")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(help="Child processes for each cell; with --budget, at least. None: five, and more as needed."),
    ] = None,
    precision: Annotated[
        float | None, typer.Option(help="Repeats are added until half of every interval is this share of its ratio.")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds for added repeats.")] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Time for each operator and layer in ONNX Runtime.")
    ] = False,
    self_check: Annotated[
        bool,
        typer.Option(
            "--self-check", help="Bench one artifact against itself: how small a difference can be told here."
        ),
    ] = False,
    plant: Annotated[
        float, typer.Option(help="With --self-check: let one side sleep for this share of its time, to see it found.")
    ] = 0.0,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(help="Exit with 3 where this holds, such as 'latency > 1.05x' (result over source)."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="More of data or bench, such as --set data.label_column=y.")
    ] = None,
    results: Results = RESULTS,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="report.json to write as well, with its page beside it.")
    ] = None,
    task: Task = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure latency, load, memory, size and quality, each artifact in processes of its own, in interleaved order."""
    from squeeze import measuring
    from squeeze.pipeline import keep_report
    from squeeze.recipe import apply_overrides
    from squeeze.report.conditions import parse

    conditions = [parse(text) for text in fail_if or ()]
    content: dict[str, Any] = {
        "data": {"path": data, "splits": {"evaluate": evaluate}} if data is not None else {},
        "bench": {
            name: value
            for name, value in (
                ("device", device), ("threads", threads), ("dtype", dtype), ("runtimes", runtime), ("repeats", repeats),
                ("most_repeats", None if budget is not None else repeats), ("precision", precision), ("budget_seconds", budget),
                ("profile", profile or None),
            )
            if value not in (None, [])
        },
    }  # fmt: skip
    apply_overrides(content, settings or ())
    if plant and not self_check:
        raise BenchError("--plant slows one side of a self-check down. Add --self-check.")
    with console.progress(quiet=quiet) as say:
        if self_check:
            if len(artifacts) != 1:
                raise BenchError(f"--self-check benches one artifact against itself, and {len(artifacts)} were named.")
            found = measuring.self_check(
                artifacts[0], settings=content["bench"], seed=seed, planted=plant, results=results, progress=say
            )
        else:
            found = measuring.bench(
                artifacts, data=content["data"] or None, settings=content["bench"], seed=seed, task=task, results=results,
                progress=say, announce=None if json or quiet else _print_costs,
            )  # fmt: skip
    if out is not None:
        keep_report(found, out)
    print_report(found, json)
    if self_check and not json:
        from squeeze.report.self_check import verdict

        console.message(verdict(found))
    _stop_if(conditions, found)


@bench.command()
def compare(
    before: Annotated[str, typer.Argument(help="report.json, a run folder, an id in the results folder, or latest~1.")],
    after: Annotated[str, typer.Argument(help="The same; `latest` is the newest.")] = "latest",
    before_artifact: Annotated[str | None, typer.Option(help="Name in that report; none: its result.")] = None,
    after_artifact: Annotated[str | None, typer.Option(help="Name in that report; none: its result.")] = None,
    fail_if: Annotated[
        list[str] | None, typer.Option(help="Exit with 3 where this holds, such as 'latency > 1.05x'.")
    ] = None,
    results: Results = RESULTS,
    json: Json = False,
) -> None:
    """Compare two reports; what was not measured side by side is said to be so, and claims less."""
    from squeeze.report.compare import compare as compared
    from squeeze.report.conditions import parse, violated
    from squeeze.report.store import resolve

    conditions = [parse(text) for text in fail_if or ()]
    found = compared(
        resolve(before, results), resolve(after, results), before_artifact=before_artifact, after_artifact=after_artifact
    )  # fmt: skip
    if json:
        console.print_json({"rows": [_compared(row) for row in found.rows], "warnings": list(found.warnings)})
    else:
        rows = [(r.label, r.before.text, r.after.text, f"{r.words} {r.bounds}".strip(), r.note) for r in found.rows]
        columns = ("", "before", "after", "change", "note")
        console.table(f"{before} → {after}", columns, rows, [r.sense for r in found.rows], coloured=3)
        for warning in found.warnings:
            console.message(f"warning: {warning}")
    _fail([text for condition in conditions for text in violated(condition, found.rows)])


@bench.command()
def history(
    quantity: Annotated[str | None, typer.Option(help="Such as latency; none: all.")] = None,
    artifact: Annotated[str | None, typer.Option(help="Name of an artifact; none: all.")] = None,
    workload: Annotated[str | None, typer.Option(help="Such as 1×128; none: all.")] = None,
    machine: Annotated[str | None, typer.Option(help="Machine id, as the table shows it; none: all.")] = None,
    results: Results = RESULTS,
    json: Json = False,
) -> None:
    """Medians over the runs in a results folder, oldest first, each with its machine and commit."""
    from dataclasses import asdict

    from squeeze.report.store import history as followed
    from squeeze.report.text import amount

    rows = followed(results, quantity=quantity, artifact=artifact, workload=workload, machine=machine)
    if json:
        console.print_json([asdict(row) for row in rows])
        return
    table = [
        (
            row.started, row.title, row.artifact, row.runtime, f"{row.quantity} {row.workload or ''}".strip(),
            row.error or amount(row.median, row.unit), row.machine, (row.git or "")[:12],
        )
        for row in rows
    ]  # fmt: skip
    columns = ("started", "run", "artifact", "runtime", "quantity", "median", "machine", "commit")
    console.table(f"history of {results}", columns, table)


@bench.command()
def export(
    report: Annotated[
        str, typer.Argument(help="report.json, a run folder, an id in the results folder, or latest.")
    ] = "latest",
    format: Annotated[
        str, typer.Option(help="csv, markdown, pytest-benchmark, github-action-smaller or github-action-bigger.")
    ] = "csv",
    results: Results = RESULTS,
) -> None:
    """Print a report in a format that other tools read."""
    from squeeze.report.formats import FORMATS
    from squeeze.report.store import resolve

    if format not in FORMATS:
        raise BenchError(f"--format {format} is unknown. {nearest(format, FORMATS)}")
    typer.echo(FORMATS[format](resolve(report, results)), nl=False)


@bench.command()
def index(results: Results = RESULTS) -> None:
    """Make the index of a results folder anew from its reports; files that are no whole report are named."""
    from squeeze.report.store import read_all, rebuild

    stored, skipped = read_all(results)
    console.message(f"{rebuild(results)}: {len(stored)} reports")
    for path, reason in skipped:
        console.message(f"skipped {path}: {reason}")


@bench.command()
def machine(
    threads: Annotated[int | None, typer.Option(help="None: one for each core.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure again what is kept.")] = False,
    json: Json = False,
) -> None:
    """What this machine can do at best: bandwidth by working set, and matrix products."""
    from squeeze.benchmark import ceilings
    from squeeze.report.text import amount, figures
    from squeeze.runtimes import cores

    count = threads or cores()
    found = None if again else ceilings.kept(count)
    if found is None:
        found = ceilings.measure(count)
        ceilings.keep(found)
    if json:
        console.print_json(found.model_dump(mode="json"))
        return
    rows = [
        (f"reads of {amount(b.working_set, 'bytes')}", f"{figures(b.bytes_per_second / 1e9)} GB/s")
        for b in found.bandwidth
    ]
    rows += [
        (f"{name} products", f"{figures(rate / 1e9)} billion operations/s") for name, rate in found.operations.items()
    ]
    console.table(f"this machine, {count} threads, measured {found.measured}", ("", "at best"), rows)


def _compared(row: Any) -> dict[str, str]:
    return {
        "quantity": row.quantity, "label": row.label, "before": row.before.text, "after": row.after.text, "verdict": row.words,
        "bounds": row.bounds,
    }  # fmt: skip


def _print_costs(costs: Any) -> None:
    from squeeze.report.floor import COST_COLUMNS, cost_rows

    console.table("static cost", COST_COLUMNS, cost_rows(costs))


def _stop_if(conditions: Any, found: Any) -> None:
    from squeeze.report.conditions import violated
    from squeeze.report.summary import summarize

    rows = summarize(found)
    _fail([text for condition in conditions for text in violated(condition, rows)])


def _fail(sentences: list[str]) -> None:
    if sentences:
        raise ConditionHolds(" ".join(sentences))


class ConditionHolds(SqueezeError):
    """A --fail-if holds. Exit code 3, as of any check that fails."""

    exit_code = 3
