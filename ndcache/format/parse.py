"""Parse a manifest file, and check all of it before memory is allocated or a shard is requested."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, pairwise
from operator import add, attrgetter, itemgetter, le, mul
from typing import Any

from ..errors import (
    ManifestError,
    ManifestLayoutError,
    ManifestLimitError,
    ManifestSyntaxError,
    UnsafePathError,
    redact,
)
from .dtypes import ITEM_SIZES, canonical_name
from .json_reader import TOO_LARGE, JsonReader
from .manifest import FORMATS, Manifest, Record, Shard, make_records
from .paths import check_path, collision_key
from .strict_json import MAX_RECORDS, MAX_SHARDS, get_field, has_surrogate, json_type, quote

__all__ = ["MAX_DIMENSIONS", "MAX_INT", "check_metadata", "check_paths", "parse_manifest"]

_MAX_DEPTH = 64  # of nesting in metadata; shallow enough that it can be pickled, copied and compared everywhere
#: The largest size of a file, and of a dimension.
MAX_INT = (1 << 63) - 1
#: The most dimensions that every supported NumPy can hold.
MAX_DIMENSIONS = 32
_RECORD: dict[str, type[Any]] = {
    "name": str,
    "shape": list,
    "dtype": str,
    "format": str,
    "byteOffset": int,
    "nbytes": int,
}
#: Records that are sorted or checked at once: Ctrl-C takes no effect meanwhile.
_AT_ONCE = 1 << 16
_byte_offset, _nbytes, _shape, _name = map(attrgetter, ("byte_offset", "nbytes", "shape", "name"))
_dtype_and_format = attrgetter("dtype", "format")
_record_fields, _record_types = itemgetter(*_RECORD), tuple(_RECORD.values())


def parse_manifest(
    data: bytes,
    *,
    name: str = "tensor-cache.json",
    url: str | None = None,
    check: Callable[[], None] = lambda: None,
) -> Manifest:
    """Parse and check a manifest, in steps of at most about 0.1 s so that Ctrl-C takes effect.

    Parameters
    ----------
    data : bytes
        The file's content: UTF-8, with or without a byte order mark.
    name : str
        The file's name, for `Manifest.name` and for messages.
    url : str, optional
        Where it came from, for messages.
    check : callable
        Called now and then; may raise to cancel.

    Raises
    ------
    ManifestError
        The manifest cannot be used; one of the four subclasses says why.
    """
    try:
        return _manifest(JsonReader(data, check), name)
    except ManifestError as error:
        error.shard, error.url = name, None if url is None else redact(url)
        raise


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Check that the metadata can be printed, pickled and compared."""
    level: list[Any] = [metadata]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if type(value) is dict:
                below += value
                below += value.values()
            elif type(value) is list:
                below += value
            elif type(value) is str and has_surrogate(value):
                raise ManifestSyntaxError("the manifest's metadata has text that is not Unicode")
        if not below:
            return
        level = below
    raise ManifestSyntaxError("the manifest's metadata is nested too deeply")


def _manifest(reader: JsonReader, name: str) -> Manifest:
    if reader.peek() != "{":
        raise ManifestSyntaxError(f"the manifest is {json_type(reader.value())}, not an object")
    where = "the manifest"
    metadata: Mapping[str, Any] = {}
    shards: list[Shard] | None = None
    for key in reader.members():
        if key == "records":
            if reader.peek() != "[":
                get_field({key: reader.value()}, key, list, where)  # raises, as it is not a list
            shards = _shards(reader)
        else:
            value = reader.value()
            if key == "metadata":
                found = get_field({key: value}, key, dict, where, None)
                metadata = found or {}
                check_metadata(metadata)
    reader.end()
    if shards is None:
        raise ManifestSyntaxError(f"{where} has no 'records'")
    check_paths(shards)
    if sum(shard.nbytes for shard in shards) > MAX_INT:
        raise ManifestLayoutError("the shards' sizes add up to more than 2**63 bytes")
    return Manifest(metadata, tuple(shards), name)


def _shards(reader: JsonReader) -> list[Shard]:
    shards, seen, total = list[Shard](), set[str](), 0
    for index, _ in enumerate(reader.elements()):
        if index == MAX_SHARDS:
            raise ManifestLimitError(f"the manifest has more than {MAX_SHARDS} shards")
        item = reader.small_value()
        if item is TOO_LARGE and reader.peek() == "{":
            item = _large_shard(reader, index)
        elif item is TOO_LARGE:
            item = reader.value()
        shard = _shard(item, index)
        shards.append(shard)
        total += len(shard.records)
        if total > MAX_RECORDS:
            raise ManifestLimitError(f"the manifest has more than {MAX_RECORDS} records")
        for name in map(_name, shard.records):
            if name in seen:
                raise ManifestSyntaxError(f"the manifest has the tensor {quote(name)} twice")
            seen.add(name)
    return shards


def _large_shard(reader: JsonReader, index: int) -> dict[str, Any]:
    """Read a shard whose records would take too much memory as dicts, and make each a `Record` at once."""
    return {
        key: _records(reader, f"shard {index}") if key == "records" and reader.peek() == "[" else reader.value()
        for key in reader.members()
    }


def _records(reader: JsonReader, shard: str) -> list[Record]:
    records = list[Record]()
    for items in reader.elements_at_once():
        if len(records) + len(items) > MAX_RECORDS:
            raise ManifestLimitError(f"the manifest has more than {MAX_RECORDS} records")
        records += _make_records(items, len(records), shard)
    return records


def _shard(value: Any, index: int) -> Shard:
    where = f"shard {index}"
    if type(value) is not dict:
        raise ManifestSyntaxError(f"{where} is {json_type(value)}, not an object")
    # Not with get_field: check_path has a better message for a path that is not Unicode text.
    data_path = value.get("dataPath", ...)
    if type(data_path) is not str:
        raise ManifestSyntaxError(f"{where} has no 'dataPath', or one that is not a string")
    check_path(data_path)
    where = f"shard {data_path!r}"
    nbytes = get_field(value, "nbytes", int, where)
    if not 0 <= nbytes <= MAX_INT:
        raise ManifestLayoutError(f"{where} has a size of {nbytes} bytes")
    items = get_field(value, "records", list, where)
    records = tuple(items if items and type(items[0]) is Record else _make_records(items, 0, where))
    _check_layouts(records, nbytes, where)
    return Shard(
        data_path=data_path,
        nbytes=nbytes,
        md5sum=_digest(value, "md5sum", 32, where),
        sha256sum=_digest(value, "sha256sum", 64, where),
        format=get_field(value, "format", str, where, "raw-shard"),
        records=records,
    )


def _digest(value: Mapping[str, Any], key: str, length: int, where: str) -> str | None:
    digest = get_field(value, key, str, where, None)
    if digest is None:
        return None
    if not re.fullmatch(f"[0-9a-fA-F]{{{length}}}", digest):
        raise ManifestSyntaxError(f"{key!r} of {where} is not {length} hexadecimal digits")
    return digest.lower()


def _make_records(items: Sequence[Any], first: int, shard: str) -> Sequence[Record]:
    """Check the fields of records, the number of whose first is given, and make the records."""
    # All together, column by column, in a third of the time. If anything is unusual, each is looked at alone.
    try:
        names, shapes, dtypes, formats, byte_offsets, sizes = columns = list(
            zip(*map(_record_fields, items), strict=True)
        )
    except (KeyError, TypeError, ValueError):  # or there are none
        columns = []
    is_usual = all({*map(type, column)} == {kind} for column, kind in zip(columns, _record_types, strict=False))
    if not (columns and is_usual and {*map(type, chain.from_iterable(shapes))} <= {int}):
        return [_record(item, number, shard) for number, item in enumerate(items, first)]
    known = {dtype: canonical_name(dtype) for dtype in {*dtypes}}
    if not all(map(str.isascii, chain(names, known, {*formats}))):
        return [_record(item, number, shard) for number, item in enumerate(items, first)]
    return make_records(names, map(tuple, shapes), map(known.__getitem__, dtypes), formats, byte_offsets, sizes)


def _record(value: Any, number: int, shard: str) -> Record:
    try:
        name, shape, dtype, format_, byte_offset, nbytes = fields = _record_fields(value)
        is_good = tuple(map(type, fields)) == _record_types and (name + dtype + format_).isascii()
    except (KeyError, TypeError):
        is_good = False
    if not is_good:
        name, shape, dtype, format_, byte_offset, nbytes = _check_fields(value, f"record {number} of {shard}")
    for size in shape:
        if type(size) is not int:
            raise ManifestSyntaxError(f"the shape of tensor {quote(name)} has {json_type(size)} in it")
    return Record(name, tuple(shape), canonical_name(dtype), format_, byte_offset, nbytes)


def _check_fields(value: Any, where: str) -> tuple[str, list[Any], str, str, int, int]:
    """Return a record's fields, which need not be ASCII; raise if something is wrong with them."""
    if type(value) is not dict:
        raise ManifestSyntaxError(f"{where} is {json_type(value)}, not an object")
    name = get_field(value, "name", str, where)
    others = [get_field(value, key, kind, f"tensor {quote(name)}") for key, kind in _RECORD.items() if key != "name"]
    return name, *others


def _check_layouts(records: Sequence[Record], shard_nbytes: int, where: str) -> None:
    end: int | None = 0
    for start in range(0, len(records), _AT_ONCE):
        if end is not None:
            end = _usual_end(records[start : start + _AT_ONCE], end, shard_nbytes)
    if end is not None:
        return
    for record in records:
        _check_layout(record, shard_nbytes)
    _check_overlap(records, where)


def _usual_end(records: Sequence[Record], start: int, shard_nbytes: int) -> int | None:
    """Return the end of the last record if all of them are in order after `start`, of the right sizes; else None.

    None of them is empty then, and all have known dtypes. They are checked column by column, in a third of the time.
    """
    offsets, sizes, shapes = (list(map(get, records)) for get in (_byte_offset, _nbytes, _shape))
    kinds = list(map(_dtype_and_format, records))
    item_sizes = {kind: ITEM_SIZES.get(Record("", (), *kind, 0, 0).stored_dtype, 0) for kind in {*kinds}}
    dimensions = list(chain.from_iterable(shapes))
    if max(map(len, shapes)) > MAX_DIMENSIONS or (dimensions and not 0 < min(dimensions) <= max(dimensions) <= MAX_INT):
        return None
    counts, ends = list(map(math.prod, shapes)), list(map(add, offsets, sizes))
    is_usual = (
        max(counts) * 8 <= MAX_INT
        and list(map(mul, counts, map(item_sizes.__getitem__, kinds))) == sizes
        and all(map(le, [start, *ends], offsets))
        and ends[-1] <= shard_nbytes
    )
    return ends[-1] if is_usual else None


def _check_layout(record: Record, shard_nbytes: int) -> None:
    shape, stored_dtype = record.shape, record.stored_dtype
    if len(shape) > MAX_DIMENSIONS or (shape and not 0 <= min(shape) <= max(shape) <= MAX_INT):
        raise ManifestLayoutError(f"{_tensor(record)} has the impossible shape {_short(shape)}")
    start, end = record.byte_offset, record.byte_offset + record.nbytes
    if start < 0 or record.nbytes < 0 or end > shard_nbytes:
        raise ManifestLayoutError(
            f"{_tensor(record)} lies at bytes {start} to {end} of a shard of {shard_nbytes} bytes"
        )
    item_size = ITEM_SIZES.get(stored_dtype)
    if item_size is None or record.format not in FORMATS:
        return  # the expected size is unknown
    # The strides of empty tensors must fit, too, or NumPy cannot make them.
    if math.prod(filter(None, shape)) * 8 > MAX_INT:
        raise ManifestLayoutError(f"{_tensor(record)} has the impossible shape {_short(shape)}")
    expected = math.prod(shape) * item_size
    if expected != record.nbytes:
        raise ManifestLayoutError(
            f"{_tensor(record)} has {record.nbytes} bytes, but {record.dtype} of shape "
            f"{_short(shape)} stored as {stored_dtype} takes {expected}"
        )


def _tensor(record: Record) -> str:
    return f"tensor {quote(record.name)}"


def _short(shape: Sequence[int]) -> str:
    return str(list(shape)) if len(shape) <= 8 else f"of {len(shape)} dimensions"


def _check_overlap(records: Sequence[Record], where: str) -> None:
    end, before = 0, ""
    for record in _by_offset([record for record in records if record.nbytes]):
        if record.byte_offset < end:
            raise ManifestLayoutError(f"the tensors {quote(before)} and {quote(record.name)} of {where} overlap")
        end, before = record.byte_offset + record.nbytes, record.name


def _by_offset(records: list[Record]) -> Iterable[Record]:
    """Sort by offset, in pieces: Ctrl-C takes no effect while a sort runs."""
    if len(records) <= _AT_ONCE:
        return sorted(records, key=_byte_offset)
    pieces = (records[start : start + _AT_ONCE] for start in range(0, len(records), _AT_ONCE))
    return heapq.merge(*(sorted(piece, key=_byte_offset) for piece in pieces), key=_byte_offset)


def check_paths(shards: Sequence[Shard]) -> None:
    """Check that no shard is the same file as another shard or a manifest, on any file system."""
    files: dict[str, str] = {}
    for shard in shards:
        key = collision_key(shard.data_path)
        if "/" not in key and key.endswith(".json"):
            raise UnsafePathError(f"the shard path {shard.data_path!r} is that of a manifest")
        if key in files:
            raise ManifestSyntaxError(f"the shards {files[key]!r} and {shard.data_path!r} are one file")
        files[key] = shard.data_path
    # NUL sorts before all characters of a path, so a path below another one comes right after it.
    keys = sorted(key.replace("/", "\0") for key in files)
    for above, below in pairwise(keys):
        if below.startswith(above + "\0"):
            path = files[below.replace("\0", "/")]
            raise UnsafePathError(f"the shard path {path!r} lies below another shard")
