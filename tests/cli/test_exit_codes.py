"""What the shell sees: an exit code that typer returns counts as much as one that is raised."""

from collections.abc import Callable
from typing import Any

import pytest
import typer

from squeeze.cli import _guarded, app
from squeeze.errors import BenchError, VerifyError


def ending(error: BaseException | None) -> Callable[..., Any]:
    app = typer.Typer()

    @app.command()
    def command() -> None:
        if error is not None:
            raise error

    return lambda **options: app([], **options)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (BenchError("x"), 2),
        (VerifyError("x"), 3),
        (typer.Exit(2), 2),
        (KeyboardInterrupt(), 130),
        (typer.Abort(), 130),
    ],
)
def test_every_way_to_end_has_its_exit_code(error: BaseException | None, code: int) -> None:
    assert _guarded(ending(error)) == code


def test_a_bug_shows_itself() -> None:
    with pytest.raises(ZeroDivisionError):
        _guarded(ending(ZeroDivisionError()))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run"], "error: Missing argument 'recipe'. See squeeze run --help.\n"),
        (
            ["run", "x.yaml", "--ou", "y"],
            "error: No such option: --ou (Possible options: --json, --out). See squeeze run --help.\n",
        ),
        (["dashbord"], "error: No such command 'dashbord'. Did you mean 'dashboard'? See squeeze --help.\n"),
        (["bench", "measure", "x", "--repeats", "y"], "error: Invalid value for '--repeats': "),
        ([], "Usage: squeeze [OPTIONS] COMMAND"),
        (["dashboard"], "Usage: squeeze dashboard "),
    ],
)
def test_a_mistyped_command_is_told_where_help_is(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert _guarded(lambda **options: app(words, prog_name="squeeze", **options)) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(said)
    assert not shown.out
