"""The examples in the docstrings of the verbs run."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ndcache

from .helpers.models import simple_model
from .helpers.servers import FileServer

VERBS = ["load", "stream", "fetch", "read_manifest", "is_cached", "verify", "delete", "Loader", "Weights"]


@pytest.mark.parametrize("name", VERBS)
def test_examples_run(tmp_path: Path, serve: Callable[[Path], FileServer], name: str) -> None:
    for folder in ("model", "one", "other"):
        simple_model(tmp_path / folder, shards=2)
    server = serve(tmp_path)
    ndcache.fetch(f"{server.url}model/")
    examples = doctest.DocTestParser().get_examples(getattr(ndcache, name).__doc__)
    assert examples
    scope: dict[str, Any] = {"ndcache": ndcache}
    for example in examples:
        source = example.source.replace("https://host/", server.url).replace("/data/models", str(tmp_path / "cache"))
        exec(compile(source, name, "exec"), scope)
