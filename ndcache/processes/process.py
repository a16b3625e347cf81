"""One helper process, and the pipes to it."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
from typing import BinaryIO, cast

from ..errors import redact
from .command import WORKING_DIRECTORY
from .messages import HelperReport

__all__ = ["HelperProcess", "start_helper"]

#: The most bytes that are read at once, and the most that are kept of what a helper prints.
_READ_BYTES, _PRINTED_BYTES = 1 << 16, 2000
#: Seconds in which the system ends a process that was killed or has closed its pipes.
_END = 1.0


class HelperProcess:
    """A helper process, and the pipes to it, which never make this process wait.

    Parameters
    ----------
    process : subprocess.Popen
        Started just now.
    request : bytes
        What to send.
    selector : selectors.BaseSelector
        Tells when `move` can do something.

    Attributes
    ----------
    last : HelperReport
        The last report.
    silence : float
        Seconds since it came.
    is_running : bool
    """

    def __init__(self, process: subprocess.Popen[bytes], request: bytes, selector: selectors.BaseSelector) -> None:
        self.last = HelperReport()
        self.silence = 0.0
        self.is_running = True
        self._process = process
        self._selector = selector
        self._unsent = memoryview(request)
        self._unread = b""
        self._printed = b""
        self._stdin, self._stdout, self._stderr = (
            cast(BinaryIO, pipe) for pipe in (process.stdin, process.stdout, process.stderr)
        )

    @property
    def has_begun(self) -> bool:
        """Return whether it may have begun to download, and so have partial files to keep: it reports before."""
        return bool(self.last.counts)

    @property
    def has_exited(self) -> bool:
        """Return whether the process has ended, although a fork of this process may hold its pipes open."""
        return self._process.poll() is not None

    @property
    def last_words(self) -> str:
        """Return why it has ended: the signal, or what it printed last."""
        status, lines = self._process.returncode, redact(self._printed.decode("utf-8", "replace")).split("\n")
        if status is not None and status < 0:
            with contextlib.suppress(ValueError):
                return f"signal {signal.Signals(-status).name}"
        return next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {status}")

    def move(self) -> list[HelperReport]:
        """Send and receive what the pipes can take and have; return the reports that are complete."""
        has_exited = self.has_exited  # before the last look into the pipes
        if self._unsent:
            self._send()
        self._printed = (self._printed + self._receive(self._stderr))[-_PRINTED_BYTES:]
        *lines, self._unread = (self._unread + self._receive(self._stdout)).split(b"\n")
        if lines:
            self.silence = 0.0
        if has_exited or self._stdout.closed:
            self.kill()  # it has ended, or would be of no use
        with contextlib.suppress(ValueError):  # from another version
            return [HelperReport.decode(line) for line in lines]
        return []

    def hang_up(self) -> None:
        """Tell it to end."""
        self._close(self._stdin)

    def kill(self) -> None:
        """Wait for its end, which it has announced by closing its pipes; otherwise kill it first. Close the pipes."""
        if not self.is_running:
            return
        self.is_running = False
        if not self._stdout.closed:
            self._process.kill()
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # the system has it wait for a disk
                self._process.wait(_END)
        for pipe in (self._stdin, self._stdout, self._stderr):
            self._close(pipe)

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self._stdin.fileno(), self._unsent) :]
        except BlockingIOError:
            return
        except (OSError, ValueError):  # it has ended, or was told to
            self._unsent = memoryview(b"")
        if not self._unsent and not self._stdin.closed:
            self._selector.unregister(self._stdin)  # but not closed: that would tell it to end

    def _receive(self, pipe: BinaryIO) -> bytes:
        """Return what has come, and close the pipe at its end."""
        if pipe.closed:
            return b""
        try:
            data = os.read(pipe.fileno(), _READ_BYTES)
        except BlockingIOError:
            return b""
        if not data:
            self._close(pipe)
        return data

    def _close(self, pipe: BinaryIO) -> None:
        if not pipe.closed:
            with contextlib.suppress(KeyError):
                self._selector.unregister(pipe)
            pipe.close()


def start_helper(
    arguments: list[str],
    environ: dict[str, str],
    request: bytes,
    selector: selectors.BaseSelector,
    inherited: int | None = None,
) -> HelperProcess:
    """Start a helper process, which inherits a descriptor.

    Raises
    ------
    OSError, RuntimeError, subprocess.SubprocessError
    """
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environ,
        cwd=WORKING_DIRECTORY,
        bufsize=0,
        pass_fds=() if inherited is None else (inherited,),
    )
    helper = HelperProcess(process, request, selector)
    try:
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_WRITE if pipe is process.stdin else selectors.EVENT_READ, helper)
    except BaseException:
        helper.kill()
        raise
    return helper
