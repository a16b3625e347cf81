"""The README's examples give the output that it shows."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import pytest

import ndcache
from ndcache.devices.gpu.adapters import list_adapters

from .helpers.documents import run_examples

README = Path(__file__).parent.parent / "README.rst"


def test_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.chdir(tmp_path)
    has_gpu = bool(list_adapters()) or "NDCACHE_TEST_REQUIRE_ALL" in os.environ
    if has_gpu:
        request.getfixturevalue("gpu")
    number = run_examples(
        README, skip=lambda shown: "https://host/" in shown or ("needs a GPU" in shown and not has_gpu)
    )
    assert number > 15


def test_every_verb_and_option_is_mentioned() -> None:
    text = README.read_text("utf-8")
    verbs = ("load", "stream", "fetch", "read_manifest", "is_cached", "verify", "delete", "dump", "Loader")
    for name in (*verbs, *inspect.signature(ndcache.Loader).parameters):
        assert name in text, name
