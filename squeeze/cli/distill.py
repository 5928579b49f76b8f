"""`squeeze distill`: a smaller student of a trained model, trained and compared with it in one command."""

import re
from typing import Annotated, Any

import typer

from squeeze import console
from squeeze.cli.options import Json, Out, Quiet, Revision, Seed, Task, Weights, check_settings, print_report
from squeeze.errors import SqueezeError, nearest

MORE = (
    "More of what a recipe says goes with --set: distill.training.patience=3, distill.student.config={hidden_size: 128}, "
    "distill.freeze=[embeddings], data.block_size=256. The same command started again after an interruption goes on."
)
CHOICES = ("spread", "first", "last", "importance")
DEVICES = ("auto", "cpu", "cuda")


def distill(
    teacher_model: Annotated[
        str,
        typer.Argument(
            metavar="TEACHER",
            help="The model that is learned from and cut: local folder, asset: name, hub id, artifact, run folder …",
        ),
    ],
    data: Annotated[
        str, typer.Option(help="Texts: an asset: name, or a .csv, .jsonl, .parquet or .txt file.", show_default=False)
    ],
    layers: Annotated[
        str | None, typer.Option(help="Layers of the teacher that the student keeps: how many, or which: 0,2,4.")
    ] = None,
    choose: Annotated[
        str | None, typer.Option(help="Which ones a number means: spread (the default), first, last or importance.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads that each layer keeps.")] = None,
    neurons: Annotated[int | None, typer.Option(help="Feed-forward neurons that each layer keeps.")] = None,
    student: Annotated[str | None, typer.Option(help="Another trained model as the student.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Another teacher: TEACHER is then what the student is made from, an artifact say."),
    ] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(help="A loss of `squeeze methods`, name or name=weight; several times. None: the task's own."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Softens teacher and student, in losses that read it.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the texts. None: 3, of language models 1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps in place of epochs.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Examples in a step. None: 32, of language models 8 blocks.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Highest learning rate. None: 0.0002, of embeddings 0.0003, of language models 0.0001."),
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the texts. None: text.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels. None: label.")] = None,
    evaluate: Annotated[
        int | None,
        typer.Option(help="Examples that only the comparison scores. None: a tenth, 1000 at most (100 blocks)."),
    ] = None,
    unlabelled: Annotated[
        str | None, typer.Option(help="More texts to train on, without labels: a file as of --data.")
    ] = None,
    device: Annotated[str, typer.Option(help="Trains on: auto, cpu or cuda.")] = "auto",
    bench: Annotated[bool, typer.Option(help="Time teacher and student at the end.")] = True,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="More of data or distill, such as --set data.max_length=64.")
    ] = None,
    out: Out = None,
    task: Task = None,
    seed: Seed = 0,
    weights: Weights = None,
    revision: Revision = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a smaller student on a model's answers, and compare the two: size, quality, speed. Ends with a table and a page."""
    from squeeze import api
    from squeeze.distillation.choices import loss_term
    from squeeze.recipe import apply_overrides

    if epochs is not None and steps is not None:
        raise SqueezeError("--epochs and --steps both say how long. Give one of them.")
    _check("--choose", choose, CHOICES)
    _check("--device", device, DEVICES)
    cut = {"path": student, "layers": _layers(layers), "choose": choose, "heads": heads, "neurons": neurons}
    training = {"epochs": epochs, "steps": steps, "batch": batch, "learning_rate": rate, "device": device}
    texts = {"path": data, "text_column": text_column, "label_column": label_column}
    content: dict[str, Any] = {
        "data": _said(texts),
        "distill": {
            "student": _said(cut), "losses": [loss_term(text) for text in loss or ()], "training": _said(training),
            "teacher": teacher, "unlabelled": None if unlabelled is None else {"path": unlabelled},
        },
    }  # fmt: skip
    apply_overrides(content, settings or ())
    check_settings(content, ("data", "distill"))
    stage = dict(content["distill"])
    with console.progress(quiet=quiet) as say:
        say(f"distill {teacher_model}", 0, 1)
        report = api.distill(
            teacher_model, out, data=content["data"], student=stage.pop("student", None), losses=stage.pop("losses", ()),
            training=stage.pop("training", None), teacher=stage.pop("teacher", None), more=stage, temperature=temperature,
            evaluate=evaluate, bench=bench, seed=seed, task=task, weights=weights, revision=revision, progress=say,
            announce=None if json or quiet else _print_plan,
        )  # fmt: skip
    print_report(report, json)
    console.message(f"report: {api.run_folder(teacher_model, out) / 'report.html'}")


def _print_plan(rows: list[tuple[str, str]]) -> None:
    console.table("distill", ("", ""), rows)


def _layers(text: str | None) -> int | list[int] | None:
    """`3` keeps three layers, `0,2,4` those three, `4,` that one."""
    if text is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*,?", text.replace(" ", "")):
        raise SqueezeError(f"--layers {text} is neither a number of layers, as in 3, nor a list of them, as in 0,2,4.")
    numbers = [int(word) for word in text.replace(" ", "").split(",") if word]
    return numbers if "," in text else numbers[0]


def _check(option: str, given: str | None, known: tuple[str, ...]) -> None:
    if given is not None and given not in known:
        raise SqueezeError(f"{option} {given} is unknown. {nearest(given, known)}")


def _said(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
