"""Count the bytes, seconds and requests of a load."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from .report.words import format_checks, format_count, format_seconds, format_size, format_speed
from .trace import Trace

if TYPE_CHECKING:
    from .format.manifest import Shard

__all__ = ["LoadStats"]

T = TypeVar("T")


class _End(Enum):
    """A mark for the end of an iterator."""

    END = 0


_CALLER_PHASES = ("manifest", "wait", "place", "wait_buffers", "shader", "copy", "finish", "memory_limit", "total")
_WORKER_PHASES = ("lock", "request", "network", "hash", "write", "publish", "backoff", "rate_limit", "limit_rate")
_DEVICE_PHASES = ("read", "decode", "staging", "buffers")
#: How many phases a line of the printed statistics names.
_PHASES_IN_WORDS = 5


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
        a retry), ``rate_limit`` (waiting because the server limits requests or connections), ``limit_rate`` (waiting
        because of `limit_rate`), ``read`` (reading or mapping files; with ``into=`` on the CPU also expanding),
        ``decode`` (on the CPU: expanding bfloat16, and copies). On a GPU also ``staging`` (making staging memory, and
        waiting until the GPU has copied from it) and, in a thread of its own, ``buffers`` (making the tensors'
        buffers).
    integrity : dict of str to int
        How many shards were checked by ``sha256``, by ``md5``, or by ``size`` alone, now or when they were fetched. A
        shard is checked by size alone if the manifest has no digest of it, or if the digest was not computed: with
        ``verify="never"``, in local directories, and for shards that were fetched in part.
    checked : dict of str to str
        The same for each shard: by its ``dataPath``, the key of `integrity`.
    files : tuple of str
        The companion files that the cache has: configuration, tokenizer and others. The other numbers do not count
        them, nor the requests for them.
    file_bytes : int
        Bytes of companion files received from the network.
    failed_files : dict of str to str
        The companion files that could not be fetched, and why.
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
    integrity: dict[str, int] = field(default_factory=dict)
    checked: dict[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    file_bytes: int = 0
    failed_files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Not fields: dataclasses.asdict must ignore them.
        self._lock = threading.Lock()
        self._trace: Trace | None = None
        self._how = ""

    def __str__(self) -> str:
        """Return seven lines: what was loaded, from where, how it was checked, and where the time went."""
        files = f", {format_count(len(self.files), 'companion file')}" if self.files else ""
        retries = f", {self.retries:,} of them {'a retry' if self.retries == 1 else 'retries'}" if self.retries else ""
        resumed = f", {format_size(self.resumed_bytes)} from interrupted downloads" if self.resumed_bytes else ""
        total = self.seconds["total"]
        lines = {
            "loaded": f"{format_count(self.tensors, 'tensor')} of {format_count(self.shards, 'shard')}{files}",
            "time": f"{format_seconds(total)}, {format_size(self.nbytes)}, {self.speed}",
            "network": f"{format_size(self.network_bytes)} in {format_count(self.requests, 'request')}{retries}",
            "cache": f"{format_size(self.cache_bytes)}{resumed}",
            "checked": format_checks(self.integrity),
            "this thread": self._phases(_CALLER_PHASES),
            "workers": self._phases(_WORKER_PHASES + _DEVICE_PHASES),
        }
        return "\n".join(f"{label:<12}{words}" for label, words in lines.items())

    def _phases(self, phases: Sequence[str]) -> str:
        """Return the longest phases and their seconds."""
        spent = [(seconds, phase) for phase in phases if phase != "total" and (seconds := self.seconds[phase]) >= 5e-4]
        longest = sorted(spent, reverse=True)[:_PHASES_IN_WORDS]
        return ", ".join(f"{phase} {format_seconds(seconds)}" for seconds, phase in longest) or "under 1 ms"

    @property
    def speed(self) -> str:
        """Return the rate in words: ``"165.2 MiB/s"``, or ``"mapped"`` if no file was read."""
        return format_speed(self._how, self.nbytes, self.seconds["total"])

    @property
    def gb_per_second(self) -> float:
        """Return the bytes of shards divided by the total time, in 10**9 bytes per second."""
        total = self.seconds["total"]
        return self.nbytes / total / 1e9 if total else 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_trace")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"_how": "", **state}, _lock=threading.Lock(), _trace=None)

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

    @property
    def trace(self) -> Trace | None:
        """Return the trace that all phases are recorded in, if there is one."""
        return self._trace

    def record_to(self, trace: Trace | None) -> None:
        """Record all phases from now on in `trace`, too."""
        self._trace = trace

    def note_shards(self, shards: Sequence[Shard], sizes: Sequence[int]) -> None:
        """Note in the trace the shards that the load wants, and their bytes."""
        if self._trace is not None:
            paths = (shard.data_path for shard in shards)
            self._trace.note_shards(dict(zip(paths, sizes, strict=True)))

    def note_how(self, how: str) -> None:
        """Note how the files were loaded if all were on disk: see `progress.Summary`."""
        self._how = how
        if self._trace is not None:
            self._trace.note(self, how=how)

    def beside(self) -> LoadStats:
        """Return other statistics, which record in the same trace."""
        other = LoadStats()
        other.record_to(self._trace)
        return other

    def note_files(self, files: Sequence[str], nbytes: int, failed: Mapping[str, str]) -> None:
        """Note the companion files, the bytes received of them, and those that failed."""
        self.files, self.file_bytes, self.failed_files = tuple(files), nbytes, dict(failed)

    @contextmanager
    def timed(self, phase: str, **detail: Any) -> Iterator[dict[str, float]]:
        """Add the time that the block takes to ``seconds[phase]``.

        Parameters
        ----------
        phase : str
        **detail
            For the trace. Functions are called at the end of the block.

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
                known = {name: value() if callable(value) else value for name, value in detail.items()}
                self._trace.add(phase, start, end, {**known, **{f"{name} (s)": part for name, part in others.items()}})

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

    def shard_done(self, path: str, nbytes: int, *, from_cache: bool, checked: str) -> None:
        """Count a loaded shard of `nbytes`; `checked` is a key of `integrity`."""
        self.checked[path] = checked
        self.shards += 1
        self.nbytes += nbytes
        self.cache_bytes += nbytes if from_cache else 0
        self.integrity[checked] = self.integrity.get(checked, 0) + 1
        if self._trace is not None:
            self._trace.shard_done(path, "cache" if from_cache else "network")
