"""The reader of untrusted JSON: same values and errors wherever a window ends."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ndcache.errors import ManifestLimitError, ManifestSyntaxError
from ndcache.format import json_reader
from ndcache.format.json_reader import JsonReader
from ndcache.format.strict_json import MAX_MANIFEST_BYTES


@pytest.fixture(params=[24, 64, 1 << 20])
def _window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make windows so small that values lie across their ends."""
    monkeypatch.setattr(json_reader, "_WINDOW_BYTES", request.param)
    monkeypatch.setattr(json_reader, "_LEAST_WINDOW_BYTES", request.param)


def read(data: bytes) -> Any:
    reader = JsonReader(data)
    value = reader.value()
    reader.end()
    return value


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@pytest.mark.parametrize("size", [8, 13, 64])
@settings(deadline=None, derandomize=True, database=None)
@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_values_are_those_of_the_json_module(size: int, value: Any, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_reader, "_WINDOW_BYTES", size)
        patch.setattr(json_reader, "_LEAST_WINDOW_BYTES", size)
        for start in (b"", b"\xef\xbb\xbf"):
            # Not read are numbers longer than the window, and text that is not Unicode.
            with contextlib.suppress(ManifestSyntaxError):
                assert read(start + text) == value


@pytest.mark.usefixtures("_window")
@pytest.mark.parametrize(
    "text",
    [
        "1",
        "-1",
        "1.5e+10",
        '"\u00e9\U0001f600\\ud83d\\ude00"',
        '{"a": [1, 2, {"b": null}], "c": "\u20ac"}',
        "[[], {}, [[]], [{}]]",
        " \n\t[1 , 2]\r\n ",
        '{"a":1e+2,"b":[12345678901234567890]}',
    ],
)
def test_values_across_windows(text: str) -> None:
    assert read(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value: line 1 column 1 (byte 0)"),
        ("[,1]", "Expecting value: line 1 column 2 (byte 1)"),
        ("[1 2]", "Expecting ',' delimiter"),
        ("[1", "Expecting ',' delimiter"),
        ("[", "Expecting value"),
        ('{"a" 1}', "Expecting ':' delimiter"),
        ('{"a": 1, 2: 3}', "Expecting property name"),
        ('{"a": 1', "Expecting ',' delimiter"),
        ("{1: 1}", "Expecting property name"),
        ('{"a": 1, "b": 2, "a": 3}', "has the key 'a' twice"),
        ('["abc', "Unterminated string"),
        ('["a\nb"]', "Invalid control character"),
        ('["\\x"]', "Invalid \\escape"),
        ("[1] 2", "Extra data: line 1 column 5 (byte 4)"),
        ("[\n\n x]", "Expecting value: line 3 column 2 (byte 4)"),
        ("[nul]", "Expecting value"),
        ("[01]", "Expecting ',' delimiter"),
        ("[NaN]", "NaN"),
        ("[-Infinity]", "-Infinity"),
        ("[1e999]", "too large"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("size", [16, 1 << 20])
def test_row_21_ambiguous_or_broken_json_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str, words: str, size: int
) -> None:
    monkeypatch.setattr(json_reader, "_WINDOW_BYTES", size)
    monkeypatch.setattr(json_reader, "_LEAST_WINDOW_BYTES", size)
    with pytest.raises(ManifestSyntaxError) as caught:
        read(text.encode())
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ['"%s"' % ("a" * 99), '{"%s": 1}' % ("a" * 99), '["%s"]' % ("\\n" * 99)])
def test_row_22_a_very_long_string_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    for name, size in (("_WINDOW_BYTES", 8), ("_LEAST_WINDOW_BYTES", 8), ("MAX_TEXT_BYTES", 64)):
        monkeypatch.setattr(json_reader, name, size)
    with pytest.raises(ManifestLimitError, match="a text of more than"):
        read(text.encode())
    monkeypatch.setattr(json_reader, "MAX_TEXT_BYTES", 1 << 10)
    assert read(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    ["[1,2,3,4,5,6]", "[[1,2],[3,4]]", "[[[[[[]]]]]]", '{"a":1,"b":2,"c":3,"d":4,"e":5,"f":6}', '[{"a":[1,2,3,4]}]'],
)
def test_row_22_too_many_values_are_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(json_reader, "_WINDOW_BYTES", 8)
    monkeypatch.setattr(json_reader, "_LEAST_WINDOW_BYTES", 8)
    assert read(text.encode()) == json.loads(text)
    monkeypatch.setattr(json_reader, "MAX_VALUES", 4)
    with pytest.raises(ManifestLimitError, match="more than 4 values"):
        read(text.encode())


def test_elements_that_cannot_be_read_together_are_scanned_together_once() -> None:
    reader, scans = JsonReader(b"[" + b'{"a": 1}, ' * 100 + b'"}"]'), list[str]()
    decode = reader._decode

    def note(text: str, start: int = 0) -> Any:
        scans.append(text[start])
        return decode(text, start)

    reader._decode = note  # type: ignore[assignment]
    assert list(reader.elements_at_once()) == [[{"a": 1}]] * 100 + [["}"]]
    assert scans.count("[") == 1


@pytest.mark.parametrize(("start", "hint"), [(b"PK\x03\x04", "`ndcache dump`"), (b"\xff\x01", "not a shard")])
@pytest.mark.parametrize("nbytes", [100, MAX_MANIFEST_BYTES])
def test_a_file_of_arrays_is_no_manifest(start: bytes, hint: str, nbytes: int) -> None:
    with pytest.raises((ManifestSyntaxError, ManifestLimitError), match=hint):
        JsonReader(start + b"\xff" * nbytes)
