"""Translation of HTTP statuses, and of the exceptions of libraries, into the errors of `ndcache.errors`."""

from __future__ import annotations

import datetime
import email.utils
import http.client
import re
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn
from urllib.parse import urlsplit

import requests
import urllib3

from ..errors import (
    AuthError,
    ConnectError,
    NotFoundError,
    ProtocolError,
    RateLimitedError,
    ServerError,
    StallError,
    TransferError,
    TruncatedError,
)
from ..files.descriptors import check_shortages
from .configuration import certificate_error, credential_error, damaged_netrc
from .content_coding import encoding_of
from .proxies import proxy_auth_error, proxy_error, proxy_for
from .tls import has_tls_ended, tls_error

__all__ = [
    "FAILURES",
    "FailedRequest",
    "is_broken_connection",
    "is_tls_end",
    "raise_for_status",
    "raise_transfer_error",
    "retry_after",
]

#: The exceptions of requests, urllib3 and http.client for failures of the network or the server.
FAILURES = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
    ValueError,
)

#: The hint for a server that gets too many requests.
_LIMITED = "Try again later, or with fewer connections (max_workers)."
#: The longest wait, in seconds, that headers other than Retry-After can ask for.
_LONGEST_RESET = 300.0


def raise_for_status(status: int, headers: Mapping[str, str], url: str, *, may_be_encoded: bool = False) -> None:
    """Raise the error for a response's status, unless it is 200, 206, 304 or 416.

    A body with a Content-Encoding is an error, too, unless it `may_be_encoded`.
    """
    if status in (200, 206, 304, 416):
        encoding = encoding_of(headers.get("Content-Encoding"))
        if encoding and status in (200, 206) and not may_be_encoded:
            raise ProtocolError(
                f"the server sent a body encoded as {encoding[:40]!r} although none was asked for",
                url=url,
                status=status,
            )
        return
    if status == 429 or (status == 503 and "Retry-After" in headers):
        error = RateLimitedError(
            f"the server asks to try again later (status {status})", url=url, status=status, hint=_LIMITED
        )
        error.retry_after = retry_after(status, headers)
        raise error
    if status in (401, 403):
        damaged = damaged_netrc()
        note = f" {damaged} cannot be read, and was not used." if damaged else ""
        raise AuthError(f"the server refuses access (status {status})", url=url, status=status, hint=_login(url) + note)
    if status == 407:
        raise proxy_auth_error(None, url)
    if status in (404, 410):
        raise NotFoundError(f"the server has no such file (status {status})", url=url, status=status)
    if status == 408 or status >= 500:
        hint = _LIMITED if status == 503 else "Try again later."
        raise ServerError(f"the server failed (status {status})", url=url, status=status, hint=hint)
    raise ProtocolError(f"the server answered with status {status}", url=url, status=status)


def retry_after(status: int, headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to wait with status 429 or 503, or None if it does not say."""
    if status not in (429, 503):
        return None
    seconds = _seconds(headers.get("Retry-After"))
    return _reset(headers) if seconds is None and status == 429 else seconds


def _reset(headers: Mapping[str, str]) -> float | None:
    """Return the seconds until the server accepts requests again, if it gives them in a usual form.

    The forms are ``RateLimit: "name";r=0;t=30`` (Hugging Face), and a header with seconds, from now or since 1970.
    """
    match = re.search(r";\s*t=([0-9]{1,9})\b", headers.get("RateLimit", "")[:1000])
    text = match[1] if match else headers.get("RateLimit-Reset", headers.get("X-RateLimit-Reset", "")).strip()
    if not re.fullmatch(r"[0-9]{1,10}", text):
        return None
    seconds = float(text) if int(text) < 10**9 else float(text) - time.time()
    # These headers mean different things on different servers; only Retry-After is a reason to give up.
    return seconds if 0 < seconds <= _LONGEST_RESET else None


def _login(url: str) -> str:
    if f".{urlsplit(url).hostname}".endswith(".huggingface.co") or "/resolve/" in url:
        return "For a gated or private repository, accept its terms on its page, and set HF_TOKEN or run hf auth login."
    return "Check the URL, or give credentials: token=, https://user:password@host/, netrc, or a session of your own."


def _seconds(value: str | None) -> float | None:
    """Return Retry-After as seconds from now, or None if it cannot be read."""
    if value is None:
        return None
    if re.fullmatch(r"[0-9]{1,400}", value.strip()):
        return min(float(value), 1e10)
    try:
        date = email.utils.parsedate_to_datetime(value)
        if date.tzinfo is None:  # the form of asctime(), which is also UTC (RFC 9110, 5.6.7)
            date = date.replace(tzinfo=datetime.timezone.utc)
        return max(date.timestamp() - time.time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return None


@dataclass(frozen=True)
class FailedRequest:
    """Describe a request that failed.

    Attributes
    ----------
    url : str
    phase : str
        How far it got: "connect", "headers" or "body".
    session : requests.Session or None
        The session that sent it.
    token : str or None
        The token of Hugging Face that was sent.
    is_first : bool
        Whether the server that was asked first, before any redirect, has never answered.
    """

    url: str
    phase: Literal["connect", "headers", "body"] = "connect"
    session: requests.Session | None = None
    token: str | None = None
    is_first: bool = False


def raise_transfer_error(error: Exception, request: FailedRequest) -> NoReturn:
    """Raise the error of `ndcache.errors` for the exception of a library."""
    chain = list(_causes(error))
    check_shortages(chain)
    for item in chain:
        # Raised by a hook of the caller's session that calls raise_for_status().
        if isinstance(item, requests.HTTPError) and item.response is not None:
            raise_for_status(item.response.status_code, item.response.headers, request.url)
    # Messages of libraries may hold the whole URL, or a header with a token; those of the system's errors do not.
    cause = next((e for e in reversed(chain) if _shows_no_secrets(e)), None)
    found = _settings_error(chain, request) or _transfer_error(chain, request.url, request.phase)
    if request.is_first and _is_nobody_there(chain) and found.retryable:
        found.max_retries = 1  # a mistake in the address is more likely than a server that restarts
    try:
        raise found from cause
    finally:
        found.__context__ = None  # `from` only hides it from tracebacks, and it may hold secrets


def _settings_error(chain: list[BaseException], request: FailedRequest) -> TransferError | None:
    """Return the error for a mistake in the user's settings, or None if the request failed for another reason."""
    session, url = request.session, request.url
    if session is None or request.phase == "body":
        return None
    proxy = proxy_for(session, url)
    return (
        credential_error(session, url, request.token, None if proxy is None else proxy.address, chain)
        or certificate_error(session, url, chain)
        or proxy_error(proxy, chain, url, is_first=request.is_first)
    )


def _is_nobody_there(chain: list[BaseException]) -> bool:
    """Return whether the host is unknown (not only the name server unreachable), or nothing listens at the port."""
    return any(
        isinstance(error, ConnectionRefusedError)
        or (isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN)
        for error in chain
    )


def _shows_no_secrets(error: BaseException) -> bool:
    # Some errors quote what the server sent.
    return (type(error) is OSError or isinstance(error, _SYSTEM_ERRORS)) and str(error).isprintable()


_SYSTEM_ERRORS = (
    ConnectionError,
    TimeoutError,
    socket.gaierror,
    ssl.SSLError,
    http.client.BadStatusLine,
    http.client.IncompleteRead,
    http.client.LineTooLong,
)


def is_broken_connection(error: BaseException) -> bool:
    """Return whether the connection ended before a response came."""
    kinds = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)
    chain = list(_causes(error))
    return any(isinstance(item, kinds) for item in chain) or has_tls_ended(chain)


def is_tls_end(error: BaseException) -> bool:
    """Return whether a TLS connection ended, perhaps without the notice that nothing was cut off."""
    return has_tls_ended(_causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes, wherever requests and urllib3 have put them."""
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        below = (getattr(current, "reason", None), *current.args, current.__cause__, current.__context__)
        waiting += [item for item in below if isinstance(item, BaseException)]


def _transfer_error(chain: list[BaseException], url: str, phase: str) -> TransferError:
    def has(*kinds: type[BaseException]) -> BaseException | None:
        return next((e for e in chain if isinstance(e, kinds)), None)

    host = urlsplit(url).hostname or "the host"
    if (error := tls_error(chain, host, url, is_connected=phase != "connect")) is not None:
        return error
    if has(requests.exceptions.RetryError, urllib3.exceptions.ResponseError):
        return ServerError("the server failed, again and again", url=url, hint="Try again later.")
    if has(socket.gaierror, urllib3.exceptions.NameResolutionError):
        return ConnectError(f"the host {host} is not known", url=url, hint="Check its spelling and the network.")
    if has(urllib3.exceptions.LocationParseError, requests.exceptions.InvalidURL):
        impossible = ConnectError(f"the host {host} is not known", url=url, hint="Check its spelling.")
        impossible.retryable = False
        return impossible
    if has(ConnectionRefusedError):
        return ConnectError(f"{host} refuses connections", url=url, hint="Is the server running?")
    if has(urllib3.exceptions.NewConnectionError) and not has(TimeoutError):
        return ConnectError(f"{host} cannot be reached: {_reason(chain[-1])}", url=url, hint="Check the network.")
    if has(requests.exceptions.ConnectTimeout, urllib3.exceptions.ConnectTimeoutError):
        return ConnectError(f"{host} did not answer in time", url=url, hint="Check the network.")
    if has(urllib3.exceptions.ReadTimeoutError, requests.exceptions.ReadTimeout, TimeoutError):
        return StallError("the server stopped sending", url=url, hint="Try again later.")
    if has(http.client.IncompleteRead, urllib3.exceptions.IncompleteRead):
        return TruncatedError("the body ended early", url=url)
    if phase == "body" and has_tls_ended(chain):
        return TruncatedError("the body ended early", url=url)
    if has(http.client.RemoteDisconnected, ConnectionError, ssl.SSLError):
        return ConnectError(f"the connection to {host} broke", url=url, hint="Try again.")
    if has(http.client.HTTPException, urllib3.exceptions.HTTPError, ValueError):
        return ProtocolError(f"the response is not valid HTTP: {_reason(chain[-1])}", url=url)
    return ConnectError(f"{host} cannot be reached: {_reason(chain[-1])}", url=url)


def _reason(error: BaseException) -> str:
    """Return the reason of an error in words that hold neither URLs nor headers."""
    if not _shows_no_secrets(error):
        return type(error).__name__
    return str((isinstance(error, OSError) and error.strerror) or error)[:160] or type(error).__name__
