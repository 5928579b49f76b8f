"""What the shell sees: an exit code that typer returns counts as much as one that is raised."""

from collections.abc import Callable
from typing import Any

import pytest
import typer

from squeeze.cli import _guarded
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
