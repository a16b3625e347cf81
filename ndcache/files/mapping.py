"""Map a file's pages into memory without holding a file descriptor for them.

A model may have thousands of shards, and a process may often have only 1,024 open files (256 on macOS). Before Python
3.13, `mmap.mmap` keeps a duplicate of the descriptor for as long as the map exists, although the system needs none; so
there the system's own ``mmap`` is called.
"""

from __future__ import annotations

import functools
import importlib.util
import mmap
import os
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

__all__ = ["map_file"]

#: Whether `mmap.mmap` would hold a descriptor, and the system's own call can be used. (On 32-bit systems, the type of
#: offsets differs; a Python that was built without libffi has no ctypes.)
_CALL_SYSTEM = (
    sys.version_info < (3, 13)
    and os.name == "posix"
    and sys.maxsize > 1 << 32
    and importlib.util.find_spec("_ctypes") is not None
)


def map_file(file: BinaryIO, nbytes: int, offset: int = 0, *, writable: bool = False) -> npt.NDArray[np.uint8]:
    """Return some bytes of an open file, at least one, as an array over its mapped pages.

    The array is read-only, or else private: writing to it copies a page, and never reaches the file. The file may be
    closed afterwards; the pages are unmapped when no array refers to them any more.

    Parameters
    ----------
    file : binary file
    nbytes : int
    offset : int
        Of the first byte in the file; a multiple of `mmap.ALLOCATIONGRANULARITY`.

    Raises
    ------
    OSError
        The file system cannot map files, or this process may not map more.
    ValueError
        The file is shorter.
    """
    if _CALL_SYSTEM:
        system = _system()
        protection, flags = mmap.PROT_READ, mmap.MAP_SHARED
        if writable:
            protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE
        address = system.mmap(None, nbytes, protection, flags, file.fileno(), offset)
        return np.asarray(_Pages(address, nbytes, system.munmap, writable=writable))
    access = mmap.ACCESS_COPY if writable else mmap.ACCESS_READ
    if sys.version_info >= (3, 13):
        pages = mmap.mmap(file.fileno(), nbytes, access=access, offset=offset, trackfd=False)
    else:
        pages = mmap.mmap(file.fileno(), nbytes, access=access, offset=offset)
    return np.frombuffer(pages, np.uint8)


class _Pages:
    """Mapped pages of a file, which are unmapped when the last array over them is gone.

    numpy keeps this object as the base of the array that it makes of it. Unless it is made writable, there is no buffer
    that could be written, so the array cannot be made writeable, either.
    """

    def __init__(self, address: int, nbytes: int, unmap: Callable[[int, int], object], *, writable: bool) -> None:
        # Bound here: when the interpreter exits, the module's names may be gone before this object is.
        self._unmap = functools.partial(unmap, address, nbytes)
        self.__array_interface__ = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (address, not writable)}

    def __del__(self) -> None:
        self._unmap()


@functools.cache
def _system() -> Any:
    """Return the C library, with ``mmap`` and ``munmap`` declared."""
    import ctypes

    def check(address: int | None, *_: object) -> int | None:
        if address == ctypes.c_void_p(-1).value:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return address

    library = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_size_t
    library.mmap.argtypes = [ctypes.c_void_p, size, *[ctypes.c_int] * 3, ctypes.c_longlong]
    library.mmap.restype, library.mmap.errcheck = ctypes.c_void_p, check  # type: ignore[assignment]
    library.munmap.argtypes = [ctypes.c_void_p, size]
    return library
