"""Look after the cache: list its models, remove those that nobody needs, check them all.

>>> import ndcache
>>> for model in ndcache.cache.models():
...     print(model.source, model.state, model.size, model.last_used)
>>> report = ndcache.cache.prune(older_than="30d", max_size="50GB")

The environment variable NDCACHE_MAX_SIZE, such as ``50GB``, sets a limit that loads keep by themselves: before a load
downloads, it removes the models that were not used for the longest time.

A model that a load uses, in any process, is never removed by `prune` or by the limit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from itertools import groupby
from pathlib import Path

from .arguments import check_path
from .caller import PublicFrame, name_in_tracebacks, public
from .errors import redact
from .loader import Loader
from .loaders.verification import VerifyReport
from .progress import Progress
from .store.housekeeping.listing import CachedModel, find_models
from .store.housekeeping.matching import match_source
from .store.housekeeping.pruning import PruneReport, PruneRules, prune_cache, remove_models
from .store.housekeeping.quantities import parse_duration, parse_size
from .store.inventory import cache_root

__all__ = ["CachedModel", "PruneReport", "delete", "models", "prune", "verify"]


@public
def models(*, scope: str | None = None, cache_dir: str | os.PathLike[str] | None = None) -> list[CachedModel]:
    """Return the models in the cache, sorted by scope and by directory.

    Parameters
    ----------
    scope : str, optional
        Only those of one scope.
    cache_dir : path-like, optional
        Default: NDCACHE_HOME, else the system's place for caches.

    Raises
    ------
    CacheUnavailableError
        The cache has no place, or cannot be listed.

    Examples
    --------
    >>> sum(model.size for model in ndcache.cache.models())
    """
    return [found.model for found in find_models(_root(cache_dir), scope)]


@public
def prune(
    *,
    older_than: str | float | timedelta | None = None,
    keep_last: int | None = None,
    partial: bool = False,
    aside: bool = False,
    max_size: str | int | None = None,
    scope: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
) -> PruneReport:
    """Remove models and files that nobody needs any more, but nothing that is in use.

    Several rules together remove what any of them removes, and ``keep_last`` protects models from all of them. What
    interrupted deletions left is removed in any case.

    Parameters
    ----------
    older_than : str, float or datetime.timedelta, optional
        Remove models that were not used for this long: ``"30d"``, ``"12h"``, or a number of seconds.
    keep_last : int, optional
        Keep this many models, those used last. Without a rule for other models, remove all others.
    partial : bool, default False
        Remove models with missing shards, and what interrupted downloads left in the others.
    aside : bool, default False
        Remove files that were set aside because they are bad.
    max_size : str or int, optional
        Remove the models that were not used for the longest time, until the rest has no more bytes than this:
        ``"50GB"`` (50 · 10⁹), ``"50GiB"``, or a number of bytes.
    scope : str, optional
        Look at one scope only.
    cache_dir : path-like, optional
        See `models`.
    dry_run : bool, default False
        Remove nothing, and report what would be.

    Returns
    -------
    PruneReport

    Raises
    ------
    CacheUnavailableError
        See `models`. Models that cannot be removed are no error, but in the report.
    ValueError
        No rule is given, or a value cannot be used.

    Examples
    --------
    >>> ndcache.cache.prune(older_than="30d", keep_last=3, dry_run=True).freed
    """
    if older_than is None and keep_last is None and max_size is None and not (partial or aside):
        raise ValueError("say what to remove: older_than, keep_last, partial, aside or max_size")
    if keep_last is not None and (isinstance(keep_last, bool) or not isinstance(keep_last, int) or keep_last < 0):
        raise ValueError(f"keep_last must be a number of models, not {keep_last!r}")
    rules = PruneRules(
        older_than=None if older_than is None else parse_duration(older_than),
        keep_last=keep_last,
        partial=partial,
        aside=aside,
        max_size=None if max_size is None else parse_size(max_size),
    )
    return prune_cache(_root(cache_dir), rules, scope=scope, dry_run=dry_run)


@public
def delete(
    *sources: str | os.PathLike[str],
    scope: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> PruneReport:
    """Remove models by name or pattern, unless a load uses them.

    `ndcache.delete` is for a single model, and removes it even if a load uses it.

    Parameters
    ----------
    *sources : str or path-like
        Sources as for `ndcache.load`, directories of models in the cache, or patterns: ``"hf://mlc-ai/*"``, and ``"*"``
        for all models.
    scope : str, optional
        Remove from one scope only. Default: from all, as `models` lists them.
    cache_dir : path-like, optional
        See `models`.
    force : bool, default False
        Remove models that are in use, too. A load that is under way downloads again what it still needs, and arrays
        keep their bytes.
    dry_run : bool, default False
        Remove nothing, and report what would be.

    Returns
    -------
    PruneReport
        Its `unmatched` has the sources that are not in the cache.

    Raises
    ------
    CacheUnavailableError
        See `models`. Models that cannot be removed are no error, but in the report.

    Examples
    --------
    >>> ndcache.cache.delete("hf://mlc-ai/*", dry_run=True).removed
    """
    found, chosen, unmatched = list(find_models(_root(cache_dir), scope)), set[Path](), []
    for source in sources:
        is_meant = match_source(source)
        if matched := {each.model.path for each in found if is_meant(each.model)}:
            chosen |= matched
        else:
            unmatched.append(redact(os.fspath(source)))
    return remove_models(found, chosen, force=force, dry_run=dry_run, unmatched=tuple(unmatched))


@public
def verify(
    *,
    scope: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    max_workers: int = 8,
    progress: Progress = None,
    progress_interval: float | None = None,
) -> Iterator[tuple[CachedModel, VerifyReport]]:
    """Check all models in the cache, as `ndcache.verify` checks one; yield each with its report.

    A model with several manifests is checked by each of them. Of a directory without a manifest, the files are checked
    that were fetched; the report's `has_manifest` is False.

    Parameters
    ----------
    scope : str, optional
        Check one scope only.
    cache_dir : path-like, optional
        See `models`.
    max_workers : int, default 8
        How many files to read at once.
    progress : True, callable, or iterable of callables, optional
        See `ndcache.load`. Each model makes reports of its own, apart from those with few files: several of them are
        checked together, so that all workers have something to read.
    progress_interval : float, optional
        Seconds between reports beside those of finished files. Default: none.

    Raises
    ------
    CacheUnavailableError
        See `models`.

    Examples
    --------
    >>> bad = [model.source for model, report in ndcache.cache.verify() if not report.ok]
    """
    root = _root(cache_dir)
    Loader(max_workers=max_workers, progress_interval=progress_interval).close()  # checks them
    known = [found.model for found in find_models(root, scope)]

    def check() -> Iterator[tuple[CachedModel, VerifyReport]]:
        with PublicFrame() as __tracebackhide__:
            for name, found in groupby(known, key=lambda model: model.scope):
                with Loader(
                    cache_dir=root, scope=name, max_workers=max_workers, progress_interval=progress_interval
                ) as loader:
                    yield from loader._verify_cached(list(found), progress)

    name_in_tracebacks(check, verify.__name__)
    return check()


def _root(cache_dir: str | os.PathLike[str] | None) -> Path:
    check_path("cache_dir", cache_dir, may_be_none=True)
    return cache_root(cache_dir, os.environ.get("NDCACHE_HOME"))
