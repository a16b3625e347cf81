"""Hugging Face: its endpoint, repositories, revisions and login."""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Mapping
from urllib.parse import quote, unquote

from ..errors import AuthError, redact
from ..urls.url import Origin, Url, UrlError, parse, parse_http, quoted

__all__ = [
    "HF_ENDPOINT",
    "LOGIN_VARIABLES",
    "MANIFEST_SUFFIXES",
    "Login",
    "at_commit",
    "branch_url",
    "canonical_identity",
    "commit_of",
    "hf_endpoint",
    "page_url",
    "repository_url",
    "revision_of",
    "short_source",
    "token_path",
]

#: The environment variables of Hugging Face's own tools that matter here.
LOGIN_VARIABLES = (
    *("HF_ENDPOINT", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "HF_HUB_DISABLE_IMPLICIT_TOKEN"),
    "XDG_CACHE_HOME",
)
#: Where ``hf://`` points unless the environment variable HF_ENDPOINT says otherwise.
HF_ENDPOINT = "https://huggingface.co"
#: A URL with such a name is that of a manifest, or of a safetensors file. Others are those of directories.
MANIFEST_SUFFIXES = (".json", ".safetensors")

_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
#: A revision has no slash, unless it is the full name of a git reference.
_REVISION = r"refs/(?:pr/[0-9]+|(?:convert|heads|tags)/[^/@?#]+)(?=/|$)|[^/@?#]+"
_SOURCE = re.compile(rf"(?P<repo>[^/@?#]+/[^/@?#]+)(?:@(?P<revision>{_REVISION}))?(?P<rest>/[^?#]*)?")
_PAGE = re.compile(
    rf"/(?P<repo>[\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve)/(?P<revision>{_REVISION.replace('@', '')})(?P<rest>/.*)?)?"
)
#: A file's URL: the part up to the revision, the revision, and the rest.
_FILE = re.compile(r"([^?#]*?/[^/?#]+/[^/?#]+/resolve/)([^/?#]+)(/.*)")
_COMMIT = re.compile("[0-9a-f]{40}")
#: The URL of a folder of a model.
_SHORT = re.compile(rf"{re.escape(HF_ENDPOINT)}/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)(?P<folder>/.*)")
#: The most characters of a token; usual ones have about forty.
_MAX_TOKEN = 4096
_MAX_TOKEN_FILE = 1 << 13


def hf_endpoint(environ: Mapping[str, str]) -> Url:
    """Return the Hugging Face endpoint to use, without a trailing slash.

    Raises
    ------
    ValueError
        HF_ENDPOINT is not an http(s) URL.
    """
    text = (environ.get("HF_ENDPOINT") or "").strip() or HF_ENDPOINT
    try:
        url = parse_http(text.rstrip("/"))
        if url.query or "#" in text or "?" in text:
            raise UrlError("it has a query")
    except UrlError as error:
        raise ValueError(f"HF_ENDPOINT cannot be used, {error}: {redact(text)}") from None
    return url


def repository_url(path: str, endpoint: Url, revision: str | None = None) -> str:
    """Return the URL of the folder or manifest that ``hf://`` followed by `path` names, at `revision` if it names none.

    Raises
    ------
    ValueError
        `path` is not ``owner/name[@revision][/folder]``, or has another revision.
    """
    match = _SOURCE.fullmatch(path)
    if match is None:
        raise _not_understood(f"hf://{path}")
    return _file_url(endpoint, match, revision)


def page_url(url: Url, endpoint: Url, revision: str | None = None) -> str | None:
    """Return the URL of the files if `url` is that of a page for browsers, else None; see `repository_url`."""
    if url.is_object:
        return None
    for site in (endpoint, parse(HF_ENDPOINT)):
        is_site = url.origin == site.origin or (site.host in _HOSTS and url.host in _HOSTS and not url.port)
        if not is_site or not url.path.startswith(f"{site.path}/") or url.user is not None:
            continue
        match = _PAGE.fullmatch(url.path[len(site.path) :].rstrip("/"))
        if match is not None:
            return _file_url(site, match, revision)
    return None


def canonical_identity(url: Url, endpoint: Url) -> str | None:
    """Return the URL at huggingface.co of a file or folder at another endpoint, or None if `url` is neither."""
    if url.origin != endpoint.origin or not url.path.startswith(f"{endpoint.path}/"):
        return None
    path = url.path[len(endpoint.path) :]
    return HF_ENDPOINT + path if re.match("(/datasets|/spaces)?/[^/]+/[^/]+/resolve/[^/]+/", path) else None


def at_commit(url: str, commit: str) -> str:
    """Return a file's URL at `commit` instead of its revision."""
    match = _FILE.fullmatch(url)
    return url if match is None else f"{match[1]}{commit}{match[3]}"


def branch_url(url: str) -> str | None:
    """Return the prefix of the URLs of all files of the same branch, or None if `url` names a commit, or no branch."""
    match = _FILE.fullmatch(url)
    return None if match is None or _COMMIT.fullmatch(match[2]) else match[1] + match[2]


def revision_of(url: str) -> str | None:
    """Return the branch, tag or commit in the URL of a file or folder at huggingface.co, or None if it is elsewhere."""
    match = _FILE.fullmatch(url) if url.startswith(f"{HF_ENDPOINT}/") else None
    return None if match is None else unquote(match[2])


def short_source(url: str) -> str | None:
    """Return what to type for a folder at huggingface.co: ``hf://owner/name``; None if the URL is another one."""
    match = _SHORT.fullmatch(url)
    if match is None:
        return None
    revision, folder = unquote(match["revision"]), unquote(match["folder"].rstrip("/"))
    return f"hf://{match['repo']}" + (f"@{revision}" if revision != "main" else "") + folder


def commit_of(headers: Mapping[str, str]) -> str | None:
    """Return the commit that the headers of a response name, or None."""
    commit = headers.get("X-Repo-Commit", "").strip()
    return commit if _COMMIT.fullmatch(commit) else None


def _file_url(endpoint: Url, match: re.Match[str], wanted: str | None) -> str:
    repo, folder = match["repo"], (match["rest"] or "").rstrip("/")
    revision = unquote(match["revision"] or "") or wanted or "main"
    if wanted not in (None, revision):
        raise ValueError(f"the source names the revision {revision!r}, and the option another one, {wanted!r}")
    parts = [*repo.split("/"), *re.split(r"[/\\]", unquote(revision + folder))]
    is_repo = re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", repo)
    if not is_repo or any(part in (".", "..") or not part.isprintable() for part in parts):
        raise _not_understood(f"hf://{repo}@{revision}{folder}")
    url = f"{endpoint.secret_root}{endpoint.path}/{repo}/resolve/{quote(revision, safe='')}{quoted(folder)}"
    return url if folder.endswith(MANIFEST_SUFFIXES) else url + "/"


def _not_understood(text: str) -> ValueError:
    return ValueError(f"{redact(text)} is not hf://owner/name[@revision][/folder]")


class Login:
    """The token in an environment, only for the origin of the Hugging Face endpoint.

    It is HF_TOKEN, else the one that ``hf auth login`` wrote: to HF_TOKEN_PATH, else to ``token`` in HF_HOME, else
    in ``huggingface`` in XDG_CACHE_HOME or ``~/.cache``. With HF_HUB_DISABLE_IMPLICIT_TOKEN there is none. This follows
    huggingface_hub. The file is read before the first request to the endpoint.

    Parameters
    ----------
    environ : mapping
        The environment variables.

    Attributes
    ----------
    environ : dict of str to str
        Those of them that matter, as they were.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        # One by one: copying a large environment takes longer than loading a small model.
        self.environ = {name: value for name in LOGIN_VARIABLES if (value := environ.get(name)) is not None}

    def token(self, origin: Origin) -> str | None:
        """Return the token for `origin`, or None.

        Raises
        ------
        AuthError
            The token has characters that a header must not have, or is too long.
        """
        if origin != self._origin:
            return None
        token, where = self._token
        if len(token) > _MAX_TOKEN or not re.fullmatch(r"[\x21-\x7e]*", token):
            raise AuthError(
                f"the Hugging Face token in {where} cannot be sent: it has a space or a character that is not ASCII, "
                f"or more than {_MAX_TOKEN:,} characters",
                hint="Copy it again from https://huggingface.co/settings/tokens, or unset it.",
            )
        return token or None

    @functools.cached_property
    def _origin(self) -> Origin:
        return hf_endpoint(self.environ).origin

    @functools.cached_property
    def _token(self) -> tuple[str, str]:
        """Return the token, empty if there is none, and the place it comes from."""
        if self.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in ("1", "ON", "YES", "TRUE"):
            return "", ""
        if token := self.environ.get("HF_TOKEN", "").strip():
            return token, "HF_TOKEN"
        path = token_path(self.environ)
        return _read(path).strip(), path


def token_path(environ: Mapping[str, str]) -> str:
    """Return the path of the file that ``hf auth login`` writes."""
    caches = environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = environ.get("HF_HOME") or os.path.join(caches, "huggingface")
    path = environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")
    return os.path.expandvars(os.path.expanduser(path))


def _read(path: str) -> str:
    """Return the text of a small file, or an empty string if it cannot be read or is not a file."""
    if path.startswith("~"):
        return ""  # the home directory is unknown
    try:
        # Without waiting, as it may be a pipe. Links are followed, as secrets mounted into a container are links.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError):
        return ""
    try:
        is_file = stat.S_ISREG(os.fstat(handle).st_mode)
        return os.read(handle, _MAX_TOKEN_FILE).decode("utf-8", "replace") if is_file else ""
    except OSError:
        return ""
    finally:
        os.close(handle)
