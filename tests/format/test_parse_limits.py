"""Manifests that are too large are refused, in short steps and with little memory."""

from __future__ import annotations

import contextlib
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ndcache.errors import ManifestError, ManifestLimitError
from ndcache.format import parse as parser
from ndcache.format import strict_json
from ndcache.format.parse import parse_manifest

from ..helpers.manifests import GOOD, check_refused, document, parse, record, shard


def peak_of(data: bytes) -> int:
    """Return the most bytes that are allocated while `data` is refused for its size."""
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
    """Return `count` different items, separated by commas, padded to 64 MiB."""
    text = start + b",".join(map(items, range(1_000_000, 1_000_000 + count)))
    return text + b" " * ((64 << 20) - len(text) - len(end)) + end


_RECORD = b'{"name":"%d","shape":[1],"dtype":"int8","format":"raw","byteOffset":%d,"nbytes":1}'
_FACE = b'"\xf0\x9f\x98\x80%s",' % (b"a" * (15 << 20))  # takes four bytes for each character when decoded

#: Manifests of the largest size, in several forms. Some are refused, but only after they were read.
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
    """Parse the manifest `form`; print the bytes that memory grew by, and the longest wait of a signal in seconds."""

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
def test_row_22_oversized_manifests_are_refused_without_using_memory(make: Callable[[], bytes]) -> None:
    assert peak_of(make()) < 1 << 20


@pytest.mark.once
def test_row_22_more_than_65536_shards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [b'{"dataPath":"%d","nbytes":0,"records":[]}' % index for index in range(65_537)]
    assert strict_json.MAX_SHARDS == 65_536
    check_refused(b'{"records":[' + b",".join(items) + b"]}", ManifestLimitError)
    assert len(parse(b'{"records":[' + b",".join(items[1:]) + b"]}").shards) == 65_536


@pytest.mark.parametrize(("shards", "accepted"), [([3], True), ([4], False), ([2, 1], True), ([2, 2], False)])
def test_row_22_too_many_records_are_refused(
    monkeypatch: pytest.MonkeyPatch, shards: list[int], accepted: bool
) -> None:
    assert strict_json.MAX_RECORDS == 1 << 20
    monkeypatch.setattr(parser, "MAX_RECORDS", 3)  # the real limit of records does not fit into 64 MiB
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
def test_row_22_the_largest_manifests_leave_memory_and_let_ctrl_c_through(form: str) -> None:
    """Parsing takes at most 450 MiB besides the file, and Ctrl-C takes effect soon."""
    command = [sys.executable, "-c", f"from {__name__} import print_costs; print_costs({form!r})"]
    child = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    nbytes, seconds = child.stdout.split()
    assert int(nbytes) < 450 << 20
    assert float(seconds) < 2  # 0.1 on an idle machine


def test_row_36_check_is_called_for_each_mebibyte_and_may_raise() -> None:
    data, calls = LARGEST["strings"](), 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parse_manifest(data, check=check)


def test_a_manifest_of_the_largest_size_is_read() -> None:
    data = GOOD.encode()
    assert len(parse(data + b" " * ((64 << 20) - len(data)))) == 1


@pytest.mark.parametrize("depth", [1, 60])
def test_nested_metadata_is_read(depth: int) -> None:
    inner: Any = 1
    for level in range(depth):
        inner = [inner] if level % 2 else {"a": inner}
    manifest = parse(document(metadata={"x": inner}))
    assert manifest.metadata["x"] == inner
    assert pickle.loads(pickle.dumps(manifest)) == manifest
