"""From a Model to a folder that plain ONNX Runtime loads: model.onnx, tokenizer, config.

Two ways in (onnxruntime-genai's model builder, and torch's dynamo exporter), one graph language (onnx-ir), and small passes
that each say what they changed. Integers are copied from the model, never computed here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from squeeze.errors import ExportError
from squeeze.runtimes import MODEL_FILE

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from squeeze.kv_cache import CacheScales
    from squeeze.model import Model

DATA_FILE = "model.onnx.data"
EXTERNAL_FROM = 100_000_000
"""Weights beyond this many bytes go to a file of their own, which the runtime maps instead of parsing a second copy.
Protobuf's own limit, 2 GB, lies far above."""


class ExportSettings(BaseModel):
    """How the ONNX graph is made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    opset: Literal[23] = Field(default=23, description="ONNX operator set; 23 is the first that keeps attention whole")
    graph: Literal["auto", "genai", "dynamo"] = Field(
        default="auto",
        description="onnxruntime-genai's builder where it knows the architecture, else torch's dynamo exporter",
    )
    source: bool = Field(
        default=True, description="export the source as well, so that before and after run in one runtime"
    )
    kv_cache: Literal["float32", "int8"] = Field(
        default="float32",
        description="how a decoder keeps keys and values between tokens; int8 needs onnxruntime-genai's graph and calibration texts",
    )
    kv_scales: Literal["channel", "tensor"] | None = Field(
        default=None,
        description="what shares a scale of an int8 cache: a channel of a head, or all keys (values) of a layer; none: channel",
    )

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        if self.kv_scales is not None and self.kv_cache == "float32":
            raise ValueError(
                "kv_scales says how an int8 cache is scaled, and the cache is float32. Set kv_cache: int8, or drop it."
            )
        return self

    @property
    def needs_data(self) -> bool:
        """Whether the export reads calibration texts."""
        return self.kv_cache == "int8"


def export_onnx(
    model: "Model", folder: Path, settings: ExportSettings | None = None, texts: "Sequence[Mapping[str, NDArray[np.int64]]]" = ()
) -> tuple[str, ...]:  # fmt: skip
    """Write `model` as ONNX into the existing, empty `folder`; return notes on what the graph passes did.

    `texts` are calibration batches, for an int8 cache.

    Raises ExportError where the architecture cannot be exported, or where an integer weight finds no place in the graph.
    """
    from squeeze.compress.layers import refuse_nonfinite
    from squeeze.exporter import attention, cache, genai, half, passes, placement, trace
    from squeeze.silence import without_silent

    settings = settings or ExportSettings()
    refuse_nonfinite(model.network)
    model, left_out = without_silent(model)
    if settings.graph == "genai" and not genai.knows(model):
        raise ExportError(
            f"onnxruntime-genai's builder does not know {genai.architecture(model)}. Use export.graph: dynamo or auto."
        )
    by_builder = is_by_builder(model, settings)
    scales = _cache_scales(model, settings, texts, by_builder)
    with genai.built(model, folder) if by_builder else trace.traced(model, settings.opset) as graph:
        notes = ["graph by onnxruntime-genai's model builder" if by_builder else "graph by torch's dynamo exporter"]
        notes += left_out
        passes.clear_metadata(graph)
        if not by_builder:
            notes += attention.attention_on_rows(graph)
            notes += attention.first_token_only(graph)
        places, said = placement.place_integers(graph, model.integers, model.activations)
        notes += said
        if scales is not None:
            notes += cache.int8_cache(graph, scales)
        passes.standard_norms(graph)
        notes += passes.plain_norms(graph)
        notes += passes.share_transposed(graph)
        passes.remove_unused(graph)
        notes += half.halve(graph, model.half)
        passes.remove_unused(graph)
        passes.raise_opset(graph, settings.opset)
        passes.name_provenance(graph, model, places)
        save_graph(graph, folder)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    if model.factory is None:
        model.network.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
    return tuple(notes)


def is_by_builder(model: "Model", settings: ExportSettings) -> bool:
    """Whether onnxruntime-genai's builder makes the graph, and not torch's exporter."""
    from squeeze.exporter import genai

    return settings.graph == "genai" or (settings.graph == "auto" and genai.knows(model))


def _cache_scales(
    model: "Model", settings: ExportSettings, texts: "Sequence[Mapping[str, NDArray[np.int64]]]", by_builder: bool
) -> "CacheScales | None":
    """Scales of an int8 cache, measured on the network as the export computes it; None for a float cache."""
    from squeeze.kv_cache import calibrated
    from squeeze.simulation import simulation

    if settings.kv_cache == "float32":
        return None
    if not by_builder:
        raise ExportError(
            f"an int8 cache needs GroupQueryAttention, which only onnxruntime-genai's builder writes, and this is the graph of "
            f"{type(model.network).__name__} by torch's exporter. Drop kv_cache, or use export.graph: auto with a decoder it knows."
        )
    return calibrated(simulation(model), texts, settings.kv_scales or "channel")


def save_graph(graph: "ir.Model", folder: Path) -> None:
    """Write model.onnx, with model.onnx.data beside it where the weights are large."""
    import onnx_ir as ir

    size = sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value is not None)
    external = DATA_FILE if size > EXTERNAL_FROM else None
    if external is None:
        ir.external_data.load_to_model(graph)
    ir.save(graph, folder / MODEL_FILE, external_data=external, size_threshold_bytes=1024)


__all__ = ["DATA_FILE", "MODEL_FILE", "ExportSettings", "export_onnx", "is_by_builder", "save_graph"]
