"""The manifest: untrusted JSON in, frozen and checked values out.

The format is the one that TVM's ``tvm.contrib.tvmjs.dump_tensor_cache`` writes and that web-llm and
mlc_llm read::

    {"metadata": {...}, "records": [shard, ...]}
    shard  = {"dataPath", "format": "raw-shard", "nbytes", "md5sum"?, "records": [record, ...]}
    record = {"name", "shape", "dtype", "format": "raw" | "f32-to-bf16", "byteOffset", "nbytes"}

Everything is checked here, before memory is allocated or a shard is asked for. The two exceptions are an
unknown dtype and an unknown storage format: a manifest that has one is still good for its other
records, so `Manifest.select` raises for those asked for.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NoReturn, TypeAlias
from urllib.parse import unquote

from .dtypes import DTYPES, canonical_name
from .errors import (
    ManifestError,
    ManifestLayoutError,
    ManifestLimitError,
    ManifestSyntaxError,
    UnsafePathError,
    UnsupportedDtypeError,
    UnsupportedFormatError,
    redact,
)

__all__ = [
    "MAX_MANIFEST_BYTES",
    "STATE_DIRECTORY",
    "Manifest",
    "NameFilter",
    "Record",
    "Shard",
    "check_path",
]

#: ndcache's own folder in a model directory; no shard may lie there.
STATE_DIRECTORY = ".ndcache"

MAX_MANIFEST_BYTES = 64 << 20
MAX_RECORDS = 1 << 20
MAX_SHARDS = 1 << 16
#: Objects or arrays in one manifest: one each a record, one each a shard, the rest for metadata.
_MAX_NODES = MAX_RECORDS + MAX_SHARDS + (1 << 16)
#: Commas in one manifest: six each a record are needed.
_MAX_COMMAS = 6 * _MAX_NODES
_MAX_DEPTH = 64  # of nesting in metadata; shallow enough that it can be pickled, copied and compared everywhere
_MAX_INT = (1 << 63) - 1
_MAX_DIMENSIONS = 32  # what every supported NumPy can hold
_MAX_DIGITS = 400  # of one number; float64 has no use for more
#: Bytes of a shard's path. The cache makes one file name of it, adds to that, and most file systems end at 255.
_MAX_PATH = 200
_FORMATS = ("raw", "f32-to-bf16")

#: What ``names=`` takes: a name or glob pattern, several of them, or a predicate.
NameFilter: TypeAlias = "str | Iterable[str] | Callable[[str], bool] | None"


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
        """Whether a float32 tensor is stored as bfloat16.

        Quantised MLC models mark uint32 and float16 records ``f32-to-bf16`` too; their bytes are the value.
        """
        return self.format == "f32-to-bf16" and self.dtype == "float32"

    @property
    def stored_dtype(self) -> str:
        """The dtype of the bytes in the shard."""
        return "bfloat16" if self.is_bf16_encoded else self.dtype


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
    format : str
        ``"raw-shard"``.
    records : tuple of Record
        The tensors in it, in manifest order.
    """

    data_path: str
    nbytes: int
    md5sum: str | None
    sha256sum: str | None
    format: str
    records: tuple[Record, ...]

    @property
    def integrity(self) -> str:
        """The strongest check that the manifest allows: ``"sha256"``, ``"md5"`` or ``"size"``."""
        return "sha256" if self.sha256sum else "md5" if self.md5sum else "size"


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
        """All records, in manifest order."""
        return (record for shard in self.shards for record in shard.records)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards together."""
        return sum(shard.nbytes for shard in self.shards)

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self._by_name)

    def __iter__(self) -> Iterator[str]:
        """The names of the tensors, in manifest order."""
        return iter(self._by_name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Record:
        return self._by_name[name]

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "tensor-cache.json", url: str | None = None) -> Manifest:
        """Parse and check a manifest.

        Parameters
        ----------
        data : bytes
            The file's content, UTF-8.
        name : str
            The file's name, kept as `Manifest.name` and used in messages.
        url : str, optional
            Where it came from, for messages.

        Raises
        ------
        ManifestError
            Whatever is wrong, as one of its four subclasses.
        """
        try:
            return _manifest(_parse_json(data), name)
        except ManifestError as error:
            error.shard, error.url = name, None if url is None else redact(url)
            raise

    def select(self, names: NameFilter = None) -> tuple[Shard, ...]:
        """The shards that hold matching tensors, each with its matching records only.

        Parameters
        ----------
        names : str, iterable of str, callable or None
            Names or glob patterns (``"model.layers.0.*"``), or a predicate on the name; None is everything.

        Returns
        -------
        tuple of Shard
            In manifest order.

        Raises
        ------
        KeyError
            A name or pattern matches nothing.
        UnsupportedDtypeError, UnsupportedFormatError
            A selected record cannot be decoded.
        """
        chosen = self.shards_with(names)
        for shard in chosen:
            _check_supported(shard)
        return chosen

    def shards_with(self, names: NameFilter = None) -> tuple[Shard, ...]:
        """Like `select`, without asking whether the records can be decoded."""
        if names is None:
            return self.shards
        wanted = self._predicate(names)
        chosen = []
        for shard in self.shards:
            records = tuple(record for record in shard.records if wanted(record.name))
            if records:
                chosen.append(replace(shard, records=records))
        return tuple(chosen)

    def _predicate(self, names: NameFilter) -> Callable[[str], bool]:
        if callable(names):
            return names
        patterns = [names] if isinstance(names, str) else list(names or ())
        matching = set()
        for pattern in patterns:
            if pattern in self._by_name:  # to the letter, also where it could be a pattern: ``layers[0].weight``
                matching.add(pattern)
                continue
            # Not `fnmatch.filter`, which on Windows takes no notice of letter case and slashes.
            found = list(filter(re.compile(fnmatch.translate(pattern)).match, self._by_name))
            if not found:
                raise KeyError(f"no tensor of {self.name} matches {pattern!r}")
            matching.update(found)
        return matching.__contains__


def _check_supported(shard: Shard) -> None:
    if shard.format != "raw-shard":
        raise UnsupportedFormatError(
            f"shard format {shard.format!r} is unknown (only 'raw-shard' is)", shard=shard.data_path
        )
    for record in shard.records:
        if record.dtype not in DTYPES:
            raise UnsupportedDtypeError(
                f"tensor {record.name!r} has the unknown dtype {record.dtype!r}",
                shard=shard.data_path,
                hint=f"Known are {', '.join(DTYPES)}.",
            )
        if record.format not in _FORMATS:
            raise UnsupportedFormatError(
                f"tensor {record.name!r} is stored in the unknown format {record.format!r}",
                shard=shard.data_path,
                hint=f"Known are {' and '.join(_FORMATS)}.",
            )


# --- JSON ---------------------------------------------------------------------------------------------


def _parse_json(data: bytes) -> Any:
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestLimitError(f"the manifest is larger than {MAX_MANIFEST_BYTES >> 20} MiB")
    # A parsed node takes some 20 times the memory of the two bytes it can be written in.
    if data.count(b"{") > _MAX_NODES or data.count(b"[") > _MAX_NODES or data.count(b",") > _MAX_COMMAS:
        raise ManifestLimitError(f"the manifest has more than {MAX_RECORDS} records, or as much of something else")
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
    except UnicodeDecodeError as error:
        raise ManifestSyntaxError("the manifest is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ManifestSyntaxError(f"the manifest is not JSON: {error}", hint=_what_it_is(data)) from error
    except RecursionError as error:
        raise ManifestSyntaxError("the manifest is nested too deeply") from error


def _what_it_is(data: bytes) -> str | None:
    start = data[:256].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "It is a web page: check the URL, and whether it needs a login."
    if start.startswith(b"version https://git-lfs"):
        return "It is a git-lfs pointer, not the file: fetch the file itself (git lfs pull)."
    return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ManifestSyntaxError(f"the manifest has the key {_shown(key)} twice in one object")
    return value


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ManifestSyntaxError(f"the manifest has a number of {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    if len(text) > _MAX_DIGITS:
        raise ManifestSyntaxError(f"the manifest has a number of {len(text)} digits")
    value = float(text)
    if math.isinf(value):
        raise ManifestSyntaxError(f"the manifest has the number {_shown(text)}, which is too large")
    return value


def _constant(text: str) -> NoReturn:
    raise ManifestSyntaxError(f"the manifest has {text}, which is not JSON")


# --- structure ----------------------------------------------------------------------------------------


def _field(value: Mapping[str, Any], key: str, kind: type, where: str, default: Any = ...) -> Any:
    """``value[key]``, which must be exactly of `kind`: a bool is no int here."""
    item: Any = value.get(key, default)
    if item is ...:
        raise ManifestSyntaxError(f"{where} has no {key!r}")
    if type(item) is not kind and item is not default:
        raise ManifestSyntaxError(f"{key!r} of {where} is {_json_type(item)}, not {_JSON_TYPES[kind]}")
    if kind is str and item is not default and _has_surrogate(str(item)):
        raise ManifestSyntaxError(f"{key!r} of {where} is not Unicode text")
    return item


_JSON_TYPES: dict[type, str] = {
    str: "a string",
    int: "an integer",
    float: "a fractional number",
    bool: "a boolean",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def _json_type(value: Any) -> str:
    return _JSON_TYPES[type(value)]


def _has_surrogate(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)


def _shown(text: str) -> str:
    """`text` for a message: quoted, escaped, and not of any length."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    """Whatever it says, it can be printed, pickled and compared."""
    level: list[Any] = [metadata]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if type(value) is dict:
                below += value
                below += value.values()
            elif type(value) is list:
                below += value
            elif type(value) is str and _has_surrogate(value):
                raise ManifestSyntaxError("the manifest's metadata has text that is not Unicode")
        if not below:
            return
        level = below
    raise ManifestSyntaxError("the manifest's metadata is nested too deeply")


def _manifest(value: Any, name: str) -> Manifest:
    if type(value) is not dict:
        raise ManifestSyntaxError(f"the manifest is {_json_type(value)}, not an object")
    metadata = _field(value, "metadata", dict, "the manifest", None) or {}
    _check_metadata(metadata)
    items = _field(value, "records", list, "the manifest")
    if len(items) > MAX_SHARDS:
        raise ManifestLimitError(f"the manifest has more than {MAX_SHARDS} shards")
    shards, seen, total = [], set[str](), 0
    for index, item in enumerate(items):
        shard = _shard(item, index)
        shards.append(shard)
        total += len(shard.records)
        if total > MAX_RECORDS:
            raise ManifestLimitError(f"the manifest has more than {MAX_RECORDS} records")
        for record in shard.records:
            if record.name in seen:
                raise ManifestSyntaxError(f"the manifest has the tensor {_shown(record.name)} twice")
            seen.add(record.name)
    _check_paths(shards)
    if sum(shard.nbytes for shard in shards) > _MAX_INT:
        raise ManifestLayoutError("the shards' sizes add up to more than 2**63 bytes")
    return Manifest(metadata, tuple(shards), name)


def _shard(value: Any, index: int) -> Shard:
    where = f"shard {index}"
    if type(value) is not dict:
        raise ManifestSyntaxError(f"{where} is {_json_type(value)}, not an object")
    # The path is text of any kind until check_path has judged it.
    data_path = value.get("dataPath", ...)
    if type(data_path) is not str:
        raise ManifestSyntaxError(f"{where} has no 'dataPath', or one that is not a string")
    check_path(data_path)
    where = f"shard {data_path!r}"
    nbytes = _field(value, "nbytes", int, where)
    if not 0 <= nbytes <= _MAX_INT:
        raise ManifestLayoutError(f"{where} has a size of {nbytes} bytes")
    records = tuple(
        _record(item, f"record {number} of {where}", nbytes)
        for number, item in enumerate(_field(value, "records", list, where))
    )
    _check_overlap(records, where)
    return Shard(
        data_path=data_path,
        nbytes=nbytes,
        md5sum=_digest(value, "md5sum", 32, where),
        sha256sum=_digest(value, "sha256sum", 64, where),
        format=_field(value, "format", str, where, "raw-shard"),
        records=records,
    )


def _digest(value: Mapping[str, Any], key: str, length: int, where: str) -> str | None:
    digest = _field(value, key, str, where, None)
    if digest is None:
        return None
    if not re.fullmatch(f"[0-9a-fA-F]{{{length}}}", digest):
        raise ManifestSyntaxError(f"{key!r} of {where} is not {length} hexadecimal digits")
    return str(digest.lower())


def _record(value: Any, where: str, shard_nbytes: int) -> Record:
    if type(value) is not dict:
        raise ManifestSyntaxError(f"{where} is {_json_type(value)}, not an object")
    name = _field(value, "name", str, where)
    where = f"tensor {_shown(name)}"
    shape = _field(value, "shape", list, where)
    for size in shape:
        if type(size) is not int:
            raise ManifestSyntaxError(f"the shape of {where} has {_json_type(size)} in it")
    record = Record(
        name=name,
        shape=tuple(shape),
        dtype=canonical_name(_field(value, "dtype", str, where)),
        format=_field(value, "format", str, where),
        byte_offset=_field(value, "byteOffset", int, where),
        nbytes=_field(value, "nbytes", int, where),
    )
    _check_layout(record, where, shard_nbytes)
    return record


# --- layout -------------------------------------------------------------------------------------------


def _check_layout(record: Record, where: str, shard_nbytes: int) -> None:
    if len(record.shape) > _MAX_DIMENSIONS or any(not 0 <= size <= _MAX_INT for size in record.shape):
        raise ManifestLayoutError(f"{where} has the impossible shape {_short(record.shape)}")
    start, end = record.byte_offset, record.byte_offset + record.nbytes
    if start < 0 or record.nbytes < 0 or end > shard_nbytes:
        raise ManifestLayoutError(f"{where} lies at bytes {start} to {end} of a shard of {shard_nbytes} bytes")
    stored = DTYPES.get(record.stored_dtype)
    if stored is None or record.format not in _FORMATS:
        return  # nobody knows how many bytes it takes
    # An empty tensor too must have strides that fit, or NumPy cannot hold it.
    if math.prod(size for size in record.shape if size) * 8 > _MAX_INT:
        raise ManifestLayoutError(f"{where} has the impossible shape {_short(record.shape)}")
    expected = math.prod(record.shape) * stored.itemsize
    if expected != record.nbytes:
        raise ManifestLayoutError(
            f"{where} has {record.nbytes} bytes, but {record.dtype} of shape "
            f"{_short(record.shape)} stored as {record.stored_dtype} takes {expected}"
        )


def _short(shape: Sequence[int]) -> str:
    return str(list(shape)) if len(shape) <= 8 else f"of {len(shape)} dimensions"


def _check_overlap(records: Sequence[Record], where: str) -> None:
    end, before = 0, ""
    for record in sorted((record for record in records if record.nbytes), key=lambda record: record.byte_offset):
        if record.byte_offset < end:
            raise ManifestLayoutError(f"the tensors {_shown(before)} and {_shown(record.name)} of {where} overlap")
        end, before = record.byte_offset + record.nbytes, record.name


# --- paths --------------------------------------------------------------------------------------------

_WINDOWS_NAMES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{device}{digit}" for device in ("com", "lpt") for digit in "0123456789¹²³"
}


def check_path(path: str) -> None:
    """Raise `UnsafePathError` unless `path` names a file below its directory, on every system.

    The path comes from a manifest, will be appended to a URL and will become a file name. It must mean the same
    in all three, whoever decodes percent signs, and never the directory of ndcache's own state.
    """
    shown = ascii(path if len(path) <= 80 else path[:77] + "...")
    for text in _percent_decodings(path):
        reason = _unsafe(text)
        if reason:
            raise UnsafePathError(
                f"the shard path {shown} {reason}",
                hint="The manifest is damaged or hostile; nothing was requested.",
            )


def _percent_decodings(path: str) -> Iterator[str]:
    """`path` as it is and after each round of percent-decoding that still changes it."""
    for _ in range(8):
        yield path
        decoded = unquote(path, errors="surrogateescape")
        if decoded == path:
            return
        path = decoded
    yield "\0"  # eight layers of encoding are nobody's file name


#: What Windows calls a file with a longer name, too: PARAMS~1.BIN.
_SHORT_NAME = re.compile(r"[^.]{1,6}~\d{1,6}(\.[^.]{0,3})?")


def _unsafe(path: str) -> str | None:
    """Why `path` is not safe as it stands, or None if it is."""
    # Slashes and percent signs become three characters each in the cache.
    if (
        len(path) > _MAX_PATH
        or len(path.encode("utf-8", "surrogatepass")) + 2 * (path.count("/") + path.count("%")) > _MAX_PATH
    ):
        return f"is longer than {_MAX_PATH} bytes"
    if _has_surrogate(path) or any(unicodedata.category(c) in ("Cc", "Cf") for c in path):
        return "has control, invisible or surrogate characters"
    if any(c in '\\:*?"<>|' for c in path):
        return "has a character that not every file system can hold"
    if path.startswith("/"):
        return "is absolute"
    for part in path.split("/"):
        if part in ("", ".", ".."):
            return "has an empty, '.' or '..' component"
        if part.endswith((" ", ".")) or part.startswith(" "):
            return "has a component that begins with a space or ends in a space or dot"
        if _file_key(part) == STATE_DIRECTORY:
            return "lies in ndcache's own folder"
        if _file_key(part.partition(".")[0].rstrip(" ")) in _WINDOWS_NAMES or _SHORT_NAME.fullmatch(part):
            return "has a name that Windows reserves"
    return None


def _check_paths(shards: Sequence[Shard]) -> None:
    """No two shards, and no shard and manifest, may be one file on any file system."""
    files: dict[str, str] = {}
    for shard in shards:
        key = _file_key(shard.data_path)
        if "/" not in key and key.endswith(".json"):
            raise UnsafePathError(f"the shard path {shard.data_path!r} is a manifest's")
        if key in files:
            raise ManifestSyntaxError(f"the shards {files[key]!r} and {shard.data_path!r} are one file")
        files[key] = shard.data_path
    # NUL sorts before all that a path may hold: what lies below a file follows it at once.
    keys = sorted(key.replace("/", "\0") for key in files)
    for above, below in pairwise(keys):
        if below.startswith(above + "\0"):
            path = files[below.replace("\0", "/")]
            raise UnsafePathError(f"the shard path {path!r} lies below another shard")


def _file_key(path: str) -> str:
    """One text for all spellings that some file system takes for the same name."""
    # Unicode's canonical caseless matching; case folding alone can undo a normal form.
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold())
