"""Real servers on loopback sockets: one serves a directory, one sends the bytes that a test gives it."""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import EllipsisType
from urllib.parse import unquote

from ndcache.http.tls import close_abandoned


@dataclass(frozen=True)
class Request:
    """A request that a server received."""

    method: str
    target: str
    headers: Mapping[str, str]  # names in lower case

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


#: Files that may tell a model's companion files. Most tests are about models without them, and about other requests.
_PROBED = ("/mlc-chat-config.json", "/mlc-model-manifest.json")


# --- a directory --------------------------------------------------------------------------------------


class ConnectionLimit:
    """A limit of the bodies sent at once, like nginx's ``limit_conn``.

    Attributes
    ----------
    status : int
        The status of responses beyond the limit.
    headers : dict of str to str
        The headers of these responses.
    peak : int
        The most bodies that were in flight at once.
    refused : int
        Requests beyond the limit so far.
    """

    def __init__(self, most: int, *, status: int = 503, headers: Mapping[str, str] | None = None) -> None:
        self.most = most
        self.status = status
        self.headers = dict(headers or {})
        self.peak = self.refused = 0
        self._now = 0
        self._lock = threading.Lock()

    def enter(self) -> bool:
        """Return whether a request may be answered; if so, call `leave` afterwards."""
        with self._lock:
            is_free = self._is_free()
            self.refused += not is_free
            self._now += is_free
            self.peak = max(self.peak, self._now)
            return is_free

    def leave(self) -> None:
        with self._lock:
            self._now -= 1

    def _is_free(self) -> bool:
        return self._now < self.most


class RateLimit(ConnectionLimit):
    """A limit of requests per second, after `burst` at once, like nginx's ``limit_req … nodelay``."""

    def __init__(
        self, rate: float, burst: int = 0, *, status: int = 429, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(0, status=status, headers=headers)
        self._rate, self._burst = rate, burst
        self._excess, self._last = 0.0, -1e9

    def _is_free(self) -> bool:
        now = time.monotonic()
        excess = max(self._excess - self._rate * (now - self._last) + 1, 0.0)
        if excess > self._burst:
            return False  # refused requests do not count
        self._excess, self._last = excess, now
        return True


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class FileServer:
    """Serve a directory as nginx does: ETag, If-None-Match, single ranges, keep-alive.

    Parameters
    ----------
    directory : pathlib.Path
    rate : int, optional
        Bytes per second of each connection.
    limit : ConnectionLimit, optional
        The limit for all files but JSON.

    Attributes
    ----------
    url : str
        Ends in a slash.
    requests : list of Request
        The requests so far, each with the client's port as ``x-test-peer``.
    probes : int
        How many other requests there were, for companion files that are not there.
    peak_bodies : int
        The most shard bodies that were in flight at once.
    stalled : set of str
        Paths whose bodies stop after their beginning.
    gate : threading.Event
        While it is clear, all bodies wait; the manifest's does only if `gated_manifest` is set.
    """

    def __init__(self, directory: Path, *, rate: int | None = None, limit: ConnectionLimit | None = None) -> None:
        self.directory = Path(directory)
        self.limit = limit
        self.rate = rate
        self.requests: list[Request] = []
        self.probes = 0
        self.peak_bodies = 0
        self.gate = threading.Event()
        self.gate.set()
        self.gated_manifest = False
        self.stalled: set[str] = set()
        self._closed = threading.Event()
        self.status: dict[str, int] = {}
        self._bodies = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 0

            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = _HTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def shard_requests(self) -> list[Request]:
        """Return the requests for all files but JSON."""
        return [request for request in self.requests if not request.path.endswith(".json")]

    def close(self) -> None:
        self.gate.set()
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        headers = {name.lower(): value for name, value in handler.headers.items()}
        request = Request("GET", handler.path, {**headers, "x-test-peer": str(handler.client_address[1])})
        with self._lock:
            if request.path.endswith(_PROBED) and not self._file(request).is_file():
                self.probes += 1
            else:
                self.requests.append(request)
        if self.limit is None or request.path.endswith(".json"):
            self._answer_file(handler, request)
        elif self.limit.enter():
            try:
                self._answer_file(handler, request)
            finally:
                self.limit.leave()
        else:
            handler.send_response(self.limit.status)
            for name, value in {**self.limit.headers, "Content-Length": "0"}.items():
                handler.send_header(name, value)
            handler.end_headers()

    def _answer_file(self, handler: BaseHTTPRequestHandler, request: Request) -> None:
        status = self.status.get(request.path)
        path = self._file(request)
        if status is not None or not path.is_file():
            handler.send_response(status or 404)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        body = path.read_bytes()
        etag = f'"{hashlib.md5(body).hexdigest()}"'
        if request.headers.get("if-none-match") == etag:
            handler.send_response(304)
            handler.send_header("ETag", etag)
            handler.end_headers()
            return
        first, last, status = 0, len(body) - 1, 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if match and request.headers.get("if-range", etag) == etag:
            first, last, status = int(match[1]), min(int(match[2] or last), last), 206
        handler.send_response(status)
        handler.send_header("ETag", etag)
        handler.send_header("Content-Length", str(last + 1 - first))
        if status == 206:
            handler.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
        handler.end_headers()
        with self._body(request), contextlib.suppress(ConnectionError):
            self._send(handler, memoryview(body)[first : last + 1])

    def _file(self, request: Request) -> Path:
        return self.directory / unquote(request.path).lstrip("/")

    @contextlib.contextmanager
    def _body(self, request: Request) -> Iterator[None]:
        if request.path.endswith(".json"):
            if self.gated_manifest:
                self.gate.wait(60)
            yield
            return
        with self._lock:
            self._bodies += 1
            self.peak_bodies = max(self.peak_bodies, self._bodies)
        if request.path in self.stalled:
            self._closed.wait(300)
        self.gate.wait(60)
        try:
            yield
        finally:
            with self._lock:
                self._bodies -= 1

    def _send(self, handler: BaseHTTPRequestHandler, body: memoryview) -> None:
        if self.rate is None:
            handler.wfile.write(body)
            return
        start, piece = time.monotonic(), 1 << 16
        for offset in range(0, len(body), piece):
            handler.wfile.write(body[offset : offset + piece])
            ahead = min(offset + piece, len(body)) / self.rate - (time.monotonic() - start)
            if ahead > 0:
                time.sleep(ahead)


# --- a script -----------------------------------------------------------------------------------------


class Connection:
    """The server's end of one connection, for the steps of a script."""

    def __init__(self, sock: socket.socket, server: ScriptedServer) -> None:
        self.sock = sock
        self.server = server
        self._unread = b""

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def reset(self) -> None:
        """Break the connection with RST."""
        linger_for_nothing = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_for_nothing)
        self.close()

    def stall(self) -> None:
        """Send nothing until the client disconnects or the server is closed."""
        with contextlib.suppress(OSError):
            self.sock.settimeout(None)
            while self.sock.recv(1 << 16):
                pass

    def pass_on(self, port: int, first: bytes = b"") -> None:
        """Tunnel to a port of this machine until one side ends; `first` has been read already."""
        with socket.create_connection(("127.0.0.1", port)) as behind:
            behind.sendall(first)
            back = threading.Thread(target=_pump, args=(behind, self.sock), daemon=True)
            back.start()
            _pump(self.sock, behind)
            back.join()

    def close(self) -> None:
        self.sock.close()

    def read_request(self) -> Request | None:
        while b"\r\n\r\n" not in self._unread:
            data = self.sock.recv(1 << 16)
            if not data:
                return None
            self._unread += data
        head, _, self._unread = self._unread.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        pairs = (line.partition(":") for line in lines)
        return Request(method, target, {name.lower(): value.strip() for name, _, value in pairs})


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


Step = Callable[[Connection, Request], bool | None]


@dataclass
class ScriptedServer:
    """Answer each request for a path with the next step of that path's script; the last step is repeated.

    A step is bytes to send, or a function of the connection and the request. Build bytes with `reply`.
    A connection is closed after a step unless it was an exact `reply`.

    Attributes
    ----------
    script : dict of str to list
        The steps of each path, such as ``"/params_shard_0.bin"``.
    requests : list of Request
        The requests so far, without those for companion files that have no script.
    connections : int
        The number of connections accepted so far.
    """

    script: dict[str, list[bytes | Step]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    connections: int = 0

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self._open: set[socket.socket] = set()
        self._times_asked: dict[str, int] = {}
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def wrap(self, context: ssl.SSLContext) -> None:
        """Speak TLS from now on."""
        self._context = context
        self.url = self.url.replace("http:", "https:")

    @property
    def open_connections(self) -> int:
        return len(self._open)

    def requests_for(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    def close(self) -> None:
        # Closing does not wake a thread that waits in accept; shutting down does.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            sockets = list(self._open)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        if self._context is not None:
            try:
                sock = self._context.wrap_socket(sock, server_side=True)
            except OSError as error:
                close_abandoned(error)
                sock.close()
                return
        connection = Connection(sock, self)
        with self._lock:
            self._open.add(sock)
        try:
            with contextlib.suppress(OSError):
                while (request := connection.read_request()) is not None:
                    step = self._next_step(request)
                    if not callable(step):
                        connection.send(step)
                    elif not step(connection, request):
                        return
        finally:
            with self._lock:
                self._open.discard(sock)
            sock.close()

    def _next_step(self, request: Request) -> bytes | Step:
        with self._lock:
            steps = self.script.get(request.path)
            if steps or not request.path.endswith(_PROBED):
                self.requests.append(request)
            if not steps:
                return reply(404)
            index = self._times_asked.get(request.path, 0)
            self._times_asked[request.path] = index + 1
            return steps[min(index, len(steps) - 1)]


def reply(
    status: int = 200,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    *,
    length: int | str | EllipsisType | None = ...,
) -> bytes:
    """Return a whole HTTP/1.1 response. `length` is its Content-Length: the body's, another one, or None for none."""
    lines = [f"HTTP/1.1 {status} Status"]
    length = len(body) if length is ... else length
    if length is not None:
        lines.append(f"Content-Length: {length}")
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def then_close(data: bytes) -> Step:
    """Send `data` and end the connection."""

    def step(connection: Connection, request: Request) -> None:
        connection.send(data)

    return step


def then_reset(data: bytes) -> Step:
    """Send `data` and break the connection."""

    def step(connection: Connection, request: Request) -> None:
        connection.send(data)
        connection.reset()

    return step


def then_stall(data: bytes) -> Step:
    """Send `data`, then nothing more."""

    def step(connection: Connection, request: Request) -> None:
        connection.send(data)
        connection.stall()

    return step
