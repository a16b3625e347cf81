"""One report of progress, in the words of web-llm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Progress", "ProgressCallback", "ProgressReport", "report_text"]

_MIB = 1 << 20
_START_TEXT = "Start to fetch params"


@dataclass(frozen=True)
class ProgressReport:
    """One report of a load's progress.

    Attributes
    ----------
    progress : float
        From 0 to 1, by bytes.
    time_elapsed : float
        Seconds since the start.
    cache_only : bool
        Whether every shard was cached at the start.
    text : str
        The report in the words of web-llm.
    phase : str
        ``"start"``, ``"fetch"`` (some shards come over the network) or ``"load"`` (all from cache).
    shards_done, shards_total : int
        How many shards are on the device, and how many are wanted.
    bytes_done, bytes_total : int
        The same in bytes of shards. With reports in between, `bytes_done` also counts shards that are not yet on the
        device, and the bytes of incomplete ones.
    bytes_per_second : float
        The rate over the last ten seconds. What was there before, from the cache or an interrupted load, does not count
        unless all shards were cached.
    is_shard : bool
        Whether this is one of web-llm's reports: the start, and each number of shards done. False for those in between
        that `progress_interval` asks for.
    shards_here : int
        How many shards are complete on this machine. They come in parallel, in any order, so this may be more than
        `shards_done`.
    seconds_left : float or None
        The time until all bytes are here, at this rate; None if nothing comes.
    waiting : str or None
        Why nothing has come for a second, if that is known: ``"waiting for process 1234, which downloads
        params_shard_3.bin"``, ``"the server asks us to wait 30 s"``, ``"reconnecting to host, attempt 3"``.
    model : str
        The last part of the source's name.
    """

    progress: float
    time_elapsed: float
    cache_only: bool
    text: str
    phase: str
    shards_done: int
    shards_total: int
    bytes_done: int
    bytes_total: int
    bytes_per_second: float
    is_shard: bool = True
    shards_here: int = 0
    seconds_left: float | None = None
    waiting: str | None = None
    model: str = ""


ProgressCallback: TypeAlias = Callable[[ProgressReport], object]
#: The type of the ``progress`` option.
Progress: TypeAlias = "bool | ProgressCallback | Iterable[bool | ProgressCallback] | None"


def report_text(
    phase: str, shards_done: int, shards_total: int, nbytes: int, fraction: tuple[int, int], elapsed: float
) -> str:
    """Return a report in the words of web-llm. Its users parse them.

    Parameters
    ----------
    phase : {"start", "fetch", "load"}
    shards_done, shards_total, nbytes : int
    fraction : tuple of int
        How much is done, and of how much.
    elapsed : float
        In seconds.
    """
    if phase == "start":
        return _START_TEXT
    done, total = fraction
    # Computed in integers: as a float, 29 % may be rounded down to 28.
    state = f"{done * 100 // total}% completed, {math.ceil(elapsed)} secs elapsed."
    position, megabytes = f"[{shards_done}/{shards_total}]", -(-nbytes // _MIB)
    if phase == "load":
        return f"Loading model from cache{position}: {megabytes}MB loaded. {state}"
    return (
        f"Fetching param cache{position}: {megabytes}MB fetched. {state}"
        " It can take a while when we first visit this page to populate the cache."
        " Later refreshes will become faster."
    )
