"""Every error that squeeze raises on purpose, on one screen.

A SqueezeError is the reader's to mend: its message says what is wrong, where, and what to do, the command line prints
it without a traceback and exits with its `exit_code`. Anything else is a bug of ours and shows its traceback, exit code
1. One class for each part of the line, so that a caller can catch "the model is at fault" without reading messages.
Rejected: error codes and structured fields (nobody reads them; the tests read the sentence that the user reads).
"""

from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Any, ClassVar

CLOSE_ENOUGH = 0.6
"""Similarity in [0, 1] from which a name is offered: one slip in five letters passes, an unrelated word does not."""


class SqueezeError(Exception):
    """What, where, how to mend. Printed without traceback; `exit_code` is the process's."""

    exit_code: ClassVar[int] = 2


class RecipeError(SqueezeError):
    """The recipe file or a `--set` is wrong; the message has one line for each fault."""


class ModelError(SqueezeError):
    """The model is missing, broken, for another task, or asks for trust it was not given."""


class DataError(SqueezeError):
    """The data is missing, empty, mislabelled or not readable."""


class ArtifactError(SqueezeError):
    """An output folder cannot be written, is another run's, or is no longer what was written."""


class QuantizeError(SqueezeError):
    """The model cannot be quantized as asked."""


class PruneError(SqueezeError):
    """The model cannot be pruned as asked."""


class LayerwiseError(QuantizeError, PruneError):
    """The network cannot be gone through layer by layer, be it to quantize or to prune it."""


class TrainError(SqueezeError):
    """A training cannot begin as asked, or had to stop: what it had reached stays on disk."""


class ExportError(SqueezeError):
    """The model cannot be written as ONNX as asked."""


class VerifyError(SqueezeError):
    """A check failed: what was exported is not what was meant. Exit code 3: CI can tell it from a bad command."""

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, checks: tuple[Any, ...] = ()) -> None:
        """`checks` are the report.schema.ArtifactChecks that failed, for the report of the run."""
        super().__init__(message)
        self.checks = checks


class RuntimeUnavailable(SqueezeError):
    """The runtime is unknown, or its package is not installed."""


class DeviceError(SqueezeError):
    """The device is not there, or the installed package cannot use it. Never answered with a silent run on the CPU."""


class BenchError(SqueezeError):
    """The benchmark as a whole cannot run. One cell that fails is a row with its reason, not this."""


class ReportError(SqueezeError):
    """A report cannot be read or written."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The help after an unknown name: "Did you mean 'x'? Known: a, b, c." The question is left out where nothing is
    near.

    Case and the difference between `-`, `_` and a space do not count against a name.
    """
    known = sorted(set(choices))
    if not known:
        return "None are known."
    listed = f"Known: {', '.join(known)}."
    wanted = _plain(name)
    close = max(known, key=lambda choice: SequenceMatcher(None, wanted, _plain(choice)).ratio())
    if SequenceMatcher(None, wanted, _plain(close)).ratio() < CLOSE_ENOUGH:
        return listed
    return f"Did you mean {close!r}? {listed}"


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_").replace(" ", "_")
