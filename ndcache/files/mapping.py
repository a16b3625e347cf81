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
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

__all__ = ["map_file"]

#: Whether `mmap.mmap` would hold a descriptor, and there is another way. (On 32-bit systems, the type of an offset is
#: not the same everywhere; a Python that was built without libffi has no ctypes.)
_CALL_SYSTEM = (
    sys.version_info < (3, 13)
    and os.name == "posix"
    and sys.maxsize > 1 << 32
    and importlib.util.find_spec("_ctypes") is not None
)


def map_file(file: BinaryIO, nbytes: int) -> npt.NDArray[np.uint8]:
    """Return the first `nbytes` bytes of an open file, at least one, as a read-only array over its mapped pages.

    The file may be closed afterwards; the pages are unmapped when no array refers to them any more.

    Raises
    ------
    OSError
        Files of this file system cannot be mapped, or no more of them by this process.
    ValueError
        The file is shorter.
    """
    if _CALL_SYSTEM:
        return np.asarray(_Pages(file.fileno(), nbytes))
    if sys.version_info >= (3, 13):
        pages = mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_READ, trackfd=False)
    else:
        pages = mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_READ)
    return np.frombuffer(pages, np.uint8)


class _Pages:
    """Pages of a file, mapped for reading until the last array over them is gone.

    numpy keeps this object as the base of the array that it makes of it. As there is no buffer that could be written,
    the array cannot be made writeable, either.
    """

    def __init__(self, descriptor: int, nbytes: int) -> None:
        system = _system()
        address = system.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        self._unmap = functools.partial(system.munmap, address, nbytes)  # bound here: a module's names may go before
        self.__array_interface__ = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (address, True)}

    def __del__(self) -> None:
        if hasattr(self, "_unmap"):
            self._unmap()


@functools.cache
def _system() -> Any:
    """The C library, with ``mmap`` and ``munmap`` declared."""
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
