"""Headers of safetensors files on servers: their requests, what is kept of them, and files that change meanwhile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

import ndcache

from ...helpers.hub import HubServer
from ...helpers.models import assert_same
from ...helpers.servers import Connection, FileServer, Request, ScriptedServer, Step, reply, then_close
from ...helpers.tensor_files import file_bytes, header_of, write_files

Serve = Callable[..., FileServer]
Array: TypeAlias = "np.ndarray[Any, Any]"

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PARTS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
GUESS = "bytes=0-262143"
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture
def arrays() -> dict[str, Array]:
    random = np.random.default_rng(7)
    return {f"layer.{n}": random.random((n + 1, 5), dtype=np.float32) for n in range(8)}


def asked(server: FileServer | ScriptedServer) -> list[tuple[str, str | None]]:
    """Return the names and ranges that were requested since the last call, without companions."""
    requests = [(request.path[1:], request.headers.get("range")) for request in server.requests]
    server.requests.clear()
    return [(name, part) for name, part in requests if name not in COMPANIONS]


def changed(arrays: dict[str, Array]) -> dict[str, Array]:
    return {name: array + 1 for name, array in arrays.items()}


def from_bytes(data: bytes) -> Step:
    """Answer requests for ranges of a file without ETags."""

    def answer(connection: Connection, request: Request) -> None:
        first, _, last = request.headers.get("range", f"bytes=0-{len(data)}")[6:].partition("-")
        body, end = data[int(first) : int(last) + 1], min(int(last) + 1, len(data))
        is_range = "range" in request.headers
        headers = {"Content-Range": f"bytes {first}-{end - 1}/{len(data)}"} if is_range else {}
        connection.send(reply(206 if is_range else 200, body, headers))

    return answer


def test_a_warm_load_makes_one_request(tmp_path: Path, serve: Serve, arrays: dict[str, Array]) -> None:
    write_files(tmp_path / "www", arrays, 1)
    server = serve(tmp_path / "www")
    assert_same(ndcache.load(server.url), arrays)
    tried = ["tensor-cache.json", "ndarray-cache.json", INDEX]
    assert asked(server) == [*((name, None) for name in tried), (FILE, GUESS), (FILE, None)]
    for url in (server.url, server.url + FILE):
        assert_same(ndcache.load(url), arrays)
        assert asked(server) == [(FILE, GUESS)]
    assert ndcache.is_cached(server.url)
    assert ndcache.verify(server.url).checked == {FILE: "size"}
    assert_same(ndcache.load(server.url, offline=True), arrays)
    directory = ndcache.fetch(server.url, offline=True)
    assert (directory / FILE).read_bytes() == (tmp_path / "www" / FILE).read_bytes()
    server.requests.clear()
    assert_same(ndcache.load(directory), arrays)
    assert ndcache.delete(server.url) > 0
    assert not ndcache.is_cached(server.url)
    assert server.requests == []


def test_an_index_and_its_files(tmp_path: Path, serve: Serve, arrays: dict[str, Array]) -> None:
    write_files(tmp_path / "www", arrays, 3)
    server = serve(tmp_path / "www")
    assert_same(ndcache.load(server.url + INDEX, processes=2), arrays)
    requests = asked(server)
    assert requests[0] == (INDEX, None)
    assert sorted(requests[1:4]) == [(name, GUESS) for name in PARTS], "all headers before the first file"
    assert sorted(requests[4:]) == [(name, None) for name in PARTS]
    ndcache.load(server.url + INDEX)
    assert asked(server) == [(INDEX, None)]
    target = ndcache.fetch(server.url + INDEX, local_dir=tmp_path / "mine")
    for name in (INDEX, *PARTS):
        assert (target / name).read_bytes() == (tmp_path / "www" / name).read_bytes()
    assert_same(ndcache.load(target), arrays)


def test_only_the_wanted_ranges(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ndcache.sources.downloads.shard_request._GAP", 1 << 10)
    arrays = {name: np.full(1 << 12, n, np.float32) for n, name in enumerate("abc")}
    write_files(tmp_path / "www", arrays, 1)
    server = serve(tmp_path / "www")
    assert_same(ndcache.load(server.url + FILE, names=["b"]), {"b": arrays["b"]})
    ranges = [part for _, part in asked(server)][1:]
    assert len(ranges) == 2
    assert sum(int(end) + 1 - int(start) for start, end in (str(part)[6:].split("-") for part in ranges)) < 17 << 10
    assert_same(ndcache.load(server.url + FILE, names={"c": slice(5, 9)}), {"c": arrays["c"][5:9]})


@pytest.mark.once
def test_a_header_as_long_as_the_limit(tmp_path: Path, serve: Serve) -> None:
    header = json.dumps({"t": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model").mkdir()
    server = serve(tmp_path / "model")
    for length in (64 << 20, (64 << 20) + 1):
        data = length.to_bytes(8, "little") + header.ljust(length) + b"1234"
        (tmp_path / "model" / FILE).write_bytes(data)
        for source in (server.url, tmp_path / "model"):
            if length > 64 << 20:
                with pytest.raises(ndcache.ManifestLimitError, match=r"67,108,865 bytes, and the limit is 67,108,864"):
                    ndcache.load(source, cache_dir=tmp_path / "other")
            else:
                assert bytes(ndcache.load(source)["t"]) == b"1234"
                assert bytes(ndcache.load(source, offline=True)["t"]) == b"1234"


def test_a_header_longer_than_the_guess(tmp_path: Path, serve: Serve) -> None:
    arrays = {f"{'n' * 60}.{n}": np.full(1, n, np.int32) for n in range(3000)}
    write_files(tmp_path / "www", arrays, 1)
    server = serve(tmp_path / "www")
    assert_same(ndcache.load(server.url + FILE), arrays)
    first, second, file = asked(server)
    assert (first[1], file[1]) == (GUESS, None)
    assert str(second[1]).startswith("bytes=262144-")


@pytest.mark.parametrize("kind", ["no ranges", "no length", "no ETag", "no ETag, long header"])
def test_servers_that_say_less(scripted: ScriptedServer, arrays: dict[str, Array], kind: str) -> None:
    name = "x" * 300_000 if "long" in kind else "x"
    data = file_bytes(header_of({name: arrays["layer.3"]}), arrays["layer.3"].tobytes())
    whole = then_close(reply(200, data, length=None)) if kind == "no length" else reply(200, data)
    scripted.script[f"/{FILE}"] = [from_bytes(data) if "ETag" in kind else whole]
    assert_same(ndcache.load(scripted.url + FILE), {name: arrays["layer.3"]})


@pytest.mark.parametrize("case", ["cut", "grown", "lies", "empty", "web page"])
def test_row_90_nothing_else_is_requested_if_the_header_is_bad(
    tmp_path: Path, serve: Serve, scripted: ScriptedServer, arrays: dict[str, Array], case: str
) -> None:
    (path,) = write_files(tmp_path / "www", arrays, 1).values()
    data = path.read_bytes()
    bad = {"cut": data[:-1], "grown": data + b"x", "lies": data.replace(b'"F32"', b'"F64"', 1), "empty": b""}
    scripted.script[f"/{FILE}"] = [from_bytes(bad.get(case, b""))]
    if case == "empty":
        scripted.script[f"/{FILE}"] = [reply(416)]
    if case == "web page":
        scripted.script[f"/{FILE}"] = [reply(200, b"<!DOCTYPE html>", {"Content-Type": "text/html"})]
    with pytest.raises(ndcache.ManifestError) as caught:
        ndcache.load(scripted.url + FILE)
    assert (caught.value.shard, caught.value.url) == (FILE, scripted.url + FILE)
    assert asked(scripted) == [(FILE, GUESS)]
    assert "web page" in str(caught.value) or case != "web page"


def test_row_90_a_bad_header_does_not_replace_a_cached_model(
    tmp_path: Path, serve: Serve, arrays: dict[str, Array]
) -> None:
    (path,) = write_files(tmp_path / "www", arrays, 1).values()
    server = serve(tmp_path / "www")
    ndcache.fetch(server.url)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.warns(RuntimeWarning, match="using the cached manifest"):
        assert_same(ndcache.load(server.url), arrays)


def test_row_91_a_file_that_changes_after_its_header_was_read(
    tmp_path: Path, serve: Serve, scripted: ScriptedServer, arrays: dict[str, Array]
) -> None:
    one, other = (file_bytes(header_of({name: arrays["layer.0"]}), arrays["layer.0"].tobytes()) for name in "ab")
    assert len(one) == len(other)
    scripted.script[f"/{FILE}"] = [from_bytes(one), from_bytes(other)]
    with pytest.raises(ndcache.RemoteChangedError, match="of another version than the header"):
        ndcache.load(scripted.url + FILE)
    assert not ndcache.is_cached(scripted.url + FILE)
    assert_same(ndcache.load(scripted.url + FILE), {"b": arrays["layer.0"]})


def swapped(arrays: dict[str, Array]) -> tuple[bytes, bytes]:
    """Return two files of the same size, in which two tensors of the same shape have each other's place."""
    one, other = arrays["layer.0"], arrays["layer.0"] + 1
    pairs = ({"a": one, "b": other}, {"b": one, "a": other})
    first, second = (file_bytes(header_of(pair), b"".join(map(np.ndarray.tobytes, pair.values()))) for pair in pairs)
    assert len(first) == len(second)
    return first, second


def with_etags(data: bytes, etag: str, *, confirms: bool = True) -> Step:
    """Answer requests for a file with an ETag; a request with any other one is confirmed, too, if `confirms` is set."""

    def answer(connection: Connection, request: Request) -> None:
        if confirms and "if-none-match" in request.headers:
            connection.send(reply(304, headers={"ETag": request.headers["if-none-match"]}, length=None))
            return
        first, _, last = request.headers.get("range", f"bytes=0-{len(data)}")[6:].partition("-")
        body, end = data[int(first) : int(last) + 1], min(int(last) + 1, len(data))
        is_range = "range" in request.headers
        headers = {"Content-Range": f"bytes {first}-{end - 1}/{len(data)}"} if is_range else {}
        connection.send(reply(206 if is_range else 200, body, {**headers, "ETag": etag}))

    return answer


@pytest.mark.parametrize("names", [None, ["b"]], ids=["whole", "a range"])
def test_row_91_a_server_that_confirms_the_header_of_a_file_that_it_has_replaced(
    scripted: ScriptedServer, arrays: dict[str, Array], monkeypatch: pytest.MonkeyPatch, names: list[str] | None
) -> None:
    """As nginx does when a file of the same size and time takes its place: the kept header lies about the new file."""
    monkeypatch.setattr("ndcache.sources.downloads.shard_request._GAP", 0)
    old, new = swapped(arrays)
    scripted.script[f"/{FILE}"] = [with_etags(old, '"same"')]
    ndcache.read_manifest(scripted.url + FILE)
    scripted.script[f"/{FILE}"] = [with_etags(new, '"same"')]
    with pytest.raises(ndcache.RemoteChangedError, match="of another version than the header"):
        ndcache.load(scripted.url + FILE, names=names)
    assert_same(ndcache.load(scripted.url + FILE, names=["b"]), {"b": arrays["layer.0"]})
    assert_same(ndcache.load(scripted.url + FILE), {"b": arrays["layer.0"], "a": arrays["layer.0"] + 1})


def test_row_91_a_cached_file_that_a_stale_server_confirms_beside_a_new_header(
    scripted: ScriptedServer, arrays: dict[str, Array]
) -> None:
    """Of two servers behind one address, one has the new file, and the other says that the old one has not changed."""
    old, new = swapped(arrays)
    scripted.script[f"/{FILE}"] = [with_etags(old, '"old"', confirms=False)]
    assert_same(ndcache.load(scripted.url + FILE), {"a": arrays["layer.0"], "b": arrays["layer.0"] + 1})
    header, stale = with_etags(new, '"new"', confirms=False), with_etags(old, '"old"')

    def answer(connection: Connection, request: Request) -> None:
        (header if request.headers.get("range") == GUESS else stale)(connection, request)

    scripted.script[f"/{FILE}"] = [answer]
    with pytest.raises(ndcache.RemoteChangedError, match="of another version than the header"):
        ndcache.load(scripted.url + FILE)
    scripted.script[f"/{FILE}"] = [header]
    assert_same(ndcache.load(scripted.url + FILE), {"b": arrays["layer.0"], "a": arrays["layer.0"] + 1})


def test_a_kept_header_that_was_changed_is_not_confirmed(
    tmp_path: Path, serve: Serve, arrays: dict[str, Array], cache_dir: Path
) -> None:
    write_files(tmp_path / "www", arrays, 1)
    server = serve(tmp_path / "www")
    ndcache.fetch(server.url + FILE)
    (kept,) = cache_dir.rglob(f"headers/{FILE}")
    kept.write_bytes(kept.read_bytes().replace(b'"F32"', b'"I32"', 1))
    assert_same(ndcache.load(server.url + FILE), arrays)


@pytest.mark.parametrize("files", [1, 3])
def test_new_values_under_the_same_header(tmp_path: Path, serve: Serve, arrays: dict[str, Array], files: int) -> None:
    """A fine-tuned model has the same names and shapes, and perhaps the same index."""
    write_files(tmp_path / "www", arrays, files)
    server = serve(tmp_path / "www")
    ndcache.fetch(server.url)
    write_files(tmp_path / "www", changed(arrays), files)
    if files > 1:  # a new upload gives the index another version
        index = json.loads((tmp_path / "www" / INDEX).read_text())
        (tmp_path / "www" / INDEX).write_text(json.dumps(index, indent=1))
    assert_same(ndcache.load(server.url), changed(arrays))
    assert_same(ndcache.load(server.url, offline=True), changed(arrays))


def test_row_88_a_file_that_the_index_names_is_not_there(
    tmp_path: Path, serve: Serve, arrays: dict[str, Array]
) -> None:
    paths = write_files(tmp_path / "www", arrays, 3)
    paths[PARTS[1]].unlink()
    server = serve(tmp_path / "www")
    with pytest.raises(ndcache.NotFoundError, match=f"{INDEX} names this file") as caught:
        ndcache.load(server.url)
    assert (caught.value.shard, caught.value.status) == (PARTS[1], 404)
    assert {part for name, part in asked(server) if name in PARTS} == {GUESS}


def test_two_models_of_one_directory_leave_each_other_alone(
    tmp_path: Path, serve: Serve, arrays: dict[str, Array]
) -> None:
    write_files(tmp_path / "www", arrays, 1)
    write_files(tmp_path / "www", changed(arrays), 1, "other")
    server = serve(tmp_path / "www")
    for _ in range(2):
        assert_same(ndcache.load(server.url + FILE), arrays)
        assert_same(ndcache.load(server.url + "other.safetensors"), changed(arrays))
    server.requests.clear()
    assert_same(ndcache.load(server.url + FILE), arrays)
    assert asked(server) == [(FILE, GUESS)]


def test_row_96_a_redirect_that_expires_in_the_middle_of_a_file(
    scripted: ScriptedServer, arrays: dict[str, Array]
) -> None:
    """The file breaks off, its address has expired, and the next address goes on where it was."""
    data = file_bytes(header_of(arrays), b"".join(array.tobytes() for array in arrays.values()))
    half, answer = len(data) // 2, with_etags(data, '"one"', confirms=False)

    def redirect(signature: str) -> bytes:
        return reply(302, headers={"Location": f"{scripted.url}storage?signature={signature}"})

    def store(connection: Connection, request: Request) -> None:
        if request.target.endswith("=old") and "range" not in request.headers:
            connection.send(reply(200, data, {"ETag": '"one"'})[:-half])
        elif request.target.endswith("=old") and request.headers["range"] != GUESS:
            connection.send(reply(403))
        else:
            answer(connection, request)

    scripted.script = {f"/{FILE}": [redirect("old"), redirect("old"), redirect("new")], "/storage": [store]}
    assert_same(ndcache.load(scripted.url + FILE), arrays)
    requests = [(request.target[-3:], request.headers.get("range")) for request in scripted.requests_for("/storage")]
    assert requests[:2] == [("old", GUESS), ("old", None)]
    assert requests[-1] == ("new", f"bytes={len(data) - half}-{len(data) - 1}")


def test_mirrors_give_files_of_the_right_version_only(tmp_path: Path, serve: Serve, arrays: dict[str, Array]) -> None:
    write_files(tmp_path / "www", arrays, 3)
    shutil.copytree(tmp_path / "www", tmp_path / "mirror")
    other = {f"{name[:-1]}{9 - int(name[-1])}": array for name, array in arrays.items()}
    write_files(tmp_path / "old", other, 3)
    server, old, mirror = serve(tmp_path / "www"), serve(tmp_path / "old"), serve(tmp_path / "mirror")
    ndcache.read_manifest(server.url)
    server.status = {f"/{name}": 500 for name in PARTS}
    with pytest.raises(ndcache.ServerError) as caught:
        ndcache.load(server.url, mirrors=[old.url], retries=0)
    assert any(isinstance(error, ndcache.RemoteChangedError) for error in caught.value.others)
    assert_same(ndcache.load(server.url, mirrors=[old.url, mirror.url], retries=0), arrays)


# --- Hugging Face


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    (tmp_path / "www").mkdir()
    server = HubServer(tmp_path / "www")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.close()


def test_the_listing_replaces_probing_and_redirects_give_digests(hub: HubServer, arrays: dict[str, Array]) -> None:
    write_files(hub.directory, arrays, 3)
    (hub.directory / "config.json").write_text("{}")
    weights = ndcache.load("hf://owner/model")
    assert_same(weights, arrays)
    assert weights.stats.integrity == {"sha256": 3}
    requests = hub.asked()
    assert requests[:4] == ["tensor-cache.json", "ndarray-cache.json", "/api/models/owner/model/revision/main", INDEX]
    assert sorted(requests[4:7]) == PARTS
    assert ndcache.verify("hf://owner/model").checked == dict.fromkeys([*PARTS, "config.json"], "sha256")
    ndcache.load("hf://owner/model")
    assert hub.asked() == [INDEX]


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_pointer_of_git_lfs_is_called_one(scripted: ScriptedServer, has_ranges: bool) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    headers = {"Content-Range": f"bytes 0-{len(pointer) - 1}/{len(pointer)}"} if has_ranges else {}
    scripted.script[f"/{FILE}"] = [reply(206 if has_ranges else 200, pointer, headers)]
    with pytest.raises(ndcache.ManifestSyntaxError, match="git-lfs pointer") as caught:
        ndcache.load(f"{scripted.url}{FILE}")
    assert caught.value.url == f"{scripted.url}{FILE}"


@pytest.mark.parametrize("name", [1, None, ["config.json"]])
def test_a_listing_of_another_form_is_as_good_as_none(scripted: ScriptedServer, monkeypatch: Any, name: Any) -> None:
    listing = json.dumps({"siblings": [{"rfilename": "config.json"}, {"rfilename": name}]})
    scripted.script["/api/models/owner/model/revision/main"] = [reply(200, listing.encode())]
    monkeypatch.setenv("HF_ENDPOINT", scripted.url.rstrip("/"))
    with pytest.raises(ndcache.NotFoundError, match=r"no model\.safetensors\.index\.json or model\.safetensors either"):
        ndcache.load("hf://owner/model", retries=0)


def test_row_89_the_only_file_is_taken_and_of_several_none(hub: HubServer, arrays: dict[str, Array]) -> None:
    write_files(hub.directory, arrays, 1, "unusual")
    for _ in range(2):
        assert_same(ndcache.load("hf://owner/model"), arrays)
    assert hub.asked()[-1] == "unusual.safetensors"
    assert_same(ndcache.load("hf://owner/model", offline=True), arrays)
    ndcache.delete("hf://owner/model")
    write_files(hub.directory, arrays, 1, "second")
    with pytest.raises(ndcache.NotFoundError, match="2 safetensors models") as caught:
        ndcache.load("hf://owner/model")
    assert f"{hub.url}/owner/model/resolve/main/second.safetensors" in str(caught.value.hint)
    assert_same(ndcache.load("hf://owner/model/second.safetensors"), arrays)
    assert_same(ndcache.load(f"{hub.url}/owner/model/blob/main/unusual.safetensors"), arrays)


def test_row_90_wrong_bytes_behind_a_redirect(hub: HubServer, tmp_path: Path, arrays: dict[str, Array]) -> None:
    write_files(hub.directory, arrays, 1)
    write_files(tmp_path / "storage", changed(arrays), 1)
    hub.storage.directory = tmp_path / "storage"
    with pytest.raises(ndcache.ChecksumError, match="sha256"):
        ndcache.load("hf://owner/model", retries=0)
    assert not ndcache.is_cached("hf://owner/model")


def test_another_commit_asks_for_the_headers_again(
    hub: HubServer, arrays: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(hub.directory, arrays, 3)
    ndcache.fetch("hf://owner/model")
    write_files(hub.directory, changed(arrays), 3)  # with the same index
    monkeypatch.setattr("tests.helpers.hub.COMMIT", "d" * 40)
    assert_same(ndcache.load("hf://owner/model"), changed(arrays))


def test_required_digests(tmp_path: Path, serve: Serve, arrays: dict[str, Array]) -> None:
    from ...helpers.served_manifests import sri

    (path,) = write_files(tmp_path / "www", arrays, 1).values()
    server, wrong = serve(tmp_path / "www"), sri(b"other")
    good = sri(path.read_bytes())
    for source in (server.url, server.url + FILE, tmp_path / "www"):
        weights = ndcache.load(source, integrity={FILE: good})
        assert weights.stats.integrity == {"sha256": 1}
        with pytest.raises(ndcache.ChecksumError):
            ndcache.load(source, integrity={FILE: wrong}, cache_dir=tmp_path / "new", retries=0)
