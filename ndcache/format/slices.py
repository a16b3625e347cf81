"""Slices of tensors (``names={"w": slice(0, 512)}``): rows of the first dimension, which lie together in the file."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .manifest import Record

__all__ = ["check_slices", "slice_record"]


def check_slices(names: object) -> None:
    """Check a ``names`` option that is a mapping to slices, as far as this needs no manifest; accept all others.

    Raises
    ------
    TypeError
        A key is not a string, a value is not a slice, or an end of it is not an integer.
    ValueError
        A step is not 1.
    """
    if isinstance(names, Mapping):
        for name, rows in names.items():
            if not isinstance(name, str):
                raise TypeError(f"the keys of names must be names of tensors, not {name!r}")
            _check_slice(name, rows)


def _check_slice(name: str, rows: Any) -> None:
    if not isinstance(rows, slice):
        one = f"; slice({rows}, {rows + 1}) is one row" if type(rows) is int and rows >= 0 else ""
        raise TypeError(f"names[{name!r}] must be a slice, such as slice(0, 512), not {rows!r}{one}")
    for value in (rows.start, rows.stop, rows.step):
        if not (value is None or hasattr(value, "__index__")):
            raise TypeError(f"names[{name!r}] is {rows}, whose ends must be integers or None")
    if rows.step is not None and operator.index(rows.step) != 1:
        raise ValueError(f"names[{name!r}] is {rows}, but the step must be 1: rows are read as they lie in the file")


def slice_record(record: Record, rows: slice) -> Record:
    """Return the record of some rows of a tensor, which is a tensor of its own: a shorter one that begins later.

    Parameters
    ----------
    record : Record
        Of a known dtype and format.
    rows : slice
        As `check_slices` accepts it. Ends have Python's meaning: they may be negative, missing, or beyond the last row.

    Returns
    -------
    Record
        `record` itself, if these are all of its rows.

    Raises
    ------
    ValueError
        The tensor is a scalar.
    """
    if not record.shape:
        raise ValueError(f"names[{record.name!r}] is {rows}, but the tensor is a scalar, which has no rows")
    count, *others = record.shape
    start, stop, _ = rows.indices(count)
    stop = max(start, stop)
    if stop - start == count:
        return record
    row_bytes = record.nbytes // count
    return replace(
        record,
        shape=(stop - start, *others),
        byte_offset=record.byte_offset + start * row_bytes,
        nbytes=(stop - start) * row_bytes,
    )
