"""The main function of a helper process. It lives no longer than its parent, from its first moment on.

This module imports little, so that a helper that is not needed any more notices it early; `downloading` has the rest.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from .command import WORKING_DIRECTORY, package_root

__all__ = ["main"]

#: Seconds between two looks at the parent.
_LOOK = 0.2
#: Seconds in which a helper whose parent has ended closes its partial files.
_GRACE = 2.0
_STDIN, _STDOUT, _STDERR = 0, 1, 2


def main(arguments: list[str]) -> None:
    """Download what the parent's request asks for, report, and end the process."""
    _prepare_signals()
    _forget_directories()
    life = _Life(parent=int(arguments[0]))
    threading.Thread(target=life.watch, name="ndcache-life", daemon=True).start()
    # Reports get a descriptor of their own, so that nothing that a library prints can come between them.
    reports = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    request = json.loads(life.requests.get())
    if os.path.realpath(request["package_root"]) != os.path.realpath(package_root()):
        _end(f"another ndcache was imported: {package_root()}")
    os.environ.update(request["environ"])

    from .downloading import download  # only now, as some libraries read the environment when they are imported

    try:
        download(request, reports, life.on_end)
    except BrokenPipeError:
        pass  # the parent has ended
    except BaseException as error:
        _end(f"{type(error).__name__}: {error}")
    os._exit(0)  # without the time that Python takes to clean up; everything is closed


class _Life:
    """The parent's request and the parent's end, which a thread of its own waits for.

    Parameters
    ----------
    parent : int
        Its process ID.

    Attributes
    ----------
    requests : SimpleQueue of bytes
        Receives the request.
    """

    def __init__(self, parent: int) -> None:
        self.requests: SimpleQueue[bytes] = SimpleQueue()
        self._parent = parent
        self._cancel: Callable[[], None] | None = None

    def on_end(self, cancel: Callable[[], None]) -> None:
        """Call `cancel` when the parent does not want the download any more, and exit a moment later."""
        self._cancel = cancel

    def watch(self) -> None:
        """Read the request; when the pipe is closed, or the parent has ended, end this process."""
        line = bytearray()
        while self._has_parent():
            if not select.select([_STDIN], [], [], _LOOK)[0]:
                continue
            data = os.read(_STDIN, 1 << 20)
            if not data:
                break
            line += data
            if line.endswith(b"\n"):
                self.requests.put(bytes(line))
                line.clear()
        if self._cancel is not None:
            self._cancel()
            time.sleep(_GRACE)  # the main thread exits earlier, if nothing blocks it
        os._exit(1)

    def _has_parent(self) -> bool:
        # A fork of the parent may keep the pipe open.
        return os.getppid() == self._parent


def _prepare_signals() -> None:
    """Leave Ctrl-C to the parent, and die of SIGTERM, whatever the parent does about them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def _forget_directories() -> None:
    """Never import from a working directory, which Python before 3.11 puts first."""
    sys.path[:] = [entry for entry in sys.path if entry not in ("", WORKING_DIRECTORY)]


def _end(reason: str) -> None:
    with open(_STDERR, "w", encoding="utf-8", errors="replace", closefd=False) as file:
        file.write(reason)
    os._exit(1)
