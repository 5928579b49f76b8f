"""What matrices read, against what a hook sees; and which matrices there are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from squeeze.errors import PruneError
from squeeze.model import Model, load_model
from squeeze.pruning.gradients import loss_gradients
from squeeze.pruning.settings import PruneStage
from squeeze.pruning.statistics import hidden_weights, layers_of, places, readings, statistics

RNG = np.random.default_rng(0)


def texts(padded: bool) -> list[dict[str, np.ndarray]]:
    found = []
    for _ in range(2):
        ids, mask = RNG.integers(4, 200, (3, 24)), np.ones((3, 24), np.int64)
        mask[-1, 16 if padded else 24 :] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    return found


PADDED, WHOLE = texts(True), texts(False)


def test_places_are_named_by_layer_and_part(tiny_gpt2_folder: Path) -> None:
    model = load_model(tiny_gpt2_folder)
    found = places(model.network, ["transformer.h.1.mlp.*"])
    assert [(place.layer, place.part) for place in found] == [
        (0, "attn.c_attn"), (0, "attn.c_proj"), (0, "mlp.c_fc"), (0, "mlp.c_proj"), (1, "attn.c_attn"), (1, "attn.c_proj"),
    ]  # fmt: skip
    assert {layer: len(members) for layer, members in layers_of(model.network, found).items()} == {
        "transformer.h.0": 4, "transformer.h.1": 2,
    }  # fmt: skip
    assert found[0].module is model.network.get_submodule("transformer.h.0.attn.c_attn")


def test_statistics_are_those_of_what_each_matrix_reads_without_padding(tiny_bert_folder: Path) -> None:
    model = load_model(tiny_bert_folder)
    seen = statistics(model, PADDED, places(model.network), PruneStage(sparsity=0.5, criterion="sparsegpt"))
    for name in ("bert.encoder.layer.0.attention.self.value", "bert.encoder.layer.1.output.dense"):
        read: list[Tensor] = []
        hook = model.network.get_submodule(name).register_forward_pre_hook(
            lambda _, args, read=read: read.append(args[0])
        )
        with torch.no_grad():
            for batch in PADDED:
                model.network(**{key: torch.from_numpy(array) for key, array in batch.items()})
        hook.remove()
        masks = [torch.from_numpy(batch["attention_mask"]).bool() for batch in PADDED]
        rows = torch.cat([x[mask] for x, mask in zip(read, masks, strict=True)])
        assert len(rows) == 2 * (2 * 24 + 16)
        found = seen[f"{name}.weight"]
        assert torch.allclose(found.norms, rows.square().mean(0).sqrt(), rtol=1e-4)
        assert torch.allclose(found.gram, rows.T @ rows / len(rows), rtol=1e-3, atol=1e-4)
    layer = "bert.encoder.layer.0.attention.self"
    assert seen[f"{layer}.query.weight"].gram is seen[f"{layer}.value.weight"].gram, "one tensor, one Gram matrix"
    assert not any(module._forward_pre_hooks for module in model.network.modules())


def test_gradients_come_as_outputs_and_inputs(tiny_gpt2_folder: Path) -> None:
    model = load_model(tiny_gpt2_folder)
    found = places(model.network)
    seen = statistics(model, WHOLE, found, PruneStage(sparsity=0.5, criterion="movement"))
    weights = {place.name: place.matrix.weight for place in found}
    expected = loss_gradients(model, WHOLE, weights, squares=False).mean(found[0].name)
    assert expected.shape == found[0].matrix.weight.shape == (64, 192)
    assert torch.equal(seen[found[0].name].gradient, expected.T)
    with pytest.raises(PruneError, match="wanda-regional needs each block's own gradients"):
        statistics(model, WHOLE, found, PruneStage(sparsity=0.5, criterion="wanda-regional"))


def test_two_places_draw_different_numbers_and_a_seed_the_same(tiny_gpt2_folder: Path) -> None:
    model = load_model(tiny_gpt2_folder)
    found = places(model.network)
    drawn = [
        [torch.rand(3, generator=seen.generator) for seen in statistics(model, (), found, stage).values()]
        for stage in (PruneStage(sparsity=0.5, criterion="random", seed=seed) for seed in (0, 0, 1))
    ]
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(drawn[0], drawn[2], strict=True))
    assert len({tuple(one.tolist()) for one in drawn[0]}) == len(found)


@pytest.mark.parametrize("folder", ["tiny_gpt2_folder", "tiny_llama_folder"])
def test_weights_are_hidden_as_outputs_and_inputs_and_come_back(folder: str, request: pytest.FixtureRequest) -> None:
    model = load_model(request.getfixturevalue(folder))
    place = places(model.network)[0]
    before, mask = place.matrix.weight.clone(), torch.ones(place.matrix.shape, dtype=torch.bool)
    mask[1, 2] = False
    with pytest.raises(KeyboardInterrupt), hidden_weights({place: mask}):
        assert (place.matrix.weight == 0).nonzero().tolist() == [[2, 1] if folder == "tiny_gpt2_folder" else [1, 2]]
        raise KeyboardInterrupt
    assert torch.equal(place.matrix.weight, before)


def test_what_is_not_finite_or_not_read_is_named(tiny_bert_folder: Path) -> None:
    class Recurrent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(200, 16)
            self.lstm = torch.nn.LSTM(16, 16, batch_first=True)
            self.lm_head = torch.nn.Linear(16, 200)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.lm_head(self.lstm(self.embedding(input_ids))[0])

    own = Model(Recurrent().eval().requires_grad_(False), None, "causal-lm", "own", {}, factory="tests:own")
    found = places(own.network)
    assert [(place.name, place.layer) for place in found] == [("lstm.weight_ih_l0", None), ("lstm.weight_hh_l0", None)]
    with pytest.raises(
        PruneError, match=r"what lstm.weight_ih_l0 reads of the calibration texts is not known. Keep it"
    ):
        readings(own, WHOLE, found, with_gram=False)
    model = load_model(tiny_bert_folder)
    found = places(model.network)
    model.network.bert.encoder.layer[0].output.LayerNorm.bias[0] = torch.inf
    with pytest.raises(
        PruneError, match=r"the inputs of bert.encoder.layer.1.attention.self.query.weight are not finite"
    ):
        readings(model, PADDED, found, with_gram=False)
