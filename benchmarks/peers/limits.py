"""Parts of a load that no loader can avoid, alone: the limits of this machine."""

from __future__ import annotations

from .machine import import_torch
from .timing import alive, timed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .timing import Given, Measured

#: Parts into which 8 threads divide one large array.
_PARTS = 64


def md5_alone(given: Given) -> Measured:
    """Compute the digests of all files, in 8 threads."""
    import hashlib
    from concurrent.futures import ThreadPoolExecutor

    def digest(name: str) -> str:
        with open(f"{given['directory']}/{name}", "rb") as file:
            md5 = hashlib.md5()
            while data := file.read(1 << 18):
                md5.update(data)
            return md5.hexdigest()

    def work() -> int:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(digest, given["shards"]))
        return int(given["expect"])

    return timed(work)


def expand_alone(given: Given) -> Measured:
    """Expand bfloat16 in memory to float32 in memory that exists already, in 8 threads: no files, no page faults."""
    from concurrent.futures import ThreadPoolExecutor

    import ml_dtypes
    import numpy

    count = given["expect"] // 4
    source = numpy.ones(count, ml_dtypes.bfloat16)
    target = numpy.ones(count, numpy.float32)

    def expand(index: int) -> None:
        part = slice(count * index // _PARTS, count * (index + 1) // _PARTS)
        target[part] = source[part]

    def work() -> int:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(expand, range(_PARTS)))
        return int(target.nbytes)

    return timed(work)


def pages_alone(given: Given) -> Measured:
    """Allocate the memory of the expanded weights and touch it, in 8 threads."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy

    def allocate(index: int) -> Any:
        return numpy.full(given["expect"] // _PARTS, 0, numpy.uint8)

    def work() -> int:
        with ThreadPoolExecutor(8) as pool:
            alive.extend(pool.map(allocate, range(_PARTS)))
        return sum(array.nbytes for array in alive)

    return timed(work)


def pinned_copy(given: Given) -> Measured:
    """Copy 256 MiB from pinned memory to the GPU, again and again, until the model's bytes are copied."""
    torch = import_torch()
    nbytes = min(256 << 20, given["stored"])
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    there.copy_(host)
    torch.cuda.synchronize()
    count = max(1, given["stored"] // nbytes)

    def work() -> int:
        for _ in range(count):
            there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        return int(count * nbytes)

    seconds, copied = timed(work)
    return seconds * given["stored"] / copied, given["expect"]
