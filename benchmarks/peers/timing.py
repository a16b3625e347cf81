"""Time a contender's work."""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False  # `typing` is not imported here: `import_ndcache` times imports
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    #: What the harness gives a contender: see `benchmarks.harness.Contender`.
    Given: TypeAlias = dict[str, Any]
    #: Seconds, and bytes that were loaded or written.
    Measured: TypeAlias = tuple[float, int]

#: Of the timed work: seconds of CPU, those of child processes included, and the stages if it has any.
profile: dict[str, Any] = {}
#: What else was measured, for targets.
figures: dict[str, float] = {}
#: What was loaded, so that freeing it is in nobody's time.
alive: list[Any] = []
#: Bytes of memory that must be free at once when time starts.
memory_bytes = 0
#: Whether to sample where the threads are.
sampling = False
#: After this time, `timed_loads` begins no other load.
_LOADS_SECONDS = 3.0

_TOUCH = """
import mmap, sys
# Private, as the memory of arrays is. Shared maps have other pages, and would leave free memory as it was.
private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
with mmap.mmap(-1, int(sys.argv[1]), **private) as fresh:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        fresh.madvise(mmap.MADV_HUGEPAGE)
    for start in range(0, len(fresh), 4096):
        fresh[start] = 1
"""


def timed(work: Callable[[], int]) -> Measured:
    """Run `work`, which returns its bytes; return its seconds and bytes."""
    if memory_bytes > 1 << 20:
        _touch_memory(memory_bytes)
    busy, stop_sampling = _busy_seconds(), _start_sampling() if sampling else None
    before, start = os.times(), time.perf_counter()
    nbytes = work()
    seconds, after = time.perf_counter() - start, os.times()
    profile["busy_cores"] = (_busy_seconds() - busy) / seconds
    if stop_sampling is not None:
        profile.update(stop_sampling())
    profile["user"] = after.user + after.children_user - before.user - before.children_user
    profile["system"] = after.system + after.children_system - before.system - before.children_system
    return seconds, nbytes


def timed_loads(given: Given, work: Callable[[], int]) -> Measured:
    """Time `work` as `timed` does; with ``given["loads"]``, run it that often, and take the median of the later times.

    Between loads, what is in `alive` is freed, which is in nobody's time. When all loads together have taken
    `_LOADS_SECONDS`, no other one begins.
    """
    seconds, nbytes = timed(work)
    later: list[float] = []
    while len(later) + 1 < given.get("loads", 1) and seconds + sum(later) < _LOADS_SECONDS:
        free()
        start = time.perf_counter()
        again = work()
        later.append(time.perf_counter() - start)
        if again != nbytes:
            return seconds, again  # so that the contender is left out
    if later:
        later.sort()
        figures["later"] = (later[len(later) // 2] + later[~(len(later) // 2)]) / 2
    return seconds, nbytes


def free() -> None:
    """Close what was loaded, if it can be closed, and drop it."""
    import gc

    while alive:
        close = getattr(alive.pop(), "close", None)
        if close is not None:
            close()
    gc.collect()


def written(given: Given) -> int:
    """Return the bytes of the shards below the output directory, wherever they are."""
    names, found = set(given["shards"]), 0
    for folder, _, files in os.walk(given["out"]):
        found += sum(os.path.getsize(os.path.join(folder, name)) for name in files if name in names)
    return found


def logged_bytes(log: str) -> int:
    """Return the bytes that a server logged, as soon as it has logged nothing for a moment."""
    size = -1
    while size != (size := os.path.getsize(log)):
        time.sleep(0.2)
    with open(log) as file:
        return sum(int(line.split()[0]) for line in file)


def _busy_seconds() -> float:
    """Return the seconds that all cores of this machine have worked, for any process; 0 where nothing tells."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq = map(int, file.readline().split()[1:8])
    except (OSError, ValueError):
        return 0
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _start_sampling() -> Callable[[], dict[str, Any]]:
    """Look every 5 ms where the other threads are; return a function that ends this and returns what was seen.

    The interpreter's lock is busy if this thread, too, comes late: it waits for the lock after each sleep.
    """
    import threading
    from collections import Counter

    places: Counter[str] = Counter()
    late: list[float] = []
    stop = threading.Event()

    def sample() -> None:
        me = threading.get_ident()
        while not stop.is_set():
            due = time.perf_counter() + 0.005
            time.sleep(0.005)
            late.append(time.perf_counter() - due)
            for thread, frame in sys._current_frames().items():
                if thread != me:
                    code = frame.f_code
                    places[f"{os.path.basename(code.co_filename)}:{frame.f_lineno} {code.co_name}"] += 1

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()

    def finish() -> dict[str, Any]:
        stop.set()
        thread.join()
        samples = max(1, len(late))
        return {
            "threads": {place: count / samples for place, count in places.most_common(12)},
            "lock_wait_ms": 1000 * sum(late) / samples,
        }

    return finish


def _touch_memory(nbytes: int) -> None:
    """Let another process use that much memory, and end.

    A virtual machine may give memory that has been free for a second or so back to its host. Getting 2 GiB of it again
    can take 4 s instead of 0.2 s, for any process. The contenders are compared, not how long memory was free before.
    """
    import subprocess

    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        nbytes = min(nbytes, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 2)
    subprocess.run([sys.executable, "-S", "-c", _TOUCH, str(nbytes)], check=False)
