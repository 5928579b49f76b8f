"""`squeeze prune`: what its options mean."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from squeeze.artifact import read_artifact
from squeeze.cli import app
from squeeze.cli.prune import _amount, prune
from squeeze.errors import SqueezeError


def test_the_command_makes_an_artifact_with_the_zeros_asked_for(tiny_llama_folder: Path, tmp_path: Path) -> None:
    words = ["--criterion", "magnitude", "--pattern", "2:4", "--keep", "*.v_proj", "-q"]
    done = CliRunner().invoke(app, ["prune", str(tiny_llama_folder), "--out", str(tmp_path / "x"), *words])
    assert done.exit_code == 0, done.output
    assert "1-prune" in done.output
    record = read_artifact(tmp_path / "x" / "1-prune").manifest.record
    assert record is not None
    shares = {row.name: row.sparsity for row in record.layers}
    assert shares["model.layers.1.mlp.down_proj.weight"] == 0.5
    assert shares["model.layers.1.self_attn.v_proj.weight"] == 0
    assert record.settings["pattern"] == "2:4"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("prune.sparsty=0.5", "--set prune.sparsty is unknown. Did you mean 'sparsity'?"),
        ("prun.sparsity=0.5", "--set prun is unknown. Did you mean 'prune'?"),
    ],
)
def test_an_override_of_something_else_is_refused(override: str, sentence: str) -> None:
    with pytest.raises(SqueezeError, match=re.escape(sentence)):
        prune("model", settings=[override])


@pytest.mark.parametrize(
    ("text", "meant"),
    [("0.25", 0.25), (".5", 0.5), ("8", 8), ("0,2, 4", [0, 2, 4]), ("4,", [4]), (None, None)],
)
def test_an_amount_is_a_share_a_count_or_a_list(text: str | None, meant: object) -> None:
    assert _amount("--remove-layers", text, listed=True) == meant


@pytest.mark.parametrize("text", ["half", "1.5", "-3", "0,2"])
def test_an_amount_that_is_neither_is_refused(text: str) -> None:
    with pytest.raises(
        SqueezeError, match=rf"--remove-heads {text} is neither a share that goes, as in 0\.25, nor how many stay"
    ):
        _amount("--remove-heads", text)
