"""The verbs of ndcache, and what its imports cost."""

from __future__ import annotations

from .machine import Unavailable, open_gpu
from .timing import alive, profile, timed, written

TYPE_CHECKING = False
if TYPE_CHECKING:
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

    def work() -> int:
        source, workers = given.get("url") or given["directory"], given.get("workers", 8)
        weights = load(source, device, cache_dir=given["out"], max_workers=workers)
        alive.append(weights)
        profile["stages"] = {name: seconds for name, seconds in weights.stats.seconds.items() if seconds >= 0.001}
        return sum(tensor.nbytes for tensor in weights.values())

    return timed(work)


def ndcache_fetch(given: Given) -> Measured:
    """Fetch with md5 and fsync, without decoding."""
    from ndcache import fetch

    def work() -> int:
        fetch(given["url"], cache_dir=given["out"], max_workers=given.get("workers", 8))
        return written(given)

    return timed(work)


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
