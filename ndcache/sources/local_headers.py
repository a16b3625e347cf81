"""The headers of safetensors files in a local directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ..errors import NotFoundError
from ..files.descriptors import check_shortage
from ..format.safetensors.header import header_end
from ..format.safetensors.headers import FileHeader, Headers
from ..format.safetensors.index import INDEX_SUFFIX, parse_index
from ..format.strict_json import MAX_MANIFEST_BYTES

__all__ = ["read_local_headers"]

#: Enough to recognise a web page, or a pointer to a file elsewhere.
_FIRST_BYTES = 256


def read_local_headers(directory: Path, name: str, file: BinaryIO, check: Callable[[], None]) -> Headers:
    """Read the headers of a model.

    Parameters
    ----------
    directory : pathlib.Path
    name : str
        The name of the index, or of the only file.
    file : binary file
        It, open for reading.
    check : callable
        Called now and then; may raise to cancel.

    Raises
    ------
    NotFoundError
        A file of the index is missing, or cannot be read.
    ManifestError
    """
    if not name.endswith(INDEX_SUFFIX):
        return Headers(name, (_read_header(file, directory, name),))
    data, url = file.read(MAX_MANIFEST_BYTES + 1), str(directory / name)
    names = parse_index(data, name=name, url=url, check=check).files
    files = tuple(_open_and_read(directory, each, name) for each in names)
    return Headers(name, files, FileHeader(name, data, len(data)))


def _open_and_read(directory: Path, name: str, index: str) -> FileHeader:
    path = directory.joinpath(*name.split("/"))
    try:
        with open(path, "rb") as file:
            return _read_header(file, directory, name)
    except OSError as error:
        check_shortage(error)
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise NotFoundError(f"there is no file {path}, which {index} names", shard=name) from error
        raise NotFoundError(f"{path} cannot be read: {error.strerror}", shard=name) from error


def _read_header(file: BinaryIO, directory: Path, name: str) -> FileHeader:
    start = file.read(_FIRST_BYTES)
    end = header_end(start, name, str(directory / name))
    start += file.read(max(0, end - len(start)))
    return FileHeader(name, start[:end], os.fstat(file.fileno()).st_size)
