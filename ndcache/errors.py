"""The exceptions of ndcache.

::

    NdcacheError
    ├ ManifestError            the manifest cannot be used
    │ ├ ManifestSyntaxError      it is not JSON, or fields are missing or of the wrong type
    │ ├ ManifestLayoutError      sizes, offsets and shapes contradict each other
    │ ├ ManifestLimitError       it is larger than that of any real model
    │ └ UnsafePathError          a shard path leaves the model directory
    ├ TransferError (OSError)  a file cannot be fetched from a server
    │ ├ ConnectError             refused, reset, unreachable, unknown host
    │ ├ StallError               connected, but (almost) nothing arrives
    │ ├ TruncatedError           the body ended early
    │ ├ ServerError              status 5xx or 408
    │ ├ RateLimitedError         status 429, or 503 with Retry-After
    │ ├ ProtocolError            the response violates HTTP
    │ ├ RangeError               another byte range than the requested one
    │ ├ RemoteChangedError       the file changed while it was being read
    │ ├ AuthError                status 401, 403 or 407
    │ ├ NotFoundError            status 404 or 410, or no such local path
    │ ├ TLSError                 certificate or handshake
    │ └ RedirectError            a redirect that must not be followed
    ├ IntegrityError           the bytes are not those that the manifest promises
    │ ├ SizeMismatchError        the wrong size
    │ └ ChecksumError            the wrong digest
    ├ CacheError (OSError)     the cache directory
    │ ├ DiskFullError            no space is left
    │ ├ CacheUnavailableError    it cannot be read or written
    │ └ UnsafeCacheError         something in it is not ndcache's own
    ├ OfflineError             ``offline=True``, and something is missing
    ├ TooManyOpenFilesError (OSError)  no file descriptor is left
    ├ DecodeError (ValueError) bytes that cannot become an array
    │ ├ UnsupportedDtypeError    an unknown dtype
    │ └ UnsupportedFormatError   an unknown storage format
    ├ DeviceError              the GPU
    │ ├ NoAdapterError           none, or not the requested one
    │ └ OutOfDeviceMemoryError   no memory is left on it
    └ CancelledError           ``cancel`` was set
"""

from __future__ import annotations

import copyreg
from typing import Any

from .caller import render_in_ipython
from .urls.redact import printable
from .urls.redact import redact as redact

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
    "IntegrityError",
    "ManifestError",
    "ManifestLayoutError",
    "ManifestLimitError",
    "ManifestSyntaxError",
    "NdcacheError",
    "NoAdapterError",
    "NotFoundError",
    "OfflineError",
    "OutOfDeviceMemoryError",
    "ProtocolError",
    "RangeError",
    "RateLimitedError",
    "RedirectError",
    "RemoteChangedError",
    "ServerError",
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
]


class NdcacheError(Exception):
    """Base class of all errors that ndcache raises on purpose.

    Parameters
    ----------
    message : str
        A short description of the error. `str` adds the fields below.
    url : str, optional
        The URL concerned. User, password, query and fragment are removed.
    shard : str, optional
        The shard's path in the manifest (or the name of the manifest file).
    status : int, optional
        The HTTP status of the last response.
    expected, received : int or str, optional
        The value that the manifest promises, and the one that came: numbers of bytes, or hex digests.
    attempts : int, optional
        How many attempts were made.
    hint : str, optional
        A remedy to try, or a note about files left on disk.
    retryable : bool, optional
        Whether the same call may succeed later. By default, the value of the class.

    Attributes
    ----------
    retryable : bool
        Whether the same call may succeed later, without any change by the caller.
    others : tuple of NdcacheError
        Errors of other shards of the same load.
    node : str or None
        In a cluster, the worker on whose node it happened.
    undefined : tuple of str
        Tensors of the ``into`` option that the failed call may not have written completely. (Other exceptions that end
        such a call, such as KeyboardInterrupt, have this attribute, too.)
    """

    node: str | None = None
    undefined: tuple[str, ...] = ()
    #: The class's default; an instance may differ.
    retryable: bool = False
    #: The most retries that ndcache itself makes, or None to leave that to the `RetryPolicy`.
    max_retries: int | None = None

    def __init__(
        self,
        message: str,
        *,
        url: str | None = None,
        shard: str | None = None,
        status: int | None = None,
        expected: int | str | None = None,
        received: int | str | None = None,
        attempts: int | None = None,
        hint: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        message = printable(message)
        super().__init__(message)
        self.message = message
        self.url = None if url is None else redact(url)
        self.shard = shard
        self.status = status
        self.expected = expected
        self.received = received
        self.attempts = attempts
        self.hint = None if hint is None else printable(hint)
        self.others: tuple[NdcacheError, ...] = ()
        if retryable is not None:
            self.retryable = retryable

    _render_traceback_ = render_in_ipython

    def __str__(self) -> str:
        text = self.message
        if self.shard is not None and self.shard not in text:
            text += f": {self.shard}"
        if self.url is not None and self.url not in text:
            text += f" ({self.url})"
        if self.node is not None:
            text += f", on {self.node}"
        if self.attempts is not None and self.attempts > 1:
            text += f", after {self.attempts} tries"
        if self.others:
            text += f"; {len(self.others)} more failed"
        return printable(f"{text}. {self.hint}" if self.hint else text)

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException's own method would call __init__ with the message alone.
        state = dict(self.__dict__)
        if isinstance(self, OSError) and self.errno is not None:
            state["errno"] = self.errno  # it is not in __dict__
        return copyreg.__newobj__, (type(self), self.message), state  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any] | None) -> None:
        for name, value in (state or {}).items():
            setattr(self, name, value)
        self.args = (self.message,)


class ManifestError(NdcacheError):
    """The manifest cannot be used."""


class ManifestSyntaxError(ManifestError):
    """The manifest is not JSON, or fields are missing or of the wrong type."""


class ManifestLayoutError(ManifestError):
    """Sizes, offsets and shapes of the manifest contradict each other."""


class ManifestLimitError(ManifestError):
    """The manifest is larger than that of any real model."""


class UnsafePathError(ManifestError):
    """A shard's path leaves the model directory, or cannot be a file name on every system."""


class TransferError(NdcacheError, OSError):
    """A file cannot be fetched from a server."""


class ConnectError(TransferError):
    """The server cannot be reached, or the connection broke."""

    retryable = True


class StallError(TransferError):
    """The server is connected, but nothing, or almost nothing, arrives."""

    retryable = True


class TruncatedError(TransferError):
    """The body ended before all of its bytes had come."""

    retryable = True


class ServerError(TransferError):
    """The server failed (status 5xx or 408)."""

    retryable = True


class RateLimitedError(TransferError):
    """The server asks for a wait before the next request (status 429, or 503 with Retry-After).

    Attributes
    ----------
    retry_after : float or None
        Seconds to wait, if the server said how many.
    """

    retryable = True
    retry_after: float | None = None


class ProtocolError(TransferError):
    """The response violates HTTP."""

    retryable = True
    max_retries = 1


class RangeError(TransferError):
    """The server sent another byte range than the requested one."""

    retryable = True
    max_retries = 1


class RemoteChangedError(TransferError):
    """The file changed on the server while it was read, and changed again in the next attempt.

    Also raised at the first change if a stream had yielded tensors of the file.
    """

    retryable = True
    max_retries = 0


class AuthError(TransferError):
    """The server or proxy demands other credentials (status 401, 403 or 407), or they cannot be sent."""


class NotFoundError(TransferError):
    """There is no such file (status 404 or 410), or no such local path."""


class TLSError(TransferError):
    """The TLS connection cannot be established."""


class RedirectError(TransferError):
    """The server redirects in a circle, or to a URL that must not be followed."""


class IntegrityError(NdcacheError):
    """The bytes are not those that the manifest promises."""

    retryable = True
    max_retries = 1


class SizeMismatchError(IntegrityError):
    """A file does not have the size that the manifest says."""


class ChecksumError(IntegrityError):
    """A file does not have the digest that the manifest, or the ``integrity`` option, says."""


class CacheError(NdcacheError, OSError):
    """Something is wrong with the cache directory."""


class DiskFullError(CacheError):
    """The disk of the cache directory is full (`expected`: bytes needed, `received`: bytes free)."""


class CacheUnavailableError(CacheError):
    """The cache directory cannot be created, read or written."""


class UnsafeCacheError(CacheError):
    """Something in the cache was not put there by ndcache."""


class OfflineError(NdcacheError):
    """Something is missing in the cache, and the network must not be used.

    Attributes
    ----------
    missing : tuple of str
        The missing files, by their paths in the manifest.
    """

    missing: tuple[str, ...] = ()


class TooManyOpenFilesError(NdcacheError, OSError):
    """This process, or the whole system, may open no more files. Sockets count, too."""


class DecodeError(NdcacheError, ValueError):
    """The bytes of a record cannot become an array."""


class UnsupportedDtypeError(DecodeError):
    """A tensor has an unknown dtype."""


class UnsupportedFormatError(DecodeError):
    """A record or shard has an unknown storage format, or the target of a conversion cannot hold a tensor."""


class DeviceError(NdcacheError):
    """The device failed."""


class NoAdapterError(DeviceError):
    """There is no GPU adapter, or not the requested one."""


class OutOfDeviceMemoryError(DeviceError):
    """The device has no memory left, or a tensor exceeds its limits."""


class CancelledError(NdcacheError):
    """The load was cancelled through its ``cancel`` event."""
