"""The tensors of a conversion: each with the dtype that it will have, and its bytes from those of the source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..format.codec import encode_bf16
from ..format.manifest import Record, Shard
from ..format.numpy_dtypes import DTYPES
from ..format.shard_writer import Encoding
from .pieces import Bytes

__all__ = ["OutputTensor", "plan_tensors"]

#: Bytes that are converted at once.
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor as it will be written.

    Attributes
    ----------
    record : Record
        Its place in the source.
    dtype : str
        The dtype of its values, by its name in manifests.
    stored_dtype : str
        The dtype of the written bytes: ``"bfloat16"`` if float32 is halved, else `dtype`.
    encoding : {"raw", "f32-to-bf16"}
        As the caller wants it, which has no effect on other dtypes than float32.
    """

    record: Record
    dtype: str
    stored_dtype: str
    encoding: Encoding

    @property
    def name(self) -> str:
        """Return the tensor's name."""
        return self.record.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the tensor's shape."""
        return self.record.shape

    @property
    def nbytes(self) -> int:
        """Return the number of written bytes."""
        if self.stored_dtype == self.record.stored_dtype:
            return self.record.nbytes
        return math.prod(self.shape) * DTYPES[self.stored_dtype].itemsize

    @property
    def is_halved(self) -> bool:
        """Return whether float32 is written as bfloat16."""
        return self.stored_dtype != self.dtype

    def encode(self, pieces: Iterable[Bytes]) -> Iterator[Bytes]:
        """Yield the bytes to write, from pieces of the stored bytes in the source, each of which has whole values."""
        source = self.record.stored_dtype
        if source == self.stored_dtype:
            yield from pieces
            return
        step = _CHUNK_BYTES // DTYPES[source].itemsize
        for piece in pieces:
            values = np.frombuffer(piece, DTYPES[source])
            for start in range(0, values.size, step):
                chunk = values[start : start + step]
                encoded = encode_bf16(chunk) if source == "float32" else chunk.astype(DTYPES["float32"])
                yield encoded.view(np.uint8)


def plan_tensors(
    shards: Sequence[Shard], encoding_of: Callable[[str], Encoding], *, decode: bool
) -> list[list[OutputTensor]]:
    """Return the tensors of each shard that has some, in manifest order.

    Parameters
    ----------
    shards : sequence of Shard
        With the records of the wanted tensors only.
    encoding_of : callable
        Return the encoding of a tensor, by its name.
    decode : bool
        Whether float32 that the source stores as bfloat16 is float32; otherwise it is bfloat16.
    """
    return [[_output(record, encoding_of, decode) for record in shard.records] for shard in shards if shard.records]


def _output(record: Record, encoding_of: Callable[[str], Encoding], decode: bool) -> OutputTensor:
    dtype = record.dtype if decode else record.stored_dtype
    encoding = encoding_of(record.name)
    stored_dtype = "bfloat16" if dtype == "float32" and encoding == "f32-to-bf16" else dtype
    return OutputTensor(record, dtype, stored_dtype, encoding)
