"""The helper processes of a load, as the load sees them.

::

    caller's thread   start: request ─> a thread of the pool …                       … finish: correct statistics
    that thread           start processes ─> send the request ─> read reports ─> statistics, log ─> end processes
    a helper                  read the request ─> download what nobody has begun ─> report ─> end with the pipe

Helpers only fill the cache. Whatever goes wrong with them, the load itself finds shards missing, and downloads them.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..caller import warn_caller
from ..context import LoadContext
from ..format.manifest import Shard
from ..http.retry import RetryPolicy
from ..location.hub import LOGIN_VARIABLES
from ..options import LoaderOptions, Source
from ..sources.model import Model
from ..sources.remote import RemoteModel
from ..store.housekeeping.quantities import parse_rate
from ..store.layered import LocalScope
from .command import absolute_paths, package_root, why_no_interpreter
from .how_many import process_count, usable_cores
from .messages import HelperRequest, wanted_shards

if TYPE_CHECKING:
    from .supervisor import Supervisor

__all__ = ["HelperProcesses"]

#: Variables that keep a process from making requests. This load makes some, as it began without them.
_OFFLINE = ("NDCACHE_OFFLINE", "HF_HUB_OFFLINE")

logger = logging.getLogger("ndcache")


class HelperProcesses:
    """The helper processes of one load.

    Parameters
    ----------
    source : str or path-like
        The load's source.
    options : LoaderOptions
    login : mapping of str to str
        The variables of Hugging Face's login, as they were when the loader was made.
    """

    def __init__(self, source: Source, options: LoaderOptions, login: Mapping[str, str]) -> None:
        self._source = source
        self._options = options
        self._login = login
        self._supervisor: Supervisor | None = None
        self._from_cache: dict[str, int] = {}

    def start(self, model: Model, context: LoadContext) -> None:
        """Start the helpers that the missing shards need, in a thread of the pool, and do not wait for them."""
        if context.stats.trace is not None:
            context.stats.trace.note(context.stats, cores=usable_cores())
        wanted = self._options.processes
        if wanted == 1 or not isinstance(model, RemoteModel) or not model.is_kept:
            return
        missing = model.missing
        count = process_count(wanted, len(missing), sum(shard.nbytes for shard in missing))
        if count == 1:
            return
        why_alone = "requests go through your session" if self._options.session is not None else why_no_interpreter()
        if why_alone is None:
            if context.stats.trace is not None:
                context.stats.trace.note(context.stats, processes=count)
            from .supervisor import Supervisor  # imports what loads in one process do not need

            self._supervisor = Supervisor(
                self._request(model, context, missing), count - 1, context.stats, context.arrivals, context.bucket
            )
            context.pool.run_beside(self._supervisor.run, self._supervisor.end)
        elif wanted != "auto":
            warn_caller(f"processes={wanted} has no effect, as {why_alone}: one process downloads")

    def note_cached(self, shard: Shard, nbytes: int) -> None:
        """Note that a shard was found in the cache."""
        if self._supervisor is not None:
            self._from_cache[shard.data_path] = nbytes

    def finish(self, context: LoadContext) -> None:
        """Correct the statistics, and warn if helpers could not start. The pool's threads must have ended."""
        if self._supervisor is None:
            return
        helped = self._from_cache.keys() & self._supervisor.published
        context.stats.cache_bytes -= sum(self._from_cache[name] for name in helped)
        if context.stats.trace is not None:
            for name in helped:
                context.stats.trace.shard_done(name, "network")
        if self._supervisor.problem is not None:
            warn_caller(self._supervisor.problem)

    def _request(self, model: RemoteModel, context: LoadContext, missing: list[Shard]) -> HelperRequest:
        return HelperRequest(
            package_root=package_root(),
            source=str(self._source),
            options=self._options_to_send(context),
            environ=self._environ_to_send(),
            manifest_name=model.manifest.name,
            manifest_text=model.opened.data.decode(),
            commits=model.commits,
            wanted=wanted_shards(model.manifest, missing),
            log_level=max(logger.getEffectiveLevel(), logging.DEBUG),
            local_dir=os.path.abspath(context.cache.local_dir) if isinstance(context.cache, LocalScope) else None,
            old_files=dict(model.cache.old_files.versions) if context.force else None,
            trace_started=None if context.stats.trace is None else context.stats.trace.started,
        )

    def _options_to_send(self, context: LoadContext) -> dict[str, Any]:
        options, top = self._options, context.cache.top
        return {
            "max_workers": options.max_workers,
            "cache_dir": None if top is None else str(top),
            "scope": options.scope,
            "token": options.token,
            "headers": None if options.headers is None else dict(options.headers),
            "revision": options.revision,
            "limit_rate": None if options.limit_rate is None else parse_rate(options.limit_rate),
            "timeout": options.timeout if isinstance(options.timeout, tuple) else (options.timeout,) * 2,
            "retries": {each.name: getattr(context.policy, each.name) for each in dataclasses.fields(RetryPolicy)},
            "verify": options.verify,
            "mirrors": list(options.mirrors),
            "integrity": _integrity_to_send(options.integrity),
        }

    def _environ_to_send(self) -> dict[str, str]:
        own = (*_OFFLINE, *LOGIN_VARIABLES)
        # By the names: another thread may remove a variable meanwhile.
        others = {name: value for name in os.environ if name not in own and (value := os.environ.get(name)) is not None}
        return absolute_paths({**others, **self._login})


def _integrity_to_send(integrity: Mapping[str, str] | str | os.PathLike[str] | None) -> dict[str, str] | str | None:
    if integrity is None:
        return None
    return dict(integrity) if isinstance(integrity, Mapping) else os.path.abspath(integrity)
