"""Files that are read while they are being written."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ndcache
from ndcache.format.manifest import Shard
from ndcache.store.directory import ModelDirectory
from ndcache.store.partials.file import PartialFile
from ndcache.store.partials.growing import GrowingFile
from ndcache.store.partials.ranges import ByteRanges
from ndcache.workers.postponed import Gate, Postponed

DATA = bytes(range(40))


class Pool:
    """Counts the gates that are opened."""

    opened = 0

    def open_gate(self, gate: Gate[Any]) -> None:
        self.opened += 1


@pytest.fixture
def pool() -> Any:
    return Pool()


@pytest.fixture
def partial(tmp_path: Path) -> Iterator[PartialFile]:
    cache = ModelDirectory(tmp_path / "cache" / "default" / "model", "http://host/")
    with cache.partials.create("a.bin") as partial:
        yield partial


@pytest.fixture
def growing(pool: Any) -> Iterator[GrowingFile]:
    growing = GrowingFile(shard(), pool)
    yield growing
    growing.end()


def shard(header: bytes | None = None) -> Shard:
    known = None if header is None else (len(header), hashlib.sha256(header).hexdigest())
    return Shard("a.bin", len(DATA), None, None, "raw-shard", (), header=known)


def read(growing: GrowingFile, *ranges: tuple[int, int]) -> bytes:
    file = growing.open(ByteRanges(ranges))
    assert file is not None
    with file:
        return b"".join(os.pread(file.fileno(), end - start, start) for start, end in ranges)


def write(partial: PartialFile, start: int, end: int, data: bytes = DATA) -> None:
    partial.write_at(data[start:end], start)


def test_a_task_waits_until_all_of_its_bytes_are_there(growing: GrowingFile, partial: PartialFile, pool: Any) -> None:
    with pytest.raises(Postponed):
        read(growing, (0, 4), (10, 14))  # before the file has begun
    partial.let_read(growing)
    write(partial, 12, 20)
    write(partial, 0, 4)
    write(partial, 30, 40)
    assert pool.opened == 0
    with pytest.raises(Postponed):
        read(growing, (0, 4), (10, 14))
    write(partial, 4, 12)
    assert pool.opened == 2
    assert read(growing, (0, 4), (10, 14)) == DATA[:4] + DATA[10:14]
    assert growing.was_read


def test_a_file_that_begins_with_bytes_runs_the_tasks_that_wait_for_them(
    growing: GrowingFile, partial: PartialFile, pool: Any
) -> None:
    with pytest.raises(Postponed):
        read(growing, (0, 4))
    write(partial, 0, 10)  # such as those that an interrupted download left
    partial.let_read(growing)
    assert pool.opened == 1
    assert read(growing, (0, 4)) == DATA[:4]


def test_bytes_that_come_just_before_a_task_waits_are_noticed(
    growing: GrowingFile, partial: PartialFile, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    has, writer = growing._has, threading.Thread(target=write, args=(partial, 0, 4))
    partial.let_read(growing)

    def has_not_yet(wanted: ByteRanges) -> bool:
        monkeypatch.undo()
        found = has(wanted)
        writer.start()
        writer.join(0.2)  # it cannot end if it waits for this thread
        return found

    monkeypatch.setattr(growing, "_has", has_not_yet)
    with pytest.raises(Postponed):
        read(growing, (0, 4))
    writer.join()
    assert pool.opened == 1


def test_nothing_more_is_read_once_another_file_has_begun(
    growing: GrowingFile, partial: PartialFile, pool: Any
) -> None:
    partial.let_read(growing)
    write(partial, 0, 20)
    kept = growing.open(ByteRanges([(0, 10)]))
    assert kept is not None
    partial.restart()
    write(partial, 0, 40, DATA[::-1])
    partial.let_read(growing)
    assert partial.growing is None
    with pytest.raises(Postponed):
        read(growing, (0, 10))
    with kept:
        assert os.pread(kept.fileno(), 10, 0) == DATA[:10]
    growing.end()
    assert pool.opened == 1
    assert growing.open(ByteRanges([(0, 10)])) is None


def test_another_file_can_be_read_if_nothing_was_read_of_the_first(growing: GrowingFile, partial: PartialFile) -> None:
    partial.let_read(growing)
    write(partial, 0, 20)
    partial.restart()
    with pytest.raises(Postponed):
        read(growing, (0, 10))
    partial.let_read(growing)
    write(partial, 0, 20, DATA[::-1])
    assert read(growing, (0, 10)) == DATA[::-1][:10]


@pytest.mark.parametrize(("differs_at", "is_same"), [(None, True), (9, False), (10, True)])
def test_what_was_read_is_compared_with_the_complete_file(
    growing: GrowingFile, partial: PartialFile, tmp_path: Path, differs_at: int | None, is_same: bool
) -> None:
    partial.let_read(growing)
    write(partial, 0, 20)
    read(growing, (5, 10))
    complete, checks = bytearray(DATA), list[None]()
    if differs_at is not None:
        complete[differs_at] ^= 1
    (tmp_path / "complete").write_bytes(complete)
    with (tmp_path / "complete").open("rb") as file:
        if is_same:
            growing.check(file, lambda: checks.append(None))
        else:
            with pytest.raises(ndcache.RemoteChangedError, match="had been given out") as caught:
                growing.check(file, lambda: checks.append(None))
            assert caught.value.shard == "a.bin"
    assert checks == [None]


def test_the_file_itself_is_not_compared(growing: GrowingFile, partial: PartialFile) -> None:
    partial.let_read(growing)
    write(partial, 0, 40)
    read(growing, (5, 10))
    with partial.open_reader() as file:
        growing.check(file, lambda: pytest.fail("it was read"))


@pytest.mark.parametrize("is_right", [True, False])
def test_the_header_comes_first(partial: PartialFile, pool: Any, is_right: bool) -> None:
    growing = GrowingFile(shard(header=DATA[:8] if is_right else DATA[1:9]), pool)
    partial.let_read(growing)
    write(partial, 10, 20)
    with pytest.raises(Postponed):
        read(growing, (10, 20))
    write(partial, 0, 8)
    assert pool.opened == is_right
    if is_right:
        assert read(growing, (10, 20)) == DATA[10:20]
    else:
        with pytest.raises(Postponed):  # for good: it is another file
            read(growing, (10, 20))
    growing.end()
