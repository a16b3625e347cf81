"""The function `fetch`, with its signatures for a download and for a plan of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import requests

from ..caller import PublicFrame
from ..context import VerifyMode
from ..format.manifest import NameFilter
from ..http.retry import RetryPolicy
from ..loader import Loader
from ..loaders.plan import FetchPlan
from ..options import OPTION_NAMES, Source, check_keywords, hide_keywords
from ..progress import Progress

__all__ = ["fetch"]


@overload
def fetch(
    source: Source,
    *,
    names: NameFilter = None,
    files: bool = True,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    force: bool = False,
    dry_run: Literal[False] = False,
    local_dir: str | os.PathLike[str] | None = None,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    max_workers: int = 8,
    processes: int | Literal["auto"] = 1,
    cache_dir: str | os.PathLike[str] | None = None,
    scope: str = "default",
    timeout: float | tuple[float, float] = (10.0, 30.0),
    retries: int | RetryPolicy = 6,
    verify: VerifyMode = "download",
    offline: bool = False,
    session: requests.Session | None = None,
    token: str | None = None,
    headers: Mapping[str, str] | None = None,
    revision: str | None = None,
    mirrors: Sequence[str] = (),
    integrity: Mapping[str, str] | str | os.PathLike[str] | None = None,
    limit_rate: float | str | None = None,
    memory_limit: int = 512 << 20,
    progress_interval: float | None = None,
    cancel: threading.Event | None = None,
) -> Path: ...


@overload
def fetch(
    source: Source,
    *,
    names: NameFilter = None,
    files: bool = True,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    force: bool = False,
    dry_run: Literal[True],
    local_dir: str | os.PathLike[str] | None = None,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    max_workers: int = 8,
    processes: int | Literal["auto"] = 1,
    cache_dir: str | os.PathLike[str] | None = None,
    scope: str = "default",
    timeout: float | tuple[float, float] = (10.0, 30.0),
    retries: int | RetryPolicy = 6,
    verify: VerifyMode = "download",
    offline: bool = False,
    session: requests.Session | None = None,
    token: str | None = None,
    headers: Mapping[str, str] | None = None,
    revision: str | None = None,
    mirrors: Sequence[str] = (),
    integrity: Mapping[str, str] | str | os.PathLike[str] | None = None,
    limit_rate: float | str | None = None,
    memory_limit: int = 512 << 20,
    progress_interval: float | None = None,
    cancel: threading.Event | None = None,
) -> FetchPlan: ...


@hide_keywords
def fetch(
    source: Source,
    *,
    names: NameFilter = None,
    files: bool = True,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    force: bool = False,
    dry_run: bool = False,
    local_dir: str | os.PathLike[str] | None = None,
    progress: Progress = None,
    trace: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Path | FetchPlan:
    """Download a model into the cache without decoding it, with its configuration and tokenizer.

    Parameters
    ----------
    source, names, progress, trace, report
        See `load`.
    files : bool, default True
        Also fetch the companion files: ``mlc-chat-config.json``, or the configuration that ``mlc-model-manifest.json``
        names, and the tokenizer files that it lists. Each may have 64 MiB. They are asked for if the model is new in
        the cache or its manifest has changed. It is no error if a model has no configuration. For a model in
        safetensors files: what transformers reads, see docs/guide/safetensors.rst.
    include, exclude : str or sequence of str, default ()
        Names of companion files to add, and names or glob patterns of those to leave out. Files to add may be patterns
        where the server lists its files: on Hugging Face, and in object storage. Code, pickles and weights in other
        formats are fetched only if `include` has their names or suffixes. Files to add may have 64 GiB.
    force : bool, default False
        Download again what is cached, the companion files included. Each file takes the place of the old one when it is
        complete and checked. If the call fails, files that it has not replaced stay. What `local_dir` needs is
        downloaded, too, and not copied from the cache.
    dry_run : bool, default False
        Fetch the manifest only, write nothing, and return what the call would fetch. To know the sizes of companion
        files, the server is asked for them, but only a configuration is received.
    local_dir : path-like, optional
        Put the model into this directory of yours instead of the cache. What the cache has is copied, or shares its
        blocks with the copy where the file system can do that; nothing else is added to the cache. A file there that
        ndcache did not write is never replaced. What it needs to resume and to update lies in ``.ndcache`` in it.
    {options}

    Returns
    -------
    pathlib.Path or FetchPlan
        A model directory that ndcache, TVM and mlc_llm can read: the one in the cache, `local_dir`, or the local source
        itself. If only some bytes of a shard were fetched, only ndcache can use them. With ``dry_run=True``, the plan.

    Raises
    ------
    NdcacheError, KeyError, ValueError, TypeError
        See `load`.
    OfflineError
        Something is missing, or `force` is given, and the options or the environment forbid requests.
    CacheUnavailableError
        The cache or `local_dir` cannot be written.
    UnsafeCacheError
        `local_dir` has another model, or another file with the name of one of the model's.
    NotFoundError, SizeMismatchError, UnsafePathError
        A companion file that the model lists, or that you include, is missing, is too large, or must not be fetched.
        The shards are in the cache; ``exclude`` or ``files=False`` does without the file.

    Examples
    --------
    >>> directory = ndcache.fetch("https://host/model/")
    >>> directory = ndcache.fetch("https://host/model/", exclude=["vocab.json"])
    >>> ndcache.fetch("https://host/model/", dry_run=True).bytes_to_fetch
    0
    """
    with PublicFrame() as __tracebackhide__:
        check_keywords(fetch, options.keys() - OPTION_NAMES)
        with Loader(**options) as loader:
            call: Any = loader.fetch
            result: Path | FetchPlan = call(
                source,
                names=names,
                files=files,
                include=include,
                exclude=exclude,
                force=force,
                dry_run=dry_run,
                local_dir=local_dir,
                progress=progress,
                trace=trace,
                report=report,
            )
            return result
