"""Write tensors into shard files, and make their records for the manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import SizeMismatchError, UnsupportedDtypeError
from ..files.folder import sync
from .codec import encode_bf16
from .integrity import Hasher, new_hasher
from .numpy_dtypes import DTYPES, dtype_name

__all__ = ["Encoding", "HashedFile", "ShardWriter"]

Encoding: TypeAlias = Literal["f32-to-bf16", "raw"]
Bytes: TypeAlias = npt.NDArray[np.uint8]

#: Bytes of one write, and of one read when a file is copied.
_BUFFER_BYTES = 4 << 20


@dataclass
class HashedFile:
    """A new file whose bytes are hashed as they are written."""

    path: Path
    nbytes: int = 0
    _md5: Hasher = field(default_factory=lambda: new_hasher("md5"))

    @property
    def md5sum(self) -> str:
        return self._md5.hexdigest()

    def append(self, pieces: Iterable[Bytes]) -> None:
        # The file is opened for each tensor, so that no exception leaves it open.
        with open(self.path, "ab") as file:
            for piece in pieces:
                file.write(piece.data)
                self._md5.update(piece.data)
                self.nbytes += piece.size

    def sync(self) -> None:
        """Force the file to disk, so that a crash after its rename does not lose its bytes."""
        with open(self.path, "r+b") as file:
            sync(file.fileno())


class ShardWriter:
    """Write tensors into shards under temporary names, and keep the manifest's JSON of all shards.

    Parameters
    ----------
    directory : pathlib.Path
        The model directory.
    folder : pathlib.Path
        Where new files are written.
    shard_bytes : int
    shards : list of dict
        The manifest's JSON of the shards that exist already.

    Attributes
    ----------
    shards : list of dict
        The JSON of all shards; complete after `finish`.
    """

    def __init__(self, directory: Path, folder: Path, shard_bytes: int, shards: list[dict[str, Any]]) -> None:
        self.shards = shards
        self._directory, self._folder, self._shard_bytes = directory, folder, shard_bytes
        self._old = {
            record["name"]: (index, record) for index, shard in enumerate(shards) for record in shard["records"]
        }
        self._seen = set[str]()
        self._files: dict[str, Path] = {}
        self._paths = {shard["dataPath"] for shard in shards}
        self._number = len(shards)
        self._pending = HashedFile(folder / "pending")
        self._pending_records: list[dict[str, Any]] = []
        # Replaced tensors are kept here until all those of a shard are known.
        self._spool = HashedFile(folder / "replacements")
        self._replaced: dict[int, list[tuple[dict[str, Any], int]]] = {}

    def add(self, name: str, value: Any, encoding_of: Callable[[str], Encoding]) -> None:
        """Write one tensor."""
        _check_name(name)
        if name in self._seen:
            raise ValueError(f"the tensor {name!r} is given twice")
        self._seen.add(name)
        encoding = encoding_of(name)
        array, dtype = _array(name, value)
        as_bf16 = encoding == "f32-to-bf16" and dtype == "float32"
        record = {
            "name": name,
            "shape": list(array.shape),
            "dtype": dtype,
            "format": encoding,
            "nbytes": array.nbytes // 2 if as_bf16 else array.nbytes,
        }
        if name in self._old:
            self._replace(record, _encoded(array, as_bf16=as_bf16))
        else:
            self._append(record, _encoded(array, as_bf16=as_bf16))

    def add_stored(self, record: dict[str, Any], pieces: Iterable[Bytes]) -> None:
        """Write one new tensor that is encoded already.

        Parameters
        ----------
        record : dict
            The manifest's JSON of it, without its offset.
        pieces : iterable of array of uint8
            Its stored bytes.
        """
        self._append(record, pieces)

    def begin_shard(self) -> None:
        """Complete the shard that was begun, so that the next tensor is the first of another one."""
        if self._pending_records:  # not `if self._pending.nbytes`: that would lose a shard of empty tensors
            self._commit(self._pending, self._pending_records)
            self._pending, self._pending_records = HashedFile(self._folder / "pending"), []

    def finish(self) -> dict[str, Path]:
        """Complete the shards, and return the new files by their final names."""
        self.begin_shard()
        for index, replaced in self._replaced.items():
            self._rewrite(index, replaced)
        return self._files

    def _append(self, record: dict[str, Any], pieces: Iterable[Bytes]) -> None:
        nbytes = record["nbytes"]
        if self._pending.nbytes + nbytes >= self._shard_bytes:
            if nbytes * 2 >= self._shard_bytes:
                # A large tensor gets a shard of its own; the pending one waits for smaller tensors.
                alone = HashedFile(self._folder / "alone")
                alone.append(pieces)
                self._commit(alone, [{**record, "byteOffset": 0}])
                return
            self.begin_shard()
        self._pending_records.append({**record, "byteOffset": self._pending.nbytes})
        self._pending.append(pieces)

    def _commit(self, file: HashedFile, records: list[dict[str, Any]]) -> None:
        while (path := f"params_shard_{self._number}.bin") in self._paths:
            self._number += 1
        self._number += 1
        self._keep(file, path)
        self.shards.append(
            {
                "dataPath": path,
                "format": "raw-shard",
                "nbytes": file.nbytes,
                "records": records,
                "md5sum": file.md5sum,
            }
        )

    def _keep(self, file: HashedFile, path: str) -> None:
        file.sync()
        file.path = file.path.rename(self._folder / f"{len(self._files)}.done")
        self._files[path] = file.path

    # --- updates

    def _replace(self, record: dict[str, Any], pieces: Iterable[Bytes]) -> None:
        index, old = self._old[record["name"]]
        if old["nbytes"] != record["nbytes"]:
            raise ValueError(
                f"the tensor {record['name']!r} has {old['nbytes']:,} bytes in the directory and cannot be replaced by "
                f"one of {record['nbytes']:,}"
            )
        old.update(record)
        self._replaced.setdefault(index, []).append((old, self._spool.nbytes))
        self._spool.append(pieces)

    def _rewrite(self, index: int, replaced: Sequence[tuple[dict[str, Any], int]]) -> None:
        shard = self.shards[index]
        path = shard["dataPath"]
        file = HashedFile(self._folder / "rewritten")
        with open(self._directory / path, "rb") as old, open(self._spool.path, "rb") as new:
            if (size := os.fstat(old.fileno()).st_size) != shard["nbytes"]:
                raise SizeMismatchError(
                    f"{self._directory / path} has {size:,} bytes where the manifest says {shard['nbytes']:,}",
                    shard=path,
                    expected=shard["nbytes"],
                    received=size,
                    hint="It cannot be updated; write the model again with update=False.",
                    retryable=False,
                )
            file.append(_merged(old, new, replaced, size))
        self._keep(file, path)
        shard["md5sum"] = file.md5sum
        shard.pop("sha256sum", None)  # belongs to the old bytes


def _encoded(array: npt.NDArray[Any], *, as_bf16: bool) -> Iterator[Bytes]:
    """Yield the tensor's bytes as they are stored, in pieces: encoding takes several times the memory of its input."""
    flat = array.reshape(-1)
    step = _BUFFER_BYTES // array.itemsize
    for start in range(0, flat.size, step):
        piece = flat[start : start + step]
        yield (encode_bf16(piece) if as_bf16 else piece).view(np.uint8)


def _merged(
    old: BinaryIO, new: BinaryIO, replaced: Sequence[tuple[dict[str, Any], int]], nbytes: int
) -> Iterator[Bytes]:
    """Yield the bytes of `old`, with those of the `replaced` records taken from `new` at the given offsets."""
    end = 0
    for record, offset in sorted(replaced, key=lambda item: int(item[0]["byteOffset"])):
        if record["nbytes"]:
            yield from _read(old, end, record["byteOffset"] - end)
            yield from _read(new, offset, record["nbytes"])
            end = record["byteOffset"] + record["nbytes"]
    yield from _read(old, end, nbytes - end)


def _read(file: BinaryIO, offset: int, nbytes: int) -> Iterator[Bytes]:
    file.seek(offset)
    while nbytes:
        data = file.read(min(nbytes, _BUFFER_BYTES))
        if not data:
            raise SizeMismatchError(f"{file.name} became shorter while it was read", retryable=False)
        nbytes -= len(data)
        yield np.frombuffer(data, np.uint8)


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"the name of a tensor must be a string, not {name!r}")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the tensor name {name!r} is not Unicode text") from error


def _array(name: str, value: Any) -> tuple[npt.NDArray[Any], str]:
    """Return the tensor in C order and little-endian, and the manifest's name of its dtype."""
    if not hasattr(value, "__array__") and callable(getattr(value, "numpy", None)):
        value = value.numpy()  # a TVM tensor, which asarray would turn into an array of objects
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise UnsupportedDtypeError(f"tensor {name!r} cannot become a NumPy array: {error}") from error
    dtype = dtype_name(array.dtype)
    if dtype is None:
        raise UnsupportedDtypeError(
            f"tensor {name!r} has the dtype {array.dtype}, for which the format has no name",
            hint=f"Convert it to one of {', '.join(DTYPES)}.",
        )
    # Not ascontiguousarray, which makes scalars one-dimensional.
    return np.asarray(array, DTYPES[dtype], order="C"), dtype
