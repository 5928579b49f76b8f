"""The stage as a recipe, the Python side and the command line meet it."""

import json
from pathlib import Path

import numpy as np
import pytest

import squeeze
from squeeze.errors import PruneError, RecipeError, ReportError
from squeeze.masks import Pruned
from squeeze.model import Model, ModelSettings, load_model
from squeeze.pruning.sensitivity import sensitivity_table
from squeeze.pruning.settings import PruneStage
from squeeze.recipe import read_recipe
from squeeze.report.sensitivity_table import write_table
from squeeze.stages import inputs_of, keep_source

RNG = np.random.default_rng(0)
BATCHES = [{"input_ids": RNG.integers(4, 100, (2, 16)), "attention_mask": np.ones((2, 16), np.int64)}]
GOOD = """name: tiny
model: {path: some/model}
task: causal-lm
data: {path: prose.txt, splits: {evaluate: 4, calibration: 2}}
stages:
  - {kind: prune, sparsity: 0.5}
"""


def test_a_record_tells_what_was_done_and_the_model_knows_its_zeros(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    record = PruneStage(sparsity=0.5, criterion="sparsegpt").apply(model, BATCHES)
    assert record.kind == "prune"
    assert "50.0" in record.notes[0]
    assert "14 matrices" in record.notes[0]
    assert record.notes[1] == "sparsegpt from 32 calibration tokens"
    assert len(model.pruned) == 14
    assert model.pruned["model.layers.0.mlp.up_proj.weight"] == Pruned("unstructured", 0.5, 4096)


def test_a_scan_that_was_written_spreads_sparsity_as_one_made_on_the_spot(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    spread = {"sparsity": 0.5, "allocation": "sensitivity"}
    on_the_spot, as_written = load_model(tiny_llama_folder), load_model(tiny_llama_folder)
    record = PruneStage(**spread).apply(on_the_spot, BATCHES)
    write_table(record.sensitivity, tmp_path / "scan.json")
    stage = PruneStage(**spread, scan=str(tmp_path / "scan.json"))
    assert stage.apply(as_written, BATCHES).sensitivity == record.sensitivity
    assert as_written.pruned == on_the_spot.pruned
    assert len({p.sparsity for p in as_written.pruned.values()}) > 1


def test_the_scan_of_something_else_is_refused(tiny_llama_folder: Path, tiny_bert_folder: Path, tmp_path: Path) -> None:
    place, model = tmp_path / "scan.json", load_model(tiny_llama_folder)
    labelled = [{**batch, "labels": np.array([0, 1])} for batch in BATCHES]
    stage = PruneStage(sparsity=0.5, allocation="sensitivity", scan=str(place))
    with pytest.raises(ReportError, match="scan.json cannot be read"):
        stage.apply(model, BATCHES)
    write_table(sensitivity_table(load_model(tiny_bert_folder), labelled, PruneStage(sparsity=0.5)), place)
    with pytest.raises(
        PruneError, match="is the scan of another model, or of one with other matrices kept dense: .* is in the scan"
    ):
        stage.apply(model, BATCHES)
    write_table(sensitivity_table(model, BATCHES, PruneStage(sparsity=0.5, criterion="magnitude")), place)
    with pytest.raises(PruneError, match="was scanned with magnitude, .* prune with criterion magnitude"):
        stage.apply(model, BATCHES)
    assert not model.pruned


def test_another_scan_in_the_same_file_is_another_stage(tiny_llama_folder: Path, tmp_path: Path) -> None:
    parent = keep_source(ModelSettings(path=str(tiny_llama_folder)), "causal-lm", tmp_path / "0-source")
    model, place = load_model(tiny_llama_folder), tmp_path / "scan.json"
    stage, seen = PruneStage(sparsity=0.5, allocation="sensitivity", scan=str(place)), set()
    for sparsities in ((0.5, 0.7), (0.5, 0.7), (0.6,)):
        write_table(sensitivity_table(model, BATCHES, PruneStage(sparsity=0.5), sparsities), place)
        seen.add(inputs_of(stage, parent, None, None))
    assert len(seen) == 2


def test_a_decoder_by_magnitude_is_warned_of(tiny_llama_folder: Path) -> None:
    record = PruneStage(sparsity=0.5, criterion="magnitude").apply(load_model(tiny_llama_folder))
    assert "criterion magnitude at 50" in record.warnings[0]
    assert "wanda and sparsegpt" in record.warnings[0]
    assert not PruneStage(sparsity=0.2, criterion="magnitude").apply(load_model(tiny_llama_folder)).warnings


def test_layers_that_run_one_set_of_weights_are_pruned_and_warned_of() -> None:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(
        vocab_size=100,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    network = AlbertForSequenceClassification(config).eval().requires_grad_(False)
    model = Model(network, None, "text-classification", "albert", network.config.to_dict())
    record = PruneStage(sparsity=0.5).apply(model, BATCHES)
    assert len(model.pruned) == 6
    assert "3 layers run on 1 set(s) of weights" in record.warnings[0]
    labelled = [{**batch, "labels": np.array([0, 1])} for batch in BATCHES]
    other = PruneStage(sparsity=0.6, criterion="taylor").apply(model, labelled)
    assert not any("set(s) of weights" in text for text in other.warnings)


def test_nothing_asked_is_nothing_done(tiny_bert_folder: Path) -> None:
    for criterion in ("taylor", "wanda"):
        model = load_model(tiny_bert_folder)
        labelled = [{**batch, "labels": np.array([0, 1])} for batch in BATCHES]
        record = PruneStage(sparsity=0, criterion=criterion).apply(model, labelled)
        assert max(row.sparsity for row in record.layers) < 0.01


def test_texts_that_decide_must_be_there(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    for stage, message in (
        (
            PruneStage(sparsity=0.5, criterion="magnitude", allocation="owl"),
            "allocation owl is measured on calibration texts",
        ),
        (PruneStage.model_validate({"remove": {"heads": 2}}), "remove ranks parts on calibration texts"),
    ):
        with pytest.raises(PruneError, match=message):
            stage.apply(model)


def test_parts_are_not_taken_from_what_has_zeros_already(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    model.pruned["model.layers.0.mlp.up_proj.weight"] = Pruned("unstructured", 0.5, 4096)
    with pytest.raises(PruneError, match="Remove parts first, then prune single weights"):
        PruneStage.model_validate({"remove": {"layers": [0]}}).apply(model)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            ("{kind: prune, sparsity: 0.5}", "{kind: prune, sparsity: 1.4}"),
            "stages[0].sparsity = 1.4 is not in [0, 1).",
        ),
        (("{kind: prune, sparsity: 0.5}", '{kind: prune, pattern: "4:4"}'), "pattern 4:4 makes 4 of 4 neighbours zero"),
        (("{kind: prune, sparsity: 0.5}", "{kind: prune, sparsity: 0.5, criterion: wandas}"), "Did you mean 'wanda'?"),
        ((", calibration: 2", ""), "stages[0] (prune) (wanda) ranks weights by calibration texts, and there are none"),
        (
            ("  - {kind: prune, sparsity: 0.5}", "  - {kind: quantize}\n  - {kind: prune, sparsity: 0.5}"),
            "stages[0] (quantize) is followed by prune. It leaves integers, which only qat can go on training: put prune before quantize.",
        ),
        (
            ("sparsity: 0.5}", "sparsity: 0.5, schedule: {}}"),
            "stages[0] (prune) trains, and there is nothing to train on",
        ),
        (("sparsity: 0.5}", "remove: {heads: 2}}"), ""),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_when_it_is_read(
    tmp_path: Path, change: tuple[str, str], sentence: str
) -> None:
    place = tmp_path / "x.yaml"
    place.write_text(GOOD.replace(*change), "utf-8")
    if not sentence:
        assert read_recipe(place).stages[0].kind == "prune"
        return
    with pytest.raises(RecipeError) as raised:
        read_recipe(place)
    assert sentence in str(raised.value)


def test_embeddings_have_no_gradient_to_prune_by(tmp_path: Path) -> None:
    place = tmp_path / "x.yaml"
    place.write_text(
        GOOD.replace("causal-lm", "feature-extraction").replace("0.5}", "0.5, criterion: taylor}"), "utf-8"
    )
    with pytest.raises(RecipeError, match=r"has criterion taylor, .* Use wanda, sparsegpt or magnitude"):
        read_recipe(place)


def test_a_classifier_is_pruned_by_its_labels_and_loads_as_it_was_pruned(
    tiny_bert_folder: Path, tmp_path: Path
) -> None:
    """Through the Python side: texts and labels of the calibration split, an artifact, and that artifact opened again."""
    rows = [{"text": f"tweet number {n} is {'fine' if n % 2 else 'bad'}", "label": n % 3} for n in range(30)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    data = {"path": str(tmp_path / "t.jsonl"), "label_column": "label", "splits": {"evaluate": 10, "calibration": 12}}
    artifact = squeeze.prune(tiny_bert_folder, tmp_path / "out", sparsity=0.5, criterion="taylor", data=data)
    assert artifact.name == "1-prune"
    assert artifact.manifest.data.keys() == {"calibration"}
    assert artifact.manifest.nonzero_parameters < artifact.manifest.parameters
    told = artifact.manifest.extra["pruned"]
    assert told["bert.encoder.layer.0.output.dense.weight"] == {
        "pattern": "unstructured",
        "sparsity": 0.5,
        "zeros": 4096,
    }  # type: ignore[index, call-overload]
    weight = load_model(artifact.folder).network.bert.encoder.layer[0].output.dense.weight
    assert int((weight == 0).sum()) == 4096
    with pytest.raises(PruneError, match="no setting here reads calibration texts"):
        squeeze.prune(tiny_bert_folder, tmp_path / "other", sparsity=0.5, criterion="magnitude", data=data)
    with pytest.raises(PruneError, match="wanda 50.*is decided by texts, and there are none. Name some with --data"):
        squeeze.prune(tiny_bert_folder, tmp_path / "other", sparsity=0.5)
