"""The header of a safetensors file, checked as strictly as the safetensors library does.

::

    8 bytes   the header's length n, little-endian
    n bytes   {"__metadata__": {text: text}?, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    the rest  the tensors, which follow each other without gaps, from the first byte to the last

See https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from ...errors import (
    ManifestError,
    ManifestLayoutError,
    ManifestLimitError,
    ManifestSyntaxError,
    UnsupportedDtypeError,
    redact,
)
from ..json_reader import TOO_LARGE, JsonReader
from ..manifest import Record, Shard
from ..parse import MAX_DIMENSIONS, MAX_INT
from ..strict_json import MAX_MANIFEST_BYTES, MAX_RECORDS, WEB_PAGE_HINT, has_surrogate, json_type, quote
from .dtypes import BITS, DTYPE_NAMES

__all__ = ["LENGTH_BYTES", "Header", "header_end", "parse_header"]

#: The bytes in front of the header, which are its length.
LENGTH_BYTES = 8
_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
#: Minus zero, which Python reads as the integer 0 and the library does not; or what looks like it in a string.
_MINUS_ZERO = re.compile(rb"[\[,:][ \t\n\r]*-0[ \t\n\r]*[,\]}]")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_place = attrgetter("byte_offset", "nbytes")


@dataclass(frozen=True)
class Header:
    """The content of a file's header.

    Attributes
    ----------
    shard : Shard
        The file, with a record for each tensor, in the order of their bytes.
    metadata : mapping of str to str
        The free-form ``__metadata__``.
    """

    shard: Shard
    metadata: Mapping[str, str]


def header_end(start: bytes, name: str, url: str | None = None) -> int:
    """Return the offset at which the header of a file ends, and its first tensor begins.

    Parameters
    ----------
    start : bytes
        The first bytes of the file, as many as are there.
    name, url : str
        The file, for messages.

    Raises
    ------
    ManifestSyntaxError, ManifestLimitError
        This is not the beginning of a safetensors file.
    """
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    error: ManifestError | None = None
    if len(start) < LENGTH_BYTES:
        error = ManifestSyntaxError(f"the file ends after {len(start)} bytes, before its header")
    elif start[LENGTH_BYTES : LENGTH_BYTES + 1] not in (b"{", b""):
        error = ManifestSyntaxError("this is not a safetensors file: no header begins at byte 8", hint=_hint(start))
    elif length > MAX_MANIFEST_BYTES:
        error = ManifestLimitError(
            f"the file announces a header of {length:,} bytes, and the limit is {MAX_MANIFEST_BYTES:,}",
            hint=_hint(start),
        )
    if error is not None:
        raise _located(error, name, url)
    return LENGTH_BYTES + length


def parse_header(
    start: bytes,
    nbytes: int | None,
    *,
    name: str,
    url: str | None = None,
    sha256: str | None = None,
    check: Callable[[], None] = lambda: None,
) -> Header:
    """Parse and check the header of a file.

    Parameters
    ----------
    start : bytes
        The first bytes of the file, to the end of the header: its length and its text.
    nbytes : int or None
        The size of the file; None for the one that follows from the header.
    name : str
        The file's path below the model's directory.
    url : str, optional
        Where it is, for messages.
    sha256 : str, optional
        The file's digest, if that is known.
    check : callable
        Called now and then; may raise to cancel.

    Raises
    ------
    ManifestError
        The header cannot be used; one of the subclasses says why.
    UnsupportedDtypeError
        It names a dtype that the format does not have.
    """
    try:
        if header_end(start, name, url) != len(start):
            raise ManifestSyntaxError("the file ends before its header does")
        tensors, metadata = _read(start[LENGTH_BYTES:], check)
        records, end = _records(tensors, len(start))
        if nbytes is None:
            nbytes = end
        if end != nbytes:
            raise ManifestLayoutError(
                f"the tensors of the header end at byte {end:,} of the file, which has {nbytes:,} bytes",
                expected=end,
                received=nbytes,
                hint="The file was cut or has grown, or its header is that of another file.",
            )
    except (ManifestError, UnsupportedDtypeError) as error:
        raise _located(error, name, url) from error.__cause__
    digest = (len(start), hashlib.sha256(start).hexdigest())
    return Header(Shard(name, nbytes, None, sha256, "raw-shard", records, header=digest), metadata)


def _read(text: bytes, check: Callable[[], None]) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Return the members of the header, and its metadata."""
    if not text.startswith(b"{"):
        raise ManifestSyntaxError("the header does not begin with '{'")
    if _MINUS_ZERO.search(text) and _MINUS_ZERO.search(_STRING.sub(b'""', text)):
        raise ManifestSyntaxError("the header has the number -0")
    reader = JsonReader(text, check)
    tensors = reader.small_value()
    if tensors is TOO_LARGE:
        tensors = {}
        for key in reader.members():
            if len(tensors) > MAX_RECORDS:
                break
            tensors[key] = reader.value()
    if len(tensors) - (_METADATA in tensors) > MAX_RECORDS:
        raise ManifestLimitError(f"the header has more than {MAX_RECORDS} tensors")
    reader.end()
    metadata = tensors.pop(_METADATA, None)
    if metadata is None:
        metadata = {}
    if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
        raise ManifestSyntaxError(f"{_METADATA!r} of the header is not an object of strings")
    if any(has_surrogate(text) for item in metadata.items() for text in item):
        raise ManifestSyntaxError(f"{_METADATA!r} of the header has text that is not Unicode")
    return tensors, metadata


def _records(tensors: Mapping[str, Any], start: int) -> tuple[tuple[Record, ...], int]:
    """Return the records, in the order of their bytes, and where the last one ends; the data begins at `start`."""
    records = [_record(name, fields, start) for name, fields in tensors.items()]
    if any(one.byte_offset + one.nbytes != other.byte_offset for one, other in itertools.pairwise(records)):
        records.sort(key=_place)  # of tensors with the same offset, the empty ones first
    end = start
    for record in records:
        if record.byte_offset != end:
            kind = "overlap" if record.byte_offset < end else "leave a gap"
            raise ManifestLayoutError(
                f"the tensors {kind}: {quote(record.name)} begins at byte {record.byte_offset - start:,} of the data, "
                f"and the one before it ends at {end - start:,}"
            )
        end += record.nbytes
    return tuple(records), end


def _record(name: str, fields: Any, start: int) -> Record:
    # There may be a million tensors, so the text for messages is made only for a bad one.
    try:
        dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        is_good = (
            type(dtype) is str
            and type(shape) is type(fields["data_offsets"]) is list
            and type(begin) is type(end) is int
            and (name + dtype).isascii()
        )
        bits, usual_name = BITS[dtype], DTYPE_NAMES[dtype]
        for size in shape:
            is_good &= type(size) is int and 0 <= size <= MAX_INT
    except (KeyError, TypeError, ValueError):
        is_good = False
    if not is_good:
        dtype, shape, begin, end = _checked_fields(name, fields)
        bits, usual_name = BITS[dtype], DTYPE_NAMES[dtype]
    if len(shape) > MAX_DIMENSIONS:  # of which the product may be a number of megabytes
        raise ManifestLayoutError(f"tensor {quote(name)} has the impossible shape {_short(shape)}")
    count = math.prod(shape)
    if not 0 <= begin <= end or count * bits != (end - begin) * 8:
        raise _layout_error(name, dtype, shape, begin, end)
    # The strides of empty tensors must fit, too, or NumPy cannot make them.
    if not count and math.prod(filter(None, shape)) * bits > MAX_INT:
        raise ManifestLayoutError(f"tensor {quote(name)} has the impossible shape {_short(shape)}")
    return Record(name, tuple(shape), usual_name, "raw", start + begin, end - begin)


def _checked_fields(name: str, fields: Any) -> tuple[str, list[int], int, int]:
    """Return the fields of a tensor, whose name need not be ASCII; raise if something is wrong with them."""
    tensor = f"tensor {quote(name)}"
    if has_surrogate(name):
        raise ManifestSyntaxError(f"the name of {tensor} is not Unicode text")
    if type(fields) is not dict:
        raise ManifestSyntaxError(f"{tensor} is {json_type(fields)}, not an object")
    for field in _FIELDS:
        if field not in fields:
            raise ManifestSyntaxError(f"{tensor} has no {field!r}")
    dtype, shape, offsets = (fields[field] for field in _FIELDS)
    if type(dtype) is not str:
        raise ManifestSyntaxError(f"the dtype of {tensor} is {json_type(dtype)}, not a string")
    for field in ("shape", "data_offsets"):
        numbers = fields[field]
        if type(numbers) is not list or any(type(number) is not int for number in numbers):
            raise ManifestSyntaxError(f"the {field} of {tensor} is not an array of integers")
    if len(offsets) != 2:
        raise ManifestSyntaxError(f"the data_offsets of {tensor} are {len(offsets)} numbers, not two")
    if any(not 0 <= size <= MAX_INT for size in shape):
        raise ManifestLayoutError(f"{tensor} has the impossible shape {_short(shape)}")
    if dtype not in BITS:
        raise UnsupportedDtypeError(
            f"{tensor} has the unknown dtype {quote(dtype)}", hint=f"safetensors files have {', '.join(BITS)}."
        )
    return dtype, shape, offsets[0], offsets[1]


def _layout_error(name: str, dtype: str, shape: list[int], begin: int, end: int) -> ManifestLayoutError:
    bits = math.prod(shape) * BITS[dtype]
    needed = f"{bits // 8} bytes" if bits % 8 == 0 else f"{bits} bits"
    return ManifestLayoutError(
        f"tensor {quote(name)} lies at bytes {begin} to {end} of the data, but {dtype} of shape {_short(shape)} takes "
        f"{needed}"
    )


def _short(shape: list[int]) -> str:
    return str(shape) if len(shape) <= 8 else f"of {len(shape)} dimensions"


def _located(
    error: ManifestError | UnsupportedDtypeError, name: str, url: str | None
) -> ManifestError | UnsupportedDtypeError:
    """Return an error with the file that it is about."""
    # The JSON reader, and its words, are those of manifests.
    error.message = error.message.replace("the manifest", "the header")
    error.shard, error.url = name, None if url is None else redact(url)
    return error


def _hint(start: bytes) -> str | None:
    text = start[:256].lstrip().lower()
    if text.startswith(b"<"):
        return WEB_PAGE_HINT
    if text.startswith(b"version https://git-lfs"):
        return "It is a git-lfs pointer, not the file: fetch the file itself (git lfs pull)."
    return None
