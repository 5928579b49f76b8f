"""The commands: each parses, calls one function, prints. Tables and progress go through `console`, JSON to stdout.

Nothing heavy is imported here, so that `squeeze --help` answers at once. The only package that imports typer.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from squeeze import __version__, console
from squeeze.cli.bench import bench
from squeeze.cli.dashboard import MORE as DASHBOARD_MORE
from squeeze.cli.dashboard import dashboard
from squeeze.cli.distill import MORE as DISTILL_MORE
from squeeze.cli.distill import distill
from squeeze.cli.inspect import show_sensitivity
from squeeze.cli.options import (
    MODEL,
    Json,
    Out,
    Quiet,
    Revision,
    Seed,
    Task,
    Weights,
    check_settings,
    print_artifact,
    print_report,
)
from squeeze.cli.prune import MORE as PRUNE_MORE
from squeeze.cli.prune import prune
from squeeze.cli.report import report
from squeeze.errors import SqueezeError

EXIT_CODES = (
    "Exit codes: 0 fine; 1 a bug (with traceback); 2 bad input or something missing, and the message says how to mend it; "
    "3 a check failed: the export differs from its source, or a --fail-if holds; 130 interrupted."
)

app = typer.Typer(
    name="squeeze", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Make a trained language model smaller and faster, export it to ONNX, and prove what that cost and gained.",
    epilog=EXIT_CODES,
)  # fmt: skip

app.add_typer(bench, name="bench")
app.command(epilog=DISTILL_MORE, no_args_is_help=True)(distill)
app.command(epilog=PRUNE_MORE, no_args_is_help=True)(prune)
app.command(no_args_is_help=True)(report)
app.command(epilog=DASHBOARD_MORE, no_args_is_help=True)(dashboard)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see recipes/ and `squeeze schema`.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Output folder; none: ./NAME of the recipe.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Override, such as --set data.splits.evaluate=20.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Enter a finished run and reuse its artifacts.")] = False,
    fresh: Annotated[bool, typer.Option(help="Remove what an earlier run wrote here, then run.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a whole recipe: stages, export, verify, bench, report. A run that was killed continues when started again."""
    from squeeze import api
    from squeeze.recipe import read_recipe

    if resume and fresh:
        raise SqueezeError("--resume keeps what is there and --fresh removes it. Give one of them.")
    loaded = read_recipe(recipe, override or ())
    folder = out or Path(loaded.name)
    with console.progress(quiet=quiet) as say:
        report = api.run(loaded, folder, mode="fresh" if fresh else "resume" if resume else "new", progress=say)
    print_report(report, json)
    console.message(f"report: {folder / 'report.html'}")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help=MODEL)],
    scheme: Annotated[str, typer.Option(help="A name in `squeeze methods`.")] = "int8",
    out: Out = None,
    method: Annotated[
        str, typer.Option(help="round, or gptq, awq or awq-gptq, which need --data; more in `squeeze methods`.")
    ] = "round",
    block_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale (16 to 256), for block-wise schemes.")
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(help="Integers around zero, or with a zero point for each block; none: the scheme's choice."),
    ] = None,
    smooth: Annotated[
        float | None, typer.Option(help="SmoothQuant's α (0.5, say; 0: none); needs --data. None: the scheme's choice.")
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(help="Weights that share a scale: tensor, channel or group; none: the scheme's choice."),
    ] = None,
    calibrator: Annotated[
        str, typer.Option(help="How int8-static chooses ranges: mse, minmax, percentile or entropy.")
    ] = "mse",
    equalize: Annotated[
        bool,
        typer.Option(help="Give each channel the same range where it is made and where it is read; needs no data."),
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="Calibration texts: an asset: name, or a .csv, .jsonl, .parquet or .txt file.")
    ] = None,
    calibration: Annotated[int, typer.Option(help="Texts (of decoders: blocks of 512 tokens) to calibrate with.")] = 16,
    evaluate: Annotated[
        int,
        typer.Option(
            help="Texts left aside, so that `squeeze bench` with the same --data and --evaluate scores others."
        ),
    ] = 200,
    reduce_range: Annotated[
        bool, typer.Option(help="Integers within ±64: exact on x86 processors without VNNI too, for one scale per row.")
    ] = False,
    curve: Annotated[
        list[int] | None,
        typer.Option(help="Also compare copies quantized with so many calibration texts; give it several times."),
    ] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Layers that stay in float, as names with * and ?.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Keep the most sensitive layers better, until answers differ by this at most (KL in nats)."),
    ] = None,
    size: Annotated[
        float | None,
        typer.Option(help="Keep the most sensitive layers better, as far as the weights fit into these MB."),
    ] = None,
    fallback: Annotated[
        str | None, typer.Option(help="What those layers become: float, or int8 in a 4-bit scheme.")
    ] = None,
    task: Task = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="More of what a recipe says, such as --set data.block_size=256 or --set quantize.outliers=8."
        ),
    ] = None,
    seed: Seed = 0,
    weights: Weights = None,
    revision: Revision = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a model's weights into integers; the result is an artifact in a run folder."""
    from squeeze import api
    from squeeze.compress import QuantizeStage
    from squeeze.recipe import apply_overrides

    if fallback is not None and budget is None and size is None:
        raise SqueezeError(
            "--fallback says what sensitive layers become. Say how many with --budget or --size, or drop it."
        )
    said: dict[str, Any] = {
        "scheme": scheme, "method": method, "block_size": block_size, "symmetric": symmetric, "smooth_alpha": smooth,
        "granularity": granularity, "calibrator": calibrator, "equalize": equalize, "reduce_range": reduce_range, "curve": curve or [],
        "keep": keep or [],
    }  # fmt: skip
    if budget is not None or size is not None:
        said["mixed"] = {"budget": budget, "size": size, "fallback": fallback}
    splits = {"evaluate": evaluate, "calibration": calibration}
    content: dict[str, Any] = {"data": {} if data is None else {"path": data, "splits": splits}, "quantize": said}
    apply_overrides(content, settings or ())
    check_settings(content, ("data", "quantize"))
    check_settings(content["quantize"], QuantizeStage.model_fields.keys() - {"kind"}, "quantize.")
    with console.progress(quiet=quiet) as say:
        say(f"quantize {model}", 0, 1)
        artifact = api.quantize(
            model, out, data=content["data"] or None, progress=say, seed=seed, task=task, weights=weights, revision=revision,
            **content["quantize"],
        )  # fmt: skip
    print_artifact(artifact, json)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Out = None,
    graph: Annotated[
        str, typer.Option(help="auto, genai (onnxruntime-genai's builder) or dynamo (torch's exporter).")
    ] = "auto",
    source: Annotated[bool, typer.Option(help="Export the run folder's source as well, to compare with.")] = True,
    kv_cache: Annotated[
        str, typer.Option(help="Keys and values between tokens: float32, or int8, which needs --data.")
    ] = "float32",
    kv_scales: Annotated[
        str | None, typer.Option(help="What shares a scale of an int8 cache: channel or tensor; none: channel.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Calibration texts: an asset: name, or a .csv, .jsonl, .parquet or .txt file.")
    ] = None,
    calibration: Annotated[int, typer.Option(help="Blocks of 512 tokens to calibrate an int8 cache with.")] = 16,
    evaluate: Annotated[
        int,
        typer.Option(
            help="Blocks left aside, so that `squeeze bench` with the same --data and --evaluate scores others."
        ),
    ] = 200,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="More of data, such as --set data.block_size=256.")
    ] = None,
    seed: Seed = 0,
    task: Task = None,
    weights: Weights = None,
    revision: Revision = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model or an artifact as ONNX, integers copied byte for byte."""
    from squeeze import api
    from squeeze.errors import nearest
    from squeeze.recipe import apply_overrides

    splits = {"evaluate": evaluate, "calibration": calibration}
    content: dict[str, Any] = {"data": {} if data is None else {"path": data, "splits": splits}}
    apply_overrides(content, settings or ())
    if kv_cache not in ("float32", "int8"):
        raise SqueezeError(f"--kv-cache {kv_cache} is unknown. {nearest(kv_cache, ('float32', 'int8'))}")
    if kv_scales not in (None, "channel", "tensor"):
        raise SqueezeError(f"--kv-scales {kv_scales} is unknown. {nearest(kv_scales, ('channel', 'tensor'))}")
    if graph not in ("auto", "genai", "dynamo"):
        raise SqueezeError(f"--graph {graph} is unknown. {nearest(graph, ('auto', 'genai', 'dynamo'))}")
    with console.progress(quiet=quiet) as say:
        say(f"export {model}", 0, 1)
        artifact = api.export(
            model, out, graph=graph, source=source, kv_cache=kv_cache, kv_scales=kv_scales, data=content["data"] or None, seed=seed,  # type: ignore[arg-type]
            task=task, weights=weights, revision=revision,
        )  # fmt: skip
    print_artifact(artifact, json)


@app.command()
def verify(
    exported: Annotated[Path, typer.Argument(help="An export, or a run folder.")],
    against: Annotated[Path | None, typer.Option(help="Artifact it was made from; none: found beside it.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Largest relative error of the outputs.")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Compare an export with its source: names, axes, integer bytes, outputs, greedy tokens. Exit code 3 on a difference."""
    from squeeze import api
    from squeeze.errors import VerifyError

    try:
        checks, failure = api.verify(exported, against, tolerance=tolerance, seed=seed), None
    except VerifyError as error:
        if not error.checks:
            raise
        checks, failure = error.checks[0], error
    if json:
        console.print_json(checks.model_dump(mode="json"))
    else:
        console.print_checks([checks])
    if failure is not None:
        raise failure


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=MODEL)],
    layers: Annotated[bool, typer.Option(help="List every weight matrix.")] = False,
    sensitivity: Annotated[
        bool, typer.Option(help="Prune each part alone and measure what the answers lose; needs --data.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="Calibration texts: an asset: name, or a .csv, .jsonl, .parquet or .txt file.")
    ] = None,
    by: Annotated[str, typer.Option(help="What is pruned alone: block, matrix, heads or neurons.")] = "block",
    criterion: Annotated[str, typer.Option(help="How its weights are chosen: a name in `squeeze methods`.")] = "wanda",
    sparsities: Annotated[str, typer.Option(help="Shares that are tried.")] = "0.3,0.5,0.7",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="More of data, such as --set data.splits.calibration=32.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write the table to as JSON.")] = None,
    seed: Seed = 0,
    weights: Weights = None,
    task: Task = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show parameters, bytes and layers of a model; for an artifact, the chain from its source."""
    if sensitivity:
        show_sensitivity(
            model, data, settings or (), by=by, criterion=criterion, sparsities=sparsities, out=out, seed=seed, weights=weights,
            task=task, json=json, quiet=quiet,
        )  # fmt: skip
        return
    if data is not None or out is not None:
        raise SqueezeError("--data and --out are for --sensitivity. Add it, or drop them.")
    from squeeze.inspection import inspect_model

    found = inspect_model(model, task=task, weights=weights)
    if json:
        console.print_json(found.model_dump(mode="json"))
        return
    console.print_inspection(found, layers=layers)


@app.command()
def methods(json: Json = False) -> None:
    """List what squeeze can do: schemes, criteria, losses, tasks, runtimes, assets."""
    from squeeze.methods import list_methods

    rows = list_methods()
    if json:
        console.print_json([row._asdict() for row in rows])
        return
    console.table("methods", ("kind", "name", "what it does", "source"), rows)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors that complete YAML."""
    from squeeze.recipe import recipe_schema

    console.print_json(recipe_schema())


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")] = Path("demo"),
    fresh: Annotated[bool, typer.Option(help="Remove what an earlier demo wrote here, then run.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress SmolLM2-135M to int8, measure it against the original, and show a table and a page."""
    from squeeze import api
    from squeeze.methods import recipe_path

    with console.progress(quiet=quiet) as say:
        report = api.run(recipe_path("smollm2-int8.yaml"), out, mode="fresh" if fresh else "resume", progress=say)
    print_report(report, json)
    console.message(f"report: {out / 'report.html'}")


@app.command()
def doctor(json: Json = False) -> None:
    """Show what this machine offers and lacks: versions, CPU features, threads, memory, disk, CUDA."""
    from dataclasses import asdict

    from squeeze.doctor import examine

    findings = examine()
    if json:
        console.print_json([asdict(f) for f in findings])
    else:
        console.table(
            "doctor", ("topic", "found", "", "advice"), [(f.topic, f.value, f.level, f.advice) for f in findings]
        )
    if any(f.level == "bad" for f in findings):
        raise typer.Exit(2)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; a SqueezeError is a message and an exit code, never a traceback."""
    several = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    sys.exit(_among_others() if several else _guarded(app))


def _among_others() -> int:
    """As one of the processes that torchrun or accelerate started: the main one runs the command, the others help where it trains."""
    from squeeze.stages import train_along
    from squeeze.training import processes

    if not processes.join():
        return processes.follow(train_along)
    code = 1
    try:
        code = _guarded(app)
    finally:
        processes.dismiss(code)
    return code


def _guarded(command: Callable[..., Any]) -> int:
    try:
        # typer turns Ctrl-C and Exit into a number that is returned, not raised; commands themselves return nothing.
        code = command(standalone_mode=False)
    except SqueezeError as error:
        console.error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        code = INTERRUPTED
    except typer.TyperException as error:
        return _misused(error)
    if code == INTERRUPTED:
        console.error("interrupted. The same command continues with what is finished.")
    return code if isinstance(code, int) else 0


def _misused(error: typer.TyperException) -> int:
    """An option or a command that is not there, a value of the wrong kind: what is wrong and where help is, or help itself."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.message, err=True)
    else:
        place = context.command_path if context is not None else "squeeze"
        said = error.format_message()
        console.error(f"{said}{'' if said.endswith(('.', '?')) else '.'} See {place} --help.")
    return 2


INTERRUPTED = 130
