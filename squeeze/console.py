"""What a person sees in the terminal. The only file that imports rich.

Tables and JSON go to stdout; progress, messages and errors to stderr, so that stdout can be piped as it is. Every
name is shown as text: no markup is read, no escape sequence reaches the terminal, and what its encoding lacks gets a
stand-in. Away from a terminal there is no colour and no bar, and under NO_COLOR not one escape sequence. A table too
wide for its terminal becomes a list of records: a column that is squeezed to four letters cannot be read. rich is
imported when something is printed, because `squeeze --help` needs none of it.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TextIO

from squeeze.report.explained import SIZE_COLUMNS, curve_table, size_row, size_rows
from squeeze.report.schema import ArtifactChecks, LayerRow, Manifest, Profile, Report, StageRecord
from squeeze.report.sensitivity_table import SensitivityTable
from squeeze.report.text import THIN, amount, encodable, json_text, visible, wording

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

Progress = Callable[[str, int, int], None]
"""(what is being done, steps done, steps in all)"""

STYLES = {"better": "green", "worse": "red", "failed": "red", "same": "dim", "unknown": "dim", "": ""}

PIPE_WIDTH = 160
"""Columns where no terminal says how many, and COLUMNS does not either."""

PLAIN_SECONDS = 10.0
"""Away from a terminal a description of which only numbers have changed, such as a loss, is said again after so long."""

SHOWN = 5
"""Layers of each kind in a stage's short table."""

WHOLE_WORD, GAP = 18, 2
"""Cells up to this width are never broken; space between columns."""


def print_report(report: Report) -> None:
    """Before and after, all other cells, checks, notes; the verdict last, where the eye is when a command ends."""
    from squeeze.report.floor import FLOOR_COLUMNS, floors
    from squeeze.report.headline import headline
    from squeeze.report.noise import warnings
    from squeeze.report.summary import cells, ends, pivot, shared_where, summarize

    rows = summarize(report)
    if rows:
        where = shared_where(rows)
        told = [(r.label, r.before.text, r.after.text, r.verdict, r.measured(where)) for r in rows]
        title = " · ".join(part for part in (report.title, " → ".join(dict.fromkeys(ends(report))), where) if part)
        table(title, ("", "before", "after", "change", "measured"), told, [row.sense for row in rows], coloured=3)
    every = cells(report)
    if every:
        table("all cells", *pivot(every))
    near = floors(report)
    if near:
        table("how close to what this machine can do", FLOOR_COLUMNS, [row.cells for row in near])
    _print_zeros(report)
    for profile in report.profiles:
        _print_profile(profile)
    for manifest in report.manifests:
        print_curve(manifest)
        print_training(manifest)
    if sizes := size_rows(report.manifests):
        table(
            "weights as computed before they were written, and as they came out",
            SIZE_COLUMNS,
            [row.cells for row in sizes],
        )
    for group in report.checks:
        if group.passed:
            _print_line(f"checks of {group.artifact}: all {len(group.checks)} passed")
        else:
            print_checks([group])
    for note in report.notes:
        _print_line(f"note: {note}")
    for warning in warnings(report):
        _print_line(f"warning: {warning}")
    if report.error:
        _print_line(f"failed: {report.error}", style="red")
    _print_line(headline(report, rows))


def _print_zeros(report: Report) -> None:
    """What zeros, or removed parts, brought, where something was pruned; the sentences are the point."""
    from squeeze.report.zeros import ZERO_COLUMNS, zero_words, zeros

    if rows := zeros(report):
        table("what zeros are worth", ZERO_COLUMNS, [row.cells for row in rows])
        for text in zero_words(report, rows):
            _print_line(text)


def print_sensitivity(found: SensitivityTable) -> None:
    """A scan: a line for each part, a column for each sparsity."""
    from squeeze.report.sensitivity_table import sensitivity_rows

    table(found.title, *sensitivity_rows(found))


def _print_profile(profile: Profile) -> None:
    """The operators, and the layers, that take most of the time."""
    from squeeze.report.profiles import COLUMNS, profile_tables

    for found in profile_tables(profile):
        title = f"time by {found.by}: {found.where}, {amount(found.seconds, 's')} a call"
        table(title, (found.by, *COLUMNS), [row.cells for row in found.rows])


def print_checks(groups: Sequence[ArtifactChecks]) -> None:
    """Every check with its value and limit."""
    for group in groups:
        rows = [
            (c.name, "passed" if c.passed else "FAILED", f"{c.value:.3g}", f"{c.limit:.3g}", c.detail)
            for c in group.checks
        ]
        senses = ["better" if check.passed else "worse" for check in group.checks]
        table(f"checks of {group.artifact}", ("check", "outcome", "value", "limit", "detail"), rows, senses, coloured=1)


def print_inspection(found: "Inspected", *, layers: bool) -> None:
    """Sizes, the chain from the source, and the layers if asked for."""
    rows = [
        ("source", found.source), ("task", found.task), ("architecture", found.architecture),
        ("parameters", f"{found.parameters:,}"), ("not zero", f"{found.nonzero_parameters:,}"),
        ("weights", amount(found.weight_bytes, "bytes")),
        ("positions", "no table" if found.positions is None else str(found.positions)),
        ("weight matrices", str(len(found.layers))),
    ]  # fmt: skip
    table("model", ("", ""), [*rows, *(("warning", text) for text in found.warnings)])
    if found.chain:
        links = [
            (c.name, c.made_by, f"{c.parameters:,}", amount(c.weight_bytes, "bytes"), c.digest) for c in found.chain
        ]
        table("chain, source first", ("artifact", "made by", "parameters", "weights", "digest"), links)
    if layers:
        units = [layer.sensitivity_unit for layer in found.layers if layer.sensitivity_unit]
        content = [
            (
                layer.name, "×".join(map(str, layer.shape)), f"{layer.bits:.2f}", f"{layer.sparsity:.1%}",
                _decibels(layer.sqnr_db), _decibels(layer.output_sqnr_db),
                *([_alone(layer)] if units else []), layer.note,
            )
            for layer in found.layers
        ]  # fmt: skip
        alone = [f"alone, {units[0]}"] if units else []
        table("layers", ("layer", "shape", "bits", "zeros", "SQNR", "of outputs", *alone, "note"), content)


def print_layers(record: StageRecord, folder: Path) -> None:
    """What a stage did in short: the layers that it left in float and why, and those that lost most."""
    left = [(layer.name, layer.note) for layer in record.layers if layer.note.startswith("kept in float")]
    noisy = [
        (layer.output_sqnr_db if layer.output_sqnr_db is not None else layer.sqnr_db, layer) for layer in record.layers
    ]
    worst = sorted(((db, layer) for db, layer in noisy if db is not None), key=lambda pair: pair[0])[:SHOWN]
    rows = [*left[:SHOWN], *((layer.name, f"{db:.1f} dB; {layer.note}") for db, layer in worst)]
    if record.kind == "prune":
        title = "matrices whose outputs changed most" if rows else ""
    else:
        title = f"layers left in float ({len(left)}) and least exact"
    if title:
        table(title, ("layer", "signal to noise, or why"), rows)
    felt = sorted((r for r in record.layers if r.sensitivity is not None), key=lambda r: -(r.sensitivity or 0))[:SHOWN]
    if felt:
        columns = ("layer", f"alone, {felt[0].sensitivity_unit}", "bits", "note")
        table("most sensitive", columns, [(r.name, _alone(r), f"{r.bits:.2f}", r.note) for r in felt])
    message(f"All {len(record.layers)}: squeeze inspect {folder} --layers")


def _alone(layer: LayerRow) -> str:
    return "" if layer.sensitivity is None else f"{layer.sensitivity:.2g}"


def print_curve(manifest: Manifest) -> None:
    """How the error fell with more calibration texts, where a stage was asked for it."""
    curve = manifest.record.curve if manifest.record is not None else ()
    if curve:
        title = f"{manifest.name}: error with more calibration texts, on {curve[0].held_out} others"
        table(title, *curve_table(curve))


def print_training(manifest: Manifest) -> None:
    """How the losses fell and the held-out metric rose, where a stage trained."""
    from squeeze.report.training import training_table, training_words

    curve = manifest.record.training if manifest.record is not None else None
    if curve is not None and curve.steps:
        table(f"{manifest.name}: training", *training_table(curve))
        _print_line(training_words(curve))


def size_of(manifest: Manifest) -> str:
    """Bytes of the weight files, and what was computed beforehand where it was."""
    row, measured = size_row(manifest), amount(manifest.weight_bytes, "bytes")
    return measured if row is None else f"{measured} ({row.said})"


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], senses: Sequence[str] = (), coloured: int = 0
) -> None:  # fmt: skip
    """A table on stdout; where too narrow, a list of records.

    `senses`, one a row, are keys of STYLES that colour the cell in column `coloured`.
    """
    from rich.text import Text

    names = [_fitted(name, sys.stdout) for name in columns]
    cells = [[Text(_fitted(str(cell), sys.stdout)) for cell in row] for row in rows]
    for row, sense in zip(cells, senses, strict=False):
        row[coloured].stylize(STYLES[sense])
    needed = [
        min(WHOLE_WORD, max(Text(name).cell_len, *(c.cell_len for c in column), 0))
        for name, *column in zip(names, *cells, strict=True)
    ]
    draw = _records if sum(needed) + GAP * len(needed) > _console(sys.stdout).width else _columns
    _print(draw(_fitted(title, sys.stdout), names, cells, needed))


def print_json(content: Any) -> None:
    """One JSON document on stdout; ASCII, so that any terminal and any pipe takes it."""
    _write(sys.stdout, json_text(content, indent=1) + "\n")


def print_document(text: str) -> None:
    """A document in UTF-8 on stdout, whatever the locale says: it goes into a file or another program. In a terminal, what its
    encoding has.
    """
    if sys.stdout.isatty() or not hasattr(sys.stdout, "buffer"):
        _write(sys.stdout, encodable(text, sys.stdout.encoding))
        return
    sys.stdout.flush()
    try:
        sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def message(text: str) -> None:
    """A line for the person at the terminal, on stderr."""
    _write(sys.stderr, _fitted(text, sys.stderr, lines=True) + "\n")


def error(text: str) -> None:
    """What went wrong, on stderr."""
    message(f"error: {text}")


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Progress]:
    """A callable (description, done, total): a bar in a terminal, elsewhere a line for each new description; nothing
    if quiet.

    The bar is drawn again once a second and no oftener: this process waits for children that are being timed on these
    very cores.
    """
    if quiet:
        yield lambda description, done, total: None
    elif not sys.stderr.isatty():
        yield _plain_progress()
    else:
        with _bar() as say:
            yield say


def _columns(
    title: str, names: Sequence[str], cells: Sequence[Sequence["Text"]], needed: Sequence[int]
) -> "RenderableType":
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        title=Text(title), title_justify="left", title_style="bold", pad_edge=False, show_edge=False,
        show_header=any(names), box=box.SIMPLE_HEAD if _is_unicode(sys.stdout) else box.ASCII,
    )  # fmt: skip
    for name, width in zip(names, needed, strict=True):
        drawn.add_column(Text(name), overflow="fold", min_width=width)
    for row in cells:
        drawn.add_row(*row)
    return Group(drawn, "")


def _records(
    title: str, names: Sequence[str], cells: Sequence[Sequence["Text"]], needed: Sequence[int]
) -> "RenderableType":
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    drawn: list[RenderableType] = [Text(title, style="bold")]
    for first, *others in cells:
        drawn.append(first)
        for name, cell in zip(names[1:], others, strict=True):
            if cell:
                drawn.append(Padding(Text.assemble(f"{name}: ", cell) if name else cell, (0, 0, 0, 2)))
    return Group(*drawn, "")


def _plain_progress() -> Progress:
    last = words = ""
    said = 0.0

    def say(description: str, done: int, total: int) -> None:
        nonlocal last, words, said
        now, told = time.monotonic(), wording(description)
        if description != last and (told != words or now - said >= PLAIN_SECONDS):
            message(f"[{done}/{total}] {description}")
            last, words, said = description, told, now

    return say


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    console = _console(sys.stderr)
    cut: Literal["ellipsis", "crop"] = "ellipsis" if _is_unicode(sys.stderr) else "crop"
    named = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow=cut))
    drawn = BarColumn(bar_width=min(30, console.width // 5))
    with Bar(
        named, drawn, MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True, expand=True,
        refresh_per_second=1, redirect_stdout=False,
    ) as bar:  # fmt: skip
        shown = bar.add_task("", total=None)

        def say(description: str, done: int, total: int) -> None:
            bar.update(shown, description=_fitted(description, sys.stderr), completed=done, total=total, refresh=True)

        yield say


def _console(stream: TextIO) -> "Console":
    """rich's console on a stream; without a colour system it writes no escape sequence at all."""
    from rich.console import Console

    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    colours: Any = None if os.environ.get("NO_COLOR") or not stream.isatty() else "auto"
    return Console(file=stream, width=width, color_system=colours, emoji=False, highlight=False, markup=False)


def _print_line(text: str, style: str = "") -> None:
    from rich.text import Text

    _print(Text(_fitted(text, sys.stdout, lines=True), style=style))


def _print(content: "RenderableType") -> None:
    """Draw on stdout. Drawn apart and written in one go, so that what is written is known to fit the encoding."""
    console = _console(sys.stdout)
    with console.capture() as drawn:
        console.print(content)
    lines = [line.rstrip() for line in drawn.get().split("\n")]
    _write(sys.stdout, encodable("\n".join(lines), sys.stdout.encoding))


def _write(stream: TextIO, text: str) -> None:
    """Write and flush. A reader that left early, such as `head`, ends the output and is no error."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        # Python flushes once more at exit, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fitted(text: str, stream: TextIO, *, lines: bool = False) -> str:
    return encodable(visible(text, lines=lines).replace(THIN, " "), stream.encoding)


def _is_unicode(stream: TextIO) -> bool:
    return (stream.encoding or "ascii").lower().replace("-", "").startswith("utf")


class Linked(Protocol):
    """One artifact of a chain, as `squeeze.inspection` describes it."""

    @property
    def name(self) -> str: ...
    @property
    def made_by(self) -> str: ...
    @property
    def parameters(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def digest(self) -> str: ...


class Inspected(Protocol):
    """A model or an artifact, as `squeeze.inspection` describes it.

    Named here by its shape, because that module reaches torch and this one must not, not even for a type.
    """

    @property
    def source(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def parameters(self) -> int: ...
    @property
    def nonzero_parameters(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def positions(self) -> int | None: ...
    @property
    def layers(self) -> Sequence[LayerRow]: ...
    @property
    def chain(self) -> Sequence[Linked]: ...
    @property
    def warnings(self) -> Sequence[str]: ...
