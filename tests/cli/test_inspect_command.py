"""`squeeze inspect --sensitivity` on a tiny model: what it prints, writes, and refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from squeeze.cli import _guarded, app
from squeeze.pruning.allocation import allocate
from squeeze.report.sensitivity_table import read_table

Say = Callable[..., tuple[int, str, str]]
TEXTS = (
    "--data",
    "texts.csv",
    "--set",
    "data.splits.evaluate=4",
    "--set",
    "data.splits.calibration=8",
    "--set",
    "data.label_column=label",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect command")
    rows = [f"The cat number {n} sat on the mat,{n % 3}" for n in range(20)]
    (folder / "texts.csv").write_text("\n".join(["text,label", *rows]), "utf-8")
    return folder


@pytest.fixture
def say(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs `squeeze inspect WORDS` in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object) -> tuple[int, str, str]:
        code = _guarded(lambda **options: app(["inspect", *map(str, words)], **options))
        shown = capsys.readouterr()
        return code, shown.out.replace("\u00a0", " "), shown.err

    return run


@pytest.mark.parametrize(("by", "units"), [("matrix", 12), ("block", 2)])
def test_the_table_is_printed_written_and_what_an_allocation_reads(
    by: str, units: int, say: Say, place: Path, tiny_bert_folder: Path
) -> None:
    words = ("--sensitivity", *TEXTS, "--by", by, "--sparsities", "0.3,0.6", "--out", "table.json")
    code, shown, told = say(tiny_bert_folder, *words)
    assert code == 0, told
    lines = " ".join(shown.split())
    assert "pruned by wanda: nats per text lost, on 8 texts" in lines
    assert "30 % 60 %" in lines
    table = read_table(place / "table.json")
    assert len({row.unit for row in table.rows}) == units
    assert all(f"{row.loss:.2g}" in lines for row in table.rows)
    assert len(allocate(table.rows, 0.4)) == 12
    code, shown, _ = say(tiny_bert_folder, *words, "--json", "--quiet")
    assert code == 0
    assert json.loads(shown) == table.model_dump(mode="json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sensitivity",), "--sensitivity is measured on texts. Name some with --data."),
        (("--data", "texts.csv"), "--data and --out are for --sensitivity. Add it, or drop them."),
        (("--sensitivity", *TEXTS, "--by", "blocks"), "--by blocks is unknown. Did you mean 'block'?"),
        (
            ("--sensitivity", *TEXTS, "--sparsities", "half"),
            "--sparsities half is not numbers with commas between them",
        ),
        (("--sensitivity", *TEXTS, "--criterion", "wand"), "wand"),
    ],
)
def test_bad_words_are_refused(words: tuple[str, ...], message: str, say: Say, tiny_bert_folder: Path) -> None:
    code, _, told = say(tiny_bert_folder, *words)
    assert code == 2
    assert message in " ".join(told.split())
