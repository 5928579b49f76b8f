"""`squeeze dashboard --serve`: the page on a local port, drawn anew while results come in.

The standard library's server is enough: four addresses, a handful of readers, all on one machine; a framework would bring its own
loop and its own dependencies for no gain. Whatever changes under the watched paths is told to the page in a Server-Sent Event, and the
page fetches the new view. Files are watched by looking at their times and sizes twice a second: inotify knows nothing of what another
machine writes into a shared folder, needs a package and a limit raised for large trees, and saves nothing worth having here, where a
look takes milliseconds.

What may be read is decided when the server starts. No path is ever made from an address, so there is nothing to traverse. A page of
another site cannot read from here: no CORS header is sent, and a request whose Host is not this machine's is refused, because a foreign
name that resolves to 127.0.0.1 (DNS rebinding) would otherwise count as the same site.

Views are built when somebody asks for one, and so seldom that the core they are built on is left alone for two thirds of the time:
the run that is being watched may be timing something on it.
"""

import errno
import ipaddress
import json
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from squeeze.dashboard.page import packed, render
from squeeze.dashboard.running import watched
from squeeze.dashboard.view import Skipped, Source, build, collect, raw_values
from squeeze.errors import ReportError, SqueezeError
from squeeze.report.status import STATUS, read_status
from squeeze.report.text import json_text

POLL = 0.5
"""Seconds between two looks."""
KEEP_ALIVE = 10.0
"""Seconds of silence after which a comment is sent: proxies close what says nothing, and a reader that left is noticed."""
IDLE = 2.0
"""Times as long as the last view took to build, in which no newer one is offered."""
STREAMS = 64
"""Pages that may listen at once; each holds a thread."""
PATIENCE = 30.0
"""Seconds that a reader may take to send its request or to take an answer."""
HEADERS = {
    "Cache-Control": "no-store", "Content-Security-Policy": "frame-ancestors 'none'", "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}  # fmt: skip
TEXT, HTML, JSON, EVENTS = (
    f"{kind}; charset=utf-8" for kind in ("text/plain", "text/html", "application/json", "text/event-stream")
)


def serve(
    paths: Sequence[str | Path], *, host: str = "127.0.0.1", port: int = 8765, title: str | None = None, open_browser: bool = False,
    results: Path = Path("results"), stop: threading.Event | None = None, ready: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Serve the dashboard of `paths` until `stop` is set, or Ctrl-C. `ready` is called with the address once it answers.

    Raises ReportError where a path is neither there nor an id, and where the port cannot be had.
    """
    stop = stop or threading.Event()
    board = Board(paths, results, title or "")
    server = _bound(board, host, port)
    address = server.address
    if not server.is_loopback:
        print(
            f"warning: anybody who reaches {address} can read these results. Leave --host out to keep them on this machine.",
            file=sys.stderr,
        )
    answering = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    answering.start()
    try:
        if ready is not None:
            ready(address)
        if open_browser:
            webbrowser.open(address)
        while not stop.wait(POLL):
            board.look()
    except KeyboardInterrupt:
        pass
    finally:
        board.close()
        server.shutdown()
        server.server_close()


class Board:
    """What is shown, and how often it has changed."""

    def __init__(self, paths: Sequence[str | Path], results: Path, title: str) -> None:
        """Raises ReportError where a path is neither there nor an id."""
        self.paths, self.results, self.title = tuple(paths), results, title
        self.version = 1
        self.is_closed = False
        self.changed = threading.Condition()
        self._building = threading.Lock()
        self._built: tuple[int, list[Source], dict[str, Any]] = (0, [], {})
        self._rest_until = 0.0
        self._seen = self._state()
        collect(self.paths, self.results)

    def look(self) -> None:
        """Look at the files, and wake all who wait where something changed."""
        found = self._state()
        if found == self._seen or time.monotonic() < self._rest_until:
            return
        with self.changed:
            self._seen = found
            self.version += 1
            self.changed.notify_all()

    def close(self) -> None:
        """Send everybody home."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()

    def wait(self, seen: int, seconds: float) -> int:
        """The version, as soon as it is not `seen`, the time is up or the board is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.version != seen or self.is_closed, seconds)
            return self.version

    def view(self) -> dict[str, Any]:
        """The newest view."""
        return self._newest()[1]

    def raw(self) -> str:
        """The raw values behind it, packed as the page unpacks them."""
        return packed(raw_values(self._newest()[0]))

    def _newest(self) -> tuple[list[Source], dict[str, Any]]:
        """Sources and view of the present version; built once, however many ask."""
        with self._building:
            version, began = self.version, time.monotonic()
            if self._built[0] != version:
                try:
                    sources, skipped = collect(self.paths, self.results)
                except SqueezeError as error:  # a path that was there at the start is gone
                    sources, skipped = [], [Skipped(", ".join(map(str, self.paths)), str(error))]
                self._built = version, sources, build(sources, skipped, self.title)
                self._rest_until = time.monotonic() + IDLE * (time.monotonic() - began)
            return self._built[1:]

    def _state(self) -> tuple[tuple[str, int, int], ...]:
        """Name, time and size of every file that the view depends on."""
        found = []
        for file in self._files():
            with suppress(OSError):
                seen = file.stat()
                found.append((str(file), seen.st_mtime_ns, seen.st_size))
            if file.name == STATUS:
                # A run that is killed changes no file.
                status = read_status(file.parent)
                found.append((f"{file} alive", int(status is not None and status.is_alive), 0))
        return tuple(sorted(found))

    def _files(self) -> Iterator[Path]:
        for name in self.paths:
            path = Path(name) if Path(name).exists() else self.results
            if path.is_file():
                yield from (path, *watched(path.parent))
                continue
            yield from _reports_in(path)
            for inner in _folders_in(path):
                yield from _reports_in(inner)


def _reports_in(folder: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from (path for path in folder.iterdir() if path.suffix == ".json" and not path.name.startswith("."))
    with suppress(OSError):
        yield from watched(folder)


def _folders_in(folder: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


class _Server(ThreadingMixIn, TCPServer):
    """One thread a request. Not http.server's own class: that one asks DNS for this machine's name, which may hang."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, board: Board, host: str, port: int) -> None:
        self.board, self.host = board, host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.streams = threading.BoundedSemaphore(STREAMS)
        super().__init__((host, port), _Handler)
        self.port = int(self.server_address[1])
        bound = ipaddress.ip_address(str(self.server_address[0]).partition("%")[0])
        self.is_loopback = bound.is_loopback

    @property
    def address(self) -> str:
        """Where the page is."""
        name = "localhost" if self.host in ("0.0.0.0", "::") else f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.port}/"

    def is_ours(self, host: str) -> bool:
        """Whether a Host header names this machine. Elsewhere than on loopback every plain address does: only names can be rebound."""
        name, _, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
        name, port = (name, port) if name else (port, "80")
        if (port or "80") != str(self.port):
            return False
        plain = name.strip("[]").casefold()
        if plain in {"localhost", "127.0.0.1", "::1", self.host.casefold()}:
            return True
        if self.is_loopback:
            return False
        try:
            ipaddress.ip_address(plain)
        except ValueError:
            return plain in {socket.gethostname().casefold(), f"{socket.gethostname().casefold()}.local"}
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that left is no error; anything else is a bug and shows its traceback."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Four addresses; anything else is not there."""

    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "squeeze", ""
    timeout = PATIENCE

    def do_GET(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.is_ours(hosts[0].strip()):
            self._refuse(
                HTTPStatus.MISDIRECTED_REQUEST,
                "This address is not this server's own; open the one that squeeze printed.",
            )
            return
        answer = ROUTES.get(self.path.partition("?")[0])
        if answer is None:
            self._refuse(HTTPStatus.NOT_FOUND, "There is only the dashboard here, at /.")
            return
        answer(self)

    do_HEAD = do_GET

    def _not_allowed(self) -> None:
        self.close_connection = True
        self._refuse(
            HTTPStatus.METHOD_NOT_ALLOWED,
            "Results are read here, and nothing is written: GET or HEAD.",
            Allow="GET, HEAD",
        )

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _not_allowed

    def page(self) -> None:
        """The page with the newest view; raw values come when somebody asks."""
        self._send(HTML, render(self.server.board.view(), {}, live=True))

    def view(self) -> None:
        """The newest view."""
        self._send(JSON, json_text(self.server.board.view()))

    def raw(self) -> None:
        """Raw values, as the page unpacks them."""
        self._send(TEXT, self.server.board.raw())

    def events(self) -> None:
        """A message for each change, and at once for a page that does not say that it has seen the present version."""
        if not self.server.streams.acquire(blocking=False):
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, f"{STREAMS} pages are open already. Close one.")
            return
        try:
            self.close_connection = True
            self._begin(HTTPStatus.OK, EVENTS, Connection="close")
            if self.command == "GET":
                self._tell()
        finally:
            self.server.streams.release()

    def _tell(self) -> None:
        board, last = self.server.board, self.headers.get("Last-Event-ID", "")
        seen = int(last) if last.isdecimal() and len(last) < 10 else 0
        while not board.is_closed:
            version = board.wait(seen, KEEP_ALIVE)
            if board.is_closed:
                return
            text = (
                ": still here\n\n"
                if version == seen
                else f"id: {version}\ndata: {json.dumps({'version': version})}\n\n"
            )
            self.wfile.write(text.encode("ascii"))
            seen = version

    def _send(self, kind: str, text: str, status: HTTPStatus = HTTPStatus.OK, **headers: str) -> None:
        content = text.encode("utf-8", "backslashreplace")
        self._begin(status, kind, **{"Content-Length": str(len(content))}, **headers)
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: HTTPStatus, why: str, **headers: str) -> None:
        self._send(TEXT, f"{why}\n", status, **headers)

    def _begin(self, status: HTTPStatus, kind: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line for each request would bury what `squeeze run` says in the next pane."""


def _bound(board: Board, host: str, port: int) -> _Server:
    try:
        return _Server(board, host, port)
    except socket.gaierror as error:
        raise ReportError(
            f"--host {host!r} is no address of this machine: {error.strerror}. Leave it out for this machine alone."
        ) from error
    except OverflowError as error:
        raise ReportError(f"--port {port} is not between 0 and 65535.") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ReportError(
                f"port {port} of {host} is taken by another program. Choose another with --port, or --port 0 for any that is free."
            ) from error
        raise ReportError(
            f"port {port} of {host} cannot be had: {error.strerror or error}. Choose another with --port, or another --host."
        ) from error


ROUTES: dict[str, Callable[[_Handler], None]] = {
    "/": _Handler.page, "/view.json": _Handler.view, "/raw": _Handler.raw, "/events": _Handler.events,
}  # fmt: skip
