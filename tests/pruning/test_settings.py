"""What a prune stage may say: each fault in words, with the value seen; and what it is called."""

from typing import Any

import pytest
from pydantic import ValidationError

from squeeze.pruning.settings import PruneStage

HALF: dict[str, Any] = {"sparsity": 0.5}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"pattern": "2:4:6", **HALF}, "pattern '2:4:6' is unknown. Known: unstructured, N:M"),
        ({"pattern": "block-0x4", **HALF}, "pattern 'block-0x4' is unknown"),
        ({"pattern": "4:4"}, "pattern 4:4 makes 4 of 4 neighbours zero, and at least one must stay"),
        ({"pattern": "5:4"}, "pattern 5:4 makes 5 of 4"),
        ({}, "nothing says how much is pruned"),
        ({"pattern": "row"}, "nothing says how much is pruned"),
        ({"pattern": "2:4", "sparsity": 0.3}, "sparsity 0.3 is not what pattern 2:4 gives, 0.5. Drop sparsity"),
        ({"remove": {"heads": 2}, **HALF}, "sparsity is for single weights, and remove takes whole parts"),
        ({"remove": {"heads": 2}, "criterion": "magnitude"}, "criterion is for single weights"),
        ({"remove": {"criterion": "random"}}, "remove names no parts"),
        ({"scope": "row", "pattern": "2:4"}, "scope row: pattern 2:4 ranks weights among 4 neighbours. Drop scope"),
        ({"scope": "global", "pattern": "block-4x4", **HALF}, "not pattern block-4x4. Use scope layer"),
        ({"scope": "row", "pattern": "row", **HALF}, "scope row ranks weights within a row"),
        ({"scope": "global", "criterion": "sparsegpt", **HALF}, "scope global: sparsegpt makes up for each zero"),
        ({"pattern": "row", "criterion": "sparsegpt", **HALF}, "pattern row: sparsegpt makes up for each zero"),
        ({"allocation": "owl", "pattern": "2:4"}, "allocation owl gives each matrix a sparsity of its own, which pattern 2:4"),
        ({"allocation": "owl", "scope": "global", **HALF}, "which scope global decides"),
        ({"allocation": "sensitivity", "scan": "matrices", **HALF}, "scan 'matrices' is neither block nor matrix nor a .json file"),
        ({"training": {"epochs": 2}, **HALF}, "training is for pruning while training. Add a schedule"),
        ({"losses": [{"kind": "kl"}], **HALF}, "losses is for pruning while training"),
        ({"schedule": {}, "pattern": "2:4"}, "pattern 2:4 fixes it. Drop schedule"),
        ({"schedule": {}, "remove": {"layers": 3}}, "schedule is for single weights"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_in_words(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as raised:
        PruneStage.model_validate(given)
    assert sentence in str(raised.value)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.4, float("nan")])
def test_sparsity_is_a_share_below_one(sparsity: float) -> None:
    with pytest.raises(ValidationError, match="sparsity"):
        PruneStage(sparsity=sparsity)


@pytest.mark.parametrize(
    ("given", "share", "needs_data", "scheme"),
    [
        (HALF, 0.5, True, "wanda 50 % unstructured"),
        ({"sparsity": 1 / 3, "criterion": "magnitude"}, 1 / 3, False, "magnitude 33.3 % unstructured"),
        ({"pattern": "2:4", "criterion": "sparsegpt"}, 0.5, True, "sparsegpt 2:4"),
        ({"pattern": "1:4", "sparsity": 0.25}, 0.25, True, "wanda 1:4"),
        ({"scope": "global", "criterion": "magnitude", **HALF}, 0.5, False, "magnitude 50 % unstructured over all matrices"),
        (
            {"allocation": "sensitivity", "criterion": "magnitude", "schedule": {}, **HALF}, 0.5, True,
            "magnitude 50 % unstructured by sensitivity, cubic schedule",
        ),
        (
            {"allocation": "sensitivity", "scan": "scan.json", "criterion": "magnitude", **HALF}, 0.5, False,
            "magnitude 50 % unstructured by sensitivity",
        ),
        ({"remove": {"layers": 0.25, "heads": 8, "neurons": 0.5}}, 0, True, "25 % fewer layers, 8 heads, 50 % fewer neurons"),
        ({"remove": {"layers": [0, 2]}}, 0, False, "layers 0, 2"),
        ({"remove": {"neurons": 0.5, "criterion": "random"}}, 0, False, "50 % fewer neurons"),
    ],
)  # fmt: skip
def test_what_it_is_called_and_whether_texts_decide(
    given: dict[str, Any], share: float, needs_data: bool, scheme: str
) -> None:
    stage = PruneStage.model_validate(given)
    assert (stage.share, stage.needs_data) == (share, needs_data)
    assert stage.scheme.replace("\N{NO-BREAK SPACE}", " ") == scheme
    assert stage.progress_noun == ("step" if "schedule" in given else "block")
