"""Anything in the place of ndcache's notes and published files: nothing crashes, and nothing hangs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import ndcache
from ndcache import tvm
from ndcache.cli import commands as cli
from ndcache.files.folder import Folder
from ndcache.files.notes import read_note, sendable

from ..helpers import models
from ..helpers.servers import FileServer

Serve = Callable[..., FileServer]
SHARD = "params_shard_0.bin"
PARTIAL = f".ndcache/parts/{SHARD}.0123456789abcdef"
NOTES = {
    "metadata": f".ndcache/validators/{SHARD}.json",
    "metadata of the manifest": ".ndcache/validators/tensor-cache.json.json",
    "note of a partial file": f"{PARTIAL}.json",
    "source": ".ndcache/source.json",
    "lock": f".ndcache/locks/{SHARD}",
}
NAMES = {"partial file": PARTIAL, "shard": SHARD, "manifest": "tensor-cache.json"}


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """Make a test that hangs fail."""

    def fail(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def server(tmp_path: Path, serve: Serve) -> FileServer:
    models.simple_model(tmp_path / "model", shards=2)
    return serve(tmp_path / "model")


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 30)


def device(minor: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
        except PermissionError:
            pytest.skip("only root makes devices")

    return make


def listening(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def locked(path: Path) -> None:
    path.write_bytes(b"{}")
    path.chmod(0)


def text(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": text(b""),
    "cut": text(b'{"nbytes": 3, "mt'),
    "not text": text(bytes(range(256))),
    "not an object": text(b"[1, 2]"),
    "a large number": text(b'{"nbytes": ' + b"9" * 5000 + b', "mtime_ns": 1}'),
    "NaN": text(b'{"nbytes": NaN, "mtime_ns": Infinity, "digests": {"md5": NaN}}'),
    "deep lists": text(b"[" * 60_000),
    "deep objects": text(b'{"a":' * 12_000),
    "half a surrogate pair": text(b'{"source": "\\ud800", "etag": "\\udfff", "nbytes": 1, "mtime_ns": 1}'),
    "terminal codes": text(b'{"source": "\\u001b[2J\\u0000\\n"}'),
    "sparse": sparse,
    "fifo": os.mkfifo,
    "/dev/zero": device(5),
    "/dev/full": device(7),
    "socket": listening,
    "directory": os.mkdir,
    "full directory": lambda path: (path / "a" / "b").mkdir(parents=True),
    "not readable": locked,
    "dangling": lambda path: path.symlink_to(path.parent / "nothing"),
}


def verbs(url: str, cache_dir: Path) -> None:
    """Use each verb that may meet the damaged file first."""
    with contextlib.suppress(ndcache.OfflineError):
        ndcache.load(url, offline=True).close()
    ndcache.is_cached(url)
    with contextlib.suppress(ndcache.NotFoundError):
        ndcache.verify(url)
    for command in (["ls"], ["ls", "--json"], ["doctor"]):
        result = CliRunner().invoke(cli.main, [*command, "--cache-dir", str(cache_dir)])
        assert (result.exit_code, type(result.exception)) == (0, type(None)), result.output
    with tvm.ArtifactCache() as cache:
        assert len(cache.fetch_with_cache(f"{url}{SHARD}")) == 1 << 16
        cache.delete_in_cache(f"{url}{SHARD}")


@pytest.mark.once
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("what", [*NOTES, *NAMES])
def test_row_57_anything_at_a_name_that_ndcache_uses_is_survived(
    server: FileServer, cache_dir: Path, what: str, damage: str
) -> None:
    directory = ndcache.fetch(server.url)
    with contextlib.closing(ndcache.load(server.url)) as weights:
        arrays = {name: array.copy() for name, array in weights.items()}
    for first in ("load", "fetch", "verbs", "delete"):
        plant(directory, server, what, damage)
        if (what, damage) == ("lock", "dangling") and first != "delete":
            with pytest.raises(ndcache.UnsafeCacheError, match="symbolic link"):
                ndcache.load(server.url)
            (directory / NOTES["lock"]).unlink()
        if first == "verbs":
            verbs(server.url, cache_dir)
        elif first == "fetch":
            ndcache.fetch(server.url)
        if first != "delete":
            with contextlib.closing(ndcache.load(server.url, verify="always")) as weights:
                models.assert_same(weights, arrays)
    assert ndcache.delete(server.url) > 0
    assert list(cache_dir.glob("[!.]*/*")) == []


def plant(directory: Path, server: FileServer, what: str, damage: str) -> None:
    """Put something else into the place of a file of ndcache's, and what makes ndcache look at it beside that."""
    path = directory / {**NOTES, **NAMES}[what]
    if what == "partial file":
        (directory / NOTES["note of a partial file"]).write_text(json.dumps(partial_note(server)))
    elif what == "note of a partial file":
        remove(directory / PARTIAL)
        (directory / PARTIAL).write_bytes(b"\0" * 100)
    if what in ("partial file", "note of a partial file", "lock"):
        (directory / SHARD).unlink(missing_ok=True)
    remove(path)
    DAMAGES[damage](path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def partial_note(server: FileServer) -> dict[str, Any]:
    return {
        "url": f"{server.url}{SHARD}",
        "etag": '"1"',
        "claim": "x",
        "sha256": None,
        "boot": "synced",
        "spans": [[0, 5]],
    }


ODD: list[Any] = [
    *(None, True, -1, 2**63, 10**4000, 1e308, float("nan")),
    *("", "x", "\ud800", "a\r\nb", "\0", "y" * 60_000),
    *([], [[0]], [["0", 1]], [[5, 1]]),
    *({}, {"md5": 5}, {"nope": "ab"}, {"shake_128": "ab"}, {"md5": "zz"}, {"sha256": "0" * 64}),
]


@pytest.mark.once
@pytest.mark.parametrize(
    ("what", "offline"),
    [
        *(("metadata", False), ("metadata", True)),
        *(("metadata of the manifest", False), ("metadata of the manifest", True)),
        ("note of a partial file", False),  # used only for downloads
    ],
)
def test_row_57_any_value_in_any_field_of_a_note_is_survived(
    server: FileServer, tmp_path: Path, what: str, offline: bool
) -> None:
    directory = ndcache.fetch(server.url)
    with contextlib.closing(ndcache.load(server.url)) as weights:
        arrays = {name: array.copy() for name, array in weights.items()}
    path, is_partial = directory / NOTES[what], what == "note of a partial file"
    content = partial_note(server) if is_partial else json.loads(path.read_text())
    for field in content:
        for value in ODD:
            for verify in ("download", "always"):
                if is_partial:
                    (directory / SHARD).unlink(missing_ok=True)
                    (directory / PARTIAL).write_bytes(b"\0" * 100)
                path.write_text(json.dumps({**content, field: value}))
                with contextlib.closing(ndcache.load(server.url, offline=offline, verify=verify)) as weights:
                    models.assert_same(weights, arrays)
    assert not (directory / ".ndcache" / "aside" / SHARD).exists()  # a wrong note is no reason to blame the file


def test_a_wrong_digest_in_the_metadata_of_a_good_file_is_corrected(server: FileServer) -> None:
    """The manifest's digest decides."""
    directory = ndcache.fetch(server.url)
    path = directory / NOTES["metadata"]
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "mtime_ns": 1, "digests": {"sha256": "0" * 64}, "claim": None}))
    assert ndcache.verify(server.url).ok
    assert json.loads(path.read_text())["digests"].keys() == {"md5"}


@pytest.mark.parametrize(
    ("text", "is_sendable"),
    [
        *(('"abc"', True), ('W/"ä"', True), ("a b", True), (None, False), ("", False), ("a\r\nb", False)),
        *(("\u20ac", False), (" a", False), ("x" * 1025, False), ("\ud800", False), ("\x7f", False)),
    ],
)
def test_which_texts_may_be_sent_to_a_server(text: str | None, is_sendable: bool) -> None:
    assert sendable(text) == (text if is_sendable else None)


def test_a_note_is_read_up_to_64_kib(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"a": "x" * 65_000}))
    (tmp_path / "b.json").write_text(json.dumps({"a": "x" * 66_000}))
    folder = Folder(tmp_path)
    assert (read_note(folder, "a.json") or {}).keys() == {"a"}
    assert read_note(folder, "b.json") is None
    shutil.rmtree(tmp_path)
    assert read_note(folder, "a.json") is None
