"""The tensors of a segment on the device, and where each of its bytes in the file goes."""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ...format.manifest import Record
from ..segments import Segment
from .framework import tensor_dtype

if TYPE_CHECKING:
    import torch

__all__ = ["Allocator", "Copy", "Read", "SegmentTensors", "plan_reads"]

#: PyTorch takes small tensors out of blocks of 2 MiB: 8,192 of 512 KiB take 131 ms, and 512 of 8 MiB 1.4 ms (H100).
_SMALL_BYTES = 1 << 20
#: If a load has more small tensors than this, those of a segment share one block of memory.
_MOST_SMALL = 256
#: Where tensors begin in shared memory: the largest alignment that kernels ask for.
_ALIGNMENT = 16
#: Unwanted bytes between two records that are read with them, rather than making two reads.
_GAP_BYTES = 64 << 10


class Copy(NamedTuple):
    """Bytes of the file that go to one place on the device.

    Attributes
    ----------
    offset, nbytes : int
        Where they lie in the file; in a `Read`, where they lie in that.
    tensor : torch.Tensor
        A contiguous tensor that receives them.
    start : int
        Where they begin among the stored bytes of its values.
    expands : bool
        Whether they are bfloat16 and the tensor is float32, so that each value takes twice its stored bytes.
    """

    offset: int
    nbytes: int
    tensor: torch.Tensor
    start: int
    expands: bool = False


@dataclass(slots=True)
class Read:
    """A range of the file that is read at once, and the copies to make from it.

    Attributes
    ----------
    offset, nbytes : int
        Where it lies in the file.
    copies : list of Copy
        Parts of it.
    """

    offset: int
    nbytes: int
    copies: list[Copy] = field(default_factory=list)


@dataclass(eq=False)
class SegmentTensors:
    """The tensors of a segment, and, once they are planned, where each byte of the file goes.

    Attributes
    ----------
    tensors : list of torch.Tensor
        In the order of the records. Before the reads are planned, those that will share a block are missing.
    blocks : list of torch.Tensor
        Memory of uint8 that small tensors share.
    reads : list of Read
        In the order of the file.
    """

    tensors: list[torch.Tensor] = field(default_factory=list)
    blocks: list[torch.Tensor] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)

    def clear(self) -> None:
        """Drop the tensors."""
        self.tensors.clear()
        self.blocks.clear()
        self.reads.clear()


class Allocator:
    """Allocate the tensors of a load.

    Each has a storage of its own, except if a load has very many small ones: then those of a segment are parts of one
    storage, because PyTorch would take longer to allocate them than it takes to read them.

    Parameters
    ----------
    device : torch.device
    segments : sequence of Segment
        All that will come.
    into : mapping of str to torch.Tensor
        Tensors of the caller's.
    piece_bytes : int
        The most bytes of a `Read`.
    decode, copy
        See `Device.open_upload`. Copies share no storage.
    """

    def __init__(
        self,
        device: torch.device,
        segments: Sequence[Segment],
        into: Mapping[str, torch.Tensor],
        piece_bytes: int,
        *,
        decode: bool,
        copy: bool,
    ) -> None:
        self._device = device
        self._into = into
        self._piece_bytes = piece_bytes
        self._decode = decode
        small = sum(self._is_small(record) for segment in segments for record in segment.records)
        self._shares = not copy and small > _MOST_SMALL
        self._cut: dict[str, torch.Tensor] = {}  # the tensors of cut records that are not complete
        self._cut_lock = threading.Lock()  # taken by workers only

    def allocate(self, segment: Segment) -> SegmentTensors:
        """Allocate the tensors of a segment. Several threads may call this at once."""
        made = SegmentTensors()
        try:
            for group in self._sharing(segment):
                made.blocks.append(self.bytes(self._block_bytes(group)))
            for record in segment.records:
                if not self._shares_block(record):
                    made.tensors.append(self._own(record, is_cut=segment.part is not None))
        except BaseException:
            made.clear()
            raise
        return made

    def plan(self, made: SegmentTensors, segment: Segment) -> None:
        """Make the tensors that share blocks, and plan what to read and where to copy it."""
        copies: list[Copy] = []
        views: dict[str, torch.Tensor] = {}
        for group, block in zip(self._sharing(segment), made.blocks, strict=True):
            views.update(self._share(copies, group, block))
        own, made.tensors = iter(made.tensors), []
        for record in segment.records:
            tensor = views.get(record.name)
            if tensor is None:
                tensor = next(own)
                first, end = segment.part or (0, record.nbytes)
                if first < end:
                    copies.append(Copy(record.byte_offset + first, end - first, tensor, first, self._expands(record)))
            made.tensors.append(tensor)
        made.reads = plan_reads(_merge(copies), self._piece_bytes)

    def sizes(self, segments: Iterable[Segment]) -> list[int]:
        """Return the bytes of each tensor that has to be allocated."""
        records = {record.name: record for segment in segments for record in segment.records}.values()
        return [self._nbytes(record) for record in records if record.name not in self._into]

    def bytes(self, nbytes: int) -> torch.Tensor:
        """Allocate bytes."""
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def forget(self, segment: Segment) -> None:
        """Forget the tensor of a cut record, with its last part."""
        if segment.part is not None:
            self._cut.pop(segment.records[0].name, None)

    def clear(self) -> None:
        """Drop all tensors."""
        self._cut.clear()

    def _sharing(self, segment: Segment) -> list[list[Record]]:
        """Return the records whose tensors share memory: those to expand in one block, the others in another one."""
        if not self._shares:
            return []
        shared = [record for record in segment.records if self._shares_block(record)]
        expanded = [record for record in shared if self._expands(record)]
        raw = [record for record in shared if not self._expands(record)]
        return [group for group in (expanded, raw) if group]

    def _share(
        self, copies: list[Copy], records: Sequence[Record], block: torch.Tensor
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the names and the tensors of records that share a block."""
        places, expands = _pack(records), self._expands(records[0])
        copies += [Copy(record.byte_offset, record.nbytes, block, places[record.name], expands) for record in records]
        return self._views(block, records, {name: start << expands for name, start in places.items()})

    def _views(
        self, block: torch.Tensor, records: Iterable[Record], places: Mapping[str, int]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names, and tensors that begin at these bytes of a block."""
        typed: dict[torch.dtype, torch.Tensor] = {}
        for record in records:
            dtype = tensor_dtype(record, decode=self._decode)
            if dtype not in typed:
                typed[dtype] = block.view(dtype)
            start = places[record.name] // dtype.itemsize
            yield record.name, typed[dtype].as_strided(record.shape, _strides(record.shape), start)

    def _own(self, record: Record, *, is_cut: bool) -> torch.Tensor:
        if (given := self._into.get(record.name)) is not None:
            return given
        if not is_cut:
            return self._empty(record)
        with self._cut_lock:
            if record.name not in self._cut:
                self._cut[record.name] = self._empty(record)
            return self._cut[record.name]

    def _empty(self, record: Record) -> torch.Tensor:
        import torch

        return torch.empty(record.shape, dtype=tensor_dtype(record, decode=self._decode), device=self._device)

    def _expands(self, record: Record) -> bool:
        return self._decode and record.is_bf16_encoded

    def _nbytes(self, record: Record) -> int:
        """Return the bytes of a record's tensor."""
        return record.nbytes * 2 if self._expands(record) else record.nbytes

    def _block_bytes(self, records: Sequence[Record]) -> int:
        """Return the bytes of the block that the tensors of records of one kind share."""
        stored = sum(_round_up(record.nbytes) for record in records)
        return stored * 2 if self._expands(records[0]) else stored

    def _shares_block(self, record: Record) -> bool:
        return self._shares and self._is_small(record)

    def _is_small(self, record: Record) -> bool:
        return 0 < record.nbytes < _SMALL_BYTES and record.name not in self._into


def plan_reads(copies: Iterable[Copy], piece_bytes: int) -> list[Read]:
    """Return the ranges of the file to read, of at most `piece_bytes`, with the copies to make from each.

    Pieces end between two values where these are expanded.
    """
    reads: list[Read] = []
    read = Read(0, 0)
    for first, nbytes, tensor, start, expands in copies:
        offset, end = first, first + nbytes
        while offset < end:
            room = read.offset + piece_bytes - offset
            if not reads or room <= expands or offset - read.offset - read.nbytes > _GAP_BYTES:
                read, room = Read(offset, 0), piece_bytes
                reads.append(read)
            count = min(end - offset, room - room % 2 if expands else room)
            read.copies.append(Copy(offset - read.offset, count, tensor, start + offset - first, expands))
            read.nbytes = max(read.nbytes, offset + count - read.offset)
            offset += count
    return reads


def _merge(copies: list[Copy]) -> list[Copy]:
    """Sort copies by their place in the file, and merge neighbours that are neighbours on the device, too."""
    merged: list[Copy] = []
    for copy in sorted(copies, key=operator.attrgetter("offset")):
        offset, nbytes, tensor, start, expands = copy
        if merged:
            last = merged[-1]
            if last.tensor is tensor and last.offset + last.nbytes == offset and last.start + last.nbytes == start:
                merged[-1] = Copy(last.offset, last.nbytes + nbytes, tensor, last.start, expands)
                continue
        merged.append(copy)
    return merged


def _pack(records: Iterable[Record]) -> dict[str, int]:
    """Return where the stored bytes of each record begin in one block of memory."""
    offsets, start = {}, 0
    for record in records:
        offsets[record.name] = start
        start += _round_up(record.nbytes)
    return offsets


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Return the strides of a contiguous tensor, in elements."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _round_up(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
