"""A record's bytes → a NumPy array, and back to how the format stores it."""

from __future__ import annotations

import math
import sys
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..errors import DecodeError, UnsupportedDtypeError
from .dtypes import DTYPES
from .manifest import Record

__all__ = ["decode", "encode_bf16", "stored"]

_HUGE_PAGE = 2 << 20
_BF16_MAX = np.uint32(0x7F7F0000).view(np.float32)  # the largest finite bfloat16


def stored(record: Record, shard: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """A view of the record's stored values in its shard's bytes; no copy, whatever the offset's alignment.

    Parameters
    ----------
    record : Record
    shard : array of uint8, shape (nbytes of the shard,)

    Returns
    -------
    array of the record's shape and `Record.stored_dtype`
        Read-only if `shard` is.

    Raises
    ------
    DecodeError
        The shard is too short, or the dtype is unknown.
    """
    if record.byte_offset + record.nbytes > shard.size:
        raise DecodeError(f"the shard's {shard.size} bytes do not reach tensor {record.name!r}")
    dtype = DTYPES.get(record.stored_dtype)
    if dtype is None:
        raise UnsupportedDtypeError(f"tensor {record.name!r} has the unknown dtype {record.dtype!r}")
    values: npt.NDArray[Any] = np.ndarray(record.shape, dtype, buffer=shard, offset=record.byte_offset)
    return values


def decode(record: Record, shard: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """The record's tensor: `stored`, with bfloat16 that encodes float32 expanded into memory of its own.

    Parameters and the result are those of `stored`, but for the dtype, which is ``record.dtype``.
    """
    values = stored(record, shard)
    if not record.is_bf16_encoded:
        return values
    expanded = _fresh(record.shape)
    # ml_dtypes' cast is several times as fast as shifting integers (benchmarks/decode.py).
    expanded[...] = values
    return expanded


def _fresh(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """A new array of float32, which begins with a huge page if it is large.

    NumPy has asked the system for huge pages; what lies before the first whole one and after the last comes in pages of
    4 KiB, each of which costs a page fault. 1 GiB of bfloat16 in tensors of 8 MiB takes 0.85 of the time (7 pairs).
    """
    nbytes = math.prod(shape) * 4
    if sys.platform != "linux" or nbytes < 2 * _HUGE_PAGE:
        return np.empty(shape, np.float32)
    memory = np.empty(nbytes + _HUGE_PAGE, np.uint8)  # what is not written to is never there
    return np.ndarray(shape, np.float32, buffer=memory, offset=-memory.ctypes.data % _HUGE_PAGE)


def encode_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """float32 → bfloat16 as TVM's writer stores it.

    Rounded to nearest even, but values beyond the largest bfloat16 are cut off to it instead of becoming infinite.
    Infinities and NaN stay what they are, the upper half of a NaN's payload included.

    Returns
    -------
    array of bfloat16, of the same shape

    Source: ``_convert_f32_to_bf16`` in apache-tvm's ``tvm/contrib/tvmjs.py``.
    """
    values = np.asarray(values, np.float32)  # in this machine's byte order
    with np.errstate(invalid="ignore"):  # signalling NaN
        encoded = values.astype(ml_dtypes.bfloat16)
        special = ~(np.abs(values) < _BF16_MAX)
    if special.any():
        bits = values[special].view(np.uint32)
        cut = (bits >> 16).astype(np.uint16)
        # A NaN whose payload lies in the lower half alone would become an infinity.
        lost = np.isnan(values[special]) & (cut & 0x7F == 0)
        encoded.view(np.uint16)[special] = np.where(lost, cut | 0x40, cut)
    return encoded
