"""A browser, and a small report that gives every chart something to draw, with names that would do harm if anything ran them."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from squeeze.dashboard import page, view
from squeeze.provenance import digest_bytes, environment
from squeeze.report.schema import (
    Bandwidth,
    Ceilings,
    Cost,
    LayerRow,
    Manifest,
    Measurement,
    Profile,
    ProfileRow,
    Report,
    StageRecord,
    Workload,
)
from squeeze.report.training import TrainingCurve, Validation

KINDS = ("pareto", "gains", "latency", "generation", "load", "memory", "floor", "time", "training", "layers", "history")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
SHORT = Workload(kind="fixed", batch=1, sequence=128)
PROMPTS = tuple(Workload(kind="generate", batch=1, prompt=prompt, new_tokens=16) for prompt in (32, 128))
CALLERS = tuple(Workload(kind="closed", batch=1, callers=callers) for callers in (1, 4))


@dataclass
class Make:
    """Manifests, measurements and reports with everything filled in that a test does not speak of."""

    environment: Any = field(
        default_factory=lambda: environment().model_copy(update={"git": "abc", "cpu": "CPU X", "cores": 2})
    )

    def manifest(self, name: str, parent: Manifest | None = None, **changes: Any) -> Manifest:
        fields: dict[str, Any] = {
            "name": name, "format": "torch", "task": "causal-lm", "source": "models/x", "files": {}, "parent": parent and parent.digest,
            "record": None, "data": {}, "parameters": 1000, "nonzero_parameters": 900, "weight_bytes": 4000,
            "inputs": digest_bytes(name.encode()), "environment": self.environment, "created": "2026-11-24T00:00:00+00:00", "extra": {},
        }  # fmt: skip
        return Manifest(**{**fields, **changes})

    def measured(self, artifact: Manifest, quantity: str, values: Sequence[float], **changes: Any) -> Measurement:
        fields: dict[str, Any] = {
            "quantity": quantity, "unit": "s", "values": tuple(values), "workload": None, "artifact": artifact.name,
            "artifact_digest": artifact.digest, "runtime": "torch", "device": "cpu", "threads": 2, "repeat": tuple(range(len(values))),
            "error": None if values else "killed by SIGKILL",
        }  # fmt: skip
        return Measurement(**{**fields, **changes})

    def report(self, manifests: Sequence[Manifest], measurements: Sequence[Measurement], **changes: Any) -> Report:
        fields: dict[str, Any] = {
            "title": "a run", "recipe": {"name": "a run"}, "manifests": tuple(manifests), "checks": (), "measurements": tuple(measurements),
            "environment": self.environment, "started": "2026-11-24T00:00:00+00:00", "seconds": 61.0, "notes": ("a note",), "status": "ok",
            "error": None,
        }  # fmt: skip
        return Report(**{**fields, **changes})

    def full(self, faster: float = 2.0, **changes: Any) -> Report:
        """Two artifacts, one `faster` than the other, and one that failed; every chart but the history has rows."""
        source = self.manifest("0-source")
        record = StageRecord(
            kind="quantize",
            settings={"scheme": "int8"},
            seconds=3.0,
            layers=_layers(),
            notes=("a stage’s note",),
            training=_curve(),
        )
        result = self.manifest("1-quantize", source, record=record, weight_bytes=1000)
        broken = self.manifest(
            "2-broken", source, record=record.model_copy(update={"layers": (), "training": None, "kind": "prune"})
        )
        rows = [
            *self._cells(source, 1.0),
            *self._cells(result, faster),
            self.measured(broken, "latency", (), workload=SHORT),
        ]
        return self.report(
            (source, result, broken), rows, ceilings=_CEILINGS, costs=tuple(_cost(m) for m in (source, result)),
            profiles=tuple(_profile(m) for m in (source, result)), **changes,
        )  # fmt: skip

    def _cells(self, artifact: Manifest, faster: float) -> Iterator[Measurement]:
        def spread(middle: float, count: int = 6) -> list[float]:
            return [middle / faster * (1 + 0.01 * (n % 3 - 1)) for n in range(count)]

        blocks = [20.0 + n % 5 + 1 / faster for n in range(20)]
        yield self.measured(artifact, "negative_log_likelihood", blocks, unit="nats", weights=(10.0,) * 20, repeat=())
        yield self.measured(
            artifact,
            "latency",
            spread(0.01, 30),
            workload=SHORT,
            repeat=tuple(n // 10 for n in range(30)),
            warmups=(0.05,),
        )
        for number, work in enumerate(PROMPTS, start=1):
            yield self.measured(artifact, "time_to_first_token", spread(0.1 * number), workload=work)
            yield self.measured(artifact, "time_per_output_token", spread(0.02), workload=work)
        for number, work in enumerate(CALLERS, start=1):
            yield self.measured(
                artifact,
                "throughput",
                [faster * faster * v * number for v in spread(50)],
                workload=work,
                unit="requests/s",
            )
            yield self.measured(
                artifact,
                "request_latency",
                spread(0.02 * number, 60),
                workload=work,
                repeat=tuple(n // 20 for n in range(60)),
            )
        for quantity, size in (
            ("baseline_memory", 1e8),
            ("steady_memory", 2e8 / faster + 1e8),
            ("peak_memory", 3e8 / faster + 1e8),
        ):
            yield self.measured(artifact, quantity, [size + 1e5 * n for n in range(5)], unit="bytes")
        yield self.measured(artifact, "weight_bytes", [float(artifact.weight_bytes)], unit="bytes", repeat=())


_CEILINGS = Ceilings(
    threads=2, bandwidth=(Bandwidth(working_set=1 << 20, bytes_per_second=1e9), Bandwidth(working_set=1 << 28, bytes_per_second=5e8)),
    operations={"float32": 1e9, "int8": 2e9}, measured="2026-11-24T00:00:00+00:00",
)  # fmt: skip


def _layers() -> tuple[LayerRow, ...]:
    names = [f"model.layers.{n}.{part}" for n in range(3) for part in ("attention.query", "mlp.up")]
    return tuple(
        LayerRow(name=name, shape=(8, 8), bits=8.5, sparsity=0.0, sqnr_db=30.0 + n) for n, name in enumerate(names)
    )


def _curve() -> TrainingCurve:
    return TrainingCurve(
        steps=(1, 2, 3), tokens=(10, 20, 30), seconds=(1.0, 2.0, 3.0), rate=(0.1, 0.1, 0.1), loss=(3.0, 2.0, 1.5),
        shares={"kl": (2.0, 1.5, 1.0), "hidden": (1.0, 0.5, 0.5)}, metric="accuracy", better="higher", held_out=10,
        validations=(Validation(step=2, tokens=20, value=0.5), Validation(step=3, tokens=30, value=0.75)), kept=3,
    )  # fmt: skip


def _cost(manifest: Manifest) -> Cost:
    return Cost(
        artifact=manifest.name, artifact_digest=manifest.digest, parameters=1000, weight_bytes=4000, read_bytes=4000,
        operations_per_token=2000.0, operations_per_pair=10.0, cache_bytes_per_token=16.0, arithmetic="float32",
    )  # fmt: skip


def _profile(manifest: Manifest) -> Profile:
    rows = tuple(
        ProfileRow(operator=name, layer=f"layers.{n}", seconds=0.001 * (n + 1), count=2.0)
        for n, name in enumerate(("MatMul", "Add", "Softmax"))
    )
    return Profile(
        artifact=manifest.name,
        artifact_digest=manifest.digest,
        runtime="torch",
        threads=2,
        workload=SHORT,
        calls=5,
        seconds=0.01,
        rows=rows,
    )


@pytest.fixture(scope="session")
def make() -> Make:
    return Make()


@pytest.fixture(scope="session")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the dashboard of reports and returns the file."""

    def written(*reports: Report, **options: Any) -> Path:
        sources = [view.Source(f"{n:012x}", f"results/{n}.json", report) for n, report in enumerate(reports, start=1)]
        path = tmp_path_factory.mktemp("page") / "dashboard.html"
        path.write_text(page.render(view.build(sources, **options), view.raw_values(sources)), "utf-8")
        return path

    return written


@pytest.fixture(scope="session")
def full_page(make: Make, write: Callable[..., Path]) -> Path:
    """Two runs of one recipe on one machine, so that the history has something to show, too."""
    return write(make.full(title="a run"), make.full(faster=3.0, title="a run", started="2026-11-25T00:00:00+00:00"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One Chromium for all tests: Debian's, or the one that SQUEEZE_CHROMIUM names."""
    api = pytest.importorskip("playwright.sync_api", reason="the browser tests need: pip install playwright")
    found = os.environ.get("SQUEEZE_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(CHROMIUM)} is on the PATH, and SQUEEZE_CHROMIUM is not set")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield started
        started.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """Deque's checks of accessibility, as their package for Playwright carries them."""
    package = pytest.importorskip("axe_playwright_python", reason="this test needs: pip install axe-playwright-python")
    return (Path(str(package.__file__)).parent / "axe.min.js").read_text("utf-8")


@dataclass
class Opened:
    """A page in the browser, and what went wrong in it: anything here fails the test."""

    page: Any
    faults: list[str] = field(default_factory=list)

    def run(self, script: str, argument: Any = None) -> Any:
        """The value of a JavaScript function or expression; the page's own policy forbids evaluating strings, the debugger may."""
        return self.page.evaluate(script, argument)

    def until(self, script: str, argument: Any = None) -> Any:
        """The same, as soon as it is true."""
        for _ in range(400):
            if found := self.run(script, argument):
                return found
            self.page.wait_for_timeout(25)
        raise AssertionError(f"never true: {script}")

    def drawn(self, kind: str, variant: str | None = None) -> None:
        """Wait until a chart is drawn."""
        self.run("kind => document.getElementById('chart-' + kind).scrollIntoView({behavior: 'instant'})", kind)
        drawn = "document.getElementById('chart-' + kind).dataset.drawn"
        self.until(f"([kind, name]) => name === null ? {drawn} : {drawn} === name", [kind, variant])

    def go(self, **state: str) -> None:
        """Follow a link into the page."""
        self.run("state => { location.hash = new URLSearchParams(state); }", state)
        self.until("state => location.hash === '#' + new URLSearchParams(state)", state)
        self.page.wait_for_timeout(20)

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.page.locator(selector).all_inner_texts()]

    def fragment(self) -> dict[str, str]:
        found: dict[str, str] = self.run("Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")
        return found


def listen(found: Opened, is_ours: Callable[[str], bool]) -> None:
    """Errors, whatever is said on the console, and requests for an address that is not ours become faults."""
    told = found.faults.append
    found.page.on("console", lambda message: told(f"console {message.type}: {message.text}"))
    found.page.on("pageerror", lambda error: told(f"error: {error}"))
    found.page.on("request", lambda request: is_ours(request.url) or told(f"request: {request.url}"))


@contextmanager
def opening(browser: Any) -> Iterator[Callable[..., Opened]]:
    """Opens files as a reader does. Errors, warnings, dialogs and requests are faults, and nobody may leave any."""
    contexts: list[Any] = []
    every: list[Opened] = []

    def open_file(path: Path, fragment: str = "", *, script: str = COPIED, **options: Any) -> Opened:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.add_init_script(script)
        found = Opened(context.new_page())
        every.append(found)
        url = path.as_uri()
        listen(found, lambda asked: asked.split("#")[0] == url)
        found.page.on("dialog", lambda dialog: (found.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        found.page.goto(url + fragment)
        found.until("() => window.squeezeReady")
        return found

    yield open_file
    faults = [one.faults for one in every]
    for context in contexts:
        context.close()
    assert faults == [[] for _ in every]


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Opened]]:
    """Opens a page that is the test's own."""
    with opening(browser) as open_file:
        yield open_file


@pytest.fixture(scope="session")
def full(browser: Any, full_page: Path) -> Iterator[Opened]:
    """The full page, for tests that only look at it or go where they want to be by its link."""
    with opening(browser) as open_file:
        yield open_file(full_page)


COPIED = "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async text => { window.copied = text; }}});"
"""What is copied is kept where a test can read it: a clipboard is shared by everything on a machine."""


def embedded(path: Path) -> dict[str, Any]:
    """The view in a page's file."""
    found = re.search(r'<script type="application/json" id="view">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    assert found is not None
    view: dict[str, Any] = json.loads(found[1])
    return view


def rows_of(view: dict[str, Any], kind: str) -> dict[str, list[dict[str, Any]]]:
    """Variant -> rows of the newest report."""
    if kind != "history":
        found: dict[str, list[dict[str, Any]]] = view["reports"][-1]["rows"][kind]
        return found
    names = dict.fromkeys(row["variant"] for row in view["history"])
    return {name: [row for row in view["history"] if row["variant"] == name] for name in names}


def canonical(rows: list[dict[str, Any]]) -> list[str]:
    """Rows in any order, with 1 equal to 1.0 as in JavaScript."""
    told = [{key: float(value) if type(value) is int else value for key, value in row.items()} for row in rows]
    return sorted(json.dumps(row, sort_keys=True) for row in told)


def table(found: Opened, section: str) -> list[list[str]]:
    lines = "[...document.querySelectorAll(`#${section} tbody tr`)]"
    cells = f"section => {lines}.map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    rows: list[list[str]] = found.run(cells, section)
    return rows
