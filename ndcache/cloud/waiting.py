"""Wait for the requests that obstore makes itself, so that a cancellation ends the wait."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ..errors import StallError
from ..workers.cancellation import Cancellation
from ..workers.stall import StallWatch

__all__ = ["wait_for"]

T = TypeVar("T")

#: Seconds for all requests of one call.
_TIMEOUT = 30.0


def wait_for(work: Callable[[], Awaitable[T]], cancellation: Cancellation) -> T:
    """Return the result of asynchronous work, done in an event loop of this thread's own.

    Raises
    ------
    CancelledError
        `cancellation` was set.
    StallError
        It takes too long.
    """
    import asyncio  # here, as few loads need it, and its import takes as long as that of ten modules of ndcache

    async def run() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the work has just been done, and the loop is closed
                loop.call_soon_threadsafe(task.cancel)

        watch = StallWatch(_TIMEOUT)
        watch.add_waker(wake)
        cancellation.add(watch)
        try:
            return await work()
        finally:
            cancellation.remove(watch)

    cancellation.check()
    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        cancellation.check()
    raise StallError("the storage, or what has its credentials, does not answer", hint="Try again later.")
