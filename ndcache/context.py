"""The one object that carries what a load shares."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from .cloud.storage import ObjectStorage
from .format.integrity import Integrity
from .http.limits.rate_limits import RateLimits
from .http.limits.token_bucket import TokenBucket
from .http.retry import RetryPolicy
from .http.transport import Transport
from .location import Location
from .progress import Arrivals
from .stats import LoadStats
from .store.directory import ModelDirectory
from .store.inventory import CacheScope
from .store.old_files import OldFiles
from .workers.cancellation import Cancellation
from .workers.pool import WorkerPool

__all__ = ["LoadContext", "VerifyMode"]

#: When a shard's digest is computed and compared: see `LoaderOptions.verify`.
VerifyMode: TypeAlias = Literal["download", "always", "never"]


@dataclass(frozen=True)
class LoadContext:
    """Carry what one load shares: its threads, its connections, its cache, and the options that models need.

    A load makes one context and gives it to `sources.open_model` and the pipeline. Everything in it may be used from
    any thread.

    Attributes
    ----------
    transport : Transport
        Makes the requests; shared by the loads of a `Loader`.
    policy : RetryPolicy
        How often a failed request is made again, and how long that may take.
    limits : RateLimits
        How many requests each server accepts; shared by the loads of a `Loader`.
    pool : WorkerPool
        The load's threads, and its cancellation.
    cache : CacheScope
        Opens the model's cache directory.
    stats : LoadStats
        What the load costs.
    verify : {"download", "always", "never"}
        When a shard's digest is computed and compared.
    offline : bool
        Make no request.
    integrity : mapping of str to tuple of str
        The digests that the caller demands: by file name, the algorithm and the hex digest.
    mirrors : tuple of Location
        Where else the shards may be had, in this order.
    storage : ObjectStorage
        Signs the addresses of objects in buckets.
    bucket : TokenBucket or None
        Limits the bytes per second that the load receives.
    must_keep : bool
        Raise if the cache cannot be written. By default, what comes from a server is then held in memory.
    force : bool
        Download again what is cached. Each file takes its name when it is complete and checked.
    dry_run : bool
        Write nothing.
    is_use : bool
        Whether the model's files are used, and not only looked at: it then stays in the cache until the load ends.
    arrivals : Arrivals
        Which shards are here, and which are coming.
    model : str
        The model's name, to show.
    progress_interval : float or None
        Seconds between reports of progress to callbacks, beside those of shards.
    started : float
        When the load began, by `time.perf_counter`.
    """

    transport: Transport
    policy: RetryPolicy
    limits: RateLimits
    pool: WorkerPool
    cache: CacheScope
    stats: LoadStats = field(default_factory=LoadStats)
    verify: VerifyMode = "download"
    offline: bool = False
    integrity: Integrity = field(default_factory=dict)
    mirrors: tuple[Location, ...] = ()
    storage: ObjectStorage = field(default_factory=ObjectStorage)
    bucket: TokenBucket | None = None
    must_keep: bool = False
    force: bool = False
    dry_run: bool = False
    is_use: bool = False
    arrivals: Arrivals = field(default_factory=Arrivals)
    model: str = ""
    progress_interval: float | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def cancellation(self) -> Cancellation:
        """Return the cancellation of the load's threads."""
        return self.pool.cancellation

    @property
    def compares_digests(self) -> bool:
        """Return whether digests are compared at all, or only sizes."""
        return self.verify != "never"

    def open_directory(self, location: Location) -> ModelDirectory:
        """Open the cache directory of a model on a server."""
        if self.dry_run:
            directory: ModelDirectory = self.cache.open_unwritten(location)
        elif self.must_keep or self.offline:  # offline, nothing comes that memory could hold
            directory = self.cache.open(location)
        else:
            directory = self.cache.open_with_fallback(location)
        if self.force:
            directory.old_files = OldFiles(directory.layout)
        return directory
