"""Load model weights published in the MLC / TVM NDArray cache format into NumPy arrays or GPU buffers.

>>> import ndcache
>>> weights = ndcache.load("https://host/model/", device="gpu")

Importing ndcache is cheap: its modules are imported when the first of the names below is used.
"""

from __future__ import annotations

import importlib
import sys
import typing

from ._version import __version__ as __version__

if typing.TYPE_CHECKING:
    from . import cache as cache
    from . import errors as errors
    from . import tvm as tvm
    from .api import fetch as fetch
    from .api import load as load
    from .api import stream as stream
    from .cached import convert as convert
    from .cached import delete as delete
    from .cached import is_cached as is_cached
    from .cached import read_manifest as read_manifest
    from .cached import verify as verify
    from .devices.gpu.tensor import GPUTensor as GPUTensor
    from .errors import AuthError as AuthError
    from .errors import CacheError as CacheError
    from .errors import CacheUnavailableError as CacheUnavailableError
    from .errors import CancelledError as CancelledError
    from .errors import ChecksumError as ChecksumError
    from .errors import ConnectError as ConnectError
    from .errors import DecodeError as DecodeError
    from .errors import DeviceError as DeviceError
    from .errors import DiskFullError as DiskFullError
    from .errors import IntegrityError as IntegrityError
    from .errors import ManifestError as ManifestError
    from .errors import ManifestLayoutError as ManifestLayoutError
    from .errors import ManifestLimitError as ManifestLimitError
    from .errors import ManifestSyntaxError as ManifestSyntaxError
    from .errors import NdcacheError as NdcacheError
    from .errors import NoAdapterError as NoAdapterError
    from .errors import NotFoundError as NotFoundError
    from .errors import OfflineError as OfflineError
    from .errors import OutOfDeviceMemoryError as OutOfDeviceMemoryError
    from .errors import ProtocolError as ProtocolError
    from .errors import RangeError as RangeError
    from .errors import RateLimitedError as RateLimitedError
    from .errors import RedirectError as RedirectError
    from .errors import RemoteChangedError as RemoteChangedError
    from .errors import ServerError as ServerError
    from .errors import SizeMismatchError as SizeMismatchError
    from .errors import StallError as StallError
    from .errors import TLSError as TLSError
    from .errors import TooManyOpenFilesError as TooManyOpenFilesError
    from .errors import TransferError as TransferError
    from .errors import TruncatedError as TruncatedError
    from .errors import UnsafeCacheError as UnsafeCacheError
    from .errors import UnsafePathError as UnsafePathError
    from .errors import UnsupportedDtypeError as UnsupportedDtypeError
    from .errors import UnsupportedFormatError as UnsupportedFormatError
    from .export.conversion import ConvertReport as ConvertReport
    from .format.manifest import Manifest as Manifest
    from .format.manifest import Record as Record
    from .format.manifest import Shard as Shard
    from .format.writer import dump as dump
    from .http.retry import RetryPolicy as RetryPolicy
    from .loader import Loader as Loader
    from .loaders.plan import FetchPlan as FetchPlan
    from .loaders.plan import PlannedFile as PlannedFile
    from .loaders.verification import VerifyReport as VerifyReport
    from .progress import ProgressReport as ProgressReport
    from .stats import LoadStats as LoadStats
    from .weights import Weights as Weights

__all__ = [
    "AuthError",
    "CacheError",
    "CacheUnavailableError",
    "CancelledError",
    "ChecksumError",
    "ConnectError",
    "ConvertReport",
    "DecodeError",
    "DeviceError",
    "DiskFullError",
    "FetchPlan",
    "GPUTensor",
    "IntegrityError",
    "LoadStats",
    "Loader",
    "Manifest",
    "ManifestError",
    "ManifestLayoutError",
    "ManifestLimitError",
    "ManifestSyntaxError",
    "NdcacheError",
    "NoAdapterError",
    "NotFoundError",
    "OfflineError",
    "OutOfDeviceMemoryError",
    "PlannedFile",
    "ProgressReport",
    "ProtocolError",
    "RangeError",
    "RateLimitedError",
    "Record",
    "RedirectError",
    "RemoteChangedError",
    "RetryPolicy",
    "ServerError",
    "Shard",
    "SizeMismatchError",
    "StallError",
    "TLSError",
    "TooManyOpenFilesError",
    "TransferError",
    "TruncatedError",
    "UnsafeCacheError",
    "UnsafePathError",
    "UnsupportedDtypeError",
    "UnsupportedFormatError",
    "VerifyReport",
    "Weights",
    "__version__",
    "convert",
    "delete",
    "dump",
    "fetch",
    "is_cached",
    "load",
    "read_manifest",
    "stream",
    "verify",
]

#: The modules of these names, besides `errors`, which has all errors.
_PLACES = {
    ".api": (
        "fetch",
        "load",
        "stream",
    ),
    ".cached": (
        "convert",
        "delete",
        "is_cached",
        "read_manifest",
        "verify",
    ),
    ".devices.gpu.tensor": ("GPUTensor",),
    ".export.conversion": ("ConvertReport",),
    ".format.manifest": (
        "Manifest",
        "Record",
        "Shard",
    ),
    ".format.writer": ("dump",),
    ".http.retry": ("RetryPolicy",),
    ".loader": ("Loader",),
    ".loaders.plan": (
        "FetchPlan",
        "PlannedFile",
    ),
    ".loaders.verification": ("VerifyReport",),
    ".progress": ("ProgressReport",),
    ".stats": ("LoadStats",),
    ".weights": ("Weights",),
}

#: Modules that are public, but imported by their own names only.
_OPTIONAL_MODULES = frozenset({"dask", "mlc", "ray", "torch"})

if not typing.TYPE_CHECKING:

    def __getattr__(name: str) -> typing.Any:
        if not name.startswith("__"):
            try:
                _import_all()
            except RuntimeError as error:
                # Some libraries register functions to be called when the main thread ends.
                if "after shutdown" not in str(error):
                    raise
                raise importlib.import_module(".errors", __name__).NdcacheError(
                    "ndcache cannot be imported any more, as Python is shutting down",
                    hint="`import ndcache` imports its modules when something of it is used: use something earlier.",
                ) from error
            if name in globals():
                return globals()[name]
        text = f"module {__name__!r} has no attribute {name!r}"
        if name in _OPTIONAL_MODULES:
            text += f" before `import {__name__}.{name}`"
        raise AttributeError(text, name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    special = {name for name in globals() if name.startswith("__")}
    return sorted({*special, *__all__, "cache", "errors", "tvm", *(globals().keys() & _OPTIONAL_MODULES)})


def _import_all() -> None:
    """Import all that is public, and let pickles and printed names say that it is in `ndcache`."""
    importlib.import_module(".tvm", __name__)
    importlib.import_module(".cache", __name__)
    errors = importlib.import_module(".errors", __name__)
    for place, names in {**_PLACES, ".errors": errors.__all__}.items():
        module = importlib.import_module(place, __name__)
        for name in names:
            value = getattr(module, name)
            value.__module__ = __name__
            globals()[name] = value
