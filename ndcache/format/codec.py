"""Decode a record's bytes into a NumPy array, and encode arrays as the format stores them."""

from __future__ import annotations

import math
import sys
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..errors import DecodeError, UnsupportedDtypeError
from .dtypes import TENSOR_SIZES
from .manifest import Record
from .numpy_dtypes import TENSOR_DTYPES

__all__ = ["decode_record", "encode_bf16", "view_record"]

_HUGE_PAGE = 2 << 20
_BF16_MAX = np.uint32(0x7F7F0000).view(np.float32)  # the largest finite bfloat16


def view_record(record: Record, data: npt.NDArray[np.uint8], start: int = 0) -> npt.NDArray[Any]:
    """Return the values of a record as they are stored: a view of its shard's bytes, at any alignment.

    Parameters
    ----------
    record : Record
    data : array of uint8, one dimension
        Bytes of the shard.
    start : int
        The offset in the shard of the first of them.

    Returns
    -------
    array of the record's shape and `Record.stored_dtype`
        Read-only if `data` is.

    Raises
    ------
    DecodeError
        The bytes end before the record does, or the dtype is unknown.
    """
    offset = record.byte_offset - start
    if offset + record.nbytes > data.size:
        raise DecodeError(f"the shard ends at byte {start + data.size}, before the end of tensor {record.name!r}")
    dtype = TENSOR_DTYPES.get(record.stored_dtype)
    if dtype is None and record.stored_dtype in TENSOR_SIZES:
        raise UnsupportedDtypeError(
            f"tensor {record.name!r} is {record.stored_dtype}, which the installed ml_dtypes does not have",
            hint="A newer version may: pip install --upgrade ml_dtypes.",
        )
    if dtype is None:
        raise UnsupportedDtypeError(f"tensor {record.name!r} has the unknown dtype {record.dtype!r}")
    values: npt.NDArray[Any] = np.ndarray(record.shape, dtype, buffer=data, offset=offset)
    return values


def decode_record(record: Record, data: npt.NDArray[np.uint8], start: int = 0) -> npt.NDArray[Any]:
    """Return the record's tensor. Where bfloat16 encodes float32, expand it into new memory.

    Parameters, result and errors are those of `view_record`, except that the dtype is ``record.dtype``.
    """
    values = view_record(record, data, start)
    if not record.is_bf16_encoded:
        return values
    expanded = _empty_float32(record.shape)
    # ml_dtypes' cast is several times as fast as shifting integers (benchmarks/decode.py).
    expanded[...] = values
    return expanded


def _empty_float32(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return a new array, which begins at a huge page if it is large.

    NumPy asks the system for huge pages. The memory before the first whole one and after the last comes in pages of
    4 KiB, each of which costs a page fault. With the alignment, 1 GiB of bfloat16 in tensors of 8 MiB takes 0.85 times
    as long (7 pairs of runs).
    """
    nbytes = math.prod(shape) * 4
    if sys.platform != "linux" or nbytes < 2 * _HUGE_PAGE:
        return np.empty(shape, np.float32)
    memory = np.empty(nbytes + _HUGE_PAGE, np.uint8)  # pages that are never written to take no memory
    return np.ndarray(shape, np.float32, buffer=memory, offset=-memory.ctypes.data % _HUGE_PAGE)


def encode_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Convert float32 to bfloat16 as TVM's writer does.

    Values are rounded to nearest, ties to even. Finite values beyond the largest bfloat16 become the largest bfloat16,
    not infinity. Infinities and NaN are kept, and so is the upper half of a NaN's payload.

    Returns
    -------
    array of bfloat16, of the same shape

    Source: ``_convert_f32_to_bf16`` in apache-tvm's ``tvm/contrib/tvmjs.py``.
    """
    values = np.asarray(values, np.float32)  # in native byte order
    with np.errstate(invalid="ignore"):  # from signalling NaN
        encoded = values.astype(ml_dtypes.bfloat16)
        special = ~(np.abs(values) < _BF16_MAX)
    if special.any():
        bits = values[special].view(np.uint32)
        cut = (bits >> 16).astype(np.uint16)
        # A NaN whose payload lies in the lower half alone would become an infinity.
        lost = np.isnan(values[special]) & (cut & 0x7F == 0)
        encoded.view(np.uint16)[special] = np.where(lost, cut | 0x40, cut)
    return encoded
