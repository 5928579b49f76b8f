"""The document as text: what it may do, what it holds, and what no parser may see in it."""

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squeeze.dashboard import page, view
from squeeze.dashboard.palette import CATEGORIES, DARK, LIGHT, THEMES

from .conftest import Make

Write = Callable[..., Path]
EMPTY = view.build([])


def policy(document: str) -> dict[str, list[str]]:
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', document)
    assert found is not None
    rules = [rule.split() for rule in html.unescape(found[1]).split(";")]
    return {name: allowed for name, *allowed in rules}


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_only_the_scripts_and_the_style_of_the_page_are_allowed() -> None:
    document = page.render(EMPTY, {})
    allowed = policy(document)
    assert allowed["default-src"] == ["'none'"]
    assert allowed["style-src"] == [digest(text) for text in re.findall(r"<style>(.*?)</style>", document, re.DOTALL)]
    assert allowed["script-src"] == [
        digest(text) for text in re.findall(r"<script>(.*?)</script>", document, re.DOTALL)
    ]
    assert len(allowed["script-src"]) == 3
    assert set(allowed) == {"default-src", "style-src", "script-src", "base-uri", "form-action"}


def test_a_file_asks_for_nothing_and_a_live_page_asks_its_own_server_alone() -> None:
    still, live = (page.render(EMPTY, {}, live=which) for which in (False, True))
    assert policy(live)["connect-src"] == ["'self'"]
    own = {
        which: re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[0]
        for which, text in (("still", still), ("live", live))
    }
    for word in ("EventSource", "fetch("):
        assert word in own["live"]
        assert word not in own["still"]
    assert re.findall(r'(?:src|href)="(?!#)[^"]*"', re.sub(r"<script.*?</script>", "", still, flags=re.DOTALL)) == []


def test_without_data_it_stays_under_two_megabytes() -> None:
    assert len(page.render(EMPTY, {}).encode()) < 2_000_000


@settings(max_examples=30, deadline=None)
@given(
    text=st.text(max_size=40)
    | st.sampled_from(["</script>", "<!--<script>", "]]>", "\u2028", "\ud800", "&quot;", "\x00"])
)
def test_no_text_can_end_the_script_element_or_change_on_the_way(text: str) -> None:
    document = page.render(
        EMPTY | {"title": text, "skipped": [{"file": text, "reason": text}]}, {"x": [{"note": text}]}
    )
    found = re.search(r'<script type="application/json" id="view">(.*?)</script>', document, re.DOTALL)
    assert found is not None
    assert not set(found[1]) & set("<>&\u2028\u2029")
    assert json.loads(found[1])["skipped"] == [{"file": text, "reason": text}]
    assert document.count("<script") == document.count("</script>") == 5


def test_the_title_is_escaped_and_shows_what_is_hidden() -> None:
    document = page.render(EMPTY | {"title": "<b>\u202e & co"}, {})
    assert "<title>&lt;b&gt;\\u202e &amp; co · squeeze</title>" in document


def test_packed_values_come_out_as_they_went_in_and_always_the_same() -> None:
    raw = {"a": [{"values": [0.1, 1e-300, -0.0], "unit": "s"}]}
    assert json.loads(gzip.decompress(base64.b64decode(page.packed(raw)))) == raw
    assert page.packed(raw) == page.packed(dict(raw))
    assert gzip.decompress(base64.b64decode(page.packed(raw)))[:1] == b"{"


def test_a_page_holds_the_values_of_every_measurement(make: Make, write: Write) -> None:
    report = make.full()
    document = write(report).read_text("utf-8")
    found = re.search(r'<script type="text/plain" id="raw">(.*?)</script>', document, re.DOTALL)
    assert found is not None
    ((_, held),) = json.loads(gzip.decompress(base64.b64decode(found[1]))).items()
    assert [tuple(m["values"]) for m in held] == [m.values for m in report.measurements]


def test_the_bundle_is_refused_where_it_would_end_its_own_script(monkeypatch: pytest.MonkeyPatch) -> None:
    import vl_convert

    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda *_: "'</SCRIPT>'")
    with pytest.raises(ValueError, match="would end its script element"):
        page._vega.__wrapped__()


def luminance(colour: str) -> float:
    """Of WCAG 2.2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


TEXTS = {
    "ink": ("paper", "card", "faint", "goodground"), "soft": ("paper", "card", "faint"), "good": ("paper", "card", "goodground"),
    "bad": ("paper", "card", "badground"), "warn": ("paper", "card", "warnground"),
}  # fmt: skip


@pytest.mark.parametrize("theme", THEMES)
def test_text_and_marks_stand_out_from_what_is_behind_them(theme: str) -> None:
    colours = THEMES[theme]
    faint: list[Any] = [(a, b) for a, behind in TEXTS.items() for b in behind if contrast(colours[a], colours[b]) < 4.5]
    faint += [name for name in (*CATEGORIES, "before", "after", "lost") if contrast(colours[name], colours["card"]) < 3]
    assert faint == []


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=list(THEMES))
def test_a_colour_can_be_found_by_its_value(colours: dict[str, str]) -> None:
    assert len(set(colours.values())) == len(colours)
