"""What the layers, heads and neurons of a network do for some texts, so that those that do least can go.

Each is measured by what it adds to the hidden states, in one pass without labels or gradients, so that the same measure serves every
task and texts of all kinds. Rejected for heads: the gradient of the loss (Michel et al. 2019, arXiv:1905.10650). It needs labels, or a
loss that a trained network has already brought near its minimum, where gradients are mostly noise, and a backward pass's memory.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from squeeze.errors import TrainError
from squeeze.narrowing import cacheless
from squeeze.parts import Attention, attentions, feed_forwards, own_layers

Batches = Sequence[Mapping[str, Tensor]]
"""Inputs of the network, [texts, length] each; padding (attention_mask 0) does not count."""


def block_influence(network: nn.Module, batches: Batches) -> tuple[float, ...]:
    """How far each layer turns the hidden states: mean over tokens of 1 − cos(in, out), in [0, 2].

    ShortGPT's block influence (Men et al. 2024, arXiv:2403.03853, eq. 1).
    """
    _, layers = own_layers(network)
    sums = [0.0] * len(layers)

    def watch(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            read = args[0] if args else kwargs["hidden_states"]
            wrote = out if isinstance(out, Tensor) else out[0]
            cosines = functional.cosine_similarity(_rows(read, run), _rows(wrote, run), dim=-1)
            sums[number] += float((1 - cosines).double().sum())

        return hook

    run = _Run()
    hooks = [layer.register_forward_hook(watch(n), with_kwargs=True) for n, layer in enumerate(layers)]
    tokens = _through(network, batches, run, hooks)
    return tuple(value / tokens for value in sums)


def head_importance(
    network: nn.Module, batches: Batches, sites: Sequence[Attention] | None = None
) -> tuple[Tensor, ...]:
    """Mean norm of what each head adds to the hidden states, E‖A_h V_h W_O,h‖₂ over tokens: float64 [heads] for each layer."""
    sites = attentions(network) if sites is None else sites
    grams = []
    for site in sites:
        weight: Tensor = network.get_submodule(site.output).weight.detach().double()  # type: ignore[operator]
        columns = weight.T.reshape(site.heads, site.size, -1)
        grams.append(columns @ columns.transpose(1, 2))  # ‖x W‖² = x (W Wᵀ) xᵀ: one head's size squared, not the width

    def norms(number: int, rows: Tensor) -> Tensor:
        per_head = rows.double().reshape(len(rows), sites[number].heads, -1).transpose(0, 1)
        return ((per_head @ grams[number]) * per_head).sum(-1).clamp(min=0).sqrt().sum(1)

    return _measured(network, batches, [site.output for site in sites], norms)


def neuron_importance(network: nn.Module, batches: Batches) -> tuple[Tensor, ...]:
    """Mean norm of what each feed-forward neuron adds to the hidden states, E|a_j| ‖W_out,j‖₂ over tokens: float64 [neurons] for each
    layer. (Minitron, arXiv:2407.14679, section 2.2, ranks by activations alone; the outgoing weights say what becomes of them.)"""
    sites = feed_forwards(network)
    outgoing = []
    for site in sites:
        reader = network.get_submodule(site.reader)
        weight: Tensor = reader.weight.detach().double()  # type: ignore[operator]
        outgoing.append(weight.norm(dim=0 if isinstance(reader, nn.Linear) else 1))
    return _measured(
        network,
        batches,
        [site.reader for site in sites],
        lambda number, rows: rows.double().abs().sum(0) * outgoing[number],
    )


class _Run:
    """The batch that is going through the network."""

    mask: Tensor | None = None


def _rows(states: Tensor, run: _Run) -> Tensor:
    """The states that are not padding, [tokens, width]."""
    if run.mask is not None and states.shape[:-1] == run.mask.shape:
        return states[run.mask]
    return states.reshape(-1, states.shape[-1])


def _measured(
    network: nn.Module, batches: Batches, names: Sequence[str], score: Callable[[int, Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """Mean over tokens of `score(number, what matrix `number` reads)`, on the CPU."""
    sums: list[Tensor | float] = [0.0] * len(names)
    run = _Run()

    def watch(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[number] = sums[number] + score(number, _rows(args[0], run))

        return hook

    hooks = [network.get_submodule(name).register_forward_pre_hook(watch(n)) for n, name in enumerate(names)]
    tokens = _through(network, batches, run, hooks)
    return tuple(torch.as_tensor(value).cpu() / tokens for value in sums)


def _through(network: nn.Module, batches: Batches, run: _Run, hooks: Sequence[Any]) -> int:
    """Run all batches, then take the hooks away; the number of tokens that were no padding."""
    tokens = 0
    device = next(network.parameters()).device
    trunk: Any = getattr(
        network, "base_model", network
    )  # without the head: a decoder's scores take more room than all else
    try:
        with torch.no_grad():
            for batch in batches:
                inputs = {name: tensor.to(device) for name, tensor in batch.items()}
                mask = inputs.get("attention_mask")
                run.mask = None if mask is None else mask.bool()
                tokens += inputs["input_ids"].numel() if run.mask is None else int(run.mask.sum())
                trunk(**inputs, **cacheless(trunk))
    finally:
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise TrainError("importance is measured on texts, and there are none. Set data.splits.train.")
    return tokens
