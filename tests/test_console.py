"""The terminal's side, on streams of every kind: pipes, terminals wide and narrow, with and without colour and
Unicode."""

import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from squeeze import console
from squeeze.inspection import Inspection, Link
from squeeze.provenance import digest_bytes
from squeeze.report.explained import CurvePoint
from squeeze.report.headline import headline
from squeeze.report.page import render_page
from squeeze.report.schema import ArtifactChecks, Check, LayerRow, Report, StageRecord, read_report
from squeeze.report.text import MINUS

GOLDEN = Path(__file__).parent / "report" / "golden" / "schema-1.json"
HOSTILE = "[red]x[/red] \x1b[31mred\x1b[0m \u202egpj.exe \x07"
SHOWN = "[red]x[/red] \\x1b[31mred\\x1b[0m \\u202egpj.exe \\x07"


class Stream(io.TextIOWrapper):
    """A stream in any encoding, that claims to be a terminal or not."""

    def __init__(self, encoding: str, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, newline="")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    @property
    def text(self) -> str:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode(self.encoding)


Open = Callable[..., Stream]


@pytest.fixture
def open_stream(monkeypatch: pytest.MonkeyPatch) -> Open:
    """Replaces sys.stdout or sys.stderr for the rest of the test."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def open_stream(
        name: str = "stdout", *, encoding: str = "utf-8", terminal: bool = False, columns: int = 0
    ) -> Stream:
        if columns:
            monkeypatch.setenv("COLUMNS", str(columns))
        stream = Stream(encoding, terminal)
        monkeypatch.setattr(sys, name, stream)
        return stream

    return open_stream


@pytest.fixture(scope="module")
def golden() -> Report:
    return read_report(GOLDEN)


def words(text: str) -> str:
    """The text in one line, so that wrapping does not matter."""
    return " ".join(text.replace("\u00a0", " ").split())


def test_a_report_is_printed_with_its_verdict_last(golden: Report, open_stream: Open) -> None:
    out = open_stream()
    console.print_report(golden)
    text = words(out.text)
    assert text.endswith(words(headline(golden)))
    for part in (
        "51.1 tokens/s 139 tokens/s 2.72× faster [2.43, 3.25]",
        "all cells",
        "all 10 passed",
        "note: A fixture",
    ):
        assert part in text
    assert "cpu, 2 threads" in text.splitlines()[0]


def test_only_checks_that_failed_are_listed_with_the_report(golden: Report, open_stream: Open) -> None:
    check = Check(name="integer bytes that differ", value=3, limit=0, passed=False, detail="layer 7")
    broken = ArtifactChecks(artifact="export-1-quantize", checks=(check,))
    out = open_stream()
    console.print_report(
        golden.model_copy(update={"checks": (golden.checks[0], broken), "status": "failed", "error": "layer 7"})
    )
    text = words(out.text)
    assert "checks of export-0-source: all 10 passed" in text
    assert "integer bytes that differ FAILED 3 0 layer 7" in text
    assert text.endswith("failed: layer 7 " + headline(golden.model_copy(update={"status": "failed"})))


def test_checks_are_printed_with_value_and_limit(open_stream: Open) -> None:
    out = open_stream()
    check = Check(name="outputs 1×7", value=math.inf, limit=0.05, passed=False, detail="NaN")
    console.print_checks([ArtifactChecks(artifact="export-1-quantize", checks=(check,))])
    assert "outputs 1×7 FAILED inf 0.05 NaN" in words(out.text)


def test_an_inspection_lists_sizes_chain_and_layers(open_stream: Open) -> None:
    digest = digest_bytes(b"x")
    link = Link(name="0-source", format="torch", digest=digest, parameters=1234, weight_bytes=4936, made_by="loaded")
    layer = LayerRow(name="a.weight", shape=(2, 4), bits=8.5, sparsity=0.25, sqnr_db=None, note="kept in float")
    found = Inspection(
        source="models/x", task="causal-lm", architecture="Llama", parameters=1234, nonzero_parameters=1200,
        weight_bytes=4936,
        positions=None, layers=(layer,), chain=(link,), warnings=("holds NaN",),
    )  # fmt: skip
    out = open_stream()
    console.print_inspection(found, layers=True)
    text = words(out.text)
    for part in (
        "parameters 1,234",
        "weights 4.94 kB",
        "positions no table",
        "warning holds NaN",
        digest,
        "2×4 8.50 25.0% kept in",
    ):
        assert part in text
    assert "alone" not in text
    out = open_stream()
    felt = layer.model_copy(update={"sensitivity": 3.21e-5, "sensitivity_unit": "1 − cosine"})
    console.print_inspection(found.model_copy(update={"layers": (felt, layer)}), layers=True)
    assert "alone, 1 − cosine" in words(out.text)
    assert "3.2e-05" in out.text
    out = open_stream()
    console.print_inspection(found, layers=False)
    assert "a.weight" not in out.text


def test_a_stage_shows_what_stayed_in_float_and_what_lost_most(open_stream: Open, tmp_path: Path) -> None:
    def layer(name: str, **changes: Any) -> LayerRow:
        return LayerRow(
            **{
                "name": name,
                "shape": (2, 2),
                "bits": 8.0,
                "sparsity": 0.0,
                "sqnr_db": None,
                "note": "8 bits",
                **changes,
            }
        )

    layers = (
        layer("head", bits=32.0, note="kept in float: a head with 3 outputs decides the answer and saves nothing"),
        *(layer(f"layer.{n}", sqnr_db=40.0 + n) for n in range(8)),
        layer("gptq", output_sqnr_db=17.25, sqnr_db=3.0, sensitivity=0.01234, sensitivity_unit="nats per token"),
    )
    out = open_stream()
    console.print_layers(StageRecord(kind="quantize", settings={}, seconds=1.0, layers=layers, notes=()), tmp_path)
    text = words(out.text)
    assert "layers left in float (1) and least exact" in text
    assert "head kept in float: a head with 3 outputs" in text
    assert text.index("gptq 17.2 dB; 8 bits") < text.index("layer.0 40.0 dB") < text.index("layer.3 43.0 dB")
    assert "layer.4" not in text
    assert "most sensitive layer alone, nats per token bits note" in text
    assert text.rindex("gptq 0.012 8.00 8 bits") > text.index("most sensitive")


def test_a_pruned_model_shows_where_its_outputs_changed_most(open_stream: Open, tmp_path: Path) -> None:
    rows = tuple(
        LayerRow(name=f"layer.{n}", shape=(2, 2), bits=32, sparsity=0.5, sqnr_db=None, output_sqnr_db=n, note="half")
        for n in (9, 4)
    )
    out = open_stream()
    for layers in (rows, rows[:0]):
        console.print_layers(StageRecord(kind="prune", settings={}, seconds=1.0, layers=layers, notes=()), tmp_path)
    text = words(out.text)
    assert (
        text.index("matrices whose outputs changed most")
        < text.index("layer.4 4.0 dB; half")
        < text.index("layer.9 9.0 dB")
    )
    assert text.count("changed most") == 1


def explained(golden: Report) -> Report:
    """The golden report with what a later squeeze says of its stage."""
    first, second, *rest = golden.manifests
    assert second.record is not None
    points = tuple(CurvePoint(texts=n, held_out=64, sqnr_db=20.0 + n, kl=0.1 / n, same=0.5) for n in (4, 16))
    told = {"curve": points, "predicted_bytes": 2 * second.weight_bytes, "warnings": ("a bad choice. Drop it (log)",)}
    manifest = second.model_copy(update={"record": second.record.model_copy(update=told)})
    return golden.model_copy(update={"manifests": (first, manifest, *rest)})


def test_a_report_of_before_has_no_sizes_and_no_curve_and_one_of_now_has_both(
    golden: Report, open_stream: Open
) -> None:
    out = open_stream()
    console.print_report(golden)
    assert "as they came out" not in out.text
    out = open_stream()
    console.print_report(explained(golden))
    text = words(out.text)
    assert "1-quantize: error with more calibration texts, on 64 others" in text
    assert "4 24.0 dB 0.0250 nats 50.00 % 16 36.0 dB 0.00625 nats 50.00 %" in text
    assert "cosine" not in text.partition("error with more calibration texts")[2].partition("36.0 dB")[0]
    assert f"{MINUS}50.00 %" in text
    assert "warning: 1-quantize: a bad choice. Drop it (log)" in text
    assert "were computed beforehand" in text


def test_the_page_shows_the_curve_and_the_predicted_size(golden: Report) -> None:
    page = render_page(explained(golden)).replace("\u00a0", " ")
    assert "answers of copies quantized with so many" in page
    assert "0.00625 nats" in page
    assert "50.00 % less" in page
    assert "answers of copies quantized" not in render_page(golden)


def test_away_from_a_terminal_there_is_not_one_escape_sequence(golden: Report, open_stream: Open) -> None:
    out = open_stream()
    console.print_report(golden)
    assert "\x1b" not in out.text


def test_a_terminal_gets_colour_and_under_no_color_not_one_escape_sequence(
    golden: Report, open_stream: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = open_stream(terminal=True, columns=120)
    console.print_report(golden)
    assert "\x1b[31m" in out.text
    monkeypatch.setenv("NO_COLOR", "1")
    out = open_stream(terminal=True, columns=120)
    console.print_report(golden)
    assert "\x1b" not in out.text


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_broken(
    columns: int, golden: Report, open_stream: Open
) -> None:
    out = open_stream(terminal=True, columns=columns)
    console.print_report(golden)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.text)
    assert max(map(len, plain.splitlines())) <= columns
    for number in ("14.28", "2.72×", "no difference", "26.7 %"):
        assert number in plain


def test_a_table_too_wide_becomes_a_list_of_records(open_stream: Open) -> None:
    rows = [("latency, 1×128", "12.3 milliseconds", "4.56 milliseconds", "")]
    out = open_stream(columns=40)
    console.table("a run", ("", "before", "after", "note"), rows)
    assert out.text == "a run\nlatency, 1×128\n  before: 12.3 milliseconds\n  after: 4.56 milliseconds\n\n"


def test_a_table_without_rows_is_a_heading(open_stream: Open) -> None:
    out = open_stream()
    console.table("methods", ("kind", "name"), [])
    assert words(out.text).startswith("methods kind name")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_a_terminal_without_unicode_gets_every_table(encoding: str, golden: Report, open_stream: Open) -> None:
    out = open_stream(encoding=encoding)
    console.print_report(golden)
    assert re.search(r"2\.72[x×] faster \[2\.43, 3\.25\]", words(out.text))


def test_hostile_names_are_text_in_tables_messages_and_errors(open_stream: Open) -> None:
    out, err = open_stream("stdout", terminal=True, columns=200), open_stream("stderr", terminal=True)
    console.table(HOSTILE, (HOSTILE,), [(HOSTILE,)])
    console.message(HOSTILE)
    console.error(HOSTILE)
    assert re.sub(r"\x1b\[[0-9;]*m", "", out.text).count(SHOWN) == 3
    assert err.text == f"{SHOWN}\nerror: {SHOWN}\n"


def test_a_newline_in_a_name_does_not_break_its_row_but_a_message_may_have_lines(open_stream: Open) -> None:
    out, err = open_stream("stdout"), open_stream("stderr")
    console.table("t", ("name",), [("two\nlines",)])
    console.error("line 3: unknown key\nline 7: unknown key")
    assert "two\\nlines" in out.text
    assert err.text == "error: line 3: unknown key\nline 7: unknown key\n"


def test_a_path_that_is_not_unicode_is_shown_and_no_crash(open_stream: Open) -> None:
    err = open_stream("stderr")
    console.error("models/\udcff is missing")
    assert err.text == "error: models/\\udcff is missing\n"


def test_json_is_one_document_that_any_encoding_takes(open_stream: Open) -> None:
    out = open_stream(encoding="ascii")
    console.print_json({"value": math.inf, "name": "Größe ×"})
    assert json.loads(out.text) == {"value": "Infinity", "name": "Größe ×"}


def test_a_printed_report_reads_back(golden: Report, open_stream: Open, tmp_path: Path) -> None:
    out = open_stream()
    infinite = ArtifactChecks(artifact="x", checks=(Check(name="outputs", value=math.inf, limit=1, passed=False),))
    report = golden.model_copy(update={"checks": (infinite,)})
    console.print_json(report.model_dump(mode="json"))
    (tmp_path / "report.json").write_text(out.text, "utf-8")
    assert read_report(tmp_path / "report.json") == report


def test_progress_away_from_a_terminal_is_a_line_for_each_new_description(open_stream: Open) -> None:
    out, err = open_stream("stdout"), open_stream("stderr")
    with console.progress() as say:
        say("export", 0, 3)
        say("bench", 1, 3)
        say("bench", 2, 3)
    assert err.text == "[0/3] export\n[1/3] bench\n"
    assert out.text == ""


def test_a_loss_that_changes_is_no_line_for_each_step(open_stream: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    err = open_stream("stderr")
    monkeypatch.setattr(console, "PLAIN_SECONDS", 60.0)
    with console.progress() as say:
        for n in range(1, 50):
            say(f"distill 3 layers: loss {1 / n:.4g}, {n * 1000:,} tokens/s, 3e-05", n, 50)
        say("bench 0-source", 0, 2)
        say("bench 1-distill", 1, 2)
    assert err.text.splitlines() == [
        "[1/50] distill 3 layers: loss 1, 1,000 tokens/s, 3e-05", "[0/2] bench 0-source", "[1/2] bench 1-distill",
    ]  # fmt: skip
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    with console.progress() as say:
        say("loss 2", 1, 2)
        say("loss 1", 2, 2)
    assert err.text.endswith("[1/2] loss 2\n[2/2] loss 1\n")


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_progress_says_nothing(terminal: bool, open_stream: Open) -> None:
    err = open_stream("stderr", terminal=terminal)
    with console.progress(quiet=True) as say:
        say("export", 0, 3)
    assert err.text == ""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_progress_in_a_terminal_is_a_bar_on_stderr_that_leaves_stdout_alone(encoding: str, open_stream: Open) -> None:
    out, err = open_stream("stdout", terminal=True, columns=60), open_stream("stderr", terminal=True, encoding=encoding)
    with console.progress() as say:
        say("bench × " + HOSTILE, 1, 3)
        console.print_json({"printed": "meanwhile"})
        console.message("said meanwhile")
    assert json.loads(out.text) == {"printed": "meanwhile"}
    assert "1/3" in err.text
    assert "said meanwhile" in err.text
    assert "\x1b[31mred" not in err.text
    assert "\u202e" not in err.text


def test_an_error_inside_progress_comes_out_and_the_cursor_is_shown_again(open_stream: Open) -> None:
    err = open_stream("stderr", terminal=True, columns=60)

    def interrupted() -> None:
        with console.progress() as say:
            say("bench", 1, 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert err.text.rindex("\x1b[?25h") > err.text.rindex("\x1b[?25l")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = "from squeeze import console; console.print_json(list(range(10**6))); console.table('t', ('a',), [('b',)])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(1)
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 0


def test_importing_the_console_imports_neither_rich_nor_numpy_nor_jinja() -> None:
    code = "import squeeze.console, sys; print(sorted({'rich', 'numpy', 'jinja2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
