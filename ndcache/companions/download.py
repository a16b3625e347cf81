"""Download one companion file, whose size no manifest gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..errors import (
    ChecksumError,
    ConnectError,
    NdcacheError,
    SizeMismatchError,
    TransferError,
)
from ..format.strict_json import WEB_PAGE_HINT
from ..http.response import Response
from ..sources.client import Client
from ..sources.downloads.download import Downloader
from ..store.metadata import FileMetadata, settled_date
from .publish import publish
from .transfer import FileTransfer
from .wanted import WantedFile, check_headers

__all__ = ["FileSize", "ask_for_size", "download", "is_absence"]

T = TypeVar("T")

#: Statuses from 400 to 499 that do not tell whether the file exists: they are about access, time and pace.
_NOT_ABOUT_THE_FILE = (401, 407, 408, 429)


@dataclass(frozen=True)
class FileSize:
    """The size of a companion file, as a server announces it.

    Attributes
    ----------
    nbytes : int or None
    is_unchanged : bool
        Whether the cached file is still the right one.
    """

    nbytes: int | None
    is_unchanged: bool = False


def is_absence(error: NdcacheError) -> bool:
    """Return whether an error says that the server has no such file, however it says so."""
    if error.hint == WEB_PAGE_HINT:
        return True
    # The status of a proxy that refuses a tunnel is not about the file.
    if not isinstance(error, TransferError) or isinstance(error, ConnectError):
        return False
    return 300 <= (error.status or 0) < 500 and error.status not in _NOT_ABOUT_THE_FILE


def download(downloader: Downloader, wanted: WantedFile, urls: Sequence[str], known: FileMetadata | None) -> bool:
    """Download a file from the first URL that gives it, check it, and publish it in the cache.

    Parameters
    ----------
    downloader : Downloader
    wanted : WantedFile
    urls : sequence of str
        The source's URL, then those of mirrors.
    known : FileMetadata or None
        The metadata of the cached file: the source is asked whether it has changed.

    Returns
    -------
    bool
        False if the cached file has not changed.

    Raises
    ------
    TransferError, IntegrityError
        The first URL's error, with those of the others attached.
    CacheError, CancelledError
    """
    return _first_good(wanted, urls, lambda url: _download_from(downloader, wanted, url, urls[0], known))


def ask_for_size(client: Client, wanted: WantedFile, urls: Sequence[str], known: FileMetadata | None) -> FileSize:
    """Ask the first URL that gives a file for its size, and do not receive it.

    Raises
    ------
    TransferError, IntegrityError
        The first URL's error, with those of the others attached.
    """
    return _first_good(wanted, urls, lambda url: _ask(client, wanted, url, urls[0], known))


def _first_good(wanted: WantedFile, urls: Sequence[str], get: Callable[[str], T]) -> T:
    """Return what `get` returns for the first URL for which it does not fail."""
    errors: list[NdcacheError] = []
    for url in urls:
        try:
            return get(url)
        except (TransferError, SizeMismatchError, ChecksumError) as error:
            errors.append(error)
    first, *others = errors
    first.shard = wanted.name
    first.others += tuple(others)
    raise first


def _download_from(
    downloader: Downloader, wanted: WantedFile, url: str, source_url: str, known: FileMetadata | None
) -> bool:
    client = downloader.client
    conditions = {} if known is None or url != source_url else known.conditions
    with FileTransfer(downloader, wanted, url) as transfer:
        for attempt in client.attempts(wanted.policy, progress=lambda: transfer.nbytes):
            with attempt:
                partial = None
                while partial is None:
                    sent, conditions = conditions, {}  # the condition may have made the server fail
                    with client.get(url, source_url, transfer.headers or sent) as response:
                        if _is_unchanged(response, known, sent):
                            return False
                        partial = transfer.receive(response)
                etag, date = response.headers.get("ETag"), settled_date(response.headers)
                if url != source_url:  # a mirror's name for a version means nothing to the source
                    etag = date = None
                with client.context.stats.timed("publish", file=wanted.name):
                    publish(downloader.cache, partial, wanted.name, etag=etag, last_modified=date)
                return True
    raise AssertionError("the last attempt returns or raises")


def _ask(client: Client, wanted: WantedFile, url: str, source_url: str, known: FileMetadata | None) -> FileSize:
    conditions = {} if known is None or url != source_url else known.conditions
    for attempt in client.attempts(wanted.policy):
        sent, conditions = conditions, {}
        with attempt, client.get(url, source_url, sent) as response:
            if known is not None and _is_unchanged(response, known, sent):
                return FileSize(known.nbytes, is_unchanged=True)
            check_headers(response, wanted, url)
            return FileSize(response.content_length)
    raise AssertionError("the last attempt returns or raises")


def _is_unchanged(response: Response, known: FileMetadata | None, conditions: Mapping[str, str]) -> bool:
    """Return whether the server says, to a request with `conditions`, that it still has the known version."""
    return response.status == 304 and bool(conditions) and known is not None and known.is_confirmed_by(response.headers)
