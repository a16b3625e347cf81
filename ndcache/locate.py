"""What the user typed → where the model is.

``https://host/model/``, ``https://host/model/tensor-cache-b16.json``     as it is
``hf://owner/name[@revision][/folder]``, the page's URL                  → ``…/resolve/revision/``
``file:///path``, ``path``, ``path/tensor-cache.json``                   a local directory, read in place
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import url2pathname

from .errors import NotFoundError, redact

__all__ = ["HF_ENDPOINT", "MANIFEST_NAMES", "Location", "hf_endpoint", "locate"]

#: Where ``hf://`` points unless the environment variable HF_ENDPOINT says otherwise.
HF_ENDPOINT = "https://huggingface.co"

_HF_ALIASES = ("https://hf.co", "https://www.huggingface.co", "http://huggingface.co")

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

    base: str = field(repr=False)
    query: str = field(repr=False)
    directory: Path | None
    manifest_names: tuple[str, ...]

    @property
    def is_remote(self) -> bool:
        """Whether it is on a server."""
        return self.directory is None

    def url(self, path: str) -> str:
        """The full URL of a file of the model; `path` is a ``dataPath`` or the manifest's name."""
        url = self.base + _quoted(path)
        return f"{url}?{self.query}" if self.query else url

    def __str__(self) -> str:
        """The location as it may be shown: no password, no query."""
        return redact(self.base) if self.is_remote else str(self.directory)

    @property
    def cache_key(self) -> str:
        """A directory name for this model: readable, and unique by the digest at its end."""
        parts = urlsplit(self.base)
        host = parts.netloc.rpartition("@")[2].lower()
        default_port = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
        # Neither the default port nor an empty one ("host:") makes it another server.
        host = host.removesuffix(default_port).removesuffix(":")
        identity = urlunsplit((parts.scheme, host, parts.path, "", ""))
        words = [w for w in re.split(r"[^A-Za-z0-9._-]+", host + parts.path) if w.strip(".-")]
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return f"{'--'.join(words)[:100].strip('.-') or 'model'}--{digest}"


_SAFE = "/%~!$&'()*+,:;=@[]"  # with letters, digits and "-._", what requests leaves as it is, but for "#" and "?"


def _quoted(path: str) -> str:
    """`path` for a URL. A percent sign that encodes something is left alone, as in a browser's URL resolution."""
    return re.sub("%(?![0-9A-Fa-f]{2})", "%25", quote(path, safe=_SAFE))


def hf_endpoint(environ: Mapping[str, str]) -> str:
    """The Hugging Face endpoint in force, without a slash at its end."""
    endpoint = (environ.get("HF_ENDPOINT") or HF_ENDPOINT).rstrip("/")
    try:
        urlsplit(endpoint).port  # noqa: B018 - reading it checks it
    except ValueError:
        raise ValueError(f"HF_ENDPOINT is not a URL: {redact(endpoint)}") from None
    return endpoint


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
    if not text:
        raise ValueError("the source is empty: give a URL, hf://owner/name or a directory")
    scheme, separator, rest = text.partition("://")
    if not separator:
        if text.lower().startswith("file:"):
            return _file_url(text)
        return _local(Path(text))
    scheme = scheme.lower()
    if scheme == "hf":
        return _hugging_face(rest, hf_endpoint(environ))
    if scheme == "file":
        return _file_url(text)
    if scheme in ("http", "https"):
        return _page(text, hf_endpoint(environ)) or _http(text)
    kind = f"{scheme}://" if re.fullmatch(r"[a-z][a-z0-9+.-]{0,20}", scheme) else "this"
    raise ValueError(
        f"sources of the kind {kind} are not supported: give an http(s) URL, hf://owner/name, file:// or a directory"
    )


def _http(url: str) -> Location:
    try:
        parts = urlsplit(url)
        port = parts.port  # reading it checks it
    except ValueError:
        # Not from its cause: that one quotes what stands at the port's place, be it a part of a password.
        raise ValueError(f"the host or port of this URL cannot be read: {redact(url)}") from None
    if not parts.hostname or re.search(r'[\s\\<>^|{}"`\ud800-\udfff]', parts.hostname):
        raise ValueError(f"this URL has no host, or one that cannot be: {redact(url)}")
    if port == 0:
        raise ValueError(f"this URL has the port 0: {redact(url)}")
    folder, _, name = parts.path.rpartition("/")
    if name.endswith(".json"):
        names: tuple[str, ...] = (_file_name(name),)
    else:
        folder, names = parts.path.rstrip("/"), MANIFEST_NAMES
    base = urlunsplit((parts.scheme.lower(), parts.netloc, _quoted(folder) + "/", "", ""))
    return Location(base, parts.query, None, names)


def _file_name(quoted: str) -> str:
    """The manifest's name, which becomes a file name in the cache: decoded only if no harm can come of that."""
    name = unquote(quoted)
    return name if re.fullmatch(r"[\w .~+@=,()-]+", name) else quote(quoted, safe="%")


def _hugging_face(path: str, endpoint: str) -> Location:
    match = re.fullmatch(r"(?P<repo>[^/@?#]+/[^/@?#]+)(?:@(?P<revision>[^/@?#]+))?(?P<rest>/[^?#]*)?", path)
    if match is None:
        shown = redact(f"hf://{path}")
        raise ValueError(f"{shown} is not hf://owner/name[@revision][/folder]")
    return _repository(endpoint, match["repo"], match["revision"] or "main", match["rest"] or "")


def _repository(endpoint: str, repo: str, revision: str, rest: str) -> Location:
    """A folder, or a manifest, of a Hugging Face repository; `revision` and `rest` may be percent-encoded."""
    folder, revision = rest.rstrip("/"), unquote(revision)
    parts = [*repo.split("/"), *re.split(r"[/\\]", unquote(revision + folder))]
    if not re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", repo) or any(part in (".", "..") for part in parts):
        shown = redact(f"hf://{repo}@{revision}{folder}")
        raise ValueError(f"{shown} is not hf://owner/name[@revision][/folder]")
    if "://" not in endpoint:
        raise ValueError(f"HF_ENDPOINT is not a URL: {redact(endpoint)}")
    url = f"{endpoint}/{repo}/resolve/{quote(revision, safe='')}{_quoted(folder)}"
    return _http(url if folder.endswith(".json") else url + "/")


def _page(url: str, endpoint: str) -> Location | None:
    """A Hugging Face repository's page, as copied from the browser's address line."""
    for page in (endpoint, HF_ENDPOINT, *_HF_ALIASES):
        if not url.lower().startswith(page.lower() + "/"):
            continue
        host = HF_ENDPOINT if page in _HF_ALIASES else page
        path = url[len(page) + 1 :].partition("?")[0].partition("#")[0].rstrip("/")
        match = re.fullmatch(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?:tree|blob)/(?P<revision>[^/]+)(?P<rest>/.*)?)?", path)
        if match is not None:
            return _repository(host, match["repo"], match["revision"] or "main", match["rest"] or "")
    return None


def _file_url(url: str) -> Location:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"a file:// URL names no host, this one does: {redact(url)}")
    return _local(Path(url2pathname(parts.path)))


def _local(path: Path) -> Location:
    try:
        path = path.expanduser()
        if path.is_dir():
            return Location("", "", path, MANIFEST_NAMES)
        if path.is_file():
            return Location("", "", path.parent, (path.name,))
        hint = _meant(path)
    except (OSError, RuntimeError, ValueError) as error:
        # No such home directory, a name longer than any file's, no permission to look, a NUL.
        raise NotFoundError(f"this is not a directory or file: {_shown(path)} ({_reason(error)})") from error
    raise NotFoundError(f"there is no such directory or file: {_shown(path)}", hint=hint)


def _meant(path: Path) -> str | None:
    """What the user may have meant by a local path that is not there."""
    text = path.as_posix()
    if match := re.match(r"(?i)(https?|hf):/?(?!/)", text):
        return f"A URL has two slashes after the colon: {match[1].lower()}://."
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
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w.-]+)?", text):
        return f"If a Hugging Face repository is meant, write hf://{text}."
    return None


def _shown(path: Path) -> str:
    text = redact(str(path))
    return text if len(text) <= 300 else text[:297] + "..."


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
