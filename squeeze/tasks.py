"""What each task needs: the Transformers class with its head, the metric it is judged by, and which models can do it.

A model is only ever opened for a task that its checkpoint was trained for. Transformers would fill a head that is not
in the checkpoint with random numbers and say so in a log line; here that is an error before any weight is read, because
a compressed random head benchmarks beautifully. What config.json cannot tell (a checkpoint that names the right class
and lacks its weights) is found when the weights are loaded.

Rejected: asking Transformers' own AutoModel tables first. They say what a class *could* be built for (BERT is among the
causal language models there), not what this checkpoint was trained for; `architectures` in config.json does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from squeeze.errors import ModelError, nearest

# fmt: off
AFTER_PADDING = frozenset([
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
])
# fmt: on
"""Model types that number positions from after the padding token's row, as RoBERTa does, so that those rows of the table are
never read: 514 rows, 512 positions. By name, because nothing else in config.json tells."""


@dataclass(frozen=True)
class Task:
    """One thing a language model does, and what it is judged by."""

    name: str
    head: str
    """What comes out of the network, with its shape."""
    metric: str
    output: str
    """What the network's answer is called, in Transformers and in the exported graph."""
    auto_class: str
    """Class in `transformers` that opens trunk and head."""
    endings: tuple[str, ...]
    """How the class names end whose checkpoints hold this head; empty: any trunk will do."""
    table: str
    """Table in `transformers` of the model types that know the task; asked where config.json names no class."""


def infer_task(config: Mapping[str, Any]) -> str:
    """The task that the checkpoint was trained for, from the class named in its config.json; ModelError without one.

    An encoder without a head, or with the masked-language head it was pretrained with, gives embeddings. So does the encoder
    of an encoder-decoder without a head; one that was trained to generate must be asked for them by name.
    """
    architecture = _architecture(config)
    if architecture is None:
        raise ModelError(f"config.json names no architecture, so no task either. Give the task: {', '.join(TASKS)}.")
    for task in TASKS.values():
        if architecture.endswith(task.endings or ("Model", "ForMaskedLM", "ForPreTraining")):
            return task.name
    if config.get("is_encoder_decoder"):
        raise ModelError(_encoder_only(architecture))
    raise ModelError(f"{architecture} is for none of the tasks {', '.join(TASKS)}. Give a checkpoint made for one.")


def check_task(config: Mapping[str, Any], task: str) -> None:
    """ModelError where the checkpoint that `config` (its config.json) describes cannot do `task`; says what it can."""
    if task not in TASKS:
        raise ModelError(f"task {task!r} is unknown. {nearest(task, TASKS)}")
    wanted = TASKS[task]
    architecture = _architecture(config)
    if "auto_map" not in config:
        _check_known(config, architecture)
    if config.get("is_encoder_decoder"):
        # Code of the checkpoint's own may know its encoder alone, but no table says by which class.
        if task != "feature-extraction" or "auto_map" in config or config.get("model_type") not in _encoder_types():
            raise ModelError(_encoder_only(architecture or str(config.get("model_type"))))
    elif architecture is None:
        _check_model_type(config, wanted)
    elif wanted.endings and not architecture.endswith(wanted.endings):
        raise ModelError(
            f"{architecture} has no trained head for {task}; a random one would be measured as if it meant something. "
            f"{_own_task(config)}For {task} give a checkpoint of a class that ends in {' or '.join(wanted.endings)}."
        )
    elif not wanted.endings and architecture.endswith(TASKS["causal-lm"].endings):
        raise ModelError(
            f"{architecture} was trained to predict the next token; the mean of its states is no trained embedding. "
            f"{_own_task(config)}For {task} give an encoder."
        )


def auto_class(config: Any, task: str) -> Any:
    """The class in `transformers` that opens the checkpoint of a Transformers config for `task`; of an encoder-decoder, the encoder.

    T5's encoder, once saved, no longer says in its config that it was half of something. So the tables are asked: where the one
    for text encoders has another class than the one for trunks, that class is the encoder alone.
    """
    import transformers

    encoder = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    trunk = transformers.MODEL_MAPPING.get(type(config), None)
    alone = task == "feature-extraction" and encoder not in (None, trunk) and not hasattr(config, "auto_map")
    return getattr(transformers, "AutoModelForTextEncoding" if alone else TASKS[task].auto_class)


def positions(config: Mapping[str, Any]) -> int | None:
    """Longest sequence that the position table in a config.json allows, in tokens; None where there is no table."""
    value = config.get("max_position_embeddings", config.get("n_positions"))
    if not isinstance(value, int):
        return None
    padding = config.get("pad_token_id")
    return value - padding - 1 if config.get("model_type") in AFTER_PADDING and isinstance(padding, int) else value


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Number of layers in a config.json, by the usual name, GPT-2's, T5's or DistilBERT's; None where it does not tell."""
    names = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _architecture(config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list | tuple) and names else None


def _own_task(config: Mapping[str, Any]) -> str:
    try:
        return f"Its own task is {infer_task(config)}. "
    except ModelError:
        return ""


def _encoder_types() -> list[str]:
    """Model types of the encoder-decoders whose encoder Transformers opens alone."""
    import transformers

    return sorted(kind.model_type for kind in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING if kind().is_encoder_decoder)


def _encoder_only(name: str) -> str:
    return (
        f"{name} is an encoder-decoder. Text-to-text generation is not supported yet: squeeze opens the encoder alone, with the "
        f"task feature-extraction, and that of the model types {', '.join(_encoder_types())}."
    )


def _check_known(config: Mapping[str, Any], architecture: str | None) -> None:
    """A network that this Transformers lacks can still come as an own module."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{architecture or 'config.json'}: transformers {version('transformers')} knows no model type "
            f"{model_type!r}. Install a newer one, or give the network as package.module:factory: quantize, export, "
            "verify and bench take any torch.nn.Module, though without a key-value cache."
        )


def _check_model_type(config: Mapping[str, Any], task: Task) -> None:
    """A config.json that names no class (a hand-made one): does the model type know the task at all?"""
    import transformers

    model_type = str(config["model_type"])
    if transformers.CONFIG_MAPPING[model_type] not in getattr(transformers, task.table):
        raise ModelError(
            f"model type {model_type!r} cannot do {task.name}. "
            "Name the checkpoint's class under architectures in config.json."
        )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="causal-lm",
            head="scores of the next token, [batch, length, vocabulary]",
            metric="perplexity",
            output="logits",
            auto_class="AutoModelForCausalLM",
            endings=("ForCausalLM", "LMHeadModel"),
            table="MODEL_FOR_CAUSAL_LM_MAPPING",
        ),
        Task(
            name="text-classification",
            head="scores of the classes, [batch, classes]",
            metric="accuracy",
            output="logits",
            auto_class="AutoModelForSequenceClassification",
            endings=("ForSequenceClassification",),
            table="MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
        ),
        Task(
            name="feature-extraction",
            head="states of the last layer, [batch, length, width]; their mean over the text is the embedding",
            metric="cosine to the source's embedding",
            output="last_hidden_state",
            auto_class="AutoModel",
            endings=(),
            table="MODEL_MAPPING",
        ),
    )
}
