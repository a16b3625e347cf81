"""Shards that idle workers download ahead of their turn."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

from ..errors import CancelledError, IntegrityError, NdcacheError, TransferError
from ..files.folder import is_gone
from ..format.manifest import Shard
from ..workers.prefetch_queue import PrefetchQueue

__all__ = ["Prefetches"]

logger = logging.getLogger("ndcache")


class Prefetches:
    """Shards that workers download into the cache ahead of their turn, while others download those in turn.

    A failure is left to the shard's own turn, when somebody else may have published it.

    Parameters
    ----------
    shards : sequence of Shard
        Those that the load wants and that were not ready when it began.
    download : callable
        Download one of them into the cache; return False if somebody else is doing so.
    """

    def __init__(self, shards: Sequence[Shard] = (), download: Callable[[Shard], bool] = lambda _: True) -> None:
        self.shards = {shard.data_path: shard for shard in shards}
        self._download = download
        self._queue = PrefetchQueue(self.shards)
        self._failures: dict[str, NdcacheError] = {}  # those after which another attempt would be in vain

    def begin(self, shard: Shard) -> None:
        """Leave a shard to its own turn, which has come."""
        self._queue.discard(shard.data_path)

    def next(self) -> Callable[[], None] | None:
        """Return a function that downloads a shard unless somebody else does; None if all are there or begun."""
        name = self._queue.take()
        return None if name is None else functools.partial(self._prefetch, self.shards[name])

    def raise_failure(self, shard: Shard) -> None:
        """Raise the error of a shard that need not be requested again, if there was one."""
        if (failure := self._failures.pop(shard.data_path, None)) is not None:
            raise failure

    def _prefetch(self, shard: Shard) -> None:
        try:
            if not self._download(shard):
                self._queue.put_back(shard.data_path)
        except CancelledError:
            raise
        except (NdcacheError, OSError) as error:
            logger.debug("%s was not fetched ahead of its turn: %s", shard.data_path, str(error))
            if isinstance(error, (TransferError, IntegrityError)):
                if not error.retryable or error.max_retries == 0:
                    self._failures[shard.data_path] = error.with_traceback(None)
            elif not is_gone(error):
                self._queue.clear()  # the disk is full, say
