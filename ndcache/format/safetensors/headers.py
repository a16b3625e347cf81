"""The headers of all files of a model, which make its manifest.

The cache keeps them in one file: a line of JSON about the files, then the index, if there is one, and the headers, all
as the server sent them. So a load that finds them unchanged needs no more requests than one of an MLC model, and other
processes get the manifest from these bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...errors import ManifestError, ManifestLayoutError, ManifestLimitError, ManifestSyntaxError, redact
from ..integrity import Integrity, check_names
from ..manifest import Manifest
from ..parse import MAX_INT, check_paths
from ..paths import STATE_DIRECTORY, flatten
from ..strict_json import MAX_KEPT_BYTES, MAX_MANIFEST_BYTES, MAX_RECORDS, quote
from .header import LENGTH_BYTES, Header, parse_header
from .index import Index, is_safetensors, parse_index

__all__ = ["HEADERS_DIRECTORY", "FileHeader", "Headers", "is_kept_header", "kept_as"]

#: ndcache's folder for the headers of the models in a directory.
HEADERS_DIRECTORY = "headers"
_FORMAT = 1


def is_kept_header(file: str) -> bool:
    """Return whether a file of a model's directory keeps headers."""
    return file.startswith(f"{STATE_DIRECTORY}/{HEADERS_DIRECTORY}/")


def kept_as(name: str) -> str:
    """Return the file in the cache that has the bytes of a manifest, or the headers of safetensors files."""
    return f"{STATE_DIRECTORY}/{HEADERS_DIRECTORY}/{flatten(name)}" if is_safetensors(name) else name


@dataclass(frozen=True)
class FileHeader:
    """The header of one file, or the whole index, and what the server said of it.

    Attributes
    ----------
    name : str
        The file's path below the model's directory.
    start : bytes
        The file's first bytes, to the end of the header; of an index, all.
    nbytes : int or None
        The file's size; None if the server did not say.
    sha256 : str or None
        The file's digest (Hugging Face).
    etag, last_modified : str or None
        The file's version.
    """

    name: str
    start: bytes = field(repr=False)
    nbytes: int | None
    sha256: str | None = None
    etag: str | None = None
    last_modified: str | None = None


@dataclass(frozen=True)
class Headers:
    """The headers of all files of a model.

    Attributes
    ----------
    name : str
        The name of the index, or of the only file.
    files : tuple of FileHeader
        In the order of their paths.
    index : FileHeader or None
    commit : str or None
        The commit that they are of (Hugging Face).
    is_chosen : bool
        Whether it was found in the model's directory, and not named by the user.
    """

    name: str
    files: tuple[FileHeader, ...]
    index: FileHeader | None = None
    commit: str | None = None
    is_chosen: bool = False

    def encode(self) -> bytes:
        """Return the bytes that the cache keeps.

        Raises
        ------
        ManifestLimitError
            They are more than a manifest may have.
        """
        facts = {
            "format": _FORMAT,
            "name": self.name,
            "commit": self.commit,
            "is_chosen": self.is_chosen,
            "index": None if self.index is None else _facts(self.index),
            "files": [_facts(file) for file in self.files],
        }
        # The eight bytes of a header's length are not text, and follow from the header.
        texts = [b"" if self.index is None else self.index.start, *(file.start[LENGTH_BYTES:] for file in self.files)]
        data = b"\n".join([json.dumps(facts, separators=(",", ":")).encode(), b"".join(texts)])
        if (total := sum(map(len, texts))) > MAX_MANIFEST_BYTES or len(data) > MAX_KEPT_BYTES:
            raise ManifestLimitError(
                f"the headers of all files have {total:,} bytes, and the limit is {MAX_MANIFEST_BYTES:,}",
                shard=self.name,
            )
        return data

    @classmethod
    def decode(cls, data: bytes) -> Headers:
        """Return the headers that `encode` has made these bytes of.

        Raises
        ------
        ManifestSyntaxError
            It has not.
        """
        line, _, rest = data.partition(b"\n")
        try:
            facts, position, files = json.loads(line), 0, []
            index = facts["index"]
            if index is not None:
                position = index["start"]
                index = FileHeader(**{**index, "start": rest[:position]})
            for fields in facts["files"]:
                length = fields["start"] - LENGTH_BYTES
                text = length.to_bytes(LENGTH_BYTES, "little") + rest[position : position + length]
                files.append(FileHeader(**{**fields, "start": text}))
                position += length
            if facts["format"] != _FORMAT or position != len(rest):
                raise ValueError("other lengths or another format")
            return cls(facts["name"], tuple(files), index, facts["commit"], facts["is_chosen"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise ManifestSyntaxError(f"the headers kept in the cache cannot be read: {error}") from error

    def manifest(
        self, url: Callable[[str], str], integrity: Integrity, check: Callable[[], None] = lambda: None
    ) -> Manifest:
        """Make the manifest: check each header, and that index and headers agree.

        Parameters
        ----------
        url : callable
            Return the URL of a file, for messages.
        integrity : mapping
            The digests that the caller requires.
        check : callable
            Called now and then; may raise to cancel.

        Raises
        ------
        ManifestError, UnsupportedDtypeError
        """
        headers = [
            parse_header(file.start, file.nbytes, name=file.name, url=url(file.name), sha256=file.sha256, check=check)
            for file in self.files
        ]
        index = None
        if self.index is not None:
            index = parse_index(self.index.start, name=self.name, url=url(self.name), check=check)
        try:
            if index is not None:
                _compare(index, headers)
            _check_files(headers, integrity, self.name)
        except ManifestError as error:
            error.shard, error.url = self.name, redact(url(self.name))
            raise
        shards = (replace(header.shard, required_digest=integrity.get(header.shard.data_path)) for header in headers)
        return Manifest(_metadata(index, headers), tuple(shards), self.name)


def _facts(file: FileHeader) -> dict[str, Any]:
    return {**asdict(replace(file, start=b"")), "start": len(file.start)}


def _metadata(index: Index | None, headers: list[Header]) -> Mapping[str, Any]:
    return headers[0].metadata if index is None else index.metadata


def _compare(index: Index, headers: list[Header]) -> None:
    """Check that each header has the tensors that the index says, and no other ones."""
    found = dict[str, str]()
    for header in headers:
        file = header.shard.data_path
        for record in header.shard.records:
            if record.name in found:
                raise ManifestLayoutError(
                    f"the files {found[record.name]!r} and {file!r} both have the tensor {quote(record.name)}"
                )
            found[record.name] = file
    for header in headers:
        file = header.shard.data_path
        names, expected = {record.name for record in header.shard.records}, index.files[file]
        if missing := expected - names:
            raise ManifestLayoutError(
                f"the index says that {file!r} has the tensor {quote(min(missing))}, and its header does not"
            )
        if names - expected:
            raise ManifestLayoutError(
                f"{file!r} has the tensor {quote(min(names - expected))}, and the index does not say so"
            )


def _check_files(headers: list[Header], integrity: Integrity, name: str) -> None:
    shards = [header.shard for header in headers]
    check_paths(shards)
    if sum(len(shard.records) for shard in shards) > MAX_RECORDS:
        raise ManifestLimitError(f"the model has more than {MAX_RECORDS} tensors")
    if sum(shard.nbytes for shard in shards) > MAX_INT:
        raise ManifestLayoutError("the sizes of the files add up to more than 2**63 bytes")
    check_names(shards, integrity, name)
