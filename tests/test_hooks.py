"""Hooks last as long as they are meant to, and no longer."""

import pytest
import torch
from torch import nn

from squeeze.hooks import hooked


def test_hooks_run_while_it_lasts_and_are_gone_after_an_error() -> None:
    layer, seen = nn.Linear(2, 2), list[str]()
    before = layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    after = layer.register_forward_hook(lambda *_: seen.append("after"))
    with pytest.raises(ZeroDivisionError), hooked([before, after]):
        layer(torch.zeros(1, 2))
        _ = 1 / 0
    layer(torch.zeros(1, 2))
    assert seen == ["before", "after"]
