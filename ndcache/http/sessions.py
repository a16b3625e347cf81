"""The sessions of requests that one transport uses, and what authenticates their requests."""

from __future__ import annotations

import http.cookiejar
import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import requests

from .._version import __version__
from ..location.hub import Login
from ..urls.url import Origin, Url, parse
from .configuration import check_certificates
from .proxies import proxy_address_error, proxy_for
from .sockets import WatchedAdapter, watch_adapter

__all__ = ["Auth", "BearerAuth", "Sessions", "cookie_header", "no_auth"]

Auth = Callable[[requests.PreparedRequest], requests.PreparedRequest]

_AUTHORIZATION = "Authorization"
_USER_AGENT = f"ndcache/{__version__}"

#: The process in which ndcache last used each caller's session; by default, the one that imported this module.
_last_user: weakref.WeakKeyDictionary[requests.Session, int] = weakref.WeakKeyDictionary()
_FIRST_PID = os.getpid()


class Sessions:
    """Two sessions for each process: one for the source's origin, and one without the caller's secrets.

    Safe to share between threads, and after a fork.

    Parameters
    ----------
    given : requests.Session or None
        The caller's, for the source's origin.
    max_connections : int
        Connections kept for reuse.
    login : Login or None
        Has a token for one origin (Hugging Face).
    token : str or None
        The caller's, for the source's origin.
    headers : mapping
        The caller's, for the source's origin.

    Attributes
    ----------
    headers : mapping
    """

    def __init__(
        self,
        given: requests.Session | None,
        max_connections: int,
        login: Login | None = None,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.headers = headers or {}
        self._token = token
        self._has_own_auth = any(name.lower() == "authorization" for name in self.headers)
        self._given = given
        self._max_connections = max_connections
        self._login = login
        self._by_process: dict[int, tuple[requests.Session, requests.Session]] = {}
        self._checked: set[tuple[int, int, Origin]] = set()

    def get(self, *, with_secrets: bool) -> requests.Session:
        """Return the session for the source's origin, or the one for all others."""
        # Without a lock: one that another thread holds at the moment of a fork stays locked in the child forever.
        pid = os.getpid()  # a forked child must not share its parent's sockets
        pair = self._by_process.get(pid)
        if pair is None:
            pair = self._by_process.setdefault(pid, self._new_pair())
        return pair[0 if with_secrets else 1]

    def is_given(self, session: requests.Session) -> bool:
        """Return whether a session is the caller's."""
        return session is self._given

    def auth(self, url: Url, *, is_source: bool) -> Auth | None:
        """Return what authenticates requests for `url`.

        It is the caller's token, the user and password in the URL, or the token of the origin. None leaves it to the
        session and to netrc, which are for the source and not for its mirrors. The credentials of the caller's session
        take precedence over a token that happens to be in the environment.
        """
        if is_source and self._token is not None:
            return BearerAuth(self._token)
        if is_source and self._has_own_auth:
            return no_auth
        if url.credentials is not None:
            return requests.auth.HTTPBasicAuth(*url.credentials)
        session = self._given if is_source else None
        has_own = session is not None and (session.auth or _AUTHORIZATION in session.headers)
        token = None if self._login is None or has_own else self._login.token(url.origin)
        if token is not None:
            return BearerAuth(token)
        return None if is_source else no_auth

    def check_settings(self, session: requests.Session, url: Url) -> None:
        """Check the proxy and certificates that `session` uses for `url`, before the first request to its origin.

        Raises
        ------
        ConnectError
            The proxy's address cannot be used, or can be read in more than one way.
        TLSError
            The certificates would be read from a pipe.
        """
        key = (os.getpid(), id(session), url.origin)
        if key in self._checked:
            return
        proxy = proxy_for(session, str(url))
        if proxy is not None and (error := proxy_address_error(proxy, str(url))) is not None:
            raise error
        if url.scheme == "https":
            check_certificates(session, str(url))
        if session is self._given:
            watch_adapter(session, str(url), None if proxy is None else proxy.value)
        self._checked.add(key)

    def refresh_settings(self) -> None:
        """Let the next request to each origin read the environment and netrc anew."""
        for pair in list(self._by_process.values()):
            for session in pair:
                if isinstance(session, _Session):
                    session.refresh_settings()

    def close(self) -> None:
        """Close idle connections, except those of the caller's session."""
        for pair in list(self._by_process.values()):
            for session in {*pair} - {self._given}:
                session.close()
        self._by_process.clear()
        self._checked.clear()  # a new session may get the id() of a deleted one

    def _new_pair(self) -> tuple[requests.Session, requests.Session]:
        bare = self._new_session()
        if self._given is None:
            return bare, bare
        if _last_user.get(self._given, _FIRST_PID) != os.getpid():
            # The other process of a fork has used it, and the two must not share sockets.
            for adapter in self._given.adapters.values():
                if isinstance(adapter, requests.adapters.HTTPAdapter):
                    adapter.__setstate__(adapter.__getstate__())  # type: ignore[attr-defined]  # makes new pools
        _last_user[self._given] = os.getpid()
        bare.proxies, bare.verify = dict(self._given.proxies), self._given.verify
        bare.trust_env = self._given.trust_env
        return self._given, bare

    def _new_session(self) -> requests.Session:
        session = _Session()
        session.headers.clear()
        session.headers["User-Agent"] = _USER_AGENT
        # Cookies would be sent to other ports of their host, and with the next loads.
        session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        adapter = WatchedAdapter(pool_maxsize=self._max_connections, max_retries=0)
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        return session


class _Session(requests.Session):
    """A session of our own: without cookies, hooks or ``auth``, and with settings that are read once for each origin.

    requests reads the environment and netrc, and merges empty cookie jars, for each request: a third of the time that
    a shard of some kilobytes takes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._settings: dict[str, Any] = {}  # by the root of the URL, as is the next
        self._netrc: dict[str, tuple[str, str] | None] = {}

    def refresh_settings(self) -> None:
        """Forget what the environment and netrc said."""
        self._settings, self._netrc = {}, {}

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        root = parse(url).root
        known = self._settings
        if root not in known:
            known[root] = super().merge_environment_settings(url, proxies, None, verify, cert)
        return {**known[root], "stream": stream}

    def prepare_request(self, request: requests.Request) -> requests.PreparedRequest:
        prepared = requests.PreparedRequest()
        prepared.prepare_method("GET")
        prepared.prepare_url(request.url, None)
        prepared.prepare_headers({**self.headers, **request.headers})
        prepared.prepare_hooks(request.hooks)
        auth = request.auth or self._netrc_auth(request.url)
        if auth is not None:
            prepared.prepare_auth(auth)
        return prepared

    def _netrc_auth(self, url: str) -> tuple[str, str] | None:
        root, known = parse(url).root, self._netrc
        if root not in known:
            known[root] = requests.utils.get_netrc_auth(url) if self.trust_env else None
        return known[root]


class BearerAuth(requests.auth.AuthBase):
    """Authenticate a request by a token."""

    def __init__(self, token: str) -> None:
        self.token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers[_AUTHORIZATION] = f"Bearer {self.token}"
        return request


def no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Leave a request as it is. Given as ``auth``, this keeps requests from reading netrc."""
    return request


def cookie_header(session: requests.Session, url: Url) -> str | None:
    """Return the cookies that `session` sends with a request for `url`."""
    if next(iter(session.cookies), None) is None:
        return None  # the usual case, without the cost of what follows
    request = requests.Request("GET", str(url))
    cookies: str | None = requests.cookies.get_cookie_header(session.cookies, request)  # type: ignore[no-untyped-call]
    return cookies
