"""LSTMs in torch: which can be integers, and that the loop over time is the LSTM."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from squeeze.compress.layers import weights
from squeeze.errors import ModelError
from squeeze.recurrent import kernel_groups, layer_by_layer, loop_over_time, simulate, why_float

GRU = "kept in float: ONNX Runtime has no integer kernel for GRU, only for LSTM"


class OwnForward(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(2 * input, hx)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.GRU(8, 8), GRU),
        (nn.RNN(8, 8), GRU.replace("GRU", "RNN")),
        (nn.LSTM(8, 8, proj_size=4), "no projection"),
        (OwnForward(8, 8), "OwnForward has a forward() of its own"),
        (torch.nn.utils.parametrizations.weight_norm(nn.LSTM(8, 8), "weight_hh_l0"), "computes its matrices"),
    ],
)
def test_what_the_kernel_cannot_compute_stays_in_float_and_says_why(module: nn.RNNBase, reason: str) -> None:
    assert reason in why_float(module)
    assert kernel_groups(module) == []


def test_the_table_of_layers_has_the_reason() -> None:
    network = nn.ModuleDict({"gru": nn.GRU(64, 64), "embedding": nn.Embedding(100, 64)})
    reasons = {name: reason for name, _, _, reason in weights(network)}
    assert reasons == {"gru.weight_ih_l0": GRU, "gru.weight_hh_l0": GRU, "embedding.weight": ""}


def test_matrices_of_one_layer_belong_together_and_a_tied_one_has_one_name() -> None:
    network = nn.ModuleDict({"a": nn.LSTM(8, 8, 2, bidirectional=True), "gru": nn.GRU(8, 8), "b": nn.LSTM(8, 8)})
    network["b"].weight_ih_l0 = network["a"].weight_ih_l0
    both = [
        tuple(f"a.weight_{kind}_l{layer}{end}" for end in ("", "_reverse") for kind in ("ih", "hh")) for layer in (0, 1)
    ]
    assert kernel_groups(network) == [*both, ("a.weight_ih_l0", "b.weight_hh_l0")]


@pytest.mark.parametrize("form", [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False, "num_layers": 3}])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("rows", [(), (4,)], ids=["single", "batch"])
@pytest.mark.parametrize("given", [False, True])
def test_without_rounding_the_loop_is_the_lstm(
    form: dict[str, Any], batch_first: bool, rows: tuple[int, ...], given: bool
) -> None:
    torch.manual_seed(0)
    module = nn.LSTM(12, 20, batch_first=batch_first, **form).eval().requires_grad_(False)
    x = torch.randn(*rows, 9, 12) if batch_first else torch.randn(9, *rows, 12)
    count = module.num_layers * (2 if module.bidirectional else 1)
    hx = (torch.randn(count, *rows, 20), torch.randn(count, *rows, 20)) if given else None
    y, states = module(x, hx)
    found, after = layer_by_layer(module, partial(loop_over_time, module, frozenset()), x, hx)
    for one, other in ((found, y), *zip(after, states, strict=True)):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-6)


def test_only_layers_that_are_integers_are_simulated() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2, 8)
    module = nn.LSTM(8, 8, 2).eval().requires_grad_(False)
    exact = module(x)[0]
    assert not simulate(module, "lstm", {"other.weight_ih_l0"}, {})
    assert torch.equal(module(x)[0], exact)
    errors = []
    for layers in ({"first"}, {"first", "lstm.weight_ih_l1"}):
        simulate(module, "lstm", layers, {"lstm.weight_ih_l0": "first"})
        errors.append(float((module(x)[0] - exact).norm() / exact.norm()))
    assert 1e-4 < errors[0] < errors[1] < 0.1


def test_a_packed_sequence_is_refused_instead_of_left_unrounded() -> None:
    module = nn.LSTM(8, 8).eval().requires_grad_(False)
    simulate(module, "lstm", {"lstm.weight_ih_l0"}, {})
    with pytest.raises(ModelError, match="packed sequences through LSTM. Give it padded ones."):
        module(nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 8), torch.tensor([5, 3])))
