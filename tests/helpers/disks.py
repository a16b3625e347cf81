"""File systems of a test's own, which only root can mount."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .requirements import need_program

__all__ = ["HAS_LOOP_DEVICES", "mount", "mounted", "mounted_xfs", "shares_blocks"]

#: Whether a file can be mounted. In some containers, none can.
HAS_LOOP_DEVICES = os.path.exists("/dev/loop-control")
_FIEMAP, _SYNC, _SHARED = 0xC020660B, 1, 0x2000


def mount(*args: str) -> None:
    """Call `mount`; skip the test if that is not permitted."""
    try:
        subprocess.run(["mount", *args], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting is not permitted: {error}")


@contextmanager
def mounted(folder: Path, *args: str) -> Iterator[Path]:
    """Mount a file system on a new folder, by default one of 3 MiB."""
    folder.mkdir()
    mount(*(args or ("-t", "tmpfs", "-o", "size=3m", "tmpfs")), str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a test that failed may have files open


@contextmanager
def mounted_xfs(folder: Path) -> Iterator[Path]:
    """Mount a file system whose files can share blocks."""
    image = folder.with_suffix(".image")
    with open(image, "wb") as file:
        file.truncate(512 << 20)  # of which little is ever written
    subprocess.run([need_program("mkfs.xfs"), "-q", "-m", "reflink=1", str(image)], check=True)
    with mounted(folder, "-o", "loop", str(image)):
        yield folder


def shares_blocks(path: Path) -> bool:
    """Return whether a file shares all its blocks with another one."""
    with open(path, "rb") as file:
        request = bytearray(struct.pack("=QQIIII", 0, 1 << 62, _SYNC, 0, 100, 0) + bytes(100 * 56))
        fcntl.ioctl(file, _FIEMAP, request)
    count = struct.unpack_from("=I", request, 20)[0]
    flags = [struct.unpack_from("=I", request, 32 + 56 * n + 40)[0] for n in range(count)]
    return count > 0 and all(each & _SHARED for each in flags)
