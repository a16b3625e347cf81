"""What the calls of a loader share: connections, the limits of servers, and a scope of the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from .context import LoadContext
from .files.descriptors import budget
from .format.integrity import parse_sri
from .http.limits.rate_limits import RateLimits
from .http.retry import RetryPolicy
from .http.transport import Transport
from .location import Location, locate, locate_mirror
from .location.hub import Login
from .options import GPUDeviceLike, LoaderOptions, Source, TorchDeviceLike
from .sources import open_model
from .sources.model import Model
from .store.inventory import cache_scope
from .trace import Trace
from .workers.cancellation import Cancellation
from .workers.pool import WorkerPool
from .workers.stop_iteration import wrap_stop_iteration

if TYPE_CHECKING:
    from .devices.base import Device

__all__ = ["LoaderResources"]

#: Files that a worker may have open at once: a socket or two, a lock, the file it writes and reads, two folders that it
#: publishes in and one on the way there, the folder that is synced, and spare ones.
_FILES_PER_WORKER = 12


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
        self._options = options
        self._policy = retries if isinstance(retries, RetryPolicy) else RetryPolicy(retries)
        self._integrity = {name: parse_sri(text) for name, text in (options.integrity or {}).items()}
        self.login = Login(environ)
        self._transport = Transport(
            session=options.session,
            timeout=timeout if isinstance(timeout, tuple) else (timeout, timeout),
            max_connections=options.max_workers,
            login=self.login,
        )
        self.cache = cache_scope(options.cache_dir, options.scope, environ)
        self.limits = RateLimits(self._policy.backoff / 4, self._policy.budget, self.cache.limits)
        self.is_offline = options.offline or any(
            _is_set(environ.get(name)) for name in ("NDCACHE_OFFLINE", "HF_HUB_OFFLINE")
        )

    def close(self) -> None:
        """Close the kept connections."""
        self._transport.close()

    def open_device(self, device: str | GPUDeviceLike | TorchDeviceLike) -> Device[Any]:
        """Open a device; the `cancel` option ends the wait for a driver."""
        from .devices import open_device  # needs NumPy, which processes that only download do not

        cancel = self._options.cancel
        return open_device(device, None if cancel is None else Cancellation(cancel).poll)

    @contextmanager
    def open_model(
        self,
        source: Source,
        *,
        threads: int | None = None,
        device: Device[Any] | None = None,
        offline: bool = False,
        must_keep: bool = False,
        trace: Trace | None = None,
    ) -> Iterator[tuple[Model, LoadContext]]:
        """Open a model with threads of its own, which end with the block; see `context`."""
        location = locate(source)
        with self.context(location, threads=threads, device=device, offline=offline, must_keep=must_keep) as context:
            context.stats.record_to(trace)
            with context.stats.timed("manifest"), wrap_stop_iteration():
                model = open_model(location, context)
            yield model, context

    @contextmanager
    def context(
        self,
        location: Location,
        *,
        threads: int | None = None,
        device: Device[Any] | None = None,
        offline: bool = False,
        must_keep: bool = False,
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
        must_keep : bool
            See `LoadContext`.
        """
        options, needs_serial = self._options, device is not None and device.needs_serial_thread
        may_have_helpers = (
            options.processes != 1 and threads is None and location.is_remote and not (offline or self.is_offline)
        )
        self._transport.refresh_settings()
        with (
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
                limits=self.limits,
                pool=pool,
                cache=self.cache,
                verify=options.verify,
                offline=self.is_offline or offline,
                integrity=self._integrity,
                mirrors=tuple(map(locate_mirror, options.mirrors)) if location.is_remote else (),
                must_keep=must_keep,
            )


def _is_set(value: str | None) -> bool:
    return value is not None and value.strip().lower() not in ("", "0", "false", "no", "off")
