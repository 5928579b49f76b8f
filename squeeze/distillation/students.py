"""The network that learns: made from the teacher by keeping some of its layers, or found elsewhere."""

import copy
from typing import TYPE_CHECKING, Any, cast

from squeeze.errors import TrainError

if TYPE_CHECKING:
    from torch import nn

    from squeeze.distillation.settings import StudentSettings
    from squeeze.model import Model

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What config.json calls the number of layers, by family."""


def make_student(settings: "StudentSettings", model: "Model") -> "tuple[Model, tuple[str, ...]]":
    """The student as a Model of its own, and notes on what was chosen. `model` is left as it is.

    Raises TrainError for more layers than there are, and for a network whose layers are not found.
    """
    import dataclasses

    if settings.layers is None:
        raise TrainError("this student is not supported yet")
    count = len(blocks(model.network)[1])
    kept = settings.layers if isinstance(settings.layers, tuple) else spread(settings.layers, count)
    network: Any = keep_layers(model.network, kept)
    student = dataclasses.replace(
        model, network=network, config=network.config.to_dict(), integers={}, half=None, artifact=None
    )
    return student, (f"the student keeps layers {', '.join(map(str, kept))} of {count}",)


def blocks(network: "nn.Module") -> "tuple[str, nn.ModuleList]":
    """Path and list of the network's layers: the longest nn.ModuleList. Raises TrainError where there is none."""
    from torch import nn

    found = [
        (path, module)
        for path, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    if not found:
        raise TrainError("the network has no list of layers that some could be kept of. Give student.path instead.")
    return max(found, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def spread(kept: int, count: int) -> tuple[int, ...]:
    """`kept` of `count` layers, evenly spread from the first on (DistilBERT's every other one: arXiv:1910.01108, section 3)."""
    if kept > count:
        raise TrainError(f"the student asks for {kept} layers, the model has {count}.")
    return tuple(round(n * count / kept) for n in range(kept))


def keep_layers(network: "nn.Module", kept: tuple[int, ...]) -> "nn.Module":
    """A copy of `network` with those layers alone, in that order; its config counts them."""
    path, layers = blocks(network)
    if max(kept) >= len(layers):
        raise TrainError(
            f"layer {max(kept)} is asked for, and the model has {len(layers)}, from 0 to {len(layers) - 1}."
        )
    result = copy.deepcopy(network)
    found = result.get_submodule(path)
    from torch import nn

    parent, _, name = path.rpartition(".")
    remaining = nn.ModuleList([found[n] for n in kept])  # type: ignore[index]
    setattr(result.get_submodule(parent), name, remaining)
    for name in COUNTS:
        if hasattr(result.config, name):
            setattr(result.config, name, len(kept))
    for number, layer in enumerate(remaining):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                cast("Any", module).layer_idx = number
    return result
