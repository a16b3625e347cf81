"""Collect the facts that ``ndcache doctor`` shows: versions, adapters, the cache, the environment."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from .._version import __version__
from ..devices.gpu.adapters import list_adapters
from ..devices.torch.opening import list_cuda
from ..errors import CacheUnavailableError, DeviceError, NoAdapterError, redact
from ..location.hub import token_path
from ..report.words import format_size
from ..store.cleanup import free_bytes
from ..store.housekeeping.listing import find_models
from .show.devices import adapter_words

__all__ = ["facts"]

_PACKAGES = ("requests", "urllib3", "numpy", "ml_dtypes", "wgpu", "platformdirs", "tqdm", "click", "rich")
_OPTIONAL_PACKAGES = ("obstore", "safetensors", "torch")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


def facts(find_root: Callable[[], Path]) -> Iterator[tuple[str, str]]:
    """Yield labels and values, with a pair of empty strings between the groups.

    `find_root` returns the cache's directory, or raises `CacheUnavailableError`.
    """
    yield "ndcache", __version__
    yield "Python", f"{platform.python_version()}, {platform.platform()}"
    for name in (*_PACKAGES, *_OPTIONAL_PACKAGES):
        yield name, _version(name)
    for group in (_adapter_facts() + _cuda_facts(), _cache_facts(find_root), _environment_facts()):
        yield "", ""
        yield from group


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _adapter_facts() -> list[tuple[str, str]]:
    try:
        found = list_adapters()
    except NoAdapterError as error:
        return [("gpu", f"none: {error}")]
    except Exception as error:  # wgpu and drivers may raise anything; it is a fact to show
        return [("gpu", f"none: the adapters cannot be listed: {type(error).__name__}: {error}")]
    facts = [(f"gpu:{index}", adapter_words(adapter)) for index, adapter in enumerate(found)]
    return facts or [("gpu", "none: wgpu finds no adapter; --device cpu works")]


def _cuda_facts() -> list[tuple[str, str]]:
    try:
        return [(f"cuda:{index}", words) for index, words in enumerate(list_cuda())]
    except DeviceError as error:
        return [("cuda", f"none: {error}")]


def _cache_facts(find_root: Callable[[], Path]) -> list[tuple[str, str]]:
    try:
        return _root_facts(find_root())
    except CacheUnavailableError as error:
        return [("cache", f"none: {error}")]
    except OSError as error:  # such as a parent directory that may not be searched
        return [("cache", f"{error.filename}: not usable: {error.strerror}")]


def _root_facts(root: Path) -> list[tuple[str, str]]:
    existing = next(folder for folder in (root, *root.parents) if os.path.exists(folder))
    if not os.path.isdir(existing):
        return [("cache", f"{root}: not usable, {existing} is not a directory")]
    return [("cache", f"{root}{_condition(root, existing)}"), ("models", _models(root)), ("disk", _free(root))]


def _models(root: Path) -> str:
    try:
        found = [each.model for each in find_models(root)]
    except CacheUnavailableError as error:
        return f"cannot be listed: {error}"
    return f"{len(found):,}, {format_size(sum(model.size for model in found))}"


def _free(root: Path) -> str:
    free = free_bytes(root)
    return "free space unknown" if free is None else f"{format_size(free)} free"


def _condition(root: Path, existing: Path) -> str:
    """Return a remark about the cache directory, or about the one that it would be created in."""
    if not os.access(existing, os.R_OK | os.X_OK):
        return f" (not usable: {existing} is not readable)"
    if not os.access(existing, os.W_OK):
        return f" (read-only: {existing} is not writable)"
    return "" if existing == root else " (not created yet)"


def _environment_facts() -> list[tuple[str, str]]:
    environ = os.environ
    plain = ("NDCACHE_HOME", "NDCACHE_MAX_SIZE", "NDCACHE_OFFLINE", "HF_HUB_OFFLINE")
    facts = [(name, environ[name]) for name in plain if name in environ]
    if environ.get("HF_TOKEN"):
        facts.append(("HF_TOKEN", "set"))
    elif os.path.exists(path := token_path(environ)):
        facts.append(("HF token", f"in {path}"))
    if "HF_ENDPOINT" in environ:
        facts.append(("HF_ENDPOINT", redact(environ["HF_ENDPOINT"])))
    # On Windows the two spellings are one variable.
    proxies = {name: environ[name] for upper in _PROXIES for name in (upper, upper.lower()) if name in environ}
    facts += [(name, value if name.upper() == "NO_PROXY" else _proxy(value)) for name, value in proxies.items()]
    return facts or [("environment", "no variable for cache directory, offline use, Hugging Face or proxies is set")]


def _proxy(value: str) -> str:
    """Return a proxy's address without its user and password, even if it is malformed."""
    scheme, _, rest = value.rpartition("://")
    address = redact("http://" + rest.rpartition("@")[2]).removeprefix("http://")
    return f"{scheme}://{address}" if re.fullmatch("[A-Za-z0-9]+", scheme) else address
