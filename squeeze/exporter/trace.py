"""The dynamo path: any network that torch.export can follow, decoders with a key-value cache as plain inputs and outputs.

Rejected: the TorchScript exporter (deprecated, fixes shapes by accident), and optimum's per-architecture config classes,
which are what leaves a new architecture without an export.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from squeeze.errors import ExportError
from squeeze.exporter.passes import rotate_every_text
from squeeze.exporter.recurrent_ops import whole_layers
from squeeze.exporter.traced_before import graph_of
from squeeze.model import answer
from squeeze.tasks import TASKS

if TYPE_CHECKING:
    import onnx_ir as ir

    from squeeze.model import Model

BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past_sequence", "total_sequence"


class CachedDecoder(nn.Module):
    """logits, then keys and values of every layer: the cache as a flat list of [batch, heads, time, head size]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.network(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        present = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (out.logits, *present)


class TextModel(nn.Module):
    """The task's one answer from text inputs: logits, or the last hidden state."""

    def __init__(self, model: "Model") -> None:
        super().__init__()
        self.network, self.names, self.task = model.network, model.text_inputs, model.task

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.network(**dict(zip(self.names, inputs, strict=True)))
        return answer(out, self.task)


@contextmanager
def traced(model: "Model", opset: int) -> Iterator["ir.Model"]:
    """The graph of `model` in float32, with batch and sequence (and cache length) as named, free axes."""
    has_cache = model.task == "causal-lm" and model.factory is None
    try:
        graph = _trace_decoder(model, opset) if has_cache else _trace_text_model(model, opset)
        rotate_every_text(graph)
        yield graph
    except torch.onnx.errors.OnnxExporterError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(
            f"torch cannot export {model.source} to ONNX: {reason} Try another torch version, or simplify forward()."
        ) from error


def _trace_text_model(model: "Model", opset: int) -> "ir.Model":
    names = model.text_inputs
    example = {
        "input_ids": torch.arange(2, 16).view(2, 7),
        "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
        "token_type_ids": torch.zeros(2, 7, dtype=torch.int64),
    }
    axes = {0: torch.export.Dim(BATCH), 1: torch.export.Dim(SEQUENCE)}
    graph = _export(
        TextModel(model), tuple(example[n] for n in names), list(names), [TASKS[model.task].output],
        {"inputs": tuple(dict(axes) for _ in names)}, opset,
    )  # fmt: skip
    _name_axes(
        graph, [[BATCH, SEQUENCE]] * len(names), [[BATCH] if model.task == "text-classification" else [BATCH, SEQUENCE]]
    )
    return graph


def _trace_decoder(model: "Model", opset: int) -> "ir.Model":
    shapes = cache_shapes(model.network)
    batch, steps, past_steps = 2, 3, 5
    ids = torch.arange(2, 2 + batch * steps).view(batch, steps)
    mask = torch.ones(batch, past_steps + steps, dtype=torch.int64)
    past = [torch.randn(batch, heads, past_steps, size) for heads, size in shapes]
    dim = torch.export.Dim
    axes = (
        {0: dim(BATCH), 1: dim(SEQUENCE)},
        {0: dim(BATCH), 1: dim.AUTO},
        [{0: dim(BATCH), 2: dim(PAST)} for _ in past],
    )
    part = ("key", "value")
    inputs = ["input_ids", "attention_mask"] + [f"past_key_values.{i // 2}.{part[i % 2]}" for i in range(len(past))]
    outputs = ["logits"] + [f"present.{i // 2}.{part[i % 2]}" for i in range(len(past))]
    graph = _export(CachedDecoder(model.network), (ids, mask, past), inputs, outputs, axes, opset)
    cache_in = [[BATCH, heads, PAST, size] for heads, size in shapes]
    cache_out = [[BATCH, heads, TOTAL, size] for heads, size in shapes]
    _name_axes(graph, [[BATCH, SEQUENCE], [BATCH, TOTAL], *cache_in], [[BATCH, SEQUENCE], *cache_out])
    return graph


def cache_shapes(network: nn.Module) -> list[tuple[int, int]]:
    """(heads, head size) of each layer's keys and values in turn, read from one real call rather than from config names."""
    with torch.no_grad():
        cache = network(input_ids=torch.tensor([[2]]), use_cache=True).past_key_values
    if cache is None or not hasattr(cache, "layers"):
        raise ExportError(
            f"{type(network).__name__} gives no key-value cache; squeeze cannot export it for generation."
        )
    return [(t.shape[1], t.shape[3]) for layer in cache.layers for t in (layer.keys, layer.values)]


def _export(
    network: nn.Module, example: tuple[Any, ...], inputs: list[str], outputs: list[str], axes: Any, opset: int
) -> "ir.Model":
    """The graph of `network`, constants folded; another of the same architecture is not traced again."""

    def trace() -> "ir.Model":
        with torch.no_grad(), whole_layers(network) as operators:
            program = torch.onnx.export(
                network.eval(), example, dynamo=True, opset_version=opset, dynamic_shapes=axes, optimize=False,
                input_names=inputs, output_names=outputs, verbose=False, custom_translation_table=operators,
            )  # fmt: skip
        if program is None:
            raise ExportError("torch.onnx.export returned no graph.")
        return program.model

    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            asked = [
                inputs,
                outputs,
                repr(axes),
                opset,
                [list(t.shape) for t in torch.utils._pytree.tree_leaves(example)],
            ]
            program = torch.onnx.ONNXProgram(graph_of(network, asked, trace), None)
            program.optimize()
    finally:
        log.setLevel(level)
    return program.model


def _name_axes(graph: "ir.Model", inputs: list[list[Any]], outputs: list[list[Any]]) -> None:
    """Give every free axis its name; a shape beyond the listed axes (the vocabulary, say) stays as traced."""
    import onnx_ir as ir

    for value, axes in [*zip(graph.graph.inputs, inputs, strict=True), *zip(graph.graph.outputs, outputs, strict=True)]:
        if value.shape is not None:
            value.shape = ir.Shape([*axes, *list(value.shape)[len(axes) :]])
