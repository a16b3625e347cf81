"""Read untrusted JSON in short steps, with little memory.

The standard library's scanner reads all values that fit into a window of 1 MiB; larger objects and arrays are taken
apart here. So Ctrl-C takes effect while even the largest manifest is read, and its records need not all be in memory at
once.

JSON that parsers interpret in different ways is refused: duplicate keys, NaN and infinities, very long numbers, deep
nesting.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from ..errors import ManifestLimitError, ManifestSyntaxError
from .strict_json import MAX_MANIFEST_BYTES, MAX_RECORDS, MAX_SHARDS, WEB_PAGE_HINT, quote

__all__ = ["MAX_VALUES", "TOO_LARGE", "JsonReader"]

#: Bytes that are decoded and scanned in one step, which takes 50 ms at most.
_WINDOW_BYTES = 1 << 20
_LEAST_WINDOW_BYTES = 1 << 14
#: Characters of elements that are read together. With more, so many objects would exist at once that Python collects
#: garbage more often, which takes 0.1 s in a process that has imported PyTorch.
_TOGETHER = 1 << 15
#: The most bytes of one string.
MAX_TEXT_BYTES = 16 << 20
#: The most values in objects and arrays that do not fit into a window, not counting records: a value of three bytes
#: may take 20 times its size in memory.
MAX_VALUES = 1 << 20
#: The most objects, and the most arrays, in one manifest: one for each record and shard, the rest for metadata.
_MAX_NODES = MAX_RECORDS + MAX_SHARDS + (1 << 16)
#: The most commas in one manifest: a record needs six.
_MAX_COMMAS = 6 * _MAX_NODES
_MAX_DEPTH = 64  # of values that do not fit into a window
_MAX_DIGITS = 400  # of one number; the largest float64 has 309
_DIGITS_ALONE = bytes(b"0 "[chr(byte) not in "0123456789"] for byte in range(256))
_TOO_LONG = b"0" * (_MAX_DIGITS + 1)  # may also be part of a string
_SPACE = re.compile(r"[ \t\n\r]*")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

#: Returned by `JsonReader.small_value` instead of a value that must be taken apart.
TOO_LARGE: Any = object()


class JsonReader:
    """Read one JSON document from its start to its end.

    Parameters
    ----------
    data : bytes
        UTF-8, with or without a byte order mark.
    check : callable
        Called for each window; may raise to cancel.

    Raises
    ------
    ManifestSyntaxError, ManifestLimitError
        Also raised by all methods.
    """

    def __init__(self, data: bytes, check: Callable[[], None] = lambda: None) -> None:
        if len(data) > MAX_MANIFEST_BYTES:
            hint = None if data[:64].lstrip().startswith(b"{") else _hint_for_binary(data)
            raise ManifestLimitError(f"the manifest is larger than {MAX_MANIFEST_BYTES >> 20} MiB", hint=hint)
        if data.count(b"{") > _MAX_NODES or data.count(b"[") > _MAX_NODES or data.count(b",") > _MAX_COMMAS:
            raise ManifestLimitError(f"the manifest has more than {MAX_RECORDS} records, or too many other values")
        self._data = data
        self._check = check
        self._decoder = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_constant=_constant)
        self._decoder_of_long_numbers = json.JSONDecoder(
            object_pairs_hook=_object, parse_float=_number, parse_constant=_constant, parse_int=_integer
        )
        self._depth = self._position = self._values = 0
        self._must_read_alone = False
        self._decode = self._decoder.raw_decode
        self._load(len(_BYTE_ORDER_MARK) if data.startswith(_BYTE_ORDER_MARK) else 0)

    def peek(self) -> str:
        """Return the next character that is not whitespace, or an empty string at the end."""
        while True:
            if space := _SPACE.match(self._text, self._position):
                self._position = space.end()
            if self._position < len(self._text) or self._is_last:
                return self._text[self._position : self._position + 1]
            self._load(self._end)

    def value(self) -> Any:
        """Read the next value, of any size."""
        value = self.small_value()
        return self._large_value() if value is TOO_LARGE else value

    def small_value(self) -> Any:
        """Read the next value; if it does not fit into a window, return `TOO_LARGE` and read nothing."""
        while True:
            self.peek()
            start = self._position
            try:
                value, end = self._decode(self._text, start)
            except json.JSONDecodeError as error:
                if self._is_last:
                    raise self._syntax_error(error.msg, error.pos) from error
            except RecursionError as error:
                raise ManifestSyntaxError("the manifest is nested too deeply") from error
            else:
                # A number may go on in the next window: the scanner reads "1", "1e" and "1e+" all as 1.
                if end + 2 < len(self._text) or self._is_last:
                    self._position = end
                    return value
            if start == 0:
                return TOO_LARGE
            self._load(self._offset)

    def members(self) -> Iterator[str]:
        """Read the object that comes next: yield each key; the caller must then read its value."""
        keys = set[str]()
        for _ in self._items("{", "}"):
            if self.peek() != '"':
                raise self._syntax_error("Expecting property name enclosed in double quotes", self._position)
            key = self.value()
            if key in keys:
                raise _duplicate(key)
            keys.add(key)
            if self.peek() != ":":
                raise self._syntax_error("Expecting ':' delimiter", self._position)
            self._position += 1
            yield key

    def elements(self) -> Iterator[None]:
        """Read the array that comes next: yield before each element, which the caller must then read."""
        return self._items("[", "]")

    def elements_at_once(self) -> Iterator[list[Any]]:
        """Read the array that comes next: yield its elements, many at a time."""
        return (self._next_elements() or [self.value()] for _ in self._items("[", "]"))

    def end(self) -> None:
        """Raise unless the document ends here."""
        if self.peek():
            raise self._syntax_error("Extra data", self._position)

    def _items(self, opening: str, closing: str) -> Iterator[None]:
        assert self.peek() == opening
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ManifestSyntaxError("the manifest is nested too deeply")
        self._position += 1
        if self.peek() != closing:
            yield
            while self.peek() == ",":
                self._position += 1
                yield
            if self.peek() != closing:
                raise self._syntax_error("Expecting ',' delimiter", self._position)
        self._position += 1
        self._depth -= 1

    def _next_elements(self) -> list[Any]:
        """Read some elements that end with an object in this window; return none if the next must be read alone."""
        self.peek()
        start, elements = self._position, list[Any]()
        end = self._text.rfind("}", start, start + _TOGETHER) + 1
        if end and not self._must_read_alone:
            # If the array ends before, the scanner ends there, too.
            with contextlib.suppress(json.JSONDecodeError, RecursionError, ManifestSyntaxError):
                elements, stop = self._decode(f"[{self._text[start:end]}]", 0)
                self._position = start + stop - len("[]")
            self._must_read_alone = not elements  # or each of them could be scanned in vain
        return elements

    def _large_value(self) -> Any:
        """Read a value that begins where the window does and is longer than it."""
        kind = self.peek()
        if kind == "{":
            return {key: self._counted_value() for key in self.members()}
        if kind == "[":
            return [self._counted_value() for _ in self.elements()]
        if kind != '"':
            self._refuse()
        size = len(self._text)
        while (text := self.small_value()) is TOO_LARGE:
            if size >= MAX_TEXT_BYTES:
                raise ManifestLimitError(f"the manifest has a text of more than {MAX_TEXT_BYTES >> 20} MiB")
            size *= 4
            self._load(self._offset, min(size, MAX_TEXT_BYTES))
        self._load(self._offset)  # a window of the usual size again
        return text

    def _counted_value(self) -> Any:
        value = self.small_value()
        if value is TOO_LARGE:
            value = self._large_value()  # counts the values inside
        elif type(value) in (dict, list):
            self._values += _count(value)
        self._values += 1
        if self._values > MAX_VALUES:
            raise ManifestLimitError(f"the manifest has more than {MAX_VALUES} values beside its records")
        return value

    def _load(self, start: int, size: int | None = None) -> None:
        """Decode the window that begins at byte `start`."""
        self._check()
        if size is None:
            # The scanner reads a whole window to find that a value is too large. The first value inside begins close
            # to it, and is perhaps too large, too. With smaller windows at each level, the repeated scans stay cheap.
            size = max(_WINDOW_BYTES >> max(self._depth - 3, 0), _LEAST_WINDOW_BYTES)
        data, end = self._data, start + size
        self._is_last = end >= len(data)
        if not self._is_last:
            while end > start + size - 4 and data[end] & 0xC0 == 0x80:  # not in the middle of a character
                end -= 1
        window = data[start:end]
        try:
            self._text = window.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ManifestSyntaxError("the manifest is not UTF-8", hint=_hint_for_binary(data)) from error
        self._start, self._end, self._position = start, start + len(window), 0
        self._must_read_alone = False
        # Two passes over the bytes cost far less than a Python call for each number.
        has_long_number = _TOO_LONG in window.translate(_DIGITS_ALONE)
        self._decode = (self._decoder_of_long_numbers if has_long_number else self._decoder).raw_decode

    @property
    def _offset(self) -> int:
        """Return the offset of the next byte of the document."""
        if len(self._text) == self._end - self._start:
            return self._start + self._position
        return self._start + len(self._text[: self._position].encode())

    def _refuse(self) -> NoReturn:
        """Raise for a value longer than a window that is not an object, array or string."""
        try:
            self._decode(self._text, self._position)
        except json.JSONDecodeError as error:
            raise self._syntax_error(error.msg, error.pos) from error
        raise ManifestSyntaxError("the manifest has a number that is too long")

    def _syntax_error(self, reason: str, position: int) -> ManifestSyntaxError:
        offset = self._start + len(self._text[:position].encode())
        line = self._data.count(b"\n", 0, offset) + 1
        column = offset - self._data.rfind(b"\n", 0, offset)
        return ManifestSyntaxError(
            f"the manifest is not JSON: {reason}: line {line} column {column} (byte {offset})",
            hint=_hint_for_other_files(self._data),
        )


def _hint_for_other_files(data: bytes) -> str | None:
    start = data[:256].removeprefix(_BYTE_ORDER_MARK).lstrip().lower()
    if start.startswith(b"<"):
        return WEB_PAGE_HINT
    if start.startswith(b"version https://git-lfs"):
        return "It is a git-lfs pointer, not the file: fetch the file itself (git lfs pull)."
    return _encoding_hint(data)


def _hint_for_binary(data: bytes) -> str:
    if data.startswith(b"PK\x03\x04"):
        return "It is a zip archive: `ndcache dump` makes a model of an .npz file."
    return _encoding_hint(data) or "Give the model's directory or its JSON manifest, not a shard."


def _encoding_hint(data: bytes) -> str | None:
    """Return a hint if the file is compressed or not UTF-8, else None."""
    if data.startswith(b"\x1f\x8b"):
        return "It is compressed with gzip: decompress it, or let the server declare it with Content-Encoding: gzip."
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        return "It is compressed with zstd: decompress it."
    if data.startswith((b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{", b"\0\0\0{")):
        return "It is UTF-16 or UTF-32 text: save it as UTF-8."
    return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _duplicate(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return value


def _duplicate(key: str) -> ManifestSyntaxError:
    return ManifestSyntaxError(f"the manifest has the key {quote(key)} twice in one object")


def _count(value: Any) -> int:
    """Count the values in an object or array."""
    found, level = 0, [value]
    while level:
        below = [inner for item in level for inner in (item.values() if type(item) is dict else item)]
        found += len(below)
        level = [item for item in below if type(item) in (dict, list)]
    return found


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ManifestSyntaxError(f"the manifest has a number of {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    if len(text) > _MAX_DIGITS:
        raise ManifestSyntaxError(f"the manifest has a number of {len(text)} digits")
    value = float(text)
    if math.isinf(value):
        raise ManifestSyntaxError(f"the manifest has the number {quote(text)}, which is too large")
    return value


def _constant(text: str) -> NoReturn:
    raise ManifestSyntaxError(f"the manifest has {text}, which is not JSON")
