"""A queue of items that workers begin ahead of their turn, while others work on the items whose turn it is."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Generic, TypeVar

__all__ = ["PrefetchQueue"]

#: Seconds after which the items that others had begun are handed out again: whoever began them may have died.
_RECHECK = 0.5

T = TypeVar("T")


class PrefetchQueue(Generic[T]):
    """Hand out, in order, the items that nobody is known to have begun.

    Each item is handed out once, and again only if it is put back. So the cost of looking for an item that nobody has
    begun does not grow with their number. Workers share the queue without a lock.

    Parameters
    ----------
    items : iterable
        Hashable.
    """

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._items = deque(items)
        self._put_back = deque[T]()
        self._begun = set[T]()
        self._recheck_at = 0.0

    def discard(self, item: T) -> None:
        """Do not hand out an item any more, because its turn has come."""
        self._begun.add(item)

    def clear(self) -> None:
        """Hand out nothing any more."""
        self._items.clear()
        self._put_back.clear()

    def put_back(self, item: T) -> None:
        """Hand out an item again, after a while, because somebody else is working on it."""
        if not self._put_back:
            self._recheck_at = time.monotonic() + _RECHECK
        self._put_back.append(item)

    def take(self) -> T | None:
        """Return the next item; None if there is none now."""
        with suppress(IndexError):  # another worker may take the last one at any moment
            if not self._items and self._put_back and time.monotonic() >= self._recheck_at:
                for _ in range(len(self._put_back)):
                    self._items.append(self._put_back.popleft())
            while True:
                if (item := self._items.popleft()) not in self._begun:
                    return item
        return None
