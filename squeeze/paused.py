"""A module that is run once and waits before each group of its layers, until these have been changed.

Going through a network layer by layer, what a layer reads depends on what was done to the layers before it. Running the block anew for
every group computes its first layers once for each of them; here each batch's run is a coroutine that stops where a group reads, lends out
what it reads, and goes on with the group's new weights. greenlet, because a pause deep inside a model's own forward cannot be
written with generators, and a thread for each batch would bring a pool of compute threads each.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from squeeze.hooks import hooked


class Paused(greenlet):
    """One call that stops before each group of layers. Nothing runs before it is asked for."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(call)
        self.group, self.due = -1, 0
        self.inputs: Tensor | None = None
        self.out: object = None

    def until(self, group: int) -> Tensor | None:
        """What group `group` is about to read, [..., in]; None where this run goes by it. Groups before it are not waited for."""
        while self.group < group and not self.dead:
            self.due = group
            self.out = self.switch()
        return self.inputs if self.group == group else None

    def result(self, groups: int) -> object:
        """What the call returns, once all of its `groups` have been changed."""
        self.until(groups)
        return self.out

    def wait(self, group: int, module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
        """Stop, and go on when the group was changed: with its new weights, and what new hooks make of its inputs."""
        if group <= self.group or group < self.due:
            return inputs
        known = set(module._forward_pre_hooks)
        self.group, self.inputs = group, inputs[0]  # type: ignore[assignment]
        self.parent.switch()  # type: ignore[union-attr]
        self.inputs = None
        for key, hook in module._forward_pre_hooks.items():  # the call has listed its hooks before those came
            if key not in known and (changed := hook(module, inputs)) is not None:
                inputs = changed if isinstance(changed, tuple) else (changed,)
        return inputs


@contextmanager
def paused(calls: Iterable[Callable[[], object]], firsts: Sequence[nn.Module]) -> Iterator[list[Paused]]:
    """The calls, each to stop before `firsts`, the first module of each group, in this order. Those not ended are given up at the end."""

    def before(group: int, module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
        current = getcurrent()
        return current.wait(group, module, inputs) if isinstance(current, Paused) else inputs

    hooks = [
        module.register_forward_pre_hook(partial(before, group), prepend=True) for group, module in enumerate(firsts)
    ]
    runs = [Paused(call) for call in calls]
    with hooked(hooks):
        try:
            yield runs
        finally:
            for run in runs:
                run.throw()
