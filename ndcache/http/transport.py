"""HTTP as ndcache needs it: one GET at a time, bodies as they are, every failure an error of `ndcache.errors`.

requests does the work. On top of it come the rules that a loader of other people's files must keep: no
credentials to another origin, no way back from https, no decoding of bodies, timeouts everywhere, retries in
one place only (not here), and a way to wake a thread that waits for a socket.
"""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401 - see netrc
import http.cookiejar
import netrc  # noqa: F401 - else imported within the first request: a fork at that moment would hang at the import's lock
import os
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import requests

from .._version import __version__
from ..errors import NdcacheError, ProtocolError, RedirectError, StallError, TransferError, redact
from ..location.hub import Login, commit_of
from ..urls.url import Origin, Url, parse
from ..workers.cancellation import Cancellation
from ..workers.stall import StallWatch
from .configuration import check_certificates
from .connect import Routes
from .proxies import proxy_for, proxy_mistake, proxy_wants_password
from .rate_limits import Permit
from .sockets import WatchedAdapter, WrongOriginError, waker, watch_adapter, watching
from .translate import (
    FAILURES,
    Attempt,
    is_broken_connection,
    is_tls_end,
    raise_for_status,
    raise_transfer_error,
    retry_after,
)

__all__ = ["RedirectTarget", "Response", "Transport"]

_MAX_REDIRECTS = 10
_DRAIN_BYTES = 1 << 14
#: What an address that a server gave for a while answers with when it has expired.
_EXPIRED = (401, 403, 404, 410)
_AUTH = "Authorization"
_USER_AGENT = f"ndcache/{__version__}"


#: The process that last used a session of the caller's here; of others it is taken to be the one that came first.
_last_user: weakref.WeakKeyDictionary[requests.Session, int] = weakref.WeakKeyDictionary()
_FIRST_PID = os.getpid()
#: The origins from which an answer has ever come to this process.
_answered: set[Origin] = set()


@dataclass(frozen=True)
class RedirectTarget:
    """Where redirects have led to.

    Attributes
    ----------
    url : str
    is_home : bool
        Whether they have never led away from the origin that was asked first.
    linked_sha256 : str or None
        See `Response`.
    """

    url: str
    same_origin: bool = True
    linked_sha256: str | None = None


class Response:
    """The answer to one GET, its body not yet read. Use it in a ``with`` block.

    Attributes
    ----------
    status : int
    headers : mapping
        Case-insensitive.
    url : str
        Where it came from in the end, after redirects.
    location : str or None
        Where it redirects to.
    linked_sha256 : str or None
        The file's digest, as the server that was asked says of a file that lies elsewhere (Hugging Face).
    commit : str or None
        The commit that this is of, as the server that was asked says (Hugging Face).
    permit : Permit or None
        Given back when the body is read or given up.
    is_cut : bool
        Whether a body without framing ended with its TLS connection and not with the notice that this was the end:
        only what it says itself tells whether it is whole (RFC 9112, 9.8).
    """

    linked_sha256: str | None = None
    commit: str | None = None
    permit: Permit | None = None
    is_cut: bool = False

    def __init__(
        self, raw: requests.Response, cancellation: Cancellation, watch: StallWatch, location: str | None = None
    ) -> None:
        self.status: int = raw.status_code
        self.headers: Mapping[str, str] = raw.headers
        self.url: str = raw.url
        self.location = location
        self._raw = raw
        self._cancellation = cancellation
        self._watch = watch

    @property
    def content_length(self) -> int | None:
        """The body's length as announced; None if it is not."""
        text = self.headers.get("Content-Length")
        if text is None or "Transfer-Encoding" in self.headers:
            return None
        if not re.fullmatch(r"[0-9]{1,19}", text):
            raise ProtocolError(f"the server sent the Content-Length {text[:40]!r}", url=self.url, status=self.status)
        return int(text)

    @property
    def etag(self) -> str | None:
        """The strong ETag: what is byte for byte the same has the same one. None if there is none (RFC 9110, 8.8.3)."""
        text = self.headers.get("ETag", "").strip()
        return text if re.fullmatch(r'"[\x21\x23-\x7e]{1,256}"', text) else None

    def is_range(self, start: int, end: int, size: int) -> bool:
        """Whether the body is what a file of `size` bytes has from byte `start` up to byte `end`."""
        text = self.headers.get("Content-Range", "").strip()
        if len(text) > 80 or not (match := re.fullmatch(r"(?i:bytes) ([0-9]+)-([0-9]+)/([0-9]+)", text)):
            return False
        return tuple(map(int, match.groups())) == (start, end - 1, size) and self.content_length in (None, end - start)

    def read_some(self, limit: int) -> bytes:
        """What has come of the body, 1 to `limit` bytes; waits for it if need be, and is empty at the end.

        Raises
        ------
        TransferError
            The body broke off, as the HTTP framing shows it. A body without framing just ends: count its bytes, or
            see `is_cut`.
        """
        self._watch.is_waiting = True
        try:
            data: bytes = self._raw.raw.read1(limit, decode_content=False)
        except FAILURES as error:
            _check(self._cancellation, self._watch, self.url)
            if self.content_length is not None or "Transfer-Encoding" in self.headers or not is_tls_end(error):
                raise_transfer_error(error, Attempt(self.url, "body"))
            self.is_cut, data = True, b""
        finally:
            self._watch.is_waiting = False
        if not data:
            _check(self._cancellation, self._watch, self.url)  # a socket that was shut looks like the end of the body
        self._watch.received(len(data))
        return data

    def read(self, limit: int) -> bytes:
        """The whole body, which must not be over `limit` bytes; one byte more is read to find out."""
        body = bytearray()
        while len(body) <= limit and (data := self.read_some(min(limit + 1 - len(body), 1 << 16))):
            body += data
        return bytes(body)

    def __enter__(self) -> Response:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            length = 0 if self.status == 304 else self.content_length
            if kind is None and length is not None and length <= _DRAIN_BYTES:
                # A connection is given back for reuse when its body has been read to the end.
                self.read(_DRAIN_BYTES)
        except NdcacheError:
            pass
        finally:
            self._raw.close()
            self._cancellation.remove(self._watch)
            if self.permit is not None:
                self.permit.done()


class Transport:
    """Sessions, and the one way to make a request. Safe to share between threads, and after a fork.

    Parameters
    ----------
    session : requests.Session, optional
        The caller's; its headers, cookies and auth go to the origin that was asked for and no other.
    timeout : tuple of float
        Seconds to connect, and to wait for the next bytes.
    max_connections : int
        Connections kept for reuse.
    login : Login, optional
        Has a token for one origin (Hugging Face).
    """

    def __init__(
        self,
        *,
        session: requests.Session | None = None,
        timeout: tuple[float, float] = (10.0, 30.0),
        max_connections: int = 8,
        login: Login | None = None,
    ) -> None:
        self._given = session
        self._timeout = timeout
        self._max_connections = max_connections
        self._login = login
        self._made: dict[int, tuple[requests.Session, requests.Session]] = {}
        self._routes = Routes()
        self._settings_checked: set[tuple[int, int, Origin]] = set()

    def get(
        self,
        url: str,
        headers: Mapping[str, str],
        cancellation: Cancellation,
        *,
        source_url: str | None = None,
        hops: dict[str, RedirectTarget] | None = None,
        enter: Callable[[str], Permit] | None = None,
        may_be_encoded: bool = False,
        start: str | None = None,
    ) -> Response:
        """Ask for `url`; the answer is 200, 206, 304 or 416, anything else is raised.

        Parameters
        ----------
        url : str
            May hold a user and password.
        headers : mapping
            Sent to every hop.
        cancellation : Cancellation
            Wakes the calling thread, here and in `Response.read_some`.
        source_url : str, optional
            A URL of the origin that the caller's session is for, if that is not `url` itself (a mirror).
        hops : dict of str to Hop, optional
            Where redirects of a URL led to last, so that they are followed once, and again after a failure. Kept here.
        enter : callable, optional
            Wait until a request to a URL may be made; called for `url` and for wherever it redirects to.
        may_be_encoded : bool
            Whether the body may come with a Content-Encoding. It is not decoded here.
        start : str, optional
            What to ask for in place of `url`: another URL of the same origin.

        Raises
        ------
        ValueError
            A URL that cannot be read, or not by everybody in the same way.
        TransferError
            As one of its subclasses.
        CancelledError
            `cancellation` was set.
        """
        cancellation.check()
        hops = {} if hops is None else hops
        if (known := hops.get(url)) is not None:
            try:
                return self._follow(url, known, headers, cancellation, source_url, hops, enter, may_be_encoded)
            except TransferError as error:
                hops.pop(url, None)
                if error.status not in _EXPIRED:
                    raise
        return self._follow(
            url, RedirectTarget(start or url), headers, cancellation, source_url, hops, enter, may_be_encoded
        )

    def _follow(
        self,
        first: str,
        hop: RedirectTarget,
        headers: Mapping[str, str],
        cancellation: Cancellation,
        source_url: str | None,
        hops: dict[str, RedirectTarget],
        enter: Callable[[str], Permit] | None,
        may_be_encoded: bool,
    ) -> Response:
        """Ask where redirects of `first` have led to, and go on from there."""
        url, same_origin, linked_sha256, commit = parse(hop.url), hop.same_origin, hop.linked_sha256, None
        asked = before = parse(first)
        is_owners = source_url is None or parse(source_url).origin == asked.origin
        auth = self._auth(asked, self._given if is_owners else None) or (None if is_owners else _no_auth)
        visits: set[tuple[str, str | None]] = set()
        while True:
            same_origin = (
                same_origin and url.origin == asked.origin
            )  # who has been elsewhere does not come back as himself
            session = self._sessions()[0 if is_owners and same_origin else 1]
            visit = (str(url), _cookies(session, url))  # to come back with another cookie is no circle
            if visit in visits or len(visits) > _MAX_REDIRECTS:
                raise RedirectError("the server redirects in a circle, or too often", url=str(before))
            visits.add(visit)
            permit = None if enter is None else enter(str(url))
            is_first = asked.origin not in _answered
            response = self._send_with(
                permit, url, headers, cancellation, session, auth if same_origin else _no_auth, is_first=is_first
            )
            if same_origin:
                commit = commit or commit_of(response.headers)
            if response.status in (301, 302, 303, 307, 308) and response.location:
                with response:
                    if same_origin:
                        linked_sha256 = _linked_sha256(response.headers)
                    before, url = url, _target(url, response.location)
                continue
            try:
                raise_for_status(response.status, response.headers, response.url, may_be_encoded=may_be_encoded)
            except BaseException:
                response.__exit__(Exception)
                raise
            response.linked_sha256 = (same_origin and _linked_sha256(response.headers)) or linked_sha256
            response.commit = commit
            if str(url) != str(asked):
                hops[first] = RedirectTarget(str(url), same_origin, linked_sha256)
            return response

    def close(self) -> None:
        """Close the connections that were kept."""
        for own, bare in list(self._made.values()):
            for session in {own, bare} - {self._given}:
                session.close()
        self._made.clear()

    def _send_with(
        self,
        permit: Permit | None,
        url: Url,
        headers: Mapping[str, str],
        cancellation: Cancellation,
        session: requests.Session,
        auth: Callable[[Any], Any] | None,
        *,
        is_first: bool,
    ) -> Response:
        """Send a request, and give the permit for it over to its answer."""
        try:
            response = self._send(url, headers, cancellation, session, auth, is_first=is_first)
        except BaseException as error:
            if permit is not None:
                if isinstance(error, TransferError) and error.status is not None:  # a hook of the session's raised it
                    permit.answered(error.status, getattr(error, "retry_after", None))
                permit.done()
            raise
        if permit is not None:
            permit.answered(response.status, retry_after(response.status, response.headers))
            response.permit = permit
        return response

    def _send(
        self,
        url: Url,
        headers: Mapping[str, str],
        cancellation: Cancellation,
        session: requests.Session,
        auth: Callable[[Any], Any] | None,
        *,
        is_first: bool,
        is_second: bool = False,
    ) -> Response:
        held: list[str] = []
        answers: list[requests.Response] = []

        def keep(answer: requests.Response, **_: Any) -> None:
            answers.append(answer)

        def hold_redirect(answer: requests.Response, **_: Any) -> None:
            # Even when it must not follow, requests reads the whole body of an answer that has a Location.
            if target := answer.headers.pop("Location", None):
                held.append(target)

        self._check_settings(session, url)
        given = session.hooks.get("response") or []
        watch = StallWatch(timeout=self._timeout[1])
        cancellation.add(watch)
        try:
            with watching(watch, url.origin, self._routes):
                raw = session.get(
                    str(url),  # without a user, which requests and netrc would each read in their own way
                    headers={"Accept-Encoding": "identity", **headers},
                    auth=auth,
                    timeout=self._timeout,
                    stream=True,
                    allow_redirects=False,
                    hooks={"response": [keep, *([given] if callable(given) else given), hold_redirect]},
                )
        except FAILURES as error:
            _abandon(cancellation, watch, answers)
            _check(cancellation, watch, str(url))
            if watch.is_reused and not is_second and is_broken_connection(error):
                # The server had closed the kept connection just then, which is nobody's failure (RFC 9112, 9.3.1).
                return self._send(url, headers, cancellation, session, auth, is_first=is_first, is_second=True)
            phase: Literal["connect", "headers"] = "headers" if watch.is_connected else "connect"
            token = auth.token if isinstance(auth, _Bearer) else None
            raise_transfer_error(error, Attempt(url.with_user, phase, session, token, is_first))
        except WrongOriginError as error:
            _abandon(cancellation, watch, answers)
            raise RedirectError(f"the request would go elsewhere: {error}", url=str(url)) from None
        except BaseException:
            _abandon(cancellation, watch, answers)
            raise
        return self._accepted(raw, url, cancellation, watch, session, *held)

    def _accepted(
        self,
        raw: requests.Response,
        url: Url,
        cancellation: Cancellation,
        watch: StallWatch,
        session: requests.Session,
        location: str | None = None,
    ) -> Response:
        """Return the answer to a request, unless it is the proxy's, or only looks like one."""
        if watch.is_woken:  # and what there was of the answer looked like a whole one
            raw.close()
            cancellation.remove(watch)
            _check(cancellation, watch, str(url))
        if not watch.wakers:  # a connection that is not ours: a session of the caller's, a SOCKS proxy
            watch.add_waker(waker(raw))
        watch.is_waiting = False
        _answered.add(url.origin)
        if raw.status_code == 407:
            raw.close()
            cancellation.remove(watch)
            raise proxy_wants_password(proxy_for(session, str(url)), str(url))
        return Response(raw, cancellation, watch, location)

    def _check_settings(self, session: requests.Session, url: Url) -> None:
        """Look at the proxy and certificates that `session` uses for `url` before the first request to its origin.

        Raises
        ------
        ConnectError
            The proxy's address cannot be used, or not everybody would read it alike.
        TLSError
            The certificates are to come from a pipe.
        """
        key = (os.getpid(), id(session), url.origin)
        if key in self._settings_checked:
            return
        proxy = proxy_for(session, str(url))
        if proxy is not None and (mistake := proxy_mistake(proxy, str(url))) is not None:
            raise mistake
        if url.scheme == "https":
            check_certificates(session, str(url))
        if session is self._given:
            watch_adapter(session, str(url), None if proxy is None else proxy.value)
        self._settings_checked.add(key)

    def _auth(self, url: Url, session: requests.Session | None) -> Callable[[Any], Any] | None:
        """Return what the user gave for this URL: a user and password in it, else the token of its origin.

        What the caller's `session` has for it goes before what happens to be in the environment.
        """
        if url.credentials is not None:
            return requests.auth.HTTPBasicAuth(*url.credentials)
        if self._login is None or (session is not None and (session.auth or _AUTH in session.headers)):
            return None
        token = self._login.token(url.origin)
        return None if token is None else _Bearer(token)

    def _sessions(self) -> tuple[requests.Session, requests.Session]:
        """The session for the origin asked for, and one without secrets for where it redirects."""
        # Without a lock, which another thread could hold at the moment of a fork, and so for ever in the child.
        pid = os.getpid()  # a forked child must not share its parent's sockets
        made = self._made.get(pid)
        return made if made is not None else self._made.setdefault(pid, self._make_sessions())

    def _make_sessions(self) -> tuple[requests.Session, requests.Session]:
        bare = self._session()
        if self._given is None:
            return bare, bare
        if _last_user.get(self._given, _FIRST_PID) != os.getpid():
            # By the other side of a fork, with which no socket must be shared.
            for adapter in self._given.adapters.values():
                if isinstance(adapter, requests.adapters.HTTPAdapter):
                    adapter.__setstate__(adapter.__getstate__())  # type: ignore[attr-defined]  # new pools
        _last_user[self._given] = os.getpid()
        bare.proxies, bare.verify = dict(self._given.proxies), self._given.verify
        bare.trust_env = self._given.trust_env
        return self._given, bare

    def _session(self) -> requests.Session:
        session = requests.Session()
        session.headers.clear()
        session.headers["User-Agent"] = _USER_AGENT
        # A cookie would come along to other ports of its host, and to whatever is loaded next.
        session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        adapter = WatchedAdapter(pool_maxsize=self._max_connections, max_retries=0)
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        return session


def _abandon(cancellation: Cancellation, watch: StallWatch, answers: list[requests.Response]) -> None:
    """End a request that failed. It has an answer if a hook of the caller's session raised."""
    cancellation.remove(watch)
    for answer in answers:
        answer.close()


def _check(cancellation: Cancellation, watch: StallWatch, url: str) -> None:
    """Raise if the wait that just ended was ended from outside."""
    cancellation.check()
    if watch.is_stalled:
        raise StallError("the server sends next to nothing", url=url, hint="Try again later.")


class _Bearer(requests.auth.AuthBase):
    def __init__(self, token: str) -> None:
        self.token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers[_AUTH] = f"Bearer {self.token}"
        return request


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Given as ``auth``, it also keeps requests from looking into netrc."""
    return request


def _linked_sha256(headers: Mapping[str, str]) -> str | None:
    """Of files in its large-file storage, Hugging Face gives the SHA-256 where it redirects to the storage."""
    match = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-Etag", "").strip())
    return match[1] if match else None


def _cookies(session: requests.Session, url: Url) -> str | None:
    """The cookies that go along with a request for `url`."""
    if next(iter(session.cookies), None) is None:
        return None  # as for most
    request = requests.Request("GET", str(url))
    cookies: str | None = requests.cookies.get_cookie_header(session.cookies, request)  # type: ignore[no-untyped-call]
    return cookies


def _target(url: Url, target: str) -> Url:
    with contextlib.suppress(UnicodeError):
        target = target.encode("latin-1").decode("utf-8")  # as browsers read the header
    scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*):", target)
    if scheme is not None and scheme[1].lower() not in ("http", "https"):
        raise RedirectError(f"the server redirects to {scheme[1][:20]}:", url=str(url))
    try:
        new = url.join(target)
    except ValueError as error:
        raise RedirectError(f"the server redirects to an address that cannot be used: {error}", url=str(url)) from None
    if new.scheme == "http" and url.scheme == "https":
        raise RedirectError(f"the server redirects from https to {redact(str(new))}", url=str(url))
    return new
