"""Numbers and hostile names as text."""

import json
import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squeeze.report.text import amount, count, decimals_for, encodable, figures, json_text, percent, times, visible


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("model.onnx", "model.onnx"),
        ("naïve Größe 模型 🤗", "naïve Größe 模型 🤗"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("exe.\u202egpj", "exe.\\u202egpj"),
        ("a\u2066b\u2069\u200f", "a\\u2066b\\u2069\\u200f"),
        ("two\nlines\r\t", "two\\nlines\\r\\t"),
        ("\u2028\u0085\x7f\x00", "\\u2028\\x85\\x7f\\x00"),
        ("lone \udc80 surrogate", "lone \\udc80 surrogate"),
        ("नर्\u200dस 👩\u200d💻", "नर्\u200dस 👩\u200d💻"),
    ],
)
def test_characters_that_act_are_shown_as_codes_and_others_as_themselves(name: str, shown: str) -> None:
    assert visible(name) == shown


def test_line_breaks_stay_where_they_are_meant() -> None:
    assert visible("one\ntwo\x1b", lines=True) == "one\ntwo\\x1b"


@given(st.text())
def test_nothing_visible_can_steer_a_terminal(text: str) -> None:
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or 0x202A <= ord(c) <= 0x202E for c in visible(text))


@given(st.text(), st.sampled_from(["ascii", "latin-1", "cp437", "utf-8", "shift_jis"]))
def test_what_is_encodable_encodes(text: str, encoding: str) -> None:
    encodable(visible(text), encoding).encode(encoding)


def test_a_terminal_without_unicode_gets_stand_ins() -> None:
    assert encodable("2.72× → ±3 − 模", "ascii") == "2.72x -> +-3 - \\u6a21"
    assert encodable("2.72×", "latin-1") == "2.72×"
    assert encodable("2.72×", None) == "2.72x"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.0123, "0.0123"),
        (1.5, "1.50"),
        (139.005, "139"),
        (1234567, "1,234,567"),
        (-0.5, "−0.500"),
        (math.inf, "inf"),
    ],
)
def test_figures_keep_three_digits_and_never_an_exponent(value: float, shown: str) -> None:
    assert figures(value) == shown


@given(st.floats(1e-9, 1e12))
def test_three_figures_are_within_half_a_per_cent(value: float) -> None:
    assert float(Decimal(figures(value).replace(",", ""))) == pytest.approx(value, rel=0.0051)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.0123, "s", "12.3 ms"), (129.4, "s", "129 s"), (2e-7, "s", "0.200 µs"), (538090408.0, "bytes", "538 MB"),
        (1.25e9, "bytes", "1.25 GB"), (0.0, "bytes", "0 bytes"), (138.6, "tokens/s", "139 tokens/s"),
        (0.5, "", "0.500"),
    ],
)  # fmt: skip
def test_amounts_have_the_unit_that_fits(value: float, unit: str, shown: str) -> None:
    assert amount(value, unit).replace("\u00a0", " ") == shown


def test_ratios_shares_and_counts_in_words() -> None:
    assert [times(v) for v in (0.5, 2.7186, 12.34, 700.2)] == ["0.50×", "2.72×", "12.3×", "700×"]
    assert [percent(v, 1).replace("\u00a0", " ") for v in (0.3729, -0.0001, -0.5)] == ["37.3 %", "0.0 %", "−50.0 %"]
    assert [decimals_for(v) for v in (0.25, 0.0158, 0.00041, 0.0, 1e-9)] == [1, 1, 3, 2, 3]
    assert [count(1, "repeat"), count(3000, "example"), count(2, "quantity", "quantities")] == [
        "1 repeat",
        "3,000 examples",
        "2 quantities",
    ]


def test_infinity_is_written_as_reports_hold_it() -> None:
    text = json_text({"a": [math.inf, -math.inf, (math.nan, 1.5)], "ü": "×"})
    assert text == '{"a":["Infinity","-Infinity",["NaN",1.5]],"\\u00fc":"\\u00d7"}'
    assert json.loads(text)["ü"] == "×"
