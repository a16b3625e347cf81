"""Find out what a loss of power may leave of a directory: record system calls with strace, replay them on a model disk.

The model is POSIX, which promises little. Written bytes are certain to last only after an fsync of the file that began
later; until then they may be missing, zeros, or there. The file of a name is certain only after an fsync of the
directory; until then, it may be any file that had the name since the last fsync, independently of the other names. A
journal keeps all changes up to some point, which is one of these cases.
"""

from __future__ import annotations

import os
import posixpath
import re
import signal
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

#: All system calls that can change a file or a directory.
_RECORDED = (
    *("open", "openat", "openat2", "creat", "write", "pwrite64", "writev", "pwritev", "pwritev2", "mmap"),
    *("sendfile", "copy_file_range", "splice", "truncate", "ftruncate", "fallocate"),
    *("fsync", "fdatasync", "sync", "syncfs", "sync_file_range"),
    *("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat"),
    *("unlink", "unlinkat", "rmdir", "mkdir", "mkdirat"),
)
#: Write all strings in full and in hex, and descriptors with their paths; follow all threads and children. A question
#: mark makes strace ignore calls that this kind of machine does not have.
_STRACE = ("strace", "-f", "-y", "-xx", "-s", str(1 << 24), "-e", ",".join(f"?{name}" for name in _RECORDED))

_BEGUN = " <unfinished ...>"
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>")
_CALL = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)")
_STRING = re.compile(r'"([^"]*)"(\.\.\.)?')
_DESCRIPTOR = re.compile(r"(?:AT_FDCWD|\d+)(?:<(?P<path>[^>]*)>(?P<deleted>\(deleted\))?)?")
_PATH = re.compile(rf'(?:(?P<folder>{_DESCRIPTOR.pattern}), )?"(?P<name>[^"]*)"'.replace("?P<path>", "?P<base>"))

#: The folder whose files are not for readers.
PRIVATE = ".ndcache/"


class NotModelledError(Exception):
    """A system call was recorded that the model disk does not know."""


@dataclass(frozen=True)
class Step:
    """The effect of one system call on a file or a name, with paths relative to the directory in question.

    Attributes
    ----------
    kind : str
        ``create``, ``write``, ``truncate``, ``sync``, ``rename``, ``link`` or ``unlink``.
    path, target : str
        The file or directory, and its new name.
    data : bytes
        The bytes that are written.
    offset : int or None
        Where they are written, or the new size; None is the end of the file.
    begun, done : int
        When the call began and ended, in any unit: calls of other threads may overlap.
    """

    kind: str
    path: str
    target: str = ""
    data: bytes = b""
    offset: int | None = None
    begun: int = 0
    done: int = 0


# --- the model disk


@dataclass
class File:
    """The content of one file, under any name: the bytes that are synced, and the changes since then."""

    durable: bytes = b""
    pending: list[Step] = field(default_factory=list)

    def sync(self, begun: int) -> None:
        """Make the changes durable that were finished before the sync began."""
        self.durable = _changed(self.durable, [step for step in self.pending if step.done < begun])
        self.pending = [step for step in self.pending if step.done >= begun]

    @property
    def written(self) -> bytes:
        """Return the bytes that a process reads."""
        return _changed(self.durable, self.pending)

    def after_power_loss(self) -> Iterator[bytes]:
        """Yield what may be found: the first few changes since the last sync, or the new size with zeros."""
        for count in range(len(self.pending) + 1):
            yield _changed(self.durable, self.pending[:count])
        if self.pending:
            yield _changed(self.durable, [replace(step, data=bytes(len(step.data))) for step in self.pending])


def _changed(content: bytes, steps: Iterable[Step]) -> bytes:
    """Return `content` after writes and truncations."""
    result = None
    for step in steps:
        result = bytearray(content) if result is None else result
        start = len(result) if step.offset is None else step.offset
        result.extend(bytes(max(0, start - len(result))))  # gaps are zeros
        end = len(result) if step.kind == "truncate" else start + len(step.data)
        result[start:end] = step.data
    return content if result is None else bytes(result)


@dataclass(frozen=True, eq=False)
class _Entry:
    """The file of a name, or none, and when the call ended that made it so."""

    file: File | None
    done: int


class Disk:
    """Names and files, with all files that each name may stand for after a loss of power."""

    def __init__(self) -> None:
        self._entries: dict[str, list[_Entry]] = {}  # processes see the last one

    def names(self) -> list[str]:
        """Return all names that there ever were, without private ones."""
        return [name for name in self._entries if not name.startswith(PRIVATE)]

    def now(self, name: str) -> File | None:
        """Return the file that processes see under a name."""
        return self._entries[name][-1].file if name in self._entries else None

    def after_power_loss(self, name: str) -> list[File | None]:
        """Return all files that a name may stand for after a loss of power."""
        return [entry.file for entry in self._entries[name]]

    def lasting(self) -> dict[str, bytes]:
        """Return the names that are certain to survive a loss of power unchanged, with their bytes."""
        found = {}
        for name in self.names():
            files = self.after_power_loss(name)
            if len(files) == 1 and files[0] is not None and not files[0].pending:
                found[name] = files[0].durable
        return found

    def apply(self, step: Step) -> None:
        """Change names and files as the step does."""
        if step.kind == "create":
            if self.now(step.path) is None:
                self._enter(step.path, File(), step)
        elif step.kind in ("write", "truncate"):
            self._file(step).pending.append(step)
        elif step.kind == "sync":
            self._sync(step)
        elif step.kind == "unlink":
            self._enter(step.path, None, step)
        else:
            self._enter(step.target, self._file(step), step)
            if step.kind == "rename":
                self._enter(step.path, None, step)

    def _file(self, step: Step) -> File:
        file = self.now(step.path)
        if file is None:
            raise NotModelledError(f"{step.kind} of {step.path}, a file that no recorded call has created")
        return file

    def _enter(self, name: str, file: File | None, step: Step) -> None:
        if name:  # empty for a name in another directory
            self._entries.setdefault(name, [_Entry(None, -1)]).append(_Entry(file, step.done))

    def _sync(self, step: Step) -> None:
        file = self.now(step.path)
        if file is not None:
            file.sync(step.begun)
            return
        for name, entries in self._entries.items():  # a directory: syncing a file does not sync its name
            if (posixpath.dirname(name) or ".") == step.path:
                older = [entry for entry in entries if entry.done < step.begun]
                del older[-1:]  # the last of them is durable now
                entries[:] = [entry for entry in entries if entry not in older]


# --- the replay


@dataclass
class Replay:
    """A replay of steps on an empty disk, which checks after each of them what a loss of power may leave.

    Parameters
    ----------
    steps : sequence of Step
    complete : mapping of str to collection of bytes
        The complete contents that may be found under each name that is not private.

    Attributes
    ----------
    disk : Disk
        The disk after all steps.
    faults : dict of str to str
        For each name that may be found with other contents: the first step after which it may.
    """

    steps: Sequence[Step]
    complete: Mapping[str, Collection[bytes]]
    disk: Disk = field(default_factory=Disk)
    faults: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A change may be on disk as soon as its call has begun, and is certain to be there only when a sync has ended.
        for step in sorted(self.steps, key=lambda step: step.done if step.kind == "sync" else step.begun):
            self.disk.apply(step)
            for name in self.disk.names():
                if name not in self.faults and not self._is_safe(name):
                    self.faults[name] = f"{step.kind} {step.path}"

    def _is_safe(self, name: str) -> bool:
        """Return whether a name is certain to be absent, or to have a complete file."""
        complete = self.complete.get(name, ())
        files = self.disk.after_power_loss(name)
        return all(file is None or all(found in complete for found in file.after_power_loss()) for file in files)


# --- the recording


def refusal() -> str | None:
    """Return why nothing can be recorded here, or None if it can."""
    try:
        command = [*_STRACE, "-o", os.devnull, "true"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return "strace is not installed"
    return f"strace cannot be used here: {done.stderr.strip()}" if done.returncode else None


def record(command: Sequence[str], log: Path) -> int:
    """Run a command in the folder of `log`, write its system calls to that file, and return its exit status."""
    arguments = [*_STRACE, "-o", str(log), *command]
    with subprocess.Popen(arguments, cwd=log.parent, start_new_session=True) as process:
        try:
            return process.wait(timeout=300)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # strace and the command


def read_log(log: Iterable[str], directory: str, cwd: str) -> list[Step]:
    """Return the steps in `directory` from a log of strace.

    Parameters
    ----------
    log : iterable of str
        The lines.
    directory : str
        Its path, without symbolic links.
    cwd : str
        The base of relative paths, where strace does not say.
    """
    reader = _Reader(directory, cwd)
    return [step for call in _calls(log) for step in reader.steps(call)]


@dataclass(frozen=True)
class _Call:
    name: str
    arguments: str
    result: int
    begun: int
    done: int


def _calls(log: Iterable[str]) -> Iterator[_Call]:
    """Yield the system calls that succeeded, in the order of their ends."""
    begun: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(log):
        thread, _, text = line.rstrip("\n").partition(" ")
        text, start = text.lstrip(), number
        if text.endswith(_BEGUN):
            begun[thread] = number, text.removesuffix(_BEGUN)
            continue
        if match := _RESUMED.match(text):
            start, first = begun.pop(thread)
            text = first + text[match.end() :]
        if (match := _CALL.match(text)) and int(match["result"]) >= 0:
            yield _Call(match["name"], match["arguments"], int(match["result"]), start, number)


@dataclass(frozen=True)
class _Reader:
    """Turn system calls into steps."""

    directory: str
    cwd: str

    def steps(self, call: _Call) -> Iterator[Step]:
        """Yield the steps of one call; none if it concerns another directory."""
        for step in self._steps(call):
            if step.path or step.target:
                yield replace(step, begun=call.begun, done=call.done)

    def _steps(self, call: _Call) -> Iterator[Step]:
        name = call.name
        if name in ("open", "openat", "creat"):
            yield from self._opened(call)
        elif name in ("write", "writev", "pwrite64"):
            if path := self._described(call):
                offset = int(call.arguments.rpartition(", ")[2]) if name == "pwrite64" else None
                # ndcache writes files without seeking. If it did, the replay would not end with the files on disk.
                yield Step("write", path, data=_strings(call.arguments)[: call.result], offset=offset)
        elif name == "ftruncate":
            yield Step("truncate", self._described(call), offset=int(call.arguments.rpartition(", ")[2]))
        elif name in ("fsync", "fdatasync"):
            yield Step("sync", self._described(call))
        elif name in ("rename", "renameat", "renameat2", "link", "linkat"):
            path, target = self._paths(call)
            yield Step(re.sub("at2?$", "", name), path, target)
        elif name in ("unlink", "unlinkat") and "AT_REMOVEDIR" not in call.arguments:
            (path,) = self._paths(call)
            yield Step("unlink", path)
        elif name not in ("mkdir", "mkdirat", "rmdir", "unlinkat"):  # a lost directory takes its names with it
            self._check_it_is_elsewhere(call)

    def _opened(self, call: _Call) -> Iterator[Step]:
        (path,) = self._paths(call)
        if "O_CREAT" in call.arguments or call.name == "creat":
            yield Step("create", path)
        if "O_TRUNC" in call.arguments or call.name == "creat":
            yield Step("truncate", path, offset=0)

    def _check_it_is_elsewhere(self, call: _Call) -> None:
        if call.name == "mmap" and not {"MAP_SHARED", "PROT_WRITE"} <= set(re.split(r"[|, ]+", call.arguments)):
            return
        open_files = [match["path"] for match in _DESCRIPTOR.finditer(call.arguments) if match["path"]]
        if call.name == "sync" or any(self._relative(_text(path)) for path in open_files) or any(self._paths(call)):
            raise NotModelledError(f"{call.name} in {self.directory}")

    def _described(self, call: _Call) -> str:
        """Return the path of the descriptor in the first argument; "" if it is elsewhere, or was deleted."""
        match = _DESCRIPTOR.match(call.arguments)
        if match is None or match["path"] is None or match["deleted"]:
            return ""
        path = _text(match["path"])
        return "" if path.endswith(" (deleted)") else self._relative(path)

    def _paths(self, call: _Call) -> list[str]:
        """Return the paths among the arguments, each "" if it is elsewhere."""
        found = []
        for match in _PATH.finditer(call.arguments):
            base = _text(match["base"]) if match["base"] else self.cwd
            found.append(self._relative(posixpath.join(base, _text(match["name"]))))
        return found

    def _relative(self, path: str) -> str:
        path = posixpath.normpath(path)
        if path == self.directory:
            return "."
        return path[len(self.directory) + 1 :] if path.startswith(f"{self.directory}/") else ""


def _strings(arguments: str) -> bytes:
    """Return all string arguments, joined."""
    found = list(_STRING.finditer(arguments))
    if any(match[2] for match in found):
        raise NotModelledError("strace cut a string")
    return b"".join(_bytes(match[1]) for match in found)


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", "")) if text.startswith("\\x") else os.fsencode(text)


def _text(text: str) -> str:
    return os.fsdecode(_bytes(text))
