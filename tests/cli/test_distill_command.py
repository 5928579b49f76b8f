"""`squeeze distill` on tiny models and a small table of texts: what it says, leaves, repeats and refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from squeeze.cli import _guarded, app

Say = Callable[..., tuple[int, str, str]]
ACTIONS = ("cat sat on the mat", "trains are late again", "shop opens at nine", "battery lasts for two days")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill command")
    words = ("Negative", "neutral", "positive")
    rows = [f"The {ACTIONS[n % 4]} number {n},{words[n % 3]}" for n in range(60)]
    (folder / "tweets.csv").write_text("\n".join(["text,label", *rows]), "utf-8")
    (folder / "other.csv").write_text("\n".join(["text,label", *(r.replace("neutral", "spam") for r in rows)]), "utf-8")
    numbers = [f"text {n},{n % 5}" for n in range(40)]
    (folder / "numbers.csv").write_text("\n".join(["text,label", *numbers]), "utf-8")
    (folder / "bare.txt").write_text("\n".join(f"Nobody answered my call {n} times" for n in range(12)), "utf-8")
    (folder / "bare.csv").write_text("\n".join(["text,mood", *rows]), "utf-8")
    return folder


@pytest.fixture
def say(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs `squeeze distill WORDS` in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(place)

    def run(*words: object) -> tuple[int, str, str]:
        code = _guarded(lambda **options: app([*map(str, words)], **options))
        shown = capsys.readouterr()
        return code, shown.out.replace("\u00a0", " "), shown.err

    return run


@pytest.fixture(scope="module")
def finished(place: Path, tiny_bert_folder: Path) -> tuple[Path, list[tuple[str, str]], Any]:
    """A student of one layer, compared without timing."""
    from squeeze import api

    told: list[tuple[str, str]] = []
    report = api.distill(
        tiny_bert_folder, place / "S", data={"path": str(place / "tweets.csv")}, student={"layers": 1}, losses=["kl", "hidden=0.5"],
        training={"epochs": 2, "batch": 8}, bench=False, announce=told.extend,
    )  # fmt: skip
    return place / "S", told, report


def test_what_was_chosen_is_said_before(
    finished: tuple[Path, list[tuple[str, str]], Any], tiny_bert_folder: Path
) -> None:
    told = dict(finished[1])
    assert told["teacher"] == str(tiny_bert_folder)
    assert told["student"] == "1 of 2 layers (spread)"
    assert told["losses"] == "kl (T 2) + 0.5 hidden"
    assert told["trains on"].startswith("44 texts of ")  # 60, a tenth to compare on, a fifth of the rest to judge
    assert told["length"] == "2 epochs of batches of 8: 12 steps"


def test_teacher_and_student_are_compared_on_the_same_texts(finished: tuple[Path, list[tuple[str, str]], Any]) -> None:
    from squeeze.report.summary import summarize

    report = finished[2]
    assert [m.name for m in report.manifests] == ["0-source", "1-distill"]
    rows = {row.quantity: row for row in summarize(report)}
    assert list(rows) == ["correct", "same_answer", "kl_to_source", "logit_error", "parameters", "weight_bytes"]
    right = {m.artifact: m.values for m in report.measurements if m.quantity == "correct"}
    assert {len(values) for values in right.values()} == {6}
    assert rows["correct"].after.value == pytest.approx(sum(right["1-distill"]) / 6)
    assert rows["parameters"].before.value == report.manifests[0].parameters > report.manifests[1].parameters
    assert rows["weight_bytes"].after.value == report.manifests[1].weight_bytes
    assert report.recipe["data"]["labels"] == {"Negative": 0, "neutral": 1, "positive": 2}
    curve = report.manifests[1].record.training
    assert curve.steps[-1] == 12
    assert set(curve.shares) == {"kl", "hidden"}


def test_the_run_folder_holds_the_report_and_the_page(finished: tuple[Path, list[tuple[str, str]], Any]) -> None:
    from squeeze.report.schema import read_report

    folder = finished[0]
    assert read_report(folder / "report.json") == finished[2]
    page = (folder / "report.html").read_text("utf-8")
    assert "Is it still learning?" in page
    assert not list(folder.glob(".*.training"))
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == [
        "0-source", "1-distill", "report.html", "report.json",
    ]  # fmt: skip


def test_the_report_shows_the_curve_again(
    finished: tuple[Path, list[tuple[str, str]], Any], say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # a folder's long name shall not break the line
    code, shown, _ = say("report", finished[0])
    assert code == 0
    assert "1-distill: training" in shown
    assert "three quarters" in shown
    assert "held-out accuracy" in shown
    code, shown, _ = say("inspect", finished[0])
    assert code == 0
    assert "distill 1 layer, kl + 0.5 hidden, 2 epochs, batches of 8" in " ".join(shown.split())


@pytest.mark.parametrize("by_folder", [True, False])
def test_the_same_call_again_trains_nothing(
    finished: tuple[Path, list[tuple[str, str]], Any],
    place: Path,
    tiny_bert_folder: Path,
    by_folder: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after an interruption of the comparison, which is not made again here."""
    from squeeze import api

    compared: list[str] = []
    monkeypatch.setattr(
        "squeeze.measuring.compare_stage",
        lambda stage, before, after, data, **more: compared.extend([before.digest, after.digest]),
    )
    folder, _, report = finished
    where = (folder, None) if by_folder else (tiny_bert_folder, folder)
    trained: list[str] = []
    api.distill(
        *where, data={"path": str(place / "tweets.csv")}, student={"layers": 1}, losses=["kl", "hidden=0.5"],
        training={"epochs": 2, "batch": 8}, bench=False, progress=lambda text, i, n: trained.append(text),
    )  # fmt: skip
    assert compared == [m.digest for m in report.manifests]
    assert not trained
    assert not (folder / "2-distill").exists()


def test_an_artifact_teaches_the_next_stage_of_its_run_folder(
    finished: tuple[Path, list[tuple[str, str]], Any], say: Say
) -> None:
    student = finished[0] / "1-distill"
    code, shown, wrong = say(
        "distill", student, "--layers", 1, "--data", "tweets.csv", "--steps", 2, "--batch", 4, "--rate", 1e-3, "--temperature", 4,
        "--no-bench", "--evaluate", 9, "--seed", 3, "--unlabelled", "bare.txt", "--json", "--quiet",
    )  # fmt: skip
    assert code == 0, wrong
    report = json.loads(shown)
    assert [m["name"] for m in report["manifests"]] == ["1-distill", "2-distill"]
    settings = report["manifests"][1]["record"]["settings"]
    assert [term["temperature"] for term in settings["losses"]] == [4.0, None]
    assert (settings["training"]["steps"], settings["training"]["batch"], settings["training"]["seed"]) == (2, 4, 3)
    assert settings["training"]["learning_rate"] == 1e-3
    assert settings["unlabelled"]["path"] == "bare.txt"
    assert report["recipe"]["data"]["splits"]["evaluate"] == 9
    scored = {m["artifact"] for m in report["measurements"] if m["quantity"] == "correct"}
    assert scored == {"1-distill", "2-distill"}


def test_a_later_artifact_that_is_the_student_itself_learns_from_its_run_s_source(
    finished: tuple[Path, list[tuple[str, str]], Any],
) -> None:
    from squeeze.api import _teacher
    from squeeze.artifact import read_artifact
    from squeeze.compress import DistillStage
    from squeeze.errors import TrainError

    source, student = (read_artifact(finished[0] / name) for name in ("0-source", "1-distill"))
    cut = DistillStage.model_validate({"student": {"layers": 1}})
    assert _teacher(DistillStage(), student) == source
    assert _teacher(cut, student) == student
    assert _teacher(cut.model_copy(update={"teacher": "models/big"}), student) is None
    with pytest.raises(TrainError, match="nothing to learn"):
        _teacher(DistillStage(), source)


WRONG: list[tuple[tuple[object, ...], str]] = [
    (("--loss", "hiden"), "Did you mean 'hidden'?"),
    (("--loss", "kl=much"), "'much' is no weight"),
    (("--layers", "all"), "--layers all is neither"),
    (("--layers", "1", "--choose", "spred"), "Did you mean 'spread'?"),
    (("--layers", "1", "--device", "gpu"), "--device gpu is unknown"),
    (("--layers", "1", "--epochs", "2", "--steps", "5"), "Give one of them"),
    (("--layers", "1", "--batch", "0"), "distill.training.batch = 0"),
    (("--layers", "1", "--loss", "hidden", "--temperature", "2"), "is read by none of the losses hidden"),
    (("--layers", "1", "--set", "distil.dropout=true"), "Did you mean 'distill'?"),
    (("--layers", "1", "--set", "distill.dropot=true"), "distill.dropot"),
    (("--layers", "1", "--set", "data.max_length=400"), "has 64 positions"),
    (("--layers", "1", "--evaluate", "100000"), "100000"),
    (("--layers", "3"), "the model has 2"),
    ((), "there is nothing to learn"),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_what_cannot_work_is_one_message(
    say: Say, tiny_bert_folder: Path, tmp_path: Path, words: tuple[object, ...], message: str
) -> None:
    code, _, said = say("distill", tiny_bert_folder, "--data", "tweets.csv", "--out", tmp_path / "S", *words)
    assert code == 2, said
    assert message in said


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("other.csv", "'spam', but the model's head knows 3 classes: negative 0, neutral 1, positive 2"),
        ("numbers.csv", "the model's head knows 3"),
        ("bare.csv", "no column 'label'"),
        ("nowhere.csv", "does not exist"),
    ],
)
def test_labels_that_the_teacher_does_not_have_are_named(
    say: Say, tiny_bert_folder: Path, tmp_path: Path, data: str, message: str
) -> None:
    code, _, said = say("distill", tiny_bert_folder, "--layers", 1, "--data", data, "--out", tmp_path / "S")
    assert code == 2, said
    assert message in said


def test_integers_are_not_distilled(say: Say, tiny_bert_folder: Path, tmp_path: Path) -> None:
    from squeeze import api

    api.quantize(tiny_bert_folder, tmp_path / "S")
    code, _, said = say("distill", tmp_path / "S", "--layers", 1, "--data", "tweets.csv")
    assert code == 2
    assert "holds integers, which only qat can go on training" in said


def test_another_teacher_is_measured_beside_the_student(place: Path, tiny_bert_folder: Path, tmp_path: Path) -> None:
    from squeeze import api

    report = api.distill(
        tiny_bert_folder, tmp_path / "S", data={"path": str(place / "tweets.csv")}, losses=["kl"], teacher=tiny_bert_folder,
        student={"layers": 1}, training={"steps": 1, "batch": 4}, bench=False,
    )  # fmt: skip
    assert [m.name for m in report.manifests] == ["teacher", "0-source", "1-distill"]
    scored = [m.artifact for m in report.measurements if m.quantity == "correct"]
    assert scored == ["teacher", "1-distill"]
    assert report.manifests[0].parameters == report.manifests[1].parameters > report.manifests[2].parameters


def test_methods_list_every_loss_with_its_equation_and_source(say: Say) -> None:
    from squeeze.distillation.losses import LOSSES
    from squeeze.distillation.settings import StudentSettings

    code, shown, _ = say("methods", "--json")
    assert code == 0
    rows = json.loads(shown)
    losses = {row["name"]: row for row in rows if row["kind"] == "loss"}
    assert losses.keys() == LOSSES.keys()
    for name, loss in LOSSES.items():
        assert loss.equation in losses[name]["summary"]
        assert losses[name]["source"] == loss.source
    assert {row["name"] for row in rows if row["kind"] == "student"} == set(StudentSettings.model_fields)
    assert any((row["kind"], row["name"]) == ("training", "distill") for row in rows)
