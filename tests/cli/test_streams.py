"""Test all commands with standard streams that are missing, full, closed, or have a narrow encoding."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache
from ndcache.cli.commands import main

from ..helpers.models import random_array, simple_model, write_model
from ..helpers.servers import FileServer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="descriptors of POSIX")

PRINTS_A_RESULT = 0, 1
ERROR = 1, 1
WRONG_USAGE = 2, 2
#: Each command, its exit status, and its exit status where standard output cannot be written.
COMMANDS: dict[str, tuple[tuple[str, ...], tuple[int, int]]] = {
    "load": (("load", "{url}"), PRINTS_A_RESULT),
    "fetch": (("fetch", "{url}"), PRINTS_A_RESULT),
    "inspect": (("inspect", "{model}"), PRINTS_A_RESULT),
    "inspect --json": (("inspect", "{model}", "--json"), PRINTS_A_RESULT),
    "ls": (("ls",), PRINTS_A_RESULT),
    "verify": (("verify", "{model}"), PRINTS_A_RESULT),
    "dump": (("dump", "{arrays}", "{out}"), PRINTS_A_RESULT),
    "doctor": (("doctor",), PRINTS_A_RESULT),
    "demo": (("demo", "--device", "cpu", "--size-mib", "1", "--rate-mib", "500"), PRINTS_A_RESULT),
    "rm": (("rm", "{url}"), PRINTS_A_RESULT),
    "--help": (("--help",), PRINTS_A_RESULT),
    "load --help": (("load", "--help"), PRINTS_A_RESULT),
    "--version": (("--version",), PRINTS_A_RESULT),
    "an error": (("load", "no/where"), ERROR),
    "an error, verbose": (("--verbose", "load", "no/where"), ERROR),
    "wrong usage": (("load", "--verify", "s\u00f6"), WRONG_USAGE),
}
#: One command of each kind: with a progress bar, with text, and three that end before anything is loaded.
KINDS = ("load", "inspect --json", "--help", "an error, verbose", "wrong usage")
#: The redirection ("n" is a pipe that nobody reads), whether standard output cannot be written, and the commands.
STREAMS = {
    "no output": (">&-", False, KINDS),
    "no error": ("2>&-", False, KINDS),
    "none": ("<&- >&- 2>&-", False, tuple(COMMANDS)),
    "output to a full device": (">/dev/full", True, KINDS),
    "error to a full device": ("2>/dev/full", False, KINDS),
    "both to a full device": (">/dev/full 2>&1", True, tuple(COMMANDS)),
    "output to nobody": ("1>n", True, KINDS),
    "error to nobody": ("2>n", False, KINDS),
    "both to nobody": ("1>n 2>n", True, KINDS),
}


@pytest.fixture
def arguments(tmp_path: Path, serve: Callable[..., FileServer]) -> Callable[[str], list[str]]:
    simple_model(tmp_path / "model")
    np.savez(tmp_path / "arrays.npz", a=random_array((3,)))
    places = {
        "url": serve(tmp_path / "model").url,
        "model": tmp_path / "model",
        "arrays": tmp_path / "arrays.npz",
        "out": tmp_path / "out",
    }
    return lambda what: [sys.executable, "-m", "ndcache", *(arg.format(**places) for arg in COMMANDS[what][0])]


@pytest.mark.once
@pytest.mark.parametrize("streams", STREAMS)
def test_row_64_every_command_runs_with_a_missing_full_or_closed_stream(
    tmp_path: Path, arguments: Callable[[str], list[str]], streams: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(ndcache.__file__).parents[1]))
    if "/dev/full" in STREAMS[streams][0] and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    redirection, is_told, commands = STREAMS[streams]
    reader, writer = os.pipe()
    os.close(reader)
    found = {}
    try:
        for what in commands:
            line = ["sh", "-c", f'exec "$@" {redirection}', "sh", *arguments(what)]
            child = subprocess.run(
                arguments(what) if ">n" in redirection else line,
                stdout=writer if "1>n" in redirection else subprocess.PIPE,
                stderr=writer if "2>n" in redirection else subprocess.PIPE,
                text=True,
                timeout=120,
                check=False,
            )
            found[what] = child.returncode
            said = child.stderr or ""
            assert "Traceback" not in said or what == "an error, verbose", said
            assert "Exception ignored" not in said
    finally:
        os.close(writer)
    assert found == {what: COMMANDS[what][1][is_told] for what in commands}
    assert (tmp_path / "out" / "tensor-cache.json").exists() == ("dump" in commands)


@pytest.mark.once
def test_row_64_standard_output_on_a_full_disk_is_an_error(arguments: Callable[[str], list[str]]) -> None:
    with open("/dev/full", "w") as full:
        for what in ("doctor", "inspect --json", "--help"):
            child = subprocess.run(
                arguments(what), stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False
            )
            said = child.stderr.splitlines()[-1]
            assert (child.returncode, said) == (1, "error: standard output: No space left on device"), what


def test_row_64_output_to_a_missing_stream_reaches_no_file(
    tmp_path: Path, arguments: Callable[[str], list[str]]
) -> None:
    """Without descriptor 1, the first file that the process opens would get it, and receive what C libraries print."""
    script = (
        "import os, sys\n"
        "from ndcache.sources.downloads import download\n"
        "from ndcache.cli.commands import main\n"
        "original = download.Downloader.download_shard\n"
        "def shard(self, *args, **options):\n"
        "    result = original(self, *args, **options)\n"
        "    print(*[os.readlink(f'/proc/self/fd/{n}') for n in range(3)], file=open(os.environ['LOG'], 'w'))\n"
        "    return result\n"
        "download.Downloader.download_shard = shard\n"
        "main(sys.argv[1:])\n"
    )
    log = tmp_path / "log"
    line = [sys.executable, "-c", script, *arguments("fetch")[3:]]
    subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *line],
        env={**os.environ, "LOG": str(log)},
        timeout=120,
        check=True,
    )
    assert log.read_text().split() == [os.devnull] * 3


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(e, marks=pytest.mark.once) for e in ("latin-1", "utf-8"))]
)
def test_row_64_characters_that_the_encoding_lacks_are_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    write_model(tmp_path / "m\u00f6d\u2026", [{"\u6a21\u578b": random_array((1,))}])
    for args in (
        ["load"],
        ["inspect"],
        ["verify"],
        ["load", "--names", "\u6a21\u578b\u578b"],
        ["load", "--verify", "\u6a21"],
    ):
        child = subprocess.run(
            [sys.executable, "-m", "ndcache", *args, str(tmp_path / "m\u00f6d\u2026")],
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert child.returncode == {"--names": 1, "--verify": 2}.get(args[-2] if len(args) > 2 else "", 0), child.stderr
        assert b"Traceback" not in child.stderr


class _WriteOnly:
    """Stand in for standard output with no more methods than `print` needs."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)


class _NoEncoding(io.StringIO):
    encoding = None  # type: ignore[assignment]

    def reconfigure(self, **_: Any) -> None:
        pass


def _closed() -> io.TextIOWrapper:
    stream = io.TextIOWrapper(io.BytesIO())
    stream.close()
    return stream


def _detached() -> io.TextIOWrapper:
    stream = io.TextIOWrapper(io.BytesIO())
    stream.detach()
    return stream


@pytest.mark.parametrize("stream", [_WriteOnly, _NoEncoding, _closed, _detached])
def test_row_64_a_stand_in_for_a_stream_may_lack_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: Callable[[], Any]
) -> None:
    simple_model(tmp_path)
    output, error = stream(), stream()
    for args, status in ((["load"], 0), (["inspect"], 0), (["load", "--names", "none"], 1)):
        with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
            patched.setattr(sys, "stdout", output)
            patched.setattr(sys, "stderr", error)
            main([*args, str(tmp_path)])
        assert ended.value.code == status, args
    if stream is _WriteOnly:
        assert "shards" in output.text
        assert "error:" in error.text


@pytest.mark.parametrize("file", ["none", "full", "closed", "write-only"])
def test_row_64_the_progress_bar_has_no_stream_to_write_to(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    simple_model(tmp_path)
    stream: Any = None if file == "none" else open("/dev/full", "w", buffering=1)  # noqa: SIM115
    if file in ("closed", "write-only"):
        stream.close()
    if file == "write-only":
        stream = _WriteOnly()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    with ndcache.load(tmp_path, progress=True) as weights:
        assert weights.stats.shards == json.loads((tmp_path / "tensor-cache.json").read_text())["records"].__len__()
    monkeypatch.undo()
    if file == "full":
        with contextlib.suppress(OSError):
            stream.close()
