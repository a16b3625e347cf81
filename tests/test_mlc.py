"""`ndcache.mlc`, and what mlc_llm accepts as a model, against a server like Hugging Face."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ndcache
import ndcache.mlc
from ndcache.mlc import download_and_cache_mlc_weights

from .helpers.companions import mlc_model
from .helpers.disks import mount, mounted
from .helpers.hub import HubServer

URL = "HF://owner/model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    mlc_model(tmp_path / "served")
    server = HubServer(tmp_path / "served")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the place of the model below MLC_LLM_HOME."""
    monkeypatch.setenv("MLC_LLM_HOME", str(tmp_path / "mlc"))
    for name in ("MLC_DOWNLOAD_CACHE_POLICY", "MLC_LLM_READONLY_WEIGHT_CACHE", "MLC_TEMP_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "mlc" / "model_weights" / "hf" / "owner" / "model"


# --- what mlc_llm accepts -----------------------------------------------------------------------------


def is_directory(path: Path) -> bool:
    return path.is_dir()


def has_configuration(path: Path) -> bool:
    return (path / "mlc-chat-config.json").is_file()


def has_required_fields(path: Path) -> bool:
    config = json.loads((path / "mlc-chat-config.json").read_text(encoding="utf-8"))
    required = {
        *("model_type", "quantization", "model_config", "vocab_size", "context_window_size", "sliding_window_size"),
        *("prefill_chunk_size", "attention_sink_size", "tensor_parallel_shards", "conv_template"),
    }
    return required <= set(config)


def has_tokenizer(path: Path) -> bool:
    sets = (["tokenizer.json"], ["tokenizer.model"], ["merges.txt", "vocab.json", "added_tokens.json"])
    return any(all((path / name).exists() for name in names) for names in (*sets, ["tokenizer_model"]))


def has_valid_tokenizer(path: Path) -> bool:
    tokenizer = json.loads((path / "tokenizer.json").read_bytes())
    return isinstance(tokenizer, dict) and isinstance(tokenizer["decoder"]["type"], str)


def has_listed_files(path: Path) -> bool:
    config = json.loads((path / "mlc-chat-config.json").read_bytes())
    return all((path / name).is_file() for name in config["tokenizer_files"])


def has_weights(path: Path) -> bool:
    shards = json.loads((path / "tensor-cache.json").read_bytes())["records"]
    files = [(path / shard["dataPath"]).read_bytes() for shard in shards]
    return [(len(data), hashlib.md5(data).hexdigest()) for data in files] == [
        (shard["nbytes"], shard["md5sum"]) for shard in shards
    ]


#: The rules of mlc_llm at commit 01ced33, and where they are.
RULES: list[tuple[Callable[[Path], bool], str]] = [
    (is_directory, "support/download_cache.py, get_or_download_model: 'directory does not exist'"),
    (has_configuration, "the same: 'Cannot find …/mlc-chat-config.json'; also auto_config.detect_mlc_chat_config"),
    (has_required_fields, "serve/engine_base.py validates it as protocol.mlc_chat_config.MLCChatConfig"),
    (has_tokenizer, "cpp/tokenizers/tokenizers.cc, FromPath: 'Cannot find any tokenizer under'"),
    (has_valid_tokenizer, "the same, DetectTokenizerInfo: 'JSON must be an object', and the decoder has a type"),
    (has_listed_files, "interface/gen_config.py lists the files that it has put beside the configuration"),
    (has_weights, "download_cache.py compares md5; TVM reads records and shards by tensor-cache.json"),
]


@pytest.mark.parametrize(("rule", "reason"), RULES, ids=[rule.__name__ for rule, _ in RULES])
def test_mlc_llm_accepts_what_fetch_makes(hub: HubServer, rule: Callable[[Path], bool], reason: str) -> None:
    assert rule(ndcache.fetch("hf://owner/model")), reason
    for name in ("mlc-chat-config.json", "tokenizer.json", "tensor-cache.json"):
        (hub.directory / name).unlink()
    assert not any(rule(hub.directory) for rule in (has_configuration, has_tokenizer))


# --- the replacement ----------------------------------------------------------------------------------


def test_the_model_lies_where_mlc_llm_looks_for_it(hub: HubServer, home: Path) -> None:
    assert download_and_cache_mlc_weights(URL) == home
    assert {path.name for path in home.iterdir()} == {path.name for path in hub.directory.iterdir()}
    assert [path.name for path in home.parent.iterdir()] == ["model"]
    assert all(rule(home) for rule, _ in RULES)
    hub.asked()
    assert download_and_cache_mlc_weights("https://huggingface.co/owner/model", num_processes=2) == home
    assert hub.asked() == []


@pytest.mark.parametrize("has_temporary", [False, True])
def test_an_interrupted_download_is_resumed_and_has_no_name_before(
    hub: HubServer, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_temporary: bool
) -> None:
    if has_temporary:
        monkeypatch.setenv("MLC_TEMP_DIR", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
    hub.failing["params_shard_1.bin"] = 403
    with pytest.raises(ndcache.AuthError):
        download_and_cache_mlc_weights(URL)
    assert not home.exists()
    hub.failing.clear()
    hub.asked()
    download_and_cache_mlc_weights(URL)
    assert "params_shard_1.bin" in hub.asked()
    assert all(rule(home) for rule, _ in RULES)
    if has_temporary:
        assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("policy", ["REDO", "ON"])
def test_a_model_is_downloaded_again(hub: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    monkeypatch.setenv("MLC_DOWNLOAD_CACHE_POLICY", policy)
    home.mkdir(parents=True)
    (home / "old").touch()
    hub.failing["tensor-cache.json"] = 404
    force = None if policy == "REDO" else True
    with pytest.raises(ndcache.NotFoundError):
        download_and_cache_mlc_weights(URL, force_redo=force)
    assert (home / "old").exists(), "the old one stays until the new one is complete"
    hub.failing.clear()
    download_and_cache_mlc_weights(URL, force_redo=force)
    assert not (home / "old").exists()
    assert [path.name for path in home.parent.iterdir()] == ["model"]


def test_the_older_model_stays_if_the_new_one_cannot_take_its_place(
    hub: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir(parents=True)
    (home / "old").touch()
    (home.parent / ".model.12345678.deleted").mkdir()  # a process was killed between two renames
    rename = os.rename

    def interrupted(source: Any, target: Any) -> None:
        if target == home and source.name.endswith(".download"):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ndcache.mlc.os.rename", interrupted)
        download_and_cache_mlc_weights(URL, force_redo=True)
    assert [path.name for path in home.iterdir()] == ["old"]
    download_and_cache_mlc_weights(URL, force_redo=True)
    assert [path.name for path in home.parent.iterdir()] == ["model"]


def test_a_tilde_is_the_name_of_a_directory_as_for_mlc_llm(
    hub: HubServer, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("MLC_LLM_HOME", "~/mlc")
    directory = download_and_cache_mlc_weights(URL)
    assert directory == Path("~/mlc/model_weights/hf/owner/model")
    assert all(rule(directory) for rule, _ in RULES)
    assert not (tmp_path / "user" / "mlc").exists()


@pytest.mark.once
@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="only root mounts file systems")
def test_a_full_disk_is_no_obstacle_to_the_next_download(
    hub: HubServer, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = hub.directory / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " " * 1_000_000)
    monkeypatch.setenv("MLC_TEMP_DIR", str(tmp_path))
    with mounted(tmp_path / "mlc", "-t", "tmpfs", "-o", "size=512k", "tmpfs"):
        with pytest.raises(OSError, match="No space left"):
            download_and_cache_mlc_weights(URL)  # the copy from the other disk is not complete
        monkeypatch.delenv("MLC_TEMP_DIR")
        with pytest.raises(ndcache.DiskFullError, match=r"by MLC_LLM_HOME or MLC_TEMP_DIR\.$"):
            download_and_cache_mlc_weights(URL)
        mount("-o", "remount,size=8m", str(tmp_path / "mlc"))
        download_and_cache_mlc_weights(URL)
        assert all(rule(home) for rule, _ in RULES)
        assert [path.name for path in home.parent.iterdir()] == ["model"]


def test_policies_that_forbid_a_download(
    hub: HubServer, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readonly = tmp_path / "readonly"
    monkeypatch.setenv("MLC_LLM_READONLY_WEIGHT_CACHE", f"{tmp_path / 'none'}:{readonly}")
    monkeypatch.setenv("MLC_DOWNLOAD_CACHE_POLICY", "READONLY")
    with pytest.raises(RuntimeError, match="READONLY"):
        download_and_cache_mlc_weights(URL)
    mlc_model(readonly / "hf" / "owner" / "model")
    assert download_and_cache_mlc_weights(URL) == readonly / "hf" / "owner" / "model"
    monkeypatch.setenv("MLC_DOWNLOAD_CACHE_POLICY", "OFF")
    with pytest.raises(RuntimeError, match="OFF"):
        download_and_cache_mlc_weights(URL)
    assert hub.asked() == []
    monkeypatch.setenv("MLC_DOWNLOAD_CACHE_POLICY", "off")
    with pytest.raises(ValueError, match="ON, OFF, REDO, READONLY"):
        download_and_cache_mlc_weights(URL)


@pytest.mark.parametrize(
    "url", ["owner/model", "HF://owner", "HF://owner/model/x", "https://host/owner/model", "HF://../x"]
)
def test_other_urls_are_refused(home: Path, url: str) -> None:
    with pytest.raises(ValueError, match="Invalid model URL"):
        download_and_cache_mlc_weights(url)
