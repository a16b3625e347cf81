"""The manifest as frozen values: the tensors, and where their bytes lie.

TVM's ``tvm.contrib.tvmjs.dump_tensor_cache`` writes this format; web-llm and mlc_llm read it::

    {"metadata": {...}, "records": [shard, ...]}
    shard  = {"dataPath", "format": "raw-shard", "nbytes", "md5sum"?, "records": [record, ...]}
    record = {"name", "shape", "dtype", "format": "raw" | "f32-to-bf16", "byteOffset", "nbytes"}

`format.parse` makes these values from a manifest file and checks all of it. It accepts unknown dtypes and storage
formats, so that the other records can be loaded; `Manifest.select` raises if a selected record has one of them.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, TypeAlias

from ..arguments import as_texts
from ..caller import public, render_in_ipython
from ..errors import UnsupportedDtypeError, UnsupportedFormatError
from .dtypes import ITEM_SIZES, TENSOR_SIZES
from .slices import check_slices, slice_record
from .suggestion import suggest

__all__ = ["FORMATS", "Manifest", "NameFilter", "NoMatchError", "Record", "Shard", "make_records"]

#: The storage formats of records.
FORMATS = ("raw", "f32-to-bf16")

#: The ``names=`` option: a name or glob pattern, several of them, a predicate, or slices by exact names.
NameFilter: TypeAlias = "str | Iterable[str] | Mapping[str, slice] | Callable[[str], bool] | None"


class NoMatchError(KeyError):
    """A name or pattern matches no tensor."""

    __str__ = Exception.__str__  # KeyError's puts quotes around the message
    _render_traceback_ = render_in_ipython


@dataclass(frozen=True, slots=True)
class Record:
    """One tensor's place in its shard.

    Attributes
    ----------
    name : str
        The tensor's name, unique in the manifest.
    shape : tuple of int
        Its shape; ``()`` is a scalar.
    dtype : str
        Its dtype by its usual name (``float8_e4m3fn``, not ``e4m3_float8``).
    format : str
        ``"raw"`` or ``"f32-to-bf16"``.
    byte_offset, nbytes : int
        Where its bytes lie in the shard.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: str
    byte_offset: int
    nbytes: int

    @property
    def is_bf16_encoded(self) -> bool:
        """Return whether a float32 tensor is stored as bfloat16.

        Quantised MLC models mark uint32 and float16 records ``f32-to-bf16``, too; these are stored as they are.
        """
        return self.format == "f32-to-bf16" and self.dtype == "float32"

    @property
    def stored_dtype(self) -> str:
        """Return the dtype of the bytes in the shard."""
        return "bfloat16" if self.is_bf16_encoded else self.dtype


#: Setters of a record's fields. The constructor of a frozen dataclass takes three times as long.
_SETTERS = [getattr(Record, each.name).__set__ for each in fields(Record)]


def make_records(*columns: Iterable[Any]) -> list[Record]:
    """Make many records at once, from the values of each of their fields."""
    names, *others = columns
    names = list(names)
    records = list(map(object.__new__, itertools.repeat(Record, len(names))))
    for set_field, column in zip(_SETTERS, (names, *others), strict=True):
        deque(map(set_field, records, column), maxlen=0)
    return records


@dataclass(frozen=True, slots=True)
class Shard:
    """One binary file of the model and the tensors in it.

    Attributes
    ----------
    data_path : str
        Its path below the model directory, with forward slashes.
    nbytes : int
        Its size.
    md5sum, sha256sum : str or None
        Its digests in lower-case hex, where the manifest has them.
    required_digest : tuple of str or None
        The algorithm and hex digest that the caller's ``integrity`` option requires.
    format : str
        ``"raw-shard"``.
    records : tuple of Record
        The tensors in it, in manifest order.
    header : tuple or None
        Of a safetensors file, where the records come from: the number of bytes in front of its tensors, and their
        SHA-256.
    """

    data_path: str
    nbytes: int
    md5sum: str | None
    sha256sum: str | None
    format: str
    records: tuple[Record, ...]
    required_digest: tuple[str, str] | None = None
    header: tuple[int, str] | None = None

    @property
    def digests(self) -> dict[str, str]:
        """Return all digests that the shard must have, by algorithm, strongest first."""
        known = {} if self.required_digest is None else dict([self.required_digest])
        for algorithm, digest in (("sha256", self.sha256sum), ("md5", self.md5sum)):
            if digest is not None:
                known.setdefault(algorithm, digest)
        return known

    @property
    def integrity(self) -> str:
        """Return the strongest possible check: the algorithm of a digest, such as ``"sha256"``, else ``"size"``."""
        return next(iter(self.digests), "size")


@dataclass(frozen=True)
class Manifest:
    """A checked manifest.

    Attributes
    ----------
    metadata : mapping
        The manifest's free-form ``metadata`` (read-only, possibly empty).
    shards : tuple of Shard
        The shards in manifest order.
    name : str
        The manifest's file name.
    """

    metadata: Mapping[str, Any] = field(hash=False)
    shards: tuple[Shard, ...]
    name: str = "tensor-cache.json"
    _by_name: dict[str, Record] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))
        object.__setattr__(self, "_by_name", {record.name: record for record in self.records})

    def __reduce__(self) -> tuple[Any, ...]:
        return Manifest, (dict(self.metadata), self.shards, self.name)

    @property
    def records(self) -> Iterator[Record]:
        """Return all records, in manifest order."""
        return (record for shard in self.shards for record in shard.records)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all shards together."""
        return sum(shard.nbytes for shard in self.shards)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._by_name)

    def __iter__(self) -> Iterator[str]:
        """Return an iterator over the names of the tensors, in manifest order."""
        return iter(self._by_name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Record:
        return self._by_name[name]

    @public
    def select(self, names: NameFilter = None) -> tuple[Shard, ...]:
        """Return the shards that hold matching tensors, each with its matching records only.

        Parameters
        ----------
        names : str, iterable of str, mapping of str to slice, callable or None
            Names or glob patterns (``"model.layers.0.*"``), rows of the first dimension by exact names
            (``{"w": slice(0, 512)}``), or a predicate on the name; None selects everything.

        Returns
        -------
        tuple of Shard
            In manifest order. The record of a slice has the shape of the slice, and its place in the shard.

        Raises
        ------
        KeyError
            A name or pattern matches nothing.
        ValueError, TypeError
            A slice has a step, or is of a scalar; or a value is not a slice.
        UnsupportedDtypeError, UnsupportedFormatError
            A selected record cannot be decoded.
        """
        chosen = self.shards_with(names)
        for shard in chosen:
            _check_supported(shard)
        return chosen

    @public
    def shards_with(self, names: NameFilter = None) -> tuple[Shard, ...]:
        """Return the same shards as `select`, but do not check whether their records can be decoded."""
        if names is None:
            return self.shards
        wanted = self._predicate(names)
        chosen = []
        for shard in self.shards:
            # Not a generator, which would turn a predicate's StopIteration into a RuntimeError.
            records = [record for record in shard.records if wanted(record.name)]
            if records:
                chosen.append(replace(shard, records=tuple(records)))
        return tuple(_sliced(shard, names) for shard in chosen) if isinstance(names, Mapping) else tuple(chosen)

    def _predicate(self, names: NameFilter) -> Callable[[str], bool]:
        if isinstance(names, Mapping):
            check_slices(names)
            if missing := [name for name in names if name not in self._by_name]:
                raise self._no_match("is called", missing[0])
            return names.__contains__
        if callable(names):
            return names
        patterns = () if names is None else as_texts("names", names)
        matching = set()
        for pattern in patterns:
            if pattern in self._by_name:  # an exact name, even if it looks like a pattern: ``layers[0].weight``
                matching.add(pattern)
                continue
            # Not `fnmatch.filter`, which ignores letter case and the kind of slashes on Windows.
            found = list(filter(re.compile(fnmatch.translate(pattern)).match, self._by_name))
            if not found:
                raise self._no_match("matches", pattern)
            matching.update(found)
        return matching.__contains__

    def _no_match(self, verb: str, pattern: str) -> NoMatchError:
        hint = suggest(str(pattern), self._by_name, may_be_pattern=verb == "matches")
        return NoMatchError(f"no tensor of {self.name} {verb} {pattern!r}{hint}")


def _sliced(shard: Shard, rows: Mapping[str, slice]) -> Shard:
    """Replace each record of a shard by that of the wanted rows."""
    _check_supported(shard)  # the bytes of a row are not known otherwise
    return replace(shard, records=tuple(slice_record(record, rows[record.name]) for record in shard.records))


def _check_supported(shard: Shard) -> None:
    if shard.format != "raw-shard":
        raise UnsupportedFormatError(
            f"shard format {shard.format!r} is unknown (only 'raw-shard' is)", shard=shard.data_path
        )
    known, unknown = (ITEM_SIZES, "unknown") if shard.header is None else (TENSOR_SIZES, "unsupported")
    for record in shard.records:
        if record.dtype not in known:
            raise UnsupportedDtypeError(
                f"tensor {record.name!r} has the {unknown} dtype {record.dtype!r}",
                shard=shard.data_path,
                hint=f"Known dtypes: {', '.join(known)}.",
            )
        if record.format not in FORMATS:
            raise UnsupportedFormatError(
                f"tensor {record.name!r} is stored in the unknown format {record.format!r}",
                shard=shard.data_path,
                hint=f"Known formats: {', '.join(FORMATS)}.",
            )
