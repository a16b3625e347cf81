"""Loads from servers that limit requests or connections, over sockets; row 49 of docs/faults.rst."""

from __future__ import annotations

import email.utils
import itertools
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import ndcache
from ndcache.http.retry import RetryPolicy
from ndcache.loader import Loader

from ..helpers.models import assert_same, simple_model
from ..helpers.nginx import nginx, statuses
from ..helpers.servers import Connection, ConnectionLimit, FileServer, RateLimit, Request, ScriptedServer, reply

pytestmark = pytest.mark.once
Serve = Callable[..., FileServer]
PATH = "/params_shard_0.bin"
QUICK = RetryPolicy(retries=2, backoff=0.001)


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Give a function that returns the warnings so far."""
    caplog.set_level(logging.DEBUG, "ndcache")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_row_49_a_server_that_limits_connections_slows_the_load_down(
    tmp_path: Path, serve: Serve, log: Callable[[], list[str]], most: int, status: int
) -> None:
    arrays = simple_model(tmp_path / "model", shards=20, shard_bytes=20_000)
    limit = ConnectionLimit(most, status=status)
    server = serve(tmp_path / "model", rate=100_000, limit=limit)
    with ndcache.load(server.url, retries=RetryPolicy(retries=2)) as weights:
        assert_same(weights, arrays)
        assert weights.stats.retries == limit.refused
        assert weights.stats.seconds["rate_limit"] > 0
    assert limit.peak == most
    assert limit.refused <= 7 + len(arrays)  # 7 of the first 8, and trials now and then
    (message,) = log()
    assert re.search(rf"^{server.url[:-1]} limits requests \(status {status}\)", message)


@pytest.mark.parametrize("status", [429, 503])
def test_row_49_a_server_that_refuses_all_shards_is_given_up(
    tmp_path: Path, scripted: ScriptedServer, status: int
) -> None:
    """The shards do not use up their tries one after the other, at the low rate that follows the refusals."""
    simple_model(tmp_path / "model", shards=40)
    for path in (tmp_path / "model").iterdir():
        is_given = path.name.endswith(("json", "_0.bin", "_1.bin"))
        scripted.script[f"/{path.name}"] = [reply(200, path.read_bytes()) if is_given else reply(status, b"<html>")]
    policy = RetryPolicy(retries=9, backoff=0.01, max_backoff=0.1)
    with pytest.raises((ndcache.ServerError, ndcache.RateLimitedError)) as caught:
        ndcache.load(scripted.url, retries=policy)
    assert caught.value.status == status
    assert len(scripted.requests) < 40  # 8 shards, each 10 times at a distance of up to 2.5 s, would be 80


def test_typical_patience() -> None:
    assert RetryPolicy().typical_patience == pytest.approx(15.75)
    assert RetryPolicy(retries=0).typical_patience == 0
    assert RetryPolicy(retries=10**9, budget=20).typical_patience == 20


@pytest.mark.parametrize("burst", [0, 5])
def test_row_49_a_server_that_limits_requests_per_second_slows_the_load_down(
    tmp_path: Path, serve: Serve, log: Callable[[], list[str]], burst: int
) -> None:
    arrays = simple_model(tmp_path / "model", shards=60, shard_bytes=1000)
    limit = RateLimit(20, burst)
    server = serve(tmp_path / "model", limit=limit)
    assert_same(ndcache.load(server.url, retries=RetryPolicy(retries=2)), arrays)
    assert limit.refused <= 7 + len(arrays)
    assert len(log()) == 1


def test_row_49_byte_ranges_of_a_large_shard_respect_a_limit_of_connections(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, log: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr("ndcache.sources.downloads.download.RANGE_THRESHOLD", 1 << 16)
    monkeypatch.setattr("ndcache.sources.downloads.download.RANGE_BYTES", (1 << 15, 1 << 16))
    arrays = simple_model(tmp_path / "model", shards=2, shard_bytes=1 << 20)
    limit = ConnectionLimit(2)
    server = serve(tmp_path / "model", rate=1 << 19, limit=limit)
    assert_same(ndcache.load(server.url, retries=RetryPolicy(retries=2)), arrays)
    assert limit.peak == 2
    assert len(log()) == 1


def test_row_49_a_shard_that_is_refused_until_all_others_came(
    tmp_path: Path, scripted: ScriptedServer, cache_dir: Path
) -> None:
    """It is refused once for each of the other shards, and so more often than `retries` allows."""
    arrays = simple_model(tmp_path / "model", shards=5)
    others = [f"/params_shard_{number}.bin" for number in range(1, 5)]
    refusals = itertools.count()

    def cached() -> int:
        return len([path for path in cache_dir.rglob("params_shard_*.bin") if ".ndcache" not in path.parts])

    def refuse(connection: Connection, request: Request) -> None:
        number = next(refusals)
        wait_until(lambda: all(map(scripted.requests_for, others)))  # the first refusal would hold back the rest
        wait_until(lambda: cached() >= number)
        connection.send(reply(429))

    def later(number: int, body: bytes) -> Callable[[Connection, Request], None]:
        def step(connection: Connection, request: Request) -> None:
            answer = reply(200, body)
            connection.send(answer[:-1])
            wait_until(lambda: len(scripted.requests_for(PATH)) >= number + 1)
            connection.send(answer[-1:])

        return step

    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    scripted.script = {f"/{name}": [reply(200, data)] for name, data in files.items()}
    for number, path in enumerate(others, 1):
        scripted.script[path] = [later(number, files[path[1:]])]
    scripted.script[PATH][:0] = [refuse] * 5
    assert_same(ndcache.load(scripted.url, retries=RetryPolicy(retries=1, backoff=0.01)), arrays)
    assert len(scripted.requests_for(PATH)) == 6


@pytest.mark.parametrize("status", [429, 503])
def test_row_49_a_shard_that_is_refused_for_ever(
    tmp_path: Path, scripted: ScriptedServer, cache_dir: Path, status: int
) -> None:
    simple_model(tmp_path / "model", shards=8)
    for path in (tmp_path / "model").iterdir():
        scripted.script[f"/{path.name}"] = [reply(200, path.read_bytes())]
    scripted.script[PATH] = [reply(status)]
    error = ndcache.RateLimitedError if status == 429 else ndcache.ServerError
    with pytest.raises(error, match=r"params_shard_0.bin.*max_workers") as caught:
        ndcache.load(scripted.url, retries=QUICK)
    assert caught.value.attempts == len(scripted.requests_for(PATH)) >= 3
    others = [request for request in scripted.requests if request.path not in (PATH, "/tensor-cache.json")]
    assert len(others) == 7  # each once


@pytest.mark.parametrize("value", ["0", "Thu, 01 Jan 1970 00:00:00 GMT", "a minute ago"])
@pytest.mark.parametrize("status", [429, 503])
def test_row_49_retry_after_that_is_over_is_no_reason_to_hurry(
    tmp_path: Path, scripted: ScriptedServer, status: int, value: str
) -> None:
    """The server recovers after a second, which seven tries at once would not notice."""
    if value == "a minute ago":
        value = email.utils.formatdate(time.time() - 60, usegmt=True)
    arrays = simple_model(tmp_path / "model", shards=1)
    good = reply(200, (tmp_path / "model" / PATH[1:]).read_bytes())
    begun: list[float] = []

    def step(connection: Connection, request: Request) -> None:
        begun.append(time.monotonic())
        connection.send(reply(status, headers={"Retry-After": value}) if begun[-1] < begun[0] + 1 else good)

    scripted.script["/tensor-cache.json"] = [reply(200, (tmp_path / "model" / "tensor-cache.json").read_bytes())]
    scripted.script[PATH] = [step]
    assert_same(ndcache.load(scripted.url), arrays)


def test_row_49_one_retry_after_delays_all_requests(tmp_path: Path, scripted: ScriptedServer) -> None:
    simple_model(tmp_path / "model", shards=12)
    told: list[float] = []
    came: list[float] = []

    def step(connection: Connection, request: Request, body: bytes) -> None:
        came.append(time.monotonic())
        if len(came) == 3:
            told.append(time.monotonic())
            connection.send(reply(429, headers={"Retry-After": "2"}))
        else:
            connection.send(reply(200, body))

    for path in (tmp_path / "model").iterdir():
        body = path.read_bytes()
        scripted.script[f"/{path.name}"] = [
            reply(200, body)
            if path.suffix == ".json"
            else lambda connection, request, body=body: step(connection, request, body)  # type: ignore[misc]
        ]
    ndcache.load(scripted.url, max_workers=2)
    assert len(came) == 13
    early = [moment for moment in came if told[0] < moment < told[0] + 1.9]
    assert len(early) <= 4  # of 10: some may have been on their way, as those that sync a file let others begin


def test_row_49_only_the_server_that_is_redirected_to_is_limited(
    tmp_path: Path, serve: Serve, scripted: ScriptedServer, log: Callable[[], list[str]]
) -> None:
    """Hugging Face's storage limits requests, while its hub does not."""
    arrays = simple_model(tmp_path / "model", shards=12, shard_bytes=20_000)
    limit = ConnectionLimit(2)
    storage = serve(tmp_path / "model", rate=200_000, limit=limit)
    for path in (tmp_path / "model").iterdir():
        scripted.script[f"/{path.name}"] = [reply(302, headers={"Location": f"{storage.url}{path.name}"})]
    with Loader(retries=RetryPolicy(retries=2)) as loader:
        assert_same(loader.load(scripted.url), arrays)
        limits = loader._resources.limits
        assert limits.of(storage.url).state.is_limited
        assert not limits.of(scripted.url).state.is_limited
    assert limit.peak == 2
    assert [storage.url[:-1] in message for message in log()] == [True]


def test_row_49_a_mirror_does_not_wait_for_the_source(tmp_path: Path, serve: Serve, scripted: ScriptedServer) -> None:
    arrays = simple_model(tmp_path / "model", shards=6)
    mirror = serve(tmp_path / "model")
    manifest = (tmp_path / "model" / "tensor-cache.json").read_bytes()
    scripted.script["/tensor-cache.json"] = [reply(200, manifest)]
    for path in (tmp_path / "model").glob("*.bin"):
        scripted.script[f"/{path.name}"] = [reply(429, headers={"Retry-After": "4000"})]
    assert_same(ndcache.load(scripted.url, mirrors=[mirror.url]), arrays)
    assert len(mirror.shard_requests()) == 6


def test_row_49_a_manifest_that_is_refused_is_asked_for_again(tmp_path: Path, scripted: ScriptedServer) -> None:
    arrays = simple_model(tmp_path / "model", shards=1)
    for path in (tmp_path / "model").iterdir():
        scripted.script[f"/{path.name}"] = [reply(200, path.read_bytes())]
    scripted.script["/tensor-cache.json"][:0] = [reply(429), reply(503), reply(429, headers={"Retry-After": "0"})]
    with ndcache.load(scripted.url) as weights:
        assert_same(weights, arrays)
        assert weights.stats.retries == 3


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"RateLimit": '"resolvers";r=0;t=30'}, 30, 30),
        ({"RateLimit": "limit=100, remaining=0, reset=30", "RateLimit-Reset": "20"}, 20, 20),
        ({"X-RateLimit-Reset": "20"}, 20, 20),
        ({"X-RateLimit-Reset": "{now}"}, 40, 60),
        ({"RateLimit": '"api";r=0;t=30', "Retry-After": "5"}, 5, 5),
        ({"RateLimit": '"api";r=0;t=4000'}, None, None),
        ({"RateLimit": "t" * 70_000}, None, None),
        ({"X-RateLimit-Reset": "1"}, 1, 1),
        ({"X-RateLimit-Reset": "1000000000"}, None, None),
        ({"X-RateLimit-Reset": "-1"}, None, None),
        ({"X-RateLimit-Reset": "soon"}, None, None),
    ],
)
def test_when_the_count_begins_anew(headers: dict[str, str], low: float | None, high: float | None) -> None:
    import requests

    from ndcache.http.translate import raise_for_status

    fields = {name: value.format(now=int(time.time()) + 60) for name, value in headers.items()}
    with pytest.raises(ndcache.RateLimitedError) as caught:
        raise_for_status(429, requests.structures.CaseInsensitiveDict(fields), "http://host/")
    seconds = caught.value.retry_after
    assert seconds is None if low is None or high is None else seconds is not None and low <= seconds <= high


# --- nginx --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "shards", "shard_bytes", "needed"),
    [
        ("limit_conn connections 1; limit_rate 100k;", 10, 102_400, 10.0),
        ("limit_conn connections 2; limit_rate 100k;", 24, 102_400, 12.0),
        ("limit_conn connections 5; limit_rate 100k;", 60, 102_400, 12.0),
        ("limit_req zone=requests;", 60, 1000, 12.0),
        ("limit_req zone=requests burst=5;", 60, 1000, 12.0),
        ("limit_req zone=requests burst=5 nodelay;", 60, 1000, 11.0),
        ("limit_req zone=requests; limit_conn connections 4; limit_rate 100k;", 48, 51_200, 12.0),
    ],
)
def test_row_49_the_limits_of_nginx_slow_the_load_down(
    tmp_path: Path, limit: str, shards: int, shard_bytes: int, needed: float
) -> None:
    arrays = simple_model(tmp_path / "model", shards, shard_bytes)
    with nginx(tmp_path / "nginx", tmp_path / "model", limit) as url:
        assert_same(ndcache.load(url), arrays)
        answers = statuses(tmp_path / "nginx")
    times = [moment for moment, _ in answers]
    assert max(times) - min(times) <= 1.5 * needed
    assert [status for _, status in answers].count(503) <= 7 + shards
