"""Arrays → a model directory: shards and manifests, byte for byte as TVM writes them.

::

    <directory>/
        params_shard_0.bin ...     tensors one after another, without padding, up to `shard_bytes`
        tensor-cache.json          the manifest
        tensor-cache-b16.json      the same shards, float32 stored as bfloat16 described as bfloat16;
                                   only where there are such tensors

Everything is written to a temporary folder inside the directory, and gets its name only when all of it is there: the
shards first, the manifests last. A dump that fails or is killed before that leaves what was there as it was.

Source of the format: ``dump_tensor_cache`` in apache-tvm's ``tvm/contrib/tvmjs.py``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import operator
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import SizeMismatchError, UnsupportedDtypeError
from ..files.folder import sync
from ..location.locate import MANIFEST_NAMES
from .codec import encode_bf16
from .dtypes import DTYPES, dtype_name
from .manifest import Manifest
from .parse import parse_manifest

__all__ = ["dump"]

Encoding: TypeAlias = Literal["f32-to-bf16", "raw"]
Bytes: TypeAlias = npt.NDArray[np.uint8]

_ENCODINGS = ("f32-to-bf16", "raw")
_SHARD_NAME = re.compile(r"params_shard_[0-9]+\.bin")
#: One write, or one copy of a file's bytes.
_BUFFER_BYTES = 4 << 20


def dump(
    params: Mapping[str, Any] | Iterable[tuple[str, Any]],
    directory: str | os.PathLike[str],
    *,
    encode: Encoding | Mapping[str, Encoding] = "f32-to-bf16",
    shard_bytes: int = 32 << 20,
    metadata: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    update: bool = False,
) -> Manifest:
    """Write tensors as a model directory that ndcache, TVM, mlc_llm and web-llm load.

    The files are those that TVM's ``dump_tensor_cache`` writes for the same arguments, byte for byte. No more than one
    tensor is held in memory, so `params` may be an iterator over a model that is larger than that.

    Parameters
    ----------
    params : mapping, or iterable of (name, array) pairs
        Anything that `numpy.asarray` or a ``numpy()`` method makes an array of: `Weights` and `GPUTensor`, torch and
        TVM tensors. Any byte order and strides; bool, integers, floats up to 64 bits, bfloat16, float8_e4m3fn and
        float8_e5m2.
    directory : path-like
        Made if it is not there. A dump that lies there already stays readable to whoever has its files open.
    encode : {"f32-to-bf16", "raw"} or mapping of names to these
        ``"f32-to-bf16"`` stores float32 as bfloat16, rounded to nearest even; other dtypes are stored as they are in
        either case. In a mapping, ``"*"`` stands for all names that it does not have.
    shard_bytes : int
        A shard has fewer bytes than this, unless it holds one tensor alone. Default 32 MiB.
    metadata : mapping or callable, optional
        JSON values for the manifest's ``metadata``, or a function that gives them once all tensors are written.
    update : bool
        Add to the dump that lies there: a tensor of the same name and number of stored bytes takes the old one's place,
        others go into new shards, and the metadata stays unless it is given. If False, what an older dump left
        (``params_shard_*.bin`` and the ``-b16`` manifest) is removed unless it is overwritten.

    Returns
    -------
    Manifest
        Of what is in the directory now.

    Raises
    ------
    UnsupportedDtypeError
        A tensor's dtype cannot be stored; its name is in the message.
    ValueError
        `encode` or `shard_bytes` is none of the above, a name appears twice or is no Unicode text, or the tensor to be
        replaced has another size.
    TypeError
        A name is not a string, or the metadata is not JSON.
    ManifestError
        The result, or the manifest to be updated, could not be loaded.
    OSError
        The disk is full, or the directory cannot be written.

    Notes
    -----
    The bytes differ from TVM's where TVM would lose something: empty tensors at the end that have no other in their
    shard, and a NaN whose payload lies in the lower half of its bits, which TVM turns into an infinity. When it
    updates, TVM also leaves the old shape and dtype of a replaced tensor in the manifest.

    Of a killed process a folder ``.dump-*`` may stay in the directory; nothing reads it.

    Examples
    --------
    >>> ndcache.dump({"embedding": np.zeros((1000, 64), np.float32)}, "model", metadata={"ParamSize": 1})
    >>> ndcache.load("model")["embedding"].shape
    (1000, 64)
    """
    encoding_of = _encoding_of(encode)
    shard_bytes = operator.index(shard_bytes)
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is a positive number of bytes, not {shard_bytes}")
    if metadata is not None and not callable(metadata):
        json.dumps(dict(metadata))  # before hours are spent on tensors
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    name, old = _old_manifest(directory) if update else (MANIFEST_NAMES[0], None)
    with tempfile.TemporaryDirectory(prefix=".dump-", dir=directory) as folder:
        writer = _Writer(directory, Path(folder), shard_bytes, old["records"] if old else [])
        for key, value in params.items() if isinstance(params, Mapping) else params:
            writer.add(key, value, encoding_of)
        files = writer.finish()
        if metadata is None:
            metadata = (old.get("metadata") if old else None) or {}
        content = {"metadata": dict(metadata() if callable(metadata) else metadata), "records": writer.shards}
        manifests = _manifests(content, name)
        manifest = parse_manifest(manifests[name], name=name)
        for path, data in manifests.items():  # last, so that they name no file that is not there
            file = _File(Path(folder) / path)
            file.append([np.frombuffer(data, np.uint8)])
            file.sync()
            files[path] = file.path
        for path, temporary in files.items():
            os.replace(temporary, directory / path)
    _remove_stale(directory, manifest, manifests, shards_too=not update)
    return manifest


# --- arguments ----------------------------------------------------------------------------------------


def _encoding_of(encode: Encoding | Mapping[str, Encoding]) -> Callable[[str], Encoding]:
    """The encoding as a function of the tensor's name."""
    if isinstance(encode, str):
        if encode not in _ENCODINGS:
            raise ValueError(f"encode is 'f32-to-bf16', 'raw' or a mapping to these, not {encode!r}")
        return lambda name: encode
    if not isinstance(encode, Mapping):
        raise TypeError(f"encode is a string or a mapping, not {encode!r}")
    for name, encoding in encode.items():
        if encoding not in _ENCODINGS:
            raise ValueError(f"encode[{name!r}] is 'f32-to-bf16' or 'raw', not {encoding!r}")

    def of(name: str) -> Encoding:
        encoding = encode.get(name, encode.get("*"))
        if encoding is None:
            raise ValueError(f"encode has neither {name!r} nor '*'")
        return encoding

    return of


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"a tensor's name is a string, not {name!r}")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the tensor name {name!r} is not Unicode text") from error


def _array(name: str, value: Any) -> tuple[npt.NDArray[Any], str]:
    """The tensor in C order and the manifest's byte order, and its dtype's name there."""
    if not hasattr(value, "__array__") and callable(getattr(value, "numpy", None)):
        value = value.numpy()  # a TVM tensor, of which asarray makes an array of objects
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise UnsupportedDtypeError(f"tensor {name!r} cannot become a NumPy array: {error}") from error
    dtype = dtype_name(array.dtype)
    if dtype is None:
        raise UnsupportedDtypeError(
            f"tensor {name!r} has the dtype {array.dtype}, which the format has no name for",
            hint=f"Convert it to one of {', '.join(DTYPES)}.",
        )
    # order="C" and not ascontiguousarray, which makes a scalar one-dimensional
    return np.asarray(array, DTYPES[dtype], order="C"), dtype


# --- writing ------------------------------------------------------------------------------------------


@dataclass
class _File:
    """A new file whose bytes are hashed on their way."""

    path: Path
    nbytes: int = 0
    _md5: Any = field(default_factory=lambda: hashlib.md5(usedforsecurity=False))

    @property
    def md5sum(self) -> str:
        return str(self._md5.hexdigest())

    def append(self, pieces: Iterable[Bytes]) -> None:
        # Opened anew for each tensor, so that no exception leaves it open.
        with open(self.path, "ab") as file:
            for piece in pieces:
                file.write(piece.data)
                self._md5.update(piece.data)
                self.nbytes += piece.size

    def sync(self) -> None:
        """Have it on disk, so that a crash after the renaming finds its bytes."""
        with open(self.path, "r+b") as file:
            sync(file.fileno())


class _Writer:
    """Tensors → shards under temporary names, and what the manifest will say of them.

    Parameters
    ----------
    directory : pathlib.Path
        The model directory.
    folder : pathlib.Path
        Where new files go.
    shard_bytes : int
    shards : list of dict
        The manifest's JSON of the shards that are there already.

    Attributes
    ----------
    shards : list of dict
        The same of all shards, complete after `finish`.
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
        self._pending = _File(folder / "pending")
        self._pending_records: list[dict[str, Any]] = []
        # Tensors that take the place of others, until it is known which of a shard's are replaced.
        self._spool = _File(folder / "replacements")
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
            self._replace(record, _stored(array, as_bf16=as_bf16))
        else:
            self._append(record, _stored(array, as_bf16=as_bf16))

    def finish(self) -> dict[str, Path]:
        """Complete the shards; the new files by the names they are to have."""
        if self._pending_records:  # not: if there are bytes, or a shard of empty tensors would be lost
            self._commit(self._pending, self._pending_records)
        for index, replaced in self._replaced.items():
            self._rewrite(index, replaced)
        return self._files

    def _append(self, record: dict[str, Any], pieces: Iterable[Bytes]) -> None:
        nbytes = record["nbytes"]
        if self._pending.nbytes + nbytes >= self._shard_bytes:
            if nbytes * 2 >= self._shard_bytes:
                # A shard of its own, while the pending one waits for smaller tensors.
                alone = _File(self._folder / "alone")
                alone.append(pieces)
                self._commit(alone, [{**record, "byteOffset": 0}])
                return
            self._commit(self._pending, self._pending_records)
            self._pending, self._pending_records = _File(self._folder / "pending"), []
        self._pending_records.append({**record, "byteOffset": self._pending.nbytes})
        self._pending.append(pieces)

    def _commit(self, file: _File, records: list[dict[str, Any]]) -> None:
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

    def _keep(self, file: _File, path: str) -> None:
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
        file = _File(self._folder / "rewritten")
        with open(self._directory / path, "rb") as old, open(self._spool.path, "rb") as new:
            if (size := os.fstat(old.fileno()).st_size) != shard["nbytes"]:
                raise SizeMismatchError(
                    f"{self._directory / path} has {size:,} bytes where the manifest says {shard['nbytes']:,}",
                    shard=path,
                    expected=shard["nbytes"],
                    received=size,
                    hint="It cannot be updated; write it anew with update=False.",
                )
            file.append(_merged(old, new, replaced, size))
        self._keep(file, path)
        shard["md5sum"] = file.md5sum
        shard.pop("sha256sum", None)  # of the old bytes


def _stored(array: npt.NDArray[Any], *, as_bf16: bool) -> Iterator[Bytes]:
    """The tensor's bytes in the shard, in pieces: the encoder takes several times the memory of what it is given."""
    flat = array.reshape(-1)
    step = _BUFFER_BYTES // array.itemsize
    for start in range(0, flat.size, step):
        piece = flat[start : start + step]
        yield (encode_bf16(piece) if as_bf16 else piece).view(np.uint8)


def _merged(
    old: BinaryIO, new: BinaryIO, replaced: Sequence[tuple[dict[str, Any], int]], nbytes: int
) -> Iterator[Bytes]:
    """The bytes of `old`, but for the records of `replaced`, which lie in `new` at the offsets beside them."""
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
            raise SizeMismatchError(f"{file.name} became shorter while it was read")
        nbytes -= len(data)
        yield np.frombuffer(data, np.uint8)


# --- manifests ----------------------------------------------------------------------------------------


def _old_manifest(directory: Path) -> tuple[str, dict[str, Any] | None]:
    """The name and JSON of the manifest to be updated, checked; the JSON is None if there is no manifest."""
    for name in MANIFEST_NAMES:
        try:
            data = (directory / name).read_bytes()
        except FileNotFoundError:
            continue
        parse_manifest(data, name=name, url=str(directory / name))
        return name, json.loads(data)
    return MANIFEST_NAMES[0], None


def _manifests(content: dict[str, Any], name: str) -> dict[str, bytes]:
    """The manifest files by name: `content` itself, and if float32 is stored as bfloat16, the one that says so."""
    described = copy.deepcopy(content)
    found = False
    for shard in described["records"]:
        for record in shard["records"]:
            if record["format"] == "f32-to-bf16" and record["dtype"] == "float32":
                record["format"], record["dtype"] = "raw", "bfloat16"
                found = True
    manifests = {name: content, _b16_name(name): described} if found else {name: content}
    return {path: json.dumps(value, indent=4).encode("ascii") for path, value in manifests.items()}


def _b16_name(name: str) -> str:
    return name.removesuffix(".json") + "-b16.json"


def _remove_stale(directory: Path, manifest: Manifest, written: Mapping[str, bytes], *, shards_too: bool) -> None:
    """Remove what an older dump left and nothing refers to any more."""
    if _b16_name(manifest.name) not in written:
        (directory / _b16_name(manifest.name)).unlink(missing_ok=True)
    if not shards_too:
        return
    kept = {shard.data_path for shard in manifest.shards}
    for path in directory.iterdir():
        if _SHARD_NAME.fullmatch(path.name) and path.name not in kept:
            path.unlink(missing_ok=True)
