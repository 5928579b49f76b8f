"""fp16 and bf16: every number is the nearest 16-bit one, files are half the size, and what does not fit is said by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from squeeze import api
from squeeze.compress import QuantizeStage
from squeeze.compress.layers import weight_rows
from squeeze.errors import QuantizeError, RecipeError
from squeeze.halves import Half, as_stored, rounded
from squeeze.model import load_model

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("scheme", DTYPES)
def test_every_parameter_is_the_nearest_number_of_the_type_and_ties_go_to_even(
    scheme: str, tiny_bert_folder: Path
) -> None:
    model, dtype = load_model(tiny_bert_folder), DTYPES[scheme]
    step = torch.finfo(dtype).eps
    model.network.classifier.bias.copy_(torch.tensor([1 + step / 2, 1 + 3 * step / 2, 1 + 0.6 * step]))
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    record = QuantizeStage(scheme=scheme).apply(model)
    for name, parameter in model.network.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name].to(dtype).float())
    assert model.network.classifier.bias.tolist() == [1.0, 1 + 2 * step, 1 + step]
    assert {row.bits for row in record.layers} == {16} == {row.bits for row in weight_rows(model)}
    least = 70 if scheme == "fp16" else 50  # a rounding to p bits leaves about 6.02 p + 7 dB: p = 11 and 8
    assert all(row.sqnr_db is not None and least < row.sqnr_db < least + 10 for row in record.layers)


@pytest.mark.parametrize("scheme", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_an_artifact_is_half_the_size_loads_back_the_same_and_is_a_transformers_folder(
    scheme: str, family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    import transformers

    folder = request.getfixturevalue(f"tiny_{family}_folder")
    artifact = api.quantize(folder, tmp_path / "run", scheme=scheme)
    dtype = str(DTYPES[scheme]).removeprefix("torch.")
    assert json.loads((artifact.folder / "config.json").read_text())["dtype"] == dtype
    file = artifact.folder / "model.safetensors"
    wide = (tmp_path / "run" / "0-source" / "model.safetensors").stat().st_size
    kept = (scheme, family) == ("fp16", "t5")
    tensors = load_file(file)
    assert {t.dtype for n, t in tensors.items() if not (kept and ".wo." in n)} == {DTYPES[scheme]}
    assert file.stat().st_size < (0.7 if kept else 0.56) * wide
    once, again = load_model(artifact.folder), load_model(artifact.folder)
    expected = load_model(folder)
    QuantizeStage(scheme=scheme).apply(expected)
    assert once.half == again.half == expected.half
    for (name, p), (_, q) in zip(once.network.named_parameters(), expected.network.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    theirs: Any = getattr(transformers, type(once.network).__name__).from_pretrained(artifact.folder, dtype="auto")
    assert theirs.dtype == DTYPES[scheme]
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter.float(), dict(once.network.named_parameters())[name])


def test_what_is_kept_stays_float32_on_disk_and_no_reader_is_told_to_round_it(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    artifact = api.quantize(tiny_llama_folder, tmp_path / "run", scheme="fp16", keep=("*.down_proj", "model.norm"))
    tensors = load_file(artifact.folder / "model.safetensors")
    wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert wide == {"model.norm.weight", *(f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1))}
    assert json.loads((artifact.folder / "config.json").read_text())["dtype"] == "float32"
    rows = {row.name: row for row in artifact.manifest.record.layers}  # type: ignore[union-attr]
    row = rows["model.layers.0.mlp.down_proj.weight"]
    assert (row.bits, row.sqnr_db, row.note) == (32, None, "kept in float32: keep '*.down_proj'")
    source = dict(load_model(tiny_llama_folder).network.named_parameters())
    assert all(torch.equal(dict(load_model(artifact.folder).network.named_parameters())[n], source[n]) for n in wide)


def test_t5_keeps_what_transformers_declares_too_sensitive_for_float16(tiny_t5_folder: Path) -> None:
    model = load_model(tiny_t5_folder)
    record = QuantizeStage(scheme="fp16").apply(model)
    notes = [row.note for row in record.layers if ".wo." in row.name]
    assert notes == ["kept in float32: Transformers declares wo too sensitive for float16"] * 2
    assert any("2 tensors are kept in float32" in note for note in record.notes)
    model = load_model(tiny_t5_folder)
    QuantizeStage(scheme="bf16").apply(model)
    assert model.half == Half("bfloat16")


def test_values_that_float16_lacks_are_refused_by_name_and_nothing_changes(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    norm = model.network.model.norm.weight
    norm[:2] = torch.tensor([65519.0, 70000.0])  # the first still rounds to 65504
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    message = r"beyond 65504, the largest float16: model\.norm\.weight \(1 values, largest 7e\+04\).*choose bf16, or keep them"
    with pytest.raises(QuantizeError, match=message):
        QuantizeStage(scheme="fp16").apply(model)
    assert all(torch.equal(p, before[name]) for name, p in model.network.named_parameters())
    QuantizeStage(scheme="fp16", keep=("model.norm",)).apply(model)
    assert norm[1] == 70000


def test_weights_that_become_zero_are_counted(tiny_llama_folder: Path) -> None:
    model = load_model(tiny_llama_folder)
    model.network.model.layers[0].mlp.up_proj.weight[0, :3] = 2e-8  # below half of float16's smallest, 6e-8
    record = QuantizeStage(scheme="fp16").apply(model)
    assert any(note == "3 weights were too small for float16 and are zero now" for note in record.notes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_the_record_says_what_16_bits_are_for(tiny_llama_folder: Path) -> None:
    record = QuantizeStage(scheme="bf16").apply(load_model(tiny_llama_folder))
    assert any("bf16 halves the file and speeds nothing up" in n and "--scheme int8" in n for n in record.notes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 32), ("symmetric", True), ("granularity", "channel"), ("smooth_alpha", 0.5), ("method", "gptq"),
        ("calibrator", "entropy"), ("percentile", 99.0), ("bias_correction", False),
    ],
)  # fmt: skip
def test_settings_of_integers_are_refused(field: str, value: Any, tiny_bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValidationError, match=rf"{field} is for integers; fp16 casts weights and reads only keep\. Drop it"
    ):
        QuantizeStage(scheme="fp16", **{field: value})
    with pytest.raises(RecipeError, match=f"{field} is for integers"):
        api.quantize(tiny_bert_folder, tmp_path / "run", scheme="fp16", **{field: value})


def test_texts_that_nothing_reads_and_a_pattern_without_a_match_are_refused(
    tiny_bert_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(QuantizeError, match="no setting here reads calibration texts"):
        api.quantize(
            tiny_bert_folder,
            tmp_path / "run",
            scheme="bf16",
            data={"path": "asset:tweets", "splits": {"evaluate": 2, "calibration": 2}},
        )
    with pytest.raises(QuantizeError, match=r"keep 'bert\.encodr' matches no layer"):
        QuantizeStage(scheme="fp16", keep=("bert.encodr",)).apply(load_model(tiny_bert_folder))


def test_a_second_quantization_starts_from_the_float_artifact(tiny_bert_folder: Path, tmp_path: Path) -> None:
    artifact = api.quantize(tiny_bert_folder, tmp_path / "run", scheme="fp16")
    for scheme in ("int8", "bf16"):
        with pytest.raises(QuantizeError, match="already quantized"):
            QuantizeStage(scheme=scheme).apply(load_model(artifact.folder))


def test_an_own_module_is_saved_and_read_in_16_bits(tmp_path: Path) -> None:
    from safetensors.torch import load_model as load_tensors
    from safetensors.torch import save_model as save_tensors

    torch.manual_seed(0)
    network = nn.ModuleDict({"embedding": nn.Embedding(20, 8), "lstm": nn.LSTM(8, 8), "head": nn.Linear(8, 20)})
    network["head"].weight = network["embedding"].weight
    half = Half("bfloat16", frozenset({"head.bias"}))
    for _, parameter in half.tensors(network):
        parameter.data = parameter.data.bfloat16().float()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    with as_stored(network, half):
        save_tensors(network, str(tmp_path / "model.safetensors"))
    assert network["head"].weight is network["embedding"].weight
    types = {name: tensor.dtype for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert types.pop("head.bias") == torch.float32
    assert set(types.values()) == {torch.bfloat16}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    load_tensors(network, str(tmp_path / "model.safetensors"))
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


def test_rounding_what_layers_give_ends_with_the_block() -> None:
    network, half, x = nn.Sequential(nn.Linear(4, 4), nn.GELU()), Half("float16"), torch.randn(2, 4)
    exact = network(x)
    with rounded(network, half):
        inside = network(x)
    assert torch.equal(inside, inside.half().float())
    assert 0 < float((inside - exact).detach().norm() / exact.detach().norm()) < half.epsilon
    assert torch.equal(network(x), exact)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheme", DTYPES)
def test_torch_on_a_gpu_computes_in_the_artifacts_type(scheme: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    import numpy as np

    from squeeze.runtimes import open_session

    artifact = api.quantize(tiny_llama_folder, tmp_path / "run", scheme=scheme)
    batch = {"input_ids": np.arange(2, 12)[None], "attention_mask": np.ones((1, 10), np.int64)}
    on = {device: open_session(artifact.folder, "torch", device=device) for device in ("cpu", "cuda")}
    assert on["cuda"]._network.dtype == DTYPES[scheme]  # type: ignore[attr-defined]
    expected, found = on["cpu"].forward(batch), on["cuda"].forward(batch)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 32 * torch.finfo(DTYPES[scheme]).eps
