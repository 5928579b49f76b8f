"""The static cost card: what an artifact must do for a token, counted from its configuration before anything is measured.

Counting follows Kaplan et al. (2020, arXiv:2001.08361, section 2.1): two operations for each weight that a token is multiplied
with, and for attention two products of 2·d operations for each pair of tokens and layer. Embedding tables are looked up, not
multiplied; an output matrix is multiplied even where it is tied to one.
"""

from typing import Any

from squeeze.artifact import Artifact
from squeeze.report.schema import Cost


def cost(artifact: Artifact) -> Cost:
    """The card of one artifact; figures that its configuration does not tell are None."""
    manifest, config = artifact.manifest, artifact.config
    hidden, layers = (
        config.get("hidden_size") or config.get("n_embd"),
        config.get("num_hidden_layers") or config.get("n_layer"),
    )
    vocabulary = config.get("vocab_size")
    known = (
        isinstance(hidden, int) and isinstance(layers, int) and isinstance(vocabulary, int) and manifest.parameters > 0
    )
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
        operations_per_pair=4.0 * int(hidden or 0) * int(layers or 0) if known else None,
        cache_bytes_per_token=_cache(config, artifact) if known and decodes else None,
        arithmetic="int8" if is_integer(artifact) else "float32",
    )  # fmt: skip


def is_integer(artifact: Artifact) -> bool:
    """Whether its weights are integers: less than two bytes a parameter."""
    manifest = artifact.manifest
    return manifest.parameters > 0 and manifest.weight_bytes < 2 * manifest.parameters


def _tables(config: dict[str, Any]) -> int:
    """Parameters of all embedding tables."""
    hidden = int(config.get("embedding_size") or config.get("hidden_size") or config["n_embd"])
    rows = int(config["vocab_size"]) + int(config.get("type_vocab_size") or 0)
    if config.get("model_type") in ("bert", "roberta", "gpt2", "distilbert", "xlm-roberta", "electra", "mpnet"):
        rows += int(config.get("max_position_embeddings") or config.get("n_positions") or 0)
    return rows * hidden


def _cache(config: dict[str, Any], artifact: Artifact) -> float:
    """Bytes of keys and values that a token leaves: four for each number in float32, one where the export keeps them as int8."""
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    groups = int(config.get("num_key_value_heads") or heads)
    width = int(config.get("head_dim") or int(config.get("hidden_size") or config["n_embd"]) // heads)
    layers = int(config.get("num_hidden_layers") or config["n_layer"])
    record = artifact.manifest.record
    each = 1 if record is not None and record.settings.get("kv_cache") == "int8" else 4
    return 2.0 * each * layers * groups * width
