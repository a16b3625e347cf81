"""Measure the disk as a load meets it: files as large as the model's, by as many threads, through the page cache.

What `dd` or `fio` measures is another thing: one file, in one thread, often past the page cache.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...files.folder import sync
from ...report.words import format_count, format_size
from .rates import Rate, Used, per_second

__all__ = ["disk_rates", "part_in_memory"]

#: Bytes and files of one round. Less is over too soon to be measured.
_LEAST_BYTES = 64 << 20
_MOST_BYTES = 256 << 20
_MOST_FILES = 512
#: A round ends after so many seconds; no further round begins after so many.
_ROUND_SECONDS = 5.0
_ROUNDS = 3
_ROUNDS_SECONDS = 3.0
_BLOCK_BYTES = 1 << 20
#: Several threads share files that are larger than this.
_PIECE_BYTES = 32 << 20
#: If more than this part of the files is still in memory, they were not read from the disk.
_FEW = 0.05


@dataclass(frozen=True)
class _Piece:
    """A range of a file, which one thread writes or reads."""

    path: Path
    start: int
    nbytes: int


def disk_rates(
    folder: Path, sizes: Sequence[int], local: Sequence[Path] | None, threads: int, used: Used, in_memory: float | None
) -> tuple[Rate, Rate]:
    """Return the rates at which the disk writes and reads.

    Parameters
    ----------
    folder : pathlib.Path
        Where to write.
    sizes : sequence of int
        Bytes of the model's files.
    local : sequence of pathlib.Path or None
        The files of a local model, to be read; else those that were written are.
    threads : int
    used : Used
    in_memory : float or None
        The part of the local files that was in memory before the load; None if that is not known.
    """
    pieces = [_Piece(folder / f"disk.{index}", 0, nbytes) for index, nbytes in enumerate(_round_of(sizes))]
    write = _rate_of_writing(pieces, threads, used)
    if local is not None:
        pieces = list(_cut((path, path.stat().st_size) for path in local if path.is_file()))
    read = _rate_of_reading(pieces, local is not None, threads, used, in_memory)
    for path in folder.glob("disk.*"):
        path.unlink(missing_ok=True)
    return write, read


def part_in_memory(files: Iterable[Path]) -> float | None:
    """Return the part of some files that is in the system's page cache, or None if that is not known."""
    states = []
    try:
        for path in files:
            if not os.access(path, os.W_OK):
                return None  # Linux says of a file of others that all of it is in memory
            if path.stat().st_size:
                states.append(_pages_in_memory(path))
    except (OSError, AttributeError):  # the system cannot tell
        return None
    return float(np.concatenate(states).mean()) if states else None


def _pages_in_memory(path: Path) -> NDArray[np.bool_]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        states = np.empty(-(-view.nbytes // mmap.PAGESIZE), np.uint8)
        address, length, pages = view.ctypes.data, view.nbytes, states.ctypes.data
        del view  # a mapping that is in use cannot be closed
        status = ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_void_p(pages))
    if status:
        raise OSError("mincore failed")
    return (states & 1).astype(np.bool_)


def _round_of(sizes: Sequence[int]) -> Iterator[int]:
    """Yield the sizes of the files of one round: those of the model, again if they are few and small."""
    left = max(_LEAST_BYTES, min(sum(sizes), _MOST_BYTES))
    for size in itertools.islice(itertools.cycle(sizes), _MOST_FILES):
        nbytes = min(size, left, _PIECE_BYTES)
        left -= nbytes
        yield nbytes
        if not left:
            break


def _cut(files: Iterable[tuple[Path, int]]) -> Iterator[_Piece]:
    """Yield the pieces of files, up to the bytes of one round."""
    left = _MOST_BYTES
    for path, size in files:
        for start in range(0, size, _PIECE_BYTES):
            nbytes = min(_PIECE_BYTES, size - start, left)
            if not nbytes:
                return
            left -= nbytes
            yield _Piece(path, start, nbytes)


def _rate_of_writing(pieces: Sequence[_Piece], threads: int, used: Used) -> Rate:
    """Write files as a download does: sync the file, give it its name, sync the directory."""
    block = np.random.default_rng(0).bytes(_BLOCK_BYTES)  # a file system that compresses must not gain by it

    def write(piece: _Piece, deadline: float) -> int:
        fresh = piece.path.with_suffix(f"{piece.path.suffix}.part")
        with fresh.open("wb", buffering=0) as file:
            written = 0
            while written < piece.nbytes and time.perf_counter() < deadline:
                written += file.write(block[: piece.nbytes - written])
            sync(file.fileno())
        fresh.replace(piece.path)
        _sync_folder(piece.path.parent)
        return written

    try:
        rate, nbytes, count = _median(write, pieces, threads)
    except OSError as error:
        return Rate("disk, write", None, None, f"not measured: {error.strerror}")
    how = f"{format_size(nbytes)} in {format_count(count, 'file')} by {format_count(threads, 'thread')}, each synced"
    return Rate("disk, write", rate, used.share(used.stats.network_bytes, rate), how)


def _sync_folder(path: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            sync(handle)
        finally:
            os.close(handle)


def _rate_of_reading(
    pieces: Sequence[_Piece], is_model: bool, threads: int, used: Used, in_memory: float | None
) -> Rate:
    """Read files that the system was asked to forget."""
    kept: list[float | None] = []
    paths = sorted({piece.path for piece in pieces if piece.path.exists()})

    def forget() -> None:
        for path in paths:
            with path.open("rb", buffering=0) as file:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        kept.append(part_in_memory(paths))

    try:
        rate, nbytes, _ = _median(_read, pieces, threads, forget)
    except OSError as error:
        return Rate("disk, read", None, None, f"not measured: {error.strerror}")
    is_from_disk = all(part is not None and part <= _FEW for part in kept)
    whose = "the model" if is_model else "those files"
    place = "from the disk" if is_from_disk else "perhaps from memory, which the system did not free"
    how = f"{format_size(nbytes)} of {whose} by {format_count(threads, 'thread')}, {place}"
    share = used.share(used.read * (1 - (in_memory or 0)), rate) if is_model else None
    if is_model and used.read and (in_memory or 0) > _FEW:
        how += f"; the load found {in_memory:.0%} in memory".replace("%", " %")
    elif share is not None and share > 1 and in_memory is None:
        share, how = None, f"{how}; the load found it in memory"
    return Rate("disk, read", rate, share, how, is_least=not is_from_disk)


def _read(piece: _Piece, deadline: float) -> int:
    nbytes, buffer = 0, memoryview(bytearray(_BLOCK_BYTES))
    with piece.path.open("rb", buffering=0) as file:
        file.seek(piece.start)
        while nbytes < piece.nbytes and time.perf_counter() < deadline:
            if not (read := file.readinto(buffer[: piece.nbytes - nbytes])):
                break
            nbytes += read
    return nbytes


def _median(
    work: Callable[[_Piece, float], int],
    pieces: Sequence[_Piece],
    threads: int,
    prepare: Callable[[], None] = lambda: None,
) -> tuple[float | None, int, int]:
    """Return the rate of the median round, and the bytes and files of that one."""
    rounds: list[tuple[float, int, int]] = []
    last = time.perf_counter() + _ROUNDS_SECONDS
    with ThreadPoolExecutor(threads) as pool:
        while len(rounds) < _ROUNDS and (not rounds or time.perf_counter() < last):
            prepare()
            begun = time.perf_counter()
            one = functools.partial(_until, begun + _ROUND_SECONDS, work)
            done = [nbytes for nbytes in pool.map(one, pieces) if nbytes]
            rate = per_second(sum(done), time.perf_counter() - begun)
            rounds.append((rate or 0.0, sum(done), len(done)))
    rate, nbytes, count = sorted(rounds)[(len(rounds) - 1) // 2]
    return rate or None, nbytes, count


def _until(deadline: float, work: Callable[[_Piece, float], int], piece: _Piece) -> int:
    return work(piece, deadline) if time.perf_counter() < deadline else 0
