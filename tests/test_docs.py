"""The pages of docs/: their examples run, their links lead somewhere, and they name what there is."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import ndcache
from ndcache import tvm
from ndcache.cli.commands import main
from ndcache.devices.gpu.adapters import list_adapters

from .helpers.documents import run_examples
from .helpers.servers import FileServer

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
#: Pages with examples.
TASKS = sorted(
    path.relative_to(DOCS).as_posix()
    for path in [*DOCS.glob("guide/*.rst"), DOCS / "concepts.rst", DOCS / "quickstart.rst"]
)
#: All that is written for people.
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.rst"), *DOCS.rglob("*.rst")])
HAS_TORCH = importlib.util.find_spec("torch") is not None
#: The server of the pages' examples.
ADDRESS = "127.0.0.1:8000"


@pytest.mark.parametrize("page", TASKS)
def test_the_examples(
    page: str,
    tmp_path: Path,
    serve: Callable[..., FileServer],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Run them as guide/index.rst tells a reader to: beside a model, with a server of the same folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    has_gpu = bool(list_adapters()) or "NDCACHE_TEST_REQUIRE_ALL" in os.environ
    if has_gpu:
        request.getfixturevalue("gpu")
    address = {ADDRESS: serve(tmp_path / "work").url.removeprefix("http://").rstrip("/")}
    if page != "guide/index.rst":
        run_examples(DOCS / "guide" / "index.rst", replace=address)
    # Where PyTorch is missing on purpose, so are the examples: what they need is in their first line.
    missing = {"needs a GPU": not has_gpu, "needs PyTorch": not HAS_TORCH, "needs CUDA": not has_cuda()}
    run_examples(
        DOCS / page, replace=address, skip=lambda shown: any(gone and words in shown for words, gone in missing.items())
    )


def has_cuda() -> bool:
    return HAS_TORCH and bool(importlib.import_module("torch").cuda.is_available())


def test_the_shader_of_the_guide_is_that_of_the_example() -> None:
    """A test of the example runs it."""
    (shown,) = re.findall(
        r"code-block:: wgsl\n\n((?:    .*\n|\n)+)", (DOCS / "guide" / "quantised.rst").read_text("utf-8")
    )
    assert textwrap.dedent(shown).strip() in (ROOT / "examples" / "quantised_layer.wgsl").read_text("utf-8")


# --- links --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_are_relative_and_lead_somewhere(page: str) -> None:
    text = re.sub(r"``[^`]*``", "", (ROOT / page).read_text("utf-8"))
    for target in re.findall(r"<([^<>\s]+)>`__?", text):
        if not target.startswith("https://"):
            path = target.partition("#")[0]
            assert ((ROOT / page).parent / path).is_file(), target


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("docs/api/")])
def test_pages_need_no_sphinx(page: str) -> None:
    """The repository's own page shows them too, and knows neither the roles nor the directives of Sphinx."""
    text = (ROOT / page).read_text("utf-8")
    assert not re.search(r":[a-z:]+:`", text)
    directives = set(re.findall(r"^ *\.\. ([\w:-]+)::", text, re.MULTILINE))
    assert directives <= {"code-block", "list-table", "image", "note", "include", "toctree"}


# --- names --------------------------------------------------------------------------------------------


def test_the_reference_has_every_public_name() -> None:
    text = "".join(path.read_text("utf-8") for path in (DOCS / "api").glob("*.rst"))
    documented = re.findall(r"^\.\. auto(?:function|class|exception):: (?:ndcache\.)?(\w+)$", text, re.MULTILINE)
    assert sorted(documented) == sorted(name for name in ndcache.__all__ if name != "__version__")
    assert ".. automodule:: ndcache.tvm\n" in text
    assert all(getattr(tvm, name).__doc__ for name in tvm.__all__)


def test_variables_are_those_of_the_code() -> None:
    """Each environment variable that a page names is one that the code, or a library that it uses, reads."""
    code = "".join(path.read_text("utf-8") for path in (ROOT / "ndcache").rglob("*.py"))
    code += " ".join(str(option.envvar) for command in main.commands.values() for option in command.params)
    for page in TASKS:
        for name in re.findall(r"\b(?:NDCACHE|HF)_[A-Z_]+\b", (DOCS / page).read_text("utf-8")):
            assert name in code, (page, name)


def test_troubleshooting_quotes_messages_of_the_code() -> None:
    """Each message in italics on the page is in the code, but for numbers and for what ``…`` stands for."""
    constants = [node for path in (ROOT / "ndcache").rglob("*.py") for node in ast.walk(ast.parse(path.read_bytes()))]
    code = "\n".join(node.value for node in constants if isinstance(node, ast.Constant) and type(node.value) is str)
    quoted = re.findall(r"\*([^*\n]+)\*", (DOCS / "troubleshooting.rst").read_text("utf-8"))
    assert len(quoted) > 60
    for message in quoted:
        for words in re.sub(r"\(?status \d+\)", "(status ", message).split("…"):
            assert words.strip(" .:,") in code, message


def test_contributing_shows_where_everything_is() -> None:
    """Each folder in its table exists, holds the file to read first, and no folder of modules is missing."""
    text = (ROOT / "CONTRIBUTING.rst").read_text("utf-8")
    rows = dict(re.findall(r"^``([\w/]+/)`` .* ``([\w.]+)``$", text, re.MULTILINE))
    for folder, first in rows.items():
        assert (ROOT / folder / first).is_file(), (folder, first)
    folders = {f"{path.parent.relative_to(ROOT).as_posix()}/" for path in (ROOT / "ndcache").glob("*/__init__.py")}
    assert folders | {"ndcache/"} == {folder for folder in rows if folder.startswith("ndcache/")}
