"""An int8 cache: its scales by hand, the kernel against the simulation, and exports of real tiny decoders with one."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from squeeze import api
from squeeze.benchmark.cost import cost
from squeeze.compress.quantize import QuantizeStage
from squeeze.errors import ExportError, RecipeError
from squeeze.exporter import MODEL_FILE, ExportSettings, export_onnx, save_graph
from squeeze.exporter.cache import attentions, cache_scales
from squeeze.kv_cache import cache_int8, calibrated, change_cache
from squeeze.model import Model, call, load_model
from squeeze.recipe import read_recipe
from squeeze.runtimes import open_session
from squeeze.simulation import simulation
from squeeze.verification import verify

TOP = Path(__file__).resolve().parents[1]
DECODERS = ("tiny_llama_folder", "tiny_qwen2_folder")


def texts(length: int = 24) -> list[dict[str, np.ndarray]]:
    """Two batches of random tokens."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(4, 200, (3, length)) for _ in range(2)]
    return [{"input_ids": i, "attention_mask": np.ones_like(i)} for i in ids]


def test_numbers_are_rounded_to_even_and_kept_within_int8() -> None:
    x = torch.tensor([0.5, 1.5, -0.5, 2.4, 500.0, -500.0]).view(1, 1, 1, 6)
    assert cache_int8(x, torch.tensor([1.0])).flatten().tolist() == [0, 2, 0, 2, 127, -128]


def test_a_keys_scale_is_that_of_its_rotating_pair_and_holds_at_every_position(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    seen: list[torch.Tensor] = []
    handle = change_cache(model.network, lambda layer, k, v: (seen.append(k) if layer == 0 else None, (k, v))[1])
    short = texts(4)[:1]
    call(model.network, model, short[0])
    handle.remove()
    first, second = seen[0].chunk(2, dim=-1)
    expected = torch.hypot(first, second).amax(dim=(0, 2)) / 127
    found = calibrated(model.network, short).keys[0]
    torch.testing.assert_close(found, torch.cat([expected, expected], dim=-1).unsqueeze(1))
    # The first layer's keys depend on their token and on its position alone: the same tokens, 60 positions later, do not clip.
    seen.clear()
    handle = change_cache(model.network, lambda layer, k, v: (seen.append(k) if layer == 0 else None, (k, v))[1])
    with torch.no_grad():
        ids = torch.from_numpy(short[0]["input_ids"])
        model.network(input_ids=ids, position_ids=(torch.arange(4) + 60).expand_as(ids))
    handle.remove()
    assert float((seen[0].abs() / found).max()) <= 127.01


def test_values_have_the_scale_of_their_largest_and_one_may_hold_for_all(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    each, whole = (calibrated(model.network, texts(), kind) for kind in ("channel", "tensor"))
    assert each.keys[0].shape == each.values[1].shape == (2, 1, 16)
    assert whole.keys[0].shape == whole.values[1].shape == (1,)
    assert (each.granularity, whole.granularity, each.layers) == ("channel", "tensor", 2)
    for layer in range(2):
        assert float(each.values[layer].max()) == float(whole.values[layer])


def test_without_texts_there_are_no_scales(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"takes its scales from texts, and there are none. Name data .*--data"):
        export_onnx(load_model(tiny_llama_folder), tmp_path, ExportSettings(kv_cache="int8"))


def test_a_graph_in_sixteen_bits_takes_one_too(tiny_llama_folder: Path, tmp_path: Path) -> None:
    model = load_model(tiny_llama_folder)
    QuantizeStage(scheme="fp16").apply(model)
    export_onnx(model, tmp_path, ExportSettings(kv_cache="int8"), texts())
    assert [check for check in verify(model, tmp_path) if not check.passed] == []


def test_steps_with_the_cache_give_what_the_whole_text_gives(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    scales = calibrated(model.network, texts())
    # In double precision: sums in another order are other floats, and a key that lies between two integers would fall on either side.
    network = simulation(model, scales).double()
    ids = torch.from_numpy(texts()[0]["input_ids"])
    with torch.no_grad():
        whole = network(input_ids=ids).logits
        first = network(input_ids=ids[:, :10], use_cache=True)
        second = network(input_ids=ids[:, 10:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole, atol=1e-4, rtol=1e-4)
    kept = second.past_key_values.layers[0].keys
    torch.testing.assert_close(kept, cache_int8(kept, scales.keys[0]), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(whole.float(), model.network(input_ids=ids).logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["PER_CHANNEL", "PER_TENSOR"])
def test_the_kernel_keeps_the_integers_that_the_simulation_rounds_to(kind: str) -> None:
    heads, size, tokens = 2, 16, 50
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, tokens, heads * size), dtype=np.float32) for _ in range(3))
    shape = (heads, 1, size) if kind == "PER_CHANNEL" else (1,)
    scale = rng.uniform(0.01, 0.03, shape).astype(np.float32)
    cache = [
        helper.make_tensor_value_info(n, TensorProto.INT8, [2, heads, f"{n}_length", size])
        for n in ("past_k", "past_v", "k_out", "v_out")
    ]
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, tokens, heads * size]) for n in "qkvy"]
    counts = [
        helper.make_tensor_value_info("lengths", TensorProto.INT32, [2]),
        helper.make_tensor_value_info("total", TensorProto.INT32, []),
    ]
    node = helper.make_node(
        "GroupQueryAttention", ["q", "k", "v", "past_k", "past_v", "lengths", "total", *[""] * 5, "scale", "scale"],
        ["y", "k_out", "v_out"], domain="com.microsoft", num_heads=heads, kv_num_heads=heads, k_quant_type=kind,
        v_quant_type=kind, kv_cache_bit_width=8,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "attention", [*given[:3], *cache[:2], *counts], [given[3], *cache[2:]], [numpy_helper.from_array(scale, "scale")]
    )  # fmt: skip
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    empty = np.zeros((2, heads, 0, size), np.int8)
    feed = {"q": q, "k": k, "v": v, "past_k": empty, "past_v": empty}
    feed |= {"lengths": np.full(2, tokens - 1, np.int32), "total": np.array(tokens, np.int32)}
    found, k_out, v_out = session.run(None, feed)
    by_head = [torch.from_numpy(x).view(2, tokens, heads, size).transpose(1, 2) for x in (q, k, v)]
    kept = [cache_int8(x, torch.from_numpy(scale)) for x in by_head[1:]]
    for integers, x in zip((k_out, v_out), kept, strict=True):
        assert np.array_equal(integers, torch.round(x / torch.from_numpy(scale)).numpy().astype(np.int8))
    expected = torch.nn.functional.scaled_dot_product_attention(by_head[0], *kept, is_causal=True)
    np.testing.assert_allclose(found, expected.transpose(1, 2).reshape(2, tokens, -1).numpy(), atol=1e-5)


@pytest.mark.parametrize(("scheme", "scales"), [(None, "tensor"), ("int8", "channel")])
@pytest.mark.parametrize("family", DECODERS)
def test_decoders_export_with_an_int8_cache_and_verify(
    family: str, scheme: str | None, scales: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = load_model(request.getfixturevalue(family))
    if scheme is not None:
        QuantizeStage(scheme=scheme).apply(model)
    notes = export_onnx(model, tmp_path, ExportSettings(kv_cache="int8", kv_scales=scales), texts())
    checks = verify(model, tmp_path)
    assert [c for c in checks if not c.passed] == []
    assert {"cache tensors that are not int8", "cache scales other than those calibrated"} < {c.name for c in checks}
    assert any(note.startswith("keys and values of 2 layers kept as int8") for note in notes)
    onnx.checker.check_model(str(tmp_path / MODEL_FILE), full_check=False)


@pytest.fixture(scope="module")
def exported(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A tiny Llama with float weights and an int8 cache."""
    model, folder = load_model(tiny_llama_folder), tmp_path_factory.mktemp("int8-cache")
    export_onnx(model, folder, ExportSettings(kv_cache="int8"), texts())
    return model, folder


def test_the_graph_holds_the_scales_of_the_calibration(exported: tuple[Model, Path]) -> None:
    model, folder = exported
    found, expected = cache_scales(ir.load(folder / MODEL_FILE)), calibrated(model.network, texts())
    assert found is not None
    for one, other in zip((*found.keys, *found.values), (*expected.keys, *expected.values), strict=True):
        assert torch.equal(one, other)


def test_the_export_computes_what_the_simulation_does_and_not_what_the_float_network_does(
    exported: tuple[Model, Path],
) -> None:
    model, folder = exported
    inputs = texts(40)[0]
    expected = call(simulation(model, calibrated(model.network, texts())), model, inputs)
    found = open_session(folder, "onnxruntime", threads=1).forward(inputs)
    plain = call(model.network, model, inputs)
    apart = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert apart < 0.1 * np.linalg.norm(plain - expected) / np.linalg.norm(expected)


def test_both_runtimes_generate_alike_with_it(exported: tuple[Model, Path]) -> None:
    _, folder = exported
    prompt = texts()[0]["input_ids"][:1]
    tokens = [
        open_session(folder, name, threads=1).generate(prompt, 20).tokens
        for name in ("onnxruntime", "onnxruntime-genai")
    ]
    assert np.array_equal(*tokens)


def test_scales_of_another_layer_are_found(exported: tuple[Model, Path], tmp_path: Path) -> None:
    model, folder = exported
    graph = ir.load(folder / MODEL_FILE)
    first, second = (attentions(graph)[layer] for layer in (0, 1))
    keys = first.inputs[12], second.inputs[12]
    first.replace_input_with(12, keys[1])
    second.replace_input_with(12, keys[0])
    save_graph(graph, tmp_path)
    (tmp_path / "genai_config.json").write_bytes((folder / "genai_config.json").read_bytes())
    assert [c.name for c in verify(model, tmp_path) if not c.passed] == ["cache scales other than those calibrated"]


def test_a_graph_without_that_kernel_is_refused(
    tiny_llama_folder: Path, tiny_gpt2_folder: Path, tmp_path: Path
) -> None:
    for folder, graph in ((tiny_llama_folder, "dynamo"), (tiny_gpt2_folder, "auto")):
        with pytest.raises(
            ExportError, match="an int8 cache needs GroupQueryAttention, which only onnxruntime-genai's builder writes"
        ):
            export_onnx(load_model(folder), tmp_path, ExportSettings(graph=graph, kv_cache="int8"), texts())


def test_scales_for_a_float_cache_are_refused() -> None:
    with pytest.raises(ValueError, match="kv_scales says how an int8 cache is scaled, and the cache is float32"):
        ExportSettings(kv_scales="tensor")


def test_a_recipe_without_calibration_texts_is_refused_before_any_work() -> None:
    recipe = TOP / "recipes" / "smollm2-int8.yaml"
    assert read_recipe(recipe, ["export.kv_cache=int8", "export.kv_scales=tensor"]).export is not None
    with pytest.raises(
        RecipeError, match=r"scales from calibration texts, and there are none. Set data.splits.calibration"
    ):
        read_recipe(recipe, ["export.kv_cache=int8", "data.splits.calibration=0"])
    with pytest.raises(RecipeError, match="the cache is float32. Set kv_cache: int8, or drop it"):
        read_recipe(recipe, ["export.kv_scales=tensor"])


def test_the_command_keeps_both_exports_and_the_card_counts_a_byte_a_number(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    lines = tmp_path / "texts.txt"
    lines.write_text("\n\n".join(f"The cat sat on mat number {n} and looked at the rain." for n in range(60)))
    data = {"path": str(lines), "block_size": 32, "splits": {"evaluate": 2, "calibration": 4}}
    run = tmp_path / "run"
    plain = api.export(tiny_llama_folder, run, task="causal-lm")
    with pytest.raises(ExportError, match="there are none. Name some with --data"):
        api.export(run, kv_cache="int8")
    with pytest.raises(ExportError, match="float cache reads no texts. Add --kv-cache int8, or drop data"):
        api.export(run, data=data)
    with pytest.raises(RecipeError, match="kv_cache"):
        api.export(run, kv_cache="int7", data=data)  # type: ignore[arg-type]
    small = api.export(run, kv_cache="int8", data=data)
    assert (plain.name, small.name) == ("export-0-source", "export-0-source-int8-cache")
    assert plain.folder.exists()
    assert small.manifest.data
    assert all(check.passed for check in api.verify(small.folder).checks)
    assert all(check.passed for check in api.verify(run).checks)
    assert cost(plain).cache_bytes_per_token == 4 * cost(small).cache_bytes_per_token
