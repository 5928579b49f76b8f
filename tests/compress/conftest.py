"""Reports around what a stage says of itself are built as in tests/report."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

_SPEC = importlib.util.spec_from_file_location(
    "report_conftest", Path(__file__).parent.parent / "report" / "conftest.py"
)


@pytest.fixture
def make() -> Any:
    assert _SPEC is not None
    assert _SPEC.loader is not None
    module = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(module)
    return module.Make()
