"""The static cost card: what an artifact must do for a token, counted from its configuration before anything is measured.

Counting follows Kaplan et al. (2020, arXiv:2001.08361, section 2.1): two operations for each weight that a token is multiplied
with, and for attention two products of 2·d operations for each pair of tokens and layer. Embedding tables are looked up, not
multiplied; an output matrix is multiplied even where it is tied to one.
"""

from typing import Any

from squeeze.artifact import Artifact
from squeeze.report.schema import Cost
from squeeze.tasks import layer_count

HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
"""The usual name, then GPT-2's, T5's and DistilBERT's."""


def cost(artifact: Artifact) -> Cost:
    """The card of one artifact; figures that its configuration does not tell are None."""
    manifest, config = artifact.manifest, artifact.config
    hidden, layers = _named(config, HIDDEN), layer_count(config)
    vocabulary = config.get("vocab_size")
    known = hidden is not None and layers is not None and isinstance(vocabulary, int) and manifest.parameters > 0
    decodes = manifest.task == "causal-lm"
    tables = _tables(config) if known else 0
    # A tied output matrix is one set of parameters that is both looked up and multiplied with.
    tied = decodes and bool(config.get("tie_word_embeddings", True))
    looked_up = tables - (int(vocabulary or 0) * int(hidden or 0) if tied else 0) if known else 0
    multiplied = manifest.parameters - looked_up
    bytes_each = manifest.weight_bytes / manifest.parameters if manifest.parameters else 0.0
    return Cost(
        artifact=artifact.name, artifact_digest=artifact.digest, parameters=manifest.parameters,
        weight_bytes=manifest.weight_bytes,
        read_bytes=round(multiplied * bytes_each) if known else None,
        operations_per_token=2.0 * multiplied if known else None,
        operations_per_pair=4.0 * _attention_width(config) * int(layers or 0) if known else None,
        cache_bytes_per_token=_cache(config, artifact) if known and decodes else None,
        arithmetic="int8" if is_integer(artifact) else "float32",
    )  # fmt: skip


def is_integer(artifact: Artifact) -> bool:
    """Whether its weights are integers: less than two bytes a parameter."""
    manifest = artifact.manifest
    return manifest.parameters > 0 and manifest.weight_bytes < 2 * manifest.parameters


def _tables(config: dict[str, Any]) -> int:
    """Parameters of all embedding tables."""
    hidden = int(config.get("embedding_size") or _named(config, HIDDEN) or 0)
    rows = int(config["vocab_size"]) + int(config.get("type_vocab_size") or 0)
    if config.get("model_type") in ("bert", "roberta", "gpt2", "distilbert", "xlm-roberta", "electra", "mpnet"):
        rows += int(config.get("max_position_embeddings") or config.get("n_positions") or 0)
    return rows * hidden


def _cache(config: dict[str, Any], artifact: Artifact) -> float:
    """Bytes of keys and values that a token leaves: four for each number in float32, one where the export keeps them as int8."""
    heads = _named(config, HEADS) or 1
    groups = int(config.get("num_key_value_heads") or heads)
    width = int(config.get("head_dim") or (_named(config, HIDDEN) or 0) // heads)
    record = artifact.manifest.record
    each = 1 if record is not None and record.settings.get("kv_cache") == "int8" else 4
    return 2.0 * each * (layer_count(config) or 0) * groups * width


def _attention_width(config: dict[str, Any]) -> int:
    """Numbers in the queries of one token, all heads together: T5's need not be as many as its states have."""
    each = config.get("d_kv")
    return each * (_named(config, HEADS) or 1) if isinstance(each, int) else _named(config, HIDDEN) or 0


def _named(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of these settings that is there: families spell them apart."""
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)
