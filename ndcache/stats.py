"""Count the bytes, seconds and requests of a load."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from .trace import Trace

__all__ = ["LoadStats"]

T = TypeVar("T")


class _End(Enum):
    """A mark for the end of an iterator."""

    END = 0


_CALLER_PHASES = ("manifest", "wait", "place", "wait_buffers", "shader", "copy", "finish", "memory_limit", "total")
_WORKER_PHASES = ("lock", "request", "network", "hash", "write", "publish", "backoff", "rate_limit")
_DEVICE_PHASES = ("read", "decode", "staging", "buffers")


@dataclass
class LoadStats:
    """Bytes, seconds and requests of one load, complete when the load is.

    Attributes
    ----------
    nbytes : int
        Bytes of the loaded shards, from network or disk; of a shard that was fetched in part, only that part.
    network_bytes : int
        Bytes of shards received from the network, including bytes that were discarded.
    resumed_bytes : int
        Bytes of incomplete shards that an interrupted load had left.
    cache_bytes : int
        Bytes of shards that were already on disk.
    shards, tensors : int
        How many were loaded.
    requests, retries : int
        HTTP requests, and how many of them followed a failure.
    peak_bytes_in_flight : int
        The most bytes of shards at once that were requested and not yet on the device.
    seconds : dict of str to float
        Seconds by phase.

        On the caller's thread, one after another: ``manifest``; ``wait`` (for the next segment); ``place`` (making
        tensors); ``finish`` (waiting for the device). On a GPU, parts of ``place`` are ``wait_buffers`` (waiting for
        the tensors' buffers), ``shader`` (making the shader that expands bfloat16) and ``copy`` (letting the GPU copy
        and expand). ``total`` is the whole load, and ``memory_limit`` the part of it in which a worker was idle because
        `memory_limit` let no further segment of a shard begin.

        In the workers, at the same time, and added up over all workers of all processes: ``lock`` (waiting for another
        process that downloads the same file), ``request`` (until the headers arrive), ``network`` (receiving bodies),
        ``hash`` (computing digests), ``write`` (to files), ``publish`` (fsync and rename), ``backoff`` (waiting before
        a retry), ``rate_limit`` (waiting because the server limits requests or connections), ``read`` (reading or
        mapping files; with ``into=`` on the CPU also expanding), ``decode`` (on the CPU: expanding bfloat16, and
        copies). On a GPU also ``staging`` (making staging memory, and waiting until the GPU has copied from it) and, in
        a thread of its own, ``buffers`` (making the tensors' buffers).
    integrity : dict of str to int
        How many shards were checked by ``sha256``, by ``md5``, or by ``size`` alone, now or when they were fetched. A
        shard is checked by size alone if the manifest has no digest of it, or if the digest was not computed: with
        ``verify="never"``, in local directories, and for shards that were fetched in part.
    """

    nbytes: int = 0
    network_bytes: int = 0
    resumed_bytes: int = 0
    cache_bytes: int = 0
    shards: int = 0
    tensors: int = 0
    requests: int = 0
    retries: int = 0
    peak_bytes_in_flight: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(_CALLER_PHASES + _WORKER_PHASES + _DEVICE_PHASES, 0.0)
    )
    integrity: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        # Not fields: dataclasses.asdict must ignore them.
        self._lock = threading.Lock()
        self._trace: Trace | None = None

    @property
    def gb_per_second(self) -> float:
        """Return the bytes of shards divided by the total time, in 10**9 bytes per second."""
        total = self.seconds["total"]
        return self.nbytes / total / 1e9 if total else 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_trace")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _trace=None)

    def count(self, **amounts: int) -> None:
        """Add amounts to fields by name. The workers call this, too."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Add seconds by phase, which another process has spent."""
        with self._lock:
            for phase, spent in seconds.items():
                self.seconds[phase] += spent

    def record_to(self, trace: Trace | None) -> None:
        """Record all phases from now on in `trace`, too."""
        self._trace = trace

    @contextmanager
    def timed(self, phase: str, **detail: Any) -> Iterator[dict[str, float]]:
        """Add the time that the block takes to ``seconds[phase]``.

        Parameters
        ----------
        phase : str
        **detail
            For the trace.

        Yields
        ------
        dict of str to float
            The block fills it with those of its seconds that belong to other phases.
        """
        others: dict[str, float] = {}
        start = time.perf_counter()
        try:
            yield others
        finally:
            end = time.perf_counter()
            with self._lock:
                self.seconds[phase] += end - start - sum(others.values())
                for other, seconds in others.items():
                    self.seconds[other] += seconds
            if self._trace is not None:
                self._trace.add(phase, start, end, {**detail, **{f"{name} (s)": part for name, part in others.items()}})

    def timed_iterator(self, phase: str, items: Iterator[T], **detail: Any) -> Iterator[T]:
        """Yield `items`, and add the time that they take to ``seconds[phase]`` at the end; with a trace, after each."""
        if self._trace is not None:
            while True:
                with self.timed(phase, **detail):
                    item = next(items, _End.END)
                if item is _End.END:
                    return
                yield item
        spent, now = 0.0, time.perf_counter
        try:
            while True:
                start = now()
                try:
                    item = next(items, _End.END)
                finally:
                    spent += now() - start
                if item is _End.END:
                    return
                yield item
        finally:
            with self._lock:
                self.seconds[phase] += spent

    def shard_done(self, nbytes: int, *, from_cache: bool, checked: str) -> None:
        """Count a loaded shard of `nbytes`; `checked` is a key of `integrity`."""
        self.shards += 1
        self.nbytes += nbytes
        self.cache_bytes += nbytes if from_cache else 0
        self.integrity[checked] += 1
