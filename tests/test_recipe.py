"""Recipes: every fault at once, each with its line, the value seen and the mend; and nothing is ever constructed from YAML."""

from pathlib import Path

import pytest

from squeeze.errors import RecipeError
from squeeze.recipe import apply_overrides, read_recipe, recipe_digest, recipe_schema
from squeeze.tasks import TASKS

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
    ("addition", "sentence"),
    [
        ("bench: {repeats: 0}", "bench.repeats = 0 is less than 1. Child processes for each cell and pass, at least."),
        ("seed: -1", "seed = -1 is not in [0, 4294967296). Seed of everything that is drawn at random."),
        ("seed: true", "seed = true is true or false, not a number."),
        ("seed: '5'", "seed = '5' is text, not a number."),
        ("seed: 1e999", "seed = '1e999' is too large a number."),
        ("seed: !!int x", "seed = 'x' is tagged !!int but is none. Drop the tag."),
        ("notes: no", "notes = 'no' is not a list. Remarks that a reader of the report must know."),
        ("notes: [no, 1]", "notes[1] = 1 is not text: put it in quotes."),
        ("bench: 3", "bench = 3 is not a mapping of settings. What is measured, and how; {} for the defaults."),
        ("? [a]\n: 1", "has a list or a mapping for a key. Keys are single words."),
        (
            "bench: {workloads: [{kind: fixd, batch: 1}]}",
            "bench.workloads[0].kind = 'fixd' is unknown. Did you mean 'fixed'? Known: closed, dataset, fixed, generate, grid, open.",
        ),
        (
            "bench: {workloads: [{batch: 3}]}",
            "bench.workloads[0].kind is missing. Known: closed, dataset, fixed, generate, grid, open.",
        ),
        (
            "bench: {workloads: [{kind: generate, batch: 1.5}]}",
            "bench.workloads[0].batch = 1.5 is not a whole number.",
        ),
        (
            '"\\e[31m": 1',
            "'\\x1b[31m' is unknown. Known: bench, data, export, model, name, notes, seed, stages, task, verify.",
        ),
        (
            "seed: !!python/name:os.system",
            "seed has the tag 'tag:yaml.org,2002:python/name:os.system'. "
            "A recipe holds plain values; tags can run code. Drop it.",
        ),
    ],
)
def test_a_fault_is_one_sentence_with_line_place_and_value(tmp_path: Path, addition: str, sentence: str) -> None:
    text = GOOD.replace("seed: 7\n", "")
    line = text.count("\n") + 1
    assert faults(tmp_path, f"{text}{addition}\n") == [f"{tmp_path / 'x.yaml'}:{line} {sentence}"]


def test_a_missing_setting_is_named_where_it_belongs_with_its_meaning(tmp_path: Path) -> None:
    (line,) = faults(tmp_path, GOOD.replace("task: causal-lm\n", ""))
    assert line == f"{tmp_path / 'x.yaml'}:1 task is missing. What the model is for."


def test_a_value_that_fits_no_member_of_a_union_is_told_once(tmp_path: Path) -> None:
    (line,) = faults(tmp_path, GOOD.replace("evaluate: 4", "evaluate: 4\n    train: all"))
    expected = "data.splits.train = 'all' is not a whole number and is not 'rest'. Number of examples, or `rest`."
    assert line == f"{tmp_path / 'x.yaml'}:9 {expected}"


def test_an_unknown_stage_is_one_fault_and_its_settings_are_not_judged(tmp_path: Path) -> None:
    (line,) = faults(tmp_path, GOOD.replace("kind: quantize", "kind: cluster").replace("scheme: int8", "amount: 0.5"))
    assert (
        line == f"{tmp_path / 'x.yaml'}:10 stages[0].kind = 'cluster' is unknown. Known: distill, prune, qat, quantize."
    )


def test_scalars_are_yaml_1_2(tmp_path: Path) -> None:
    """In YAML 1.1, which PyYAML reads, `no` is false, `12:30` is 750 and `1e-4` is text."""
    text = GOOD.replace("verify: {}", "verify: {tolerance: 1e-4}") + "notes: [no, 12:30, 2026-11-24]\n"
    recipe = read_recipe(written(tmp_path, text))
    assert recipe.notes == ("no", "12:30", "2026-11-24")
    assert recipe.verify is not None
    assert recipe.verify.tolerance == 1e-4


def test_a_label_is_text_whatever_it_looks_like(tmp_path: Path) -> None:
    text = GOOD.replace("  path: prose.txt", "  path: prose.txt\n  labels: {no: 0, yes: 1, 3: 2}")
    assert read_recipe(written(tmp_path, text)).data.labels == {"no": 0, "yes": 1, "3": 2}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("dta.x=1", "--set dta.x: dta is unknown. Did you mean 'data'?"),
        ("stages.3.x=1", "--set stages.3.x: stages has 1 entry, so there is no '3' in it."),
        ("name.x=1", "--set name.x: name = 'tiny' holds no settings, so there is no 'x' in it."),
        ("bench.repeats=0", "--set bench.repeats = 0 is less than 1."),
        ("stages[0].scheme=int9", "--set stages.0.scheme = 'int9'"),
        ("notes=[", "--set notes: = '[' is not YAML:"),
        ("seed=!!python/name:os.system", "--set seed has the tag 'tag:yaml.org,2002:python/name:os.system'."),
    ],
)
def test_a_wrong_override_is_the_place_of_its_fault(tmp_path: Path, override: str, sentence: str) -> None:
    (line,) = faults(tmp_path, GOOD, override)
    assert line.startswith(sentence)


def test_an_override_can_open_a_section_and_replace_a_whole_list(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, GOOD), ["bench.repeats=2", "stages=[]", "notes=[no]"])
    assert recipe.bench is not None
    assert (recipe.bench.repeats, recipe.stages, recipe.notes) == (2, (), ("no",))


def test_a_file_that_is_not_utf_8_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"name: a\ntask: \xff\n")
    with pytest.raises(RecipeError, match=r"x\.yaml:2 is not UTF-8 text"):
        read_recipe(tmp_path / "x.yaml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        read_recipe(tmp_path)


def test_the_tasks_of_a_recipe_are_those_of_the_table() -> None:
    assert set(recipe_schema()["properties"]["task"]["enum"]) == set(TASKS)


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
    assert any("is followed by quantize" in line for line in faults(tmp_path, text))


def test_qat_comes_after_quantize_and_nowhere_else(tmp_path: Path) -> None:
    after = read_recipe(written(tmp_path, GOOD.replace("export: {}", "  - kind: qat\nexport: {}")))
    assert [stage.kind for stage in after.stages] == ["quantize", "qat"]
    alone = GOOD.replace("kind: quantize", "kind: qat").replace("    scheme: int8\n", "")
    assert any("what a quantize stage has made" in line for line in faults(tmp_path, alone))


def test_verify_without_export_is_refused(tmp_path: Path) -> None:
    assert any("verify checks an export" in line for line in faults(tmp_path, GOOD.replace("export: {}\n", "")))


def test_a_recipe_that_is_not_there_offers_its_neighbours(tmp_path: Path) -> None:
    written(tmp_path, GOOD)
    with pytest.raises(RecipeError, match=r"y\.yaml does not exist.*x\.yaml"):
        read_recipe(tmp_path / "y.yaml")


def test_the_schema_names_every_setting() -> None:
    schema = recipe_schema()
    assert set(schema["properties"]) >= {"name", "model", "data", "task", "stages", "export", "verify", "bench", "seed"}
