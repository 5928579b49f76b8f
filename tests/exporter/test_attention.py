"""Attention on rows and the first token only: the same answers from less work, and hands off what does not match exactly."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from squeeze.exporter import export_onnx, passes, trace
from squeeze.exporter.attention import attention_on_rows, first_token_only
from squeeze.model import load_model
from squeeze.verification import verify

LAYER = """
<ir_version: 10, opset_import: ["": 23]>
encoder (float[batch, tokens, 8] x, bool[batch, 1, tokens, tokens] mask) => (float[batch, 3] y)
<int64[4] split = {0, 0, 2, 4}, int64[4] split_kv = {0, 0, 2, 4}, int64[3] join = {0, 0, 8}, int64 zero = {0},
 int64[1] from = {0}, int64[1] to = {1}, int64[1] two = {2}, int64[1] axis = {1}, float half = {0.5},
 float[8] g, float[8] b, float[8, 8] wq, float[8] bq, float[8, 8] wk, float[8, 8] wv, float[8, 8] wo,
 float[16, 8] wi, float[16] bi, float[16, 8] wf, float[8, 3] wy,
 float[6, 8] by_place, float[1, 6, 8] by_token, float[1, 1, 8] one_row, float[1, 6, 6] mix, float[8, 16] wide>
{
  n = LayerNormalization <axis = -1> (x, g, b)
  q1 = MatMul(n, wq)
  q2 = Add(q1, bq)
  k2 = MatMul(n, wk)
  v2 = MatMul(n, wv)
  q3 = Reshape(q2, split)
  k3 = Reshape(k2, split_kv)
  v3 = Reshape(v2, split_kv)
  q = Transpose <perm = [0, 2, 1, 3]> (q3)
  k = Transpose <perm = [0, 2, 1, 3]> (k3)
  v = Transpose <perm = [0, 2, 1, 3]> (v3)
  a = Attention <scale = 0.7> (q, k, v, mask)
  a3 = Transpose <perm = [0, 2, 1, 3]> (a)
  a2 = Reshape(a3, join)
  o = MatMul(a2, wo)
  r = Add(o, n)
  m = LayerNormalization <axis = -1> (r, g, b)
  wit = Transpose <perm = [1, 0]> (wi)
  f1 = MatMul(m, wit)
  f2 = Add(f1, bi)
  f3 = Gelu(f2)
  f = MatMul(f3, wf)
  s = Sum(f, m)
  t = Mul(s, half)
  h = LayerNormalization <axis = -1> (t, g, b)
  c = Gather <axis = 1> (h, zero)
  y = MatMul(c, wy)
}
"""
"""One encoder layer and a classifier, as dynamo writes them. Weights are random; the tests change one detail at a time, and some
put one of the last constants to use."""
NARROWED = ("q1", "q2", "a2", "o", "r", "m", "f1", "f2", "f3", "f", "s", "t", "h")


def read(text: str) -> ir.Model:
    """The graph that `text` describes, weights drawn, and all shapes inferred."""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for info in proto.graph.value_info:
        dims = [d.dim_value for d in info.type.tensor_type.shape.dim]
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.standard_normal(dims).astype(np.float32), info.name)
        )
    del proto.graph.value_info[:]
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def changed(*changes: tuple[str, str]) -> str:
    """LAYER with each first text replaced by the second; every one has to be there."""
    text = LAYER
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


def answers(model: ir.Model, batch: int = 3, tokens: int = 6, *, reference: bool = False) -> np.ndarray:
    """`y`, for texts of which the last is padded; the graph must be valid, its shapes included."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    rng = np.random.default_rng(1)
    feeds = {"x": rng.standard_normal((batch, tokens, 8)).astype(np.float32)}
    for value in model.graph.inputs:
        if value.name == "mask":
            sizes = {"batch": batch, "tokens": tokens}
            feeds["mask"] = rng.random([sizes.get(str(size), size) for size in value.shape]) < 0.7
            feeds["mask"][..., 0] = True
            feeds["mask"][-1:, ..., tokens // 2 + 1 :] = False
    if reference:
        return ReferenceEvaluator(proto).run(["y"], feeds)[0]
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], feeds)[0]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def values(model: ir.Model) -> dict[str, ir.Value]:
    return {output.name: output for node in model.graph for output in node.outputs}


def on_rows(text: str = LAYER) -> ir.Model:
    model = read(text)
    assert attention_on_rows(model) != []
    return model


def test_attention_reads_and_writes_rows_and_answers_the_same() -> None:
    model = read(LAYER)
    before = answers(model)
    assert attention_on_rows(model) == ["1 attentions read and write rows of tokens, heads not transposed"]
    assert operators(model)["Reshape"] == 0
    assert operators(model)["Transpose"] == 1  # of a weight
    (attention,) = (node for node in model.graph if node.op_type == "Attention")
    assert [v.name for v in attention.inputs] == ["q2", "k2", "v2", "mask"]
    assert {name: a.value for name, a in attention.attributes.items()} == {
        "scale": pytest.approx(0.7), "q_num_heads": 2, "kv_num_heads": 2,
    }  # fmt: skip
    assert str(values(model)["a2"].shape) == "[batch,tokens,8]"
    assert np.array_equal(answers(model), before)
    assert attention_on_rows(model) == []


def test_heads_may_share_keys_and_values() -> None:
    text = changed(
        ("split_kv = {0, 0, 2, 4}", "split_kv = {0, 0, 1, 4}"),
        ("float[8, 8] wk, float[8, 8] wv", "float[8, 4] wk, float[8, 4] wv"),
    )
    before, model = answers(read(text)), on_rows(text)
    (attention,) = (node for node in model.graph if node.op_type == "Attention")
    assert (attention.attributes["q_num_heads"].value, attention.attributes["kv_num_heads"].value) == (2, 1)
    assert np.allclose(answers(model), before, rtol=1e-6)


def test_attention_that_looks_back_only_keeps_doing_so_on_rows() -> None:
    text = changed(("<scale = 0.7> (q, k, v, mask)", "<scale = 0.7, is_causal = 1> (q, k, v)"))
    before = answers(read(text))
    assert np.array_equal(answers(on_rows(text)), before)
    assert not np.allclose(answers(on_rows()), before)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("k = Transpose <perm = [0, 2, 1, 3]>", "k = Transpose <perm = [0, 1, 2, 3]>"),
        ("v = Transpose <perm = [0, 2, 1, 3]> (v3)", "v = Identity(v3)"),
        ("a3 = Transpose <perm = [0, 2, 1, 3]>", "a3 = Transpose <perm = [0, 1, 2, 3]>"),
        ("a3 = Transpose <perm = [0, 2, 1, 3]>", "a3 = Transpose <perm = [0, 2, 3, 1]>"),
        ("a2 = Reshape(a3, join)", "a2 = ReduceMean <keepdims = 0> (a3, two)"),
        ("q3 = Reshape(q2, split)", "q3 = Unsqueeze(q2, axis)"),
        ("split = {0, 0, 2, 4}", "split = {0, 2, -1, 4}"),  # rows cut across tokens, not within each
        ("join = {0, 0, 8}", "join = {0, -1, 4}"),
        ("a = Attention <scale = 0.7> (q, k, v, mask)", "a, pk, pv = Attention (q, k, v, mask, k, v)"),
        ("a3 = Transpose", "other = Relu(a)\n  a3 = Transpose"),
        ("a2 = Reshape(a3, join)", "a2 = Reshape(a3, join)\n  other = Relu(a3)"),
        ("=> (float[batch, 3] y)", "=> (float[batch, 3] y, float[batch, 2, tokens, 4] a)"),
        ("=> (float[batch, 3] y)", "=> (float[batch, 3] y, float[batch, tokens, 2, 4] a3)"),
        ("x, bool", "x, float[batch, 2, past, 4] past_key_values_0, bool"),
    ],
)
def test_attention_in_any_other_surroundings_is_left_alone(old: str, new: str) -> None:
    model = read(changed((old, new)))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert attention_on_rows(model) == []
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_attention_whose_keys_for_a_cache_are_read_is_left_alone() -> None:
    text = changed(
        ("a = Attention", "a, present_k, present_v = Attention"), ("a3 = ", "other = Relu(present_k)\n  a3 = ")
    )
    assert attention_on_rows(read(text)) == []


def test_rows_that_a_reshape_moves_between_texts_are_left_alone() -> None:
    """Split into heads as usual, but from three texts of six tokens to six texts of three."""
    sizes = (("batch", "3"), ("tokens", "6"))
    assert attention_on_rows(read(changed(*sizes))) != []
    assert attention_on_rows(read(changed(("split = {0, 0, 2, 4}", "split = {6, 3, 2, 4}"), *sizes))) == []


def test_lengths_that_are_not_known_are_not_taken_for_equal() -> None:
    model = read(LAYER)
    for name, tail in (("q2", [8]), ("q3", [2, 4])):
        values(model)[name].shape = ir.Shape([None, None, *tail])
    assert attention_on_rows(model) == []


def test_all_after_the_last_keys_and_values_is_computed_for_the_first_token() -> None:
    model = on_rows()
    before = answers(model)
    assert first_token_only(model) == ["13 operators at the end compute the first token only, the one that is read"]
    shapes = {name: list(value.shape) for name, value in values(model).items()}
    assert {name for name in shapes if shapes[name][:2] == ["batch", 1]} == {*NARROWED, "n.first_1", "mask.first_2"}
    assert shapes["n"] == shapes["k2"] == shapes["v2"] == ["batch", "tokens", 8]
    assert shapes["mask.first_2"] == ["batch", 1, 1, "tokens"]
    assert operators(model)["Slice"] == 2  # of n once for its two readers, and of the mask
    assert np.allclose(answers(model), before, rtol=1e-5, atol=1e-6)
    assert first_token_only(model) == []


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 9), (4, 2)])
def test_it_is_exact_at_every_shape_and_stays_apart_from_other_answers(batch: int, tokens: int) -> None:
    model, other = on_rows(), answers(read(changed(("zero = {0}", "zero = {-1}"))), batch, tokens)
    before = answers(model, batch, tokens)
    first_token_only(model)
    assert np.allclose(answers(model, batch, tokens), before, rtol=1e-5, atol=1e-6)
    assert np.allclose(other, before) == (tokens == 1)


def test_residual_sums_before_norms_are_still_written_apart() -> None:
    model = on_rows()
    before = answers(model)
    first_token_only(model)
    assert passes.plain_norms(model) == ["1 residual sums kept apart from their layer norms"]
    assert np.allclose(answers(model), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mask", "cut"),
    [
        ("bool[batch, 1, 1, tokens]", None),
        ("bool[tokens, tokens]", [1, "tokens"]),
        ("bool[1, tokens, tokens]", [1, 1, "tokens"]),
        ("bool[batch, 2, tokens, tokens]", ["batch", 2, 1, "tokens"]),
    ],
)
def test_a_mask_keeps_the_row_of_the_first_query(mask: str, cut: list[int | str] | None) -> None:
    """Judged by ONNX's own implementation: ONNX Runtime's takes no mask of one row for several queries."""
    model = on_rows(changed(("bool[batch, 1, tokens, tokens]", mask)))
    before = answers(model, reference=True)
    first_token_only(model)
    found = [list(value.shape) for name, value in values(model).items() if name.startswith("mask.first")]
    assert found == ([] if cut is None else [cut])
    assert np.allclose(answers(model), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "selection",
    [
        "c = Gather <axis = -2> (h, zero)",
        "c1 = Gather <axis = 1> (h, from)\n  c = Squeeze(c1, axis)",
        "c1 = Slice(h, from, to, axis)\n  c = Squeeze(c1, axis)",
        "c1 = Slice(h, from, to, axis, to)\n  c = Squeeze(c1, axis)",
        "c1 = Gather <axis = 1> (h, zero)\n  c2 = Slice(h, from, to, axis)\n  c3 = Squeeze(c2, axis)\n  c = Add(c1, c3)",
    ],
)
def test_every_way_of_taking_token_0_is_recognised(selection: str) -> None:
    model = on_rows(changed(("c = Gather <axis = 1> (h, zero)", selection)))
    before = answers(model)
    assert first_token_only(model) != []
    assert np.allclose(answers(model), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("zero = {0}", "zero = {1}"),
        ("zero = {0}", "zero = {-1}"),
        ("c = Gather <axis = 1> (h, zero)", "c = ReduceMean <keepdims = 0> (h, axis)"),
        ("c = Gather <axis = 1> (h, zero)", "c1 = Slice(h, to, two, axis)\n  c = Squeeze(c1, axis)"),
        (
            "c = Gather <axis = 1> (h, zero)",
            "c1 = Slice(h, from, two, axis)\n  c = ReduceMean <keepdims = 0> (c1, axis)",
        ),
        (
            "c = Gather <axis = 1> (h, zero)",
            "c1 = Slice(h, from, to, from)\n  c = ReduceMean <keepdims = 0> (c1, axis)",
        ),
        ("y = MatMul(c, wy)", "y1 = MatMul(c, wy)\n  y2 = ReduceMax(h)\n  y = Add(y1, y2)"),
        (
            "t = Mul(s, half)",
            "s0 = MatMul(s, wide)\n  t, s1 = Split <axis = 2, num_outputs = 2> (s0)\n  other = ReduceMax(s1)",
        ),
        ("=> (float[batch, 3] y)", "=> (float[batch, 3] y, float[batch, tokens, 8] h)"),
        ("<scale = 0.7> (q, k, v, mask)", "<scale = 0.7, is_causal = 1> (q, k, v)"),
        ("x, bool", "x, float[batch, 2, past, 4] past_key_values_0, bool"),
    ],
)
def test_where_more_than_the_first_token_is_read_nothing_changes(old: str, new: str) -> None:
    model = read(changed((old, new)))
    attention_on_rows(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert first_token_only(model) == []
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    "between",
    [
        "s1 = Softmax <axis = 1> (s)\n  t = Mul(s1, half)",
        "s1 = CumSum(s, axis)\n  t = Mul(s1, half)",
        "s1 = LayerNormalization <axis = -2> (s, g, b)\n  t = Mul(s1, half)",
        "s1 = LayerNormalization <axis = -1> (s, by_place, by_place)\n  t = Mul(s1, half)",
        "s1 = MatMul(mix, s)\n  t = Mul(s1, half)",
        "s1, s2 = Split <axis = 1, num_outputs = 2> (s)\n  t = Mul(s1, s2)",
        "t = Mul(s, by_place)",
    ],
)
def test_operators_that_mix_or_tell_apart_tokens_stop_it(between: str) -> None:
    """What follows them has no product in it that would be worth a Slice."""
    model = on_rows(changed(("t = Mul(s, half)", between), ("tokens", "6")))
    assert list(values(model)["t"].shape)[2] == 8
    assert first_token_only(model) == []


def test_a_mask_of_unknown_shape_stops_it() -> None:
    model = on_rows()
    (mask,) = (value for value in model.graph.inputs if value.name == "mask")
    mask.shape = None
    assert first_token_only(model) == ["10 operators at the end compute the first token only, the one that is read"]
    assert list(values(model)["a2"].shape) == ["batch", "tokens", 8]


def test_what_is_narrow_already_stays_as_it_is() -> None:
    model = on_rows(changed(("h = LayerNormalization <axis = -1> (t, g, b)", "h = MatMul(t, wv)")))
    assert first_token_only(model) != []
    assert first_token_only(model) == []


def test_what_follows_an_operator_that_mixes_tokens_is_still_narrowed() -> None:
    model = on_rows(changed(("f3 = Gelu(f2)", "f3 = Softmax <axis = 1> (f2)")))
    before = answers(model)
    assert first_token_only(model) == ["4 operators at the end compute the first token only, the one that is read"]
    assert {"f3.first_1", "m.first_1"} < set(values(model))
    assert list(values(model)["f3"].shape) == ["batch", "tokens", 16]
    assert np.allclose(answers(model), before, rtol=1e-5, atol=1e-6)


def test_without_rows_it_stops_at_the_reshape() -> None:
    model = read(LAYER)
    before = answers(model)
    assert first_token_only(model) != []
    assert list(values(model)["a2"].shape) == ["batch", "tokens", 8]
    assert np.allclose(answers(model), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("between", "saved"),
    [
        *((f"t = {kind}(s)", 13) for kind in ("Erf", "Gelu", "Identity", "Neg", "Relu", "Sigmoid", "Tanh")),
        ("t = Cast <to = 1> (s)", 13),
        ("t = RMSNormalization <axis = 2> (s, g)", 13),
        ("t = Sub(half, s)", 13),
        ("t = Mul(s, s)", 13),
        ("t = Mul(s, by_token)", 13),
        ("t = Add(one_row, s)", 13),
        ("s1, s2 = Split <axis = -1, num_outputs = 2> (s)\n  t = Concat <axis = -1> (s2, s1)", 0),
        ("s0 = MatMul(s, wide)\n  s1, s2 = Split <axis = 2, num_outputs = 2> (s0)\n  t = Mul(s1, s2)", 15),
    ],
)
def test_operators_that_work_token_by_token_are_passed_exactly(between: str, saved: int) -> None:
    model = on_rows(changed(("t = Mul(s, half)", between)))
    before = answers(model)
    notes = first_token_only(model)
    assert notes == (
        [f"{saved} operators at the end compute the first token only, the one that is read"] if saved else []
    )
    assert "one_row.first_1" not in values(model)
    assert np.allclose(answers(model), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["tiny_bert_folder", "tiny_distilbert_folder", "tiny_roberta_folder"])
def test_a_classifier_answers_the_same_from_the_first_token_alone(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = load_model(request.getfixturevalue(family))
    sessions = []
    with trace.traced(model, 23) as graph:
        for change in (lambda _: ["as traced"], attention_on_rows, first_token_only):
            assert change(graph) != []
            path = tmp_path / f"{len(sessions)}.onnx"
            ir.save(graph, path)
            onnx.checker.check_model(str(path), full_check=True)
            sessions.append(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))
        assert operators(graph)["Transpose"] == operators(graph)["Reshape"] == 0
        products = [node.outputs[0].shape for node in graph.graph if node.op_type == "MatMul"]
        assert sum(shape[1] == 1 for shape in products) == 4  # of the last layer all but keys and values
        assert len(products) == 12
    ids = torch.randint(5, 200, (4, 21), generator=torch.Generator().manual_seed(0)).numpy()
    mask = (np.arange(21) < np.array([[21], [1], [13], [7]])).astype(np.int64)
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
    traced, rows, first = (
        session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})[0] for session in sessions
    )
    assert np.allclose(rows, traced, rtol=1e-6, atol=0)
    assert np.allclose(first, traced, rtol=0, atol=1e-5 * np.abs(traced).max())


def test_an_export_says_what_it_saved_and_verifies(tiny_bert_folder: Path, tmp_path: Path) -> None:
    model = load_model(tiny_bert_folder)
    notes = export_onnx(model, tmp_path)
    assert "2 attentions read and write rows of tokens, heads not transposed" in notes
    assert "14 operators at the end compute the first token only, the one that is read" in notes
    assert [c for c in verify(model, tmp_path) if not c.passed] == []


@pytest.mark.parametrize("family", ["tiny_gpt2_folder", "tiny_llama_folder"])
def test_a_decoder_is_left_alone(family: str, request: pytest.FixtureRequest) -> None:
    with trace.traced(load_model(request.getfixturevalue(family)), 23) as graph:
        before = ir.to_proto(graph).SerializeToString(deterministic=True)
        assert attention_on_rows(graph) + first_token_only(graph) == []
        assert ir.to_proto(graph).SerializeToString(deterministic=True) == before
