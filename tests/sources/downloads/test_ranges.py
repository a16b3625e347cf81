"""Large shards are received in several ranges at once: who requests which, and which responses are used."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

import ndcache
from ndcache.files.folder import Folder
from ndcache.loader import Loader
from ndcache.sources.downloads.range_queue import RangeQueue
from ndcache.store.layout import Layout
from ndcache.store.partials.file import PartialFile
from ndcache.store.partials.folder import PartialFiles
from ndcache.store.partials.ranges import ByteRanges
from ndcache.workers.cancellation import Cancellation

from ...helpers.servers import Connection, FileServer, Request, ScriptedServer, reply

DATA = os.urandom(1 << 20)
OTHER = os.urandom(1 << 20)
RANGE = 1 << 16
PATH = "/params_shard_0.bin"
WORKERS = 4


@pytest.fixture(autouse=True)
def _small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ndcache.sources.downloads.download.RANGE_THRESHOLD", RANGE)
    monkeypatch.setattr("ndcache.sources.downloads.download.RANGE_BYTES", (RANGE, 2 * RANGE))


def manifest(digest: bool = True) -> bytes:
    record = {"name": "w", "shape": [len(DATA)], "dtype": "uint8", "format": "raw", "nbytes": len(DATA)}
    shard: dict[str, Any] = {
        "dataPath": PATH[1:],
        "format": "raw-shard",
        "nbytes": len(DATA),
        "records": [{**record, "byteOffset": 0}],
    }
    if digest:
        shard["md5sum"] = hashlib.md5(DATA).hexdigest()
    return json.dumps({"metadata": {}, "records": [shard]}).encode()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tensor-cache.json").write_bytes(manifest())
    (folder / PATH[1:]).write_bytes(DATA)
    return folder


def asked(requests: list[Request]) -> list[str | None]:
    return [request.headers.get("range") for request in requests if request.path == PATH]


def loaded(url: str, **options: Any) -> tuple[bytes, ndcache.LoadStats]:
    with ndcache.load(url, max_workers=WORKERS, **options) as weights:
        return bytes(weights["w"]), weights.stats


def answer(data: bytes, etag: str | None, request: Request) -> bytes:
    """Return the response of a server that follows the rules."""
    headers = {} if etag is None else {"ETag": etag}
    asked = request.headers.get("range")
    if asked is None or request.headers.get("if-range", etag) != etag:
        return reply(200, data, headers)
    start, end = (int(number) for number in asked.removeprefix("bytes=").split("-"))
    return reply(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})


def script(server: ScriptedServer, respond: Callable[[int, Request], bytes], digest: bool = True) -> None:
    """Answer each request for the shard with `respond`, which gets its number, from 0."""
    numbers, lock = iter(range(10_000)), threading.Lock()

    def step(connection: Connection, request: Request) -> None:
        with lock:
            number = next(numbers)
        connection.send(respond(number, request))

    server.script["/tensor-cache.json"] = [reply(200, manifest(digest))]
    server.script[PATH] = [step]


def test_all_workers_receive_ranges_of_one_shard(serve: Callable[..., FileServer], model: Path) -> None:
    server = serve(model)
    data, stats = loaded(server.url)
    assert data == DATA
    first, *rest = server.shard_requests()
    assert first.headers["range"] == f"bytes=0-{2 * RANGE - 1}"
    assert "if-range" not in first.headers
    assert rest
    assert all("range" in request.headers and "if-range" in request.headers for request in rest)
    assert stats.network_bytes == len(DATA)
    assert stats.retries == 0
    assert stats.integrity == {"md5": 1}
    assert len({request.headers["x-test-peer"] for request in server.shard_requests()}) > 1


def test_helpers_work_while_the_owner_receives(scripted: ScriptedServer) -> None:
    """The first body does not end before another worker has requested another range."""
    others = threading.Event()

    def step(connection: Connection, request: Request) -> None:
        whole = answer(DATA, '"1"', request)
        if request.headers["range"].startswith("bytes=0-"):
            connection.send(whole[:1000])
            assert others.wait(60)
            connection.send(whole[1000:])
        else:
            others.set()
            connection.send(whole)

    scripted.script["/tensor-cache.json"] = [reply(200, manifest())]
    scripted.script[PATH] = [step]
    assert loaded(scripted.url)[0] == DATA
    assert others.is_set()


def test_helpers_write_back_what_was_received(
    model: Path, serve: Callable[..., FileServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    written_back: list[str] = []
    monkeypatch.setattr(PartialFile, "write_back", lambda partial: written_back.append(partial.name))
    assert loaded(serve(model, rate=4 << 20).url)[0] == DATA
    assert set(written_back) == {PATH[1:]}


def test_an_owner_that_requests_again_keeps_its_helpers(scripted: ScriptedServer) -> None:
    """Its first range breaks off before a byte has arrived, while helpers wait for theirs."""
    helper_asks, owner_asks_again = threading.Event(), threading.Event()

    def step(connection: Connection, request: Request) -> None:
        whole = answer(DATA, '"1"', request)
        if not request.headers["range"].startswith("bytes=0-"):
            helper_asks.set()
            assert owner_asks_again.wait(60)
        elif not helper_asks.is_set():
            connection.send(whole[: whole.index(b"\r\n\r\n") + 4])
            assert helper_asks.wait(60)
            return
        else:
            owner_asks_again.set()
        connection.send(whole)

    scripted.script["/tensor-cache.json"] = [reply(200, manifest())]
    scripted.script[PATH] = [step]
    data, stats = loaded(scripted.url, retries=ndcache.RetryPolicy(backoff=0.001))
    assert data == DATA
    assert (stats.retries, stats.network_bytes) == (1, len(DATA))


def test_a_single_worker_requests_the_whole_file(serve: Callable[..., FileServer], model: Path) -> None:
    server = serve(model)
    with ndcache.load(server.url, max_workers=1) as weights:
        assert bytes(weights["w"]) == DATA
    assert asked(server.requests) == [None]


def test_a_server_without_ranges_sends_the_whole_file(scripted: ScriptedServer) -> None:
    script(scripted, lambda number, request: reply(200, DATA, {"ETag": '"1"'}))
    assert loaded(scripted.url)[0] == DATA
    assert len(asked(scripted.requests)) == 1


@pytest.mark.parametrize("etag", [None, 'W/"1"'])
def test_without_a_strong_etag_the_file_comes_as_one_stream(scripted: ScriptedServer, etag: str | None) -> None:
    script(scripted, lambda number, request: answer(DATA, etag, request))
    assert loaded(scripted.url)[0] == DATA
    assert asked(scripted.requests)[1:] == [None]


@pytest.mark.parametrize("status", [403, 416, 429, 500, 503])
def test_the_owner_receives_ranges_that_helpers_are_refused(scripted: ScriptedServer, status: int) -> None:
    """The server allows one connection at a time."""
    busy = threading.Lock()

    def step(connection: Connection, request: Request) -> None:
        if not busy.acquire(blocking=False):
            connection.send(reply(status))
            return
        try:
            connection.send(answer(DATA, '"1"', request))
        finally:
            busy.release()

    scripted.script["/tensor-cache.json"] = [reply(200, manifest())]
    scripted.script[PATH] = [step]
    retries = ndcache.RetryPolicy(retries=1000, backoff=0.001)
    try:
        assert loaded(scripted.url, retries=retries)[0] == DATA
    except ndcache.AuthError:
        assert status == 403  # which no second try would mend, when the owner itself is met by it


@pytest.mark.parametrize("change_at", [1, 2, 5, 9])
def test_a_file_that_changes_between_ranges_is_never_mixed(scripted: ScriptedServer, change_at: int) -> None:
    def respond(number: int, request: Request) -> bytes:
        return answer(*((OTHER, '"1"') if number < change_at else (DATA, '"2"')), request)

    script(scripted, respond, digest=False)  # nothing but the rules would notice
    assert loaded(scripted.url, retries=ndcache.RetryPolicy(backoff=0.001))[0] == DATA


def test_a_range_under_another_etag_is_not_used(scripted: ScriptedServer) -> None:
    """The server ignores If-Range."""

    def respond(number: int, request: Request) -> bytes:
        data, etag = (OTHER, '"1"') if number == 0 else (DATA, '"2"')
        request.headers.pop("if-range", None)  # type: ignore[attr-defined]
        return answer(data, etag, request)

    script(scripted, respond, digest=False)
    assert loaded(scripted.url, retries=ndcache.RetryPolicy(backoff=0.001))[0] == DATA


def test_broken_connections_cost_only_the_lost_bytes(scripted: ScriptedServer) -> None:
    def respond(number: int, request: Request) -> bytes:
        whole = answer(DATA, '"1"', request)
        return whole[: len(whole) - 30_000] if number % 3 == 1 else whole

    script(scripted, respond)
    data, stats = loaded(scripted.url, retries=ndcache.RetryPolicy(backoff=0.001))
    assert data == DATA
    assert stats.network_bytes == len(DATA)


def test_an_interrupted_load_resumes_with_all_its_ranges(
    serve: Callable[..., FileServer], scripted: ScriptedServer, cache_dir: Path
) -> None:
    """The owner's range never arrives; the next load uses those of the helpers."""
    begun, enough = threading.Event(), threading.Event()

    def step(connection: Connection, request: Request) -> None:
        if request.headers.get("range", "").startswith("bytes=0-") and not enough.is_set():
            connection.send(answer(DATA, '"1"', request)[:50_000])
            begun.set()
            connection.stall()
        else:
            connection.send(answer(DATA, '"1"', request))

    scripted.script["/tensor-cache.json"] = [reply(200, manifest())]
    scripted.script[PATH] = [step]
    cancel, failed = threading.Event(), []

    def load() -> None:
        try:
            loaded(scripted.url, cancel=cancel, cache_dir=cache_dir)
        except ndcache.CancelledError as error:
            failed.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    assert begun.wait(60)
    while len(asked(scripted.requests)) < 2 + (len(DATA) - 2 * RANGE) // (2 * RANGE):
        threading.Event().wait(0.005)
    cancel.set()
    thread.join()
    assert failed
    enough.set()
    before = len(scripted.requests)
    data, stats = loaded(scripted.url, cache_dir=cache_dir)
    assert data == DATA
    assert stats.resumed_bytes + stats.network_bytes == len(DATA)
    assert stats.resumed_bytes > 2 * RANGE  # more than the first range ever was
    later = [request for request in scripted.requests[before:] if request.path == PATH]
    assert all(request.headers["if-range"] == '"1"' for request in later)


def redirect(target: str) -> bytes:
    return reply(302, b"", {"Location": target})


@pytest.mark.parametrize("workers", [1, WORKERS])
def test_a_redirect_of_a_shard_is_followed_once(
    scripted: ScriptedServer, serve: Callable[..., FileServer], model: Path, workers: int
) -> None:
    """All ranges are then requested from its target, without credentials."""
    storage = serve(model)
    script(scripted, lambda number, request: redirect(f"{storage.url}{PATH[1:]}"))
    session = requests.Session()
    session.headers["X-Secret"] = "mine"
    with ndcache.load(scripted.url, max_workers=workers, session=session) as weights:
        assert bytes(weights["w"]) == DATA
    assert len(storage.shard_requests()) >= workers
    assert len(scripted.requests_for(PATH)) == 1
    assert scripted.requests_for(PATH)[0].headers["x-secret"] == "mine"
    assert not any("x-secret" in request.headers for request in storage.requests)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_redirect_target_that_expires_is_requested_again(scripted: ScriptedServer, status: int) -> None:
    """Each target serves two requests, and the server redirects to a new one each time."""
    asked: Counter[str] = Counter()
    lock = threading.Lock()

    def step(connection: Connection, request: Request) -> None:
        with lock:
            asked[request.path] += 1
            is_good = asked[request.path] <= 2
        connection.send(answer(DATA, '"1"', request) if is_good else reply(status))

    script(scripted, lambda number, request: redirect(f"/signed/{number}"))
    scripted.script |= {f"/signed/{number}": [step] for number in range(50)}
    data, stats = loaded(scripted.url)
    assert data == DATA
    assert stats.retries == 0
    assert stats.network_bytes == len(DATA)
    assert 1 < len(scripted.requests_for(PATH)) < asked.total()


def test_a_redirect_target_is_forgotten_after_a_failure(scripted: ScriptedServer) -> None:
    """A target that breaks off is not asked again, as the server may know a better one."""

    def broken(connection: Connection, request: Request) -> None:
        connection.send(answer(DATA, '"1"', request)[:-100])
        connection.close()

    script(scripted, lambda number, request: redirect("/good" if number else "/bad"))
    scripted.script |= {
        "/bad": [broken],
        "/good": [lambda connection, request: connection.send(answer(DATA, '"1"', request))],
    }
    with ndcache.load(scripted.url, max_workers=1) as weights:
        assert bytes(weights["w"]) == DATA
        assert weights.stats.retries == 1
    assert len(scripted.requests_for("/bad")) == 1


def left_with_holes(loader: Loader, url: str, ranges: list[tuple[int, int]]) -> Path:
    """Leave a partial file with holes behind, as a killed process does; return its path."""
    from ndcache.location import locate

    cache = loader._resources.cache.open(locate(url))
    with cache.partials.create(PATH[1:]) as partial:
        partial.set_source(
            f"{url}{PATH[1:]}", f'"{hashlib.md5(DATA).hexdigest()}"', hashlib.md5(DATA).hexdigest(), None
        )
        for start, end in ranges:
            partial.write_at(DATA[start:end], start)
    return partial.path


def test_only_the_holes_of_a_partial_file_are_requested(serve: Callable[..., FileServer], model: Path) -> None:
    server = serve(model)
    with Loader(max_workers=WORKERS) as loader:
        left_with_holes(loader, server.url, [(300_000, 400_000), (100_000, 200_000), (900_000, 1_000_000)])
        with loader.load(server.url) as weights:
            assert bytes(weights["w"]) == DATA
            assert weights.stats.resumed_bytes == 300_000
    wanted = [[int(n) for n in (text or "").removeprefix("bytes=").split("-")] for text in asked(server.requests)]
    holes = ByteRanges((start, end + 1) for start, end in wanted)
    assert list(holes) == [(0, 100_000), (200_000, 300_000), (400_000, 900_000), (1_000_000, len(DATA))]


@pytest.mark.parametrize(
    "ranges", [[[0, 2_000_000]], [[-5, 10]], [[5, 1]], [["0", "9"]], [[0, 1, 2]], "x", 7, [[0.0, 9.0]], [[0, 1 << 70]]]
)
def test_an_impossible_note_is_ignored(serve: Callable[..., FileServer], model: Path, ranges: object) -> None:
    server = serve(model)
    with Loader(max_workers=WORKERS) as loader:
        path = left_with_holes(loader, server.url, [(300_000, 400_000)])
        note = path.with_name(f"{path.name}.json")
        note.write_text(json.dumps({**json.loads(note.read_text()), "spans": ranges}))
        with loader.load(server.url) as weights:
            assert bytes(weights["w"]) == DATA
            assert weights.stats.resumed_bytes == 0


def test_a_note_never_claims_bytes_that_are_not_there(tmp_path: Path) -> None:
    """Another load may read the note at any moment."""
    partials, shard = PartialFiles(Layout(Folder(tmp_path))), ndcache.Shard("x", 100, None, None, "raw-shard", ())

    def copy_to(partial: PartialFile) -> None:
        partials.copy_longest(partial, shard, "c", lambda: None, is_checked=True, is_exclusive=False)

    with partials.create("x") as partial:
        partial.set_source("u", '"1"', "c", None)
        partial.write_at(b"b" * 10, 90)
        with partials.create("x") as other:
            copy_to(other)
            assert other.nbytes == 0
            assert not other.ranges
        partial.write_at(b"a" * 10, 0)
    with partials.create("x") as other:
        copy_to(other)
        assert list(other.ranges) == [(0, 10), (90, 100)]


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: (min(pair), max(pair))))


@given(RANGES, RANGES)
def test_byte_ranges_are_sets_of_bytes(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    def numbers(ranges: Any) -> set[int]:
        return {number for start, end in ranges for number in range(start, end)}

    ranges, added = ByteRanges(some), ByteRanges()
    functools.reduce(lambda _, added_range: added.add(*added_range), some, None)
    assert numbers(ranges) == numbers(some)
    assert list(added) == list(ranges)
    assert all(end < start for (_, end), (start, _) in zip(list(ranges), list(ranges)[1:], strict=False))
    assert ranges.nbytes == len(numbers(some))
    assert ranges.end == max(numbers(some), default=-1) + 1
    assert ranges.prefix == next(number for number in range(99) if number not in numbers(some))
    assert numbers(ranges.without(ByteRanges(others))) == numbers(some) - numbers(others)


@given(st.integers(1, 5000), st.integers(0, 9), st.booleans())
def test_tasks_cover_everything_once(nbytes: int, helpers: int, is_streamed: bool) -> None:
    ranges, seen = ByteRanges([(0, nbytes)]), []
    queue = RangeQueue(ranges, Cancellation(), (10, 200), helpers, is_streamed=is_streamed)
    while (task := queue.next()) is not None:
        assert task.end - task.start <= 200
        assert not is_streamed or task.end - task.start <= max(10, task.start // (helpers + 1))
        seen.append(task.missing)
    assert list(ByteRanges(seen)) == [(0, nbytes)]
    assert sum(end - start for start, end in seen) == nbytes


def test_the_owner_raises_a_helpers_unexpected_error() -> None:
    queue = RangeQueue(ByteRanges([(0, 100)]), Cancellation(), (10, 10), 3)
    queue.helper_done(ZeroDivisionError("in a helper"))
    with pytest.raises(ZeroDivisionError, match="in a helper"):
        queue.next()
