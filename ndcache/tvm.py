"""Functions with the names of TVM's runtimes, for code that was written for them.

==============================================  =====================================================================
ndcache                                         TVM
==============================================  =====================================================================
`fetch_ndarray_cache`                           ``fetchNDArrayCache`` (``fetchTensorCache``) of the web runtime
`cache_metadata`                                ``cacheMetadata`` of the web runtime
`register_init_progress_callback`               ``registerInitProgressCallback`` of the web runtime
`has_tensor_in_cache`, `delete_tensor_cache`    ``hasTensorInCache``, ``deleteTensorCache`` of the web runtime
`load_tensor_cache`, `dump_tensor_cache`        the same in ``tvm.contrib.tvmjs``
`ndarray_cache_get`, `ndarray_cache_update`,    ``ndarrayCacheGet`` and so on of the web runtime,
`ndarray_cache_remove`, `ndarray_cache_clear`   ``vm.builtin.tensor_cache.get`` and so on in C++
`get_params`, `get_params_by_name`              ``getParamsFromCache``, ``getParamsFromCacheByName`` of the web runtime,
                                                ``vm.builtin.param_array_from_cache`` in C++
`ArtifactCache`                                 ``ArtifactCache`` of the web runtime
==============================================  =====================================================================

TVM has renamed ndarray to tensor. `fetch_tensor_cache`, `tensor_cache_get`, `has_ndarray_in_cache` and so on are other
names of the functions.

The process has one registry of tensors, which any thread may use. Nothing here needs TVM.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .api import load
from .arguments import check_path
from .cached import delete, is_cached
from .caller import public
from .errors import CacheUnavailableError, NotFoundError
from .format.shard_writer import Encoding
from .format.writer import dump
from .loader import Loader
from .options import Source
from .progress import ProgressCallback, TwoPhases, are_bars_disabled
from .store.layout import TranslateErrors

if TYPE_CHECKING:
    import wgpu

__all__ = [
    "ArtifactCache",
    "cache_metadata",
    "delete_ndarray_cache",
    "delete_tensor_cache",
    "dump_ndarray_cache",
    "dump_tensor_cache",
    "fetch_ndarray_cache",
    "fetch_tensor_cache",
    "get_params",
    "get_params_by_name",
    "has_ndarray_in_cache",
    "has_tensor_in_cache",
    "load_ndarray_cache",
    "load_tensor_cache",
    "ndarray_cache_clear",
    "ndarray_cache_get",
    "ndarray_cache_remove",
    "ndarray_cache_update",
    "register_init_progress_callback",
    "tensor_cache_clear",
    "tensor_cache_get",
    "tensor_cache_remove",
    "tensor_cache_update",
]

_lock = threading.Lock()
_registry: dict[str, Any] = {}
_callbacks: list[ProgressCallback] = []

#: The metadata of all models that `fetch_ndarray_cache` has loaded; that of a later one replaces equal keys.
cache_metadata: dict[str, Any] = {}


# --- the registry -------------------------------------------------------------------------------------


@public
def fetch_ndarray_cache(
    url: Source,
    device: str | wgpu.GPUDevice = "cpu",
    scope: str = "default",
    **options: Any,
) -> dict[str, Any]:
    """Load a model and put all its tensors into the registry.

    Tensors of the same names are replaced, as in TVM's C++ loader (its web runtime raises instead). All are replaced
    together, once everything is loaded; if the load fails, the registry stays as it was.

    Parameters
    ----------
    url, device
        As for `ndcache.load`. Each call opens the GPU again; to put several models on one device, give the
        `wgpu.GPUDevice`.
    scope : str
        The part of the cache to use.
    **options
        The options of `ndcache.Loader`.

    Returns
    -------
    dict
        The manifest's metadata.

    Raises
    ------
    NdcacheError, ValueError, TypeError
        As for `ndcache.load`.

    Examples
    --------
    >>> from ndcache import tvm
    >>> tvm.register_init_progress_callback(lambda report: print(report.text))
    >>> tvm.fetch_ndarray_cache("https://host/model/", "gpu")
    {'ParamSize': 2}
    >>> embedding, projection = tvm.get_params("param", -1)
    """
    with _lock:
        callbacks = list(_callbacks)
    weights = load(url, device, progress=TwoPhases(callbacks) if callbacks else None, scope=scope, **options)
    with _lock:
        _registry.update(weights)
        cache_metadata.update(weights.metadata)
    return dict(weights.metadata)


@public
def register_init_progress_callback(callback: ProgressCallback) -> None:
    """Report the progress of all later calls of `fetch_ndarray_cache` to one more callback.

    As in web-llm, a load over the network has two phases: ``Fetching param cache[0/n]`` to ``[n/n]``, then ``Loading
    model from cache[0/n]`` to ``[n/n]``. They run at the same time, so the reports of the second one begin when all
    shards are here.

    Parameters
    ----------
    callback : callable
        Called with each `ndcache.ProgressReport`, on the thread that fetches.
    """
    if not callable(callback):
        raise TypeError(f"a progress callback must be callable, not {callback!r}")
    with _lock:
        _callbacks.append(callback)


@public
def ndarray_cache_get(name: str) -> Any | None:
    """Return the tensor of that name, or None if there is none."""
    with _lock:
        return _registry.get(name)


@public
def ndarray_cache_update(name: str, array: Any, override: bool = False) -> None:
    """Put a tensor into the registry.

    Parameters
    ----------
    name : str
    array : array or GPUTensor
        Kept as it is, not copied.
    override : bool
        Replace a tensor of the same name.

    Raises
    ------
    ValueError
        The name is taken, and `override` is false.
    """
    with _lock:
        if not override and name in _registry:
            raise ValueError(f"Name {name} already exists in the cache")
        _registry[name] = array


@public
def ndarray_cache_remove(name: str) -> None:
    """Remove a tensor from the registry; do nothing if there is none of that name."""
    with _lock:
        _registry.pop(name, None)


def ndarray_cache_clear() -> None:
    """Remove all tensors from the registry. GPU buffers are freed when nothing else refers to them."""
    with _lock:
        _registry.clear()


@public
def get_params(prefix: str, count: int) -> list[Any]:
    """Return the tensors ``prefix_0``, ``prefix_1``, ... of the registry.

    Parameters
    ----------
    prefix : str
    count : int
        The number of tensors; -1 for all up to the first missing one.

    Raises
    ------
    KeyError
        One of them is missing.
    """
    params: list[Any] = []
    with _lock:
        while count == -1 or len(params) < count:
            name = f"{prefix}_{len(params)}"
            if name not in _registry:
                if count == -1:
                    break
                raise KeyError(f"Cannot find {name} in cache")
            params.append(_registry[name])
    return params


@public
def get_params_by_name(names: Iterable[str]) -> list[Any]:
    """Return the tensors of these names, in this order.

    Raises
    ------
    KeyError
        One of them is missing.
    """
    params = []
    with _lock:
        for name in names:
            if name not in _registry:
                raise KeyError(f"Cannot find parameter in cache: {name}")
            params.append(_registry[name])
    return params


fetch_tensor_cache = fetch_ndarray_cache
tensor_cache_get = ndarray_cache_get
tensor_cache_update = ndarray_cache_update
tensor_cache_remove = ndarray_cache_remove
tensor_cache_clear = ndarray_cache_clear


# --- models, in the cache and in directories ----------------------------------------------------------


@public
def has_tensor_in_cache(url: Source, scope: str = "default", **options: Any) -> bool:
    """Return whether the manifest and all shards of a model are in the cache. Makes no request.

    Parameters
    ----------
    url
        As for `ndcache.load`.
    scope : str
        The part of the cache to use.
    **options
        The options of `ndcache.Loader`.
    """
    return is_cached(url, scope=scope, **options)


@public
def delete_tensor_cache(url: Source, scope: str = "default", **options: Any) -> None:
    """Remove a model from the cache; do nothing if it is not cached. Makes no request.

    Other files of the model go, too, such as its tokenizer; TVM leaves these.

    Parameters
    ----------
    url, scope, **options
        As for `has_tensor_in_cache`.

    Raises
    ------
    CacheError
    """
    delete(url, scope=scope, **options)


@public
def load_tensor_cache(
    cachepath: str | os.PathLike[str], device: str | wgpu.GPUDevice = "cpu", **options: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load a model, and leave the registry as it is.

    Parameters
    ----------
    cachepath : str or path-like
        The directory or its manifest; or another source of `ndcache.load`.
    device
        As for `ndcache.load`.
    **options
        The options of `ndcache.Loader`.

    Returns
    -------
    tensors : dict
        The tensors by their names.
    metadata : dict
        The manifest's metadata.

    Raises
    ------
    NdcacheError, ValueError, TypeError
        As for `ndcache.load`.
    """
    weights = load(cachepath, device, **options)
    return dict(weights), dict(weights.metadata)


@public
def dump_tensor_cache(
    params: Mapping[str, Any] | Iterable[tuple[str, Any]],
    cache_dir: str | os.PathLike[str],
    encode_format: Encoding | Mapping[str, Encoding] = "f32-to-bf16",
    meta_data: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    shard_cap_mb: int = 32,
    show_progress: bool = True,
    update_if_exists: bool = False,
) -> None:
    """Write tensors as a model directory, byte for byte as TVM does: see `ndcache.dump`.

    Parameters
    ----------
    params, cache_dir, encode_format, meta_data, update_if_exists
        The arguments `params`, `directory`, `encode`, `metadata` and `update` of `ndcache.dump`.
    shard_cap_mb : int
        The limit of a shard in MiB.
    show_progress : bool
        Draw a bar on standard error.

    Raises
    ------
    NdcacheError, ValueError, TypeError, OSError
        As for `ndcache.dump`.
    """
    check_path("cache_dir", cache_dir)
    items = params.items() if isinstance(params, Mapping) else params
    is_hidden = not show_progress or are_bars_disabled()
    with tqdm(items, desc=f"Writing {os.fspath(cache_dir)}", unit=" tensors", disable=is_hidden) as shown:
        dump(
            shown,
            cache_dir,
            encode=encode_format,
            shard_bytes=shard_cap_mb << 20,
            metadata=meta_data,
            update=update_if_exists,
        )


has_ndarray_in_cache = has_tensor_in_cache
delete_ndarray_cache = delete_tensor_cache
load_ndarray_cache = load_tensor_cache
dump_ndarray_cache = dump_tensor_cache


# --- single files -------------------------------------------------------------------------------------


class ArtifactCache:
    """Manage single files in ndcache's cache by their URLs: shards, a tokenizer, a configuration. A context manager.

    A file lies in the cache directory of its model. So the files that `ndcache.fetch` downloaded are found here, and
    `ndcache.load` does not download a file that was added here, though it checks the digest. As everywhere in ndcache,
    URLs that differ only in the signature of their query are one file.

    Parameters
    ----------
    scope : str
        The part of the cache to use.
    **options
        The options of `ndcache.Loader`.

    Examples
    --------
    >>> with ndcache.tvm.ArtifactCache() as cache:
    ...     config = cache.fetch_with_cache("https://host/model/mlc-chat-config.json", "json")
    """

    @public
    def __init__(self, scope: str = "default", **options: Any) -> None:
        self._loader = Loader(scope=scope, **options)

    @public
    def has_all_keys(self, urls: Iterable[str]) -> bool:
        """Return whether all these files are in the cache. Makes no request."""
        try:
            return all(self._loader.find_file(url) is not None for url in urls)
        except CacheUnavailableError:
            return False

    @public
    def add_to_cache(self, url: str) -> None:
        """Download a file into the cache unless it is there.

        Raises
        ------
        TransferError, OfflineError, CacheError
        UnsafePathError, ValueError
            `url` does not name a file on a server.
        """
        self._loader.fetch_file(url)

    @public
    def fetch_with_cache(self, url: str, storetype: str | None = None) -> Any:
        """Return the content of a file, after downloading it into the cache unless it is there.

        Parameters
        ----------
        url : str
        storetype : {None, "arraybuffer", "json"}
            ``"json"`` returns the parsed value, the others the bytes.

        Raises
        ------
        TransferError, OfflineError, CacheError
        UnsafePathError, ValueError
            `url` does not name a file on a server, `storetype` is none of these, or the file is not JSON.
        """
        if storetype not in (None, "arraybuffer", "json"):
            raise ValueError(f"storetype is None, 'arraybuffer' or 'json', not {storetype!r}")
        path = self._loader.fetch_file(url)
        with TranslateErrors(path.parent, path.name):
            try:
                data = path.read_bytes()
            except FileNotFoundError as error:
                raise NotFoundError("the file was deleted while it was being read", url=url, shard=path.name) from error
        return json.loads(data) if storetype == "json" else data

    @public
    def delete_in_cache(self, url: str) -> None:
        """Remove a file from the cache; do nothing if it is not there."""
        self._loader.delete_file(url)

    def close(self) -> None:
        """Close the idle connections."""
        self._loader.close()

    def __enter__(self) -> ArtifactCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
