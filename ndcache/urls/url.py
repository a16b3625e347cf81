r"""Strict parsing of URLs, so that the origin that is checked is the one that is connected to.

urlsplit, urllib3 and requests read some texts differently: the host of ``http://a\@b/`` is b to the first and a to the
others. `parse` accepts only texts that mean the same to all of them. It returns the text to send, which none of them
reads as another host.
"""

from __future__ import annotations

import functools
import ipaddress
import re
import unicodedata
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import quote, unquote, urljoin

from .queries import query_digest

__all__ = ["OBJECT_SCHEMES", "Origin", "Url", "UrlError", "parse", "parse_http", "parse_proxy", "quoted"]

#: The schemes of object storage: what stands in place of the host is a bucket or a container.
OBJECT_SCHEMES = ("s3", "gs", "az")
_DEFAULT_PORTS = {"http": 80, "https": 443}
#: Characters that are read differently wherever they stand: urlsplit drops some, urllib3 ends the host at a backslash.
_AMBIGUOUS = re.compile(r"[\x00-\x1f\x7f-\x9f\\\ud800-\udfff]")
_URL = re.compile(r"(https?|s3|gs|az)://([^/?#]*)([^?#]*)(?:\?([^#]*))?(?:#.*)?", re.IGNORECASE)
#: Names of buckets, those of old ones included, and Azure's ``$web`` and ``$root``.
_BUCKET = re.compile(r"\$?[A-Za-z0-9][A-Za-z0-9._-]{0,221}")
_LABEL = r"[a-z0-9_-]{1,63}"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?")
#: Hosts that browsers and the system's resolver take for an IPv4 address in some notation.
_NUMBER_LAST = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)\.?")
_SAFE = "/%~!$&'()*+,:;=@[]"  # with letters, digits and "-._", all that requests does not quote, except "#" and "?"


class UrlError(ValueError):
    """A text is not a URL of these schemes, or can be read in more than one way. The message holds no part of it."""


class Origin(NamedTuple):
    """The server that a request goes to, and that secrets belong to."""

    scheme: str
    host: str
    port: int


@dataclass(frozen=True)
class Url:
    """A URL that every parser reads alike. Its ``str`` may be sent: it has no user and password.

    Attributes
    ----------
    scheme, host : str
        In lower case; the host is ASCII, an IPv6 address without brackets. For `OBJECT_SCHEMES`, the bucket or
        container, as written.
    port : int or None
        As written.
    path, query : str
        Quoted; the path begins with a slash unless it is empty.
    user : str or None
        The user and password as written, percent-encoded; None if there is no ``@``.
    written_host : str
        The host as written, in lower case: an IPv6 address with brackets, other hosts perhaps not ASCII.
    """

    scheme: str
    host: str
    port: int | None
    path: str
    query: str = field(repr=False)
    user: str | None = field(repr=False)
    written_host: str

    @property
    def origin(self) -> Origin:
        """Return the scheme, host and port, with the default port if none is written."""
        return Origin(self.scheme, self.host, self.port or _DEFAULT_PORTS.get(self.scheme, 0))

    @property
    def is_object(self) -> bool:
        """Return whether this names an object of a bucket, and no address that can be requested."""
        return self.scheme in OBJECT_SCHEMES

    @property
    def root(self) -> str:
        """Return the text before the path, without user and password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + ("" if self.port is None else f":{self.port}")

    @property
    def secret_root(self) -> str:
        """Return the text before the path, with user and password."""
        scheme, _, rest = self.root.partition("://")
        return self.root if self.user is None else f"{scheme}://{self.user}@{rest}"

    @property
    def identity(self) -> str:
        """Return the text that has always identified a file in caches: without default port and query."""
        port = "" if self.port in (None, _DEFAULT_PORTS.get(self.scheme)) else f":{self.port}"
        return f"{self.scheme}://{self.written_host}{port}{self.path}"

    @property
    def credentials(self) -> tuple[str, str] | None:
        """Return the user and password, decoded, or None if there are none."""
        user, _, password = (self.user or "").partition(":")
        return (unquote(user), unquote(password)) if user or password else None

    @property
    def address(self) -> str:
        """Return a text without secrets that differs for different files, for notes on disk."""
        digest = query_digest(self.query)
        return self.root + self.path + (f"?{digest}" if digest else "")

    def join(self, target: str) -> Url:
        """Return the URL that an absolute or relative `target` of a redirect leads to from here.

        Raises
        ------
        UrlError
        """
        target = target.strip(" ")
        if _AMBIGUOUS.search(target):
            raise UrlError("it has a backslash or a control character")
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", target):
            return parse_http(target)
        if target.startswith("//"):
            return parse_http(f"{self.scheme}:{target}")
        there = parse_http(urljoin(str(self), target))
        if there.origin != self.origin:
            raise UrlError("it is relative, and yet leads to another server")
        return there

    @property
    def with_user(self) -> str:
        """Return the whole text, with user and password."""
        return self.secret_root + str(self)[len(self.root) :]

    def __str__(self) -> str:
        return self.root + (self.path or "/") + (f"?{self.query}" if self.query else "")


@functools.lru_cache(maxsize=256)  # each request parses its URL several times
def parse(text: str) -> Url:
    """Read a URL, of http(s) or of an object in a bucket.

    Raises
    ------
    UrlError
        `text` is no such URL, or can be read in more than one way.
    """
    if _AMBIGUOUS.search(text):
        raise UrlError("it has a backslash or a control character")
    match = _URL.fullmatch(text)
    if match is None:
        raise UrlError("it does not begin with http:// or https://")
    scheme, authority, path, query = match.groups()
    if scheme.lower() in OBJECT_SCHEMES:
        return _object_url(text, scheme.lower(), authority, path)
    user, at, rest = authority.rpartition("@")
    if re.search(r"[\s@\[\]]", user):
        raise UrlError("it has a space, @, [ or ] in its user or password; write %20, %40, %5B or %5D")
    host, port = _split_port(rest)
    return Url(
        scheme.lower(),
        _checked_host(host),
        _checked_port(port),
        quoted(path),
        quoted(query or "", "?"),
        user if at else None,
        host.lower(),
    )


def _object_url(text: str, scheme: str, bucket: str, path: str) -> Url:
    if "@" in bucket:
        raise UrlError("it has a user or password; credentials come from the environment")
    if re.search("[?#]", text):
        raise UrlError("it has a query or a fragment; in the name of an object, write %3F for ? and %23 for #")
    if not bucket:
        raise UrlError(f"it names no bucket; write {scheme}://bucket/folder/")
    if not _BUCKET.fullmatch(bucket):
        raise UrlError("its bucket cannot be a bucket's name")
    if re.search(r"//|/\.\.?(/|$)", unquote(path)):
        raise UrlError("its path has an empty part, . or ..")
    return Url(scheme, bucket, None, quoted(path), "", None, bucket)


def parse_http(text: str) -> Url:
    """Read an http(s) URL.

    Raises
    ------
    UrlError
        `text` is not an http(s) URL, or can be read in more than one way.
    """
    url = parse(text)
    if url.is_object:
        raise UrlError("it does not begin with http:// or https://")
    return url


def parse_proxy(text: str) -> Url:
    """Parse the address of a proxy.

    A missing scheme, or one of SOCKS, becomes http in the result. An ``@`` in the password is allowed: it is common,
    and every parser reads it alike.

    Raises
    ------
    UrlError
    """
    scheme, _, rest = text.rpartition("://")
    user, at, host = rest.rpartition("@")
    if not re.search("[/?#]", user):
        rest = user.replace("@", "%40") + at + host
    is_http = scheme.lower() in ("", "socks4", "socks4a", "socks5", "socks5h")
    url = parse_http(f"{'http' if is_http else scheme}://{rest}")
    if "@" in url.path:
        raise UrlError("it has an @ after its host")
    return url


def _split_port(rest: str) -> tuple[str, str | None]:
    """Split ``host:port``, at the colon after the bracket of an IPv6 address."""
    match = re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::(.*))?", rest, re.DOTALL)
    if match is None:
        raise UrlError("its host or port cannot be read")
    return match[1], match[2]


def _checked_port(port: str | None) -> int | None:
    if port is None:
        return None
    if not re.fullmatch("[1-9][0-9]{0,4}", port) or int(port) > 65535:
        raise UrlError("its port is not a number from 1 to 65535")
    return int(port)


def _checked_host(host: str) -> str:
    """Return the host as it is looked up."""
    if not host:
        raise UrlError("it has no host")
    if host.startswith("["):
        try:
            if "%" in host:  # a zone, which urllib3 decodes
                raise ValueError
            return str(ipaddress.IPv6Address(host[1:-1]))
        except ValueError:
            raise UrlError("its host is not an IPv6 address") from None
    name = host.lower() if host.isascii() else _to_ascii(host)
    if not _NAME.fullmatch(name) or len(name) > 254:
        raise UrlError("its host cannot be a host's name")
    if _NUMBER_LAST.fullmatch(name):
        try:
            return str(ipaddress.IPv4Address(name))  # in no other notation: 127.1, 0x7f.0.0.1, 2130706433
        except ValueError:
            raise UrlError("its host is not an IPv4 address of four decimal numbers") from None
    return name


def _to_ascii(host: str) -> str:
    import idna  # here, as most hosts do not need it; requests requires it

    name = host.lower()
    # Parsers disagree about characters that normalization changes, such as full stops and digits of other scripts.
    if name.isascii() or unicodedata.normalize("NFKC", name) != name:
        raise UrlError("its host has characters that stand for others")
    try:
        return ".".join(idna.encode(label, strict=True, std3_rules=True).decode() for label in name.split("."))
    except idna.IDNAError:
        raise UrlError("its host cannot be a host's name") from None


def quoted(text: str, also_safe: str = "") -> str:
    """Return `text` quoted for a URL; like browsers, leave percent-encoded characters as they are."""
    return re.sub("%(?![0-9A-Fa-f]{2})", "%25", quote(text, safe=_SAFE + also_safe))
