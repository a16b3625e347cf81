"""The missing byte ranges of one file, shared by the worker that owns the file and its helpers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ...store.partials.ranges import ByteRange, ByteRanges
from ...workers.cancellation import Cancellation

__all__ = ["RangeQueue", "RangeTask"]


@dataclass(eq=False)
class RangeTask:
    """A byte range that one worker receives.

    Attributes
    ----------
    start, end : int
        The range as it was taken from the queue.
    position : int
        The next byte to receive.
    """

    start: int
    end: int
    position: int = field(init=False)

    def __post_init__(self) -> None:
        self.position = self.start

    @property
    def missing(self) -> ByteRange:
        """Return the range that has not been received."""
        return self.position, self.end

    @property
    def is_done(self) -> bool:
        """Return whether all bytes have been received."""
        return self.position == self.end


class RangeQueue:
    """Share out the missing byte ranges of one file, task by task.

    The worker that owns the file takes tasks just like its helpers. It waits only while helpers have all the ranges
    that are left, and it ends the queue before it does anything else with the file.

    Parameters
    ----------
    ranges : ByteRanges
    cancellation : Cancellation
        The load's cancellation.
    task_bytes : tuple of int, optional
        The least and the most bytes of a task. By default, each range is one task.
    max_helpers : int
        Tasks are smaller towards the end, so that up to this many helpers finish at about the same time.
    is_streamed : bool
        Whether the bytes are used as they come. Then tasks are smaller towards the beginning, too, so that the first
        bytes do not wait for many others. Default False.

    Attributes
    ----------
    cancellation : Cancellation
        The helpers' cancellation, a child of the load's.
    """

    def __init__(
        self,
        ranges: ByteRanges,
        cancellation: Cancellation,
        task_bytes: tuple[int, int] | None = None,
        max_helpers: int = 0,
        *,
        is_streamed: bool = False,
    ) -> None:
        self.cancellation = cancellation.child()
        self._missing = ByteRanges(ranges)
        self._task_bytes = task_bytes
        self._max_helpers = self._places = max_helpers if task_bytes is not None else 0
        self._is_streamed = is_streamed
        self._has_asked = False
        self._helping = 0
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    def helpers_wanted(self) -> int:
        """Return how many helpers to ask for now.

        The first time, it is as many as there is work for. Later, each helper that failed is replaced, one at a time.
        """
        with self._changed:
            assert self._task_bytes is not None or not self._places
            least = self._task_bytes[0] if self._task_bytes is not None else 1
            useful = sum(-(-(end - start) // least) for start, end in self._missing)
            count = min(self._places, min(useful, 1) if self._has_asked else useful)
            self._places, self._has_asked = (self._places - count if self._has_asked else 0), True
            return count

    def next(self) -> RangeTask | None:
        """Return the owner's next task, or None if all ranges are taken.

        Raises
        ------
        BaseException
            An unexpected failure of a helper.
        """
        with self._changed:
            if self._failure is not None:
                raise self._failure
            return self._cut()

    def put_back(self, task: RangeTask) -> None:
        """Put the missing bytes of a task back into the queue."""
        with self._changed:
            self._put_back(task)

    @contextmanager
    def next_for_helper(self) -> Iterator[RangeTask | None]:
        """Yield a helper's next task, or None if there is none; afterwards, put back its missing bytes."""
        with self._changed:
            task = None if self.cancellation.is_set else self._cut()
            self._helping += 1
        try:
            yield task
        finally:
            with self._changed:
                self._helping -= 1
                if task is not None:
                    self._put_back(task)
                self._changed.notify_all()

    def helper_done(self, failure: BaseException | None = None) -> None:
        """Note that a helper gives up. The owner raises the `failure`, if there was an unexpected one."""
        with self._changed:
            self._places += 1
            self._failure = failure or self._failure

    def wait(self) -> None:
        """Wait until there is a range to take, or no helper is at work."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._missing) or not self._helping)

    def end(self) -> None:
        """Stop the helpers, and wait until none is at work."""
        self.cancellation.set()
        with self._changed:
            self._changed.wait_for(lambda: not self._helping)

    def _put_back(self, task: RangeTask) -> None:
        if not task.is_done:
            self._missing.add(task.position, task.end)
        self._changed.notify_all()

    def _cut(self) -> RangeTask | None:
        if not len(self._missing):
            return None
        start, end = next(iter(self._missing))
        if self._task_bytes is not None:
            (least, most), workers = self._task_bytes, self._max_helpers + 1
            most = min(most, self._missing.nbytes // (2 * workers))
            if self._is_streamed:
                most = min(most, start // workers)
            end = min(end, start + max(least, most))
        self._missing = self._missing.without(ByteRanges([(start, end)]))
        return RangeTask(start, end)
