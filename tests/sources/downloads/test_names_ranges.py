"""Only some ranges of a shard are fetched if it holds few of the requested tensors, and they are used again later."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ndcache
from ndcache.store.directory import ModelDirectory
from ndcache.store.partials.folder import PartialFiles
from ndcache.store.partials.ranges import ByteRanges

from ...helpers.servers import Connection, FileServer, Request, ScriptedServer, reply

DATA = os.urandom(1 << 18)
SIZE = 1 << 12
NAMES = [f"w{number:02}" for number in range(len(DATA) // SIZE)]
PATH = "/params_shard_0.bin"
MD5 = hashlib.md5(DATA).hexdigest()


@pytest.fixture(autouse=True)
def _small_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ndcache.sources.downloads.shard_request._GAP", SIZE)


def bytes_of(name: str, data: bytes = DATA) -> bytes:
    start = NAMES.index(name) * SIZE
    return data[start : start + SIZE]


def manifest(digest: bool = True) -> bytes:
    record = {"shape": [SIZE], "dtype": "uint8", "format": "raw", "nbytes": SIZE}
    records = [{**record, "name": name, "byteOffset": number * SIZE} for number, name in enumerate(NAMES)]
    records.append({**record, "name": "empty", "shape": [0], "nbytes": 0, "byteOffset": 0})
    shard: dict[str, Any] = {"dataPath": PATH[1:], "format": "raw-shard", "nbytes": len(DATA), "records": records}
    if digest:
        shard["md5sum"] = MD5
    return json.dumps({"metadata": {}, "records": [shard]}).encode()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tensor-cache.json").write_bytes(manifest())
    (folder / PATH[1:]).write_bytes(DATA)
    return folder


def asked(requests: list[Request]) -> ByteRanges:
    """Return the ranges of the shard that were requested, each byte once."""
    ranges = []
    for request in requests:
        if request.path == PATH:
            start, end = request.headers["range"].removeprefix("bytes=").split("-")
            ranges.append((int(start), int(end) + 1))
    asked = ByteRanges(ranges)
    assert asked.nbytes == sum(end - start for start, end in ranges)
    return asked


def place(*names: str) -> list[tuple[int, int]]:
    return [(NAMES.index(name) * SIZE, (NAMES.index(name) + 1) * SIZE) for name in names]


def check(weights: ndcache.Weights[Any], *names: str, data: bytes = DATA) -> ndcache.LoadStats:
    assert list(weights) == list(names)
    assert {name: bytes(weights[name]) for name in names} == {name: bytes_of(name, data) for name in names}
    weights.close()
    return weights.stats


@pytest.mark.parametrize("workers", [1, 4])
def test_only_the_requested_tensors_are_fetched(serve: Callable[..., FileServer], model: Path, workers: int) -> None:
    server = serve(model)
    names = ["w03", "w20", "w40"]
    stats = check(ndcache.load(server.url, names=names, max_workers=workers), *names)
    assert list(asked(server.requests)) == place(*names)
    assert stats.nbytes == stats.network_bytes == 3 * SIZE
    assert stats.integrity == {"size": 1}
    assert stats.cache_bytes == stats.resumed_bytes == 0
    assert stats.peak_bytes_in_flight == 3 * SIZE


def test_tensors_near_each_other_are_one_request(serve: Callable[..., FileServer], model: Path) -> None:
    server = serve(model)
    check(ndcache.load(server.url, names=["w10", "w12", "w15"]), "w10", "w12", "w15")
    assert list(asked(server.requests)) == [(10 * SIZE, 13 * SIZE), (15 * SIZE, 16 * SIZE)]


def test_the_second_load_requests_nothing(serve: Callable[..., FileServer], model: Path) -> None:
    server = serve(model)
    directory = ndcache.fetch(server.url, names=["w03", "w20"])
    before = set((directory / ".ndcache" / "parts").iterdir())
    number = len(server.shard_requests())
    cases: list[tuple[str, dict[str, Any]]] = [
        ("w03", {}),
        ("w03", {"offline": True}),
        ("w20", {}),
        ("w03", {"offline": True, "decode": False}),
    ]
    for name, options in cases:
        stats = check(ndcache.load(server.url, names=[name], **options), name)
        assert stats.cache_bytes == stats.nbytes == SIZE
        assert stats.network_bytes == stats.resumed_bytes == 0
        assert stats.integrity == {"size": 1}
    assert len(server.shard_requests()) == number
    assert set((directory / ".ndcache" / "parts").iterdir()) == before
    with pytest.raises(ndcache.OfflineError, match="params_shard_0"):
        ndcache.load(server.url, names="w04", offline=True)


def test_fetched_ranges_are_used_when_more_is_requested(serve: Callable[..., FileServer], model: Path) -> None:
    server = serve(model)
    ndcache.fetch(server.url, names=["w00", "w20"])
    stats = check(ndcache.load(server.url, names=["w20", "w30"]), "w20", "w30")
    assert (stats.network_bytes, stats.resumed_bytes) == (SIZE, SIZE)
    directory = ndcache.fetch(server.url, names="w00")
    partials = [path for path in (directory / ".ndcache" / "parts").iterdir() if path.suffix != ".json"]
    assert len(partials) == 1  # which has all three
    assert ndcache.fetch(server.url) == directory
    assert list(asked(server.requests)) == [(0, len(DATA))]
    assert (directory / PATH[1:]).read_bytes() == DATA
    assert not list((directory / ".ndcache" / "parts").iterdir())
    assert ndcache.verify(server.url).checked == {PATH[1:]: "md5"}
    assert check(ndcache.load(server.url, names="w20"), "w20").integrity == {"md5": 1}


def test_a_file_with_holes_is_not_a_cached_shard(serve: Callable[..., FileServer], model: Path) -> None:
    server = serve(model)
    directory = ndcache.fetch(server.url, names="w03")
    assert not ndcache.is_cached(server.url)
    assert ndcache.verify(server.url).missing == (PATH[1:],)
    assert not (directory / PATH[1:]).exists()
    with pytest.raises(ndcache.OfflineError):
        ndcache.load(server.url, offline=True)
    assert ndcache.delete(server.url) < len(DATA)  # the bytes on disk, without the holes


@pytest.mark.parametrize("names", [lambda name: name < "w40", lambda name: name != "w40"])
def test_a_shard_of_which_much_is_wanted_is_fetched_whole(
    serve: Callable[..., FileServer], model: Path, names: Callable[[str], bool]
) -> None:
    server = serve(model)
    with ndcache.load(server.url, names=names) as weights:
        assert weights.stats.integrity == {"md5": 1}
    assert [request.headers.get("range") for request in server.shard_requests()] == [None]


def test_an_empty_tensor_costs_next_to_nothing(serve: Callable[..., FileServer], model: Path) -> None:
    server = serve(model)
    with ndcache.load(server.url, names="empty") as weights:
        assert weights["empty"].shape == (0,)
        assert weights.stats.network_bytes == 1


@pytest.mark.parametrize("pinned", ["tensor-cache.json", PATH[1:]])
def test_a_shard_with_a_required_digest_is_fetched_whole(
    serve: Callable[..., FileServer], model: Path, pinned: str
) -> None:
    server = serve(model)
    digest = hashlib.sha256((model / pinned).read_bytes()).digest()
    integrity = {pinned: f"sha256-{base64.b64encode(digest).decode()}"}
    ndcache.fetch(server.url, names="w03")  # which does not do then
    with ndcache.load(server.url, names="w03", integrity=integrity) as weights:
        assert "size" not in weights.stats.integrity
        assert weights.stats.network_bytes + weights.stats.resumed_bytes == len(DATA)


def test_verify_always_fetches_whole_shards(serve: Callable[..., FileServer], model: Path) -> None:
    server = serve(model)
    assert check(ndcache.load(server.url, names="w03", verify="always"), "w03").integrity == {"md5": 1}


def test_a_mirror_must_send_a_whole_shard_that_can_be_checked(serve: Callable[..., FileServer], model: Path) -> None:
    source, mirror = serve(model), serve(model)
    source.status[PATH] = 404
    stats = check(ndcache.load(source.url, names="w03", mirrors=[mirror.url]), "w03")
    assert stats.integrity == {"md5": 1}
    assert list(asked(mirror.requests)) == [(0, len(DATA))]


def script(server: ScriptedServer, respond: Callable[[int, Request], bytes], digest: bool = True) -> None:
    numbers = iter(range(10_000))

    def step(connection: Connection, request: Request) -> None:
        connection.send(respond(next(numbers), request))

    server.script["/tensor-cache.json"] = [reply(200, manifest(digest))]
    server.script[PATH] = [step]


def part_of(data: bytes, etag: str, request: Request) -> bytes:
    start, end = (int(number) for number in request.headers["range"].removeprefix("bytes=").split("-"))
    headers = {"ETag": etag, "Content-Range": f"bytes {start}-{end}/{len(data)}"}
    return reply(206, data[start : end + 1], headers)


@pytest.mark.parametrize("headers", [{}, {"ETag": '"1"'}])
def test_a_server_without_ranges_sends_the_whole_file(scripted: ScriptedServer, headers: dict[str, str]) -> None:
    script(scripted, lambda number, request: reply(200, DATA, headers))
    assert check(ndcache.load(scripted.url, names="w03"), "w03").integrity == {"md5": 1}
    with ndcache.load(scripted.url, offline=True) as weights:
        assert bytes(weights["w63"]) == bytes_of("w63")


def test_a_shard_without_a_strong_etag_is_fetched_whole(scripted: ScriptedServer) -> None:
    def respond(number: int, request: Request) -> bytes:
        return part_of(DATA, 'W/"1"', request) if "range" in request.headers else reply(200, DATA, {"ETag": 'W/"1"'})

    script(scripted, respond)
    stats = check(ndcache.load(scripted.url, names="w03"), "w03")
    assert stats.integrity == {"md5": 1}
    assert stats.requests == 3


OTHER = os.urandom(len(DATA))


@pytest.mark.parametrize("as_whole", [False, True])
def test_a_file_that_changes_between_ranges_is_never_mixed(scripted: ScriptedServer, as_whole: bool) -> None:
    def respond(number: int, request: Request) -> bytes:
        if number == 0:
            return part_of(DATA, '"1"', request)
        if as_whole and "if-range" in request.headers:
            return reply(200, OTHER, {"ETag": '"2"'})
        return part_of(OTHER, '"2"', request)

    script(scripted, respond, digest=False)
    names = ["w03", "w20", "w40"]
    check(ndcache.load(scripted.url, names=names, max_workers=1), *names, data=OTHER)


def test_ranges_of_a_former_version_are_not_used(serve: Callable[..., FileServer], model: Path) -> None:
    server = serve(model)
    ndcache.fetch(server.url, names="w03")
    (model / PATH[1:]).write_bytes(OTHER)
    changed = manifest().replace(MD5.encode(), hashlib.md5(OTHER).hexdigest().encode())
    (model / "tensor-cache.json").write_bytes(changed)
    stats = check(ndcache.load(server.url, names=["w03", "w30"]), "w03", "w30", data=OTHER)
    assert stats.resumed_bytes == 0


def test_wrong_bytes_in_cached_ranges_are_fetched_again(serve: Callable[..., FileServer], model: Path) -> None:
    server = serve(model)
    directory = ndcache.fetch(server.url, names="w03")
    (partial,) = (path for path in (directory / ".ndcache" / "parts").iterdir() if path.suffix != ".json")
    with open(partial, "r+b") as file:
        file.seek(3 * SIZE)
        file.write(b"bad")
    with ndcache.load(server.url) as weights:
        assert bytes(weights["w03"]) == bytes_of("w03")
        assert weights.stats.network_bytes == 2 * len(DATA) - SIZE
        assert weights.stats.retries == 0


def test_ranges_that_vanish_are_fetched_again(
    serve: Callable[..., FileServer], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(model)
    directory = ndcache.fetch(server.url, names="w03")
    find, left = PartialFiles.find, ModelDirectory(directory).partials.find(PATH[1:])

    def vanish(self: PartialFiles, name: str) -> list[str]:
        found = find(self, name)
        for file_name in left:
            self.remove(file_name)
        return found

    monkeypatch.setattr(PartialFiles, "find", vanish)
    assert check(ndcache.load(server.url, names="w03"), "w03").network_bytes == SIZE


def test_cached_ranges_are_held_from_the_start_of_a_load(serve: Callable[..., FileServer], model: Path) -> None:
    server = serve(model)
    directory = ndcache.fetch(server.url, names="w03")
    arriving = ndcache.stream(server.url, names="w03", offline=True, progress=lambda report: remove(directory))
    assert {name: bytes(tensor) for name, tensor in arriving} == {"w03": bytes_of("w03")}


def remove(directory: Path) -> None:
    for path in (directory / ".ndcache" / "parts").iterdir():
        path.unlink()


def test_progress_counts_the_wanted_bytes(serve: Callable[..., FileServer], model: Path) -> None:
    server = serve(model)
    reports: list[ndcache.ProgressReport] = []
    ndcache.load(server.url, names=["w03", "w20"], progress=reports.append).close()
    assert reports[-1].bytes_done == reports[-1].bytes_total == 2 * SIZE


def test_cached_ranges_survive_a_reboot(
    serve: Callable[..., FileServer], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(model)
    ndcache.fetch(server.url, names="w03")
    monkeypatch.setattr("ndcache.store.partials.note.boot_id", lambda: "another")
    assert check(ndcache.load(server.url, names="w03", offline=True), "w03").cache_bytes == SIZE


def test_ranges_that_were_not_synced_need_a_digest_after_a_reboot(
    serve: Callable[..., FileServer], model: Path
) -> None:
    server = serve(model)
    directory = ndcache.fetch(server.url, names="w03")
    (note,) = (directory / ".ndcache" / "parts").glob("*.json")
    note.write_text(json.dumps({**json.loads(note.read_text()), "boot": "of long ago"}))
    assert check(ndcache.load(server.url, names="w03"), "w03").network_bytes == SIZE
