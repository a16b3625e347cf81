"""The location of a model, from the source that the user typed.

``https://host/model/``, ``https://host/model/tensor-cache-b16.json``     as it is
``hf://owner/name[@revision][/folder]``, the page's URL                  → ``…/resolve/revision/``
``s3://bucket/folder/``, ``gs://…``, ``az://container/folder/``            as it is, for signed addresses
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
from ..urls.redact import printable
from ..urls.url import OBJECT_SCHEMES, Url, UrlError, parse, quoted
from .hub import MANIFEST_SUFFIXES, canonical_identity, hf_endpoint, page_url, repository_url

__all__ = [
    "MANIFEST_NAMES",
    "NDARRAY_CACHE_NAMES",
    "Location",
    "cached_location",
    "locate",
    "locate_mirror",
    "remote_location",
]

#: The usual names of an NDArray cache's manifest, newest first.
NDARRAY_CACHE_NAMES = ("tensor-cache.json", "ndarray-cache.json")
#: The names to try in a directory: then those of an index of safetensors files, and of a single one.
MANIFEST_NAMES = (*NDARRAY_CACHE_NAMES, "model.safetensors.index.json", "model.safetensors")
#: Other programs' names for the schemes of object storage.
_OTHER_NAMES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "azure": "az", "azblob": "az"}


@dataclass(frozen=True)
class Location:
    """The place of a model, and the names that its manifest may have.

    Attributes
    ----------
    base : str
        The URL of the model directory, ending in a slash; empty for a local one. May hold a password, unless it is that
        of a folder in object storage.
    query : str
        The query of the given URL, sent with every request (signed URLs of a whole container).
    directory : pathlib.Path or None
        The local model directory.
    manifest_names : tuple of str
        File names to try, in this order.
    identities : tuple of str
        URLs without query that identify the model in the cache: first the one at huggingface.co, even for another
        endpoint, then the one that earlier versions used.
    directory_name : str or None
        The name of the model's directory in the cache, if it is known, and not the URL from which it follows.
    """

    base: str = field(repr=False)
    query: str = field(repr=False)
    directory: Path | None
    manifest_names: tuple[str, ...]
    identities: tuple[str, ...] = ()
    directory_name: str | None = None

    @property
    def is_folder(self) -> bool:
        """Return whether the user named a directory, and not a manifest."""
        return len(self.manifest_names) > 1

    @property
    def is_remote(self) -> bool:
        """Return whether the model is on a server."""
        return self.directory is None

    def url(self, path: str) -> str:
        """Return the full URL of a file of the model; `path` is a ``dataPath`` or the manifest's name."""
        url = self.base + quoted(path)
        return f"{url}?{self.query}" if self.query else url

    def __str__(self) -> str:
        """Return a text without password, and with a digest of the query if that is part of the model's identity."""
        return self._shown(self.base) if self.is_remote else str(self.directory)

    @property
    def label(self) -> str:
        """Return the model's name in listings of the cache."""
        return self._shown(self.identities[0]) if self.is_remote else str(self.directory)

    @property
    def title(self) -> str:
        """Return a name to show, without scheme, password and query; its last part says most."""
        if self.directory is not None:
            return printable(os.path.abspath(self.directory))
        text = redact(self.base).partition("://")[2].strip("/")
        return printable(unquote(re.sub(r"/resolve/[^/]+", "", text)))

    @property
    def cache_key(self) -> str:
        """Return the name of the model's directory in the cache, readable, and unique by the digest at its end."""
        return self.cache_keys[0]

    @property
    def cache_keys(self) -> tuple[str, ...]:
        """Return the directory's name, followed by those that earlier versions gave it."""
        if self.directory_name is not None:
            return (self.directory_name,)
        query = identifying_query(self.query)
        return tuple(_cache_key(identity, query) for identity in self.identities)

    def _shown(self, url: str) -> str:
        digest = query_digest(self.query)
        return redact(url) + (f" (query {digest})" if digest else "")


def _cache_key(identity: str, query: str) -> str:
    # Without a query, the key is the same as in the first version.
    digest = hashlib.sha256((f"{identity}?{query}" if query else identity).encode()).hexdigest()[:16]
    words = [w for w in re.split(r"[^A-Za-z0-9._-]+", identity.partition("://")[2]) if w.strip(".-")]
    return f"{'--'.join(words)[:100].strip('.-') or 'model'}--{digest}"


def locate(
    source: str | os.PathLike[str], environ: Mapping[str, str] = os.environ, *, revision: str | None = None
) -> Location:
    """Return the location of `source`; look at the file system, but not at the network.

    Parameters
    ----------
    source : str or path-like
        See the top of this module.
    environ : mapping
        For HF_ENDPOINT.
    revision : str, optional
        The branch, tag or commit of a repository on Hugging Face whose source names none.

    Raises
    ------
    NotFoundError
        `source` is a local path that does not exist.
    ValueError
        `source` is a URL that cannot be read, can be read in more than one way, or has an unknown scheme. Or `revision`
        is given, and `source` has another one, or is no repository.
    TypeError
        `source` is neither a text nor a path, such as None from a variable that is not set.
    """
    location = _locate(source, environ, revision)
    if revision is not None and not location.is_remote:
        raise _no_revision(str(location))
    return location


def _locate(source: str | os.PathLike[str], environ: Mapping[str, str], revision: str | None) -> Location:
    if isinstance(source, os.PathLike):
        return _local(Path(source))
    if not isinstance(source, str):
        raise TypeError(f"the source must be a text or a path, not {type(source).__name__}")
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
        return _http(repository_url(rest, endpoint, revision), endpoint)
    if scheme == "file":
        return _file_url(text)
    if scheme in ("http", "https", *OBJECT_SCHEMES):
        return _http(text, hf_endpoint(environ), revision)
    kind = f"{scheme}://" if re.fullmatch(r"[a-z][a-z0-9+.-]{0,20}", scheme) else "this"
    usual = _OTHER_NAMES.get(scheme)
    remedy = (
        f"write {usual}://" if usual else "give an http(s) URL, hf://owner/name, s3://, gs://, az:// or a directory"
    )
    raise ValueError(f"sources of the kind {kind} are not supported: {remedy}")


def cached_location(source: str, directory_name: str, manifest_names: tuple[str, ...]) -> Location:
    """Return the location of a model as the cache lists it: its source need not be a URL that can be requested."""
    base = source if source.endswith("/") else f"{source}/"
    return Location(base, "", None, manifest_names, (source,), directory_name)


def locate_mirror(source: str) -> Location:
    """Return the location of a mirror.

    Raises
    ------
    ValueError
        The mirror is not on a server.
    """
    location = locate(source)
    if not location.is_remote:
        known = "an http(s) URL, hf://owner/name, s3://, gs:// or az://"
        raise ValueError(f"a mirror is {known}, not a local path: {location}")
    return location


def _http(text: str, endpoint: Url, revision: str | None = None) -> Location:
    try:
        url = parse(text)
    except UrlError as error:
        raise ValueError(f"this URL cannot be used, {error}: {redact(text)}") from None
    if (files := page_url(url, endpoint, revision)) is not None:
        url = parse(files)
    elif revision is not None:
        raise _no_revision(redact(text))
    folder, _, name = url.path.rpartition("/")
    if name.endswith(MANIFEST_SUFFIXES):
        names: tuple[str, ...] = (_file_name(name),)
    else:
        folder, names = url.path.rstrip("/"), MANIFEST_NAMES
    return remote_location(replace(url, path=f"{folder}/"), names, endpoint)


def _no_revision(shown: str) -> ValueError:
    return ValueError(f"revision is for repositories on Hugging Face (hf://owner/name), and not for {shown}")


def remote_location(folder: Url, manifest_names: tuple[str, ...], endpoint: Url) -> Location:
    """Return the location of the model in a `folder` of a server."""
    named = canonical_identity(folder, endpoint)
    identities = (folder.identity,) if named in (None, folder.identity) else (named, folder.identity)
    return Location(folder.secret_root + folder.path, folder.query, None, manifest_names, identities)


def _file_name(name: str) -> str:
    """Return a manifest's name as a file name for the cache, decoded only if that is harmless."""
    decoded = unquote(name)
    return decoded if re.fullmatch(r"[\w .~+@=,()-]+", decoded) else quote(name, safe="%")


def _file_url(url: str) -> Location:
    parts = None
    with contextlib.suppress(ValueError):  # its message may hold a password
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
        hint = _suggestion(path)
    except (OSError, RuntimeError, ValueError) as error:
        # No such home directory, a name longer than any file's, no permission to look, a NUL.
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    # Not `from` that error: it holds the whole text, which may have been meant as a URL with a password.
    if reason is not None:
        raise NotFoundError(f"this is not a directory or file: {_shown(path)} ({reason})")
    raise NotFoundError(f"there is no such directory or file: {_shown(path)}", hint=hint)


def _suggestion(path: Path) -> str | None:
    """Return a hint at what the user may have meant by a local path that does not exist."""
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
