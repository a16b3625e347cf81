"""The number of processes that a load uses."""

from __future__ import annotations

import os
from typing import Literal

__all__ = ["process_count", "usable_cores"]

#: With ``"auto"``: cores for each process, as beside the thread that decrypts there are those that write and hash; and
#: bytes for each process, which it downloads in about a second, several times as long as it takes to start.
_CORES_EACH = 4
_BYTES_EACH = 2 << 30


def process_count(wanted: int | Literal["auto"], missing_shards: int, missing_bytes: int) -> int:
    """Return how many processes should download, this one included.

    Parameters
    ----------
    wanted : int or "auto"
        The option `processes`.
    missing_shards, missing_bytes : int
        What is to be downloaded.
    """
    most = min(usable_cores() // _CORES_EACH, missing_bytes // _BYTES_EACH) if wanted == "auto" else wanted
    return max(1, min(most, missing_shards))


def usable_cores() -> int:
    """Return how many cores this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return count if quota == "max" else max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # no such limit, or an older system
        return count
