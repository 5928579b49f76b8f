"""Trainings that read their teacher's answers, and runs that share them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from squeeze.data import Data, DataSettings, Split, Splits, load_data
from squeeze.distillation import DistillStage
from squeeze.distillation.settings import CacheSettings, LossTerm, StudentSettings
from squeeze.distillation.students import make_student
from squeeze.distillation.taught import Taught
from squeeze.model import Model, ModelSettings, load_model
from squeeze.stages import apply_stage, keep_source
from squeeze.training.examples import Examples
from squeeze.training.settings import Training

Write = Callable[..., Examples]


def data_of(texts: list[str], settings: Path) -> Data:
    split = Split("train", tuple(texts), None, None, "sha256:" + "0" * 64)
    return Data(
        DataSettings(path=str(settings), max_length=48, splits=Splits(evaluate=1, train="rest")),
        "feature-extraction",
        {"train": split},
        None,
    )


def test_training_from_the_cache_reaches_nearly_the_same_weights(
    tmp_path: Path, tiny_bert_folder: Path, written: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_model(tiny_bert_folder).tokenizer
    texts = list(written(tokenizer, 80).texts or ())
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = data_of(texts, tmp_path / "texts.jsonl")
    loads = []

    def taught() -> Taught:
        def load() -> Model:
            loads.append(1)
            return load_model(tiny_bert_folder, "feature-extraction")

        return Taught("sha256:" + "c" * 64, load)

    def trained(cache: CacheSettings | None) -> tuple[torch.Tensor, tuple[str, ...]]:
        stage = DistillStage(
            student=StudentSettings(layers=1), losses=(LossTerm(kind="embedding"), LossTerm(kind="hidden")), cache=cache,
            training=Training(epochs=2, batch=8, held_out=16, learning_rate=1e-3, precision="float32", device="cpu", keep="last"),
        )  # fmt: skip
        model = load_model(tiny_bert_folder, "feature-extraction")
        record = stage.apply(model, taught(), data, tmp_path / "run" / ".1-distill.training", f"sha256:{len(loads)}")
        weights = torch.cat([p.detach().flatten() for p in model.network.parameters()])
        return weights, record.notes

    (tmp_path / "run").mkdir()
    student, _ = make_student(StudentSettings(layers=1), load_model(tiny_bert_folder, "feature-extraction"))
    start = torch.cat([p.detach().flatten() for p in student.network.parameters()])
    live, _ = trained(None)
    assert len(loads) == 1
    kept, notes = trained(CacheSettings())
    assert len(loads) == 2
    assert [note for note in notes if "64 examples" in note and "filled in" in note]

    def silent(*_: Any) -> None:
        raise AssertionError("the teacher was run")

    monkeypatch.setattr("squeeze.distillation.objective.LiveTeacher.answers", silent)
    again, notes = trained(CacheSettings())
    assert len(loads) == 3  # once a run, to be checked against the student
    assert sum("read from an earlier run" in note for note in notes) == 2
    assert torch.equal(kept, again)
    assert float((live - kept).norm()) < 0.05 * float((live - start).norm())
    assert (tmp_path / "run" / ".teacher-cache").is_dir()


def test_a_run_shares_its_cache_with_another_run(
    tmp_path: Path, tiny_bert_folder: Path, written: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = sorted(set(written(load_model(tiny_bert_folder).tokenizer, 60).texts or ()))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = DataSettings(path=str(tmp_path / "texts.jsonl"), splits=Splits(evaluate=1, train="rest"), max_length=48)
    stage = DistillStage(
        student=StudentSettings(layers=1), losses=(LossTerm(kind="embedding"),), cache=CacheSettings(folder=str(tmp_path / "shared")),
        training=Training(steps=2, batch=8, held_out=8, precision="float32", device="cpu"),
    )  # fmt: skip
    notes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        source = keep_source(
            ModelSettings(path=str(tiny_bert_folder)), "feature-extraction", tmp_path / name / "0-source"
        )
        data = load_data(settings, "feature-extraction", load_model(source.folder).tokenizer, 0)
        loads: list[Any] = []
        with monkeypatch.context() as patch:
            patch.setattr(
                "squeeze.model.load_model", lambda *args, loads=loads: loads.append(args) or load_model(*args)
            )
            made = apply_stage(stage, source, tmp_path / name / "1-distill", data, source=source)
        assert made.manifest.record is not None
        notes.append((len(loads), " ".join(made.manifest.record.notes)))
    assert notes[0][0] == 2
    assert "filled in" in notes[0][1]
    assert notes[1][0] == 2  # student and teacher, each once: the teacher to be checked, not to answer
    assert notes[1][1].count("read from an earlier run") == 2
