"""From a Model to a folder that plain ONNX Runtime loads: model.onnx, tokenizer, config.

Two ways in (onnxruntime-genai's model builder, and torch's dynamo exporter), one graph language (onnx-ir), and small passes
that each say what they changed. Integers are copied from the model, never computed here.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from squeeze.errors import ExportError
from squeeze.runtimes import MODEL_FILE

if TYPE_CHECKING:
    import onnx_ir as ir

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


def export_onnx(model: "Model", folder: Path, settings: ExportSettings | None = None) -> tuple[str, ...]:
    """Write `model` as ONNX into the existing, empty `folder`; return notes on what the graph passes did.

    Raises ExportError where the architecture cannot be exported, or where an integer weight finds no place in the graph.
    """
    from squeeze.compress.layers import refuse_nonfinite
    from squeeze.exporter import attention, genai, half, passes, placement, trace

    settings = settings or ExportSettings()
    refuse_nonfinite(model.network)
    if settings.graph == "genai" and not genai.knows(model):
        raise ExportError(
            f"onnxruntime-genai's builder does not know {genai.architecture(model)}. Use export.graph: dynamo or auto."
        )
    by_builder = is_by_builder(model, settings)
    with genai.built(model, folder) if by_builder else trace.traced(model, settings.opset) as graph:
        notes = ["graph by onnxruntime-genai's model builder" if by_builder else "graph by torch's dynamo exporter"]
        passes.clear_metadata(graph)
        if not by_builder:
            notes += attention.attention_on_rows(graph)
            notes += attention.first_token_only(graph)
        places, said = placement.place_integers(graph, model.integers, model.activations)
        notes += said
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


def save_graph(graph: "ir.Model", folder: Path) -> None:
    """Write model.onnx, with model.onnx.data beside it where the weights are large."""
    import onnx_ir as ir

    size = sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value is not None)
    external = DATA_FILE if size > EXTERNAL_FROM else None
    if external is None:
        ir.external_data.load_to_model(graph)
    ir.save(graph, folder / MODEL_FILE, external_data=external, size_threshold_bytes=1024)


__all__ = ["DATA_FILE", "MODEL_FILE", "ExportSettings", "export_onnx", "is_by_builder", "save_graph"]
