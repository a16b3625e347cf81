"""What the calls of a GPU load cost without ndcache around them: the limit that any loader through wgpu has here.

Run it as ``python benchmarks/gpu_bare.py``; it needs ndcache's dependencies and a GPU. Files of one shard each are
written to memory (or where ``--directory`` says). First each kind of call is made alone. Then a loop makes them all at
once, as a load must: threads read files into mapped staging buffers, one thread makes the tensors'
buffers, and the main thread has the GPU copy all that is ready with one submission, in whatever order it came. It
parses nothing, checks nothing, keeps no order, and makes no tensors. Of the loop, the seconds of each kind of call are
given: those of the main thread and of the one that makes buffers as they are, of the readers divided by their number.
With ``--bf16`` what the files hold is expanded to float32 by the GPU, with ndcache's shader, on the way to the tensors,
which then are twice as large as what ``--tensor-mib`` says.
"""

from __future__ import annotations

import argparse
import os
import queue
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wgpu

from ndcache.devices.gpu import open_gpu
from ndcache.devices.gpu.expand import Expander

MIB = 1 << 20
USAGE = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC | wgpu.BufferUsage.COPY_DST
STAGING = wgpu.BufferUsage.MAP_WRITE | wgpu.BufferUsage.COPY_SRC


class Timer:
    """Seconds by kind of call, of all threads together."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        taken = time.perf_counter() - start
        with self._lock:
            self.seconds[kind] += taken


def view(buffer: Any) -> memoryview:
    return memoryview(buffer._experimental_get_mapped_range()).cast("B")


def staging(device: Any, nbytes: int) -> Any:
    return device.create_buffer(size=nbytes, usage=STAGING, mapped_at_creation=True)


def read(handle: int, target: memoryview) -> None:
    at = 0
    while at < len(target):
        at += os.preadv(handle, [target[at:]], at)


def fence(device: Any) -> None:
    device.queue.read_buffer(device.create_buffer(size=4, usage=USAGE), 0, 4)


def copy(encoder: Any, chunk: Any, buffers: list[Any], tensor: int, expander: Expander | None) -> None:
    source, size = chunk, tensor
    if expander is not None:
        expander.encode(encoder, chunk, 0, chunk.size)
        source, size = expander.expanded, 2 * tensor
    for number, buffer in enumerate(buffers):
        encoder.copy_buffer_to_buffer(source, number * size, buffer, 0, size)


def bare(
    device: Any, files: list[int], shard: int, tensor: int, workers: int, ring: int, expander: Expander | None
) -> tuple[float, Timer]:
    """The loop; its seconds, and those of its calls."""
    timer, lock = Timer(), threading.Lock()
    todo, per_shard, size = iter(range(len(files))), shard // tensor, tensor * (1 if expander is None else 2)
    made: list[queue.SimpleQueue[list[Any]]] = [queue.SimpleQueue() for _ in files]
    filled: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    free: queue.SimpleQueue[Any] = queue.SimpleQueue()
    chunks, tensors = [], []
    begun = time.perf_counter()

    def make() -> None:
        for shard_buffers in made:
            with timer("make tensors"):
                shard_buffers.put([device.create_buffer(size=size, usage=USAGE) for _ in range(per_shard)])

    def next_chunk() -> Any:
        with lock:
            is_new = len(chunks) < ring // shard
            if is_new:
                chunks.append(None)
        if is_new:
            with timer("make staging"):
                return staging(device, shard)
        with timer("wait for staging"):
            chunk = free.get()
        with timer("map"):
            chunk.map_sync("WRITE")
        return chunk

    def work() -> None:
        while True:
            with lock:
                index = next(todo, None)
            if index is None:
                return
            chunk = next_chunk()
            with timer("read"):
                read(files[index], view(chunk))
            filled.put((index, chunk))

    threads = [threading.Thread(target=target) for target in [make, *[work] * workers]]
    for thread in threads:
        thread.start()
    left = len(files)
    while left:
        with timer("wait for reads"):
            ready = [filled.get()]
        while not filled.empty():
            ready.append(filled.get())
        encoder = device.create_command_encoder()
        for index, chunk in ready:
            with timer("wait for tensors"):
                buffers = made[index].get()
            with timer("encode"):
                chunk.unmap()
                copy(encoder, chunk, buffers, tensor, expander)
            tensors.extend(buffers)
        with timer("submit"):
            device.queue.submit([encoder.finish()])
        for _, chunk in ready:
            free.put(chunk)
        left -= len(ready)
    for thread in threads:
        thread.join()
    with timer("finish"):
        fence(device)
    seconds = time.perf_counter() - begun
    for kind in ("read", "map", "make staging", "wait for staging"):
        timer.seconds[kind] /= workers
    while not free.empty():
        free.get().destroy()
    for buffer in tensors:
        buffer.destroy()
    fence(device)
    return seconds, timer


def alone(
    device: Any, files: list[int], shard: int, tensor: int, workers: int, ring: int, expander: Expander | None
) -> dict[str, float]:
    """Seconds of each kind of call when nothing else goes on."""
    timer = Timer()
    size, per_shard = tensor * (1 if expander is None else 2), shard // tensor
    with timer("make tensors"):
        buffers = [device.create_buffer(size=size, usage=USAGE) for _ in range(len(files) * per_shard)]
    with timer("make staging"):
        chunks = [staging(device, shard) for _ in range(ring // shard)]
    todo, lock = iter(files), threading.Lock()

    def work(target: memoryview) -> None:
        while True:
            with lock:
                handle = next(todo, None)
            if handle is None:
                return
            read(handle, target)

    threads = [threading.Thread(target=work, args=[view(chunk)]) for chunk in chunks[:workers]]
    with timer("read"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for chunk in chunks:
        chunk.unmap()
    with timer("submit"):
        for index in range(len(files)):
            encoder = device.create_command_encoder()
            targets = buffers[index * per_shard : (index + 1) * per_shard]
            copy(encoder, chunks[index % len(chunks)], targets, tensor, expander)
            device.queue.submit([encoder.finish()])
    with timer("finish"):
        fence(device)
    for buffer in [*chunks, *buffers]:
        buffer.destroy()
    fence(device)
    return dict(timer.seconds)


def milliseconds(seconds: dict[str, float]) -> str:
    return ", ".join(f"{kind} {value * 1e3:.0f}" for kind, value in seconds.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--shard-mib", type=int, default=24)
    parser.add_argument("--tensor-mib", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[8])
    parser.add_argument("--ring-mib", type=int, default=512)
    parser.add_argument("--bf16", action="store_true", help="have the GPU expand what the files hold")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", default="/dev/shm" if os.path.isdir("/dev/shm") else None)
    options = parser.parse_args()
    shard, tensor, ring = (mib * MIB for mib in (options.shard_mib, options.tensor_mib, options.ring_mib))
    device = open_gpu("gpu").handle
    expander = Expander(device, shard) if options.bf16 else None
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        block = os.urandom(shard)
        paths = [Path(folder) / str(index) for index in range(round(options.gib * 1024 / options.shard_mib))]
        for path in paths:
            path.write_bytes(block)
        files = [os.open(path, os.O_RDONLY) for path in paths]
        gigabytes = len(files) * shard / 1e9
        for workers in options.workers:
            given = (device, files, shard, tensor, workers, ring, expander)
            first, _ = bare(*given)
            alone(*given)
            print(f"{workers} readers, each kind of call alone, in ms: {milliseconds(alone(*given))}", flush=True)
            found = sorted((bare(*given) for _ in range(options.rounds)), key=lambda pair: pair[0])
            seconds, timer = found[len(found) // 2]
            rates = [gigabytes / each for each, _ in found]
            print(f"{workers} readers, all at once: {statistics.median(rates):.1f} GB/s", end=" ")
            print(f"({rates[-1]:.1f} to {rates[0]:.1f}; first of all {gigabytes / first:.1f}),", end=" ")
            print(f"{seconds * 1e3:.0f} ms: {milliseconds(timer.seconds)}", flush=True)


if __name__ == "__main__":
    main()
