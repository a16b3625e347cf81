"""Write a model directory: shards and manifests, byte for byte as TVM writes them.

::

    <directory>/
        params_shard_0.bin ...     tensors one after another, without padding, up to `shard_bytes`
        tensor-cache.json          the manifest
        tensor-cache-b16.json      the same, but float32 stored as bfloat16 is described as bfloat16;
                                   only if there are such tensors

All files are written to a temporary folder in the directory, or beside it if it is new. When all are complete, they are
renamed: a new directory as a whole; in another one the shards first, the manifests last. A dump that fails or is killed
before the renames changes nothing.

Source of the format: ``dump_tensor_cache`` in apache-tvm's ``tvm/contrib/tvmjs.py``.
"""

from __future__ import annotations

import json
import operator
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import check_mapping, check_path, check_positive
from ..caller import public
from ..files.full_disk import names_full_disk
from ..files.staging import StagedFolder, staged_folder
from ..location import NDARRAY_CACHE_NAMES
from .manifest import FORMATS, Manifest
from .parse import parse_manifest
from .shard_writer import Encoding, HashedFile, ShardWriter

__all__ = ["dump", "encoding_by_name", "publish_dump", "remove_old_dump"]

_SHARD_NAME = re.compile(r"params_shard_[0-9]+\.bin")


@public
def dump(
    params: Mapping[str, Any] | Iterable[tuple[str, Any]],
    directory: str | os.PathLike[str],
    *,
    encode: Encoding | Mapping[str, Encoding] = "f32-to-bf16",
    shard_bytes: int = 32 << 20,
    metadata: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    update: bool = False,
) -> Manifest:
    """Write tensors as a model directory that ndcache, TVM, mlc_llm and web-llm can load.

    The files are byte for byte those that TVM's ``dump_tensor_cache`` writes for the same arguments. Only one tensor at
    a time is held in memory, so `params` may be an iterator over a model that is larger than memory.

    Parameters
    ----------
    params : mapping, or iterable of (name, array) pairs
        Anything that `numpy.asarray` or a ``numpy()`` method turns into an array: `Weights`, `GPUTensor`, torch and TVM
        tensors, in any byte order and with any strides. Their dtypes may be bool, integers, floats up to 64 bits,
        bfloat16, float8_e4m3fn and float8_e5m2.
    directory : path-like
        Created if it does not exist. Processes that have files of an older dump open can go on reading them.
    encode : {"f32-to-bf16", "raw"} or mapping of names to these
        ``"f32-to-bf16"`` stores float32 as bfloat16, rounded to nearest even. Other dtypes are always stored as they
        are. In a mapping, ``"*"`` stands for all other names.
    shard_bytes : int
        A shard has fewer bytes than this, unless it holds only one tensor. Default 32 MiB.
    metadata : mapping or callable, optional
        JSON values for the manifest's ``metadata``, or a function that returns them once all tensors are written.
    update : bool
        Add to the dump in the directory. A tensor replaces the one of the same name, which must have the same number of
        stored bytes; other tensors go into new shards. The metadata stays unless `metadata` is given. If False, files
        of an older dump (``params_shard_*.bin`` and manifests) are removed or overwritten.

    Returns
    -------
    Manifest
        The manifest of the directory.

    Raises
    ------
    UnsupportedDtypeError
        A tensor's dtype cannot be stored; its name is in the message.
    ValueError
        `encode` or `shard_bytes` has an invalid value, a name appears twice or is not Unicode text, or the tensor to be
        replaced has a different size.
    TypeError
        A name is not a string, or the metadata is not JSON.
    ManifestError
        ndcache could not load the result, or the manifest to be updated.
    DiskFullError
        The disk is full.
    OSError
        The directory cannot be written.

    Notes
    -----
    The bytes differ from TVM's where TVM would lose something: empty tensors at the end if no other tensor is in their
    shard, and NaN whose payload is in the lower half of its bits, which TVM turns into an infinity. In an update, TVM
    also leaves the old shape and dtype of a replaced tensor in the manifest.

    A process that is killed may leave a folder ``.*.tmp`` in the directory, or beside a new one. Nothing reads it.

    Examples
    --------
    >>> ndcache.dump({"embedding": np.zeros((1000, 64), np.float32)}, "model", metadata={"ParamSize": 1})
    >>> ndcache.load("model")["embedding"].shape
    (1000, 64)
    """
    encoding_of = encoding_by_name(encode)
    check_path("directory", directory)
    check_positive("shard_bytes", shard_bytes, "bytes")
    if isinstance(params, (str, bytes)) or not isinstance(params, Iterable):
        raise TypeError(f"params must be a mapping, or pairs of names and arrays, not {type(params).__name__}")
    if metadata is not None and not callable(metadata):
        check_mapping("metadata", metadata)
        json.dumps(dict(metadata))  # fails now, and not after hours of writing tensors
    directory = Path(directory)
    name, old = _old_manifest(directory) if update else (NDARRAY_CACHE_NAMES[0], None)
    with names_full_disk(directory), staged_folder(directory) as staged:
        writer = ShardWriter(directory, staged.work, operator.index(shard_bytes), old["records"] if old else [])
        for key, value in params.items() if isinstance(params, Mapping) else params:
            writer.add(key, value, encoding_of)
        files = writer.finish()
        if metadata is None:
            metadata = (old.get("metadata") if old else None) or {}
        metadata = dict(metadata() if callable(metadata) else metadata)
        return publish_dump(staged, files, writer.shards, metadata, name, keeps_others=update)


def publish_dump(
    staged: StagedFolder,
    files: Mapping[str, Path],
    shards: list[dict[str, Any]],
    metadata: dict[str, Any],
    name: str = "tensor-cache.json",
    *,
    keeps_others: bool = False,
) -> Manifest:
    """Write the manifests of shards, and let all appear in their directory.

    Parameters
    ----------
    staged : StagedFolder
    files : mapping of str to pathlib.Path
        The new shards, by their names.
    shards : list of dict
        The manifest's JSON of all shards.
    metadata : dict
    name : str
        The manifest's name.
    keeps_others : bool
        Do not remove shards of an older dump.

    Returns
    -------
    Manifest
        The manifest, as a load will read it.
    """
    manifests = _manifests({"metadata": metadata, "records": shards}, name)
    manifest = parse_manifest(manifests[name], name=name)
    written = dict(files)
    for path, data in manifests.items():  # last, so that they never name a missing file
        file = HashedFile(staged.work / path)
        file.append([np.frombuffer(data, np.uint8)])
        file.sync()
        written[path] = file.path
    staged.publish(written)
    if keeps_others:
        if _b16_name(name) not in manifests:
            (staged.path / _b16_name(name)).unlink(missing_ok=True)
    else:
        remove_old_dump(staged.path, {*manifests, *(shard.data_path for shard in manifest.shards)})
    return manifest


def encoding_by_name(encode: Encoding | Mapping[str, Encoding]) -> Callable[[str], Encoding]:
    """Return a function from a tensor's name to its encoding."""
    if isinstance(encode, str):
        if encode not in FORMATS:
            raise ValueError(f"encode must be 'f32-to-bf16', 'raw' or a mapping to these, not {encode!r}")
        return lambda name: encode
    if not isinstance(encode, Mapping):
        raise TypeError(f"encode must be a string or a mapping, not {encode!r}")
    for name, encoding in encode.items():
        if encoding not in FORMATS:
            raise ValueError(f"encode[{name!r}] must be 'f32-to-bf16' or 'raw', not {encoding!r}")

    def encoding_of(name: str) -> Encoding:
        encoding = encode.get(name, encode.get("*"))
        if encoding is None:
            raise ValueError(f"encode has neither {name!r} nor '*'")
        return encoding

    return encoding_of


def _old_manifest(directory: Path) -> tuple[str, dict[str, Any] | None]:
    """Return the name and checked JSON of the manifest to update; None in place of the JSON if there is none."""
    for name in NDARRAY_CACHE_NAMES:
        try:
            data = (directory / name).read_bytes()
        except FileNotFoundError:
            continue
        parse_manifest(data, name=name, url=str(directory / name))
        return name, json.loads(data)
    return NDARRAY_CACHE_NAMES[0], None


def _manifests(content: dict[str, Any], name: str) -> dict[str, bytes]:
    """Return the manifest files by name: `content`, and a second one if float32 is stored as bfloat16."""
    shards = [{**shard, "records": [*map(_as_stored, shard["records"])]} for shard in content["records"]]
    manifests = {name: content}
    if shards != content["records"]:
        manifests[_b16_name(name)] = {**content, "records": shards}
    return {path: json.dumps(value, indent=4).encode("ascii") for path, value in manifests.items()}


def _as_stored(record: dict[str, Any]) -> dict[str, Any]:
    if record["format"] == "f32-to-bf16" and record["dtype"] == "float32":
        return {**record, "format": "raw", "dtype": "bfloat16"}
    return record


def _b16_name(name: str) -> str:
    return name.removesuffix(".json") + "-b16.json"


def remove_old_dump(directory: Path, kept: Collection[str] = ()) -> None:
    """Remove the manifests of an older dump, and then its shards, but none of the files in `kept`."""
    manifests = {name for each in NDARRAY_CACHE_NAMES for name in (each, _b16_name(each))}
    shards = {name for name in os.listdir(directory) if _SHARD_NAME.fullmatch(name)}
    for name in (*(manifests - set(kept)), *(shards - set(kept))):
        (directory / name).unlink(missing_ok=True)
