"""New files and folders that appear complete, or not at all.

They are written under a temporary name beside their place, forced to disk and renamed. Whatever fails before, also
Ctrl-C, leaves nothing behind; a process that is killed leaves the temporary name, which begins with a dot.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .folder import sync

__all__ = ["StagedFolder", "staged_file", "staged_folder"]


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield the temporary name of a new file. At the end of the block, rename it; after a failure, remove it.

    Folders above it are made if they are missing.

    Parameters
    ----------
    path : pathlib.Path
        The file's name. A file that has it is replaced, and keeps its mode. If it is a link, the file that it leads to
        is replaced.
    """
    path = _resolved(path)
    temporary = path.with_name(_temporary_name(path))
    with _folders_above(path), _removed_after_failure(temporary, path):
        with open(temporary, "xb"):
            pass
        with contextlib.suppress(OSError):  # there is none, or the file system has no modes
            os.chmod(temporary, stat.S_IMODE(os.stat(path).st_mode))
        yield temporary
        with open(temporary, "r+b") as file:
            sync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)


class StagedFolder:
    """A folder whose new files are written aside; see `staged_folder`.

    Attributes
    ----------
    path : pathlib.Path
        The folder's name.
    work : pathlib.Path
        Where its files are written, under any names.
    """

    def __init__(self, path: Path, work: Path, *, is_new: bool) -> None:
        self.path = path
        self.work = work
        self._is_new = is_new

    def publish(self, files: Mapping[str, Path]) -> None:
        """Give files of `work` their names: all at once if the folder is new, else one by one, in this order.

        Parameters
        ----------
        files : mapping of str to pathlib.Path
            The files by their names in the folder. They must be on disk already.
        """
        if self._is_new:
            complete = self.work / _temporary_name(self.path)
            os.mkdir(complete)
            for name, file in files.items():
                os.rename(file, complete / name)
            _sync_folder(complete)
            try:
                os.rename(complete, self.path)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                # Somebody else has made the folder meanwhile.
                files = {name: complete / name for name in files}
            else:
                _sync_folder(self.path.parent)
                return
        for name, file in files.items():
            os.replace(file, self.path / name)
        _sync_folder(self.path)


@contextmanager
def staged_folder(path: Path) -> Iterator[StagedFolder]:
    """Yield a place for the new files of a folder, which need not exist; remove it at the end of the block.

    Parameters
    ----------
    path : pathlib.Path
        The folder. Folders above it are made if they are missing. It is made itself by `StagedFolder.publish`.

    Raises
    ------
    NotADirectoryError
        It is a file.
    """
    path = _resolved(path)
    is_new = not os.path.lexists(path)
    if not is_new and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a directory", str(path))
    work = (path.parent if is_new else path) / _temporary_name(path)
    with _folders_above(path), _removed_after_failure(work, path):
        os.mkdir(work)
        yield StagedFolder(path, work, is_new=is_new)
        shutil.rmtree(work)


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _temporary_name(path: Path) -> str:
    # Short enough also where the name itself is as long as a file system allows.
    return f".{path.name[:32]}.{secrets.token_hex(8)}.tmp"


@contextmanager
def _folders_above(path: Path) -> Iterator[None]:
    """Make the missing folders above a file or folder; if the block fails, remove them again."""
    made: list[Path] = []
    try:
        for folder in reversed(path.parents):
            if not os.path.lexists(folder):
                made.append(folder)
                os.mkdir(folder)
        yield
    except BaseException:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # somebody else uses it, or it was not made
                os.rmdir(folder)
        raise
    for folder in made:
        _sync_folder(folder.parent)


@contextmanager
def _removed_after_failure(path: Path, target: Path) -> Iterator[None]:
    """Remove what is at a temporary path if the block fails; let an error of the system name the target instead."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, OSError) and error.filename in (path, str(path)):
            error.filename = str(target)
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _sync_folder(path: Path) -> None:
    """Force the names in a folder to disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            sync(handle)
        finally:
            os.close(handle)
