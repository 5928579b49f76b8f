"""What an export computes, in torch: the network of a quantized artifact with the inputs of its integer layers rounded too.

`verify` holds an export against this, and the torch runtime measures it, so that a quality figure is the same method's
wherever it is read.
"""

import copy
from functools import partial

from torch import nn

from squeeze.integers import block_int8, dynamic_uint8
from squeeze.model import Model, aliases


def simulation(model: Model) -> nn.Module:
    """The artifact's network as its export computes: a copy that rounds activations, or the network itself if none are."""
    if model.activations == "float":
        return model.network
    twin = copy.copy(model)
    twin.network = copy.deepcopy(model.network)
    simulate_activations(twin)
    return twin.network


def simulate_activations(model: Model) -> None:
    """Make the network round the inputs of its integer layers as the exported graph does; for a model that only runs.

    Not for one that is exported or saved: the hooks are part of the module until it is dropped.
    """
    if model.activations == "float":
        return
    shared = aliases(model.network)
    for path, module in model.network.named_modules():
        name = f"{path}.weight"
        weight = model.integers.get(shared.get(name, name))
        if weight is None or isinstance(module, nn.Embedding):
            continue
        size = weight.block_size
        rounded = dynamic_uint8 if size is None else partial(block_int8, block_size=size)
        module.register_forward_pre_hook(lambda _module, inputs, rounded=rounded: (rounded(inputs[0]), *inputs[1:]))
