"""A loader: the verbs of ndcache as methods, with options and connections kept. `pipeline` has the data's way."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Literal

import requests

from .context import VerifyMode
from .errors import CacheUnavailableError, ManifestError, NotFoundError, OfflineError, UnsupportedDtypeError
from .format.manifest import Manifest
from .http.retry import RetryPolicy
from .loaders.checking import VerifyLoader
from .loaders.conversion import ConvertLoader
from .loaders.fetching import FetchLoader
from .loaders.locking import LockLoader
from .loaders.single_files import SingleFileLoader
from .loaders.tensors import TensorLoader
from .options import LoaderOptions, Source, document_options, suggest_keywords
from .resources import LoaderResources
from .workers.stop_iteration import unwrap_stop_iteration

__all__ = ["Loader"]


@document_options
class Loader(TensorLoader, FetchLoader, ConvertLoader, VerifyLoader, LockLoader, SingleFileLoader):
    """Load models with the same options, and reuse connections. Also a context manager.

    The methods are the functions of the same names in `ndcache`. Several threads may use a loader at once.

    Parameters
    ----------
    {options}

    Raises
    ------
    TypeError, ValueError
        An option is unknown, or has a type or a value that it must not have.

    Examples
    --------
    >>> with ndcache.Loader(max_workers=4, cache_dir="/data/models") as loader:
    ...     for source in ("https://host/one/", "https://host/other/"):
    ...         weights = loader.load(source)
    """

    @suggest_keywords
    def __init__(
        self,
        *,
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
    ) -> None:
        options = LoaderOptions(
            max_workers=max_workers,
            processes=processes,
            cache_dir=cache_dir,
            scope=scope,
            timeout=timeout,
            retries=retries,
            verify=verify,
            offline=offline,
            session=session,
            token=token,
            headers=headers,
            revision=revision,
            mirrors=[mirrors] if isinstance(mirrors, str) else mirrors,
            integrity=integrity,
            limit_rate=limit_rate,
            memory_limit=memory_limit,
            progress_interval=progress_interval,
            cancel=cancel,
        )
        super().__init__(options, LoaderResources(options, os.environ))

    # --- the functions of ndcache as methods; the base classes have those that need much code

    @suggest_keywords
    def read_manifest(self, source: Source) -> Manifest:
        """Return a model's manifest, parsed and checked: see `ndcache.read_manifest`."""
        with unwrap_stop_iteration(), self._resources.open_model(source, threads=1) as (model, _):
            return model.manifest

    @suggest_keywords
    def is_cached(self, source: Source) -> bool:
        """Return whether the manifest and all shards are on disk: see `ndcache.is_cached`."""
        try:
            with unwrap_stop_iteration(), self._resources.open_model(source, threads=1, offline=True) as (model, _):
                return all(model.has(shard) for shard in model.manifest.shards)
        except (OfflineError, NotFoundError, ManifestError, UnsupportedDtypeError, CacheUnavailableError):
            return False

    @suggest_keywords
    def delete(self, source: Source) -> int:
        """Remove a model from the cache, and return the bytes freed: see `ndcache.delete`."""
        return self._resources.cache.delete(self._resources.locate(source))

    def close(self) -> None:
        """Close the kept connections. The loader can still be used; it opens new ones."""
        self._resources.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
