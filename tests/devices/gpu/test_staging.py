"""Staging memory, and the layout of shards in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ndcache
from ndcache.devices.gpu.layout import plan_batches
from ndcache.devices.gpu.staging import StagingRing
from ndcache.devices.segments import cut_shard
from ndcache.format.manifest import Record

from ...helpers import models
from ...helpers.devices import BufferWatch, assert_tensors


def test_staging_buffers_are_reused_within_the_limit(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = BufferWatch(gpu, monkeypatch)
    ring = StagingRing(gpu, limit=3 << 16)
    buffers = [ring.acquire(1 << 16) for _ in range(2)]
    for buffer in buffers:
        buffer.view[:4] = b"data"
        buffer.unmap()
        ring.release(buffer)
    assert ring.acquire(1 << 16) is buffers[0]  # the oldest
    assert len(watch.made) == 2
    assert ring.acquire(40_000) is buffers[1]  # larger than needed
    ring.release(buffers[1])
    ring.acquire(1 << 18)  # within the limit only if an unused one is destroyed
    assert watch.destroyed == [buffers[1].buffer]
    ring.acquire(1 << 18)  # exceeds the limit, as the other buffers are in use
    ring.destroy()
    assert watch.alive == 0


def test_staging_memory_that_cannot_be_written_in_place(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(gpu.create_buffer(size=4, usage=1 << 7))
    monkeypatch.delattr(kind, "_experimental_get_mapped_range", raising=False)
    arrays = models.simple_model(tmp_path, shards=40)
    with ndcache.load(tmp_path, gpu, max_workers=2, memory_limit=1 << 18) as weights:
        assert_tensors(weights, arrays)


@given(
    sizes=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 9), st.booleans()), max_size=12),
    max_bytes=st.sampled_from([4, 8, 64, 256, 4096, 1 << 20]),
    order=st.randoms(use_true_random=False),
)
def test_every_byte_reaches_its_tensor(sizes: list[tuple[int, int, bool]], max_bytes: int, order: Any) -> None:
    """Make the copies of all batches as a GPU would, in whole words, and compare the tensors with the file."""
    records, offset = [], 0
    for index, (count, gap, is_bf16) in enumerate(sizes):
        offset += gap
        nbytes = 2 * count if is_bf16 else count
        records.append(
            Record(
                name=f"t{index}",
                shape=(count,),
                dtype="float32" if is_bf16 else "uint8",
                format="f32-to-bf16" if is_bf16 else "raw",
                byte_offset=offset,
                nbytes=nbytes,
            )
        )
        offset += nbytes
    order.shuffle(records)
    file = np.random.default_rng(offset).bytes(offset)
    tensors = [bytearray(-(-record.nbytes // 4) * 4) for record in records]
    for batch in plan_batches(records, max_bytes, decode=True):
        assert batch.nbytes <= max_bytes
        memory = bytearray(b"\xff" * batch.nbytes)
        for read in batch.reads:
            data = file[read.file_offset : read.file_offset + read.nbytes]
            memory[read.staging_offset : read.staging_offset + read.nbytes] = data
            if read.is_tail:
                memory[read.staging_offset : read.staging_offset + 4] = data + bytes(4 - len(data))
        start, end = batch.expanded_range
        assert 0 <= start <= end <= batch.nbytes
        for copy in batch.copies:
            assert copy.staging_offset % 4 == copy.tensor_offset % 4 == 0
            assert copy.is_expanded == records[copy.record_index].is_bf16_encoded
            assert copy.nbytes % (2 if copy.is_expanded else 4) == 0
            assert not copy.is_expanded or start <= copy.staging_offset < copy.staging_offset + copy.nbytes <= end
            copied = memory[copy.staging_offset : copy.staging_offset + copy.nbytes]
            tensors[copy.record_index][copy.tensor_offset : copy.tensor_offset + copy.nbytes] = copied
    for record, tensor in zip(records, tensors, strict=True):
        stored = file[record.byte_offset : record.byte_offset + record.nbytes]
        assert tensor == stored + bytes(len(tensor) - record.nbytes)


@given(nbytes=st.integers(8194, 60_000), is_bf16=st.booleans(), max_bytes=st.sampled_from([4096, 8192, 1 << 20]))
def test_every_byte_of_a_cut_record_reaches_its_tensor(nbytes: int, is_bf16: bool, max_bytes: int) -> None:
    nbytes -= nbytes % 2 if is_bf16 else 0
    dtype, encoding = ("float32", "f32-to-bf16") if is_bf16 else ("uint8", "raw")
    record = Record("t", (nbytes // 2 if is_bf16 else nbytes,), dtype, encoding, 3, nbytes)
    file = np.random.default_rng(nbytes).bytes(nbytes + 3)
    shard = ndcache.Shard("a.bin", len(file), None, None, "raw-shard", (record,))
    tensor = bytearray(-(-nbytes // 4) * 4)
    segments, bytes_read = cut_shard(shard, 8192, cuts_records=True), 0
    for segment in segments:
        for batch in plan_batches(segment.records, max_bytes, decode=True, part=segment.part):
            memory = bytearray(batch.nbytes)
            for read in batch.reads:
                data = file[read.file_offset : read.file_offset + read.nbytes]
                memory[read.staging_offset : read.staging_offset + read.nbytes] = data
                bytes_read += read.nbytes
            for copy in batch.copies:
                assert copy.is_expanded == is_bf16
                copied = memory[copy.staging_offset : copy.staging_offset + copy.nbytes]
                tensor[copy.tensor_offset : copy.tensor_offset + copy.nbytes] = copied
    assert len(segments) > 1
    assert bytes_read == nbytes
    assert tensor == file[3:] + bytes(len(tensor) - nbytes)
