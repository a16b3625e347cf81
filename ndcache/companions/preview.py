"""Find out which companion files a fetch would bring, and how large they are, without writing anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..store.metadata import FileMetadata
from .download import ask_for_size
from .request import CompanionRequest
from .rules import MAX_FILE_BYTES
from .wanted import WantedFile

__all__ = ["PreviewRequest", "PreviewedFile"]


@dataclass(frozen=True)
class PreviewedFile:
    """A companion file that is not fetched yet.

    Attributes
    ----------
    name : str
    nbytes : int or None
        Its size; None if the server does not tell.
    to_fetch : int or None
        The bytes that a fetch would receive; 0 if the cached file is still the right one.
    """

    name: str
    nbytes: int | None
    to_fetch: int | None


class PreviewRequest(CompanionRequest):
    """A request for the sizes of companion files. It receives only the configuration, which names the others.

    Attributes
    ----------
    found : list of PreviewedFile
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.found: list[PreviewedFile] = []
        self._urls: dict[str, Sequence[str]] = {}

    def _obtain(self, wanted: WantedFile, urls: Sequence[str], known: FileMetadata | None) -> None:
        nbytes, is_unchanged = wanted.nbytes, False
        if nbytes is None or known is not None:
            size = ask_for_size(self._downloader.client, wanted, urls, known)
            nbytes, is_unchanged = size.nbytes, size.is_unchanged
        self.found.append(PreviewedFile(wanted.name, nbytes, 0 if is_unchanged else nbytes))
        if not is_unchanged:
            self._urls[wanted.name] = urls

    def _content(self, name: str) -> bytes | None:
        if (urls := self._urls.get(name)) is None:
            return super()._content(name)
        client = self._downloader.client
        for attempt in client.attempts():
            with attempt, client.get(urls[0], urls[0], {}) as response:
                return response.read(MAX_FILE_BYTES)
        raise AssertionError("the last attempt returns or raises")

    def _remove(self, name: str) -> None:
        pass

    def _write_note(self) -> None:
        pass
