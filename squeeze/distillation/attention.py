"""What the attention of a network computes on the way: its maps, and its queries, keys and values."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from squeeze.errors import TrainError

if TYPE_CHECKING:
    from torch import Tensor, nn

ROLES = ("queries", "keys", "values")
NAMES = (
    ("query", "key", "value"),  # BERT, RoBERTa, ELECTRA, ALBERT
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("q_proj", "k_proj", "v_proj"),  # OPT, Llama, Qwen, Gemma, Mistral
    ("q", "k", "v"),  # MPNet, T5
)
"""What the three projections of an attention module are called, by family."""
FUSED = "c_attn"
"""GPT-2's one projection for all three, side by side in its output."""
DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout_rate")
"""What config.json calls the dropout of attention maps, by family."""


@contextmanager
def eager(network: "nn.Module") -> Iterator[None]:
    """For the time being, attention that gives its maps: fused kernels never hold them.

    Raises TrainError for a network in training with attention dropout: its maps have holes then, that no teacher has.
    """
    whole: Any = network
    config = getattr(network, "config", None)
    if config is None:
        raise TrainError(
            f"{type(network).__name__} is not from transformers, and gives no attention maps. Drop the loss attention."
        )
    if network.training and any(float(getattr(config, name, None) or 0) > 0 for name in DROPOUTS):
        raise TrainError(
            "the loss attention compares attention maps, and dropout makes holes in them. Set dropout to false, or use relations."
        )
    before = config._attn_implementation
    if before in (None, "eager"):
        yield
        return
    whole.set_attn_implementation("eager")
    try:
        yield
    finally:
        whole.set_attn_implementation(before)


@contextmanager
def relations(
    network: "nn.Module", layers: Collection[int]
) -> "Iterator[Callable[[], dict[int, tuple[Tensor, Tensor, Tensor]]]]":
    """While it is open, what the projections to queries, keys and values give is noted; call what it gives after a forward pass.

    Layers count in the order of the calls from 1, so that a layer that is called several times (ALBERT) is several. Each is [b, n,
    width] as it leaves its projection: before rotary positions, before norms (Qwen3) and scales (OPT). With grouped-query attention
    keys and values are narrower than queries.
    """
    counts = [0, 0, 0]
    noted: dict[int, dict[int, Tensor]] = {layer: {} for layer in layers}

    def note(role: int, out: "Tensor") -> None:
        counts[role] += 1
        if counts[role] in noted:
            noted[counts[role]][role] = out

    def hook_of(role: int) -> "Callable[[nn.Module, Any, Tensor], None]":
        return lambda module, args, out: note(role, out)

    def note_fused(module: "nn.Module", args: Any, out: "Tensor") -> None:
        for role, part in enumerate(out.chunk(3, dim=-1)):
            note(role, part)

    hooks = []
    for module in network.modules():
        children = dict(module.named_children())
        for names in NAMES:
            if all(name in children for name in names):
                hooks += [children[name].register_forward_hook(hook_of(role)) for role, name in enumerate(names)]
        fused: Any = children.get(FUSED)
        if fused is not None and getattr(fused, "nf", None) == 3 * getattr(fused, "nx", 0):
            hooks.append(fused.register_forward_hook(note_fused))
    if not hooks:
        raise TrainError(
            f"the queries, keys and values of {type(network).__name__} are not found: no module has "
            f"{', '.join('/'.join(names) for names in NAMES)} or GPT-2's {FUSED}. Use hidden or attention in place of relations."
        )

    def take() -> "dict[int, tuple[Tensor, Tensor, Tensor]]":
        if len(set(counts)) > 1 or any(layer > counts[0] or layer < 1 for layer in noted):
            seen = ", ".join(f"{role} {count} times" for role, count in zip(ROLES, counts, strict=True))
            raise TrainError(
                f"relations of layers {sorted(noted)} are asked for, and {type(network).__name__} projects {seen}."
            )
        return {layer: (parts[0], parts[1], parts[2]) for layer, parts in noted.items()}

    try:
        yield take
    finally:
        for hook in hooks:
            hook.remove()
