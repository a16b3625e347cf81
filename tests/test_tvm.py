"""Test `ndcache.tvm`: the registry, and single files by URL."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache
from ndcache import tvm

from .helpers.models import simple_model, write_model
from .helpers.servers import FileServer

Serve = Callable[..., FileServer]


@pytest.fixture(autouse=True)
def _empty_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tvm, "_callbacks", [])
    tvm.ndarray_cache_clear()
    yield
    tvm.ndarray_cache_clear()


def params_model(directory: Path, first: int = 0) -> None:
    arrays = [{f"param_{index}": np.array([first + index])} for index in range(3)]
    write_model(directory, arrays, metadata={"ParamSize": 3})


# --- the registry -------------------------------------------------------------------------------------


def test_it_is_there_with_ndcache_alone() -> None:
    code = "import ndcache; print(ndcache.tvm.get_params('p', -1))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"


def test_a_star_import_does_not_hide_the_real_tvm() -> None:
    assert "tvm" not in ndcache.__all__


def test_fetch_fills_the_registry(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    params_model(tmp_path / "model")
    server = serve(tmp_path / "model")
    monkeypatch.setattr(tvm, "cache_metadata", {"ParamSize": 1, "other": 2})
    assert tvm.fetch_ndarray_cache(server.url) == {"ParamSize": 3}
    assert tvm.cache_metadata == {"ParamSize": 3, "other": 2}
    assert [array.tolist() for array in tvm.get_params("param", -1)] == [[0], [1], [2]]


def test_fetch_to_a_gpu(tmp_path: Path, gpu: Any) -> None:
    params_model(tmp_path)
    tvm.fetch_ndarray_cache(str(tmp_path), gpu)
    tensor = tvm.ndarray_cache_get("param_2")
    assert isinstance(tensor, ndcache.GPUTensor)
    assert np.asarray(tensor).tolist() == [2]


def test_the_scope_is_a_part_of_the_cache(tmp_path: Path, serve: Serve) -> None:
    params_model(tmp_path / "model")
    url = serve(tmp_path / "model").url
    tvm.fetch_ndarray_cache(url, "cpu", "webllm/model")
    assert ndcache.is_cached(url, scope="webllm/model")
    assert not ndcache.is_cached(url)


def test_a_second_fetch_replaces(tmp_path: Path) -> None:
    params_model(tmp_path / "a")
    params_model(tmp_path / "b", first=10)
    for name in "ab":
        tvm.fetch_ndarray_cache(str(tmp_path / name))
    assert [array.tolist() for array in tvm.get_params("param", -1)] == [[10], [11], [12]]


def test_a_fetch_that_fails_changes_nothing(tmp_path: Path, serve: Serve) -> None:
    params_model(tmp_path / "a")
    params_model(tmp_path / "b", first=10)
    (tmp_path / "b" / "params_shard_2.bin").unlink()
    tvm.fetch_ndarray_cache(str(tmp_path / "a"))
    with pytest.raises(ndcache.NotFoundError):
        tvm.fetch_ndarray_cache(serve(tmp_path / "b").url)
    assert [array.tolist() for array in tvm.get_params("param", -1)] == [[0], [1], [2]]


def test_all_registered_callbacks_hear_of_later_fetches(tmp_path: Path) -> None:
    params_model(tmp_path)
    heard: list[tuple[str, str]] = []
    tvm.fetch_ndarray_cache(str(tmp_path))
    for name in "ab":
        tvm.register_init_progress_callback(lambda report, name=name: heard.append((name, report.text)))  # type: ignore[misc]
    tvm.fetch_ndarray_cache(str(tmp_path))
    assert heard[:2] == [("a", "Start to fetch params"), ("b", "Start to fetch params")]
    assert [name for name, text in heard if text.startswith("Loading model from cache[3/3]")] == ["a", "b"]
    with pytest.raises(TypeError):
        tvm.register_init_progress_callback("print")  # type: ignore[arg-type]


def test_a_cold_load_has_the_two_phases_of_web_llm(tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    params_model(tmp_path)
    reports: list[ndcache.ProgressReport] = []
    tvm.register_init_progress_callback(reports.append)
    tvm.fetch_ndarray_cache(serve(tmp_path).url)
    assert [report.text.partition("]")[0] for report in reports] == [
        "Start to fetch params",
        *(f"Fetching param cache[{count}/3" for count in range(4)),
        *(f"Loading model from cache[{count}/3" for count in range(4)),
    ]
    assert [report.phase for report in reports] == ["start", *["fetch"] * 4, *["load"] * 4]
    assert [report.progress for report in reports] == [0, *[0, 1 / 3, 2 / 3, 1] * 2]
    assert [report.bytes_done for report in reports[1:5]] == [report.bytes_done for report in reports[5:]]
    assert all(report.is_shard and not report.cache_only for report in reports)


def test_get_update_remove_clear() -> None:
    first, second = np.zeros(1), np.ones(1)
    assert tvm.ndarray_cache_get("x") is None
    tvm.ndarray_cache_update("x", first)
    assert tvm.ndarray_cache_get("x") is first
    with pytest.raises(ValueError, match="Name x already exists in the cache"):
        tvm.ndarray_cache_update("x", second)
    assert tvm.ndarray_cache_get("x") is first
    tvm.ndarray_cache_update("x", second, override=True)
    assert tvm.ndarray_cache_get("x") is second
    tvm.ndarray_cache_remove("absent")
    tvm.ndarray_cache_remove("x")
    assert tvm.ndarray_cache_get("x") is None
    tvm.ndarray_cache_update("y", first)
    tvm.ndarray_cache_clear()
    assert tvm.ndarray_cache_get("y") is None


@pytest.mark.parametrize(("count", "expected"), [(-1, [0, 1]), (0, []), (1, [0]), (2, [0, 1])])
def test_params_by_prefix(count: int, expected: list[int]) -> None:
    for number in (0, 1, 3):
        tvm.ndarray_cache_update(f"p_{number}", number)
    assert tvm.get_params("p", count) == expected


def test_params_that_are_missing() -> None:
    for number in (0, 1, 3):
        tvm.ndarray_cache_update(f"p_{number}", number)
    with pytest.raises(KeyError, match="Cannot find p_2 in cache"):
        tvm.get_params("p", 4)
    assert tvm.get_params_by_name(["p_3", "p_0"]) == [3, 0]
    with pytest.raises(KeyError, match="Cannot find parameter in cache: q"):
        tvm.get_params_by_name(["p_3", "q"])


def test_both_spellings_are_the_same() -> None:
    for name in ("fetch_{}_cache", "load_{}_cache", "dump_{}_cache", "delete_{}_cache", "has_{}_in_cache"):
        assert getattr(tvm, name.format("tensor")) is getattr(tvm, name.format("ndarray"))
    for name in tvm.__all__:
        if "ndarray_cache" in name:
            assert getattr(tvm, name.replace("ndarray", "tensor")) is getattr(tvm, name)


def test_one_of_many_threads_wins() -> None:
    start, won = threading.Barrier(8), []

    def update(number: int) -> None:
        start.wait()
        for index in range(200):
            try:
                tvm.ndarray_cache_update(f"x_{index}", number)
            except ValueError:
                continue
            won.append(index)

    threads = [threading.Thread(target=update, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(200))
    assert len(tvm.get_params("x", -1)) == 200


# --- models, in the cache and in directories ----------------------------------------------------------


def test_models_in_the_cache(tmp_path: Path, serve: Serve) -> None:
    params_model(tmp_path / "model")
    server = serve(tmp_path / "model")
    assert not tvm.has_tensor_in_cache(server.url)
    tvm.delete_tensor_cache(server.url)
    assert server.requests == []
    ndcache.fetch(server.url, names="param_0", scope="webllm/model")
    assert not tvm.has_tensor_in_cache(server.url, "webllm/model")
    directory = ndcache.fetch(server.url, scope="webllm/model")
    requests = len(server.requests)
    assert tvm.has_tensor_in_cache(server.url, "webllm/model")
    assert not tvm.has_tensor_in_cache(server.url)
    tvm.delete_tensor_cache(server.url)
    assert tvm.has_tensor_in_cache(server.url, scope="webllm/model")
    tvm.delete_tensor_cache(server.url, "webllm/model")
    assert not tvm.has_tensor_in_cache(server.url, "webllm/model")
    assert not directory.exists()
    assert len(server.requests) == requests


def test_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = {"a": np.ones((300, 1024), np.float32), "b": np.arange(3)}
    tvm.dump_tensor_cache(params, tmp_path / "one", "raw", {"n": 1}, 1)
    assert "Writing" in capsys.readouterr().err
    ndcache.dump(params, tmp_path / "two", encode="raw", metadata={"n": 1}, shard_bytes=1 << 20)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    update = iter([("b", np.arange(3, 6))])
    tvm.dump_tensor_cache(update, tmp_path / "one", show_progress=False, update_if_exists=True)
    assert capsys.readouterr() == ("", "")
    for path in (tmp_path / "one", str(tmp_path / "one" / "tensor-cache.json")):
        tensors, metadata = tvm.load_tensor_cache(path)
        assert metadata == {"n": 1}
        assert list(tensors) == ["a", "b"]
        assert tensors["b"].tolist() == [3, 4, 5]
    assert tvm.get_params("param", -1) == []


# --- single files -------------------------------------------------------------------------------------


@pytest.fixture
def cache() -> Iterator[tvm.ArtifactCache]:
    with tvm.ArtifactCache(retries=0) as opened:
        yield opened


@pytest.fixture
def server(tmp_path: Path, serve: Serve) -> FileServer:
    """Serve a model at ``m/``, with a tokenizer beside it and one shard in a folder."""
    simple_model(tmp_path / "www" / "m", shards=2)
    manifest = json.loads((tmp_path / "www" / "m" / "tensor-cache.json").read_bytes())
    (tmp_path / "www" / "m" / "deep").mkdir()
    (tmp_path / "www" / "m" / "params_shard_1.bin").rename(tmp_path / "www" / "m" / "deep" / "a b.bin")
    manifest["records"][1]["dataPath"] = "deep/a b.bin"
    (tmp_path / "www" / "m" / "tensor-cache.json").write_text(json.dumps(manifest))
    (tmp_path / "www" / "m" / "tokenizer.json").write_text('{"version": "1.0"}')
    return serve(tmp_path / "www")


def test_a_loader_fetches_finds_and_deletes_a_file(server: FileServer) -> None:
    url = server.url + "m/tokenizer.json"
    with ndcache.Loader() as loader:
        assert loader.find_file(url) is None
        path = loader.fetch_file(url)
        assert loader.find_file(url) == path
        assert path.read_bytes() == b'{"version": "1.0"}'
        loader.delete_file(url)
        loader.delete_file(url)
        assert loader.find_file(url) is None
        assert not path.exists()


def test_what_fetch_brought_is_here(server: FileServer, cache: tvm.ArtifactCache) -> None:
    urls = [server.url + path for path in ("m/params_shard_0.bin", "m/deep/a%20b.bin", "m/tensor-cache.json")]
    assert not any(cache.has_all_keys([url]) for url in urls)
    ndcache.fetch(server.url + "m/")
    assert cache.has_all_keys(urls)
    assert cache.has_all_keys([server.url + "m/deep/a b.bin"])
    assert cache.has_all_keys([])
    assert not cache.has_all_keys([*urls, server.url + "m/tokenizer.json"])
    before = len(server.requests)
    shard = (server.directory / "m" / "deep" / "a b.bin").read_bytes()
    assert cache.fetch_with_cache(urls[1]) == shard
    assert len(server.requests) == before


def test_what_is_added_need_not_be_fetched(server: FileServer, cache: tvm.ArtifactCache) -> None:
    ndcache.read_manifest(server.url + "m/")
    for path in ("m/params_shard_0.bin", "m/deep/a%20b.bin"):
        cache.add_to_cache(server.url + path)
        cache.add_to_cache(server.url + path)
    assert len(server.shard_requests()) == 2
    assert ndcache.is_cached(server.url + "m/")
    assert len(ndcache.load(server.url + "m/")) == 2
    assert len(server.shard_requests()) == 2


def test_a_file_without_a_model(server: FileServer, cache: tvm.ArtifactCache) -> None:
    url = server.url + "m/tokenizer.json"
    assert cache.fetch_with_cache(url, "json") == {"version": "1.0"}
    assert cache.fetch_with_cache(url, "arraybuffer") == cache.fetch_with_cache(url) == b'{"version": "1.0"}'
    assert len(server.requests) == 1
    assert cache.has_all_keys([url])
    with pytest.raises(ValueError, match="storetype"):
        cache.fetch_with_cache(url, "xml")


def test_a_file_goes_to_its_model(server: FileServer, cache: tvm.ArtifactCache) -> None:
    directory = ndcache.fetch(server.url + "m/")
    (server.directory / "m" / "deep" / "c.json").write_text("1")
    for path in ("m/tokenizer.json", "m/deep/c.json"):
        cache.add_to_cache(server.url + path)
    assert (directory / "tokenizer.json").read_bytes() == b'{"version": "1.0"}'
    assert (directory / "deep" / "c.json").read_bytes() == b"1"


def test_the_query_is_sent_and_not_kept(server: FileServer, cache: tvm.ArtifactCache) -> None:
    cache.add_to_cache(server.url + "m/tokenizer.json?sig=1#part")
    assert [request.target for request in server.requests] == ["/m/tokenizer.json?sig=1"]
    assert cache.has_all_keys([server.url + "m/tokenizer.json", server.url + "m/tokenizer.json?sig=2"])


def test_deleting(server: FileServer, cache: tvm.ArtifactCache) -> None:
    ndcache.fetch(server.url + "m/")
    urls = [server.url + path for path in ("m/params_shard_0.bin", "m/deep/a%20b.bin")]
    cache.delete_in_cache(urls[1])
    cache.delete_in_cache(urls[1])
    assert cache.has_all_keys(urls[:1])
    assert not cache.has_all_keys(urls)
    assert not ndcache.is_cached(server.url + "m/")
    assert cache.fetch_with_cache(urls[1]) == (server.directory / "m" / "deep" / "a b.bin").read_bytes()


def test_deleting_what_lies_in_two_places(server: FileServer, cache: tvm.ArtifactCache) -> None:
    url = server.url + "m/deep/a%20b.bin"
    cache.add_to_cache(url)  # on its own, before its model is known
    ndcache.fetch(server.url + "m/")
    cache.delete_in_cache(url)
    assert not cache.has_all_keys([url])


def test_scopes_are_apart(server: FileServer, cache: tvm.ArtifactCache) -> None:
    url = server.url + "m/tokenizer.json"
    cache.add_to_cache(url)
    with tvm.ArtifactCache("other") as other:
        assert not other.has_all_keys([url])


def test_a_damaged_file_is_found_out_by_load(server: FileServer, cache: tvm.ArtifactCache) -> None:
    shard = server.directory / "m" / "params_shard_0.bin"
    right = shard.read_bytes()
    shard.write_bytes(bytes(len(right)))
    cache.add_to_cache(server.url + "m/params_shard_0.bin")
    shard.write_bytes(right)
    assert np.asarray(ndcache.load(server.url + "m/")["layer.0"]).tobytes() == right


def test_errors_of_a_transfer(server: FileServer, cache: tvm.ArtifactCache) -> None:
    url = server.url + "m/absent.json"
    with pytest.raises(ndcache.NotFoundError):
        cache.add_to_cache(url)
    assert not cache.has_all_keys([url])


def test_offline(server: FileServer, cache: tvm.ArtifactCache) -> None:
    url = server.url + "m/tokenizer.json"
    with tvm.ArtifactCache(offline=True) as offline:
        with pytest.raises(ndcache.OfflineError) as caught:
            offline.fetch_with_cache(url)
        assert caught.value.missing == ("tokenizer.json",)
        assert server.requests == []
        cache.add_to_cache(url)
        assert offline.fetch_with_cache(url, "json") == {"version": "1.0"}


@pytest.mark.parametrize("path", ["a/..%2F..%2Fetc", "a/b:c", "a/%00", "a/.ndcache", "a/b%5cc"])
def test_names_that_are_unsafe(cache: tvm.ArtifactCache, path: str) -> None:
    for call in (cache.add_to_cache, cache.delete_in_cache, lambda url: cache.has_all_keys([url])):
        with pytest.raises(ndcache.UnsafePathError):
            call(f"http://127.0.0.1:9/{path}")


@pytest.mark.parametrize("url", ["http://host/model/", "http://host", "http://host/", "ftp://host/a", "http://:0/a"])
def test_urls_that_name_no_file(cache: tvm.ArtifactCache, url: str) -> None:
    with pytest.raises(ValueError, match=r"directory|not supported|no host"):
        cache.add_to_cache(url)


def test_a_local_file_is_not_cached(tmp_path: Path, cache: tvm.ArtifactCache) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="not the URL"):
        cache.add_to_cache(str(tmp_path / "x.json"))


@pytest.mark.parametrize("name", ["config.json", "params_shard_0.bin"])
def test_hugging_face_spellings(
    tmp_path: Path, serve: Serve, cache: tvm.ArtifactCache, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "www" / "owner" / "name" / "resolve" / "main"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(b"[1]")
    server = serve(tmp_path / "www")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    assert cache.fetch_with_cache(f"hf://owner/name/{name}") == b"[1]"
    assert cache.has_all_keys(
        [f"{server.url}owner/name/resolve/main/{name}", f"{server.url}owner/name/blob/main/{name}"]
    )
