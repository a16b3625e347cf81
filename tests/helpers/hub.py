"""A server like Hugging Face: a listing, and files that are sent, or redirected to a storage, with ETags."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from .servers import FileServer

__all__ = ["COMMIT", "HubServer"]

COMMIT = "c" * 40


class HubServer:
    """Serve a directory as the repository ``owner/model``; files of git LFS come from a storage on another port.

    Parameters
    ----------
    directory : pathlib.Path
    lfs : collection of str
        The suffixes of files in git LFS, whose SHA-256 is known.

    Attributes
    ----------
    url : str
        The endpoint, without a slash at its end; for HF_ENDPOINT.
    requests : list of str
        The paths asked for so far; those of files without ``/owner/model/resolve/<revision>/``.
    headers : list of dict
        The headers of all requests to the endpoint, with names in lower case.
    failing : dict of str to int
        Files, and the status with which they are refused.
    """

    def __init__(self, directory: Path, lfs: Collection[str] = (".bin", ".safetensors", "tokenizer.json")) -> None:
        self.directory = directory
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.failing: dict[str, int] = {}
        self._lfs = tuple(lfs)
        self.storage = FileServer(directory)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 0

            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def asked(self) -> list[str]:
        """Return the paths that were asked for since the last call."""
        asked, self.requests[:] = list(self.requests), []
        return asked

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.storage.close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.headers.append({name.lower(): value for name, value in handler.headers.items()})
        path = unquote(handler.path.partition("?")[0])
        parts = path.split("/", 5)
        if parts[1:4] == ["api", "models", "owner"] and parts[4] == "model":
            self.requests.append(path)
            self._send(handler, 200, self._listing(), {"Content-Type": "application/json"})
        elif parts[1:4] == ["owner", "model", "resolve"] and len(parts) == 6:
            self.requests.append(parts[5])
            self._answer_file(handler, parts[5])
        else:
            self._send(handler, 404, b"")

    def _answer_file(self, handler: BaseHTTPRequestHandler, name: str) -> None:
        file = self.directory / name
        if name in self.failing or not file.is_file():
            self._send(handler, self.failing.get(name, 404), b"Entry not found")
            return
        data, about = file.read_bytes(), {"X-Repo-Commit": COMMIT}
        if name.endswith(self._lfs):
            sha256 = hashlib.sha256(data).hexdigest()
            linked = {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
            self._send(handler, 302, b"", {**about, **linked, "Location": f"{self.storage.url}{name}?signature=x"})
            return
        about["ETag"] = f'"{_git_id(data)}"'
        is_known = handler.headers.get("If-None-Match") == about["ETag"]
        self._send(handler, 304 if is_known else 200, b"" if is_known else data, about)

    def _listing(self) -> bytes:
        siblings = []
        for file in sorted(self.directory.rglob("*")):
            if file.is_file():
                data = file.read_bytes()
                name = file.relative_to(self.directory).as_posix()
                entry = {"rfilename": name, "size": len(data), "blobId": _git_id(data)}
                if name.endswith(self._lfs):
                    entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
                siblings.append(entry)
        return json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": siblings}).encode()

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        if status != 304:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
