"""Slots that limit how many tasks run at once."""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue

__all__ = ["Slots"]


class Slots:
    """Limit how many tasks run at once. A task may release its slot before it ends.

    Parameters
    ----------
    count : int
    """

    # A queue and not a semaphore: Ctrl-C can come between any two steps of the main thread, and must not leave a lock
    # locked that the workers need.

    def __init__(self, count: int) -> None:
        self._free: SimpleQueue[bool] = SimpleQueue()  # True for a slot, False for `wake`
        self._this_thread = threading.local()
        for _ in range(count):
            self.add()

    def acquire(self, timeout: float | None = None) -> bool:
        """Wait for a free slot, or `wake`, so many seconds at most; return whether this thread holds a slot now."""
        try:
            is_slot = self._free.get(timeout=timeout)
        except Empty:
            return False
        self._this_thread.holds_slot = is_slot
        return is_slot

    def wake(self) -> None:
        """End the wait of one thread that waits for a slot, or of the next one that does."""
        self._free.put(False)

    @property
    def is_held(self) -> bool:
        """Return whether this thread holds a slot."""
        return getattr(self._this_thread, "holds_slot", False)

    def release(self) -> None:
        """Free the slot of this thread, if it still holds one."""
        if self.is_held:
            self._this_thread.holds_slot = False
            self._free.put(True)

    def add(self) -> None:
        """Add one slot."""
        self._free.put(True)
