"""Write NDArray caches, byte for byte as TVM does."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UnsupportedDtypeError
from ..files.staging import staged_folder
from ..format.dtypes import ITEM_SIZES
from ..format.shard_writer import ShardWriter
from ..format.writer import publish_dump
from .pieces import Bytes
from .targets import WriteTensor
from .tensors import OutputTensor

__all__ = ["tensor_cache"]


@contextmanager
def tensor_cache(
    directory: Path,
    shards: Sequence[Sequence[OutputTensor]],
    metadata: Mapping[str, Any],
    shard_bytes: int | None,
) -> Iterator[WriteTensor]:
    """Yield a function that writes the next tensor of a directory, which appears at the end of the block.

    Parameters
    ----------
    directory : pathlib.Path
    shards : sequence of sequence of OutputTensor
        The tensors, in the order in which they come.
    metadata : mapping
    shard_bytes : int or None
        The limit of a shard; None if the shards stay as they are.

    Raises
    ------
    UnsupportedDtypeError
        The format has no name for a dtype.
    """
    for tensor in (tensor for shard in shards for tensor in shard):
        if tensor.dtype not in ITEM_SIZES:
            raise UnsupportedDtypeError(
                f"tensor {tensor.name!r} has the dtype {tensor.dtype}, for which NDArray caches have no name",
                hint="Write a .safetensors file.",
            )
    firsts = {shard[0].name for shard in shards} if shard_bytes is None else set()
    with staged_folder(directory) as staged:
        writer = ShardWriter(staged.path, staged.work, shard_bytes or sys.maxsize, [])

        def write(tensor: OutputTensor, pieces: Iterable[Bytes]) -> None:
            if tensor.name in firsts:
                writer.begin_shard()
            record = {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "format": tensor.encoding,
                "nbytes": tensor.nbytes,
            }
            writer.add_stored(record, pieces)

        yield write
        publish_dump(staged, writer.finish(), writer.shards, dict(metadata))
