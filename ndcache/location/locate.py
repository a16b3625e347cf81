"""What the user typed → where the model is.

``https://host/model/``, ``https://host/model/tensor-cache-b16.json``     as it is
``hf://owner/name[@revision][/folder]``, the page's URL                  → ``…/resolve/revision/``
``file:///path``, ``path``, ``path/tensor-cache.json``                   a local directory, read in place
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit
from urllib.request import url2pathname

from ..errors import NotFoundError, redact
from ..urls.queries import identifying_query, query_digest
from ..urls.url import Url, UrlError, parse, quoted
from .hub import canonical, hf_endpoint, page_url, repository_url

__all__ = ["MANIFEST_NAMES", "Location", "locate", "locate_mirror", "remote_location"]

#: The manifest's usual names, newest first.
MANIFEST_NAMES = ("tensor-cache.json", "ndarray-cache.json")


@dataclass(frozen=True)
class Location:
    """Where a model lies, and what its manifest may be called.

    Attributes
    ----------
    base : str
        The URL of the model directory, ending in a slash; empty for a local one. May hold a password.
    query : str
        The query of the URL given, sent with every request (signed URLs of a whole container).
    directory : pathlib.Path or None
        The local model directory.
    manifest_names : tuple of str
        File names to try, in this order.
    identities : tuple of str
        What the cache knows the model by, without the query: that of huggingface.co for whatever endpoint, and then
        what it was before.
    """

    base: str = field(repr=False)
    query: str = field(repr=False)
    directory: Path | None
    manifest_names: tuple[str, ...]
    identities: tuple[str, ...] = ()

    @property
    def is_remote(self) -> bool:
        """Whether it is on a server."""
        return self.directory is None

    def url(self, path: str) -> str:
        """The full URL of a file of the model; `path` is a ``dataPath`` or the manifest's name."""
        url = self.base + quoted(path)
        return f"{url}?{self.query}" if self.query else url

    def __str__(self) -> str:
        """The location as it may be shown: no password, and of the query a digest, if it chooses the model."""
        return self._shown(self.base) if self.is_remote else str(self.directory)

    @property
    def label(self) -> str:
        """Return what the model is called in listings of the cache."""
        return self._shown(self.identities[0]) if self.is_remote else str(self.directory)

    @property
    def cache_key(self) -> str:
        """The name of its directory in the cache: readable, and unique by the digest at its end."""
        return self.cache_keys[0]

    @property
    def cache_keys(self) -> tuple[str, ...]:
        """The same, and then what earlier versions called the directory."""
        query = identifying_query(self.query)
        return tuple(_cache_key(identity, query) for identity in self.identities)

    def _shown(self, url: str) -> str:
        digest = query_digest(self.query)
        return redact(url) + (f" (query {digest})" if digest else "")


def _cache_key(identity: str, query: str) -> str:
    # Without a query, it is the key that models have had since there are caches.
    digest = hashlib.sha256((f"{identity}?{query}" if query else identity).encode()).hexdigest()[:16]
    words = [w for w in re.split(r"[^A-Za-z0-9._-]+", identity.partition("://")[2]) if w.strip(".-")]
    return f"{'--'.join(words)[:100].strip('.-') or 'model'}--{digest}"


def locate(source: str | os.PathLike[str], environ: Mapping[str, str] = os.environ) -> Location:
    """Find out where `source` points; the file system is looked at, the network is not.

    Parameters
    ----------
    source : str or path-like
        See the top of this file.
    environ : mapping
        For HF_ENDPOINT.

    Raises
    ------
    NotFoundError
        A local path that does not exist.
    ValueError
        A URL that cannot be understood, or not by everybody in the same way, or is of an unknown scheme.
    """
    if not isinstance(source, str):
        return _local(Path(source))
    text = source.strip()
    if not text:
        raise ValueError("the source is empty: give a URL, hf://owner/name or a directory")
    scheme, separator, rest = text.partition("://")
    if not separator:
        if text.lower().startswith("file:"):
            return _file_url(text)
        return _local(Path(text))
    scheme = scheme.lower()
    if scheme == "hf":
        endpoint = hf_endpoint(environ)
        return _http(repository_url(rest, endpoint), endpoint)
    if scheme == "file":
        return _file_url(text)
    if scheme in ("http", "https"):
        return _http(text, hf_endpoint(environ))
    kind = f"{scheme}://" if re.fullmatch(r"[a-z][a-z0-9+.-]{0,20}", scheme) else "this"
    raise ValueError(
        f"sources of the kind {kind} are not supported: give an http(s) URL, hf://owner/name, file:// or a directory"
    )


def locate_mirror(source: str) -> Location:
    """Find out where a mirror is; raise ValueError if it is not on a server."""
    location = locate(source)
    if not location.is_remote:
        raise ValueError(f"a mirror is an http(s) URL or hf://owner/name, not a local path: {location}")
    return location


def _http(text: str, endpoint: Url) -> Location:
    try:
        url = parse(text)
    except UrlError as error:
        raise ValueError(f"this URL cannot be used, {error}: {redact(text)}") from None
    if (files := page_url(url, endpoint)) is not None:
        url = parse(files)
    folder, _, name = url.path.rpartition("/")
    if name.endswith(".json"):
        names: tuple[str, ...] = (_file_name(name),)
    else:
        folder, names = url.path.rstrip("/"), MANIFEST_NAMES
    return remote_location(replace(url, path=f"{folder}/"), names, endpoint)


def remote_location(folder: Url, manifest_names: tuple[str, ...], endpoint: Url) -> Location:
    """Return the location of the model in a `folder` of a server."""
    named = canonical(folder, endpoint)
    identities = (folder.identity,) if named in (None, folder.identity) else (named, folder.identity)
    return Location(folder.secret_root + folder.path, folder.query, None, manifest_names, identities)


def _file_name(name: str) -> str:
    """The manifest's name, which becomes a file name in the cache: decoded only if no harm can come of that."""
    decoded = unquote(name)
    return decoded if re.fullmatch(r"[\w .~+@=,()-]+", decoded) else quote(name, safe="%")


def _file_url(url: str) -> Location:
    parts = None
    with contextlib.suppress(ValueError):  # which has a password in its text
        parts = urlsplit(url)
    if parts is None:
        raise ValueError(f"this file:// URL cannot be read: {redact(url)}")
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"a file:// URL names no host, this one does: {redact(url)}")
    return _local(Path(url2pathname(parts.path)))


def _local(path: Path) -> Location:
    hint = reason = None
    try:
        path = path.expanduser()
        if path.is_dir():
            return Location("", "", path, MANIFEST_NAMES)
        if path.is_file():
            return Location("", "", path.parent, (path.name,))
        hint = _meant(path)
    except (OSError, RuntimeError, ValueError) as error:
        # No such home directory, a name longer than any file's, no permission to look, a NUL.
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    # Not from that error, which has the whole text, a password as well: it may have been meant as a URL.
    if reason is not None:
        raise NotFoundError(f"this is not a directory or file: {_shown(path)} ({reason})")
    raise NotFoundError(f"there is no such directory or file: {_shown(path)}", hint=hint)


def _meant(path: Path) -> str | None:
    """What the user may have meant by a local path that is not there."""
    text = path.as_posix()
    if match := re.match(r"(?i)(https?|hf)([:;.,]+/*|//+)", text):
        return f"A URL has a colon and two slashes: {match[1].lower()}://."
    if re.match(r"(?i)((localhost|[\d.]+|[a-z0-9-]+(\.[a-z0-9-]+)*\.[a-z]{2,})(:\d+)?|[a-z0-9-]+:\d+)/", text):
        return "If a URL is meant, it begins with https:// or http:// (or hf://, for a Hugging Face repository)."
    if path.suffix == ".json" and path.parent.is_dir():
        names = sorted(p.name for p in path.parent.glob("*.json"))
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return f"Its directory has {', '.join(names[:5]) or 'no JSON file'}{more}."
    if path.parent.is_dir() and (
        close := difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    ):
        return f"Did you mean {path.with_name(close[0])}?"
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w.-]+)?", text) and redact(text) == text:
        return f"If a Hugging Face repository is meant, write hf://{text}."
    return None


def _shown(path: Path) -> str:
    text = redact(str(path))
    return text if len(text) <= 300 else text[:297] + "..."
