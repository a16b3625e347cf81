"""The proxy that a request goes through, and the errors of proxies that cannot be used."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import requests
import urllib3
from urllib3.util import parse_url

from ..errors import AuthError, ConnectError, TransferError, redact
from ..urls.url import UrlError, parse_proxy
from .tls import tls_error

__all__ = ["Proxy", "proxy_address_error", "proxy_auth_error", "proxy_error", "proxy_for"]

_SOCKS = ("socks4", "socks4a", "socks5", "socks5h")
_FAILURES = (
    requests.exceptions.ProxyError,
    urllib3.exceptions.ProxyError,
    # From SOCKS proxies: where there is a proxy, nothing else is connected to.
    urllib3.exceptions.ConnectTimeoutError,
    urllib3.exceptions.NewConnectionError,
)
_UNREADABLE = (requests.exceptions.InvalidProxyURL, urllib3.exceptions.ProxySchemeUnknown)


@dataclass(frozen=True)
class Proxy:
    """A proxy, as the user has set it.

    Attributes
    ----------
    setting : str
        Where it was set: the name of an environment variable, say.
    value : str
        The value that was set; may hold a password.
    """

    setting: str
    value: str

    def __str__(self) -> str:
        return f"the proxy {redact(self.address).rstrip('/')} ({self.setting})"

    @property
    def address(self) -> str:
        """Return the value as a URL."""
        return self.value if "://" in self.value else f"http://{self.value}"


def proxy_for(session: requests.Session, url: str) -> Proxy | None:
    """Return the proxy that a request of `session` for `url` goes through, or None if there is none."""
    proxies: Mapping[str, str] = session.merge_environment_settings(url, {}, None, None, None)["proxies"]
    value = requests.utils.select_proxy(url, dict(proxies))
    if not value:
        return None
    parts = urlsplit(url)
    keys = (f"{parts.scheme}://{parts.hostname}", parts.scheme, f"all://{parts.hostname}", "all")
    key = next((key for key in keys if key in proxies), "all")
    names = (f"{parts.scheme}_proxy", f"{parts.scheme}_proxy".upper(), "all_proxy", "ALL_PROXY")
    name = next((name for name in names if os.environ.get(name) == value), None)
    if name is not None and session.trust_env:
        return Proxy(name, value)
    return Proxy(f"session.proxies[{key!r}]" if key in session.proxies else "the system's settings", value)


def proxy_auth_error(proxy: Proxy | None, url: str) -> AuthError:
    """Return the error for a response with status 407."""
    hint = None
    if proxy is not None:
        scheme = urlsplit(proxy.address).scheme
        hint = f"Give them in {proxy.setting}: {scheme}://user:password@host:port (special characters as %XX)."
    return AuthError(
        f"{proxy or 'a proxy'} wants a user and password, or different ones (status 407)",
        url=url,
        status=407,
        hint=hint,
    )


def proxy_error(proxy: Proxy | None, chain: list[BaseException], url: str, *, is_first: bool) -> TransferError | None:
    """Return the error for a request that failed because of its proxy, or None if it failed for another reason.

    Parameters
    ----------
    proxy : Proxy or None
    chain : list of exceptions
        The failure and its causes.
    url : str
    is_first : bool
        Whether the server has never answered: then a proxy that does not exist is a mistake, not a failure.
    """
    if (status := _tunnel_status(chain)) is not None:
        return _tunnel_error(proxy, status, url)
    if proxy is None:
        return None
    hint = _hint(proxy)
    if (error := proxy_address_error(proxy, url, chain)) is not None:
        return error
    if not any(isinstance(error, _FAILURES) for error in chain):
        return None
    if any("wrong version number" in str(error).lower() for error in chain) and proxy.address.startswith("https:"):
        hint = f"Write http:// instead of https:// in {proxy.setting}."
        return _final(ConnectError(f"{proxy} does not speak TLS", url=url, hint=hint))
    if (insecure := tls_error(chain, str(proxy), url, is_connected=False)) is not None:
        return insecure
    unknown = next((error for error in chain if isinstance(error, socket.gaierror)), None)
    if unknown is not None:
        error = ConnectError(f"the host of {proxy} is not known", url=url, hint=hint)
        return _final(error) if is_first and unknown.errno != socket.EAI_AGAIN else error
    if any(isinstance(error, ConnectionRefusedError) for error in chain):
        error = ConnectError(f"{proxy} refuses connections", url=url, hint=hint)
        return _final(error) if is_first else error
    if any(isinstance(error, TimeoutError | urllib3.exceptions.ConnectTimeoutError) for error in chain):
        return ConnectError(f"{proxy} did not answer in time", url=url, hint=hint)
    return ConnectError(f"{proxy} cannot be used", url=url, hint=hint)


def proxy_address_error(proxy: Proxy, url: str, chain: Sequence[BaseException] = ()) -> ConnectError | None:
    """Return the error for a proxy's address that cannot be used, or None; `chain` is the failure, if there was one."""
    problem = _address_problem(proxy, chain)
    if problem is None:
        return None
    return _final(ConnectError(f"{_shown(proxy)} {problem[0]}", url=url, hint=problem[1] or _hint(proxy)))


def _hint(proxy: Proxy) -> str:
    return f"Check {proxy.setting}, and NO_PROXY for hosts that must not go through it."


def _final(error: ConnectError) -> ConnectError:
    error.retryable = False
    return error


def _shown(proxy: Proxy) -> str:
    """Return the setting, and its value if that cannot hold a password.

    If the value is not an address, any part of it may be a password.
    """
    shown = redact(proxy.address)
    return proxy.setting if "@" in proxy.value or shown.startswith("(") else f"{proxy.setting} ({shown})"


def _address_problem(proxy: Proxy, chain: Sequence[BaseException]) -> tuple[str, str | None] | None:
    """Return what is wrong with the address and a hint, or None if nothing is wrong."""
    no_address = ("is not the address of a proxy", f"Write {proxy.setting} as http://host:port.")
    try:
        parts = parse_url(proxy.address)
        (parts.host or "").encode("idna")
    except (urllib3.exceptions.LocationParseError, UnicodeError):
        return no_address
    if not parts.host or not parts.scheme:
        return no_address
    if parts.scheme in _SOCKS:
        if importlib.util.find_spec("socks") is None:
            return "is a SOCKS proxy, for which a package is missing", 'Install it: pip install "requests[socks]".'
    elif parts.scheme not in ("http", "https"):
        return (
            f"is of an unknown kind ({parts.scheme}:)",
            "Proxies are http://, https://, socks5h:// and the like.",
        )
    try:
        parse_proxy(proxy.value)
    except UrlError:  # a text that two parsers read differently is not an address, either
        return no_address
    # Without a scheme in the address, requests takes the host or user for one.
    return no_address if any(isinstance(error, _UNREADABLE) for error in chain) else None


def _tunnel_status(chain: list[BaseException]) -> int | None:
    """Return the status of a proxy that refused a tunnel, or None; http.client shows it only in its message."""
    for error in chain:
        if isinstance(error, OSError) and (found := re.match(r"Tunnel connection failed: (\d{3})\b", str(error))):
            return int(found[1])
    return None


def _tunnel_error(proxy: Proxy | None, status: int, url: str) -> TransferError:
    if status == 407:
        return proxy_auth_error(proxy, url)
    error = ConnectError(
        f"{proxy or 'the proxy'} does not connect to the server (status {status})", url=url, status=status
    )
    return error if status >= 500 or status in (408, 429) else _final(error)
