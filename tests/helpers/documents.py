"""Run what a page of the documentation shows, and compare what comes out with what the page says.

Three kinds of text are examples: doctests (``>>>``), ``code-block:: python`` (which only has to run) and the lines that
begin with ``$ ndcache`` in a ``code-block:: console``, with their output below. They run in the order of the page, in
one namespace and one folder.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["run_examples"]

_BLOCK = re.compile(r"^\.\. code-block:: (python|console)\n\n((?:(?:   .*)?\n)+)", re.MULTILINE)
_OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def run_examples(
    page: Path,
    *,
    replace: Mapping[str, str] | None = None,
    skip: Callable[[str], bool] = lambda shown: False,
) -> int:
    """Run the examples of a page in the working directory.

    Parameters
    ----------
    page : pathlib.Path
    replace : mapping of str to str, optional
        Texts of the page that stand for something that only a test knows, such as a server's address.
    skip : callable, optional
        Given an example as the page shows it, whether to leave it out.

    Returns
    -------
    int
        How many examples ran.

    Raises
    ------
    AssertionError
        Something else came out, with the differences.
    """
    text = page.read_text("utf-8")
    for placeholder, real in (replace or {}).items():
        text = text.replace(placeholder, real)
    blocks: list[str] = []
    found = [(each.source, each) for each in doctest.DocTestParser().get_examples(text)]
    found += _block_examples(text, blocks)
    examples = sorted((each for shown, each in found if not skip(shown)), key=lambda each: each.lineno)
    names: dict[str, Any] = {"__name__": "__main__"}
    names["_python"] = lambda index: exec(compile(blocks[index], str(page), "exec"), names)
    names["_shell"] = _shell
    test = doctest.DocTest(examples, names, page.name, str(page), 0, text)
    report: list[str] = []
    results = doctest.DocTestRunner(optionflags=_OPTIONS, verbose=False).run(test, out=report.append)
    assert results.failed == 0, "".join(report)
    return results.attempted


def _block_examples(text: str, blocks: list[str]) -> Iterator[tuple[str, doctest.Example]]:
    """Yield the text and an example of each block of Python, which is added to `blocks`, and of each command."""
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(2))
        content = textwrap.dedent(match[2])
        if match[1] == "python":
            blocks.append(content)
            yield content, doctest.Example(f"_python({len(blocks) - 1})\n", "", lineno=line)
            continue
        for command in re.finditer(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", content, re.MULTILINE):
            offset = content.count("\n", 0, command.start())
            want = re.sub(r"^$", "<BLANKLINE>", output, flags=re.MULTILINE) if (output := command[2].strip()) else ""
            yield command[1], doctest.Example(f"_shell({command[1]!r})\n", want, lineno=line + offset)


def _shell(command: str) -> None:
    """Run a command line of ndcache and print what it writes, standard error last."""
    program, _, arguments = command.partition(" ")
    assert program == "ndcache", f"only ndcache is run: {command}"
    done = subprocess.run(
        f'"{sys.executable}" -m ndcache {arguments}',
        shell=True,
        env={**os.environ, "COLUMNS": "100"},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    print((done.stdout + done.stderr).replace("\n\n", "\n<BLANKLINE>\n"), end="")
