"""A loader: the verbs of ndcache as methods, with options and connections kept. `pipeline` has the data's way."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import requests

from .context import VerifyMode
from .devices.cpu import Array
from .devices.gpu.tensor import GPUTensor
from .devices.into import LentMemory
from .errors import CacheUnavailableError, ManifestError, NotFoundError, OfflineError, redact
from .format.manifest import Manifest, NameFilter
from .http.retry import RetryPolicy
from .location import locate
from .options import (
    CUDAName,
    GPUDeviceLike,
    GPUName,
    LoaderOptions,
    Source,
    TorchDeviceLike,
    check_keywords,
    document_options,
    hide_keywords,
    suggest_keywords,
)
from .pipeline import VerifyReport, check_shards, fetch_shards, place_tensors, tracing
from .processes.beside import HelperProcesses
from .progress import Progress
from .resources import LoaderResources
from .sources.client import Client
from .sources.download import Downloader
from .sources.file_url import choose_model, delete_file, file_url, find_file
from .sources.model import Flaw
from .weights import Weights, collected
from .workers.stop_iteration import WrappedStopIteration, unwrap_stop_iteration

if TYPE_CHECKING:
    import torch

__all__ = ["Loader"]

#: How often a model is verified that is being updated meanwhile.
_VERIFY_TRIES = 4
#: The limit of a single file, whose size no manifest gives; it keeps an endless body from filling the disk.
_MAX_FILE_BYTES = 64 << 30


@document_options
class Loader:
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
        mirrors: Sequence[str] = (),
        integrity: Mapping[str, str] | None = None,
        memory_limit: int = 512 << 20,
        cancel: threading.Event | None = None,
    ) -> None:
        self._options = LoaderOptions(
            max_workers=max_workers,
            processes=processes,
            cache_dir=cache_dir,
            scope=scope,
            timeout=timeout,
            retries=retries,
            verify=verify,
            offline=offline,
            session=session,
            mirrors=[mirrors] if isinstance(mirrors, str) else mirrors,
            integrity=integrity,
            memory_limit=memory_limit,
            cancel=cancel,
        )
        self._resources = LoaderResources(self._options, os.environ)

    # --- the functions of ndcache as methods

    @overload
    def load(
        self,
        source: Source,
        device: Literal["cpu"] = "cpu",
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        into: Mapping[str, Array] | None = None,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> Weights[Array]: ...

    @overload
    def load(
        self,
        source: Source,
        device: GPUName | GPUDeviceLike,
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> Weights[GPUTensor]: ...

    @overload
    def load(
        self,
        source: Source,
        device: CUDAName | TorchDeviceLike,
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        into: Mapping[str, torch.Tensor] | None = None,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> Weights[torch.Tensor]: ...

    @overload
    def load(
        self,
        source: Source,
        device: str | GPUDeviceLike | TorchDeviceLike,
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        into: Mapping[str, Any] | None = None,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> Weights[Any]: ...

    @hide_keywords
    def load(
        self,
        source: Source,
        device: Any = "cpu",
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        into: Mapping[str, Any] | None = None,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
        **unknown: Any,
    ) -> Weights[Any]:
        """Load a model's weights, downloading what is not cached: see `ndcache.load`."""
        check_keywords(Loader.load, unknown)
        with (
            LentMemory(into) as lent,
            tracing(trace) as events,
            unwrap_stop_iteration(),
            collected(target := self._resources.open_device(device), lent.objects) as tensors,
            self._resources.open_model(source, device=target, trace=events) as (model, context),
        ):
            placed = place_tensors(
                model,
                context,
                target,
                names,
                lent,
                progress,
                self._helpers(source),
                decode=decode,
                copy=copy,
                memory_limit=self._options.memory_limit,
                keeps_all=True,
            )
            with closing(placed):
                for name, tensor in placed:
                    tensors[name] = tensor
        return Weights(tensors, manifest=model.manifest, device=target, stats=context.stats, into=lent.destinations)

    @overload
    def stream(
        self,
        source: Source,
        device: Literal["cpu"] = "cpu",
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        into: Mapping[str, Array] | None = None,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> Iterator[tuple[str, Array]]: ...

    @overload
    def stream(
        self,
        source: Source,
        device: GPUName | GPUDeviceLike,
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> Iterator[tuple[str, GPUTensor]]: ...

    @overload
    def stream(
        self,
        source: Source,
        device: CUDAName | TorchDeviceLike,
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        into: Mapping[str, torch.Tensor] | None = None,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]: ...

    @overload
    def stream(
        self,
        source: Source,
        device: str | GPUDeviceLike | TorchDeviceLike,
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        into: Mapping[str, Any] | None = None,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> Iterator[tuple[str, Any]]: ...

    @hide_keywords
    def stream(
        self,
        source: Source,
        device: Any = "cpu",
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        into: Mapping[str, Any] | None = None,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
        **unknown: Any,
    ) -> Iterator[tuple[str, Any]]:
        """Load a model, and yield each tensor as soon as it is there: see `ndcache.stream`."""
        check_keywords(Loader.stream, unknown)
        arriving = self._stream(source, device, names, decode, copy, LentMemory(into), progress, trace)
        with unwrap_stop_iteration():
            next(arriving)  # raises here what is wrong with the model or the arguments
        return arriving

    def _stream(
        self,
        source: Source,
        device: str | GPUDeviceLike | TorchDeviceLike,
        names: NameFilter,
        decode: bool,
        copy: bool,
        lent: LentMemory,
        progress: Progress,
        trace: str | os.PathLike[str] | None,
    ) -> Generator[tuple[str, Any], None, None]:
        """Yield once when the model is open, so that closing the generator closes it; then yield the tensors."""
        with lent, tracing(trace) as events:
            target = self._resources.open_device(device)
            is_open = False
            try:
                with self._resources.open_model(source, device=target, trace=events) as (
                    model,
                    context,
                ):
                    placed = place_tensors(
                        model,
                        context,
                        target,
                        names,
                        lent,
                        progress,
                        self._helpers(source),
                        decode=decode,
                        copy=copy,
                        memory_limit=self._options.memory_limit,
                    )
                    is_open = True
                    yield "", None
                    yield from placed
            except BaseException as error:
                if not is_open:
                    target.discard({})
                elif isinstance(error, WrappedStopIteration):
                    # It becomes a RuntimeError, as in any generator, and so does not end the caller's loop silently.
                    raise error.error from None
                raise

    @suggest_keywords
    def fetch(
        self,
        source: Source,
        *,
        names: NameFilter = None,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> Path:
        """Download a model into the cache without decoding it: see `ndcache.fetch`."""
        with (
            tracing(trace) as events,
            unwrap_stop_iteration(),
            self._resources.open_model(source, trace=events, must_keep=True) as (model, context),
        ):
            fetch_shards(model, context, model.manifest.shards_with(names), progress, self._helpers(source))
            return model.directory

    def read_manifest(self, source: Source) -> Manifest:
        """Return a model's manifest, parsed and checked: see `ndcache.read_manifest`."""
        with unwrap_stop_iteration(), self._resources.open_model(source, threads=1) as (model, _):
            return model.manifest

    def is_cached(self, source: Source) -> bool:
        """Return whether the manifest and all shards are on disk: see `ndcache.is_cached`."""
        try:
            with unwrap_stop_iteration(), self._resources.open_model(source, threads=1, offline=True) as (model, _):
                return all(model.has(shard) for shard in model.manifest.shards)
        except (OfflineError, NotFoundError, ManifestError, CacheUnavailableError):
            return False

    def verify(self, source: Source) -> VerifyReport:
        """Check the digests of what is cached, and set aside bad shards: see `ndcache.verify`."""
        manifest: Manifest | None = None
        found: dict[str, str | Flaw] = {}
        for _ in range(_VERIFY_TRIES):
            try:
                with unwrap_stop_iteration(), self._resources.open_model(source, offline=True) as (model, context):
                    if model.manifest != manifest:
                        manifest, found = model.manifest, check_shards(model, context)
            except OfflineError as error:
                if manifest is None:
                    raise NotFoundError(f"{locate(source)} is not in the cache") from error
                continue  # it was deleted meanwhile
            if Flaw.OF_ANOTHER_VERSION not in found.values():
                break
        assert manifest is not None
        return VerifyReport._of(manifest, found)

    def delete(self, source: Source) -> int:
        """Remove a model from the cache, and return the bytes freed: see `ndcache.delete`."""
        return self._resources.cache.delete(locate(source))

    def find_file(self, url: str) -> Path | None:
        """Return the path of a single file in the cache, or None if it is not there. Makes no request.

        Raises
        ------
        CacheUnavailableError
        UnsafePathError, ValueError
            `url` does not name a file on a server.
        """
        return find_file(self._resources.cache, url)

    def fetch_file(self, url: str) -> Path:
        """Download a single file, such as a tokenizer, into the cache unless it is there.

        It is stored with the nearest model above it that has a cache directory, else under its own directory's URL.

        Returns
        -------
        pathlib.Path
            The file in the cache.

        Raises
        ------
        TransferError, OfflineError, CacheError
        UnsafePathError, ValueError
            `url` does not name a file on a server.
        """
        if (found := self.find_file(url)) is not None:
            return found
        location, name = choose_model(self._resources.cache, url)
        if self._resources.is_offline:
            error = OfflineError(f"offline, and not in the cache: {redact(url)}")
            error.missing = (name,)
            raise error
        with self._resources.context(location, threads=1) as context:
            downloader = Downloader(Client(context), context.cache.open(location))
            return context.pool.run(
                lambda: downloader.download_file(name, file_url(url), _MAX_FILE_BYTES), tasks_to_come=0
            )

    def delete_file(self, url: str) -> None:
        """Remove a single file from the cache, wherever it lies there; do nothing if it is not cached.

        Raises
        ------
        CacheError
        UnsafePathError, ValueError
            `url` does not name a file on a server.
        """
        delete_file(self._resources.cache, url)

    def close(self) -> None:
        """Close the kept connections. The loader can still be used; it opens new ones."""
        self._resources.close()

    def _helpers(self, source: Source) -> HelperProcesses:
        return HelperProcesses(source, self._options, self._resources.login.environ)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
