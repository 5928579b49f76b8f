"""Markdown that shows every name as text, as GitHub's rules render it."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from squeeze.report.markdown import LONGEST, escaped, escaped_lines, table, to_markdown
from squeeze.report.schema import ArtifactChecks, Check, Workload
from squeeze.report.text import visible

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "![](http://evil.example)",
    "a | b \\| c ` d",
    "<script>alert(1)</script>",
    "[ref]: http://evil.example",
    "[a][ref] <http://evil.example> http://evil.example www.evil.example me@evil.example mailto:me@evil.example",
    "# heading",
    "- item",
    "1. item",
    "> quote",
    "---",
    "```",
    "~~~ x",
    "**bold** _em_ ~~gone~~ `code`",
    "&lt;b&gt; &amp; &#60;b&#62;",
    "ends with a backslash \\",
    "line\nbreak\n\n# heading\n| a | b |",
    "@torvalds fixes #1, GH-2, owner/name#3 :tada:",
    "汉字 \u202egpj.exe \u2028 \x1b[31m",
)
TAGS = {
    "br", "code", "details", "h1", "h2", "h3", "hr", "li", "p", "pre", "strong", "sub", "summary", "table", "tbody", "td", "th", "thead",
    "tr", "ul",
}  # fmt: skip
"""What our own Markdown makes."""


class Seen(HTMLParser):
    """The tags and the text that a browser would make of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attributes))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cells:
            self.cells[-1] += data


def rendered(markdown: str) -> Seen:
    """As GitHub renders it before it cleans up: HTML allowed, tables, addresses linked."""
    return Seen(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(markdown))


def shown(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("\u200b", "")).strip()


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_shows_as_itself_in_a_paragraph_a_heading_an_item_and_a_cell(name: str) -> None:
    for frame in ("{}", "### {}", "- {}"):
        seen = rendered(frame.format(escaped(name)))
        assert {tag for tag, _ in seen.tags} <= {"p", "h3", "ul", "li"}
        assert shown(seen.text) == shown(visible(name))
    seen = rendered("\n".join(table(("a", name), [(name, "last")])))
    assert [shown(cell) for cell in seen.cells] == ["a", shown(visible(name)), shown(visible(name)), "last"]


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.sampled_from("<>[]()!|`*_~#-+=.:@\\&$\"' 1a\n/"), st.characters()), max_size=40))
def test_no_text_becomes_a_tag_a_cell_or_other_text(text: str) -> None:
    seen = rendered("\n".join(["before", "", f"- {escaped(text)}", "", *table(("a",), [(text,)])]))
    assert {tag for tag, _ in seen.tags} <= TAGS - {"code", "strong", "hr", "pre", "h1", "h2"}
    assert shown(seen.cells[1]) == shown(visible(text))


@pytest.mark.parametrize(
    "text", ["@octocat", "fixes #12", "see http://a.example/x", "www.a.example", "a@b.example", "GH-7", ":tada:"]
)
def test_what_sites_link_after_rendering_is_parted(text: str) -> None:
    assert "&#8203;" in escaped(text)
    assert shown(rendered(escaped(text)).text) == text


def test_lines_of_an_error_stay_lines() -> None:
    seen = rendered(escaped_lines("two faults:\n\n# a <b>\n- c"))
    assert [tag for tag, _ in seen.tags] == ["p", "br", "br"]
    assert shown(seen.text) == "two faults:# a <b>- c"


def hostile_report(make: Any) -> Any:
    manifests = (make.source, make.result.model_copy(update={"name": HOSTILE[0], "source": HOSTILE[1]}))
    rows = [make.measured(m, "latency", [0.2, 0.2, 0.2]) for m in manifests]
    rows += [make.measured(m, "correct", [1.0, 0.0] * 10) for m in manifests]
    rows.append(make.measured(manifests[1], "peak_memory", [], error=f"{HOSTILE[0]}\n{HOSTILE[2]}"))
    checks = (
        ArtifactChecks(
            artifact=HOSTILE[0], checks=(Check(name=HOSTILE[1], value=2, limit=1, passed=False, detail=HOSTILE[2]),)
        ),
    )
    return make.report(
        *rows,
        manifests=manifests,
        checks=checks,
        title=HOSTILE[2],
        notes=HOSTILE,
        recipe={HOSTILE[0]: [*HOSTILE, "````"]},
    )


def test_a_report_full_of_hostile_names_renders_no_tag_but_ours_and_says_each_as_text(make: Any) -> None:
    seen = rendered(to_markdown(hostile_report(make)))
    assert {tag for tag, _ in seen.tags} <= TAGS
    assert {value for _, attributes in seen.tags for name, value in attributes} <= {"language-json"}
    for name in HOSTILE[:3]:
        assert shown(seen.text).count(name) >= 2


def test_the_verdict_table_has_the_words_and_bounds_of_the_summary(make: Any) -> None:
    text = to_markdown(make.pair("latency", [2, 2, 2], [1, 1, 1]))
    cells = [shown(cell) for cell in rendered(text).cells]
    assert cells[:5] == ["", "before (export-0-source)", "after (export-1-quantize)", "change", "measured"]
    assert cells[5:10] == [
        "latency, 1×128",
        "2.00 s",
        "1.00 s",
        "2.00× faster [2.00, 2.00]",
        "onnxruntime, 3 repeats ±0.0 % → ±0.0 %",
    ]
    row = cells[cells.index("export-1-quantize") :][:7]
    assert row[-1].startswith("2.00× faster [2.00, 2.00] (latency, 1×128).")


def test_of_a_loads_percentiles_the_last_is_shown_and_the_others_are_folded(make: Any) -> None:
    load, repeat = Workload(kind="closed", batch=1, callers=2), (0, 0, 1, 1, 2, 2)
    sides = ((make.source, 0.2), (make.result, 0.1))
    rows = [make.measured(m, "request_latency", [t, 2 * t] * 3, workload=load, repeat=repeat) for m, t in sides]
    text = to_markdown(make.report(*rows))
    above, _, below = text.partition("<details><summary>Before and after, with all percentiles</summary>")
    assert "request p99" in above
    assert "request p50" not in above
    assert all(f"| request p{n}" in below.partition("</details>")[0] for n in (50, 90, 95, 99))


def test_what_failed_is_named_with_its_reason_and_an_artifact_that_was_not_measured_is_said_to_be_so(make: Any) -> None:
    failed = make.measured(make.result, "latency", [], error="killed by SIGKILL (out of memory?)")
    report = make.report(make.measured(make.source, "latency", [1.0]), failed)
    seen = rendered(to_markdown(report))
    assert "latency, 1×128 of export-1-quantize in onnxruntime, cpu: killed by SIGKILL (out of memory?)" in shown(
        seen.text
    )
    alone = rendered(to_markdown(make.report(make.measured(make.result, "latency", [1.0]))))
    assert "Not measured." in map(shown, alone.cells)
    broken = rendered(to_markdown(make.report(status="failed", error="export-1 failed 1 of 4 checks")))
    assert "the run: export-1 failed 1 of 4 checks" in shown(broken.text)


def test_recipe_and_environment_are_folded_and_whole(make: Any) -> None:
    text = to_markdown(make.report(recipe={"name": "x", "stages": [{"kind": "quantize"}]}))
    assert "<details><summary>Recipe as run</summary>\n\n```json\n{\n" in text
    assert '"kind": "quantize"' in text
    assert '"cpu_flags"' in text
    assert text.count("<details>") == text.count("</details>") == 2


def test_a_comment_stays_within_what_github_takes_and_says_what_it_left_out(make: Any) -> None:
    rows = [make.measured(make.result, f"quantity {n}", [1.0], workload=None) for n in range(3000)]
    failed = [make.measured(make.result, f"other {n}", [], workload=None) for n in range(300)]
    text = to_markdown(make.report(*rows, *failed))
    assert len(text) < LONGEST + 200
    assert "Left out, because GitHub takes 65,536 characters: All cells." in shown(rendered(text).text)
    assert "and 180 more, in the report" in shown(rendered(text).text)
