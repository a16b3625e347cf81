"""File descriptors, which can be scarce: how many a load may use, and the error when none is left."""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ..errors import TooManyOpenFilesError

if sys.platform != "win32":
    import resource

__all__ = ["affordable", "budget", "check_exhausted", "check_shortage", "check_shortages"]

#: Descriptors that a load leaves to the rest of the process; at most half of those that are free.
_RESERVE = 64
_SHORTAGES = (errno.EMFILE, errno.ENFILE)
#: Descriptors that running loads may still need.
_promised: dict[object, int] = {}
#: One lock, held while a load counts what is free and takes its share: those that begin together would take the same.
_turn = [threading.Lock()]


def _begin_child() -> None:
    """Forget the loads of the parent, which this process does not run, and the lock that one of them may hold."""
    _turn[:] = [threading.Lock()]
    _promised.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_child)


def affordable(wanted: int, each: int) -> int:
    """Return how many of `wanted` workers, which open `each` files, this process can afford now; 0 if none."""
    free = _free()
    if free is None:
        return wanted
    free = max(0, free - sum(list(_promised.values())))
    return min(wanted, (free - min(_RESERVE, free // 2)) // each)


@contextmanager
def budget(wanted: int, each: int) -> Iterator[int]:
    """Reserve descriptors for workers that open `each` files; yield how many of `wanted` may run, at least one."""
    key = object()
    try:
        with _turn[0]:
            count = max(1, affordable(wanted, each))
            _promised[key] = count * each
        yield count
    finally:
        _promised.pop(key, None)


def check_shortage(error: BaseException) -> None:
    """Raise `TooManyOpenFilesError` if `error` says that a file could not be opened because too many are open."""
    check_shortages([error])


def check_shortages(chain: Iterable[BaseException]) -> None:
    """Raise `TooManyOpenFilesError` if too many open files are, or may be, the cause of a chain of errors."""
    for error in chain:
        if isinstance(error, OSError) and error.errno in _SHORTAGES:
            raise _too_many(error.errno) from error
        if isinstance(error, socket.gaierror):
            check_exhausted()  # a resolver that cannot open its files may report an unknown host


def check_exhausted() -> None:
    """Raise `TooManyOpenFilesError` if no file can be opened now, for libraries that hide this cause of an error."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        check_shortage(error)


def _too_many(number: int | None) -> TooManyOpenFilesError:
    limit = _limit()
    if number == errno.ENFILE or limit is None:
        text, hint = "too many files are open on this system", "Close some, or raise the limit (fs.file-max)."
    else:
        text = f"too many files are open: this process may have {limit:,} file descriptors, sockets included"
        hint = "Raise the limit (ulimit -n; LimitNOFILE= of a systemd unit), or close files and lower max_workers."
    error = TooManyOpenFilesError(text, hint=hint)
    error.errno = errno.ENFILE if number == errno.ENFILE else errno.EMFILE
    return error


def _limit() -> int | None:
    """Return how many files this process may have open; None if there is no limit."""
    if sys.platform == "win32":
        return None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _free() -> int | None:
    """Return how many more files this process may open; None if there is no limit."""
    limit = _limit()
    if limit is None:
        return None
    try:
        return max(0, limit - len(os.listdir("/dev/fd")))
    except OSError as error:
        return 0 if error.errno in _SHORTAGES else limit // 2  # without /dev, this cannot be counted
