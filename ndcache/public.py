"""All that `import ndcache` gives, under the names that it has there."""

from __future__ import annotations

from . import tvm as tvm
from ._version import __version__
from .api import delete, fetch, is_cached, load, read_manifest, stream, verify
from .devices.gpu.tensor import GPUTensor
from .errors import (
    AuthError,
    CacheError,
    CacheUnavailableError,
    CancelledError,
    ChecksumError,
    ConnectError,
    DecodeError,
    DeviceError,
    DiskFullError,
    IntegrityError,
    ManifestError,
    ManifestLayoutError,
    ManifestLimitError,
    ManifestSyntaxError,
    NdcacheError,
    NoAdapterError,
    NotFoundError,
    OfflineError,
    OutOfDeviceMemoryError,
    ProtocolError,
    RangeError,
    RateLimitedError,
    RedirectError,
    RemoteChangedError,
    ServerError,
    SizeMismatchError,
    StallError,
    TLSError,
    TooManyOpenFilesError,
    TransferError,
    TruncatedError,
    UnsafeCacheError,
    UnsafePathError,
    UnsupportedDtypeError,
    UnsupportedFormatError,
)
from .format.manifest import Manifest, Record, Shard
from .format.writer import dump
from .http.retry import RetryPolicy
from .loader import Loader
from .pipeline import VerifyReport
from .progress import ProgressReport
from .stats import LoadStats
from .weights import Weights
from .workers import cancellation as _cancellation  # noqa: F401 - before Python is shutting down, if it is about to

__all__ = [
    "AuthError",
    "CacheError",
    "CacheUnavailableError",
    "CancelledError",
    "ChecksumError",
    "ConnectError",
    "DecodeError",
    "DeviceError",
    "DiskFullError",
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
    "delete",
    "dump",
    "fetch",
    "is_cached",
    "load",
    "read_manifest",
    "stream",
    "verify",
]

# Where users find them, whichever module they are in: for pickles, and for what is printed.
for _name in __all__:
    if not _name.startswith("_"):
        globals()[_name].__module__ = "ndcache"
