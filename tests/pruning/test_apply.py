"""Pruning real tiny networks: how many zeros, where, by what the network really reads; and nothing half-done."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from squeeze.errors import PruneError
from squeeze.integers import round_to_nearest
from squeeze.layerwise import repeated_blocks
from squeeze.model import Model, load_model
from squeeze.pruning import apply
from squeeze.pruning.apply import prune_weights
from squeeze.pruning.criteria import CRITERIA
from squeeze.pruning.gradients import loss_gradients, single
from squeeze.pruning.matrices import matrices
from squeeze.pruning.patterns import keep_mask
from squeeze.pruning.settings import PruneStage

RNG = np.random.default_rng(0)
MASK = np.array([[1] * 16, [1] * 16, [1] * 11 + [0] * 5])
BATCHES = [
    {"input_ids": RNG.integers(4, 100, (3, 16)), "attention_mask": MASK, "labels": RNG.integers(0, 3, 3), "index": np.arange(3)}
    for _ in range(2)
]  # fmt: skip


def opened(folder: Path) -> Model:
    return load_model(folder)


def state(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


def pruned_matrices(model: Model) -> dict[str, Tensor]:
    return {m.name: m.rows() for m in matrices(model.network) if not m.note}


@pytest.mark.parametrize("family", ["tiny_llama_folder", "tiny_gpt2_folder", "tiny_bert_folder"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_matrix_in_the_blocks_has_its_zeros_and_nothing_else_changed(
    family: str, criterion: str, request: pytest.FixtureRequest
) -> None:
    model = opened(request.getfixturevalue(family))
    before = state(model)
    rows = prune_weights(model, PruneStage(sparsity=0.3, criterion=criterion), BATCHES)
    chosen = pruned_matrices(model)
    name, layers = repeated_blocks(model.network)
    assert set(chosen) == {
        f"{name}.{path}.weight" for path, m in layers.named_modules() if type(m).__name__ in ("Linear", "Conv1D")
    }
    for row in rows:
        if row.name in chosen:
            assert int((chosen[row.name] == 0).sum()) == round(0.3 * chosen[row.name].numel())
            assert row.sparsity == pytest.approx(0.3, abs=1 / chosen[row.name].numel())
            assert row.note.startswith("zeros: 30.0")
            assert (row.output_sqnr_db is None) == (not CRITERIA[criterion].needs & {"norms", "gram"})
        else:
            assert row.note.startswith("stays dense")
    after = model.network.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before if n not in chosen)
    if criterion != "sparsegpt":
        assert all(bool(((after[n] == before[n]) | (after[n] == 0)).all()) for n in chosen)
    assert all(not p.requires_grad for p in model.network.parameters())


@pytest.mark.parametrize("family", ["tiny_llama_folder", "tiny_gpt2_folder"])
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "magnitude"])
def test_two_of_four_lie_along_the_inputs_whichever_way_a_matrix_is_stored(
    family: str, criterion: str, request: pytest.FixtureRequest
) -> None:
    model = opened(request.getfixturevalue(family))
    prune_weights(model, PruneStage(pattern="2:4", criterion=criterion), BATCHES)
    for rows in pruned_matrices(model).values():
        assert bool(((rows.reshape(len(rows), -1, 4) == 0).sum(dim=2) == 2).all())


def test_wanda_takes_as_many_of_each_output_as_of_any_other(tiny_gpt2_folder: Path) -> None:
    model = opened(tiny_gpt2_folder)
    prune_weights(model, PruneStage(sparsity=0.5), BATCHES)
    for rows in pruned_matrices(model).values():
        assert set((rows == 0).sum(dim=1).tolist()) == {rows.shape[1] // 2}


def test_a_layer_is_judged_by_what_it_reads_of_the_layers_pruned_before_it(tiny_llama_folder: Path) -> None:
    model, dense = opened(tiny_llama_folder), opened(tiny_llama_folder)
    prune_weights(model, PruneStage(sparsity=0.5), BATCHES)
    name = "model.layers.1.mlp.down_proj"
    seen: list[Tensor] = []
    hook = model.network.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        for batch in BATCHES:
            model.network(**{n: torch.from_numpy(batch[n]) for n in ("input_ids", "attention_mask")})
    hook.remove()
    x = torch.cat([rows[torch.from_numpy(MASK).bool()] for rows in seen])
    weight = dense.network.get_submodule(name).weight
    expected = keep_mask(weight.abs() * x.square().mean(0).sqrt(), 0.5, "unstructured", "row")
    found = model.network.get_submodule(name).weight != 0
    assert float((found != expected).float().mean()) < 1e-3  # sums of another order


def test_making_up_for_zeros_keeps_outputs_nearer_than_choosing_them_alone(tiny_llama_folder: Path) -> None:
    errors: dict[str, float] = {}
    for criterion in ("wanda", "sparsegpt"):
        rows = prune_weights(opened(tiny_llama_folder), PruneStage(sparsity=0.5, criterion=criterion), BATCHES)
        errors[criterion] = float(np.mean([row.output_sqnr_db for row in rows if row.output_sqnr_db is not None]))
    assert errors["sparsegpt"] > errors["wanda"] + 0.7


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor"])
def test_one_threshold_over_all_matrices_is_exact_and_uneven(tiny_bert_folder: Path, criterion: str) -> None:
    model = opened(tiny_bert_folder)
    prune_weights(model, PruneStage(sparsity=0.4, criterion=criterion, scope="global"), BATCHES)
    found = pruned_matrices(model)
    total = sum(w.numel() for w in found.values())
    assert sum(int((w == 0).sum()) for w in found.values()) == round(0.4 * total)
    shares = [float((w == 0).float().mean()) for w in found.values()]
    assert max(shares) > min(shares) + 0.01


def test_one_threshold_that_empties_a_matrix_names_it_and_changes_nothing(tiny_llama_folder: Path) -> None:
    model = opened(tiny_llama_folder)
    with torch.no_grad():
        model.network.model.layers[1].mlp.up_proj.weight.mul_(1e-6)
    before = state(model)
    with pytest.raises(
        PruneError, match=r"layers\.1\.mlp\.up_proj\.weight: one threshold over all matrices leaves none"
    ):
        prune_weights(model, PruneStage(sparsity=0.5, criterion="magnitude", scope="global"), ())
    assert all(torch.equal(before[n], t) for n, t in model.network.state_dict().items())


def test_random_masks_are_the_seeds_and_differ_between_equal_shapes(tiny_llama_folder: Path) -> None:
    masks = []
    for seed in (1, 1, 2):
        model = opened(tiny_llama_folder)
        prune_weights(model, PruneStage(sparsity=0.5, criterion="random", seed=seed), ())
        masks.append({n: w == 0 for n, w in pruned_matrices(model).items()})
    one, same, other = masks
    name, twin = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], one[twin])


def test_given_sparsities_stand_in_place_of_the_stages(tiny_llama_folder: Path) -> None:
    model = opened(tiny_llama_folder)
    own = {"model.layers.0.mlp.up_proj.weight": 0.75, "model.layers.0.mlp.down_proj.weight": 0.0}
    rows = prune_weights(model, PruneStage(sparsity=0.5), BATCHES, sparsities=own)
    shares = {row.name: row.sparsity for row in rows if not row.note.startswith("stays dense")}
    assert shares.pop("model.layers.0.mlp.up_proj.weight") == 0.75
    assert shares.pop("model.layers.0.mlp.down_proj.weight") == 0.0
    assert set(shares.values()) == {0.5}
    with pytest.raises(PruneError, match=r"lm_head\.weight is given a sparsity, and is no matrix that is pruned here"):
        prune_weights(model, PruneStage(sparsity=0.5), BATCHES, sparsities={"lm_head.weight": 0.5})


def test_kept_matrices_stay_dense_and_say_so(tiny_llama_folder: Path) -> None:
    model = opened(tiny_llama_folder)
    rows = prune_weights(
        model, PruneStage(sparsity=0.5, criterion="magnitude", keep=("*.down_proj", "model.layers.?.self_attn.*")), ()
    )
    dense = {row.name.split(".")[-2] for row in rows if row.note.startswith("stays dense: keep")}
    assert dense == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    assert all(row.sparsity < 0.01 for row in rows if row.note.startswith("stays dense: keep"))
    with pytest.raises(
        PruneError, match=r"keep '\*\.down_prj' matches no matrix\. Known: .*model\.layers\.0\.mlp\.down_proj"
    ):
        prune_weights(model, PruneStage(sparsity=0.5, criterion="magnitude", keep=("*.down_prj",)), ())


def test_what_stays_dense_says_why(tiny_llama_folder: Path, tiny_bert_folder: Path) -> None:
    notes = {
        m.name: m.note for folder in (tiny_llama_folder, tiny_bert_folder) for m in matrices(opened(folder).network)
    }
    assert "embedding" in notes["model.embed_tokens.weight"]  # which is the output matrix too, and comes once
    assert "lm_head.weight" not in notes
    assert "outside of the repeated blocks" in notes["bert.pooler.dense.weight"]
    assert "outside of the repeated blocks" in notes["classifier.weight"]
    assert notes["bert.encoder.layer.1.output.dense.weight"] == ""


@pytest.mark.parametrize(
    ("settings", "batches", "message"),
    [
        ({"pattern": "3:7"}, BATCHES, r"model\.layers\.0\.self_attn\.q_proj\.weight \[64, 64\]: pattern 3:7 takes inputs by 7"),
        ({"pattern": "block-3x4", "sparsity": 0.5}, BATCHES, r"q_proj\.weight \[64, 64\]: blocks of 3 outputs and 4 inputs do not fit"),
        ({"sparsity": 0.9999}, BATCHES, r"k_proj\.weight \[32, 64\]: sparsity 0\.9999 leaves none of its 2048 weights|q_proj.*leaves none"),
        ({"sparsity": 0.5}, (), r"criterion wanda reads calibration texts, and there are none\. Set data\.splits\.calibration"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_changed(
    settings: dict[str, Any], batches: Any, message: str, tiny_llama_folder: Path
) -> None:
    model = opened(tiny_llama_folder)
    before = state(model)
    with pytest.raises(PruneError, match=message):
        prune_weights(model, PruneStage.model_validate(settings), batches)
    assert all(torch.equal(before[n], t) for n, t in model.network.state_dict().items())


def test_a_failure_on_the_way_puts_every_weight_back(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(tiny_llama_folder)
    before, calls = state(model), []

    def fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(*args)

    real = apply.sparsegpt
    monkeypatch.setattr(apply, "sparsegpt", fails)
    with pytest.raises(KeyboardInterrupt):
        prune_weights(model, PruneStage(sparsity=0.5, criterion="sparsegpt"), BATCHES)
    assert all(torch.equal(before[n], t) for n, t in model.network.state_dict().items())


def test_weights_that_are_no_numbers_are_named(tiny_llama_folder: Path) -> None:
    model = opened(tiny_llama_folder)
    with torch.no_grad():
        model.network.model.layers[0].mlp.up_proj.weight[0, :3] = float("nan")
    with pytest.raises(
        PruneError, match=r"1 tensors hold NaN or infinite weights: model\.layers\.0\.mlp\.up_proj\.weight \(3\)"
    ):
        prune_weights(model, PruneStage(sparsity=0.5, criterion="magnitude"), ())


def test_integers_are_refused_with_the_mend(tiny_llama_folder: Path) -> None:
    model = opened(tiny_llama_folder)
    weight = model.network.model.layers[0].mlp.up_proj.weight
    model.integers["model.layers.0.mlp.up_proj.weight"] = round_to_nearest(weight, None, unsigned=False)
    with pytest.raises(PruneError, match="is quantized: integers have no gradients.*Prune the float model"):
        prune_weights(model, PruneStage(sparsity=0.5, criterion="taylor"), BATCHES)


def test_a_row_of_zeros_and_an_input_that_is_always_zero_make_no_nan(tiny_llama_folder: Path) -> None:
    for criterion in ("wanda", "sparsegpt", "wanda-regional"):
        model = opened(tiny_llama_folder)
        with torch.no_grad():
            model.network.model.layers[0].mlp.gate_proj.weight[5] = 0
            model.network.model.layers[1].mlp.up_proj.weight[7] = 0
        prune_weights(model, PruneStage(sparsity=0.5, criterion=criterion), BATCHES)
        ids = torch.from_numpy(BATCHES[0]["input_ids"])
        with torch.no_grad():
            assert bool(model.network(input_ids=ids).logits.isfinite().all())


def test_gradients_without_a_loss_or_labels_are_refused_with_what_works(
    tiny_t5_folder: Path, tiny_bert_folder: Path
) -> None:
    with pytest.raises(PruneError, match="embeddings have no labels.*Use criterion magnitude or random or wanda"):
        prune_weights(opened(tiny_t5_folder), PruneStage(sparsity=0.5, criterion="taylor"), BATCHES)
    bare = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in BATCHES]
    with pytest.raises(PruneError, match="needs labels, and these texts have none"):
        prune_weights(opened(tiny_bert_folder), PruneStage(sparsity=0.5, criterion="movement"), bare)


@pytest.mark.parametrize("family", ["tiny_llama_folder", "tiny_bert_folder"])
def test_gradients_are_those_of_each_text_by_itself(family: str, request: pytest.FixtureRequest) -> None:
    """Mean, and root of the mean square, against plain autograd over texts without their padding."""
    model = opened(request.getfixturevalue(family))
    name = next(iter(pruned_matrices(model)))
    weight = dict(model.network.named_parameters())[name]
    mean = loss_gradients(model, BATCHES, {name: weight}, squares=False).mean(name)
    root = loss_gradients(model, BATCHES, {name: weight}, squares=True).mean(name)
    each = []
    weight.requires_grad_(True)
    for batch in BATCHES:
        for n in range(3):
            length = int(MASK[n].sum())
            ids = torch.from_numpy(batch["input_ids"][n : n + 1, :length])
            label = ids if model.task == "causal-lm" else torch.from_numpy(batch["labels"][n : n + 1])
            loss = model.network(input_ids=ids, labels=label).loss
            each.append(torch.autograd.grad(loss, weight)[0])
    stacked = torch.stack(each)
    assert torch.allclose(mean, stacked.mean(0), rtol=1e-3, atol=1e-6)
    assert torch.allclose(root, stacked.square().mean(0).sqrt(), rtol=1e-3, atol=1e-6)


def test_regional_gradients_are_of_the_norm_of_what_the_block_puts_out(tiny_llama_folder: Path) -> None:
    """The first matrix of the first block, which nothing was pruned before."""
    model = opened(tiny_llama_folder)
    layer = model.network.model.layers[0]
    weight = layer.self_attn.q_proj.weight
    dense = weight.detach().clone()
    squares, energy, tokens = torch.zeros_like(weight), torch.zeros(64), 0
    weight.requires_grad_(True)
    outs: list[Tensor] = []
    reads: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: outs.append(out if isinstance(out, Tensor) else out[0])),
        layer.self_attn.q_proj.register_forward_pre_hook(lambda _, x: reads.append(x[0])),
    ]
    for text in single(BATCHES):
        model.network(input_ids=torch.from_numpy(text["input_ids"]))
        count = text["input_ids"].size
        squares += (torch.autograd.grad(outs[-1].norm(), weight)[0] / count**0.5).square()
        energy += reads[-1].detach()[0].square().sum(0)
        tokens += count
    for hook in hooks:
        hook.remove()
    weight.requires_grad_(False)
    score = (100 * (squares / 6).sqrt() + (energy / tokens).sqrt()) * dense.abs()
    prune_weights(model, PruneStage(sparsity=0.5, criterion="wanda-regional"), BATCHES)
    expected = keep_mask(score, 0.5, "unstructured", "row")
    assert float(((weight != 0) != expected).float().mean()) < 1e-3


class Own(nn.Module):
    """Blocks of one's own, each with a layer that no text ever reaches; or an LSTM and no blocks."""

    def __init__(self, *, recurrent: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        if recurrent:
            self.lstm = nn.LSTM(16, 16, batch_first=True)
        else:
            self.layers = nn.ModuleList(Step() for _ in range(2))
        self.lm_head = nn.Linear(16, 50)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        if hasattr(self, "lstm"):
            x = self.lstm(x)[0]
        else:
            for layer in self.layers:
                x = layer(x)
        return self.lm_head(x)


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.tanh(self.used(hidden_states))


def own(*, recurrent: bool) -> Model:
    torch.manual_seed(0)
    network = Own(recurrent=recurrent).eval().requires_grad_(False)
    return Model(network, None, "causal-lm", "own", {}, factory="own:net")


def test_a_matrix_that_no_text_reaches_is_named() -> None:
    with pytest.raises(
        PruneError, match=r"do not reach layers\.0\.spare\.weight and 1 others, so its weights cannot be ranked"
    ):
        prune_weights(own(recurrent=False), PruneStage(sparsity=0.5), [{"input_ids": BATCHES[0]["input_ids"] % 50}])


def test_a_network_without_blocks_loses_weights_by_magnitude_and_says_so_otherwise() -> None:
    model = own(recurrent=True)
    rows = prune_weights(model, PruneStage(sparsity=0.5, criterion="magnitude"), ())
    assert {r.name: r.sparsity for r in rows} == {
        "table.weight": 0, "lstm.weight_ih_l0": 0.5, "lstm.weight_hh_l0": 0.5, "lm_head.weight": 0,
    }  # fmt: skip
    with pytest.raises(PruneError, match="Own has no repeated blocks .* criterion: magnitude"):
        prune_weights(own(recurrent=True), PruneStage(sparsity=0.5), [{"input_ids": BATCHES[0]["input_ids"] % 50}])
