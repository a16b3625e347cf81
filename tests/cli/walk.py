"""Run every command in terminals of several widths and kinds, and through pipes, and return what is printed.

    python -m tests.cli.walk        renew the snapshots in tests/cli/snapshots; look at the difference

Widths of columns depend on the lengths of paths and ports, so both have a fixed length here.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import io
import json
import os
import pty
import re
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

from ..helpers.companions import mlc_model
from ..helpers.models import random_array, write_model
from ..helpers.servers import FileServer

#: Modules that commands import when they need them, so that each process of a command would import them again.
_IMPORTED_LATE = ("asyncio", "multiprocessing", "ndcache.cache", "ndcache.loader", "requests", "rich.table", "tqdm")

SNAPSHOTS = Path(__file__).parent / "snapshots"

#: For each place to print to: the columns of the terminal, None for a pipe; and the environment.
PLACES: dict[str, tuple[int | None, dict[str, str]]] = {
    "40-columns": (40, {"TERM": "xterm-256color"}),
    "80-columns": (80, {"TERM": "xterm-256color"}),
    "120-columns": (120, {"TERM": "xterm-256color"}),
    "dumb": (80, {"TERM": "dumb"}),
    "no-color": (80, {"TERM": "xterm-256color", "NO_COLOR": "1"}),
    "ascii": (80, {"TERM": "xterm", "PYTHONIOENCODING": "ascii"}),
    "pipe": (None, {"TERM": "xterm-256color"}),
}
_COMMANDS = (
    "load",
    "fetch",
    "inspect",
    "ls",
    "rm",
    "prune",
    "verify",
    "convert",
    "dump",
    "doctor",
    "demo",
    "bench",
    "lock",
    "report",
)
#: The commands in their order; each finds the cache as those before it have left it.
STEPS = [
    "--help",
    *(f"{name} --help" for name in _COMMANDS),
    "ls",
    "fetch URL --dry-run",
    "fetch URL -q",
    "fetch URL m --dry-run --json",
    "load URL -q",
    "load m -q --device auto",
    "inspect m",
    "inspect m --summary",
    "inspect m --names",
    "inspect unicode",
    "ls",
    "ls --json",
    "verify URL -q",
    "verify URL m -q",
    "verify damaged -q",
    "lock m",
    "load m -q --trace trace.json",
    "report trace.json",
    "report m/tensor-cache.json",
    "convert m new.safetensors -q",
    "dump m new -q",
    "prune --older-than 30d --dry-run",
    "rm URL --dry-run",
    "rm URL",
    "rm URL",
    "load nowhere",
    "load empty",
    "load m --names layer",
    "load m --timeout 5,x",
    "load m --device tpu",
    "fetch URL --offline",
    "fetch nowhere m -q",
    "fetch URL --limit-rate 10Mbit",
    "ls --filter size>big",
    "ls --filter",
    "ls --sort name",
    "prune",
    "rm",
    "verify",
    "inspect m --summary --names",
    "load m --maxworkers 4",
    "lod",
    "download",
    "load STALLED",
]
#: The bodies that STALLED, a server, keeps back, so that the bar stays where it is.
STALLED = {"/params_shard_1.bin", "/params_shard_2.bin"}
#: A bar that has stood still for some seconds, as a terminal shows it; or the line in its place.
_STILL = re.compile(r"33% \|.*\b(?!0:0[0-3])\d+:\d\d left|33% of.*\n")


def prepare(directory: Path) -> None:
    """Write the models that the commands use."""
    (directory / "empty").mkdir()
    mlc_model(directory / "m")
    mlc_model(directory / "damaged")
    (directory / "damaged" / "params_shard_1.bin").unlink()
    write_model(directory / "unicode", [{"模型.weight": random_array((2, 3), "float16"), "b": random_array(())}])


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """Yield a directory whose path has always the same length; remove it at the end."""
    directory = Path("/tmp") / f"ndcache-walk-{secrets.token_hex(4)}"
    directory.mkdir()
    try:
        prepare(directory)
        yield directory
    finally:
        shutil.rmtree(directory)


def walk(url: str, stalled: str, directory: Path) -> dict[str, str]:
    """Return what all commands print at each place, with the same text for times, sizes and rates that vary."""
    command = [sys.executable, "-m", "tests.cli.walk", url, stalled, str(directory)]
    root = Path(__file__).parents[2]
    environ = {**os.environ, "PYTHONPATH": str(root)}
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES"):
        environ.pop(name, None)
    shown = json.loads(subprocess.run(command, cwd=root, env=environ, stdout=subprocess.PIPE, check=True).stdout)
    return {place: _normalised(text, (url, stalled), directory) for place, text in shown.items()}


def _normalised(text: str, urls: tuple[str, ...], directory: Path) -> str:
    text = text.replace(str(directory), "/tmp/ndcache-walk-00000000")
    text = re.sub(r"(?m) +$", "", text)  # click ends a name that is too long for a line of its own with a space
    for url in urls:
        port = url.rpartition(":")[2].partition("/")[0]
        text = re.sub(rf"\b{port}\b", "00000", text)
    text = re.sub(r"(--00000--)[0-9a-f]{16}", r"\g<1>0000000000000000", text)
    text = re.sub(r"(?m)^(time {2,}).*", r"\1TIME", text)
    text = re.sub(r"[\d.]+ [KM]?i?B/s, +\d+:\d\d left", "RATE", text)
    text = re.sub(r"\d+:\d\d left", "0:00 left", text)
    text = re.sub(r"\d+\.\d+( [KMG]iB freed| [KMG]iB would be freed| [KMG]iB kept)", r"#\1", text)
    text = re.sub(r"[\d.,]+ [KMGT]iB(?=, [\d.,]+ [KMG]?i?B needed)", "FREE", text)
    text = re.sub(r'("free_bytes": |"size": |"freed": )\d+', r"\1#", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.+]+", "DATE", text)
    text = re.sub(r"complete +[\d.]+ KiB", "complete  # KiB", text)
    return re.sub(r"(\d+ models?, )[\d.]+ KiB", r"\1# KiB", text)


# --- in a process of its own, which imports ndcache once ------------------------------------------------


def _run_all(url: str, stalled: str, directory: str) -> dict[str, str]:
    from ndcache.cli.commands import main

    for name in _IMPORTED_LATE:
        importlib.import_module(name)
    assert all(main.commands.values())  # which imports their modules
    os.chdir(directory)
    os.environ.update({"NDCACHE_HOME": "cache", "XDG_RUNTIME_DIR": directory, "HF_HUB_OFFLINE": ""})
    shown = {}
    for place, (columns, environ) in PLACES.items():
        parts = []
        for step in STEPS:
            arguments = [{"URL": url, "STALLED": stalled}.get(word, word) for word in step.split()]
            text, status = _run(main, arguments, columns, environ, until=_STILL if "STALLED" in step else None)
            parts.append(f"$ ndcache {step}\n{text}[{status}]\n")
        shown[place] = "\n".join(parts)
        for leftover in ("cache", "new"):
            shutil.rmtree(leftover)
        for file in ("new.safetensors", "trace.json", "trace.html"):
            os.remove(file)
    return shown


def _run(
    main: object, arguments: list[str], columns: int | None, environ: dict[str, str], until: re.Pattern[str] | None
) -> tuple[str, int]:
    """Fork, run a command on a terminal or a pipe, and return what it prints, and its exit status.

    With `until`, Ctrl-C ends it when it has shown this, and only the last two lines are returned.
    """
    if columns is None:
        reader, writer = os.pipe()
    else:
        reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    if (child := os.fork()) == 0:
        status = 70
        signal.alarm(60)  # rather than to wait for ever for what is never shown
        signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background of a shell ignore it
        try:
            for number in (1, 2):
                os.dup2(writer, number)
            os.environ.update(environ)
            encoding = environ.get("PYTHONIOENCODING", "utf-8")
            sys.stdout, sys.stderr = (
                io.TextIOWrapper(os.fdopen(number, "wb", 0, closefd=False), encoding=encoding, write_through=True)
                for number in (1, 2)
            )
            main(arguments, prog_name="ndcache")  # type: ignore[operator]
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(bool(end.code))
        finally:
            os._exit(status)
    os.close(writer)
    shown, is_ended = b"", until is not None
    with contextlib.suppress(OSError):  # Linux says so when the other end of a terminal is closed
        while piece := os.read(reader, 1 << 16):
            shown += piece
            if until is not None and until.search(shown.decode("utf-8", "replace")):
                os.kill(child, signal.SIGINT)
                until = None
    os.close(reader)
    _, status = os.waitpid(child, 0)
    text = shown.decode("utf-8").replace("\r\n", "\n")
    if is_ended:
        text = "\n".join(line.rpartition("\r")[2] for line in text.splitlines()[-2:])
    visible = re.sub(r"[^\n -\ud7ff\ue000-\U0010ffff]", lambda match: f"\\x{ord(match[0]):02x}", text)
    return visible if visible.endswith("\n") or not visible else f"{visible}\n", os.waitstatus_to_exitcode(status)


def renew() -> None:
    """Write the snapshots anew."""
    with (
        workplace() as directory,
        contextlib.closing(FileServer(directory / "m")) as server,
        contextlib.closing(FileServer(directory / "m")) as stalled,
    ):
        stalled.stalled = STALLED
        for place, text in walk(server.url, stalled.url, directory).items():
            (SNAPSHOTS / f"{place}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        json.dump(_run_all(*sys.argv[1:]), sys.stdout)
    else:
        renew()
