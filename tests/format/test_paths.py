"""Shard paths that are unsafe on any system are refused."""

from __future__ import annotations

from typing import Any

import pytest

from ndcache.errors import ManifestSyntaxError, UnsafePathError

from ..helpers.manifests import check_refused, document, parse, record, shard, with_path

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
    ".nd\u200ccache/x",  # HFS+, the Mac's old file system, ignores this character
    "NDCACH~1/x",  # the short name of .ndcache on Windows
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
def test_row_20_an_unsafe_path_is_refused(path: str) -> None:
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
def test_safe_paths_are_read(path: str) -> None:
    (found,) = parse(with_path(path)).shards
    assert found.data_path == path


@pytest.mark.parametrize("path", [0, None, True, ["x"], {"x": 1}, 1.5])
def test_row_21_a_path_that_is_not_a_string_is_refused(path: Any) -> None:
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
def test_row_20_a_shard_below_another_shard_is_refused(one: str, other: str) -> None:
    check_refused(document(shard(dataPath=one), shard(dataPath=other)), UnsafePathError)


def test_neighbours_that_only_look_nested_are_read() -> None:
    paths = ["a", "a!", "a-b/c", "a.b", "a b", "ab/c", "b/a"]
    assert len(parse(document(*(shard(dataPath=path) for path in paths))).shards) == len(paths)
