"""What is said of zeros, on reports worked out by hand."""

from collections.abc import Sequence
from typing import Any

import pytest

from squeeze.report.page import render_page
from squeeze.report.schema import LayerRow, Manifest, Measurement, Report, StageRecord
from squeeze.report.zeros import ZERO_COLUMNS, zero_words, zeros

SAME, HALVED = (1.00, 1.01, 0.99), (0.50, 0.51, 0.49)
BEFORE = (1.00, 0.99, 1.01)


def record(kind: str, layers: tuple[LayerRow, ...] = (), **settings: Any) -> StageRecord:
    return StageRecord(kind=kind, settings=settings, seconds=1.0, layers=layers, notes=())


def matrix(name: str, shape: tuple[int, int], sparsity: float) -> LayerRow:
    return LayerRow(name=name, shape=shape, bits=32, sparsity=sparsity, sqnr_db=None)


PRUNED = record(
    "prune", (matrix("a", (10, 20), 0.25), matrix("b", (10, 10), 1.0), matrix("c", (5, 5), 0.0)), sparsity=0.5, pattern="unstructured",
)  # fmt: skip
ZEROS = {name: {"pattern": "unstructured", "sparsity": 0.5, "zeros": zeros} for name, zeros in (("a", 50), ("b", 100))}


def artifact(make: Any, name: str, parent: Manifest | None, made_by: StageRecord | None, **changes: Any) -> Manifest:
    fields = {
        "name": name, "parent": None if parent is None else parent.digest, "record": made_by, "parameters": 400, "nonzero_parameters": 400,
        "weight_bytes": 1600, "format": "onnx" if name.startswith("export") else "torch",
    }  # fmt: skip
    found: Manifest = make.manifest(name).model_copy(update=fields | changes)
    return found


def line(make: Any, stage: StageRecord = PRUNED, *more: StageRecord, **changes: Any) -> list[Manifest]:
    """Source, pruned, whatever comes after it, and the exports of source and result."""
    pruned = {"nonzero_parameters": 250, "extra": {"pruned": ZEROS}} | changes
    export = record("export", graph="auto")
    found = [artifact(make, "0-source", None, None)]
    found.append(artifact(make, "1-prune", found[0], stage, **pruned))
    for number, each in enumerate(more, start=2):
        found.append(artifact(make, f"{number}-{each.kind}", found[-1], each, **pruned))
    last = found[-1]
    found.append(artifact(make, "export-0-source", found[0], export))
    found.append(artifact(make, f"export-{last.name}", last, export, **(pruned | {"extra": {}})))
    return found


def timed(make: Any, chain: Sequence[Manifest], after: Sequence[float], quantity: str = "latency") -> list[Measurement]:
    return [make.measured(m, quantity, values) for m, values in ((chain[-2], BEFORE), (chain[-1], after))]


def packed(make: Any, chain: Sequence[Manifest], after: float) -> list[Measurement]:
    sizes = ((chain[-2], 1000.0), (chain[-1], after))
    return [make.measured(m, "compressed_bytes", [size], unit="bytes", repeat=()) for m, size in sizes]


def report(make: Any, chain: Sequence[Manifest], *measurements: Measurement, **changes: Any) -> Report:
    found: Report = make.report(*measurements, manifests=tuple(chain), **changes)
    return found


def plain(words: Sequence[str]) -> list[str]:
    return [text.replace("\u00a0", " ") for text in words]


def test_a_report_without_pruning_has_no_rows(make: Any) -> None:
    quiet = make.pair("latency", BEFORE, SAME)
    assert zeros(quiet) == []
    assert zero_words(quiet) == []


def test_sparsity_reached_is_over_the_pruned_matrices_and_over_all_parameters(make: Any) -> None:
    """Of 200 + 100 weights 50 + 100 are zero; the matrix that was not pruned does not count; of 400 parameters 250 are left."""
    chain = line(make)
    pruned, exported = zeros(report(make, chain, *timed(make, chain, SAME)))
    for row in (pruned, exported):
        assert (row.asked, row.reached, row.of_all) == (0.5, pytest.approx(0.5), pytest.approx(0.375))
        assert (row.parameters, row.nonzero, row.weight_bytes) == (400, 250, 1600)
    assert (pruned.before, exported.before) == ("0-source", "export-0-source")
    assert pruned.cells[-1] == "not timed"
    assert len(pruned.cells) == len(ZERO_COLUMNS)


def test_zeros_that_brought_no_speed_are_said_to_have_brought_none_and_what_would(make: Any) -> None:
    chain = line(make)
    (said,) = plain(zero_words(report(make, chain, *timed(make, chain, SAME))))
    assert said.startswith(
        "export-1-prune: 50.0 % of the weights in its pruned matrices are zero (37.5 % of all), and in onnxruntime on cpu that "
        "brought no speed (latency, 1×128: no difference shown [0."
    )
    for part in (
        "multiply by zeros as by any number",
        "squeeze prune --remove-neurons",
        "prune 2:4 and run it on the sparse tensor cores of an NVIDIA GPU",
    ):
        assert part in said
    assert "OpenVINO" not in said, "half of the weights are too few"


def test_what_runs_without_its_zeros_is_held_against_the_dense_kernels(make: Any) -> None:
    chain = line(make)
    before, after = timed(make, chain, HALVED)
    found = report(
        make,
        chain,
        before.model_copy(update={"runtime": "torch"}),
        after.model_copy(update={"runtime": "torch.sparse"}),
    )
    (said,) = plain(zero_words(found))
    assert "in torch.sparse on cpu that is 2.00× faster [" in said


def test_slower_is_no_speed_either(make: Any) -> None:
    chain = line(make)
    (said,) = plain(zero_words(report(make, chain, *timed(make, chain, (2.0, 2.02, 1.98)))))
    assert "brought no speed (latency, 1×128: 2.00× slower [" in said
    assert "--remove-neurons" in said


def test_zeros_that_brought_speed_are_said_to_with_the_interval(make: Any) -> None:
    chain = line(make)
    found = report(make, chain, *timed(make, chain, HALVED), *timed(make, chain, SAME, "set_time"))
    (said,) = plain(zero_words(found))
    assert "in onnxruntime on cpu that is 2.00× faster [" in said
    assert "(latency, 1×128); whole set: no difference shown [" in said
    assert "--remove-neurons" not in said


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (
            "2:4",
            "run, in 16 or 8 bits; in 16, squeeze's runtime torch.sparse does (squeeze bench --runtime torch.sparse",
        ),
        ("4:8", "No runtime here has kernels for 4:8; GPUs have them for 2:4."),
        ("row", "Rows that are zero as a whole can go"),
        ("block-16x16", "or prune 2:4 and run it on"),
    ],
)
def test_the_remedy_is_that_of_the_pattern(make: Any, pattern: str, words: str) -> None:
    chain = line(
        make, PRUNED.model_copy(update={"settings": {"sparsity": None if ":" in pattern else 0.5, "pattern": pattern}})
    )
    found = report(make, chain, *timed(make, chain, SAME))
    (said,) = plain(zero_words(found))
    assert zeros(found)[0].asked == 0.5
    assert words in said
    assert "squeeze prune --remove-neurons" in said


@pytest.mark.parametrize("flags", [(), ("amx_int8",)])
def test_openvino_is_named_where_most_weights_are_zero(make: Any, flags: tuple[str, ...]) -> None:
    many = (matrix("a", (10, 20), 0.9), matrix("b", (10, 10), 0.9))
    chain = line(make, PRUNED.model_copy(update={"layers": many}))
    environment = make.environment.model_copy(update={"cpu_flags": flags})
    (said,) = plain(zero_words(report(make, chain, *timed(make, chain, SAME), environment=environment)))
    assert "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE set" in said
    assert ("this processor has no AMX" in said) == (not flags)
    on_gpu = [m.model_copy(update={"device": "cuda"}) for m in timed(make, chain, SAME)]
    (said,) = plain(zero_words(report(make, chain, *on_gpu, environment=environment)))
    assert "OpenVINO" not in said
    assert "in onnxruntime on cuda that brought no speed" in said
    assert "or prune 2:4 for the sparse tensor cores" in said


def test_a_gain_after_quantization_is_not_put_down_to_zeros(make: Any) -> None:
    chain = line(make, PRUNED, record("distill"), record("quantize", scheme="int8"))
    (said,) = plain(zero_words(report(make, chain, *timed(make, chain, HALVED), *packed(make, chain, 200.0))))
    assert "and quantize int8 came after it: the change of speed (latency, 1×128: 2.00× faster [" in said
    assert said.endswith("is that of all of them together.")


def test_training_after_pruning_does_not_change_speed(make: Any) -> None:
    chain = line(make, PRUNED, record("distill"))
    (said,) = plain(zero_words(report(make, chain, *timed(make, chain, SAME))))
    assert "export-2-distill: 50.0 % of the weights" in said
    assert "brought no speed" in said


def test_what_was_treated_alike_since_is_what_it_is_held_against(make: Any) -> None:
    """Pruned and quantized against quantized alone: the same integers on both sides."""
    quantize = record("quantize", scheme="int8")
    chain = line(make, PRUNED, quantize)
    dense = artifact(make, "1-quantize", chain[0], quantize)
    dense_export = artifact(make, "export-1-quantize", dense, chain[-1].record)
    every = [*chain, dense, dense_export]
    measured = [*timed(make, chain, SAME), make.measured(dense_export, "latency", HALVED)]
    row = next(row for row in zeros(report(make, every, *measured)) if row.artifact == "export-2-quantize")
    assert (row.before, row.others) == ("export-1-quantize", ())
    assert row.speeds[0].verdict.words == "2.00× slower"


def test_too_few_repeats_and_other_runtimes_claim_nothing(make: Any) -> None:
    chain = line(make)
    few = [make.measured(m, "latency", values[:2]) for m, values in ((chain[-2], BEFORE), (chain[-1], HALVED))]
    (said,) = plain(zero_words(report(make, chain, *few)))
    assert "too few repeats to call (2), so nothing is said of speed. Raise bench.repeats." in said
    source, result = timed(make, chain, HALVED)
    (said,) = plain(zero_words(report(make, chain, source.model_copy(update={"runtime": "openvino"}), result)))
    assert "what it was made from was not timed in the same runtime and workload" in said
    assert zeros(report(make, chain, result))[-1].cells[-1] == "nothing to compare with"


def test_where_nothing_was_timed_it_says_so(make: Any) -> None:
    chain = line(make)
    (said,) = plain(zero_words(report(make, chain)))
    assert said == (
        "export-1-prune: 50.0 % of the weights in its pruned matrices are zero (37.5 % of all), and no speed was measured: what that "
        "brings is not known. Measure it with squeeze bench; zeros alone make no dense kernel faster."
    )


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (
            610.0,
            "compressed with zstd it is 39.0 % smaller (1.00 kB → 610 bytes), while its files take as much disk as before.",
        ),
        (1001.0, "compressed with zstd it is no smaller (1.00 kB → 1.00 kB)."),
    ],
)
def test_what_compression_gains_is_said_with_its_size(make: Any, after: float, words: str) -> None:
    chain = line(make)
    found = report(make, chain, *timed(make, chain, SAME), *packed(make, chain, after))
    assert plain(zero_words(found))[1] == f"export-1-prune: {words}"
    assert plain(zero_words(report(make, chain, *packed(make, chain, after))))[1] == f"export-1-prune: {words}"


def test_removed_parts_are_counted_as_parameters_that_are_gone(make: Any) -> None:
    remove = {"neurons": 0.5, "heads": 8, "layers": [0, 2], "criterion": None}
    stage = record("prune", sparsity=None, pattern="unstructured", remove=remove)
    chain = line(make, stage, parameters=300, nonzero_parameters=300, weight_bytes=1200, extra={})
    found = report(make, chain, *timed(make, chain, HALVED), *packed(make, chain, 700.0))
    row = zeros(found)[-1]
    assert row.pattern.replace("\u00a0", " ") == "removed: layers but 0, 2, heads down to 8, neurons 50 %"
    assert (row.asked, row.reached, row.removed) == (None, None, pytest.approx(0.25))
    assert row.cells[5].replace("\u00a0", " ") == "300 (25.0 % removed)"
    (said,) = plain(zero_words(found))
    assert said.startswith(
        "export-1-prune: 25.0 % of the parameters are removed, and in onnxruntime on cpu that is 2.00× faster ["
    )
    (said,) = plain(zero_words(report(make, chain, *timed(make, chain, SAME))))
    assert said.endswith("])."), "no remedy: this is the structure that would bring speed"
    (said,) = plain(zero_words(report(make, chain)))
    assert said.endswith("Measure it with squeeze bench.")


def test_masks_without_their_stage_in_the_report_are_known_by_the_manifest(make: Any) -> None:
    """A bench of a single export, whose chain is elsewhere."""
    alone = artifact(make, "export-1-prune", None, record("export"), nonzero_parameters=250, extra={"pruned": ZEROS})
    (row,) = zeros(report(make, [alone], make.measured(alone, "latency", SAME)))
    assert (row.pattern, row.asked, row.reached, row.before) == ("unstructured", None, None, "")
    (said,) = plain(zero_words(report(make, [alone], make.measured(alone, "latency", SAME))))
    assert said.startswith("export-1-prune: 37.5 % of all weights are zero; what it was made from was not timed")


def test_the_page_and_the_terminal_show_them(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from squeeze import console

    chain = line(make)
    found = report(make, chain, *timed(make, chain, SAME), *packed(make, chain, 610.0))
    page = render_page(found)
    assert "What zeros are worth" in page
    for text in (*zero_words(found), *(cell for row in zeros(found) for cell in row.cells)):
        assert text.replace("’", "&#39;") in page
    console.print_report(found)
    shown = " ".join(capsys.readouterr().out.split())
    assert "what zeros are worth" in shown
    assert "in onnxruntime on cpu that brought no speed" in shown
    assert "What zeros are worth" not in render_page(make.pair("latency", BEFORE, SAME))
