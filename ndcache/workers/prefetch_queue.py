"""A queue of items that a worker begins ahead of their turn, instead of waiting for an item that others work on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import Generic, TypeVar

__all__ = ["Prefetch", "PrefetchQueue"]

#: Seconds after which the items that others had begun are looked at again: whoever began them may have died.
_RECHECK = 0.5

T = TypeVar("T")


class Prefetch(Enum):
    """How an attempt to prefetch an item ended."""

    TRIED = auto()  # it is there now, or it failed; its own turn will tell
    NOT_NEEDED = auto()  # it is there
    BUSY = auto()  # somebody else works on it


class PrefetchQueue(Generic[T]):
    """Hold the items that nobody is known to have begun, in their order.

    Every item is handed out once, and again only if somebody else had begun it by then. So the queue costs the same for
    each item, however many workers and processes there are. Workers share it without a lock.

    Parameters
    ----------
    items : iterable
        Hashable.
    """

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._unseen = deque(items)
        self._busy: deque[T] = deque()
        self._begun: set[T] = set()
        self._recheck_at = 0.0

    def discard(self, item: T) -> None:
        """Note that this process has begun an item."""
        self._begun.add(item)

    def clear(self) -> None:
        """Forget all items."""
        self._unseen.clear()
        self._busy.clear()

    def prefetch_next(self, prefetch: Callable[[T], Prefetch]) -> bool:
        """Call ``prefetch(item)`` for one item after the other until one was tried; return whether one was."""
        if not self._unseen and self._busy and time.monotonic() >= self._recheck_at:
            self._recheck_at = time.monotonic() + _RECHECK
            self._move_busy()
        while True:
            try:
                item = self._unseen.popleft()
            except IndexError:
                return False
            if item in self._begun:
                continue
            result = prefetch(item)
            if result is Prefetch.BUSY:
                self._busy.append(item)
            elif result is Prefetch.TRIED:
                return True

    def _move_busy(self) -> None:
        for _ in range(len(self._busy)):
            try:
                self._unseen.append(self._busy.popleft())
            except IndexError:
                return  # another worker moves them, too
