"""The limit of the bytes per second that a load receives."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import requests
import trustme

import ndcache
from ndcache.http.limits.token_bucket import TokenBucket
from ndcache.http.transport import Transport
from ndcache.workers.cancellation import Cancellation

from ..helpers import models
from ..helpers.loads import Serve, assert_same
from ..helpers.servers import ScriptedServer, reply

RATE = 1000.0


class Clock:
    """Seconds that pass only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bucket(clock: Clock) -> Iterator[TokenBucket]:
    with closing(TokenBucket(RATE, clock=clock)) as bucket:
        yield bucket


def receive(buckets: list[TokenBucket], clock: Clock, seconds: float, late: float = 0.0) -> int:
    """Let as many workers receive bytes for some seconds, and each wake up late; return how many bytes there were."""
    end, received = clock.now + seconds, 0
    wakes = dict.fromkeys(range(len(buckets)), clock.now)
    while (first := min(wakes.items(), key=lambda wake: wake[1]))[1] < end:
        worker, clock.now = first[0], max(clock.now, first[1])
        received += 20
        wakes[worker] = clock.now + buckets[worker].take(20) + late
    return received


@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize("late", [0.0, 0.01])
def test_workers_receive_at_the_rate(bucket: TokenBucket, clock: Clock, workers: int, late: float) -> None:
    """Ten seconds give the bytes of ten seconds, within five per cent, even if threads wake up late."""
    assert receive([bucket] * workers, clock, 10, late) == pytest.approx(10 * RATE, rel=0.05)


def test_a_pause_is_made_up_for_in_part(bucket: TokenBucket, clock: Clock) -> None:
    receive([bucket], clock, 10)
    clock.now += 100
    assert receive([bucket], clock, 1) == pytest.approx(1.25 * RATE, rel=0.05)


def test_the_bucket_is_empty_at_the_beginning(bucket: TokenBucket) -> None:
    assert bucket.take(500) == pytest.approx(0.5)
    assert bucket.take(500) == pytest.approx(1.0)


@pytest.mark.parametrize(("rate", "nbytes"), [(1, 1 << 10), (1 << 20, 1 << 14), (1e12, 2 << 20)])
def test_reads_are_short_enough(rate: float, nbytes: int) -> None:
    assert TokenBucket(rate).read_bytes == nbytes


def test_processes_that_share_a_bucket_receive_at_its_rate(bucket: TokenBucket, clock: Clock) -> None:
    bucket.take(100)
    handle = bucket.share()
    assert bucket.share() == handle
    other = TokenBucket(RATE, handle, clock)
    assert other.take(100) == pytest.approx(0.2)
    assert bucket.take(100) == pytest.approx(0.3)
    assert receive([bucket, other, bucket], clock, 10) == pytest.approx(10 * RATE, rel=0.05)


def test_cancelling_ends_the_wait() -> None:
    bucket, cancellation = TokenBucket(0.001), Cancellation()
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(bucket.throttle, 1 << 20, cancellation)
        cancellation.set()
        with pytest.raises(ndcache.CancelledError):
            waiting.result()


# --- loads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "seconds"), [(1, 1), pytest.param(2, 2, marks=pytest.mark.once)])
def test_row_115_a_load_is_not_faster_than_its_limit(
    tmp_path: Path, serve: Serve, processes: int, seconds: int
) -> None:
    """All workers and processes together receive at one rate."""
    arrays = models.simple_model(tmp_path / "www", shards=8)
    nbytes, server = 8 << 16, serve(tmp_path / "www")
    begun = time.monotonic()
    weights = ndcache.load(server.url, limit_rate=f"{nbytes / seconds / 1000} kB/s", processes=processes, max_workers=2)
    assert time.monotonic() - begun > seconds - 0.3, "less what the bucket holds"
    assert_same(weights, arrays)
    assert weights.stats.seconds["limit_rate"] > 0
    assert ndcache.load(server.url, limit_rate=1).stats.network_bytes == 0


def test_row_115_a_limit_is_no_stall(tmp_path: Path, serve: Serve) -> None:
    """A request of which next to nothing is read for longer than the timeout has not stalled."""
    models.simple_model(tmp_path / "www", shards=1, shard_bytes=1 << 12)
    server = serve(tmp_path / "www")
    weights = ndcache.load(server.url, limit_rate=1 << 12, timeout=(10, 0.1), retries=0)
    assert weights.stats.seconds["limit_rate"] > 0.2, "one read of 1 KiB"


def test_row_115_a_body_over_tls_keeps_to_the_limit(secure: ScriptedServer, authority: trustme.CA) -> None:
    secure.script["/a"] = [reply(200, bytes(1 << 16))]
    session = requests.Session()
    with authority.cert_pem.tempfile() as path:
        session.verify = path
        transport, begun = Transport(session=session), time.monotonic()
        with transport.get(f"{secure.url}a", {}, Cancellation(), bucket=TokenBucket(1 << 18)) as response:
            sizes = []
            while data := response.read_some(1 << 20):
                sizes.append(len(data))
    session.close()
    assert sum(sizes) == 1 << 16
    assert max(sizes) <= 1 << 12
    assert time.monotonic() - begun > 0.2
    assert response.limited > 0


def test_no_limit_is_the_default(tmp_path: Path, serve: Serve) -> None:
    models.simple_model(tmp_path / "www")
    assert ndcache.load(serve(tmp_path / "www").url).stats.seconds["limit_rate"] == 0
