"""A report as Markdown, for pull requests and wikis: the verdict first, everything that backs it folded below.

Everything in a report is foreign text. `escaped` is the one way in: what it returns shows as the same text under CommonMark and
GitHub's tables, whatever it holds. Tags become entities, marks get a backslash, and what GitHub and GitLab link after rendering
(mentions, issues, bare addresses), where no escape helps, is parted by a zero-width space, as Renovate does. Rejected: code spans
around every name (no table and no heading is readable any more), and a Markdown library (they read Markdown; none writes it).
"""

import re
from collections.abc import Container, Iterable, Iterator, Sequence

from squeeze.report.artifact_verdict import verdict_of
from squeeze.report.explained import stage_label
from squeeze.report.headline import headline
from squeeze.report.noise import warnings
from squeeze.report.schema import Manifest, Report
from squeeze.report.summary import cells, ends, label, names, pivot, shared_where, summarize
from squeeze.report.text import amount, count, json_text, percent, visible
from squeeze.report.training import training_table, training_words

MARKS = frozenset("\\`*_[]~$#")
"""What begins or ends something inside a line."""
LEADING = re.compile(r"\d+(?=[.)](?:\s|$))|(?=[-+](?:\s|$))|(?=[-=]+$)")
"""Up to the mark of a list's item, a rule or an underline at the start of a line."""
LINKED = re.compile(
    r"(?<=[@#])(?=\w)|(?<=:)(?=//)|(?<=www)(?=\.)|(?<=mailto)(?=:)|(?<=xmpp)(?=:)|(?<=GH)(?=-\d)|(?<=:)(?=[\w+-]+:)", re.IGNORECASE
)  # fmt: skip
"""Where a space of no width keeps text from becoming a link or an emoji: after @ and #, inside addresses, after a colon."""
PLACE = "\0"
"""Stands for that space until the rest is escaped; `visible` lets no such character through."""
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", PLACE: "&#8203;"}
MOST_FAILURES, MOST_WARNINGS = 12, 8
"""Shown before the rest is folded."""
ASIDE = ("request_p50", "request_p90", "request_p95")
"""Not in the table that everybody sees; the 99th percentile of each load is."""
LONGEST = 64_000
"""GitHub refuses a comment of more than 65,536 characters."""
TOLD = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "torch", "transformers")
"""Packages whose versions stand beside the machine; all of them are folded below."""


def to_markdown(report: Report) -> str:
    """The whole report in the order in which a reviewer asks: what came of it, in figures, what failed, on what machine, of what recipe."""
    parts = [
        [f"### {escaped(report.title)}"],
        [escaped(headline(report))],
        verdict_table(report, without=ASIDE),
        artifact_table(report),
        failures(report),
        warned(report),
        [f"<sub>{measured_on(report)}</sub>"],
    ]
    return joined(parts, folded(report))


def joined(parts: Iterable[Sequence[str]], folds: Iterable[tuple[str, list[str]]]) -> str:
    """Parts in order, then what is folded as far as GitHub takes it; what is left out for that is named."""
    text, left = "\n\n".join("\n".join(part) for part in parts if part) + "\n", []
    for summary, lines in folds:
        more = "\n" + "\n".join(_details(summary, lines)) + "\n"
        if len(text) + len(more) > LONGEST:
            left.append(summary)
        else:
            text += more
    if left:
        text += f"\n{escaped('Left out, because GitHub takes 65,536 characters: ' + ', '.join(left))}.\n"
    return text


def verdict_table(report: Report, without: Container[str] = ()) -> list[str]:
    """Before and after, with intervals, `without` some quantities; no lines where nothing was measured."""
    rows = [row for row in summarize(report) if row.quantity not in without]
    if not rows:
        return []
    before, after = ends(report)
    where = shared_where(rows)
    columns = ("", f"before ({before})", f"after ({after})", "change", "measured")
    if before == after:
        columns = ("", "before", after, "change", "measured")
    return table(columns, [(r.label, r.before.text, r.after.text, r.verdict, r.measured(where)) for r in rows])


def artifact_table(report: Report) -> list[str]:
    """A line for each artifact: what made it, what it holds, what its checks said."""
    checked = {group.artifact: group for group in report.checks}
    rows, called = [], names(report)
    for manifest in report.manifests:
        group = checked.get(manifest.name)
        passed = "" if group is None else f"{sum(c.passed for c in group.checks)} of {len(group.checks)} passed"
        rows.append(
            (called[manifest.digest], made_by(manifest), *_sizes(manifest), passed, verdict_of(report, manifest)[0])
        )
    columns = ("artifact", "made by", "parameters", "zeros", "weights", "checks", "against the source")
    return table(columns, rows) if rows else []


def made_by(manifest: Manifest) -> str:
    """The stage, or the model that was found."""
    return f"source: {manifest.source}" if manifest.record is None else stage_label(manifest.record)


def failures(report: Report) -> list[str]:
    """Everything that failed, by name and with its reason."""
    said = [f"the run: {report.error}"] if report.error else []
    for group in report.checks:
        said += [
            f"check {c.name} of {group.artifact}: {c.value:.4g} is over {c.limit:.4g}{f' ({c.detail})' if c.detail else ''}"
            for c in group.checks
            if not c.passed
        ]
    said += [
        f"{label(m)} of {m.artifact} in {m.runtime}, {m.device}: {m.error}" for m in report.measurements if m.error
    ]
    if not said:
        return []
    more = _folded_list(list(dict.fromkeys(said)), MOST_FAILURES)
    return ["**Failed**", "", *more]


def warned(report: Report) -> list[str]:
    """What to distrust, each with what to do about it, and the notes of the run."""
    said = [*(f"warning: {text}" for text in warnings(report)), *(f"note: {text}" for text in report.notes)]
    return _folded_list(said, MOST_WARNINGS)


def measured_on(report: Report) -> str:
    """When, on what machine and with which versions, in a line; its values escaped."""
    found = report.environment
    versions = [f"{name} {version}" for name, version in found.packages.items() if name in TOLD]
    parts = (
        report.started[:16].replace("T", " "), f"took {amount(report.seconds, 's')}", found.cpu, count(found.cores, "core"),
        found.cuda or "", f"squeeze {found.squeeze}", f"commit {found.git[:12]}" if found.git else "", *versions,
    )  # fmt: skip
    return " · ".join(escaped(part) for part in parts if part)


def folded(report: Report) -> Iterator[tuple[str, list[str]]]:
    """(line to be clicked, what lies behind it) of what is left aside above, the recipe, the environment, trainings and all cells."""
    if any(row.quantity in ASIDE for row in summarize(report)):
        yield "Before and after, with all percentiles", verdict_table(report)
    yield "Recipe as run", code(json_text(report.recipe, indent=2))
    yield "Environment", code(json_text(report.environment.model_dump(mode="json"), indent=2))
    for manifest in report.manifests:
        curve = manifest.record.training if manifest.record is not None else None
        if curve is not None and curve.steps:
            words = [f"{escaped(training_words(curve))}.", "", *table(*training_table(curve))]
            yield f"Training of {manifest.name}", words
    if every := cells(report):
        yield "All cells", table(*pivot(every))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of GitHub's Markdown; every cell is escaped."""
    lines = ["| " + " | ".join(escaped(name) for name in columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(escaped(cell) for cell in row) + " |" for row in rows)]


def code(text: str) -> list[str]:
    """A block of code, in a fence longer than any inside it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}json", *(visible(line) for line in text.splitlines()), fence]


def escaped(text: str) -> str:
    """Text in one line that any Markdown shows as it is: nothing in it is a tag, a link, a mark, a cell's end or a mention."""
    plain = LINKED.sub(PLACE, visible(text).strip())
    begins = LEADING.match(plain)
    place = -1 if begins is None else begins.end()
    shown = (f"\\{c}" if c in MARKS or n == place else ENTITIES.get(c, c) for n, c in enumerate(plain))
    return "".join(shown)


def escaped_lines(text: str) -> str:
    """Text whose line breaks are meant, such as an error with a line for each fault, within one item."""
    return "<br>".join(escaped(line) for line in visible(text, lines=True).splitlines() if line.strip())


def _folded_list(said: Sequence[str], most: int) -> list[str]:
    """A list, what is beyond `most` behind a line to be clicked, and beyond ten times as many only counted."""
    items = [f"- {escaped_lines(text)}" for text in said[: 10 * most]]
    if len(said) <= most:
        return items
    beyond = [f"- and {len(said) - 10 * most} more, in the report"] if len(said) > 10 * most else []
    return [*items[:most], "", *_details(f"{len(said) - most} more", [*items[most:], *beyond])]


def _sizes(manifest: Manifest) -> tuple[str, str, str]:
    zeros = manifest.parameters - manifest.nonzero_parameters
    share = percent(zeros / manifest.parameters, 1) if manifest.parameters and zeros > 0 else ""
    return f"{manifest.parameters:,}" if manifest.parameters else "", share, amount(manifest.weight_bytes, "bytes")


def _details(summary: str, lines: Sequence[str]) -> list[str]:
    """Lines behind a line to be clicked; the empty lines around them are what lets Markdown inside be read, the first line is HTML."""
    shown = "".join(ENTITIES.get(c, c) for c in LINKED.sub(PLACE, visible(summary)))
    return [f"<details><summary>{shown}</summary>", "", *lines, "", "</details>"]
