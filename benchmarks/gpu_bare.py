"""Time the calls of a GPU load without ndcache around them: the limit of any loader that uses wgpu on this machine.

Run it as ``python benchmarks/gpu_bare.py``; it needs ndcache's dependencies and a GPU. It writes files of one shard
each to memory (or to ``--directory``). First it makes each kind of call alone. Then a loop makes them all at once, as a
load must: threads read files into mapped staging buffers, one thread makes the tensors' buffers, and the main thread
has the GPU copy everything that is ready with one submission, in any order. The loop parses nothing, checks nothing,
keeps no order, and makes no tensors. It reports the seconds of each kind of call: those of the main thread and of the
thread that makes buffers as they are, those of the readers divided by their number. With ``--bf16``, the GPU expands
the files' content to float32 with ndcache's shader, so that tensors are twice as large as ``--tensor-mib`` says.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import wgpu

from ndcache.devices.gpu import open_gpu
from ndcache.devices.gpu.expand import Expander

MIB = 1 << 20
_TENSOR_USAGE = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC | wgpu.BufferUsage.COPY_DST
_STAGING_USAGE = wgpu.BufferUsage.MAP_WRITE | wgpu.BufferUsage.COPY_SRC


class Timer:
    """Seconds by kind of call, of all threads together."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        taken = time.perf_counter() - start
        with self._lock:
            self.seconds[kind] += taken


@dataclass(frozen=True)
class Load:
    """A model to load, and the calls that load it.

    Attributes
    ----------
    device : wgpu.GPUDevice
    files : list of int
        Descriptors of files with one shard each.
    shard, tensor : int
        Bytes of a shard, and of a tensor in it.
    workers : int
        Threads that read.
    ring : int
        Bytes of staging memory.
    expander : Expander or None
        Expands the files' content on the way.
    """

    device: Any
    files: list[int]
    shard: int
    tensor: int
    workers: int
    ring: int
    expander: Expander | None

    def make_tensors(self) -> list[Any]:
        """Make the buffers of one shard's tensors."""
        nbytes = self.tensor * (1 if self.expander is None else 2)
        return [self.device.create_buffer(size=nbytes, usage=_TENSOR_USAGE) for _ in range(self.shard // self.tensor)]

    def make_staging(self) -> Any:
        """Make a mapped staging buffer for one shard."""
        return self.device.create_buffer(size=self.shard, usage=_STAGING_USAGE, mapped_at_creation=True)

    def encode_copies(self, encoder: Any, staging: Any, buffers: list[Any]) -> None:
        """Encode the copies from a staging buffer to the tensors' buffers."""
        source, nbytes = staging, self.tensor
        if self.expander is not None:
            self.expander.encode(encoder, staging, 0, staging.size)
            source, nbytes = self.expander.expanded, 2 * self.tensor
        for number, buffer in enumerate(buffers):
            encoder.copy_buffer_to_buffer(source, number * nbytes, buffer, 0, nbytes)

    def wait(self) -> None:
        """Wait until the GPU has done everything that was submitted."""
        self.device.queue.read_buffer(self.device.create_buffer(size=4, usage=_TENSOR_USAGE), 0, 4)

    def destroy(self, buffers: list[Any]) -> None:
        """Destroy buffers, and wait until that is done."""
        for buffer in buffers:
            buffer.destroy()
        self.wait()


class Loop:
    """All calls of a load at once."""

    def __init__(self, load: Load) -> None:
        self.timer = Timer()
        self._load = load
        self._lock = threading.Lock()
        self._unread = iter(range(len(load.files)))
        self._staging_made = 0
        self._made: list[SimpleQueue[list[Any]]] = [SimpleQueue() for _ in load.files]
        self._filled: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        self._free: SimpleQueue[Any] = SimpleQueue()

    def run(self) -> float:
        """Load everything, free it, and return the seconds that loading took."""
        load, start = self._load, time.perf_counter()
        threads = start_threads([self._make_tensors, *[self._read_files] * load.workers])
        tensors: list[Any] = []
        missing = len(load.files)
        while missing:
            ready = self._wait_for_reads()
            tensors += self._submit(ready)
            missing -= len(ready)
        for thread in threads:
            thread.join()
        with self.timer("finish"):
            load.wait()
        seconds = time.perf_counter() - start
        for kind in ("read", "map", "make staging", "wait for staging"):
            self.timer.seconds[kind] /= load.workers
        load.destroy([*(self._free.get() for _ in range(self._staging_made)), *tensors])
        return seconds

    def _make_tensors(self) -> None:
        for made in self._made:
            with self.timer("make tensors"):
                made.put(self._load.make_tensors())

    def _read_files(self) -> None:
        while True:
            with self._lock:
                index = next(self._unread, None)
            if index is None:
                return
            staging = self._next_staging()
            with self.timer("read"):
                read(self._load.files[index], view(staging))
            self._filled.put((index, staging))

    def _next_staging(self) -> Any:
        with self._lock:
            is_new = self._staging_made < self._load.ring // self._load.shard
            self._staging_made += is_new
        if is_new:
            with self.timer("make staging"):
                return self._load.make_staging()
        with self.timer("wait for staging"):
            staging = self._free.get()
        with self.timer("map"):
            staging.map_sync("WRITE")
        return staging

    def _wait_for_reads(self) -> list[tuple[int, Any]]:
        with self.timer("wait for reads"):
            ready = [self._filled.get()]
        while not self._filled.empty():
            ready.append(self._filled.get())
        return ready

    def _submit(self, ready: list[tuple[int, Any]]) -> list[Any]:
        encoder, tensors = self._load.device.create_command_encoder(), []
        for index, staging in ready:
            with self.timer("wait for tensors"):
                buffers = self._made[index].get()
            with self.timer("encode"):
                staging.unmap()
                self._load.encode_copies(encoder, staging, buffers)
            tensors += buffers
        with self.timer("submit"):
            self._load.device.queue.submit([encoder.finish()])
        for _, staging in ready:
            self._free.put(staging)
        return tensors


def alone(load: Load) -> dict[str, float]:
    """Return the seconds of each kind of call when nothing else goes on."""
    timer = Timer()
    with timer("make tensors"):
        made = [load.make_tensors() for _ in load.files]
    with timer("make staging"):
        stagings = [load.make_staging() for _ in range(load.ring // load.shard)]
    unread, lock = iter(load.files), threading.Lock()

    def read_files(target: memoryview) -> None:
        while True:
            with lock:
                descriptor = next(unread, None)
            if descriptor is None:
                return
            read(descriptor, target)

    targets = [view(staging) for staging in stagings[: load.workers]]
    with timer("read"):
        for thread in start_threads([functools.partial(read_files, target) for target in targets]):
            thread.join()
    del targets  # they would dangle
    for staging in stagings:
        staging.unmap()
    with timer("submit"):
        for index, buffers in enumerate(made):
            encoder = load.device.create_command_encoder()
            load.encode_copies(encoder, stagings[index % len(stagings)], buffers)
            load.device.queue.submit([encoder.finish()])
    with timer("finish"):
        load.wait()
    load.destroy([*stagings, *(buffer for buffers in made for buffer in buffers)])
    return timer.seconds


def start_threads(targets: list[Callable[[], None]]) -> list[threading.Thread]:
    threads = [threading.Thread(target=target) for target in targets]
    for thread in threads:
        thread.start()
    return threads


def view(buffer: Any) -> memoryview:
    """Return the bytes of a mapped buffer."""
    return memoryview(buffer._experimental_get_mapped_range()).cast("B")


def read(descriptor: int, target: memoryview) -> None:
    """Fill `target` from the beginning of a file."""
    offset = 0
    while offset < len(target):
        offset += os.preadv(descriptor, [target[offset:]], offset)


def milliseconds(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {value * 1e3:.0f}" for kind, value in seconds.items())


def report(load: Load, rounds: int) -> None:
    """Run the loop and print its speed, and what each kind of call takes."""
    gigabytes = len(load.files) * load.shard / 1e9
    first = Loop(load).run()
    alone(load)  # the second time counts
    print(f"{load.workers} readers, each kind of call alone, in ms: {milliseconds(alone(load))}", flush=True)
    found: list[tuple[float, Timer]] = []
    for _ in range(rounds):
        loop = Loop(load)
        found.append((loop.run(), loop.timer))
    found.sort(key=lambda pair: pair[0])
    seconds, timer = found[len(found) // 2]
    rates = [gigabytes / each for each, _ in found]
    print(f"{load.workers} readers, all at once: {statistics.median(rates):.1f} GB/s", end=" ")
    print(f"({rates[-1]:.1f} to {rates[0]:.1f}; first of all {gigabytes / first:.1f}),", end=" ")
    print(f"{seconds * 1e3:.0f} ms: {milliseconds(timer.seconds)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--shard-mib", type=int, default=24)
    parser.add_argument("--tensor-mib", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[8])
    parser.add_argument("--ring-mib", type=int, default=512)
    parser.add_argument("--bf16", action="store_true", help="let the GPU expand the files' content")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", default="/dev/shm" if os.path.isdir("/dev/shm") else None)
    options = parser.parse_args()
    shard, tensor, ring = (mib * MIB for mib in (options.shard_mib, options.tensor_mib, options.ring_mib))
    opened = open_gpu("gpu")
    assert opened is not None
    expander = Expander(opened.handle, shard) if options.bf16 else None
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        block = os.urandom(shard)
        paths = [Path(folder) / str(index) for index in range(round(options.gib * 1024 / options.shard_mib))]
        for path in paths:
            path.write_bytes(block)
        files = [os.open(path, os.O_RDONLY) for path in paths]
        for workers in options.workers:
            report(Load(opened.handle, files, shard, tensor, workers, ring, expander), options.rounds)


if __name__ == "__main__":
    main()
