"""Malformed manifests are refused; those that are found in practice are read."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from ndcache.errors import ManifestLayoutError, ManifestSyntaxError
from ndcache.format.parse import parse_manifest

from ..helpers.manifests import GOOD, check_refused, document, parse, parse_one, record, replaced, shard, without

DEEP = 200_000

BAD_SYNTAX: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n",
    "not JSON": b"hello",
    "cut": GOOD.encode()[:-1],
    "trailing": GOOD.encode() + b"x",
    "two documents": GOOD.encode() * 2,
    "single quotes": GOOD.replace('"', "'").encode(),
    "a comment": b"// hello\n" + GOOD.encode(),
    "a trailing comma": b'{"records": [],}',
    "NUL": b"\0" + GOOD.encode(),
    "HTML": b"<!DOCTYPE html><html></html>",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    # not UTF-8
    "UTF-16": GOOD.encode("utf-16"),
    "UTF-16 without a mark": GOOD.encode("utf-16-le"),
    "UTF-32": GOOD.encode("utf-32"),
    "Latin-1": replaced('"w"', '"ü"').decode().encode("latin-1"),
    "an overlong encoding": b'{"metadata": {"a": "\xc0\xaf"}, "records": []}',
    "a surrogate in UTF-8": b'{"metadata": {"a": "\xed\xa0\x80"}, "records": []}',
    # not an object
    "null": b"null",
    "a list": b"[]",
    "a string": b'"records"',
    "a number": b"1",
    # numbers that JSON does not have, or that are too long
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
    # text that is not Unicode
    "a surrogate in a name": replaced('"w"', '"\\ud800"'),
    "a surrogate in a dtype": replaced('"float32"', '"\\udfff"'),
    "a surrogate in metadata": replaced('"ParamSize": 1', '"a": ["\\ud800"]'),
    "a surrogate in a key of metadata": replaced('"ParamSize"', '"\\ud800"'),
    "a raw newline in text": replaced('"w"', '"w\n"'),
}


@pytest.mark.parametrize("data", BAD_SYNTAX.values(), ids=BAD_SYNTAX)
def test_row_21_text_that_is_not_the_expected_json_is_refused(data: bytes) -> None:
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
    "name a number": document(shard(record(name=1))),
    "shape a number": document(shard(record(shape=6))),
    "shape a string": document(shard(record(shape="6"))),
    "shape with null": document(shard(record(shape=[None, 6]))),
    "dtype a list": document(shard(record(dtype=["float32"]))),
    "format a boolean": document(shard(record(format=True))),
    "size a string": document(shard(record(nbytes="24"))),
    # repeated names
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
def test_row_21_missing_wrong_and_repeated_fields_are_refused(value: Any) -> None:
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
def test_the_hint_names_web_pages_and_git_lfs_pointers(data: bytes, words: str) -> None:
    assert words in str(check_refused(data, ManifestSyntaxError))


# --- accepted manifests -------------------------------------------------------------------------------


def test_a_shard_without_digests() -> None:
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
def test_a_manifest_without_metadata(value: dict[str, Any]) -> None:
    manifest = parse(value)
    assert manifest.metadata == {}
    assert (len(manifest), manifest.nbytes, manifest.shards) == (0, 0, ())


def test_metadata_may_be_any_json() -> None:
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


def test_a_shard_without_a_format_is_raw() -> None:
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
def test_stored_dtypes(dtype: str, form: str, stored: str, nbytes: int) -> None:
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
def test_scalars_and_empty_tensors(shape: list[int], nbytes: int) -> None:
    assert parse_one(shape=shape, nbytes=nbytes).shape == tuple(shape)


def test_empty_tensor_at_the_end_of_its_shard() -> None:
    assert parse_one(shape=[0], nbytes=0, byteOffset=64).byte_offset == 64


def test_minus_zero_is_an_integer() -> None:
    (found,) = parse(replaced('"byteOffset": 0', '"byteOffset": -0')).records
    assert found.byte_offset == 0


def test_white_space_and_escapes() -> None:
    data = GOOD.replace("{", "{\r\n\t ").replace('"w"', '"\\u0077\\ud83d\\ude00"').encode()
    assert list(parse(data)) == ["w\U0001f600"]


# --- errors -------------------------------------------------------------------------------------------


def test_errors_name_the_manifest_and_its_url() -> None:
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


def test_the_manifest_keeps_its_name() -> None:
    assert parse_manifest(b'{"records": []}', name="x.json").name == "x.json"
