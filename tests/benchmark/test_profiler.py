"""A profile worked by hand: warm-up left out, time by operator and layer."""

import pytest

from squeeze.benchmark.profiler import layer_of, rows


def event(node: str, start: float, microseconds: float, operator: str) -> dict[str, object]:
    return {
        "cat": "Node",
        "name": f"{node}_kernel_time",
        "ts": start,
        "dur": microseconds,
        "args": {"op_name": operator},
    }


def test_time_is_summed_by_operator_and_layer_without_the_warm_up() -> None:
    layers = {"q": "layer.0.attention", "k": "layer.0.attention", "up": "layer.0.mlp"}
    events: list[dict[str, object]] = [{"cat": "Session", "name": "model_run", "ts": 0, "dur": 9999}]
    for call in range(4):  # of which the first two are warm-up
        slow = 1000 if call < 2 else 0
        for place, (node, cost, operator) in enumerate(
            [("q", 10, "MatMul"), ("k", 20, "MatMul"), ("fused", 5, "Gelu"), ("up", 40, "MatMul")]
        ):
            events.append(event(node, 100 * call + place, cost + slow, operator))
    found = rows(events, calls=2, skipped=0.5, layers=layers)
    assert [(row["operator"], row["layer"], row["count"]) for row in found] == [
        ("MatMul", "layer.0.mlp", 1), ("MatMul", "layer.0.attention", 2), ("Gelu", "layer.0.attention", 1),
    ]  # fmt: skip
    assert [row["seconds"] for row in found] == pytest.approx([40e-6, 30e-6, 5e-6])


@pytest.mark.parametrize(
    ("weight", "layer"),
    [
        ("network.bert.encoder.layer.0.attention.self.query.bias", "layer.0.attention"),
        ("model.layers.12.mlp.gate_proj.weight.integers", "layers.12.mlp"),
        ("network.bert.embeddings.word_embeddings.weight", "embeddings.word_embeddings"),
        ("network.classifier.bias", "classifier"),
        ("val_73", ""),
        ("cos_cache", ""),
    ],
)
def test_a_weights_name_tells_its_layer(weight: str, layer: str) -> None:
    assert layer_of(weight) == layer
