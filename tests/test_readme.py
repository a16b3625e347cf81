"""What the README shows is what comes out."""

from __future__ import annotations

import doctest
import os
from pathlib import Path

import pytest

import ndcache
from ndcache.devices.gpu.adapters import list_adapters

README = Path(__file__).parent.parent / "README.rst"


def test_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(README.read_text("utf-8"), {}, README.name, str(README), 0)
    if list_adapters() or os.environ.get("NDCACHE_TEST_REQUIRE_ALL"):
        request.getfixturevalue("gpu")
    else:
        test.examples = [example for example in test.examples if "needs a GPU" not in example.source]
    report: list[str] = []
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert results.attempted > 15
    assert results.failed == 0, "".join(report)


def test_every_verb_and_option_is_mentioned() -> None:
    import inspect

    text = README.read_text("utf-8")
    verbs = ("load", "stream", "fetch", "read_manifest", "is_cached", "verify", "delete", "dump", "Loader")
    for name in (*verbs, *inspect.signature(ndcache.Loader).parameters):
        assert name in text, name
