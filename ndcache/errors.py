"""The exceptions of ndcache.

::

    NdcacheError
    ├ ManifestError            the JSON that describes the model
    │ ├ ManifestSyntaxError      not the JSON it should be
    │ ├ ManifestLayoutError      sizes, offsets and shapes that contradict each other
    │ ├ ManifestLimitError       larger than any real model
    │ └ UnsafePathError          a shard path that leaves the model directory
    ├ TransferError (OSError)  getting bytes from a server
    │ ├ ConnectError             refused, reset, unreachable, unknown host
    │ ├ StallError               connected, but nothing (or next to nothing) arrives
    │ ├ TruncatedError           the body ended early
    │ ├ ServerError              5xx, 408
    │ ├ RateLimitedError         429, or 503 with Retry-After
    │ ├ ProtocolError            not HTTP as agreed on
    │ ├ RangeError               another byte range than the one asked for
    │ ├ RemoteChangedError       the file changed while it was being read
    │ ├ AuthError                401, 403, 407
    │ ├ NotFoundError            404, 410
    │ ├ TLSError                 certificate or handshake
    │ └ RedirectError            a redirect that must not be followed
    ├ IntegrityError           the bytes are not those of the manifest
    │ ├ SizeMismatchError
    │ └ ChecksumError
    ├ CacheError (OSError)     the cache directory
    │ ├ DiskFullError
    │ ├ CacheUnavailableError    cannot be read or written
    │ └ UnsafeCacheError         it is not safe to touch
    ├ OfflineError             ``offline=True``, and something is missing
    ├ TooManyOpenFilesError (OSError)  the process has no file descriptor left
    ├ DecodeError (ValueError) bytes to arrays
    │ ├ UnsupportedDtypeError
    │ └ UnsupportedFormatError
    ├ DeviceError              the GPU
    │ ├ NoAdapterError
    │ └ OutOfDeviceMemoryError
    └ CancelledError           ``cancel`` was set
"""

from __future__ import annotations

import copyreg
from typing import Any

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
    """The root of every error that ndcache raises on purpose.

    Parameters
    ----------
    message : str
        What happened, in a few words; the fields below are added when printed.
    url : str, optional
        The address concerned. User, password, query and fragment are removed.
    shard : str, optional
        The shard's path in the manifest (or the name of the manifest file).
    status : int, optional
        The HTTP status of the last answer.
    expected, received : int or str, optional
        What the manifest promises and what came: bytes, or hex digests.
    attempts : int, optional
        How often it was tried.
    hint : str, optional
        What is left on disk and what to try.

    Attributes
    ----------
    retryable : bool
        Whether the same call may succeed later without anything being changed.
    others : tuple of NdcacheError
        Errors of other shards of the same load.
    """

    #: Whether the same call may succeed later without anything being changed; of this error, if it is set on it.
    retryable: bool = False
    #: Of the retryable ones: how often ndcache itself tries again, if not as often as the `RetryPolicy` says.
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

    def __str__(self) -> str:
        text = self.message
        if self.shard is not None and self.shard not in text:
            text += f": {self.shard}"
        if self.url is not None and self.url not in text:
            text += f" ({self.url})"
        if self.attempts is not None and self.attempts > 1:
            text += f", after {self.attempts} tries"
        if self.others:
            text += f"; {len(self.others)} more failed"
        return printable(f"{text}. {self.hint}" if self.hint else text)

    def __reduce__(self) -> tuple[Any, ...]:
        # Not BaseException's way, which would call __init__ with the message alone.
        state = dict(self.__dict__)
        if isinstance(self, OSError) and self.errno is not None:
            state["errno"] = self.errno  # which is not in __dict__
        return copyreg.__newobj__, (type(self), self.message), state  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any] | None) -> None:
        for name, value in (state or {}).items():
            setattr(self, name, value)
        self.args = (self.message,)


class ManifestError(NdcacheError):
    """The manifest cannot be used."""


class ManifestSyntaxError(ManifestError):
    """The manifest is not the JSON it should be."""


class ManifestLayoutError(ManifestError):
    """Sizes, offsets and shapes of the manifest contradict each other."""


class ManifestLimitError(ManifestError):
    """The manifest is larger than any real model's."""


class UnsafePathError(ManifestError):
    """A shard's path would leave the model directory, or could not be a file everywhere."""


class TransferError(NdcacheError, OSError):
    """Bytes could not be had from a server."""


class ConnectError(TransferError):
    """The server could not be reached, or the connection broke."""

    retryable = True


class StallError(TransferError):
    """The server is connected, but nothing, or next to nothing, arrives."""

    retryable = True


class TruncatedError(TransferError):
    """The body ended before all its bytes had come."""

    retryable = True


class ServerError(TransferError):
    """The server failed: status 408 or 5xx."""

    retryable = True


class RateLimitedError(TransferError):
    """The server asks to come back later, and gives nothing else meanwhile: status 429, or 503 with Retry-After.

    Attributes
    ----------
    retry_after : float or None
        Seconds to wait, as the server said.
    """

    retryable = True
    retry_after: float | None = None


class ProtocolError(TransferError):
    """The answer is not HTTP as agreed on."""

    retryable = True
    max_retries = 1


class RangeError(TransferError):
    """The server sent another byte range than the one asked for."""

    retryable = True
    max_retries = 1


class RemoteChangedError(TransferError):
    """The file changed on the server while it was being read, and again when it was begun anew."""

    retryable = True
    max_retries = 0


class AuthError(TransferError):
    """The server or proxy wants (other) credentials (status 401, 403 or 407), or they cannot be sent."""


class NotFoundError(TransferError):
    """There is no such file: status 404 or 410, or a local path that does not exist."""


class TLSError(TransferError):
    """The secure connection could not be set up."""


class RedirectError(TransferError):
    """The server redirects in a circle, or to where it must not be followed."""


class IntegrityError(NdcacheError):
    """The bytes are not those that the manifest promises."""

    retryable = True
    max_retries = 1


class SizeMismatchError(IntegrityError):
    """A shard has another size than the manifest says."""


class ChecksumError(IntegrityError):
    """A shard has another digest than the manifest says."""


class CacheError(NdcacheError, OSError):
    """Something is wrong with the cache directory."""


class DiskFullError(CacheError):
    """The disk of the cache directory has no room (`expected`: bytes needed, `received`: free)."""


class CacheUnavailableError(CacheError):
    """The cache directory cannot be made, read or written."""


class UnsafeCacheError(CacheError):
    """What lies at a path of the cache is not what ndcache put there."""


class OfflineError(NdcacheError):
    """Something is missing in the cache and the network must not be used.

    Attributes
    ----------
    missing : tuple of str
        The files that are missing, by their paths in the manifest.
    """

    missing: tuple[str, ...] = ()


class TooManyOpenFilesError(NdcacheError, OSError):
    """This process, or the whole system, may open no more files: sockets count, too."""


class DecodeError(NdcacheError, ValueError):
    """A record's bytes cannot be turned into an array."""


class UnsupportedDtypeError(DecodeError):
    """A record's dtype is unknown."""


class UnsupportedFormatError(DecodeError):
    """A record's or shard's storage format is unknown."""


class DeviceError(NdcacheError):
    """The device failed."""


class NoAdapterError(DeviceError):
    """There is no GPU adapter, or not the one asked for."""


class OutOfDeviceMemoryError(DeviceError):
    """The device has no room, or a tensor is over its limits."""


class CancelledError(NdcacheError):
    """The load was cancelled through its ``cancel`` event."""
