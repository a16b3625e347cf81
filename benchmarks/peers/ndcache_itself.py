"""The verbs of ndcache, and what its imports cost."""

from __future__ import annotations

from .machine import Unavailable, open_gpu
from .timing import alive, figures, logged_bytes, profile, timed, written

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from typing import Any

    from .timing import Given, Measured


def ndcache_load(given: Given) -> Measured:
    """Load all weights; from a URL into an empty cache this checks md5 and syncs each file to disk."""
    import ndcache.sources.download
    from ndcache import load

    if given.get("no_ranges"):
        if not hasattr(ndcache.sources.download, "RANGE_THRESHOLD"):
            raise Unavailable("this ndcache has no byte ranges for large shards")
        ndcache.sources.download.RANGE_THRESHOLD = 1 << 62
    device = open_gpu() if given.get("gpu") else "cpu"

    source, options = given.get("url") or given["directory"], _options(given)

    def work() -> int:
        weights = load(source, device, **options)
        alive.append(weights)
        profile["stages"] = {name: seconds for name, seconds in weights.stats.seconds.items() if seconds >= 0.001}
        return sum(tensor.nbytes for tensor in weights.values())

    return timed(work)


def ndcache_fetch(given: Given) -> Measured:
    """Fetch with md5 and fsync, without decoding."""
    from ndcache import fetch

    def work() -> int:
        fetch(given["url"], **_options(given))
        return written(given)

    return timed(work)


def ndcache_together(given: Given) -> Measured:
    """Load the same model in several processes at once, which share a cache, until the last one has all of it.

    Time starts when all have imported ndcache. How many bytes the server sent is a figure of its own.
    """
    import json
    import subprocess
    import sys

    command = [sys.executable, "-c", _TOGETHER, given["url"], json.dumps(_options(given))]
    sent = logged_bytes(given["log"])
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(given["together"])
    ]

    def finish(process: subprocess.Popen[str], text: str) -> str:
        lines = process.communicate(text)[0].split()
        if process.returncode:
            raise SystemExit(f"a process of several ended with {process.returncode}")
        return lines[-1]

    def work() -> int:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        loaded = {finish(process, "") for process in processes}
        return int(loaded.pop()) if len(loaded) == 1 else 0

    for process in processes:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit("a process of several ended before it could begin")
    measured = timed(work)
    figures["origin_bytes"] = logged_bytes(given["log"]) - sent
    return measured


_TOGETHER = """
import json, sys
from ndcache import load
print("ready", flush=True)
sys.stdin.readline()
with load(sys.argv[1], **json.loads(sys.argv[2])) as weights:
    print(sum(tensor.nbytes for tensor in weights.values()))
"""


def _options(given: Given) -> dict[str, Any]:
    """Return the options of a load that writes to the output directory."""
    names = {name: name for name in ("verify", "processes", "memory_limit")} | {"workers": "max_workers"}
    return {"cache_dir": given["out"], **{option: given[name] for name, option in names.items() if name in given}}


def ndcache_stream(given: Given) -> Measured:
    """Stream a local directory and keep nothing."""
    from ndcache import stream

    return timed(lambda: sum(array.nbytes for _, array in stream(given["directory"])))


def import_ndcache(given: Given) -> Measured:
    """Import the package."""

    def work() -> int:
        import ndcache  # noqa: F401

        return int(given["expect"])

    return timed(work)


def import_ndcache_load(given: Given) -> Measured:
    """Import the package and all that its first use imports."""

    def work() -> int:
        from ndcache import load  # noqa: F401

        return int(given["expect"])

    return timed(work)


def import_requests_numpy(given: Given) -> Measured:
    """Import the two packages that ndcache cannot do without."""

    def work() -> int:
        import numpy  # noqa: F401
        import requests  # noqa: F401

        return int(given["expect"])

    return timed(work)


def empty_gpu(given: Given) -> Measured:
    """Import ndcache and open a device, to see what memory that takes."""
    from ndcache import load  # noqa: F401

    def work() -> int:
        alive.append(open_gpu())
        return int(given["expect"])

    return timed(work)
