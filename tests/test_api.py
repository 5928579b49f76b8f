"""Single steps on what a recipe made: exports go beside its stages, stages of one's own into a run of one's own."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

import squeeze
from squeeze.artifact import read_artifact
from squeeze.errors import ArtifactError, SqueezeError
from squeeze.model import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_bert_folder: Path) -> Path:
    """A finished run of a recipe with a stage that it does not export."""
    place = tmp_path_factory.mktemp("api")
    (place / "texts.txt").write_text("\n".join(f"the cat {n} sat on the mat" for n in range(20)))
    recipe = place / "tiny.yaml"
    recipe.write_text(
        f"name: tiny\nmodel: {{path: {tiny_bert_folder}}}\ntask: feature-extraction\n"
        f"data: {{path: {place / 'texts.txt'}, max_length: 16, splits: {{evaluate: 4}}}}\n"
        "stages:\n- {kind: prune, criterion: magnitude, sparsity: 0.5}\n- {kind: quantize}\nexport: {}\n"
    )
    squeeze.run(recipe, place / "run")
    return place / "run"


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_a_stage_in_between_is_exported_beside_it_and_the_run_stays_the_recipes(run: Path) -> None:
    before, told = names(run), (run / ".squeeze-run").read_bytes()
    # The recipe's own export of the source was made otherwise, and stays as it is.
    made = squeeze.export(run / "1-prune", graph="dynamo")
    try:
        assert made.folder == run / "export-1-prune"
        assert made.manifest.parent == read_artifact(run / "1-prune").digest
        assert squeeze.verify(made.folder).artifact == "export-1-prune"
        assert names(run) == sorted([*before, "export-1-prune"])
        assert (run / ".squeeze-run").read_bytes() == told
        again = squeeze.run(run.parent / "tiny.yaml", run, mode="resume")
        assert [m.name for m in again.manifests] == [
            "0-source", "1-prune", "2-quantize", "export-0-source", "export-2-quantize"
        ]  # fmt: skip
    finally:
        shutil.rmtree(made.folder)


def test_what_the_recipe_exported_is_not_replaced(run: Path) -> None:
    kept = read_artifact(run / "export-2-quantize").digest
    with pytest.raises(
        ArtifactError, match=r"made otherwise\. Give --out NEW: a run of its own, beginning with 2-quantize"
    ):
        squeeze.export(run, graph="dynamo")
    assert read_artifact(run / "export-2-quantize").digest == kept


@pytest.mark.parametrize("name", ["0-source", "1-prune"])
def test_a_stage_of_ones_own_needs_a_run_of_its_own(run: Path, name: str, tmp_path: Path) -> None:
    before = names(run)
    with pytest.raises(ArtifactError, match=f"only the recipe adds stages. Give --out NEW: .* beginning with {name}"):
        squeeze.quantize(run / name, scheme="int4-weight")
    assert names(run) == before
    with pytest.raises(ArtifactError, match="only the recipe adds stages"):
        squeeze.quantize(run / name, run, scheme="int4-weight")
    assert names(run) == before
    made = squeeze.quantize(run / name, tmp_path / "own", scheme="int4-weight")
    assert made.folder == tmp_path / "own" / "1-quantize"
    assert names(run) == before
    ours, theirs = (load_model(f).network.state_dict() for f in (tmp_path / "own" / "0-source", run / name))
    for key, weight in theirs.items():
        np.testing.assert_array_equal(ours[key], weight)
    pruned = load_model(tmp_path / "own" / "0-source").pruned
    assert bool(pruned) == (name == "1-prune")
    exported = squeeze.export(tmp_path / "own")
    assert squeeze.verify(exported.folder).artifact == "export-1-quantize"


def test_integers_begin_a_run_of_their_own_as_integers(run: Path, tmp_path: Path) -> None:
    exported = squeeze.export(run, tmp_path / "own")
    assert exported.folder == tmp_path / "own" / "export-0-source"
    ours, theirs = (load_model(f) for f in (tmp_path / "own" / "0-source", run / "2-quantize"))
    assert ours.activations == theirs.activations
    assert ours.integers.keys() == theirs.integers.keys() != set()
    for layer, weight in theirs.integers.items():
        np.testing.assert_array_equal(ours.integers[layer].integers, weight.integers)
    graphs = [onnx.load(folder / "model.onnx").graph for folder in (exported.folder, run / "export-2-quantize")]
    assert graphs[0] == graphs[1]
    with pytest.raises(SqueezeError, match="already quantized"):
        squeeze.quantize(tmp_path / "own")
