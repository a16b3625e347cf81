"""The files beside a model, where a server can list them: Hugging Face, and object storage."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from ..cloud.storage import ObjectStorage
from ..errors import AuthError, ProtocolError
from ..location import Location
from ..location.hub import HF_ENDPOINT, branch_url
from .client import Client

__all__ = ["ListedFile", "has_listing", "read_listing"]

#: The most bytes of a listing: of some 100,000 files.
_MAX_BYTES = 64 << 20
#: The URL of a folder: the endpoint, the repository, its revision and the path.
_FOLDER = re.compile(r"(.*?)/((?:datasets/|spaces/)?)([^/]+/[^/]+)/resolve/([^/]+)/(.*)")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class ListedFile:
    """A file in a listing.

    Attributes
    ----------
    nbytes : int or None
    sha256 : str or None
    """

    nbytes: int | None = None
    sha256: str | None = None


def has_listing(location: Location) -> bool:
    """Return whether the server of a model is one that can list files."""
    return ObjectStorage.has(location.base) or _hub_folder(location) is not None


def read_listing(location: Location, client: Client) -> Mapping[str, ListedFile] | None:
    """Return the files in a model's folder, and below it, by their paths; None if the server does not list them.

    Raises
    ------
    TransferError
    """
    if ObjectStorage.has(location.base):
        try:
            sizes = client.context.storage.list(location.base, client.context.cancellation)
        except AuthError:  # some buckets may be read, but not listed
            return None
        return {name: ListedFile(nbytes) for name, nbytes in sizes.items()}
    folder = _hub_folder(location)
    return None if folder is None else _read_hub(location, folder, client)


def _hub_folder(location: Location) -> re.Match[str] | None:
    is_hub = location.is_remote and location.identities[0].startswith(f"{HF_ENDPOINT}/")
    return _FOLDER.fullmatch(location.base) if is_hub else None


def _read_hub(location: Location, folder: re.Match[str], client: Client) -> dict[str, ListedFile]:
    endpoint, kind, repository, revision, path = folder.groups()
    branch = branch_url(location.base)
    commit = client.commits.get(branch) if branch else None  # that of the manifest
    url = f"{endpoint}/api/{kind or 'models/'}{repository}/revision/{commit or revision}?blobs=true"
    for attempt in client.attempts():
        with attempt, client.get(url, url, {}) as response:
            files = _parse(response.read(_MAX_BYTES), url)
    above = unquote(path)
    return {name[len(above) :]: file for name, file in files.items() if name.startswith(above)}


def _parse(data: bytes, url: str) -> dict[str, ListedFile]:
    try:
        files = {each["rfilename"]: _file(each) for each in json.loads(data)["siblings"]}
        if not all(isinstance(name, str) for name in files):
            raise ValueError("the name of a file is no text")
        return files
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProtocolError("the server's listing of files has an unknown form", url=url) from error


def _file(entry: Mapping[str, Any]) -> ListedFile:
    size, sha256 = entry.get("size"), (entry.get("lfs") or {}).get("sha256")
    return ListedFile(
        size if type(size) is int and size >= 0 else None,
        sha256 if isinstance(sha256, str) and _SHA256.fullmatch(sha256) else None,
    )
