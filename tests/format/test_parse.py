"""The manifest: what is refused, what is let in, and what may be relied on afterwards.

The numbers in the names of the tests are those of the list of faults that the project works to.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ndcache.errors import (
    ManifestError,
    ManifestLayoutError,
    ManifestLimitError,
    ManifestSyntaxError,
    UnsafePathError,
    UnsupportedDtypeError,
    UnsupportedFormatError,
)
from ndcache.format import parse as limits
from ndcache.format.dtypes import DTYPES
from ndcache.format.manifest import Manifest, Record, Shard
from ndcache.format.parse import parse_manifest
from ndcache.format.paths import STATE_DIRECTORY, check_path


def thorough(ci: int, default: int = 300) -> settings:
    """How often to try a property: `ci` times with HYPOTHESIS_PROFILE=ci, over 20,000 for the parser together."""
    return settings(
        max_examples=ci if os.environ.get("HYPOTHESIS_PROFILE") == "ci" else default,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


def record(name: str = "w", **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "shape": [2, 3],
        "dtype": "float32",
        "format": "raw",
        "byteOffset": 0,
        "nbytes": 24,
        **fields,
    }


def shard(*records: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"dataPath": "params_shard_0.bin", "format": "raw-shard", "nbytes": 64, "records": list(records), **fields}


def document(*shards: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"metadata": {"ParamSize": 1}, "records": list(shards), **fields}


def parse(value: Any) -> Manifest:
    return parse_manifest(value if isinstance(value, bytes) else json.dumps(value).encode())


def parse_one(**fields: Any) -> Record:
    """The one record of a manifest."""
    (found,) = parse(document(shard(record(**fields)))).records
    return found


def without(value: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: item for name, item in value.items() if name != key}


def with_path(path: str) -> bytes:
    return json.dumps(document(shard(record(), dataPath=path))).encode()


def check_refused(value: Any, error: type[ManifestError]) -> ManifestError:
    """Check that `value` is refused with exactly `error`, in words that fit a screen."""
    with pytest.raises(ManifestError) as caught:
        parse(value)
    assert type(caught.value) is error, caught.value
    assert len(str(caught.value)) < 1000
    str(caught.value).encode()  # it can be printed
    return caught.value


# --- row 20: paths ------------------------------------------------------------------------------------

UNSAFE_PATHS = [
    "",
    "/",
    "/etc/passwd",
    "//host/share",
    "///x",
    "http://host/x.bin",
    "HTTPS://host/x.bin",
    "file:///etc/passwd",
    "data:,x",
    "x:y",
    "javascript:x",
    ".",
    "..",
    "./x.bin",
    "x/./y.bin",
    "x/.",
    "../x.bin",
    "x/../y.bin",
    "x/../../y.bin",
    "x/..",
    "x//y.bin",
    "x/",
    "%2e%2e/x.bin",
    "%2E%2E/x.bin",
    ".%2e/x.bin",
    "%2e./x.bin",
    "x/%2e%2e/y.bin",
    "%252e%252e/x.bin",
    "%25252e%25252e/x.bin",
    "%2f%2fhost/x",
    "%2fetc/passwd",
    "..%2fx.bin",
    "..%5cx.bin",
    "..%255cx.bin",
    "%c0%ae%c0%ae/x.bin",  # an overlong encoding of dots
    "%" + "25" * 10 + "2e%2e/x",
    "x%00.bin",
    "x%0a.bin",
    "%ff.bin",
    "%ed%a0%80.bin",
    "http%3a//host/x",
    "x%3fy",
    "\\x.bin",
    "..\\x.bin",
    "x\\y.bin",
    "x\\..\\..\\y.bin",
    "\\\\host\\share\\x",
    "\\\\?\\C:\\x",
    "C:x.bin",
    "C:\\x.bin",
    "C:/x.bin",
    "c:",
    "x.bin:stream",
    "x.bin::$DATA",
    "x\0.bin",
    "\0",
    "x\n.bin",
    "x\r.bin",
    "x\t.bin",
    "\x1b[2Jx.bin",
    "x\x7f.bin",
    "x\x85.bin",
    "x\x9b.bin",
    "\ud800.bin",
    "x\udfff.bin",
    "\udcff",
    "\u202ebin.x",  # shown right to left
    "x\u200b.bin",
    "\ufeffx.bin",
    "con",
    "CON",
    "Con.bin",
    "con.tar.bin",
    "con .bin",
    "x/nul",
    "nul/x",
    "aux.bin",
    "prn.bin",
    "com1",
    "COM9.bin",
    "com0",
    "com\u00b9.bin",
    "lpt1.bin",
    "lpt\u00b3",
    "conin$",
    "CONOUT$.bin",
    "x.bin.",
    "x.bin ",
    "x./y.bin",
    "x /y.bin",
    " x.bin",
    "x/ y.bin",
    "...",
    "....",
    "x?.bin",
    "x.bin?query",
    "x*.bin",
    'x".bin',
    "<x>.bin",
    "x|y.bin",
    ".ndcache",
    ".ndcache/x",
    ".ndcache/validators/x.json",
    ".NDCACHE/x",
    ".NdCache/x",
    "x/.ndcache/y",
    "%2endcache/x",
    "%2ENDcache/x",
    ".nd%63ache/x",
    ".ndcache./x",
    ".ndcache /x",
    ".ndcache::$INDEX_ALLOCATION/x",
    ".nd\u200ccache/x",  # the Mac's old file system takes no notice of it
    "NDCACH~1/x",  # what Windows calls it, too
    "params~1.bin",
    "x" * 201,
    "x/" * 100 + "x",
    "a/" * 30000 + "a",
    "%41" * 60,
    "\u00e9" * 101,
    "tensor-cache.json",
    "ndarray-cache.json",
    "NDArray-Cache.JSON",
    "anything.json",
]


@pytest.mark.parametrize("path", UNSAFE_PATHS, ids=lambda path: ascii(path)[:40])
def test_row_20_unsafe_paths(path: str) -> None:
    error = check_refused(with_path(path), UnsafePathError)
    assert "\n" not in str(error)
    assert str(error).isprintable()


@pytest.mark.parametrize(
    "path",
    [
        "params_shard_0.bin",
        "params_shard_0",
        "sub/params.bin",
        "a/b/c/d.bin",
        ".hidden",
        ".ndcachex/y",
        "ndcache/x",
        "x..y.bin",
        "..x.bin",
        "x y.bin",
        "100%.bin",
        "100%zz.bin",
        "a%20b.bin",
        "a+b.bin",
        "a#b.bin",
        "a&b=c,d;e@f!.bin",
        "[x](y){z}.bin",
        "~x.bin",
        "x~.bin",
        "-rf",
        "größe.bin",
        "モデル/重み.bin",
        "consul.bin",
        "com10.bin",
        "auxiliary.bin",
        "nullable/x.bin",
        "sub/tensor-cache.json",
        "x" * 200,
    ],
)
def test_safe_paths(path: str) -> None:
    (found,) = parse(with_path(path)).shards
    assert found.data_path == path


@pytest.mark.parametrize("path", [0, None, True, ["x"], {"x": 1}, 1.5])
def test_row_21_path_that_is_no_text(path: Any) -> None:
    check_refused(document(shard(record(), dataPath=path)), ManifestSyntaxError)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a", "a/b"),
        ("a/b", "a"),
        ("A", "a/b/c"),
        ("a/b", "a/b/c"),
        ("\u00e9", "e\u0301/x"),
    ],
)
def test_row_20_shard_below_a_shard(one: str, other: str) -> None:
    check_refused(document(shard(dataPath=one), shard(dataPath=other)), UnsafePathError)


def test_neighbours_that_only_look_like_one_below_the_other() -> None:
    paths = ["a", "a!", "a-b/c", "a.b", "a b", "ab/c", "b/a"]
    assert len(parse(document(*(shard(dataPath=path) for path in paths))).shards) == len(paths)


# --- row 21: syntax -----------------------------------------------------------------------------------

_GOOD = json.dumps(document(shard(record())))


def replaced(old: str, new: str) -> bytes:
    assert _GOOD.count(old) == 1, old
    return _GOOD.replace(old, new).encode()


DEEP = 200_000

BAD_SYNTAX: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n",
    "not JSON": b"hello",
    "cut": _GOOD.encode()[:-1],
    "trailing": _GOOD.encode() + b"x",
    "two documents": _GOOD.encode() * 2,
    "single quotes": _GOOD.replace('"', "'").encode(),
    "a comment": b"// hello\n" + _GOOD.encode(),
    "a trailing comma": b'{"records": [],}',
    "NUL": b"\0" + _GOOD.encode(),
    "HTML": b"<!DOCTYPE html><html></html>",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    # not UTF-8
    "UTF-16": _GOOD.encode("utf-16"),
    "UTF-16 without a mark": _GOOD.encode("utf-16-le"),
    "UTF-32": _GOOD.encode("utf-32"),
    "Latin-1": replaced('"w"', '"ü"').decode().encode("latin-1"),
    "an overlong encoding": b'{"metadata": {"a": "\xc0\xaf"}, "records": []}',
    "a surrogate in UTF-8": b'{"metadata": {"a": "\xed\xa0\x80"}, "records": []}',
    # not an object
    "null": b"null",
    "a list": b"[]",
    "a string": b'"records"',
    "a number": b"1",
    # numbers that are none
    "NaN": replaced("24", "NaN"),
    "Infinity": replaced("24", "Infinity"),
    "-Infinity": replaced("24", "-Infinity"),
    "NaN in metadata": replaced('"ParamSize": 1', '"ParamSize": NaN'),
    "Infinity in metadata": replaced('"ParamSize": 1', '"ParamSize": [Infinity]'),
    "1e400": replaced("24", "1e400"),
    "1e400 in metadata": replaced('"ParamSize": 1', '"ParamSize": 1e400'),
    "-1e400 in metadata": replaced('"ParamSize": 1', '"ParamSize": -1e400'),
    "5,000 digits": replaced("24", "1" * 5000),
    "5,000 digits and a sign": replaced("24", "-" + "1" * 5000),
    "5,000 digits in metadata": replaced('"ParamSize": 1', '"ParamSize": ' + "1" * 5000),
    "5,000 digits after the point": replaced('"ParamSize": 1', '"ParamSize": 1.' + "1" * 5000),
    "5,000 digits in an unknown field": replaced('"byteOffset"', '"x": ' + "1" * 5000 + ', "byteOffset"'),
    "a million digits": replaced("24", "1" * 1_000_000),
    "an exponent of 5,000 digits": replaced("24", "1e" + "9" * 5000),
    # booleans and floats for integers
    "true for an integer": replaced("24", "true"),
    "24.0": replaced("24", "24.0"),
    "24e0": replaced("24", "24e0"),
    "2.4E1": replaced("24", "2.4E1"),
    "-0.0": replaced('"byteOffset": 0', '"byteOffset": -0.0'),
    "false for an offset": replaced('"byteOffset": 0', '"byteOffset": false'),
    "0.0 for an offset": replaced('"byteOffset": 0', '"byteOffset": 0.0'),
    "true in a shape": replaced("[2, 3]", "[true, 6]"),
    "2.0 in a shape": replaced("[2, 3]", "[2.0, 3]"),
    "1E2 in a shape": replaced("[2, 3]", "[1E2]"),
    "a list in a shape": replaced("[2, 3]", "[[2], 3]"),
    "true for a size": replaced('"nbytes": 64', '"nbytes": true'),
    "64.0 for a size": replaced('"nbytes": 64', '"nbytes": 64.0'),
    "a leading zero": replaced('"byteOffset": 0', '"byteOffset": 00'),
    "a plus sign": replaced("24", "+24"),
    "hexadecimal": replaced("24", "0x18"),
    # nesting
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep lists, open": b"[" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep in metadata": b'{"metadata": {"a": ' + b"[" * DEEP + b"]" * DEEP + b'}, "records": []}',
    "deep objects in metadata": b'{"metadata": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b', "records": []}',
    "deep in records": b'{"records": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep in an unknown field": b'{"x": ' + b"[" * DEEP + b"]" * DEEP + b', "records": []}',
    "deep in a shape": replaced("[2, 3]", "[" * DEEP + "]" * DEEP),
    "metadata too deep to be pickled": b'{"metadata": {"a": ' + b"[" * 900 + b"]" * 900 + b'}, "records": []}',
    # duplicate keys
    "the same key twice": b'{"records": [], "records": []}',
    "the same key twice, escaped": b'{"records": [], "r\\u0065cords": []}',
    "the same key twice in a shard": replaced('"dataPath"', '"dataPath": "x", "dataPath"'),
    "the same key twice in a record": replaced('"byteOffset"', '"nbytes": 24, "byteOffset"'),
    "the same key twice in metadata": replaced('"ParamSize"', '"ParamSize": 2, "ParamSize"'),
    "the same key twice deep in metadata": replaced('"ParamSize": 1', '"a": [[{"b": {"c": 1, "d": 2, "c": 3}}]]'),
    "the same key twice in an unknown field": replaced('"byteOffset"', '"x": {"": 1, "": 1}, "byteOffset"'),
    "the same long key twice": replaced('"ParamSize"', '"{0}": 2, "{0}": 1, "x"'.format("k" * 100_000)),
    "the same surrogate twice": replaced('"ParamSize"', '"\\ud800": 2, "\\ud800": 1, "x"'),
    # text that is none
    "a surrogate in a name": replaced('"w"', '"\\ud800"'),
    "a surrogate in a dtype": replaced('"float32"', '"\\udfff"'),
    "a surrogate in metadata": replaced('"ParamSize": 1', '"a": ["\\ud800"]'),
    "a surrogate in a key of metadata": replaced('"ParamSize"', '"\\ud800"'),
    "a raw newline in text": replaced('"w"', '"w\n"'),
}


@pytest.mark.parametrize("data", BAD_SYNTAX.values(), ids=BAD_SYNTAX)
def test_row_21_syntax(data: bytes) -> None:
    check_refused(data, ManifestSyntaxError)


SYNTAX_OF_FIELDS: dict[str, Any] = {
    "no records": {"metadata": {}},
    "records null": document(records=None),
    "records an object": document(records={}),
    "metadata a list": document(metadata=[]),
    "metadata a string": document(metadata=""),
    "metadata false": document(metadata=False),
    "a shard that is none": document(records=[None]),
    "a shard that is a list": document(records=[[]]),
    **{f"shard without {key}": document(without(shard(), key)) for key in ("dataPath", "nbytes", "records")},
    "shard format null": document(shard(format=None)),
    "shard format a number": document(shard(format=1)),
    "shard size null": document(shard(nbytes=None)),
    "shard size a string": document(shard(nbytes="64")),
    "md5sum a number": document(shard(md5sum=0)),
    "md5sum of another length": document(shard(md5sum="0" * 31)),
    "md5sum empty": document(shard(md5sum="")),
    "md5sum with other letters": document(shard(md5sum="g" * 32)),
    "md5sum with a newline": document(shard(md5sum="0" * 32 + "\n")),
    "md5sum in full-width digits": document(shard(md5sum="\uff10" * 32)),
    "sha256sum of another length": document(shard(sha256sum="0" * 32)),
    "a record that is none": document(shard(records=[None])),
    "a record that is text": document(shard(records=["w"])),
    **{f"record without {key}": document(shard(without(record(), key))) for key in record()},
    **{f"record with {key} null": document(shard(record(**{key: None}))) for key in record()},
    "name a number": document(shard(record(name=1))),  # type: ignore[arg-type]
    "shape a number": document(shard(record(shape=6))),
    "shape a string": document(shard(record(shape="6"))),
    "shape with null": document(shard(record(shape=[None, 6]))),
    "dtype a list": document(shard(record(dtype=["float32"]))),
    "format a boolean": document(shard(record(format=True))),
    "size a string": document(shard(record(nbytes="24"))),
    # names twice
    "a tensor twice in a shard": document(shard(record("a"), record("a", byteOffset=24))),
    "a tensor twice in two shards": document(shard(record("a")), shard(record("a"), dataPath="b")),
    "a shard twice": document(shard(), shard()),
    "a shard twice, by case": document(shard(dataPath="A.bin"), shard(dataPath="a.bin")),
    "a shard twice, by normal form": document(shard(dataPath="\u00e9"), shard(dataPath="e\u0301")),
    "a shard twice, by both": document(shard(dataPath="\u00c9"), shard(dataPath="e\u0301")),
    "a shard twice, sharp s": document(shard(dataPath="stra\u00dfe"), shard(dataPath="STRASSE")),
    "a shard twice, dotted I": document(shard(dataPath="\u0130"), shard(dataPath="i\u0307")),
    "a shard twice, Kelvin": document(shard(dataPath="\u212a"), shard(dataPath="k")),
    "a shard twice, caron": document(shard(dataPath="\u01f0"), shard(dataPath="J\u030c")),
    "a shard twice, iota below": document(shard(dataPath="\u1fb7"), shard(dataPath="\u03b1\u0345\u0342")),
}


@pytest.mark.parametrize("value", SYNTAX_OF_FIELDS.values(), ids=SYNTAX_OF_FIELDS)
def test_row_21_fields(value: Any) -> None:
    check_refused(value, ManifestSyntaxError)


def test_names_that_differ_by_case_are_two_tensors() -> None:
    names = ["a", "A", "\u00e9", "e\u0301", "\u0130", "i\u0307"]
    records = [record(name, shape=[], dtype="int8", nbytes=1, byteOffset=i) for i, name in enumerate(names)]
    assert list(parse(document(shard(*records)))) == names


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[2J", "\0", "x" * 100_000, " ", "../x", "a*[b]?", "\u202e", "%2e"])
def test_any_text_is_a_tensor_name(name: str) -> None:
    assert list(parse(document(shard(record(name))))) == [name]


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "x" * 1_000_000])
def test_messages_escape_and_shorten_names(name: str) -> None:
    error = check_refused(document(shard(record(name, nbytes=23))), ManifestLayoutError)
    assert str(error).isprintable()
    error = check_refused(document(shard(record(name), record(name, byteOffset=8))), ManifestLayoutError)
    assert str(error).isprintable()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<!DOCTYPE html>", "web page"),
        (b"\n  <HTML lang=en>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ],
)
def test_what_else_a_server_sends_is_told_apart(data: bytes, words: str) -> None:
    assert words in str(check_refused(data, ManifestSyntaxError))


# --- row 22: limits -----------------------------------------------------------------------------------


def peak_of(data: bytes) -> int:
    """Bytes that are allocated at most while `data` is refused for its size."""
    tracemalloc.start()
    try:
        check_refused(data, ManifestLimitError)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


OVERSIZED: dict[str, Callable[[], bytes]] = {
    "over 64 MiB": lambda: b" " * ((64 << 20) + 1),
    "over 64 MiB of records": lambda: b'{"records":[' + b"{}," * (22 << 20) + b"{}]}",
    "over 2**20 records": lambda: b'{"records":[{"records":[' + b"{}," * (1 << 21) + b"{}]}]}",
    "as many shards": lambda: b'{"records":[' + b"{}," * (1 << 21) + b"{}]}",
    "as many objects in metadata": lambda: b'{"metadata":{"a":[' + b"{}," * (1 << 21) + b'{}]},"records":[]}',
    "as many lists in metadata": lambda: b'{"metadata":{"a":[' + b"[]," * (1 << 21) + b'[]]},"records":[]}',
    "as many numbers": lambda: b'{"metadata":{"a":[' + b"1," * (8 << 20) + b'1]},"records":[]}',
}


def filled(start: bytes, items: Callable[[int], bytes], count: int, end: bytes) -> bytes:
    """So many different items with commas between them, in 64 MiB."""
    text = start + b",".join(map(items, range(1_000_000, 1_000_000 + count)))
    return text + b" " * ((64 << 20) - len(text) - len(end)) + end


_RECORD = b'{"name":"%d","shape":[1],"dtype":"int8","format":"raw","byteOffset":%d,"nbytes":1}'
_FACE = b'"\xf0\x9f\x98\x80%s",' % (b"a" * (15 << 20))  # four bytes for each character, once it is decoded

#: The most that may be in a manifest, in several forms: some are refused, but not before they were looked at.
LARGEST: dict[str, Callable[[], bytes]] = {
    "records in no order": lambda: filled(
        b'{"records":[{"dataPath":"a.bin","format":"raw-shard","nbytes":9999999,"records":[',
        lambda index: _RECORD % (index, 1_000_000 + index * 7919 % 1_000_003),
        720_000,
        b"]}]}",
    ),
    "keys": lambda: filled(b'{"metadata":{', lambda index: b'"%d":1' % index, 2_000_000, b'},"records":[]}'),
    "strings": lambda: b'{"metadata":{"a":[' + b'"10000000",' * 5_600_000 + b'1]},"records":[]}',
    "long texts": lambda: b'{"metadata":{"a":[' + _FACE * 4 + b'1]},"records":[]}',
    "deep and wide": lambda: (
        b'{"metadata":{"a":['
        + (b'{"a":[' * 25 + b" " * (1 << 20) + b"1" + b"]}" * 25 + b",") * 60
        + b'1]},"records":[]}'
    ),
}


def print_costs(form: str) -> None:
    """Parse the form of this name; print how many bytes memory grew by, and the seconds that a signal waited."""

    def memory(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10

    data, seen = LARGEST[form](), list[float]()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    signal.signal(signal.SIGALRM, lambda *_: seen.append(time.monotonic()))
    seen.append(time.monotonic())
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    with contextlib.suppress(ManifestError):
        parse(data)
    signal.setitimer(signal.ITIMER_REAL, 0)
    seen.append(time.monotonic())
    print(memory("VmHWM") - before, max(later - earlier for earlier, later in pairwise(seen)))


@pytest.mark.parametrize("make", OVERSIZED.values(), ids=OVERSIZED)
def test_row_22_memory_flat(make: Callable[[], bytes]) -> None:
    assert peak_of(make()) < 1 << 20


def test_row_22_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [b'{"dataPath":"%d","nbytes":0,"records":[]}' % index for index in range(65_537)]
    assert limits.MAX_SHARDS == 65_536
    check_refused(b'{"records":[' + b",".join(items) + b"]}", ManifestLimitError)
    assert len(parse(b'{"records":[' + b",".join(items[1:]) + b"]}").shards) == 65_536


@pytest.mark.parametrize(("shards", "accepted"), [([3], True), ([4], False), ([2, 1], True), ([2, 2], False)])
def test_row_22_records(monkeypatch: pytest.MonkeyPatch, shards: list[int], accepted: bool) -> None:
    assert limits.MAX_RECORDS == 1 << 20
    monkeypatch.setattr(limits, "MAX_RECORDS", 3)  # so many would not fit into 64 MiB
    value = document(
        *(
            shard(*(record(f"{index}.{i}", shape=[], dtype="int8", nbytes=1, byteOffset=i) for i in range(count)))
            | {"dataPath": str(index)}
            for index, count in enumerate(shards)
        )
    )
    if accepted:
        assert len(parse(value)) == 3
    else:
        check_refused(value, ManifestLimitError)


@pytest.mark.once
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("form", LARGEST)
def test_row_22_row_36_the_largest_manifests(form: str) -> None:
    """Ctrl-C comes through, and there are at most so many bytes besides the file's."""
    command = [sys.executable, "-c", f"import test_manifest; test_manifest.print_costs({form!r})"]
    child = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    nbytes, seconds = child.stdout.split()
    assert int(nbytes) < 450 << 20
    assert float(seconds) < 2  # 0.1 where nothing else runs


def test_row_36_what_may_end_it_is_called_for_each_mebibyte() -> None:
    data, calls = LARGEST["strings"](), 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parse_manifest(data, check=check)


def test_a_manifest_of_the_largest_size_is_read() -> None:
    data = _GOOD.encode()
    assert len(parse(data + b" " * ((64 << 20) - len(data)))) == 1


@pytest.mark.parametrize("depth", [1, 60])
def test_metadata_of_some_depth(depth: int) -> None:
    inner: Any = 1
    for level in range(depth):
        inner = [inner] if level % 2 else {"a": inner}
    manifest = parse(document(metadata={"x": inner}))
    assert manifest.metadata["x"] == inner
    assert pickle.loads(pickle.dumps(manifest)) == manifest


# --- row 23: layout -----------------------------------------------------------------------------------

BIG = 1 << 62

BAD_LAYOUT: dict[str, dict[str, Any]] = {
    "a negative offset": record(byteOffset=-1),
    "a negative size": record(nbytes=-1, shape=[0]),
    "a negative size, as the shape gives": record(nbytes=-4, shape=[-1]),
    "a negative shape": record(shape=[-2, -3]),
    "beyond the shard": record(byteOffset=41),
    "far beyond the shard": record(byteOffset=1 << 63),
    "an offset of 400 digits": record(byteOffset=10**399),
    "a size of 400 digits": record(nbytes=10**399),
    "a shape of 400 digits": record(shape=[10**399]),
    "larger than the shard": record(shape=[17], nbytes=68),
    "empty, beyond the shard": record(shape=[0], nbytes=0, byteOffset=65),
    "a byte short": record(nbytes=23),
    "a byte long": record(nbytes=25),
    "a scalar of 8 bytes": record(shape=[], nbytes=8),
    "an empty tensor with bytes": record(shape=[0, 3], nbytes=4),
    "a full tensor without": record(nbytes=0),
    "the bytes of the other form": record(format="f32-to-bf16"),
    "raw, with the bytes of bfloat16": record(nbytes=12),
    "an odd bf16 length": record(shape=[3], format="f32-to-bf16", nbytes=5),
    "an odd bf16 length of none": record(shape=[0], format="f32-to-bf16", nbytes=1),
    "an odd bfloat16 length": record(shape=[3], dtype="bfloat16", nbytes=5),
    "marked uint32 with half its bytes": record(dtype="uint32", format="f32-to-bf16", nbytes=12),
    "marked float16 with a quarter": record(dtype="float16", format="f32-to-bf16", nbytes=6),
    "an alias with wrong bytes": record(dtype="e4m3_float8", nbytes=24),
    "a product of 2**64": record(shape=[1 << 32, 1 << 32], dtype="int8", nbytes=0),
    "a product of 2**64 + 6": record(shape=[2, (1 << 63) + 3]),
    "a size of 2**63": record(shape=[1 << 63], nbytes=0),
    "empty, with a side of 2**62": record(shape=[0, BIG], nbytes=0),
    "empty, with sides whose product overflows": record(shape=[1 << 40, 0, 1 << 40], nbytes=0),
    "33 dimensions": record(shape=[1] * 33, nbytes=4),
    "a million dimensions": record(shape=[1] * 1_000_000, nbytes=4),
}


@pytest.mark.parametrize("item", BAD_LAYOUT.values(), ids=BAD_LAYOUT)
def test_row_23_layout(item: dict[str, Any]) -> None:
    check_refused(document(shard(item)), ManifestLayoutError)


def byte_record(name: str, offset: int, nbytes: int) -> dict[str, Any]:
    return record(name, shape=[nbytes], dtype="uint8", byteOffset=offset, nbytes=nbytes)


@pytest.mark.parametrize(
    "places",
    [
        [(0, 8), (0, 8)],
        [(0, 8), (7, 1)],
        [(7, 1), (0, 8)],
        [(0, 64), (32, 1)],
        [(0, 8), (16, 8), (15, 2)],
        [(0, 8), (4, 0), (7, 8)],
    ],
)
def test_row_23_overlap(places: list[tuple[int, int]]) -> None:
    records = [byte_record(str(index), *place) for index, place in enumerate(places)]
    error = check_refused(document(shard(*records)), ManifestLayoutError)
    assert "overlap" in str(error)


@pytest.mark.parametrize(
    "places",
    [
        [(0, 8), (8, 8)],
        [(8, 8), (0, 8)],
        [(0, 8), (4, 0), (8, 0), (8, 8)],
        [(0, 0), (0, 0), (0, 64)],
        [(64, 0), (0, 64)],
        [(1, 3), (11, 5)],
    ],
)
def test_no_overlap(places: list[tuple[int, int]]) -> None:
    records = [byte_record(str(index), *place) for index, place in enumerate(places)]
    found = parse(document(shard(*records))).records
    assert [(item.byte_offset, item.nbytes) for item in found] == places


def test_row_23_overlap_counts_unknown_dtypes_too() -> None:
    records = [byte_record("a", 0, 8), byte_record("b", 4, 8) | {"dtype": "int4"}]
    check_refused(document(shard(*records)), ManifestLayoutError)


@pytest.mark.parametrize("nbytes", [-1, 1 << 63, 10**399])
def test_row_23_shard_size(nbytes: int) -> None:
    check_refused(document(shard(nbytes=nbytes)), ManifestLayoutError)


def test_row_23_sizes_of_all_shards() -> None:
    one = (1 << 63) - 1
    assert parse(document(shard(nbytes=one))).nbytes == one
    check_refused(document(shard(nbytes=one), shard(nbytes=1, dataPath="b")), ManifestLayoutError)


def test_row_23_before_any_allocation() -> None:
    # One exbibyte, consistent in itself: nothing as large may be made before it is asked for.
    size = 1 << 58
    tracemalloc.start()
    try:
        manifest = parse(document(shard(record(shape=[size], nbytes=4 * size), nbytes=4 * size)))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert manifest.nbytes == 4 * size


# --- row 24: dtypes and formats -----------------------------------------------------------------------

UNKNOWN: list[tuple[dict[str, Any], dict[str, Any], type[Exception]]] = [
    ({"dtype": "int4"}, {}, UnsupportedDtypeError),
    ({"dtype": ""}, {}, UnsupportedDtypeError),
    ({"dtype": "Float32"}, {}, UnsupportedDtypeError),
    ({"dtype": "float32 "}, {}, UnsupportedDtypeError),
    ({"dtype": "<f4"}, {}, UnsupportedDtypeError),
    ({"dtype": "object"}, {}, UnsupportedDtypeError),
    ({"dtype": "complex64"}, {}, UnsupportedDtypeError),
    ({"dtype": "float8_e4m3"}, {}, UnsupportedDtypeError),
    ({"dtype": "int4", "nbytes": 3, "format": "f32-to-bf16"}, {}, UnsupportedDtypeError),
    ({"format": "zstd"}, {}, UnsupportedFormatError),
    ({"format": "zstd", "nbytes": 5}, {}, UnsupportedFormatError),  # so many as it takes, compressed
    ({"format": ""}, {}, UnsupportedFormatError),
    ({"format": "RAW"}, {}, UnsupportedFormatError),
    ({"format": "f32-to-bf16 "}, {}, UnsupportedFormatError),
    ({}, {"format": "zip-shard"}, UnsupportedFormatError),
    ({}, {"format": ""}, UnsupportedFormatError),
    ({}, {"format": "raw"}, UnsupportedFormatError),
]


@pytest.mark.parametrize(("of_record", "of_shard", "error"), UNKNOWN)
def test_row_24_only_if_asked_for(
    of_record: dict[str, Any], of_shard: dict[str, Any], error: type[ManifestError]
) -> None:
    manifest = parse(
        document(
            shard(record("good")),
            shard(record("odd", **of_record), record("fine", byteOffset=32), dataPath="b", **of_shard),
        )
    )
    assert [item.data_path for item in manifest.select("good")] == ["params_shard_0.bin"]
    assert len(manifest.shards_with(None)) == 2
    if not of_shard:
        assert [item.name for part in manifest.select(["fine", "good"]) for item in part.records] == ["good", "fine"]
    for names in (None, "odd", ["good", "odd"], "*", lambda name: name == "odd"):
        with pytest.raises(error) as caught:
            manifest.select(names)
        assert type(caught.value) is error
        assert caught.value.shard == "b"
        assert of_shard or "'odd'" in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_known_dtype(dtype: str) -> None:
    nbytes = 6 * DTYPES[dtype].itemsize
    assert parse_one(dtype=dtype, nbytes=nbytes).stored_dtype == dtype
    check_refused(document(shard(record(dtype=dtype, nbytes=nbytes + 1))), ManifestLayoutError)


# --- what is seen in the wild -------------------------------------------------------------------------


def test_md5sum_absent() -> None:
    (found,) = parse(document(shard(record()))).shards
    assert (found.md5sum, found.sha256sum, found.integrity) == (None, None, "size")


@pytest.mark.parametrize(
    ("fields", "integrity"),
    [
        ({"md5sum": None}, "size"),
        ({"md5sum": "0123456789ABCDEF" * 2}, "md5"),
        ({"sha256sum": "f" * 64}, "sha256"),
        ({"md5sum": "0" * 32, "sha256sum": "F" * 64}, "sha256"),
    ],
)
def test_digests(fields: dict[str, Any], integrity: str) -> None:
    (found,) = parse(document(shard(record(), **fields))).shards
    assert found.integrity == integrity
    for key, value in fields.items():
        assert getattr(found, key) == (value.lower() if value else None)


@pytest.mark.parametrize("value", [{"records": []}, {"records": [], "metadata": None}, {"records": [], "metadata": {}}])
def test_metadata_absent(value: dict[str, Any]) -> None:
    manifest = parse(value)
    assert manifest.metadata == {}
    assert (len(manifest), manifest.nbytes, manifest.shards) == (0, 0, ())


def test_metadata_of_any_kind() -> None:
    metadata = {
        "ParamSize": 325,
        "ParamBytes": 2235129856.0,
        "BitsPerParam": 4.500537,
        "": None,
        "nested": {"a": [1, {"b": [True, "\u00fc\n"]}]},
        "big": 10**300,
        "tiny": 1e-320,
        "records": [1, 2],
    }
    assert parse(document(metadata=metadata)).metadata == metadata


def test_unknown_fields_are_ignored() -> None:
    value = document(shard(record(extra=[1]), extra={}), version=2)
    assert [item.name for item in parse(value).records] == ["w"]


def test_shard_format_absent() -> None:
    (found,) = parse(document(without(shard(record()), "format"))).select()
    assert found.format == "raw-shard"


@pytest.mark.parametrize(
    ("dtype", "form", "stored", "nbytes"),
    [
        ("float32", "f32-to-bf16", "bfloat16", 12),
        ("float32", "raw", "float32", 24),
        ("uint32", "f32-to-bf16", "uint32", 24),
        ("float16", "f32-to-bf16", "float16", 12),
        ("bfloat16", "raw", "bfloat16", 12),
        ("bfloat16", "f32-to-bf16", "bfloat16", 12),
        ("e4m3_float8", "raw", "float8_e4m3fn", 6),
        ("e5m2_float8", "f32-to-bf16", "float8_e5m2", 6),
    ],
)
def test_stored_as(dtype: str, form: str, stored: str, nbytes: int) -> None:
    found = parse_one(dtype=dtype, format=form, nbytes=nbytes)
    assert found.stored_dtype == stored
    assert found.is_bf16_encoded == ((dtype, form) == ("float32", "f32-to-bf16"))
    assert found.dtype == (stored if "float8" in stored else dtype)


@pytest.mark.parametrize("offset", [1, 3, 5, 40])
def test_unaligned_records(offset: int) -> None:
    assert parse_one(byteOffset=offset).byte_offset == offset


@pytest.mark.parametrize(
    ("shape", "nbytes"),
    [([], 4), ([0], 0), ([0, 5], 0), ([3, 0, 1 << 40], 0), ([1] * 32, 4), ([16], 64)],
)
def test_scalars_and_empties(shape: list[int], nbytes: int) -> None:
    assert parse_one(shape=shape, nbytes=nbytes).shape == tuple(shape)


def test_empty_tensor_at_the_end_of_its_shard() -> None:
    assert parse_one(shape=[0], nbytes=0, byteOffset=64).byte_offset == 64


def test_minus_zero_is_an_integer() -> None:
    (found,) = parse(replaced('"byteOffset": 0', '"byteOffset": -0')).records
    assert found.byte_offset == 0


def test_white_space_and_escapes() -> None:
    data = _GOOD.replace("{", "{\r\n\t ").replace('"w"', '"\\u0077\\ud83d\\ude00"').encode()
    assert list(parse(data)) == ["w\U0001f600"]


# --- the values ---------------------------------------------------------------------------------------


@pytest.fixture
def manifest() -> Manifest:
    names = ["layers.0.q", "layers.0.k", "layers.1.q", "layers[1].q", "head*", "head", "Layers.0.q"]
    shards = [
        shard(*(byte_record(name, 8 * place, 8) for place, name in enumerate(names[first : first + 3])))
        | {"dataPath": f"params_shard_{first}.bin"}
        for first in range(0, len(names), 3)
    ]
    return parse(document(*shards))


def names_of(shards: Iterable[Shard]) -> list[str]:
    return [item.name for part in shards for item in part.records]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("layers.0.q", ["layers.0.q"]),
        ("layers.0.*", ["layers.0.q", "layers.0.k"]),
        ("layers.?.q", ["layers.0.q", "layers.1.q"]),
        ("layers.[01].q", ["layers.0.q", "layers.1.q"]),
        ("layers.[!0].q", ["layers.1.q"]),
        ("*.q", ["layers.0.q", "layers.1.q", "layers[1].q", "Layers.0.q"]),
        (["head", "layers.0.k"], ["layers.0.k", "head"]),
        (("head", "head", "h?ad"), ["head"]),
        ({"head": 1}, ["head"]),
        (iter(["head"]), ["head"]),
        ("layers[1].q", ["layers[1].q"]),  # to the letter: as a pattern it would be layers1.q
        ("head*", ["head*"]),
        (["head*", "head"], ["head*", "head"]),
        ("hea*", ["head*", "head"]),
        ("Layers.*", ["Layers.0.q"]),
        (lambda name: name.endswith("k"), ["layers.0.k"]),
        (lambda name: None, []),
        ([], []),
    ],
)
def test_select(manifest: Manifest, names: Any, expected: list[str]) -> None:
    assert names_of(manifest.select(names)) == expected


def test_select_everything(manifest: Manifest) -> None:
    assert manifest.select() == manifest.select(None) == manifest.select("*") == manifest.shards


def test_select_keeps_all_but_the_records(manifest: Manifest) -> None:
    (found,) = manifest.select("head")
    assert dataclasses.replace(found, records=()) == dataclasses.replace(manifest.shards[1], records=())
    assert found.records == (manifest["head"],)


@pytest.mark.parametrize("names", ["nothing", "", ["head", "nothing.*"], "HEAD", "layers.2.?", "layers.0"])
def test_select_unmatched(manifest: Manifest, names: Any) -> None:
    with pytest.raises(KeyError, match=r"tensor-cache\.json"):
        manifest.select(names)


def test_select_passes_on_what_a_predicate_raises(manifest: Manifest) -> None:
    def predicate(name: str) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        manifest.select(predicate)


def test_lookup(manifest: Manifest) -> None:
    assert len(manifest) == 7
    assert list(manifest) == names_of(manifest.shards) == [item.name for item in manifest.records]
    assert "head" in manifest
    assert "tail" not in manifest
    assert manifest["head"].name == "head"
    with pytest.raises(KeyError):
        manifest["tail"]


def test_pickle_and_copy(manifest: Manifest) -> None:
    for other in (pickle.loads(pickle.dumps(manifest)), copy.deepcopy(manifest), copy.copy(manifest)):
        assert other == manifest
        assert hash(other) == hash(manifest)
        assert other["head"] == manifest["head"]
        assert other.name == manifest.name


def test_immutable(manifest: Manifest) -> None:
    part, item = manifest.shards[0], manifest["head"]
    for value, name in ((manifest, "shards"), (manifest, "metadata"), (part, "nbytes"), (item, "byte_offset")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)
    with pytest.raises(TypeError):
        manifest.metadata["x"] = 1  # type: ignore[index]
    assert isinstance(part.records, tuple)
    assert isinstance(item.shape, tuple)


def test_metadata_is_a_copy() -> None:
    metadata = {"a": 1}
    manifest = Manifest(metadata, ())
    metadata["a"] = 2
    assert manifest.metadata == {"a": 1}


def test_errors_say_where() -> None:
    url = "https://user:secret@host/model/tensor-cache-b16.json?token=secret#secret"
    with pytest.raises(ManifestSyntaxError) as caught:
        parse_manifest(b"{}", name="tensor-cache-b16.json", url=url)
    assert caught.value.shard == "tensor-cache-b16.json"
    assert caught.value.url == "https://host/model/tensor-cache-b16.json"
    assert "secret" not in str(caught.value) + repr(pickle.loads(pickle.dumps(caught.value)).__dict__)


def test_errors_have_their_cause() -> None:
    assert isinstance(check_refused(b'{"records": [}', ManifestSyntaxError).__cause__, json.JSONDecodeError)
    assert isinstance(check_refused(b"\xff", ManifestSyntaxError).__cause__, UnicodeDecodeError)
    assert isinstance(check_refused(b"[" * DEEP, ManifestSyntaxError).__cause__, RecursionError)


def test_name() -> None:
    assert parse_manifest(b'{"records": []}', name="x.json").name == "x.json"


# --- anything at all ----------------------------------------------------------------------------------


def check_invariants(manifest: Manifest) -> None:
    names, files = set(), set()
    base = Path("/srv/model")
    for part in manifest.shards:
        check_path(part.data_path)
        for path in (part.data_path, unquote(part.data_path), unquote(unquote(part.data_path))):
            inside = Path(os.path.normpath(base.joinpath(*path.split("/"))))
            assert base in inside.parents
            assert STATE_DIRECTORY not in (parent.lower() for parent in inside.parts)
            assert "\\" not in path
            assert path.isprintable() or not path.isascii()
        files.add(part.data_path.lower())
        assert 0 <= part.nbytes < 1 << 63
        end = 0
        for item in sorted(part.records, key=lambda item: (item.byte_offset, item.nbytes)):
            assert item.name not in names
            names.add(item.name)
            assert 0 <= item.byte_offset <= item.byte_offset + item.nbytes <= part.nbytes
            assert item.nbytes == 0 or item.byte_offset >= end
            end = max(end, item.byte_offset + item.nbytes)
            assert all(type(size) is int and size >= 0 for size in item.shape)
            if item.stored_dtype in DTYPES and item.format in ("raw", "f32-to-bf16"):
                assert math.prod(item.shape) * DTYPES[item.stored_dtype].itemsize == item.nbytes
    assert len(files) == len(manifest.shards)
    assert len(names) == len(manifest) == len(list(manifest.records))
    assert manifest.nbytes < 1 << 63
    repr(manifest).encode()
    assert pickle.loads(pickle.dumps(manifest)) == manifest
    try:
        manifest.select()
    except (UnsupportedDtypeError, UnsupportedFormatError) as error:
        str(error).encode()


def check_parsed_or_refused(data: bytes) -> None:
    """Whatever `data` is: a good manifest, or one of the four errors."""
    kinds = (ManifestSyntaxError, ManifestLayoutError, ManifestLimitError, UnsafePathError)
    try:
        manifest = parse_manifest(data)
    except kinds as error:
        str(error).encode()
    else:
        check_invariants(manifest)


integers = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([1 << 31, 1 << 32, 1 << 62, 1 << 63, 1 << 64, 10**399, -(1 << 63)]),
    st.integers(),
)
texts = st.one_of(
    st.text(st.characters(), max_size=12),  # surrogates too
    st.sampled_from([*UNSAFE_PATHS[:90], "a", "A", "a/b", "\u00e9", "e\u0301", "w", "x.bin", "%41"]),
    st.sampled_from([*DTYPES, "int4", "e4m3_float8", "raw", "f32-to-bf16", "raw-shard", "0" * 32]),
)
scalars = st.one_of(st.none(), st.booleans(), integers, st.floats(), texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=5,
)
keys = st.sampled_from(
    ["metadata", "records", "dataPath", "format", "nbytes", "md5sum", "name", "shape", "dtype", "byteOffset"]
)

real_records = st.builds(
    lambda name, shape, dtype, form, offset, wrong: record(
        name,
        shape=shape,
        dtype=dtype,
        format=form,
        byteOffset=offset,
        nbytes=math.prod(shape)
        * (2 if (dtype, form) == ("float32", "f32-to-bf16") else DTYPES[dtype].itemsize if dtype in DTYPES else 1)
        + wrong,
    ),
    texts,
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([*DTYPES, "int4", "float32", "float32"]),
    st.sampled_from(["raw", "raw", "f32-to-bf16", "zip"]),
    st.integers(0, 30),
    st.sampled_from([0] * 12 + [1, -1]),
)
real_shards = st.builds(
    lambda path, records, nbytes, form: shard(*records, dataPath=path, nbytes=nbytes, format=form),
    st.one_of(st.sampled_from(["a.bin", "b.bin", "c/d.bin", "c/e.bin", "c"]), texts),
    st.lists(real_records, max_size=3),
    st.integers(30, 300),
    st.sampled_from(["raw-shard", "raw-shard", "zip"]),
)
real_documents = st.builds(
    lambda shards, metadata: document(*shards, metadata=metadata),
    st.lists(real_shards, max_size=3),
    st.dictionaries(texts, scalars, max_size=2),
)


def encode(value: Any) -> bytes:
    return json.dumps(value).encode()


@thorough(9000)
@given(st.binary(max_size=200))
def test_row_21_free_bytes(data: bytes) -> None:
    check_parsed_or_refused(data)


@thorough(600, default=100)
@given(st.one_of(values, st.fixed_dictionaries({"records": st.lists(st.dictionaries(keys, values, max_size=5))})))
def test_row_21_free_json(value: Any) -> None:
    check_parsed_or_refused(encode(value))


@thorough(2000)
@given(real_documents)
def test_row_21_likely_manifests(value: Any) -> None:
    check_parsed_or_refused(encode(value))


@thorough(3000)
@given(st.data())
def test_row_21_one_field_changed(data: st.DataObject) -> None:
    value = copy.deepcopy(_REAL)
    places: list[tuple[Any, Any]] = [(value, key) for key in value]
    for part in value["records"]:
        places += [(part, key) for key in part]
        places += [(item, key) for item in part["records"] for key in item]
        places += [(item["shape"], 0) for item in part["records"] if item["shape"]]
    for _ in range(data.draw(st.integers(1, 2))):
        holder, key = data.draw(st.sampled_from(places))
        if data.draw(st.integers(0, 4)) == 0:
            holder.pop(key, None) if isinstance(holder, dict) else holder.clear()
        else:
            odd = data.draw(st.one_of(scalars, values))
            if isinstance(holder, dict):
                holder[key] = odd
            else:
                holder[:1] = [odd]
    check_parsed_or_refused(encode(value))


@thorough(6000)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1 << 16),
            st.integers(0, 12),
            st.one_of(
                st.binary(max_size=6),
                st.sampled_from(
                    [b"", b"-", b"0", b"e9", b".", b"NaN", b"\\ud800", b"\\u0000", b"[", b"]", b"{", b"}", b",", b'"']
                ),
            ),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_row_21_bytes_spliced(cuts: list[tuple[int, int, bytes]]) -> None:
    data = _REAL_BYTES
    for place, length, new in cuts:
        start = place % (len(data) + 1)
        data = data[:start] + new + data[start + length :]
    check_parsed_or_refused(data)


@thorough(3000)
@given(texts)
def test_row_20_free_paths(path: str) -> None:
    try:
        check_path(path)
    except UnsafePathError as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        assert str(refused).isprintable()
    else:
        check_invariants(parse(document(shard(dataPath="sub/" + path if path.endswith(".json") else path))))


_REAL = document(
    shard(record("model.embed", format="f32-to-bf16", nbytes=12), byte_record("q", 13, 5), md5sum="0" * 32),
    shard(
        record("scale", shape=[], dtype="float16", format="f32-to-bf16", nbytes=2),
        record("empty", shape=[0, 4], nbytes=0, byteOffset=64),
        record("f8", dtype="e4m3_float8", nbytes=6, byteOffset=3),
        dataPath="sub/params_shard_1.bin",
    ),
)
_REAL_BYTES = encode(_REAL)


def test_the_manifest_that_is_changed_is_good() -> None:
    check_invariants(parse(_REAL_BYTES))
    assert len(parse(_REAL_BYTES)) == 5
