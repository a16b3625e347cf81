"""Downloads of one shard from a scripted server, for tests: the shard, responses, and what they leave on disk."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import ndcache
from ndcache.sources.client import Client
from ndcache.sources.downloads.download import Downloader
from ndcache.sources.downloads.shard_request import DownloadPlan
from ndcache.store.directory import ModelDirectory

from .servers import ScriptedServer, reply, then_close

DATA = os.urandom(100_000)
PATH = "/params_shard_0.bin"
SHARD = ndcache.Shard(
    data_path="params_shard_0.bin",
    nbytes=len(DATA),
    md5sum=hashlib.md5(DATA).hexdigest(),
    sha256sum=None,
    format="raw-shard",
    records=(),
)
OTHER = bytes(reversed(DATA))
ETAG = {"ETag": '"1"'}
#: The Range headers of requests for the whole shard, and for what `broken_off` leaves out.
WHOLE, REST = None, "bytes=60000-99999"


def changed(downloader: Downloader, **options: Any) -> Downloader:
    """Return a downloader with other options."""
    return Downloader(Client(replace(downloader.client.context, **options)), downloader.cache)


def plan(urls: list[str], shard: ndcache.Shard = SHARD) -> DownloadPlan:
    return DownloadPlan(shard, tuple(urls), "content")


def fetched(downloader: Downloader, urls: list[str], shard: ndcache.Shard = SHARD) -> bytes:
    file = downloader.download_shard(plan(urls, shard)).file
    assert file is not None
    with file:
        return file.read()


def files(directory: Path) -> list[str]:
    """Return everything that a reader of the directory could take for a shard, and every partial file."""
    found = [path for path in directory.rglob("*") if path.is_file()]
    return sorted(
        str(path.relative_to(directory))
        for path in found
        if path.parent.name != "validators" and path.suffix != ".json"
    )


def rest_of(data: bytes, start: int, etag: str = '"1"', **headers: str) -> bytes:
    """Return the response to a request for everything from `start` on."""
    content_range = f"bytes {start}-{len(data) - 1}/{len(data)}"
    return reply(206, data[start:], {"ETag": etag, "Content-Range": content_range, **headers})


def broken_off(nbytes: int = 60_000, data: bytes = DATA, etag: str | None = '"1"') -> Any:
    """Return a response whose body ends after `nbytes`."""
    headers = {} if etag is None else {"ETag": etag}
    return then_close(reply(200, data[:nbytes], headers, length=len(data)))


def ranges(server: ScriptedServer) -> list[str | None]:
    return [request.headers.get("range") for request in server.requests]


def leave_partial(cache: ModelDirectory, url: str, data: bytes, etag: str = '"1"', content_id: str = "content") -> None:
    """Leave a partial file behind, as a killed process does."""
    with cache.partials.create("params_shard_0.bin") as partial:
        partial.set_source(url, etag, content_id, None)
        partial.write(data)
