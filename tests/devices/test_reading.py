"""Records that are read into memory."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ndcache
from ndcache.devices import reading
from ndcache.format.manifest import Record


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 200)), max_size=8), order=st.randoms())
def test_every_record_is_read(tmp_path: Path, sizes: list[tuple[int, int]], order: random.Random) -> None:
    records, offset = [], 0
    for index, (nbytes, gap) in enumerate(sizes):
        records.append(Record(f"t{index}", (nbytes,), "uint8", "raw", offset + gap, nbytes))
        offset += gap + nbytes
    data = np.random.default_rng(offset).bytes(offset)
    (tmp_path / "file").write_bytes(data)
    shard = ndcache.Shard("file", offset, None, None, "raw-shard", tuple(records))
    order.shuffle(records)
    with pytest.MonkeyPatch.context() as patch, open(tmp_path / "file", "rb") as file:
        patch.setattr(reading, "_MAX_GAP", 100)
        found = reading.read_records(file, records, shard, writable=False)
    for record, (array, start) in zip(records, found, strict=True):
        assert start % 64 == 0
        first = record.byte_offset - start
        assert array[first : first + record.nbytes].tobytes() == data[record.byte_offset :][: record.nbytes]
        assert not array.flags.writeable
    if records:
        wanted = sum(record.nbytes for record in records) + len(records) * (100 + 64)
        assert sum({id(array): array.size for array, _ in found}.values()) <= wanted, "wide gaps are skipped"


def test_arrays_may_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1234")
    shard = ndcache.Shard("file", 4, None, None, "raw-shard", (Record("t", (4,), "uint8", "raw", 0, 4),))
    with open(tmp_path / "file", "rb") as file:
        ((array, _),) = reading.read_records(file, shard.records, shard, writable=True)
    array[0] = 0
    assert (tmp_path / "file").read_bytes() == b"1234"
