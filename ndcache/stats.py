"""What a load cost: bytes, seconds, tries."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .trace import Trace

__all__ = ["LoadStats"]

T = TypeVar("T")
_END = object()
_CALLERS = ("manifest", "wait", "place", "wait_buffers", "shader", "copy", "finish", "memory_limit", "total")
_WORKERS = ("lock", "request", "network", "hash", "write", "publish", "backoff", "rate_limit")
_DEVICES = ("read", "decode", "staging", "buffers")


@dataclass
class LoadStats:
    """The account of one load; complete once the load is.

    Attributes
    ----------
    nbytes : int
        Bytes of the shards that were loaded, from wherever they came; of a shard that came in part, of that part.
    network_bytes : int
        Bytes of shard bodies received, those thrown away included.
    resumed_bytes : int
        Bytes that an interrupted load had left of shards that were not complete.
    cache_bytes : int
        Bytes of shards that were on disk already.
    shards, tensors : int
        How many were loaded.
    requests, retries : int
        HTTP requests made, and how many of them were tries after a failure.
    peak_bytes_in_flight : int
        The most bytes of shards that were asked for and not yet on the device.
    seconds : dict of str to float
        By phase. On the caller's thread, one after another: ``manifest``, ``wait`` (for the next shard),
        ``place`` (making tensors; on a GPU, ``wait_buffers``, ``shader`` and ``copy`` are parts of it: waiting for the
        tensors' buffers, making what expands bfloat16, and having the GPU copy and expand), ``finish`` (waiting for
        the device); ``total`` is all of it, and ``memory_limit`` the part of it in which a worker had nothing to do
        because that let no further shard begin.
        In the workers, added up over all of them and at the same time as the others: ``lock`` (waiting for another
        process that downloads the same), ``request`` (until the headers have come), ``network`` (waiting for
        bodies and receiving them), ``hash`` (digests, of what comes and of files), ``write`` (to files), ``publish``
        (fsync and rename), ``backoff`` (waiting before another try), ``rate_limit`` (waiting because the server limits
        requests or connections), ``read`` (files into memory, or mapping them),
        ``decode`` (on the CPU: expanding bfloat16, copies); on a GPU ``staging`` (making staging memory, and waiting
        until the GPU has copied from it) and, in a thread of its own, ``buffers`` (making those of the tensors).
    integrity : dict of str to int
        How many shards were checked by what, now or when they were fetched: ``sha256``, ``md5``, or ``size`` alone
        (the manifest has no digest for them, or it was not computed: ``verify="never"``, local directories, shards
        that came in part).
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
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_CALLERS + _WORKERS + _DEVICES, 0.0))
    integrity: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        # No fields, so that dataclasses.asdict passes them by.
        self._lock = threading.Lock()
        self._trace: Trace | None = None

    @property
    def gb_per_second(self) -> float:
        """Shard bytes over the whole time, in 10**9 bytes per second."""
        total = self.seconds["total"]
        return self.nbytes / total / 1e9 if total else 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_trace")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _trace=None)

    def count(self, **amounts: int) -> None:
        """Add to fields by name; called by the workers too."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def record_to(self, trace: Trace | None) -> None:
        """Have what is timed from now on written down, too."""
        self._trace = trace

    @contextmanager
    def timed(self, phase: str, **detail: Any) -> Iterator[dict[str, float]]:
        """Add the time the block takes to ``seconds[phase]``.

        Parameters
        ----------
        phase : str
        **detail
            For a trace.

        Yields
        ------
        dict of str to float
            Seconds of the block that belong to other phases, to be filled in.
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
        """`items`, with the time that they take to come added to ``seconds[phase]``, at the end if no trace is kept."""
        if self._trace is not None:
            while True:
                with self.timed(phase, **detail):
                    item = next(items, _END)
                if item is _END:
                    return
                yield item  # type: ignore[misc]
        spent, now = 0.0, time.perf_counter
        try:
            while True:
                start = now()
                try:
                    item = next(items, _END)
                finally:
                    spent += now() - start
                if item is _END:
                    return
                yield item  # type: ignore[misc]
        finally:
            with self._lock:
                self.seconds[phase] += spent

    def shard_done(self, nbytes: int, *, from_cache: bool, checked: str) -> None:
        """One more shard was loaded, held to the check `checked`."""
        self.shards += 1
        self.nbytes += nbytes
        self.cache_bytes += nbytes if from_cache else 0
        self.integrity[checked] += 1
