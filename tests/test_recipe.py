"""Recipes: every fault at once, each with its line, the value seen and the mend; and nothing is ever constructed from YAML."""

from pathlib import Path

import pytest

from squeeze.errors import RecipeError
from squeeze.recipe import apply_overrides, read_recipe, recipe_digest, recipe_schema

GOOD = """name: tiny
model:
  path: some/model
task: causal-lm
data:
  path: prose.txt
  splits:
    evaluate: 4
stages:
  - kind: quantize
    scheme: int8
export: {}
verify: {}
seed: 7
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(text, "utf-8")
    return path


def faults(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        read_recipe(written(tmp_path, text), overrides)
    return str(raised.value).splitlines()


def test_what_a_recipe_leaves_out_is_not_run(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, GOOD))
    assert recipe.bench is None
    assert recipe.export is not None
    assert recipe.stages[0].scheme == "int8"


def test_an_unknown_key_is_named_with_its_line_and_the_nearest(tmp_path: Path) -> None:
    (line,) = faults(tmp_path, GOOD.replace("evaluate: 4", "evaluat: 4\n    evaluate: 4"))
    assert line.startswith(f"{tmp_path / 'x.yaml'}:8 data.splits.evaluat")
    assert "evaluate" in line


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("int8", "int7").replace("evaluate: 4", "evaluate: none").replace("causal-lm", "causal")
    lines = faults(tmp_path, text)
    assert len(lines) == 3
    assert [line.split(" ")[0].rsplit(":", 1)[1] for line in lines] == ["4", "8", "11"]
    assert "int8" in lines[2]


def test_two_equal_keys_are_a_fault(tmp_path: Path) -> None:
    assert any("seed" in line for line in faults(tmp_path, GOOD + "seed: 8\n"))


def test_an_override_changes_a_value_and_the_digest(tmp_path: Path) -> None:
    plain = read_recipe(written(tmp_path, GOOD))
    changed = read_recipe(written(tmp_path, GOOD), ["data.splits.evaluate=20", "stages.0.block_size=64"])
    assert changed.data.splits.evaluate == 20
    assert changed.stages[0].block_size == 64
    assert recipe_digest(plain) != recipe_digest(changed)
    assert recipe_digest(plain) == recipe_digest(read_recipe(written(tmp_path, GOOD)))


def test_an_override_that_leads_nowhere_says_so(tmp_path: Path) -> None:
    (line,) = faults(tmp_path, GOOD, "data.splits.evaluat=20")
    assert line.startswith("--set data.splits.evaluat")
    assert "evaluate" in line


def test_an_override_without_a_value_shows_how_to_write_it(tmp_path: Path) -> None:
    (line,) = faults(tmp_path, GOOD, "seed")
    assert "path=value" in line
    with pytest.raises(RecipeError, match="path=value"):
        apply_overrides({"a": 1}, ["a"])


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch sprung']",
        "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b]\n"
        "d: &d [*c, *c, *c, *c, *c, *c, *c, *c]\ne: [*d, *d, *d, *d, *d, *d, *d, *d]",
        "name: [unclosed",
        "",
        "x: " + "y" * 1_100_000,
    ],
)
def test_hostile_or_broken_yaml_is_refused_in_words(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert faults(tmp_path, text)
    assert not (tmp_path / "sprung").exists()


def test_a_stage_after_quantization_is_refused_before_any_work(tmp_path: Path) -> None:
    text = GOOD.replace("export: {}", "  - kind: quantize\n    scheme: int8\nexport: {}")
    assert any("not the last stage" in line for line in faults(tmp_path, text))


def test_verify_without_export_is_refused(tmp_path: Path) -> None:
    assert any("verify checks an export" in line for line in faults(tmp_path, GOOD.replace("export: {}\n", "")))


def test_a_recipe_that_is_not_there_offers_its_neighbours(tmp_path: Path) -> None:
    written(tmp_path, GOOD)
    with pytest.raises(RecipeError, match=r"y\.yaml does not exist.*x\.yaml"):
        read_recipe(tmp_path / "y.yaml")


def test_the_schema_names_every_setting() -> None:
    schema = recipe_schema()
    assert set(schema["properties"]) >= {"name", "model", "data", "task", "stages", "export", "verify", "bench", "seed"}
