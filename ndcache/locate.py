"""What the user typed → where the model is.

``https://host/model/``, ``https://host/model/tensor-cache-b16.json``     as it is
``hf://owner/name[@revision][/folder]``, the page's URL                  → ``…/resolve/revision/``
``file:///path``, ``path``, ``path/tensor-cache.json``                   a local directory, read in place
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import url2pathname

from .errors import NotFoundError, redact

__all__ = ["HF_ENDPOINT", "MANIFEST_NAMES", "Location", "hf_endpoint", "locate"]

#: Where ``hf://`` points unless the environment variable HF_ENDPOINT says otherwise.
HF_ENDPOINT = "https://huggingface.co"

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
    """

    base: str
    query: str
    directory: Path | None
    manifest_names: tuple[str, ...]

    @property
    def is_remote(self) -> bool:
        return self.directory is None

    def url(self, path: str) -> str:
        """The full URL of a file of the model; `path` is a ``dataPath`` or the manifest's name."""
        # A percent sign is left alone, as in a browser's URL resolution.
        url = self.base + quote(path, safe="/%~!$&'()+,;=@")
        return f"{url}?{self.query}" if self.query else url

    def __str__(self) -> str:
        """The location as it may be shown: no password, no query."""
        return redact(self.base) if self.is_remote else str(self.directory)

    @property
    def cache_key(self) -> str:
        """A directory name for this model: readable, and unique by the digest at its end."""
        shown = redact(self.base)
        parts = urlsplit(shown)
        identity = urlunsplit((parts.scheme.lower(), parts.netloc.lower(), parts.path, "", ""))
        words = [w for w in re.split(r"[^A-Za-z0-9._-]+", parts.netloc + parts.path) if w.strip(".")]
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return f"{'--'.join(words)[:100].strip('.')}--{digest}"


def hf_endpoint(environ: Mapping[str, str]) -> str:
    """The Hugging Face endpoint in force, without a slash at its end."""
    return (environ.get("HF_ENDPOINT") or HF_ENDPOINT).rstrip("/")


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
        A URL that cannot be understood or is of an unknown scheme.
    """
    if not isinstance(source, str):
        return _local(Path(source))
    text = source.strip()
    scheme, separator, rest = text.partition("://")
    if not separator:
        if text.lower().startswith("file:"):
            return _file_url(text)
        if not text:
            raise ValueError("the source is empty: give a URL, hf://owner/name or a directory")
        return _local(Path(text))
    scheme = scheme.lower()
    if scheme == "hf":
        return _hugging_face(rest, hf_endpoint(environ))
    if scheme == "file":
        return _file_url(text)
    if scheme in ("http", "https"):
        return _page(text, hf_endpoint(environ)) or _http(text)
    raise ValueError(
        f"sources of the kind {scheme}:// are not supported: give an http(s) URL, hf://owner/name, "
        "file:// or a directory"
    )


def _http(url: str) -> Location:
    try:
        parts = urlsplit(url)
        valid = bool(parts.hostname) and parts.port != 0  # reading the port checks it
    except ValueError as error:
        raise ValueError(f"this URL cannot be read ({error}): {redact(url)}") from error
    if not valid:
        raise ValueError(f"this URL has no host: {redact(url)}")
    folder, _, name = parts.path.rpartition("/")
    if name.endswith(".json"):
        names: tuple[str, ...] = (unquote(name),)
    else:
        folder, names = parts.path.rstrip("/"), MANIFEST_NAMES
    base = urlunsplit((parts.scheme.lower(), parts.netloc, folder + "/", "", ""))
    return Location(base, parts.query, None, names)


def _hugging_face(path: str, endpoint: str) -> Location:
    match = re.fullmatch(r"(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)(?:@(?P<revision>[^/@?#]+))?(?P<rest>/[^?#]*)?", path)
    if match is None:
        raise ValueError(f"hf://{path.partition('?')[0]} is not hf://owner/name[@revision][/folder]")
    revision = quote(unquote(match["revision"] or "main"), safe="")
    folder = (match["rest"] or "/").rstrip("/") or ""
    url = f"{endpoint}/{match['owner']}/{match['name']}/resolve/{revision}{folder}"
    return _http(url if folder.endswith(".json") else url + "/")


def _page(url: str, endpoint: str) -> Location | None:
    """A Hugging Face repository's page, as copied from the browser's address line."""
    for host in {endpoint, HF_ENDPOINT}:
        if not url.lower().startswith(host.lower() + "/"):
            continue
        path = url[len(host) + 1 :].partition("?")[0].partition("#")[0].rstrip("/")
        match = re.fullmatch(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?:tree|blob)/(?P<revision>[^/]+)(?P<rest>/.*)?)?", path)
        if match is None:
            return None
        revision = f"@{match['revision']}" if match["revision"] else ""
        return _hugging_face(match["repo"] + revision + (match["rest"] or ""), host)
    return None


def _file_url(url: str) -> Location:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"a file:// URL names no host, this one does: {redact(url)}")
    return _local(Path(url2pathname(parts.path)))


def _local(path: Path) -> Location:
    path = path.expanduser()
    if path.is_dir():
        return Location("", "", path, MANIFEST_NAMES)
    if path.is_file():
        return Location("", "", path.parent, (path.name,))
    hint = "A URL begins with https://"
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", path.as_posix()):
        hint = f"If a Hugging Face repository is meant, write hf://{path.as_posix()}"
    elif path.suffix == ".json" and path.parent.is_dir():
        hint = f"Its directory has {', '.join(sorted(p.name for p in path.parent.glob('*.json'))) or 'no JSON file'}"
    raise NotFoundError(f"there is no such directory or file: {path}", hint=hint + ".")
