"""The network that learns: the teacher's own layers, heads and neurons, a trained model from elsewhere, or a new one from a config."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from squeeze.distillation.importance import block_influence, head_importance, neuron_importance
from squeeze.errors import TrainError, nearest
from squeeze.masks import carried
from squeeze.narrowing import (
    best_heads,
    best_neurons,
    build,
    changed,
    keep_heads,
    keep_layers,
    keep_neurons,
    without_parts,
)
from squeeze.parts import attentions, config_of, feed_forwards, own_layers

if TYPE_CHECKING:
    from torch import Tensor

    from squeeze.distillation.losses import Loss
    from squeeze.distillation.settings import StudentSettings
    from squeeze.model import Model

PROBES = (
    "The quick brown fox jumps over the lazy dog.", " two  spaces,\ttab\nand newline ", "naïve café, Straße, 東京, Привет, 🙂",
    "WON'T stop: 12345.678 e-mail@x.org",
)  # fmt: skip
"""Texts on which two tokenizers with one vocabulary would differ: case, spaces, accents, scripts, digits."""
FIXED = ("model_type", "architectures", "auto_map", "transformers_version", "is_encoder_decoder", "dtype")
"""Names in a config.json that say what the network is, not how large."""


def needs_texts(settings: "StudentSettings") -> bool:
    """Whether make_student measures on texts what it keeps."""
    chosen = isinstance(settings.layers, int) and settings.choose == "importance"
    return chosen or settings.heads is not None or settings.neurons is not None


def make_student(
    settings: "StudentSettings", model: "Model", batches: "Sequence[Mapping[str, Tensor]]" = ()
) -> "tuple[Model, tuple[str, ...]]":
    """The student as a Model, and notes on what was chosen and by which figures. `model` is left as it is.

    `batches` hold some training texts as the network reads them ([texts, length] each; other keys are passed over): what importance is
    measured on. Where the settings say nothing, the student's network is the model's own, not a copy.

    Raises TrainError for more than there is, for what the architecture cannot do without, and for texts that are missing; ModelError
    for a path that does not load.
    """
    if settings.path is not None:
        return _found(settings.path, model)
    if settings.config is not None:
        return _new(settings.config, model)
    if needs_texts(settings) and not batches:
        raise TrainError("what the student keeps is measured on texts, and there are none. Set data.splits.train.")
    inputs = [{name: batch[name] for name in model.text_inputs if name in batch} for batch in batches]
    network: Any = model.network
    notes: list[str] = []
    if settings.layers is not None:
        count = len(own_layers(network)[1])
        if isinstance(settings.layers, tuple):
            kept = settings.layers
        elif settings.choose == "importance":
            influence = block_influence(network, inputs)
            kept = strongest(influence, settings.layers, pinned(network))
            listed = ", ".join(f"{n}: {value:.3g}" for n, value in enumerate(influence))
            notes.append(f"block influence of layers, 1 − cos(in, out): {listed}")
        else:
            kept = {"spread": spread, "first": first, "last": last}[settings.choose](settings.layers, count)
        network = keep_layers(network, kept)
        notes.insert(0, f"the student keeps layers {', '.join(map(str, kept))} of {count}")
    if settings.heads is not None:
        before = attentions(network)[0]
        scores = head_importance(network, inputs)
        heads = best_heads(network, scores, settings.heads)
        network = keep_heads(network, heads)
        after = attentions(network)[0]
        notes.append(
            f"each layer keeps {after.heads} of {before.heads} heads and {after.shared} of {before.shared} key-value heads, "
            f"{_share(scores, heads)} of what the heads add; by layer: {_listed(heads)}"
        )
    if settings.neurons is not None:
        have = feed_forwards(network)[0].neurons
        scores = neuron_importance(network, inputs)
        neurons = best_neurons(network, scores, settings.neurons)
        network = keep_neurons(network, neurons)
        notes.append(
            f"each layer keeps {settings.neurons} of {have} feed-forward neurons, {_share(scores, neurons)} of what they add"
        )
    if network is model.network:
        notes.append("the student is the model as the stage gets it")
        return dataclasses.replace(model, integers={}, half=None, artifact=None, activations="float"), tuple(notes)
    return _as_student(model, network), tuple(notes)


def _as_student(model: "Model", network: Any) -> "Model":
    return dataclasses.replace(
        model, network=network, config=network.config.to_dict(), integers={}, half=None, artifact=None, activations="float",
        pruned=carried(network, model),
    )  # fmt: skip


def _found(path: str, model: "Model") -> "tuple[Model, tuple[str, ...]]":
    from squeeze.model import ModelSettings, load_model

    found = load_model(ModelSettings(path=path), model.task)
    student = dataclasses.replace(found, integers={}, half=None, artifact=None, activations="float")
    return student, (f"the student is {path}", *found.notes)


def _new(values: Mapping[str, Any], model: "Model") -> "tuple[Model, tuple[str, ...]]":
    """A network of the model's class with random weights, the token embedding's too: half a trained network taught nothing but its seam."""
    config = config_of(model.network)
    described = config.to_dict()
    known = {*described, *getattr(config, "attribute_map", {})}
    for name in values:
        if name in FIXED:
            raise TrainError(
                f"student.config: {name} says which network it is, and that stays. Name a model of another kind as student.path."
            )
        if name not in known:
            raise TrainError(f"student.config: {config.model_type} has no {name!r}. {nearest(name, known - {*FIXED})}")
    own = {str(config.attribute_map.get(name, name)): value for name, value in values.items()}
    network = build(type(model.network), changed(config, own, [n for n in derived(config) if n not in own]))
    without_parts(model.network, network)
    rows = network.get_input_embeddings().weight.shape[0]
    if model.tokenizer is not None and len(model.tokenizer) > rows:
        raise TrainError(
            f"student.config: vocab_size = {rows}, and the model's tokenizer, which the student shares, has {len(model.tokenizer)} tokens."
        )
    told = ", ".join(f"{name} = {value}" for name, value in values.items()) or "the model's own values"
    return _as_student(model, network), (f"the student starts from random weights, with {told}",)


def derived(config: Any) -> tuple[str, ...]:
    """Names in a config that its class computes from others, as its head size from width and heads: a new width brings a new one."""
    from dataclasses import MISSING, fields

    described = config.to_dict()
    found = []
    for field in fields(type(config)):
        open_ended = field.default is None or field.default is MISSING
        if open_ended and described.get(field.name) is not None:
            try:
                again = changed(config, {}, [field.name]).to_dict().get(field.name)
            except TrainError:
                continue
            if again == described[field.name]:
                found.append(field.name)
    return tuple(found)


# Which layers


def spread(kept: int, count: int) -> tuple[int, ...]:
    """`kept` of `count` layers, evenly spread from the first on (DistilBERT's every other one: arXiv:1910.01108, section 3)."""
    _check_count(kept, count)
    return tuple(round(n * count / kept) for n in range(kept))


def first(kept: int, count: int) -> tuple[int, ...]:
    """The first `kept` of `count` layers."""
    _check_count(kept, count)
    return tuple(range(kept))


def last(kept: int, count: int) -> tuple[int, ...]:
    """The last `kept` of `count` layers."""
    _check_count(kept, count)
    return tuple(range(count - kept, count))


def strongest(influence: Sequence[float], kept: int, always: Sequence[int] = ()) -> tuple[int, ...]:
    """The `kept` layers of highest influence, in their order; those in `always` first, and of equals the earlier."""
    _check_count(kept, len(influence))
    ranked = sorted(range(len(influence)), key=lambda n: (n not in always, -influence[n], n))
    return tuple(sorted(ranked[:kept]))


def pinned(network: Any) -> tuple[int, ...]:
    """The first layer, where it lacks weights that the others have (ModernBERT's has no first norm): no other can stand there."""
    layers = own_layers(network)[1]
    lacks = len(layers) > 1 and not layers[0].state_dict().keys() >= layers[1].state_dict().keys()
    return (0,) if lacks else ()


def _check_count(kept: int, count: int) -> None:
    if kept > count:
        raise TrainError(f"the student asks for {kept} layers, the model has {count}.")


# Whether student and teacher go together


def check_pair(student: "Model", teacher: "Model", losses: "Sequence[Loss]") -> None:
    """Raises TrainError where the teacher's answers mean something else to the student: other classes, or other tokens.

    Another tokenizer is allowed where every loss compares whole texts; a language model's answers are about tokens, whatever the loss.
    """
    ours, theirs = classes(student), classes(teacher)
    if student.task == "text-classification" and ours is not None and theirs is not None:
        if len(ours) != len(theirs):
            raise TrainError(
                f"the student ({student.source}) has {len(ours)} classes, the teacher ({teacher.source}) {len(theirs)}. Name a student "
                "with the teacher's classes, or start from student.config, which makes the head anew."
            )
        if ours != theirs and _named(ours) and _named(theirs):
            raise TrainError(
                f"the student's classes are {', '.join(ours)}, the teacher's {', '.join(theirs)}, in that order. Name a student with the "
                "teacher's classes."
            )
    if same_tokenizer(student.tokenizer, teacher.tokenizer):
        return
    bound = [loss.summary for loss in losses if not loss.any_tokenizer]
    if student.task == "causal-lm" or bound:
        what = "the next token" if student.task == "causal-lm" else " and ".join(bound)
        raise TrainError(
            f"student ({student.source}) and teacher ({teacher.source}) cut texts into different tokens, and the losses compare {what} "
            "token by token. Name a student with the teacher's tokenizer"
            + (
                "."
                if student.task == "causal-lm"
                else ", or only losses that compare whole texts (kl, mse, labels, embedding)."
            )
        )


def classes(model: "Model") -> tuple[str, ...] | None:
    """The names of the classes in the order of the head's scores; None for a network without a config."""
    names = model.config.get("id2label")
    return None if not names else tuple(str(names[key]) for key in sorted(names, key=int))


def _named(names: Sequence[str]) -> bool:
    """Whether they are more than the LABEL_0, LABEL_1 that Transformers fills in."""
    return any(name != f"LABEL_{number}" for number, name in enumerate(names))


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether both cut every text into the same numbers: one vocabulary, and one answer to texts that would tell them apart."""
    if one is None or other is None:
        return one is other
    if one is other:
        return True
    if one.get_vocab() != other.get_vocab():
        return False
    return all(one(text)["input_ids"] == other(text)["input_ids"] for text in PROBES)


# What is said of it


def shrink_notes(student: "Model", teacher: "Model") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Notes on the size of the student beside its teacher's, and warnings where it is the larger one."""
    ours, theirs = student.parameters, teacher.parameters
    notes = (f"parameters: {ours:,} in the student, {theirs:,} in the teacher ({ours / theirs:.1%})",)
    if ours <= theirs:
        return notes, ()
    warning = (
        f"the student is larger than its teacher ({ours:,} parameters, {theirs:,} in the teacher): it can only lose time and memory by "
        "the exchange. Name a smaller student, or train the teacher itself further."
    )
    return notes, (warning,)


def zeros_notes(model: "Model", student: "Model") -> tuple[str, ...]:
    """What becomes of the zeros of a pruned model, or of a student that comes pruned."""
    if student.pruned:
        zeros = sum(one.zeros for one in student.pruned.values())
        return (f"{zeros:,} weights of {len(student.pruned)} pruned matrices stay zero",)
    return (f"none of the model's {len(model.pruned)} pruned matrices is part of the student",) if model.pruned else ()


def _share(scores: "Sequence[Tensor]", kept: Sequence[Sequence[int]]) -> str:
    whole = float(torch.stack([each.sum() for each in scores]).sum())
    stays = sum(float(each[list(numbers)].sum()) for each, numbers in zip(scores, kept, strict=True))
    return f"{stays / max(whole, 1e-30):.0%}"


def _listed(kept: Sequence[Sequence[int]]) -> str:
    return "; ".join(",".join(map(str, numbers)) for numbers in kept)
