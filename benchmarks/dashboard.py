"""How long the dashboard takes to open, and how it looks: Chromium opens it as a reader does.

    python benchmarks/dashboard.py RESULTS... [--opens 5] [--shots docs --report TITLE]

Three pages are opened, each so many times in a fresh browser: one without data, the one of RESULTS, and one with 10,000 measurements of
100 artifacts. Counted from the start of the navigation, on the browser's own clock: until it can be used (tables drawn, every button
listens) and until the first chart stands. Appends one line for each page to benchmarks/results/<machine>/dashboard.jsonl. With --shots,
pictures of the page of RESULTS are written instead of times: desktop, dark, phone, and the page as it is printed, all of the newest
report that has the title.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, when run as a file

from playwright.sync_api import sync_playwright

from benchmarks.store import machine
from squeeze.dashboard import page, view
from squeeze.provenance import digest_bytes, environment
from squeeze.report.schema import Manifest, Measurement, Report, Workload

ROOT = Path(__file__).resolve().parent.parent
ARTIFACTS, REPEATS = 100, 10
SHOTS: dict[str, dict[str, Any]] = {
    "dashboard": {"viewport": {"width": 1360, "height": 1900}},
    "dashboard-dark": {"viewport": {"width": 1360, "height": 1900}, "color_scheme": "dark"},
    "dashboard-phone": {"viewport": {"width": 390, "height": 1300}, "device_scale_factor": 2},
}


def main() -> None:
    """Time the three pages, or take the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="reports, run folders or results folders")
    parser.add_argument("--opens", type=int, default=5, help="of each page (%(default)s)")
    parser.add_argument("--shots", type=Path, help="folder for pictures; no times are taken")
    parser.add_argument("--report", help="title of the report that pictures show; none: the newest")
    parser.add_argument("--machine", default=machine(), help="folder under benchmarks/results (%(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.shots:
            sources, _ = view.collect(given.results)
            shown = [source.id for source in sources if given.report in (None, source.report.title)]
            if not shown:
                sys.exit(
                    f"No report has the title {given.report}. There are: {', '.join(s.report.title for s in sources)}."
                )
            shoot(f"{written(Path(folder), given.results).as_uri()}#report={shown[-1]}", given.shots)
            return
        target = ROOT / "benchmarks" / "results" / given.machine / "dashboard.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        for name, results in (("no data", ()), ("results", given.results), ("10,000 measurements", None)):
            started = time.monotonic()
            path = written(Path(folder), results)
            line = {"page": name, "bytes": path.stat().st_size, "build_seconds": round(time.monotonic() - started, 1)}
            line |= timed(path, given.opens, charts=name != "no data")
            line |= {"cpu": environment().cpu, "cores": environment().cores, "squeeze": environment().git}
            with target.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def written(folder: Path, results: tuple[Path, ...] | list[Path] | None) -> Path:
    """The page of some results, or of the large report."""
    if results is None:
        sources, skipped = [view.Source("0" * 12, "large.json", large())], []
    else:
        sources, skipped = view.collect(results) if results else ([], [])
    path = folder / "dashboard.html"
    path.write_text(page.render(view.build(sources, skipped), view.raw_values(sources)), "utf-8")
    return path


def timed(path: Path, opens: int, *, charts: bool) -> dict[str, Any]:
    """Medians and raw values, in seconds; a browser of its own each time, so that no compiled script is left over."""
    ready, drawn = [], []
    for _ in range(opens):
        with opened(path.as_uri(), viewport={"width": 1280, "height": 900}) as tab:
            ready.append(until(tab, "window.squeezeReady") / 1000)
            if charts:
                tab.evaluate("document.querySelector('figure[data-kind]').scrollIntoView({behavior: 'instant'})")
                drawn.append(until(tab, "window.squeezeDrawn") / 1000)
            browser = tab.context.browser.version
    found: dict[str, Any] = {
        "ready_seconds": round(median(ready), 3),
        "ready": [round(v, 3) for v in ready],
        "browser": browser,
    }
    return found | ({"drawn_seconds": round(median(drawn), 3), "drawn": [round(v, 3) for v in drawn]} if charts else {})


def shoot(address: str, folder: Path) -> None:
    """Pictures of the top of the page, charts drawn, and the printed page."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, options in SHOTS.items():
        with opened(address, **options) as tab:
            until(tab, "window.squeezeDrawn")
            tab.wait_for_timeout(1500)
            tab.screenshot(path=folder / f"{name}.png")
            if name == "dashboard":
                tab.pdf(path=folder / "dashboard.pdf", prefer_css_page_size=True)


@contextmanager
def opened(address: str, **options: Any) -> Iterator[Any]:
    """The page in a browser of its own."""
    found = os.environ.get("SQUEEZE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        sys.exit("No Chromium on the PATH; set SQUEEZE_CHROMIUM.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        tab = browser.new_context(**options).new_page()
        tab.goto(address)
        yield tab
        browser.close()


def until(tab: Any, expression: str) -> float:
    """The expression's value, once it has one. The page forbids evaluating text, so it is asked from outside."""
    for _ in range(2400):
        if found := tab.evaluate(f"() => {expression}"):
            return float(found)
        tab.wait_for_timeout(25)
    raise TimeoutError(f"{expression} did not come true within a minute.")


def large() -> Report:
    """100 artifacts of 100 measurements: a latency for each of 99 lengths, and a size."""
    here = environment()
    manifests = tuple(
        Manifest(
            name=f"{number}-quantize", format="onnx", task="causal-lm", source="models/x", files={}, parent=None, record=None, data={},
            parameters=1000, nonzero_parameters=1000, weight_bytes=1000 + number, inputs=digest_bytes(str(number).encode()),
            environment=here, created="2026-11-24T00:00:00+00:00", extra={},
        )
        for number in range(ARTIFACTS)
    )  # fmt: skip
    return Report(
        title="ten thousand", recipe={}, manifests=manifests, checks=(), environment=here, started="2026-11-24T00:00:00+00:00",
        seconds=1.0, notes=(), status="ok", error=None,
        measurements=tuple(m for number, manifest in enumerate(manifests) for m in _measured(manifest, number)),
    )  # fmt: skip


def _measured(manifest: Manifest, number: int) -> Iterator[Measurement]:
    shared: dict[str, Any] = {
        "artifact": manifest.name, "artifact_digest": manifest.digest, "runtime": "onnxruntime", "device": "cpu", "threads": 2,
    }  # fmt: skip
    yield Measurement(quantity="weight_bytes", unit="bytes", values=(1000.0 + number,), workload=None, **shared)
    for length in range(1, 100):
        values = tuple(1e-5 * length * (1 + number / 100) * (1 + 0.01 * (n % 4)) for n in range(REPEATS))
        work = Workload(kind="fixed", batch=1, sequence=length)
        yield Measurement(
            quantity="latency", unit="s", values=values, workload=work, repeat=tuple(range(REPEATS)), **shared
        )


if __name__ == "__main__":
    main()
