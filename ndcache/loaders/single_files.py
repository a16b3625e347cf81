"""The methods of a loader for single files, such as a tokenizer."""

from __future__ import annotations

from pathlib import Path

from ..caller import public
from ..errors import OfflineError, redact
from ..sources.client import Client
from ..sources.downloads.download import Downloader
from ..sources.file_url import choose_model, delete_file, file_url, find_file
from .base import LoaderBase

__all__ = ["SingleFileLoader"]

#: The limit of a single file, whose size no manifest gives; it keeps an endless body from filling the disk.
_MAX_FILE_BYTES = 64 << 30


class SingleFileLoader(LoaderBase):
    """Fetch single files into the cache, and find and delete them there."""

    @public
    def find_file(self, url: str) -> Path | None:
        """Return the path of a single file in the cache, or None if it is not there. Makes no request.

        Raises
        ------
        CacheUnavailableError
        UnsafePathError, ValueError
            `url` does not name a file on a server.
        """
        return find_file(self._resources.cache, self._at_revision(url))

    @public
    def fetch_file(self, url: str) -> Path:
        """Download a single file, such as a tokenizer, into the cache unless it is there.

        It is stored with the nearest model above it that has a cache directory, else under its own directory's URL.

        Returns
        -------
        pathlib.Path
            The file in the cache.

        Raises
        ------
        TransferError, OfflineError, CacheError
        UnsafePathError, ValueError
            `url` does not name a file on a server.
        """
        url = self._at_revision(url)
        if (found := find_file(self._resources.cache, url)) is not None:
            return found
        location, name = choose_model(self._resources.cache, url)
        if self._resources.is_offline:
            error = OfflineError(f"offline, and not in the cache: {redact(url)}")
            error.missing = (name,)
            raise error
        with self._resources.context(location, threads=1) as context:
            downloader = Downloader(Client(context), context.cache.open(location))
            return context.pool.run(
                lambda: downloader.download_file(name, file_url(url), _MAX_FILE_BYTES), tasks_to_come=0
            )

    @public
    def delete_file(self, url: str) -> None:
        """Remove a single file from the cache, wherever it lies there; do nothing if it is not cached.

        Raises
        ------
        CacheError
        UnsafePathError, ValueError
            `url` does not name a file on a server.
        """
        delete_file(self._resources.cache, self._at_revision(url))

    def _at_revision(self, url: str) -> str:
        revision = self._options.revision
        return url if revision is None else file_url(url, revision)
