"""Turn errors of the operating system about the cache into errors that say what to do."""

from __future__ import annotations

import errno
from pathlib import Path
from types import TracebackType

from ..errors import CacheError, CacheUnavailableError, DiskFullError, NdcacheError
from ..files.descriptors import check_shortage

__all__ = ["Reporting", "disk_full"]


class Reporting:
    """A block in which what the operating system says becomes an error that says what to do."""

    __slots__ = ("_directory", "_name")

    def __init__(self, directory: Path, name: str | None) -> None:
        self._directory = directory
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, OSError) or isinstance(error, NdcacheError):
            return
        check_shortage(error)  # of which the directory is not to blame
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(self._directory, name=self._name) from error
        raise _unavailable(self._directory, error, self._name) from error


def _unavailable(directory: Path, error: OSError, name: str | None) -> CacheError:
    return CacheUnavailableError(
        f"the cache directory {directory} cannot be used: {error.strerror or error}",
        shard=name,
        hint="Choose another one: cache_dir, --cache-dir, or NDCACHE_HOME.",
    )


def disk_full(
    directory: Path, needed: int | None = None, free: int | None = None, *, name: str | None = None
) -> DiskFullError:
    detail = "" if needed is None else f": {needed:,} bytes needed, {free:,} free"
    error = DiskFullError(
        f"no room in the cache directory {directory}{detail}",
        shard=name,
        expected=needed,
        received=free,
        hint="Free some space (ndcache ls, ndcache rm), or choose another disk: cache_dir, --cache-dir, NDCACHE_HOME.",
    )
    error.errno = errno.ENOSPC
    return error
