"""Claims about the whole house, which no single file can make about itself. The layers are held by `make check`."""

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import squeeze
from squeeze.recipe import read_recipe

TOP = Path(__file__).resolve().parent.parent
SOURCES = sorted((TOP / "squeeze").rglob("*.py"))
RECIPES = sorted((TOP / "recipes").rglob("*.yaml"))
COMMAND = Path(sys.executable).with_name("squeeze")
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "onnxruntime_genai", "pyarrow"}

LIGHT = (
    "cli",
    "artifact",
    "data",
    "evaluate",
    "recipe",
    "report.page",
    "report.schema",
    "runtimes",
    "tasks",
    "benchmark.worker",
)
"""What must load without a deep-learning package: the command, and the child whose memory is measured."""

MOST_LINES = 450


def imported_by(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after `code`."""
    code += "\nimport json, sys; print(); print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", LIGHT)
def test_importing_a_light_module_imports_nothing_heavy(module: str) -> None:
    assert imported_by(f"import squeeze.{module}") & HEAVY == set()


def test_asking_for_help_imports_nothing_heavy() -> None:
    code = """
import sys
from squeeze.cli import main
sys.argv = ["squeeze", "--help"]
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
"""
    assert imported_by(code) & HEAVY == set()


def test_the_installed_command_answers_help() -> None:
    done = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for command in (
        "run",
        "distill",
        "prune",
        "quantize",
        "export",
        "verify",
        "bench",
        "report",
        "inspect",
        "methods",
        "schema",
        "demo",
        "doctor",
    ):
        assert f" {command} " in done.stdout


def test_there_are_recipes() -> None:
    assert TOP / "recipes" / "smollm2-int8.yaml" in RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(TOP)))
def test_every_recipe_is_valid_and_begins_with_its_purpose(path: Path) -> None:
    assert path.read_text("utf-8").startswith("# ")
    assert read_recipe(path).name == path.stem


def test_every_public_name_resolves() -> None:
    assert [name for name in squeeze.__all__ if getattr(squeeze, name, None) is None] == []
    assert set(squeeze.__all__) == set(dir(squeeze))


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        squeeze.quantise  # noqa: B018


def test_no_source_file_is_longer_than_a_reader_can_hold() -> None:
    lengths = {path.relative_to(TOP).as_posix(): len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_source_file_is_a_drawer() -> None:
    drawers = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "base"}
    assert [path for path in SOURCES if path.stem in drawers] == []


def test_every_requirement_has_a_recorded_version_that_satisfies_it() -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text("utf-8"))["project"]
    lines = (TOP / ".ci" / "constraints.txt").read_text("utf-8").splitlines()
    recorded = dict(line.split("==") for line in lines if not line.startswith("#"))
    wanted = map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"])
    unmet = [str(r) for r in wanted if not r.specifier.contains(recorded.get(canonicalize_name(r.name), "0"))]
    assert unmet == []


def test_the_wheel_carries_every_module_the_page_template_and_the_recipes(tmp_path: Path) -> None:
    for name in ("squeeze", "recipes"):
        shutil.copytree(TOP / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TOP / name, tmp_path)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", "out", "."]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    carried = set(zipfile.ZipFile(wheel).namelist())
    expected = {path.relative_to(TOP).as_posix() for path in (*SOURCES, *(TOP / "squeeze").rglob("*.j2"))}
    expected |= {f"squeeze/recipes/{path.name}" for path in RECIPES} | {"squeeze/py.typed"}
    assert expected - carried == set()
    assert any(name.endswith(".j2") for name in expected)
