"""A real server on a free port: what it answers, to whom, and how soon it tells of a change."""

import base64
import gzip
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from squeeze.dashboard.serve import STREAMS, Board, _Server, serve
from squeeze.errors import ReportError
from squeeze.report.schema import write_report
from squeeze.report.status import RunStatus, StatusFile

SOON = 2.0
"""Seconds within which a page hears of a change."""
RECIPE = """
name: tiny
model: {{path: {model}}}
task: causal-lm
data: {{path: {data}, block_size: 16, splits: {{evaluate: 4, calibration: 2}}}}
stages:
  - {{kind: quantize, scheme: int8}}
bench:
  repeats: 1
  most_repeats: 1
  ceilings: false
  memory: false
  quality: false
  workloads: [{{kind: fixed, batch: 1, sequence: 8}}]
"""


class Served:
    """One server and how to ask it."""

    def __init__(self, address: str) -> None:
        self.address, self.port = address, int(address.rstrip("/").rpartition(":")[2])

    def get(self, path: str = "", **headers: str) -> Any:
        return urlopen(Request(self.address + path, headers=headers), timeout=20)

    def view(self) -> dict[str, Any]:
        found: dict[str, Any] = json.load(self.get("view.json"))
        return found

    def report(self, number: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = self.view()["reports"][number]
        return found

    def status(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
        """Of a request whose line and headers are sent as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in {"Host": f"127.0.0.1:{self.port}", **headers}.items():
                if value:
                    connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, answer.read(4096).decode("utf-8")
        finally:
            connection.close()


class Events:
    """The stream of one listening page."""

    def __init__(self, served: Served, last: str = "") -> None:
        self.answer = served.get("events", **({"Last-Event-ID": last} if last else {}))

    def next(self, seconds: float) -> int:
        """The version of the next message. Raises TimeoutError where none comes in time."""
        self.answer.fp.raw._sock.settimeout(seconds)
        while True:
            line = self.answer.readline().decode("ascii")
            if line.startswith("data: "):
                found: int = json.loads(line[6:])["version"]
                return found
            assert line, "the stream ended"

    def close(self) -> None:
        self.answer.close()


@contextmanager
def serving(*paths: Path, **options: Any) -> Iterator[Served]:
    stop, addresses = threading.Event(), []
    told = threading.Event()

    def ready(address: str) -> None:
        addresses.append(address)
        told.set()

    thread = threading.Thread(
        target=serve, args=(paths,), kwargs={"port": 0, "stop": stop, "ready": ready, **options}, daemon=True
    )
    thread.start()
    try:
        assert told.wait(20)
        yield Served(addresses[0])
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def results(make: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    write_report(make.full(title="first"), folder / "first.json")
    (folder / "torn.json").write_text('{"schema_version": 2, "measur', "utf-8")
    (folder / "secret.txt").write_text("secret", "utf-8")
    return folder


def test_the_page_the_view_and_the_raw_values_are_served_and_a_torn_file_is_named(results: Path) -> None:
    with serving(results, title="Wall") as served:
        page = served.get()
        text = page.read().decode("utf-8")
        assert text.lower().startswith("<!doctype html>")
        assert "EventSource" in text
        view = served.view()
        assert view["title"] == "Wall"
        assert [report["title"] for report in view["reports"]] == ["first"]
        assert [(Path(one["file"]).name, "is not whole JSON" in one["reason"]) for one in view["skipped"]] == [
            ("torn.json", True)
        ]
        raw = json.loads(gzip.decompress(base64.b64decode(served.get("raw").read())))
        cells = view["reports"][0]["cells"]
        latency = next(cell for cell in cells if cell["quantity"] == "latency")
        assert raw[view["reports"][0]["id"]][latency["id"]]["quantity"] == "latency"
        head = served.status("/", "HEAD")
        assert head == (200, "")


def test_headers_let_no_other_site_read_frame_or_guess(results: Path) -> None:
    with serving(results) as served:
        for path in ("", "view.json", "raw", "events"):
            with served.get(path, Origin="http://evil.example") as answer:
                headers = {name.lower(): value for name, value in answer.getheaders()}
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["content-security-policy"] == "frame-ancestors 'none'"
            assert headers["cross-origin-resource-policy"] == "same-origin"
            assert headers["referrer-policy"] == "no-referrer"
            assert headers["cache-control"] == "no-store"
            assert not any(name.startswith("access-control") for name in headers)
            assert "Python" not in headers["server"]


@pytest.mark.parametrize(
    "path",
    [
        "/secret.txt", "/../secret.txt", "/%2e%2e/secret.txt", "/..%2f..%2fetc/passwd", "//etc/passwd", "/results/", "/results",
        "/first.json", "/view.json/", "/view.json/../secret.txt", "/VIEW.JSON", "/favicon.ico", "http://evil.example/", "*",
        "/\\..\\secret.txt",
        "/raw%00",
    ],
)  # fmt: skip
def test_nothing_else_is_there_and_no_path_leads_anywhere(results: Path, path: str) -> None:
    with serving(results) as served:
        status, text = served.status(path)
    assert (status, text) == (404, "There is only the dashboard here, at /.\n")


def test_requests_that_name_another_host_are_refused(results: Path) -> None:
    with serving(results) as served:
        port = served.port
        for host in (
            "evil.example",
            f"evil.example:{port}",
            f"127.0.0.1.evil.example:{port}",
            "127.0.0.1:1",
            "127.0.0.1",
            "",
            f"192.168.0.1:{port}",
        ):
            status, text = served.status("/view.json", Host=host)
            assert (status, "not this server's own" in text) == (421, True), host
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", f"LOCALHOST:{port}"):
            assert served.status("/", "HEAD", Host=host)[0] == 200, host
        assert served.status("/events", Host="evil.example")[0] == 421


def test_off_loopback_plain_addresses_are_ours_and_foreign_names_are_not(results: Path, make: Any) -> None:
    server = _Server(Board([results], results, ""), "0.0.0.0", 0)
    try:
        assert server.is_ours(f"192.168.0.7:{server.port}")
        assert server.is_ours(f"{socket.gethostname()}:{server.port}")
        assert server.is_ours(f"[fe80::1]:{server.port}")
        assert not server.is_ours(f"evil.example:{server.port}")
    finally:
        server.server_close()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_nothing_can_be_written(results: Path, method: str) -> None:
    with serving(results) as served:
        assert served.status("/view.json", method) == (
            405,
            "Results are read here, and nothing is written: GET or HEAD.\n",
        )


def test_another_interface_than_loopback_is_served_with_a_warning(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(results) as served:
        assert served.address.startswith("http://127.0.0.1:")
    assert capsys.readouterr().err == ""
    with serving(results, host="0.0.0.0") as served:
        assert served.status("/", "HEAD", Host=f"localhost:{served.port}")[0] == 200
        address = served.address
    assert f"warning: anybody who reaches {address} can read these results" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named_with_the_option_that_mends_it(results: Path) -> None:
    with serving(results) as served, pytest.raises(ReportError) as raised:
        serve([results], port=served.port)
    assert str(raised.value) == (
        f"port {served.port} of 127.0.0.1 is taken by another program. Choose another with --port, or --port 0 for any that is free."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 99999}, "--port 99999 is not between 0 and 65535"),
        ({"port": 0, "host": "nowhere.invalid"}, "--host 'nowhere.invalid' is no address of this machine"),
        ({"port": 0, "host": "192.0.2.1"}, "cannot be had: Cannot assign requested address"),
    ],
)
def test_a_place_that_cannot_be_had_is_explained(results: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ReportError) as raised:
        serve([results], **options)
    assert message in str(raised.value)


def test_a_path_that_is_nowhere_is_refused_before_anything_is_served(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="absent does not exist"):
        serve([tmp_path / "absent"], port=0, results=tmp_path)


def test_a_page_hears_at_once_where_it_stands_and_soon_of_each_change(results: Path, make: Any) -> None:
    with serving(results) as served:
        events = Events(served)
        first = events.next(5)
        assert len(served.view()["reports"]) == 1
        write_report(make.full(title="second"), results / "second.json")
        began = time.monotonic()
        second = events.next(SOON)
        assert second > first
        assert {report["title"] for report in served.view()["reports"]} == {"first", "second"}
        assert time.monotonic() - began < SOON
        (results / "torn.json").unlink()
        events.next(SOON)
        assert served.view()["skipped"] == []
        with pytest.raises(TimeoutError):
            events.next(1.2)
        events.close()
        known = Events(served, last=str(second + 1))
        with pytest.raises(TimeoutError):
            known.next(0.7)
        known.close()


def test_a_stream_that_has_nothing_to_tell_says_that_it_is_there(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("squeeze.dashboard.serve.KEEP_ALIVE", 0.1)
    with serving(results) as served:
        events = Events(served)
        events.next(5)
        lines = [events.answer.readline() for _ in range(3)]
        events.close()
    assert b": still here\n" in lines


def test_pages_beyond_the_bound_are_told_so_and_the_others_go_on(results: Path) -> None:
    with serving(results) as served:
        many = [Events(served) for _ in range(STREAMS)]
        with pytest.raises(HTTPError) as raised:
            served.get("events")
        assert raised.value.code == 503
        raised.value.close()
        assert served.status("/", "HEAD")[0] == 200
        assert many[0].next(5) > 0
        for events in many:
            events.close()


def test_a_folder_that_goes_away_is_said_and_does_not_end_the_server(results: Path) -> None:
    with serving(results) as served:
        events = Events(served)
        events.next(5)
        results.rename(results.with_name("elsewhere"))
        events.next(SOON)
        view = served.view()
        assert view["reports"] == []
        assert "does not exist" in view["skipped"][0]["reason"]
        events.close()


def test_a_view_is_built_once_for_all_who_ask(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    from squeeze.dashboard import serve as module

    whole = module.build
    monkeypatch.setattr(module, "build", lambda *given: (built.append(1), whole(*given))[1])
    with serving(results) as served:
        threads = [threading.Thread(target=served.view) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        served.get().read()
    assert built == [1]


def test_a_new_report_is_worked_out_and_the_others_are_not_again(
    make: Any, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from squeeze.dashboard import view

    worked: list[str] = []
    whole = view.datasets
    monkeypatch.setattr(view, "datasets", lambda readings: (worked.append(readings.report.title), whole(readings))[1])
    with serving(results) as served:
        events = Events(served)
        events.next(5)
        before = served.report()
        write_report(make.full(title="second", started="2026-11-26T00:00:00+00:00"), results / "second.json")
        events.next(SOON)
        assert served.report(1)["title"] == "second"
        assert served.report() == before
        write_report(make.full(title="changed", started="2026-11-26T00:00:00+00:00"), results / "second.json")
        events.next(SOON)
        assert served.report(1)["title"] == "changed"
        events.close()
    assert worked == ["first", "second", "changed"]


def test_stages_and_cells_of_a_running_run_are_told_within_two_seconds(make: Any, tmp_path: Path) -> None:
    folder, source = tmp_path / "run", make.manifest("0-source")
    folder.mkdir()
    status = RunStatus(
        title="live", recipe={}, started="2026-11-24T00:00:00+00:00", process=os.getpid(), environment=make.environment
    )
    with serving(folder) as served:
        events = Events(served)
        events.next(5)
        told = StatusFile(folder, status)
        events.next(SOON)
        assert served.report()["status"] == "running"
        (folder / "0-source").mkdir()
        (folder / "0-source" / "squeeze.json").write_text(source.model_dump_json(), "utf-8")
        told.finished(("0-source",), (), {}, ())
        events.next(SOON)
        assert [artifact["key"] for artifact in served.report()["artifacts"]] == ["0-source"]
        journal = folder / ".bench-0123456789ab"
        journal.mkdir()
        row = make.measured(source, "latency", [0.1, 0.2, 0.3])
        (journal / "a.rows.json").write_text(f"[{row.model_dump_json()}]", "utf-8")
        events.next(SOON)
        assert [cell["quantity"] for cell in served.report()["cells"]] == ["latency"]
        events.close()


def test_a_run_that_is_killed_is_told_though_it_changes_no_file(make: Any, tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    status = RunStatus(
        title="live", recipe={}, started="2026-11-24T00:00:00+00:00", process=child.pid, environment=make.environment
    )
    StatusFile(tmp_path, status)
    with serving(tmp_path) as served:
        events = Events(served)
        events.next(5)
        assert served.report()["status"] == "running"
        child.kill()
        child.wait()
        events.next(SOON)
        assert served.report()["status"] == "failed"
        assert "The same command goes on with what is finished." in served.report()["error"]
        events.close()


def test_a_real_run_shows_its_stages_and_cells_before_it_ends(tiny_llama_folder: Path, tmp_path: Path) -> None:
    texts = "\n\n".join(
        f"The cat number {n} sat on mat {n * 7} and looked at the rain for {n} hours." for n in range(40)
    )
    (tmp_path / "prose.txt").write_text(texts, "utf-8")
    (tmp_path / "tiny.yaml").write_text(RECIPE.format(model=tiny_llama_folder, data="prose.txt"), "utf-8")
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-m", "squeeze", "run", "tiny.yaml", "--out", "runs/live", "--quiet"]
    with serving(tmp_path / "runs") as served:
        events = Events(served)
        child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        seen: list[tuple[str, list[str], int]] = []
        try:
            while not seen or seen[-1][0] != "ok":
                events.next(240)
                assert child.poll() in (None, 0)
                for report in served.view()["reports"]:
                    measured = sum(1 for cell in report["cells"] if cell["quantity"] == "latency")
                    seen.append((report["status"], [a["key"] for a in report["artifacts"]], measured))
            error = child.communicate(timeout=60)[1]
        finally:
            child.kill()
        events.close()
    assert child.returncode == 0, error
    growing = [names for status, names, _ in seen if status == "running"]
    assert ["0-source", "1-quantize"] in growing
    assert growing == sorted(growing, key=len), "no stage goes away again"
    assert any(status == "running" and measured for status, _, measured in seen), "a cell is there before the run ends"
    assert seen[-1][:2] == ("ok", ["0-source", "1-quantize"])
    assert {path.name for path in (tmp_path / "runs" / "live").iterdir() if path.name.startswith(".")} == {
        ".lock",
        ".squeeze-run",
    }
