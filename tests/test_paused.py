"""Runs that wait before each group of layers: what they lend out, what they go on with, and that nothing of them stays."""

import pytest
import torch
from torch import Tensor, nn

from squeeze.paused import paused


class Two(nn.Module):
    """Two layers, the second of which a text may go by."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if x.shape[0] > 1 else x


@torch.no_grad()
def test_what_is_changed_while_a_run_waits_is_what_it_goes_on_with() -> None:
    net, x = Two(), torch.randn(2, 3)
    with paused([lambda: net(x)], [net.first, net.second]) as (run,):
        assert run.until(0) is x
        net.first.weight.copy_(2 * torch.eye(3))
        between = run.until(1)
        assert between is not None
        assert torch.equal(between, 2 * x)
        assert run.until(1) is between
        net.second.weight.copy_(torch.eye(3))
        assert torch.equal(run.result(2), 2 * x)


@torch.no_grad()
def test_a_hook_that_comes_while_the_run_waits_is_called_with_the_inputs() -> None:
    net, x = Two(), torch.randn(2, 3)
    net.first.weight.copy_(torch.eye(3))
    order: list[str] = []
    net.first.register_forward_pre_hook(lambda *_: order.append("old"))
    with paused([lambda: net(x)], [net.first, net.second]) as (run,):
        run.until(0)
        net.first.register_forward_pre_hook(lambda _, inputs: (order.append("new"), inputs[0] + 1)[1])
        assert torch.equal(run.until(1), x + 1)
    assert sorted(order) == ["new", "old"]


@torch.no_grad()
def test_a_run_that_goes_by_a_group_lends_nothing_and_ends() -> None:
    net, x = Two(), torch.randn(1, 3)
    with paused([lambda: net(x)], [net.first, net.second]) as (run,):
        assert run.until(1) is None
        assert torch.equal(run.result(2), net.first(x))


@torch.no_grad()
def test_groups_that_nobody_asks_for_are_not_waited_for() -> None:
    net, x = Two(), torch.randn(2, 3)
    with paused([lambda: net(x)], [net.first, net.second]) as (run,):
        assert torch.equal(run.until(1), net.first(x))
        assert run.until(0) is None


@torch.no_grad()
def test_runs_that_are_given_up_end_their_forward_and_leave_no_hook() -> None:
    ended: list[str] = []
    net, x = Two(), torch.randn(2, 3)

    def call() -> Tensor:
        try:
            return net(x)
        finally:
            ended.append("given up")

    with pytest.raises(ZeroDivisionError), paused([call, call], [net.first, net.second]) as runs:
        runs[0].until(1)
        _ = 1 / 0
    assert ended == ["given up"]  # the other one never began
    assert all(run.dead for run in runs if run.group >= 0)
    assert not net.first._forward_pre_hooks
    assert not net.second._forward_pre_hooks


@torch.no_grad()
def test_an_error_inside_a_run_reaches_whoever_asked() -> None:
    net = Two()
    with (
        paused([lambda: net(torch.randn(2, 4))], [net.first, net.second]) as (run,),
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
    ):
        run.until(1)
