"""An index of the digests of cached shards, so that equal bytes are found without looking at each model.

It is one text file for each scope, to which loads append what they are about to download, and which they read when they
have to download something. Its lines are only hints: whatever they lead to is checked. So nothing is lost if a line is
torn by a crash, is out of date or is missing, and processes need no lock.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote, unquote

from ..errors import UnsafePathError
from ..files.folder import Folder
from ..format.manifest import Shard
from ..format.paths import check_path
from ..urls.url import parse

__all__ = ["DigestIndex", "Place"]

#: The most bytes that are read. A larger file is rewritten without models that are gone.
_MAX_BYTES = 4 << 20
#: The most places that are tried for one shard.
_MAX_PLACES = 3
#: Digests that nobody can give another file. MD5 is believed only from the server that gave it.
_STRONG = ("sha256", "sha384", "sha512")


class Place(NamedTuple):
    """A place where the cache has, or had, a file: the name of the model's directory, and the path in it."""

    model: str
    name: str


@dataclass(frozen=True)
class DigestIndex:
    """The digests of one scope's shards.

    Attributes
    ----------
    folder : Folder
        Where the file lies.
    scope : Folder
        The folder of the scope, which has the models.
    identity : str
        The URL of the model that uses the index; see `Location.identities`.
    """

    folder: Folder
    scope: Folder
    identity: str

    def find(self, shards: Iterable[Shard]) -> dict[str, tuple[Place, ...]]:
        """Return where there may be equal files, the latest first, by the shards' ``dataPath``."""
        names: dict[tuple[str, ...], list[str]] = {}
        for shard in shards:
            for key in self._keys(shard):
                names.setdefault(key, []).append(shard.data_path)
        found: dict[str, list[Place]] = {}
        for line in reversed(self._read().splitlines()):
            if line.count(" ") != 5:
                continue  # torn
            *others, model, quoted = line.split(" ")
            for name in names.get(tuple(others), ()):
                place, places = Place(model, unquote(quoted)), found.setdefault(name, [])
                if _is_safe(place) and place not in places and len(places) < _MAX_PLACES:
                    places.append(place)
        return {name: tuple(places) for name, places in found.items()}

    def add(self, model: str, shards: Iterable[Shard]) -> None:
        """Note shards that a model has, or will have soon, if the cache can be written."""
        text = self._read()
        known = set(text.splitlines())
        lines = [f"{' '.join(key)} {model} {quote(shard.data_path)}" for shard in shards for key in self._keys(shard)]
        lines = [line for line in lines if line not in known]
        if not lines:
            return
        with contextlib.suppress(OSError):  # equal bytes are then downloaded again, and nothing else is lost
            self.folder.make()
            if len(text) >= _MAX_BYTES:
                self._rewrite(text)
            handle = self.folder.open_to_write(self._file_name, creates=True, appends=True)
            try:
                # In one piece, after what a crash may have left of a line.
                os.write(handle, "\n".join(["", *lines, ""]).encode())
            finally:
                os.close(handle)

    @property
    def _file_name(self) -> str:
        return f".{self.scope.names[-1]}.digests"

    def _keys(self, shard: Shard) -> list[tuple[str, ...]]:
        """Return what equal files have in common: algorithm, digest, size, and the server for a weak digest."""
        size = str(shard.nbytes)
        return [
            (algorithm, digest, size, "-" if algorithm in _STRONG else self._origin)
            for algorithm, digest in shard.digests.items()
        ]

    @property
    def _origin(self) -> str:
        scheme, host, port = parse(self.identity).origin
        return f"{scheme}://{host}:{port}"

    def _read(self) -> str:
        try:
            return (self.folder.read(self._file_name, _MAX_BYTES) or b"").decode("utf-8", "replace")
        except OSError:
            return ""

    def _rewrite(self, text: str) -> None:
        models = set(self.scope.entries())
        lines = [line for line in text.splitlines() if line.count(" ") == 5 and line.split(" ")[4] in models]
        kept = lines[len(lines) // 2 :] if len("\n".join(lines)) > _MAX_BYTES // 2 else lines
        new = f"{self._file_name}.{os.urandom(8).hex()}"
        with open(self.folder.create(new), "wb") as file:
            file.write("\n".join([*kept, ""]).encode())
        self.folder.replace(new, self.folder, self._file_name)


def _is_safe(place: Place) -> bool:
    """Return whether a line, which anybody may have written, leads to a file of a model."""
    try:
        check_path(place.name)
    except UnsafePathError:
        return False
    return bool(place.model) and "/" not in place.model and os.sep not in place.model and place.model[0] != "."
