"""What recipes with distillation are refused for when they are read, before anything costs time."""

from pathlib import Path

import pytest

from squeeze.errors import RecipeError
from squeeze.recipe import Recipe, read_recipe, recipe_schema

RECIPE = """
name: x
model: {{path: models/x}}
task: text-classification
data: {{path: x.csv, label_column: y, splits: {{evaluate: 4, train: {train}}}}}
stages:
{stages}
"""


def read(folder: Path, *stages: str, train: str = "rest") -> Recipe:
    file = folder / "x.yaml"
    file.write_text(RECIPE.format(train=train, stages="\n".join(f"  - {stage}" for stage in stages)), "utf-8")
    return read_recipe(file)


def fault(folder: Path, *stages: str, train: str = "rest") -> str:
    with pytest.raises(RecipeError) as caught:
        read(folder, *stages, train=train)
    return str(caught.value)


CUT = "{kind: distill, student: {layers: 3}}"


def test_a_student_then_its_quantization_is_a_recipe(tmp_path: Path) -> None:
    recipe = read(tmp_path, CUT, "{kind: quantize, scheme: int8}")
    assert [stage.kind for stage in recipe.stages] == ["distill", "quantize"]
    assert recipe.stages[0].scheme == "3 layers"


def test_integers_are_not_distilled(tmp_path: Path) -> None:
    said = fault(tmp_path, "{kind: quantize, scheme: int8}", CUT)
    assert "stages[0] (quantize) is followed by distill" in said
    assert "put distill before quantize" in said
    assert "put distill before quantize" in fault(tmp_path, "{kind: quantize, scheme: int8}", "{kind: qat}", CUT)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path: Path) -> None:
    assert "nothing to learn" in fault(tmp_path, "{kind: distill}")
    assert "nothing to learn" in fault(tmp_path, "{kind: distill, losses: [{kind: hidden}]}")
    for stages in (
        ["{kind: distill, teacher: models/big}"],
        ["{kind: distill, losses: [{kind: kl}, {kind: labels}]}"],
        [CUT, "{kind: distill}"],
    ):
        assert read(tmp_path, *stages).stages


def test_texts_to_train_on_are_asked_for_when_the_recipe_is_read(tmp_path: Path) -> None:
    assert "stages[0] (distill) trains, and there is nothing to train on" in fault(tmp_path, CUT, train="0")
    assert "Set data.splits.train" in fault(tmp_path, CUT, train="0")
    assert read(tmp_path, CUT, train="5").data.splits.train == 5


def test_unknown_names_get_the_nearest(tmp_path: Path) -> None:
    said = fault(tmp_path, "{kind: distill, student: {layers: 3}, losses: [{kind: hiden}]}")
    assert "stages[0].losses[0].kind = 'hiden' is unknown. Did you mean 'hidden'?" in said
    said = fault(tmp_path, "{kind: distill, student: {layer: 3}}")
    assert "stages[0].student.layer is unknown. Did you mean 'layers'?" in said
    said = fault(tmp_path, "{kind: distil, student: {layers: 3}}")
    assert "Did you mean 'distill'?" in said


def test_the_schema_knows_the_stage_by_its_kind() -> None:
    schema = recipe_schema()
    stages = schema["properties"]["stages"]["items"]
    assert stages["discriminator"]["mapping"]["distill"] == "#/$defs/DistillStage"
    losses = schema["$defs"]["LossTerm"]["properties"]["kind"]["enum"]
    assert {"kl", "hidden"} <= set(losses)
