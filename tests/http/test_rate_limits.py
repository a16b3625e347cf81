"""Servers that limit requests or connections, and answer 429 or 503 beyond that."""

from __future__ import annotations

import contextlib
import email.utils
import heapq
import itertools
import logging
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

import ndcache
from ndcache.http.rate_limits import OriginActivity, OriginLimit, Permit, origin_of
from ndcache.http.retry import RetryPolicy, attempts
from ndcache.loader import Loader
from ndcache.stats import LoadStats
from ndcache.workers.cancellation import Cancellation

from ..helpers.models import assert_same, simple_model
from ..helpers.requirements import need_program
from ..helpers.servers import Connection, ConnectionLimit, FileServer, RateLimit, Request, ScriptedServer, reply

T = TypeVar("T")
Serve = Callable[..., FileServer]
PATH = "/params_shard_0.bin"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Give a function that returns the warnings so far."""
    caplog.set_level(logging.DEBUG, "ndcache")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


# --- in simulated time: an origin's limit against simulated servers --------------------------------------


class Connections:
    """A server that limits the requests at once."""

    def __init__(self, most: int) -> None:
        self.most = most

    def accepts(self, now: float, in_flight: int) -> bool:
        return in_flight < self.most


class Rate:
    """A server that limits the requests per second, after a burst."""

    def __init__(self, rate: float, burst: int = 0) -> None:
        self.rate, self.burst, self.excess, self.last = rate, burst, 0.0, -1e9

    def accepts(self, now: float, in_flight: int) -> bool:
        excess = max(self.excess - self.rate * (now - self.last) + 1, 0.0)
        if excess > self.burst + 1e-9:
            return False
        self.excess, self.last = excess, now
        return True


class Window:
    """A server that limits the requests in any period of some seconds; if `counts_all`, refused ones count, too."""

    def __init__(self, most: int, seconds: float, *, counts_all: bool = False) -> None:
        self.most, self.seconds, self.counts_all, self.times = most, seconds, counts_all, list[float]()

    def accepts(self, now: float, in_flight: int) -> bool:
        self.times = [time for time in self.times if time > now - self.seconds]
        is_free = len(self.times) < self.most
        if is_free or self.counts_all:
            self.times.append(now)
        return is_free


class Hiccup:
    """A server that refuses the requests with certain numbers, for no reason."""

    def __init__(self, *numbers: int) -> None:
        self.numbers, self.count = numbers, 0

    def accepts(self, now: float, in_flight: int) -> bool:
        self.count += 1
        return self.count not in self.numbers


class Simulation:
    """A load of one model's shards by workers, in simulated time.

    Attributes
    ----------
    now : float
        Seconds that the load took.
    refused : int
        Refused requests.
    """

    def __init__(
        self, server: Any, shards: int, seconds: float, *, workers: int = 8, retry_after: float | None = None
    ) -> None:
        self.now, self.refused = 0.0, 0
        self._server, self._seconds, self._retry_after = server, seconds, retry_after
        self._limit = OriginLimit()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._left, self._bodies = shards, 0
        self._waiting = min(workers, shards)  # workers that have a shard and wait for their turn
        self._queue = shards - self._waiting
        while self._left:
            self._begin()
            self.now, _, event = heapq.heappop(self._events)
            event()
            assert self.now < 10_000

    def _after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), event))

    def _begin(self) -> None:
        while self._waiting:
            delay = self._limit.delay(self.now)
            if delay > 1e-9:
                if delay < 1e6:
                    self._after(delay, lambda: None)
                return
            self._waiting -= 1
            permit = self._limit.start(self.now)
            self._after(0.001, lambda permit=permit: self._ask(permit))  # type: ignore[misc]

    def _ask(self, permit: Permit) -> None:
        if not self._server.accepts(self.now, self._bodies):
            self._after(0.001, lambda: self._refuse(permit))
            return
        self._bodies += 1
        self._after(0.001, lambda: self._limit.accepted(permit, self.now))
        self._after(self._seconds, lambda: setattr(self, "_bodies", self._bodies - 1))
        self._after(0.001 + self._seconds, lambda: self._done(permit))

    def _refuse(self, permit: Permit) -> None:
        self.refused += 1
        self._limit.refused(permit, self.now, self._retry_after)
        self._limit.release(permit)
        self._after(self._retry_after or 0.25, lambda: setattr(self, "_waiting", self._waiting + 1))

    def _done(self, permit: Permit) -> None:
        self._limit.release(permit)
        self._left -= 1
        if self._queue:
            self._queue -= 1
            self._waiting += 1


@pytest.mark.parametrize("workers", [1, 2, 8, 16])
@pytest.mark.parametrize(
    ("server", "options", "shards", "seconds", "needed"),
    [
        (Connections, (1,), 20, 2.0, 40.0),
        (Connections, (2,), 12, 10.0, 60.0),
        (Connections, (2,), 100, 0.25, 12.5),
        (Connections, (5,), 60, 3.0, 36.0),
        (Rate, (1,), 30, 0.002, 30.0),
        (Rate, (3,), 60, 0.002, 20.0),
        (Rate, (3,), 60, 1.0, 20.0),
        (Rate, (3,), 60, 2.5, 22.5),
        (Rate, (3, 5), 60, 0.002, 18.0),
        (Rate, (3, 5), 60, 1.0, 19.0),
        (Rate, (50,), 400, 0.002, 8.0),
        (Window, (30, 10), 120, 0.002, 30.0),
    ],
)
def test_row_49_a_limit_is_met_closely(
    server: Any, options: tuple[float, ...], shards: int, seconds: float, needed: float, workers: int
) -> None:
    needed = max(needed, shards * (seconds + 0.002) / workers)
    simulation = Simulation(server(*options), shards, seconds, workers=workers)
    assert simulation.now <= 1.5 * needed
    assert simulation.refused <= workers + shards


@pytest.mark.parametrize("counts_all", [False, True])
def test_row_49_a_server_that_counts_all_requests_and_says_when(counts_all: bool) -> None:
    simulation = Simulation(Window(30, 10, counts_all=counts_all), 120, 0.002, retry_after=10)
    assert simulation.now <= 1.5 * 30
    assert simulation.refused <= 60


@pytest.mark.parametrize("seconds", [0.01, 0.5])
@pytest.mark.parametrize("at", [1, 20, 199])
def test_row_49_one_refusal_is_soon_forgotten(seconds: float, at: int) -> None:
    calm, disturbed = Simulation(Hiccup(), 200, seconds), Simulation(Hiccup(at), 200, seconds)
    assert disturbed.refused == 1
    assert disturbed.now - calm.now < 2


@pytest.mark.parametrize("retry_after", [None, 0.0])
def test_row_49_no_request_follows_a_refusal_at_once(retry_after: float | None) -> None:
    limit = OriginLimit()
    for _ in range(5):
        limit.refused(limit.start(100.0), 100.0, retry_after)
    assert limit.delay(100.0) > 0.1
    permit = limit.start(101.0)
    assert limit.delay(101.0) > 0.1  # nor two at the same time later
    limit.accepted(permit, 101.0)
    assert limit.delay(101.0) > 0.1


def test_row_49_all_wait_for_as_long_as_the_server_asks() -> None:
    limit = OriginLimit()
    limit.refused(limit.start(100.0), 100.0, 7.0)
    assert limit.delay(100.0) == 7.0
    limit.refused(limit.start(107.0), 107.0, 1e9)  # no request waits so long: the load ends
    assert limit.delay(107.0) < 1


def test_a_server_that_never_refuses_is_never_waited_for() -> None:
    limit = OriginLimit()
    for now in range(1000):
        assert limit.delay(now / 1000) <= 0
        permit = limit.start(now / 1000)
        limit.accepted(permit, now / 1000)
        if now % 2:
            limit.release(permit)
    assert limit.in_flight == 500


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://Host/a/b?c", "http://host"),
        ("HTTPS://user:pass@host:8443", "https://host:8443"),
        ("http://host?query@x", "http://host"),
        ("http://[::1]:80/a", "http://[::1]:80"),
        ("(unreadable URL)", "(unreadable URL)"),
    ],
)
def test_origins(url: str, origin: str) -> None:
    assert origin_of(url) == origin


# --- with threads -------------------------------------------------------------------------------------


def test_row_49_threads_that_wait_for_a_limit_can_be_cancelled() -> None:
    limit, cancellation, errors = OriginLimit(), Cancellation(), list[BaseException]()
    permit = limit.acquire(cancellation)
    permit.answered(429, 200.0)
    permit.release()

    def wait() -> None:
        try:
            limit.acquire(cancellation)
        except ndcache.CancelledError as error:
            errors.append(error)

    threads = [threading.Thread(target=wait) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(limit._queue) == 8)
    begun = time.monotonic()
    cancellation.set()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begun < 1
    assert len(errors) == 8
    assert not limit._queue


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_row_37_a_forked_child_does_not_wait_for_a_lock_of_its_parent() -> None:
    script = """
import os
from ndcache.http.rate_limits import RateLimits
from ndcache.workers.cancellation import Cancellation
shared = RateLimits()
with shared.of("http://host/")._lock:  # held as by a thread that makes a request at that moment
    if os.fork() == 0:
        shared.of("http://host/").acquire(Cancellation()).release()
        os._exit(0)
    print(os.wait()[1])
"""
    assert subprocess.check_output([sys.executable, "-c", script], text=True, timeout=60) == "0\n"


QUICK = RetryPolicy(retries=2, backoff=0.001)


class ActiveFor(OriginActivity):
    """Activity of an origin that sends something to others between each two of so many tries."""

    def __init__(self, tries: int) -> None:
        super().__init__()
        self._tries = tries

    def was_active(self, error: ndcache.NdcacheError, since: float) -> bool:
        self._tries -= 1
        return self._tries >= 0


def with_retries(work: Callable[[], T], policy: RetryPolicy, activity: OriginActivity) -> T:
    """Return what `work` returns in the end."""
    for attempt in attempts(policy, Cancellation(), LoadStats(), activity):
        with attempt:
            result = work()
    return result


def refused(status: int = 429) -> ndcache.NdcacheError:
    kind = ndcache.RateLimitedError if status == 429 else ndcache.ServerError
    return kind("too many", status=status)


def test_row_49_refusals_are_not_counted_while_others_are_served() -> None:
    errors = [refused() for _ in range(20)]

    def attempt() -> str:
        if errors:
            raise errors.pop()
        return "value"

    assert with_retries(attempt, QUICK, ActiveFor(20)) == "value"


@pytest.mark.parametrize("served", [0, 5, 50])
def test_row_49_refusals_are_counted_once_nobody_is_served(served: int) -> None:
    calls = []

    def attempt() -> None:
        calls.append(1)
        raise refused(503)

    with pytest.raises(ndcache.ServerError):
        with_retries(attempt, QUICK, ActiveFor(served))
    assert len(calls) == served + 1 + QUICK.retries - (served > 0)


def test_refusals_are_not_tried_again_without_retries() -> None:
    calls = []

    def attempt() -> None:
        calls.append(1)
        raise refused()

    with pytest.raises(ndcache.RateLimitedError):
        with_retries(attempt, RetryPolicy(retries=0), ActiveFor(1))
    assert len(calls) == 1


# --- over sockets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_row_49_a_limit_of_connections(
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
def test_row_49_a_limit_of_requests_per_second(
    tmp_path: Path, serve: Serve, log: Callable[[], list[str]], burst: int
) -> None:
    arrays = simple_model(tmp_path / "model", shards=60, shard_bytes=1000)
    limit = RateLimit(20, burst)
    server = serve(tmp_path / "model", limit=limit)
    assert_same(ndcache.load(server.url, retries=RetryPolicy(retries=2)), arrays)
    assert limit.refused <= 7 + len(arrays)
    assert len(log()) == 1


def test_row_49_pieces_of_a_large_shard(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, log: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr("ndcache.sources.download.RANGE_THRESHOLD", 1 << 16)
    monkeypatch.setattr("ndcache.sources.download.RANGE_BYTES", (1 << 15, 1 << 16))
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
    refusals = itertools.count()

    def cached() -> int:
        return len([path for path in cache_dir.rglob("params_shard_*.bin") if ".ndcache" not in path.parts])

    def refuse(connection: Connection, request: Request) -> None:
        number = next(refusals)
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
    for number in range(1, 5):
        name = f"params_shard_{number}.bin"
        scripted.script[f"/{name}"] = [later(number, files[name])]
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
    assert len(early) <= 1  # one may have been on its way


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
        assert limits.of(storage.url).max_in_flight < math.inf == limits.of(scripted.url).max_in_flight
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


def test_row_49_a_manifest_waits_too(tmp_path: Path, scripted: ScriptedServer) -> None:
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

_CONFIGURATION = """
daemon off;
user {user} {group};
worker_processes 1;
pid nginx.pid;
events {{ worker_connections 256; }}
http {{
    log_format times "$msec $status $uri";
    access_log access.log times;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    limit_conn_zone $binary_remote_addr zone=connections:1m;
    limit_req_zone $binary_remote_addr zone=requests:1m rate=5r/s;
    server {{
        listen 127.0.0.1:{port};
        root {root};
        location ~ bin$ {{ {limit} }}
    }}
}}
"""


@contextlib.contextmanager
def nginx(prefix: Path, root: Path, limit: str) -> Iterator[str]:
    import grp
    import pwd

    program = need_program("nginx")
    user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
    prefix.mkdir()
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        port = listener.getsockname()[1]
        configuration = _CONFIGURATION.format(port=port, user=user, group=group, root=root, limit=limit)
        (prefix / "nginx.conf").write_text(configuration)
        process = subprocess.Popen(
            [program, "-e", "stderr", "-p", str(prefix), "-c", "nginx.conf"],
            env={**os.environ, "NGINX": f"{listener.fileno()};"},
            pass_fds=[listener.fileno()],
            stderr=subprocess.DEVNULL,
        )
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.once
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
def test_row_49_nginx(tmp_path: Path, limit: str, shards: int, shard_bytes: int, needed: float) -> None:
    arrays = simple_model(tmp_path / "model", shards, shard_bytes)
    with nginx(tmp_path / "nginx", tmp_path / "model", limit) as url:
        assert_same(ndcache.load(url), arrays)
        lines = [line.split() for line in (tmp_path / "nginx" / "access.log").read_text().splitlines()]
    times = [float(moment) for moment, *_ in lines]
    refusals = [status for _, status, _ in lines].count("503")
    assert max(times) - min(times) <= 1.5 * needed
    assert refusals <= 7 + shards // 2
