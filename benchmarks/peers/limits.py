"""Parts of a load that no loader can avoid, alone: the limits of this machine."""

from __future__ import annotations

from .machine import import_torch
from .timing import alive, figures, timed, timed_loads

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
    torch, device = import_torch(given)
    nbytes = min(256 << 20, given["stored"])
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device != "cpu")
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    there.copy_(host)
    count = max(1, given["stored"] // nbytes)

    def work() -> int:
        for _ in range(count):
            there.copy_(host, non_blocking=True)
        if device != "cpu":
            torch.cuda.synchronize()
        return int(count * nbytes)

    seconds, copied = timed_loads(given, work)
    scale = given["stored"] / copied
    if "later" in figures:
        figures["later"] *= scale
    return seconds * scale, given["expect"]


def page_cache_reads(given: Given) -> Measured:
    """Read all files in pieces of 4 MiB, in several threads, each into the same memory again and again."""
    import os
    from concurrent.futures import ThreadPoolExecutor

    nbytes = 4 << 20
    files = [os.open(f"{given['directory']}/{name}", os.O_RDONLY) for name in given["shards"]]
    pieces = [
        (file, start, min(nbytes, size - start))
        for file, size in zip(files, given["sizes"], strict=True)
        for start in range(0, size, nbytes)
    ]

    count = given["threads"]
    memory = [memoryview(bytearray(nbytes)) for _ in range(count)]

    def read(number: int) -> int:
        return sum(os.preadv(file, [memory[number][:size]], start) for file, start, size in pieces[number::count])

    def work() -> int:
        with ThreadPoolExecutor(count) as pool:
            return sum(pool.map(read, range(count)))

    return timed_loads(given, work)


def bare_loop(given: Given) -> Measured:
    """Read all files and copy them to the GPU with ndcache's own calls, in plain threads and with nothing around them.

    The pinned memory is there, and so is one block of the GPU's memory, which takes each piece.
    """
    import os
    from concurrent.futures import ThreadPoolExecutor

    torch, device = import_torch(given)
    from ndcache.devices.torch.driver import open_api
    from ndcache.devices.torch.pinned import PIECE_BYTES, take_lane

    api = open_api(torch.device(device))
    with api.active():
        lanes = [take_lane(api) for _ in range(given["threads"])]
    there = torch.empty(given["stored"], dtype=torch.uint8, device=device)
    torch.cuda.synchronize()
    files = [os.open(f"{given['directory']}/{name}", os.O_RDONLY) for name in given["shards"]]
    pieces, end = [], 0
    for file, size in zip(files, given["sizes"], strict=True):
        pieces += [(file, start, min(PIECE_BYTES, size - start), end + start) for start in range(0, size, PIECE_BYTES)]
        end += size

    def load(number: int) -> int:
        lane = lanes[number]
        with api.active():
            for file, start, size, place in pieces[number :: len(lanes)]:
                slot, event = lane.next_slot()
                if not api.has_happened(event):
                    api.wait(event)
                os.preadv(file, [lane.slots.views[slot][:size]], start)
                api.copy(there, place, lane.slots, lane.slots.starts[slot], size, lane.stream)
                api.record(event, lane.stream)
            api.synchronize(lane.stream)
        return sum(size for _, _, size, _ in pieces[number :: len(lanes)])

    def work() -> int:
        with ThreadPoolExecutor(len(lanes)) as pool:
            return sum(pool.map(load, range(len(lanes))))

    return timed_loads(given, work)
