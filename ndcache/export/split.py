"""Distribute tensors over the files of a directory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from .tensors import OutputTensor

__all__ = ["is_well_split", "split_as_hub"]


def split_as_hub(tensors: Iterable[OutputTensor], limit: int) -> list[list[OutputTensor]]:
    """Split tensors into files of at most `limit` bytes, as huggingface_hub does: in order, a larger one alone.

    Source: ``split_state_dict_into_shards_factory`` in huggingface_hub's ``serialization/_base.py``.
    """
    files: list[list[OutputTensor]] = []
    current: list[OutputTensor] = []
    nbytes = 0
    for tensor in tensors:
        if tensor.nbytes > limit:
            files.append([tensor])  # before the file that was begun
            continue
        if nbytes + tensor.nbytes > limit:
            files.append(current)
            current, nbytes = [], 0
        current.append(tensor)
        nbytes += tensor.nbytes
    return [*files, current] if current else files


def is_well_split(files: Sequence[Sequence[OutputTensor]], limit: int, alone: int) -> bool:
    """Return whether tensors lie in files as they would after a split, whatever the order in which they came.

    Then they stay in these files: a split in the order in which they lie there now might be another one, and a model
    that is converted twice would not be the same.

    Parameters
    ----------
    files : sequence of sequence of OutputTensor
    limit : int
        The most bytes of a file, unless it has only one tensor.
    alone : int
        The bytes from which on a tensor may have a file of its own.
    """
    sizes = [sum(tensor.nbytes for tensor in file) for file in files]
    if any(size > limit and len(file) > 1 for size, file in zip(sizes, files, strict=True)):
        return False
    shared = [
        (size, max(tensor.nbytes for tensor in file))
        for size, file in zip(sizes, files, strict=True)
        if len(file) > 1 or size < alone
    ]
    return all(size + largest > limit for (size, _), (_, largest) in pairwise(shared))
