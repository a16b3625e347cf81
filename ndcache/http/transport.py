"""HTTP as ndcache needs it: one GET at a time, bodies as they are, every failure an error of `ndcache.errors`.

requests does the work. This adds the rules that a loader of other people's files must keep: no credentials to another
origin, no redirect from https to http, no decoding of bodies, timeouts everywhere, no retries (`http.retry` has them),
and a way to wake a thread that waits for a socket.
"""

from __future__ import annotations

import codecs
import contextlib
import netrc  # noqa: F401 - else imported within the first request: a fork at that moment would hang at the import's lock
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import requests

from ..errors import RedirectError, TransferError, redact
from ..location.hub import Login, commit_of
from ..urls.url import Origin, Url, parse
from ..workers.cancellation import Cancellation
from ..workers.stall import StallWatch
from .connect import Routes
from .limits.origin import Permit
from .limits.token_bucket import TokenBucket
from .proxies import proxy_auth_error, proxy_for
from .response import Response, check_not_woken
from .sessions import Auth, BearerAuth, Sessions, cookie_header, no_auth
from .sockets import WrongOriginError, waker, watching
from .translate import (
    FAILURES,
    FailedRequest,
    is_broken_connection,
    raise_for_status,
    raise_transfer_error,
    retry_after,
)

__all__ = ["RedirectTarget", "Transport"]

# Imported now, as netrc is. Also, Python 3.13.0 cannot look it up in a working directory that was removed.
codecs.lookup("idna")

_MAX_REDIRECTS = 10
_REDIRECTS = (301, 302, 303, 307, 308)
#: The statuses with which the target of a redirect may answer once it has expired.
_EXPIRED = (401, 403, 404, 410)

#: The most bytes of a response's body that are read because it may say why the request was refused.
_MAX_REASON = 4 << 10

#: Makes the error for a response from that for its status, its headers, and the beginning of its body.
Refused: TypeAlias = Callable[[TransferError, Mapping[str, str], bytes], TransferError]

#: The origins that have ever answered this process.
_answered: set[Origin] = set()


@dataclass(frozen=True)
class RedirectTarget:
    """Remember where the redirects of a URL have led.

    Attributes
    ----------
    url : str
    same_origin : bool
        Whether they have never led away from the origin that was asked first.
    linked_sha256 : str or None
        See `Response`.
    """

    url: str
    same_origin: bool = True
    linked_sha256: str | None = None


class _Get(NamedTuple):
    """The arguments of one `Transport.get`, which hold for every request that it makes.

    `is_source` says whether `url` has the origin that the caller's session is for. `auth` is for the origin of `url`.
    """

    url: Url
    headers: Mapping[str, str]
    cancellation: Cancellation
    acquire: Callable[[str], Permit] | None
    may_be_encoded: bool
    is_source: bool
    auth: Auth | None
    before_wait: Callable[[], None]
    refused: Refused | None
    bucket: TokenBucket | None


class Transport:
    """Make GET requests. Safe to share between threads, and after a fork.

    Parameters
    ----------
    session : requests.Session, optional
        The caller's; its headers, cookies and auth go to the origin of the requested URL and to no other.
    timeout : tuple of float
        Seconds to connect, and to wait for the next bytes.
    max_connections : int
        Connections kept for reuse.
    login : Login, optional
        Has a token for one origin (Hugging Face).
    token : str, optional
        A token for the origin of the requested URL and no other; it takes precedence over other credentials.
    headers : mapping, optional
        More headers, for that origin and no other.
    """

    def __init__(
        self,
        *,
        session: requests.Session | None = None,
        timeout: tuple[float, float] = (10.0, 30.0),
        max_connections: int = 8,
        login: Login | None = None,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._sessions = Sessions(session, max_connections, login, token, headers)
        self._timeout = timeout
        self._routes = Routes()

    def get(
        self,
        url: str,
        headers: Mapping[str, str],
        cancellation: Cancellation,
        *,
        source_url: str | None = None,
        redirects: dict[str, RedirectTarget] | None = None,
        acquire: Callable[[str], Permit] | None = None,
        may_be_encoded: bool = False,
        start: str | None = None,
        before_wait: Callable[[], None] = lambda: None,
        refused: Refused | None = None,
        bucket: TokenBucket | None = None,
    ) -> Response:
        """Send a GET and return the response, its body not yet read.

        Redirects are followed. A status other than 200, 206, 304 and 416 is raised as an error.

        Parameters
        ----------
        url : str
            May hold a user and password.
        headers : mapping
            Sent with every request, also after redirects.
        cancellation : Cancellation
            Wakes the calling thread, here and in `Response.read_some`.
        source_url : str, optional
            A URL of the origin that the caller's session is for, if that is not `url` itself (a mirror).
        redirects : dict of str to RedirectTarget, optional
            Keeps where the redirects of each URL have led, so that they are followed only once, or after a failure.
        acquire : callable, optional
            Wait until a request to a URL may be made; called for `url` and for every target of a redirect.
        may_be_encoded : bool
            Whether the body may have a Content-Encoding. It is not decoded here.
        start : str, optional
            Another URL to ask instead of `url`. Unless it has the same origin, it gets no credentials.
        before_wait : callable, optional
            Called, perhaps more than once, before this thread waits for a server.
        refused : callable, optional
            Make the error for a status from 300 to 499 of the usual one, the headers and the beginning of the body.
        bucket : TokenBucket, optional
            Limits the rate at which bodies are read.

        Raises
        ------
        ValueError
            The URL cannot be read, or can be read in more than one way.
        TransferError
            One of its subclasses.
        CancelledError
            `cancellation` was set.
        """
        cancellation.check()
        asked = parse(url)
        is_source = source_url is None or parse(source_url).origin == asked.origin
        auth = self._sessions.auth(asked, is_source=is_source)
        get = _Get(asked, headers, cancellation, acquire, may_be_encoded, is_source, auth, before_wait, refused, bucket)
        redirects = {} if redirects is None else redirects
        known = redirects.get(url)
        while True:
            try:
                response, target = self._follow(get, known or RedirectTarget(start or url))
                break
            except TransferError as error:
                if known is None:
                    raise
                redirects.pop(url, None)
                if error.status not in _EXPIRED:
                    raise
                known = None
        if target.url != str(asked):
            redirects[url] = target
        return response

    def _follow(self, get: _Get, target: RedirectTarget) -> tuple[Response, RedirectTarget]:
        """Send the request to where redirects have led before, and follow further ones from there."""
        url, same_origin, linked_sha256 = parse(target.url), target.same_origin, target.linked_sha256
        before, commit = get.url, None
        visits: set[tuple[str, str | None]] = set()
        while True:
            # Once elsewhere, always elsewhere: a redirect that leads back gets no secrets.
            same_origin = same_origin and url.origin == get.url.origin
            with_secrets = get.is_source and same_origin
            session = self._sessions.get(with_secrets=with_secrets)
            visit = (str(url), cookie_header(session, url))  # the same URL with another cookie is no circle
            if visit in visits or len(visits) > _MAX_REDIRECTS:
                raise RedirectError("the server redirects in a circle, or too often", url=str(before))
            visits.add(visit)
            permit = None if get.acquire is None else get.acquire(str(url))
            with _released_on_failure(permit):
                headers = {**self._sessions.headers, **get.headers} if with_secrets else get.headers
                response = self._send(get, url, session, headers, get.auth if same_origin else no_auth)
            if permit is not None:
                permit.answered(response.status, retry_after(response.status, response.headers))
                response.permit = permit
            if same_origin:
                commit = commit or commit_of(response.headers)
            if response.status not in _REDIRECTS or not response.location:
                break
            with response:
                if same_origin:
                    linked_sha256 = _linked_sha256(response.headers)
                before, url = url, _target(url, response.location)
        try:
            raise_for_status(response.status, response.headers, response.url, may_be_encoded=get.may_be_encoded)
        except BaseException as error:
            try:
                if get.refused is not None and isinstance(error, TransferError) and 300 <= response.status < 500:
                    raise get.refused(error, response.headers, _reason(response)) from None
                raise
            finally:
                # A file that is not there is no reason for a new connection: companion files are asked for like that.
                response.__exit__(None if response.status in (404, 410) else Exception)
        response.linked_sha256 = (same_origin and _linked_sha256(response.headers)) or linked_sha256
        response.commit = commit
        return response, RedirectTarget(str(url), same_origin, linked_sha256)

    def refresh_settings(self) -> None:
        """Read the environment and netrc anew for the requests from now on; a load calls this at its beginning."""
        self._sessions.refresh_settings()

    def close(self) -> None:
        """Close idle connections."""
        self._sessions.close()

    def _send(
        self, get: _Get, url: Url, session: requests.Session, headers: Mapping[str, str], auth: Auth | None
    ) -> Response:
        """Send one request and return its response, whatever its status.

        If the server has just closed an idle connection, send the request once more: that is not a failure of the
        server (RFC 9112, 9.3.1).
        """
        is_first = get.url.origin not in _answered
        if self._sessions.is_given(session):
            get.before_wait()  # its connections may be of any kind
        self._sessions.check_settings(session, url)
        for is_last in (False, True):
            watch, hooks = StallWatch(self._timeout[1], before_wait=get.before_wait), _Hooks()
            get.cancellation.add(watch)
            try:
                with watching(watch, url.origin, self._routes):
                    raw = session.get(
                        str(url),  # without a user, which requests and netrc would each read in their own way
                        headers={"Accept-Encoding": "identity", **headers},
                        auth=auth,
                        timeout=self._timeout,
                        stream=True,
                        allow_redirects=False,
                        hooks=hooks.around(session.hooks.get("response")),
                    )
                break
            except BaseException as error:
                get.cancellation.remove(watch)
                hooks.close()
                if isinstance(error, WrongOriginError):
                    raise RedirectError(f"the request would go elsewhere: {error}", url=str(url)) from None
                if not isinstance(error, FAILURES):
                    raise
                check_not_woken(get.cancellation, watch, str(url))
                if is_last or not watch.is_reused or not is_broken_connection(error):
                    phase: Literal["connect", "headers"] = "headers" if watch.is_connected else "connect"
                    token = auth.token if isinstance(auth, BearerAuth) else None
                    raise_transfer_error(error, FailedRequest(url.with_user, phase, session, token, is_first))
        hooks.response = None  # else the two would refer to each other
        if watch.is_woken:  # the part that had arrived looked like a complete response
            raw.close()
            get.cancellation.remove(watch)
            check_not_woken(get.cancellation, watch, str(url))
        if not watch.wakers:  # the connection belongs to a caller's session or a SOCKS proxy
            watch.add_waker(waker(raw))
        watch.is_waiting = False
        _answered.add(url.origin)
        if raw.status_code == 407:
            raw.close()
            get.cancellation.remove(watch)
            raise proxy_auth_error(proxy_for(session, str(url)), str(url))
        return Response(raw, get.cancellation, watch, hooks.location, get.bucket)


class _Hooks:
    """Hooks that requests calls with the response to one request, around those of the session."""

    location: str | None = None
    response: requests.Response | None = None

    def around(self, given: Any) -> dict[str, list[Any]]:
        """Return the hooks for requests, those of the session included, as it would ignore those itself."""
        hooks = [given] if callable(given) else given or []
        return {"response": [self._keep, *hooks, self._hold_redirect]}

    def close(self) -> None:
        """Close the response of a request that failed because a hook of the session raised."""
        if self.response is not None:
            self.response.close()

    def _keep(self, response: requests.Response, **_: Any) -> None:
        self.response = response

    def _hold_redirect(self, response: requests.Response, **_: Any) -> None:
        # Even if it must not follow redirects, requests reads the whole body of a response that has a Location.
        self.location = response.headers.pop("Location", None)


@contextlib.contextmanager
def _released_on_failure(permit: Permit | None) -> Iterator[None]:
    """Release the permit of a request that fails; otherwise its response does so."""
    try:
        yield
    except BaseException as error:
        if permit is not None:
            if isinstance(error, TransferError) and error.status is not None:  # raised by a hook of the session
                permit.answered(error.status, getattr(error, "retry_after", None))
            permit.release()
        raise


def _reason(response: Response) -> bytes:
    """Return the beginning of a response's body, as far as it can be read."""
    with contextlib.suppress(TransferError):
        return response.read(_MAX_REASON)
    return b""


def _linked_sha256(headers: Mapping[str, str]) -> str | None:
    """Return the SHA-256 that Hugging Face gives with redirects to its storage of large files."""
    match = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-Etag", "").strip())
    return match[1] if match else None


def _target(url: Url, location: str) -> Url:
    """Return where a redirect from `url` leads.

    Raises
    ------
    RedirectError
        It must not be followed.
    """
    with contextlib.suppress(UnicodeError):
        location = location.encode("latin-1").decode("utf-8")  # as browsers read the header
    scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*):", location)
    if scheme is not None and scheme[1].lower() not in ("http", "https"):
        raise RedirectError(f"the server redirects to {scheme[1][:20]}:", url=str(url))
    try:
        target = url.join(location)
    except ValueError as error:
        raise RedirectError(f"the server redirects to an address that cannot be used: {error}", url=str(url)) from None
    if target.scheme == "http" and url.scheme == "https":
        raise RedirectError(f"the server redirects from https to {redact(str(target))}", url=str(url))
    return target
