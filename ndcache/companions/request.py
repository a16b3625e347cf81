"""One request for all companion files of a model, made by a worker."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from ..context import LoadContext
from ..errors import (
    CacheError,
    CancelledError,
    IntegrityError,
    ManifestError,
    NdcacheError,
    NotFoundError,
    TransferError,
    UnsafeCacheError,
    UnsafePathError,
)
from ..files.folder import is_gone
from ..format.safetensors.index import is_safetensors
from ..http.retry import RetryPolicy
from ..sources.client import Client
from ..sources.downloads.download import Downloader
from ..sources.listing import ListedFile, read_listing
from ..sources.remote import RemoteModel
from ..store.companion_note import CompanionNote
from ..store.directory import ModelDirectory
from ..store.layered import LayeredDirectory
from ..store.metadata import FileMetadata
from .download import download, is_absence
from .rules import (
    CHAT_CONFIG,
    MAX_FILE_BYTES,
    MAX_INCLUDED_BYTES,
    PACKAGE_MANIFEST,
    TRANSFORMERS_FILES,
    check_name,
    choose,
    config_name,
    is_pattern,
    is_refused,
    is_usual,
    matches,
    tokenizer_files,
)
from .wanted import WantedFile

__all__ = ["CompanionRequest", "adopt"]

Parsed = TypeVar("Parsed")
logger = logging.getLogger("ndcache")


class CompanionRequest:
    """One request for all companion files of a model, made by a worker.

    Parameters
    ----------
    model : RemoteModel
    context : LoadContext
    note : CompanionNote
        The note to complete.
    earlier : sequence of str
        The files that an earlier request has fetched.
    policy : RetryPolicy or None
        How often to try for files that need not be there; None for the load's own policy.
    """

    def __init__(
        self,
        model: RemoteModel,
        context: LoadContext,
        note: CompanionNote,
        earlier: Sequence[str],
        policy: RetryPolicy | None,
    ) -> None:
        # Statistics of its own: those of the load are about shards, and move its progress bar.
        self.stats = context.stats.beside()
        self.files: list[str] = []
        self.failures: dict[str, NdcacheError] = {}
        self._model = model
        self._cache = model.cache
        self._note = note
        self._earlier = earlier
        self._policy = policy
        client = Client(dataclasses.replace(context, stats=self.stats))
        client.commits = model.commits
        self._downloader = Downloader(client, model.cache)
        self._context = context
        self._taken = {model.manifest.name, *(shard.data_path for shard in model.manifest.shards)}

    def run(self) -> None:
        """Fetch the files, and note the result in the cache."""
        if is_safetensors(self._model.manifest.name):
            self._fetch_transformers_files()
        else:
            self._fetch_mlc_files()
        for name in self._included():
            self._fetch(name, is_included=True)
        for name in self._earlier:
            self._fetch(name, is_optional=True)
        self._write_note()

    def _fetch_mlc_files(self) -> None:
        config = CHAT_CONFIG
        if self._fetch(PACKAGE_MANIFEST, is_optional=True):
            config = self._read(PACKAGE_MANIFEST, config_name) or CHAT_CONFIG
        if self._fetch(config, is_optional=config == CHAT_CONFIG):
            for name in self._read(config, lambda data: tokenizer_files(data, config)) or ():
                self._fetch(name)

    def _fetch_transformers_files(self) -> None:
        try:
            listing = self._listing
        except TransferError as error:
            logger.debug("the files beside the model could not be listed: %s", str(error))
            listing = None
        if listing is None:
            for name in TRANSFORMERS_FILES:
                self._fetch(name, is_optional=True)
            return
        for name, file in listing.items():
            if is_usual(name) and (file.nbytes or 0) <= MAX_FILE_BYTES:
                self._fetch(name)

    def _included(self) -> Iterator[str]:
        """Yield the files that the caller includes, by name or by pattern."""
        for text in self._note.include:
            if not is_pattern(text):
                yield text
                continue
            try:
                yield from choose(text, self._listing or ())
            except (TransferError, UnsafePathError) as error:
                self.failures[text] = error

    @functools.cached_property
    def _listing(self) -> Mapping[str, ListedFile] | None:
        return read_listing(self._model.locations[0], self._downloader.client)

    def _fetch(self, name: str, *, is_optional: bool = False, is_included: bool = False) -> bool:
        """Fetch a file, unless it is excluded or was asked for before; return whether it is there now."""
        if name in self.files or name in self._taken:
            return name in self.files
        if name in self.failures or matches(name, self._note.exclude):
            return False
        try:
            check_name(name, self._taken)
            is_included |= name in self._note.include
            if is_refused(name) and not is_included:
                raise UnsafePathError(
                    f"{name!a} may hold code or other weights",
                    shard=name,
                    hint="It was not requested. Name it in include to fetch it, or in exclude to do without it.",
                )
            limit = MAX_INCLUDED_BYTES if is_included else MAX_FILE_BYTES
            listed = (self.__dict__.get("_listing") or {}).get(name, ListedFile())  # if it was read
            digests = {} if listed.sha256 is None else {"sha256": listed.sha256}
            digests.update([self._context.integrity[name]] if name in self._context.integrity else [])
            known = self._cache.metadata(name) if self._cache.is_intact(name) else None
            policy = self._policy if is_optional else None
            wanted = WantedFile(name, limit, listed.nbytes, digests, policy, is_optional)
            self._obtain(wanted, [location.url(name) for location in self._model.locations], known)
        except CancelledError:
            raise
        except (TransferError, IntegrityError, UnsafePathError, CacheError) as error:
            if is_optional and any(map(is_absence, (error, *error.others))):
                self._remove(name)
            elif not is_gone(error) or self._cache.layout.model.exists():  # otherwise the model was deleted just now
                self.failures[name] = error
            return False
        self.files.append(name)
        return True

    def _obtain(self, wanted: WantedFile, urls: Sequence[str], known: FileMetadata | None) -> None:
        download(self._downloader, wanted, urls, known)
        adopt(self._cache, wanted.name, self._context)  # the cached one may not have changed

    def _content(self, name: str) -> bytes | None:
        return self._cache.read(name, MAX_FILE_BYTES)

    def _read(self, name: str, parse: Callable[[bytes], Parsed]) -> Parsed | None:
        """Return what a file says, or None, and a failure, if it cannot be understood."""
        try:
            data = self._content(name)
            if data is None:
                raise NotFoundError(f"{name} was deleted just now", shard=name, retryable=True)
            return parse(data)
        except (ManifestError, NotFoundError, CacheError) as error:
            self.files.remove(name)
            self.failures[name] = error
            return None

    def _remove(self, name: str) -> None:
        """Remove a file that the server no longer has, unless somebody has changed it here."""
        if self._cache.is_intact(name):
            self._cache.remove(name)

    def _write_note(self) -> None:
        # The cache may have room, or be writable, next time.
        may_pass = {name for name, error in self.failures.items() if error.retryable or _is_of_disk(error)}
        note = dataclasses.replace(
            self._note,
            files=tuple(self.files),
            pending=tuple(name for name in self.failures if name in may_pass),
            failed=tuple(name for name in self.failures if name not in may_pass),
        )
        try:
            note.write(self._cache.layout)
        except CacheError as error:
            logger.debug("companion files could not be noted: %s", str(error))  # the next load asks again


def _is_of_disk(error: NdcacheError) -> bool:
    return isinstance(error, CacheError) and not isinstance(error, UnsafeCacheError)


def adopt(cache: ModelDirectory, name: str, context: LoadContext) -> None:
    """Copy a file into a directory of the user's, if only the cache has it."""
    if isinstance(cache, LayeredDirectory):
        cache.adopt(name, check=context.cancellation.check)
