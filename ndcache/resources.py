"""The things that the calls of a loader share: connections, the limits of servers, and a scope of the cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .companions.lock import required_digests
from .context import LoadContext
from .files.descriptors import budget
from .http.limits.rate_limits import RateLimits
from .http.limits.token_bucket import TokenBucket
from .http.retry import RetryPolicy
from .http.transport import Transport
from .location import Location, locate, locate_mirror
from .location.hub import Login
from .options import GPUDeviceLike, LoaderOptions, Source, TorchDeviceLike
from .progress import Opening, ProgressCallback
from .sources import open_model
from .sources.model import Model
from .store.housekeeping.quantities import parse_rate
from .store.inventory import cache_scope
from .store.layered import LocalScope
from .trace import Trace
from .urls.redact import redact
from .workers.cancellation import Cancellation
from .workers.pool import WorkerPool
from .workers.stop_iteration import wrap_stop_iteration

if TYPE_CHECKING:
    from .devices.base import Device

__all__ = ["LoaderResources"]

#: Files that a worker may have open at once: a socket or two, a lock, the file it writes and reads, two folders that it
#: publishes in and one on the way there, the folder that is synced, and spare ones.
_FILES_PER_WORKER = 12
#: The longest timeout, in seconds: Linux waits for 2³¹ ms at most.
_LONGEST_TIMEOUT = 2e6


class LoaderResources:
    """Keep what the calls of a loader share, and open devices and models for them.

    Parameters
    ----------
    options : LoaderOptions
    environ : mapping
        The environment, for NDCACHE_HOME, NDCACHE_OFFLINE, HF_HUB_OFFLINE and the login of Hugging Face.

    Attributes
    ----------
    cache : CacheScope
    limits : RateLimits
        How many requests each server accepts.
    login : Login
        The token for Hugging Face.
    is_offline : bool
        Whether the options or the environment forbid requests.
    """

    def __init__(self, options: LoaderOptions, environ: Mapping[str, str]) -> None:
        retries, timeout = options.retries, options.timeout
        to_connect, to_read = timeout if isinstance(timeout, tuple) else (timeout, timeout)
        self._options = options
        self._policy = retries if isinstance(retries, RetryPolicy) else RetryPolicy(retries)
        # A lock file is read at each call: no constructor reads files.
        self._integrity = required_digests(options.integrity) if isinstance(options.integrity, Mapping) else None
        self.login = Login(environ)
        self._transport = Transport(
            session=options.session,
            timeout=(min(to_connect, _LONGEST_TIMEOUT), min(to_read, _LONGEST_TIMEOUT)),
            max_connections=options.max_workers,
            login=self.login,
            token=options.token,
            headers=options.headers,
        )
        self.cache = cache_scope(options.cache_dir, options.scope, environ)
        self._limits = (self._policy.backoff / 4, self._policy.budget)
        self.limits = RateLimits(*self._limits, self.cache.limits)
        self.is_offline = options.offline or any(
            _is_set(environ.get(name)) for name in ("NDCACHE_OFFLINE", "HF_HUB_OFFLINE")
        )

    def close(self) -> None:
        """Close the kept connections."""
        self._transport.close()

    def locate(self, source: Source) -> Location:
        """Return the location of a source, at the revision that the options say.

        Raises
        ------
        NotFoundError, ValueError
            See `location.locate`.
        """
        return locate(source, revision=self._options.revision)

    def open_device(self, device: str | GPUDeviceLike | TorchDeviceLike, trace: Trace | None = None) -> Device[Any]:
        """Open a device; the `cancel` option ends the wait for a driver."""
        start, cancel = time.perf_counter(), self._options.cancel
        try:
            from .devices import open_device  # needs NumPy, which processes that only download do not

            return open_device(device, None if cancel is None else Cancellation(cancel).poll)
        finally:
            if trace is not None:
                trace.add("open_device", start, time.perf_counter(), {})

    @contextmanager
    def open_model(
        self,
        source: Source | Location,
        *,
        threads: int | None = None,
        device: Device[Any] | None = None,
        offline: bool = False,
        must_keep: bool = False,
        trace: Trace | None = None,
        local_dir: Path | None = None,
        force: bool = False,
        dry_run: bool = False,
        is_use: bool = False,
        bars: Sequence[ProgressCallback] = (),
    ) -> Iterator[tuple[Model, LoadContext]]:
        """Open a model with threads of its own, which end with the block; see `context`.

        The bars among the callbacks in `bars` say what it waits for.
        """
        location = source if isinstance(source, Location) else self.locate(source)
        with self.context(
            location,
            threads=threads,
            device=device,
            offline=offline,
            must_keep=must_keep,
            local_dir=local_dir,
            force=force,
            dry_run=dry_run,
            is_use=is_use,
        ) as context:
            context.stats.record_to(trace)
            if trace is not None:
                trace.note(
                    context.stats,
                    source=redact(str(location)),
                    workers=self._options.max_workers,
                    device=None if device is None else device.name,
                )
            with closing(Opening(bars, context.model, context.arrivals)) as opening:
                context.pool.tick = opening.tick
                with context.stats.timed("manifest"), wrap_stop_iteration():
                    model = open_model(location, context)
                try:
                    yield model, context
                finally:
                    model.end_use()

    @contextmanager
    def context(
        self,
        location: Location,
        *,
        threads: int | None = None,
        device: Device[Any] | None = None,
        offline: bool = False,
        must_keep: bool = False,
        local_dir: Path | None = None,
        bucket: int | None = None,
        force: bool = False,
        dry_run: bool = False,
        is_use: bool = False,
    ) -> Iterator[LoadContext]:
        """Prepare the threads of one call, and end them with the block.

        Parameters
        ----------
        location : Location
        threads : int, optional
            How many threads there may be; by default `max_workers`, or fewer where file descriptors are scarce.
        device : Device, optional
            The device to load onto, which may need one more.
        offline : bool
            Make no request, whatever the options say.
        must_keep, is_use : bool
            See `LoadContext`.
        local_dir : pathlib.Path, optional
            Where files go instead of the cache.
        bucket : int, optional
            The descriptor of the `TokenBucket` of another process.
        force, dry_run : bool
            See `LoadContext`.
        """
        options, needs_serial = self._options, device is not None and device.needs_serial_thread
        may_have_helpers = (
            options.processes != 1 and threads is None and location.is_remote and not (offline or self.is_offline)
        )
        self._transport.refresh_settings()
        with (
            _open_bucket(options.limit_rate, bucket) as token_bucket,
            budget(options.max_workers, _FILES_PER_WORKER) if threads is None else nullcontext(threads) as count,
            WorkerPool(
                count,
                Cancellation(options.cancel),
                has_serial_thread=needs_serial,
                has_side_thread=may_have_helpers,
            ) as pool,
        ):
            yield LoadContext(
                transport=self._transport,
                policy=self._policy,
                limits=RateLimits(*self._limits, None) if dry_run else self.limits,
                pool=pool,
                cache=self.cache if local_dir is None else self._local_scope(local_dir, force),
                verify=options.verify,
                offline=self.is_offline or offline,
                integrity=required_digests(options.integrity) if self._integrity is None else self._integrity,
                mirrors=tuple(map(locate_mirror, options.mirrors)) if location.is_remote else (),
                bucket=token_bucket,
                must_keep=must_keep,
                force=force,
                dry_run=dry_run,
                is_use=is_use,
                model=location.title,
                progress_interval=options.progress_interval,
            )

    def _local_scope(self, local_dir: Path, force: bool) -> LocalScope:
        cache = replace(self.cache, top=None) if force else self.cache  # its files would be copied
        return LocalScope(**vars(cache), local_dir=local_dir)


@contextmanager
def _open_bucket(rate: float | str | None, handle: int | None) -> Iterator[TokenBucket | None]:
    """Yield the bucket that limits a load to a rate, if there is one."""
    if rate is None:
        yield None
        return
    with closing(TokenBucket(parse_rate(rate), handle)) as bucket:
        yield bucket


def _is_set(value: str | None) -> bool:
    return value is not None and value.strip().lower() not in ("", "0", "false", "no", "off")
