"""`squeeze prune`: weights become zero, or parts of the network are taken out."""

import re
from typing import Annotated, Any

import typer

from squeeze import console
from squeeze.cli.options import MODEL, Json, Out, Quiet, Revision, Seed, Task, Weights, check_settings, print_artifact
from squeeze.errors import SqueezeError

MORE = (
    "Zeros alone make no dense kernel faster: --remove-layers, --remove-heads and --remove-neurons make the network smaller. More of what "
    "a recipe says goes with --set: prune.schedule={}, prune.training.epochs=1, data.block_size=256, data.splits.train=rest."
)


def prune(
    model: Annotated[str, typer.Argument(help=MODEL)],
    sparsity: Annotated[
        float | None, typer.Option(help="Share of the weights that become zero, in [0, 1); N:M patterns imply it.")
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(help="What a weight is worth, a name in `squeeze methods`. None: wanda, which needs --data."),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="unstructured, N:M such as 2:4, block-16x16 or row. None: unstructured.")
    ] = None,
    scope: Annotated[
        str | None, typer.Option(help="Weights ranked together: row, layer or global. None: the criterion's own.")
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(help="How sparsity is spread over matrices: uniform, sensitivity or owl. None: uniform."),
    ] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Matrices that stay dense, as names with * and ?.")] = None,
    remove_layers: Annotated[
        str | None,
        typer.Option(help="Layers to take out: a share that goes (0.25), how many stay (8), or which: 0,2,4."),
    ] = None,
    remove_heads: Annotated[
        str | None, typer.Option(help="Heads of each layer: a share that goes (0.5), or how many stay.")
    ] = None,
    remove_neurons: Annotated[
        str | None, typer.Option(help="Feed-forward neurons of each layer: a share that goes, or how many stay.")
    ] = None,
    rank_by: Annotated[
        str | None,
        typer.Option(help="How removed parts are ranked: influence, activation, taylor, michel or random."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Calibration texts: an asset: name, or a .csv, .jsonl, .parquet or .txt file.")
    ] = None,
    calibration: Annotated[int, typer.Option(help="Texts (of decoders: blocks of 512 tokens) to measure on.")] = 24,
    evaluate: Annotated[
        int,
        typer.Option(
            help="Texts left aside, so that `squeeze bench` with the same --data and --evaluate scores others."
        ),
    ] = 200,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="More of data or prune, such as --set data.block_size=256.")
    ] = None,
    out: Out = None,
    task: Task = None,
    seed: Seed = 0,
    weights: Weights = None,
    revision: Revision = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Set weights of a model to zero, or take parts out of it; the result is an artifact in a run folder."""
    from squeeze import api
    from squeeze.pruning.settings import PruneStage
    from squeeze.recipe import apply_overrides

    parts = {
        "layers": _amount("--remove-layers", remove_layers, listed=True), "heads": _amount("--remove-heads", remove_heads),
        "neurons": _amount("--remove-neurons", remove_neurons), "criterion": rank_by,
    }  # fmt: skip
    remove = {name: value for name, value in parts.items() if value is not None} or None
    said = {
        "sparsity": sparsity, "criterion": criterion, "pattern": pattern, "scope": scope, "allocation": allocation, "keep": keep or None,
        "remove": remove,
    }  # fmt: skip
    splits = {"evaluate": evaluate, "calibration": calibration}
    content: dict[str, Any] = {
        "data": {} if data is None else {"path": data, "splits": splits},
        "prune": {name: value for name, value in said.items() if value is not None},
    }
    apply_overrides(content, settings or ())
    check_settings(content, ("data", "prune"))
    check_settings(content["prune"], PruneStage.model_fields.keys() - {"kind", "seed"}, "prune.")
    with console.progress(quiet=quiet) as say:
        say(f"prune {model}", 0, 1)
        artifact = api.prune(
            model, out, data=content["data"] or None, seed=seed, task=task, weights=weights, revision=revision, progress=say,
            **content["prune"],
        )  # fmt: skip
    print_artifact(artifact, json)


def _amount(option: str, text: str | None, *, listed: bool = False) -> int | float | list[int] | None:
    """`0.25` goes, `8` stay, and `0,2,4` (or `4,`) are those that stay."""
    if text is None:
        return None
    plain = text.replace(" ", "")
    if listed and re.fullmatch(r"\d+(,\d+)*,|\d+(,\d+)+", plain):
        return [int(word) for word in plain.split(",") if word]
    if re.fullmatch(r"\d+", plain):
        return int(plain)
    if re.fullmatch(r"0?\.\d+", plain):
        return float(plain)
    more = ", nor a list of those that stay, as in 0,2,4" if listed else ""
    raise SqueezeError(f"{option} {text} is neither a share that goes, as in 0.25, nor how many stay, as in 8{more}.")
