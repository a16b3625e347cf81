"""Shards cut into segments."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ndcache
from ndcache.devices.segments import Segment, cut_shard, cut_shards
from ndcache.format.manifest import Record

LIMIT = 8192


def shard_of(*sizes: int) -> ndcache.Shard:
    records, offset = [], 0
    for index, nbytes in enumerate(sizes):
        records.append(Record(f"t{index}", (nbytes,), "uint8", "raw", offset, nbytes))
        offset += nbytes
    return ndcache.Shard("a.bin", offset, None, None, "raw-shard", tuple(records))


@given(
    sizes=st.lists(st.one_of(st.integers(0, 3000), st.integers(0, 100_000)), max_size=12), cuts_records=st.booleans()
)
def test_segments_cover_all_records_in_order(sizes: list[int], cuts_records: bool) -> None:
    shard = shard_of(*sizes)
    segments = cut_shard(shard, LIMIT, cuts_records=cuts_records)
    assert segments
    covered: list[Record] = []
    for segment in segments:
        assert segment.shard is shard
        if segment.part is None:
            assert segment.nbytes == sum(record.nbytes for record in segment.records)
            assert segment.nbytes <= LIMIT or (len(segment.records) == 1 and not cuts_records)
        else:
            assert cuts_records
            assert (len(segment.records), segment.nbytes) == (1, segment.part[1] - segment.part[0])
            assert 0 < segment.nbytes <= LIMIT
        covered += segment.records if segment.ends_record else ()
    assert tuple(covered) == shard.records
    for one, other in pairwise(segments):
        if one.part is not None and not one.ends_record:
            assert other.part is not None
            assert (other.records, other.part[0]) == (one.records, one.part[1])
            assert one.part[1] % 4096 == 0
        elif other.part is not None:
            assert other.part[0] == 0


def test_a_usual_shard_is_one_segment() -> None:
    shard = shard_of(3000, 0, LIMIT - 3000)
    assert cut_shard(shard, LIMIT, cuts_records=True) == [Segment(shard, shard.records, LIMIT)]
    assert len(cut_shard(shard, LIMIT - 1, cuts_records=True)) == 2


def test_few_records_of_a_large_file_are_one_segment() -> None:
    whole = shard_of(5000, 1 << 30, 2000)
    shard = ndcache.Shard("a.bin", whole.nbytes, None, None, "raw-shard", whole.records[::2])
    assert cut_shard(shard, LIMIT, cuts_records=True) == [Segment(shard, shard.records, 7000)]


@pytest.mark.parametrize(
    ("nbytes", "parts"), [(LIMIT, 1), (LIMIT + 1, 2), (5 * LIMIT, 5), (5 * LIMIT + 1, 6), (1 << 20, 128)]
)
def test_parts_of_a_record_have_about_the_same_size(nbytes: int, parts: int) -> None:
    segments = cut_shard(shard_of(nbytes), LIMIT, cuts_records=True)
    assert len(segments) == parts
    assert max(segment.nbytes for segment in segments[:-1] or segments) == segments[0].nbytes


def test_a_file_without_records_is_one_segment() -> None:
    shard = ndcache.Shard("a.bin", 1 << 30, None, None, "raw-shard", ())
    assert cut_shard(shard, LIMIT, cuts_records=True) == [Segment(shard, (), 0)]


def test_the_first_segments_of_a_file_that_is_read_early_are_smaller() -> None:
    shard, most = shard_of(*[1 << 20] * 1024), 64 << 20
    segments = cut_shard(shard, most, cuts_records=False, is_early=True)
    before = 0
    for segment in segments:
        assert segment.nbytes <= min(most, max(8 << 20, before // 4))
        before += segment.nbytes
    assert before == shard.nbytes
    assert len(segments) < 30
    assert max(segment.nbytes for segment in segments) == most
    assert len(cut_shard(shard, most, cuts_records=False)) == 16


def test_segments_are_no_larger_than_the_memory_limit() -> None:
    early, late = shard_of(*[1 << 20] * 64), shard_of(*[1 << 20] * 64)

    def counts(memory_limit: int) -> list[int]:
        files = cut_shards([early, late], 32 << 20, memory_limit, lambda shard: shard is early, cuts_records=True)
        return list(map(len, files))

    assert counts(1 << 30) == [8, 2]
    assert counts(4 << 20) == [16, 16]
    assert counts(1) == [64, 64]
