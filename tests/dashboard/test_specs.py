"""Every chart compiles and draws a mark for each of its rows, whatever names and however many rows there are."""

import re
from collections.abc import Callable, Iterator
from typing import Any
from xml.etree import ElementTree

import pytest
import vl_convert

from squeeze.dashboard import drawings, images, view
from squeeze.dashboard.palette import THEMES
from squeeze.dashboard.specs import CHARTS, VEGA_LITE
from squeeze.dashboard.themes import BACKGROUNDS, CONFIGS, SENSES
from squeeze.provenance import digest_bytes
from squeeze.report.schema import Workload

HOSTILE = ("<img src=x onerror=alert(1)>", "量化模型", "مضغوط \u202eexe.jpg", "a'b\"c\\d|e.f[0]</script>")
"""Markup, Chinese, right to left, and every character that an expression or a path gives a meaning."""
PATHS = {"path", "line", "text", "rect", "image"}


@pytest.fixture(scope="module")
def full(make: Any) -> dict[str, Any]:
    """A view in which every chart has rows."""
    second = make.full(faster=3.0, started="2026-11-25T00:00:00+00:00")
    return view.build([view.Source("0" * 12, "a", make.full()), view.Source("1" * 12, "b", second)])


def renamed(report: Any, names: tuple[str, ...]) -> Any:
    """The report with other names for its artifacts."""
    manifests, digests = [], {}
    for number, manifest in enumerate(report.manifests):
        parent = digests.get(manifest.parent, manifest.parent)
        manifests.append(
            manifest.model_copy(update={"name": names[number % len(names)] + str(number), "parent": parent})
        )
        digests[manifest.digest] = manifests[-1].digest
    called = {m.digest: m.name for m in manifests}

    def moved(row: Any) -> Any:
        digest = digests[row.artifact_digest]
        return row.model_copy(update={"artifact": called[digest], "artifact_digest": digest})

    return report.model_copy(update={
        "manifests": tuple(manifests), "measurements": tuple(map(moved, report.measurements)), "costs": tuple(map(moved, report.costs)),
        "profiles": tuple(map(moved, report.profiles)),
    })  # fmt: skip


def drawn(found: dict[str, Any]) -> Iterator[tuple[str, str, list[dict[str, Any]], dict[str, Any]]]:
    """(kind, variant, rows, complete specification) of everything that can be drawn of a view's first report and its history."""
    report = found["reports"][0]
    for kind, variants in report["rows"].items():
        for name, rows in variants.items():
            yield kind, name, rows, images.drawn(found, report["id"], kind, name)
    for name in dict.fromkeys(row["variant"] for row in found["history"]):
        rows = [row for row in found["history"] if row["variant"] == name]
        yield "history", name, rows, images.drawn(found, None, "history", name)


def marks(svg: str) -> dict[str, int]:
    """Layer -> elements drawn for it."""
    found: dict[str, int] = {}
    for group in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g"):
        named = re.search(r"role-mark (?:concat_\d+_)?(\w+)_marks", group.get("class", ""))
        if named:
            shapes = [one for one in group if one.tag.rpartition("}")[2] in PATHS]
            found[named[1]] = found.get(named[1], 0) + len(shapes)
    return found


def passes(test: str, row: dict[str, Any]) -> bool:
    """A layer's filter, for those few forms that layers use."""
    if known := re.fullmatch(r"(!?)isValid\(datum\.(\w+)\)", test):
        return (row.get(known[2]) is not None) != (known[1] == "!")
    if mark := re.fullmatch(r"datum\.mark (===|!==) '(\w+)'", test):
        return (row["mark"] == mark[2]) == (mark[1] == "===")
    return bool(row[re.fullmatch(r"datum\.(\w+)", test)[1]])  # type: ignore[index]


def expected(spec: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, int]:
    """Layer -> marks that its rows ask for: one each, for a line one for each series."""
    found = {}
    for layer in spec["layer"]:
        chosen = [row for row in rows if all(passes(step["filter"], row) for step in layer.get("transform", ()))]
        if "data" in layer:
            found[layer["name"]] = 1
        elif layer["mark"]["type"] == "line":
            found[layer["name"]] = len({row["series"] for row in chosen})
        else:
            found[layer["name"]] = len(chosen)
    return {name: number for name, number in found.items() if number}


def check(found: dict[str, Any]) -> set[str]:
    """Compile and count everything; the kinds that were seen."""
    seen = set()
    for kind, name, rows, spec in drawn(found):
        svg = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)
        assert {n: k for n, k in marks(svg).items() if k} == expected(spec, rows), (kind, name)
        seen.add(kind)
    return seen


def test_every_variant_of_every_chart_draws_a_mark_for_each_row(full: dict[str, Any]) -> None:
    assert check(full) == set(CHARTS)


def test_hostile_names_are_drawn_as_they_read_and_nothing_else_changes(make: Any, full: dict[str, Any]) -> None:
    found = view.build([view.Source("0" * 12, "a", renamed(make.full(), HOSTILE))])
    check(found)
    svg = images.picture(found, None, "pareto", None, "svg").decode("utf-8")
    text = " ".join("".join(one.itertext()) for one in ElementTree.fromstring(svg).iter() if one.tag.endswith("text"))
    assert "<img src=x onerror=alert(1)>0" in text
    assert "量化模型1" in text
    assert "<img" not in svg
    assert set(found["reports"][0]["rows"]) == set(full["reports"][0]["rows"])


def test_one_measurement_alone_is_drawn(make: Any) -> None:
    source = make.manifest("0-source")
    work = Workload(kind="fixed", batch=1, sequence=8)
    found = view.build(
        [view.Source("0" * 12, "a", make.report((source,), (make.measured(source, "latency", [0.01], workload=work),)))]
    )
    check(found)
    assert [row["mark"] for row in found["reports"][0]["rows"]["latency"]["latency, 1×8"]] == [
        "value",
        "p50",
        "p95",
        "p99",
    ]


def test_ten_thousand_measurements_are_drawn_each(make: Any) -> None:
    manifests = [make.manifest(f"m{n}", inputs=digest_bytes(str(n).encode())) for n in range(100)]
    works = [Workload(kind="fixed", batch=1, sequence=n + 1) for n in range(99)]
    rows = [
        *(make.measured(m, "weight_bytes", [1000.0 + n], unit="bytes", repeat=()) for n, m in enumerate(manifests)),
        *(
            make.measured(m, "latency", [0.001 * (n + 1)] * 2, workload=w)
            for n, m in enumerate(manifests)
            for w in works
        ),
    ]
    found = view.build([view.Source("0" * 12, "a", make.report(manifests, rows))])
    report = found["reports"][0]
    assert len(report["cells"]) == 10_000
    assert [cell["id"] for cell in report["cells"]] == list(range(10_000))
    assert len(report["rows"]["latency"]) == 99
    assert all(sum(row["mark"] == "value" for row in part) == 200 for part in report["rows"]["latency"].values())
    spec = images.drawn(found, None, "latency", "latency, 1×7")
    assert marks(vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)) == {"lines": 100, "percentiles": 300}


def test_a_chart_without_rows_still_compiles(full: dict[str, Any]) -> None:
    for chart in full["charts"].values():
        for spec in chart["variants"].values():
            empty = {**spec, "width": 300, "data": {"name": "rows", "values": []}, "config": CONFIGS["dark"]}
            vl_convert.vegalite_to_vega(empty, vl_version=VEGA_LITE)


def test_specifications_name_no_colour_and_no_data_of_their_own(full: dict[str, Any]) -> None:
    def strings(content: Any) -> Iterator[str]:
        if isinstance(content, dict):
            for value in content.values():
                yield from strings(value)
        elif isinstance(content, list):
            for value in content:
                yield from strings(value)
        elif isinstance(content, str):
            yield content

    for chart in full["charts"].values():
        for spec in chart["variants"].values():
            assert spec["data"] == {"name": "rows"}
            assert spec["title"] is None
            assert spec["width"] == "container"
            assert not [
                text for text in strings(spec) if re.fullmatch(r"#[0-9a-fA-F]{3,8}|(rgb|hsl).*|black|white", text)
            ]


def test_every_layer_has_a_name_and_every_column_is_a_field_of_some_row(full: dict[str, Any]) -> None:
    for kind, _, rows, spec in drawn(full):
        assert len({layer["name"] for layer in spec["layer"]}) == len(spec["layer"])
        fields = {field for row in rows for field in row}
        assert not [field for field in fields if re.search(r"[.\[\]]", field)]
        missing = {field for field, _ in CHARTS[kind].columns} - fields
        assert not missing, (kind, missing)


def test_numbers_of_an_axis_read_as_texts_do(make: Any, full: dict[str, Any]) -> None:
    rows = [
        {"mark": "value", "series": "a", "x": x, "y": y, "text": "", "note": ""} for x, y in ((0.0005, 0.5), (2.0, 1.0))
    ]
    chart = full["charts"]["latency"]
    spec = next(iter(chart["variants"].values()))
    svg = vl_convert.vegalite_to_svg(
        {**spec, "width": 600, "data": {"name": "rows", "values": rows}, "config": CONFIGS["light"]},
        vl_version=VEGA_LITE,
    )
    shown = {one.text for one in ElementTree.fromstring(svg).iter() if one.tag.endswith("text")}
    assert {"1\u00a0s", "10\u00a0ms", "50\u00a0%", "100\u00a0%"} <= shown


@pytest.mark.parametrize("theme", sorted(THEMES))
def test_marks_and_words_stand_out_from_the_background(theme: str) -> None:
    against = _luminance(BACKGROUNDS[theme])

    def contrast(colour: str) -> float:
        high, low = sorted((_luminance(colour), against), reverse=True)
        return (high + 0.05) / (low + 0.05)

    config = CONFIGS[theme]
    assert min(map(contrast, [*config["range"]["category"], *config["range"]["sense"]])) >= 3
    assert (
        min(
            map(
                contrast,
                [
                    config["text"]["color"],
                    config["axis"]["labelColor"],
                    config["legend"]["labelColor"],
                    config["title"]["color"],
                ],
            )
        )
        >= 4.5
    )
    assert len(SENSES) == len(drawings.SENSES) == len(drawings.SHAPES)


def _luminance(colour: str) -> float:
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear: Callable[[float], float] = lambda v: v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4  # noqa: E731
    return sum(weight * linear(part) for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
