"""Completion in real shells, on a pseudo-terminal."""

from __future__ import annotations

import json
import os
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ndcache import fetch
from ndcache.cli.commands import main
from ndcache.format.paths import STATE_DIRECTORY

from ..helpers.commands import new_runner
from ..helpers.models import simple_model
from ..helpers.requirements import need_program
from ..helpers.servers import FileServer

if sys.platform == "win32":
    pytest.skip("terminals of POSIX", allow_module_level=True)

import pty

#: For each shell, how to start it without the user's files, and what loads the completion.
SHELLS = {
    "bash": (["--norc", "--noprofile", "-i"], 'eval "$(_NDCACHE_COMPLETE=bash_source ndcache)"'),
    "zsh": (["-f", "-i"], 'autoload -U compinit; compinit -D; eval "$(_NDCACHE_COMPLETE=zsh_source ndcache)"'),
    "fish": (["--no-config", "-i"], "_NDCACHE_COMPLETE=fish_source ndcache | source"),
}


class Shell:
    """An interactive shell: keys are typed into it, and what it shows is read."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal

    def type(self, keys: str, *, until: str) -> None:
        """Type keys, and read until the shell shows a text."""
        os.write(self._terminal, keys.encode())
        limit, shown = time.monotonic() + 60, ""
        while until not in shown:
            ready, _, _ = select.select([self._terminal], [], [], max(limit - time.monotonic(), 0))
            assert ready, shown
            shown += os.read(self._terminal, 1 << 16).decode(errors="replace")


@contextmanager
def started(name: str, folder: Path) -> Iterator[Shell]:
    """Start a shell in a directory, in which the command ``ndcache`` is, and end it."""
    arguments, setup = SHELLS[name]
    (folder / "ndcache").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ndcache "$@"\n')
    (folder / "ndcache").chmod(0o755)
    environ = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "HOME": str(folder),
        "TERM": "xterm" if name == "fish" else "dumb",
    }
    program = [need_program("setsid"), "--ctty", need_program(name), *arguments]
    terminal, its = pty.openpty()
    with subprocess.Popen(program, stdin=its, stdout=its, stderr=its, env=environ, cwd=folder) as process:
        os.close(its)
        try:
            shell = Shell(terminal)
            shell.type(f'{setup}; echo rea"dy"\r', until="ready")
            yield shell
        finally:
            os.close(terminal)  # which ends the shell
            process.wait(60)


@pytest.mark.once
@pytest.mark.parametrize("name", SHELLS)
def test_a_shell_completes_words_with_colons(name: str, tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    simple_model(tmp_path / "model")
    url = serve(tmp_path / "model").url
    fetch(url)
    with started(name, tmp_path) as shell:
        shell.type("ndcache rm -n ht\t\r", until="would be freed")
        shell.type(f"ndcache verify {url[:-3]}\t\r", until="good")
        shell.type("ndcache inspect --summary mod\t\r", until="4 shards")
        shell.type("ndcache load model --device=cp\t-q\r", until="in place")
        shell.type("ndcache load model --device cuda:\t\t", until="7")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ndcache rm ht", ["http://host/m/", r"http://host/m/\ \(query\ 1\)"]),
        ("ndcache rm http:", ["//host/m/", r"//host/m/\ \(query\ 1\)"]),
        ("ndcache load http://h", ["//host/m/"]),
        ("ndcache load 'ht", ["http://host/m/"]),
        ("ndcache load --offline ", ["http://host/m/"]),
        ("ndcache load zz", ["file,zz"]),
        ("ndcache load --token - --device c", ["cpu", "cuda"]),
        ("ndcache load --device=gpu:", [*"01234567"]),
        ("ndcache fetch --local-dir x", ["dir,x"]),
        ("ndcache none l", ["load", "lock", "ls"]),
        ("ndcache remove --dry", ["--dry-run"]),
    ],
)
def test_bash_gets_the_end_of_a_word(
    line: str, offered: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, source in enumerate(("http://host/m/", "http://host/m/ (query 1)")):
        state = tmp_path / "default" / str(number) / STATE_DIRECTORY
        state.mkdir(parents=True)
        (state / "source.json").write_text(json.dumps({"source": source}))
    environ = {
        "NDCACHE_HOME": str(tmp_path),
        "_NDCACHE_COMPLETE": "bash_complete",
        "COMP_LINE": line,
        "COMP_WORDBREAKS": " \t\n\"'@><=;|&(:",
    }
    result = new_runner().invoke(main, env=environ, prog_name="ndcache")
    assert (result.exit_code, result.stderr) == (0, "")
    assert [text.removeprefix("plain,") for text in result.stdout.splitlines()] == offered
