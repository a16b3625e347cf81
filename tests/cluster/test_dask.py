"""`ndcache.dask.fetch` with a real scheduler and real workers, each in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import ndcache

from ..helpers import dask_cluster
from ..helpers.companions import mlc_model
from ..helpers.dask_cluster import TIMEOUT, DaskCluster
from ..helpers.loads import assert_same
from ..helpers.models import random_array, simple_model, write_model
from ..helpers.requirements import need_module
from ..helpers.servers import FileServer
from ..helpers.tensor_files import write_files

distributed = need_module("distributed")
ndcache_dask = need_module("ndcache.dask")

Serve = Callable[..., FileServer]
MIB = 1 << 20


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    """Return a cluster of three workers, which no test kills."""
    folder = tmp_path_factory.mktemp("dask")
    cluster = DaskCluster(folder)
    for number in range(3):
        cluster.add(folder / f"home{number}")
    assert all(worker.address for worker in cluster.workers)
    yield cluster
    cluster.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], DaskCluster]]:
    """Return a function that starts a scheduler, which ends after the test with its workers."""
    started: list[DaskCluster] = []

    def begin() -> DaskCluster:
        started.append(DaskCluster(tmp_path / "dask"))
        return started[-1]

    yield begin
    for cluster in started:
        cluster.close()


@contextmanager
def connected(cluster: DaskCluster) -> Iterator[Any]:
    """Yield a client, and check in the end that ndcache has left nothing in the cluster."""
    with distributed.Client(cluster.scheduler.address, timeout=TIMEOUT) as client:
        client.wait_for_workers(len(cluster.workers), timeout=TIMEOUT)
        yield client
        wait_for(lambda: client.run_on_scheduler(dask_cluster.left_in_scheduler) == [])
        wait_for(lambda: not any(client.run(dask_cluster.left_in_worker).values()))


@pytest.fixture
def client(shared: DaskCluster, tmp_path: Path) -> Iterator[Any]:
    """Return a client of `shared`, whose workers have new caches."""
    with connected(shared) as client:
        for number, worker in enumerate(shared.workers):
            set_home(client, worker.address, tmp_path / f"home{number}")
        yield client


def set_home(client: Any, address: str, home: Path) -> None:
    client.run(dask_cluster.set_home, str(home), workers=[address])


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def requested(server: FileServer) -> Counter[str]:
    return Counter(request.path for request in server.requests)


def assert_cached(server: FileServer, homes: list[Path], arrays: dict[str, Any]) -> None:
    """Check that loads from these caches make no request."""
    before = len(server.requests)
    for home in homes:
        with ndcache.load(server.url, cache_dir=home, offline=True, verify="always") as weights:
            assert_same(weights, arrays)
    assert len(server.requests) == before


def test_each_shard_leaves_the_origin_once(client: Any, tmp_path: Path, serve: Serve) -> None:
    arrays = mlc_model(tmp_path / "model", shards=12)
    server = serve(tmp_path / "model")
    directories = ndcache_dask.fetch(client, server.url, max_workers=2)
    assert set(directories) == set(client.nthreads())
    assert len(server.requests) == 13 + 3
    assert set(requested(server).values()) == {1}
    assert_cached(server, [tmp_path / f"home{number}" for number in range(3)], arrays)
    for address, directory in directories.items():
        future = client.submit(dask_cluster.names_in, directory, workers=[address])
        assert future.result() == sorted(arrays)
        for path in (tmp_path / "model").iterdir():
            assert (directory / path.name).read_bytes() == path.read_bytes()
    assert len(server.requests) == 13 + 3
    assert ndcache_dask.fetch(client, server.url) == directories
    assert requested(server)["/tensor-cache.json"] == 2
    assert len(server.requests) == 14 + 3


def test_safetensors_files(client: Any, tmp_path: Path, serve: Serve) -> None:
    arrays = {f"layer.{number}": random_array((MIB // 4,), seed=number) for number in range(4)}
    files = write_files(tmp_path / "model", arrays, 3)
    (tmp_path / "model" / "config.json").write_text("{}")
    server = serve(tmp_path / "model")
    directories = ndcache_dask.fetch(client, server.url, memory_limit=MIB)
    asked = Counter((request.path, request.headers.get("range")) for request in server.shard_requests())
    assert sorted(asked.values()) == [1] * 2 * len(files), "the header of each file, and the file"
    assert_cached(server, [tmp_path / f"home{number}" for number in range(3)], arrays)
    for directory in directories.values():
        for path in (tmp_path / "model").iterdir():
            assert (directory / path.name).read_bytes() == path.read_bytes()


def test_workers_that_share_a_cache_are_one_node(
    client: Any, shared: DaskCluster, tmp_path: Path, serve: Serve
) -> None:
    arrays = simple_model(tmp_path / "model", shards=6)
    server = serve(tmp_path / "model")
    set_home(client, shared.workers[1].address, tmp_path / "home0")
    directories = ndcache_dask.fetch(client, server.url)
    assert len(directories) == 2
    assert shared.workers[2].address in directories
    assert set(requested(server).values()) == {1}
    assert_cached(server, [tmp_path / "home0", tmp_path / "home2"], arrays)


def test_row_73_wrong_bytes_of_a_worker_are_refused(
    client: Any, shared: DaskCluster, tmp_path: Path, serve: Serve
) -> None:
    arrays = {f"x{number}": random_array((MIB // 4,), seed=number) for number in range(3)}
    write_model(tmp_path / "model", [{name: array} for name, array in arrays.items()], md5=False)
    server = serve(tmp_path / "model")
    directory = ndcache.fetch(server.url, cache_dir=tmp_path / "home1")
    bad = directory / "params_shard_1.bin"
    note = next(directory.glob(".ndcache/validators/params_shard_1*"))
    content = json.loads(note.read_text())
    content["digests"] = {"sha256": hashlib.sha256(bad.read_bytes()).hexdigest()}
    note.write_text(json.dumps(content))
    status, data = bad.stat(), bytearray(bad.read_bytes())
    data[7] ^= 1
    bad.write_bytes(data)
    os.utime(bad, ns=(status.st_atime_ns, status.st_mtime_ns))
    ndcache_dask.fetch(client, server.url)
    assert_cached(server, [tmp_path / f"home{number}" for number in range(3)], arrays)
    assert requested(server)["/params_shard_1.bin"] == 2
    assert "sent wrong bytes" not in shared.logs()  # nothing of it fails as a task of Dask


def test_row_78_errors_tasks_and_logs_have_no_secrets(
    client: Any, shared: DaskCluster, tmp_path: Path, serve: Serve
) -> None:
    simple_model(tmp_path / "model", shards=6)
    server = serve(tmp_path / "model")
    server.status["/params_shard_4.bin"] = 403
    source = server.url.replace("http://", "http://user:pass-5ecret@") + "?sig=query-5ecret"
    server.gate.clear()
    seen: list[str] = []

    def look() -> None:
        wait_for(lambda: len(server.requests) > 3)
        seen.append(str(client.run_on_scheduler(dask_cluster.describe_tasks)))
        server.gate.set()

    watcher = threading.Thread(target=look)
    watcher.start()
    with pytest.raises(ndcache.AuthError) as caught:
        ndcache_dask.fetch(client, source, mirrors=[source], max_workers=1)
    watcher.join()
    assert caught.value.shard == "params_shard_4.bin"
    assert caught.value.node in client.nthreads()
    assert str(caught.value.node) in str(caught.value)
    assert any("ndcache" in text for text in seen)
    assert "5ecret" not in "".join(seen) + str(caught.value) + repr(caught.value.__dict__) + shared.logs()


def test_row_77_cancel_ends_the_tasks(client: Any, tmp_path: Path, serve: Serve) -> None:
    simple_model(tmp_path / "model", shards=6)
    server, cancel = serve(tmp_path / "model"), threading.Event()
    server.gate.clear()

    def cancel_soon() -> None:
        wait_for(lambda: len(server.requests) > 3)
        cancel.set()

    watcher = threading.Thread(target=cancel_soon)
    watcher.start()
    with pytest.raises(ndcache.CancelledError):
        ndcache_dask.fetch(client, server.url, cancel=cancel)
    watcher.join()
    wait_for(lambda: not any(client.run(dask_cluster.left_in_worker).values()))  # although the server sends nothing
    server.gate.set()


@pytest.mark.usefixtures("interruptible")
def test_row_77_an_interrupt_ends_the_tasks(client: Any, tmp_path: Path, serve: Serve) -> None:
    simple_model(tmp_path / "model", shards=6)
    server = serve(tmp_path / "model")
    server.gate.clear()

    def interrupt() -> None:
        wait_for(lambda: len(server.requests) > 3)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        ndcache_dask.fetch(client, server.url)
    watcher.join()
    wait_for(lambda: not any(client.run(dask_cluster.left_in_worker).values()))
    server.gate.set()


def test_a_download_leaves_the_workers_thread_to_other_tasks(client: Any, tmp_path: Path, serve: Serve) -> None:
    arrays = simple_model(tmp_path / "model", shards=6)
    server = serve(tmp_path / "model")
    server.gate.clear()
    done: list[int] = []

    def work_meanwhile() -> None:
        wait_for(lambda: len(server.requests) > 6)
        done.extend(
            client.gather([client.submit(len, "abc", workers=[each], pure=False) for each in client.nthreads()])
        )
        server.gate.set()

    other = threading.Thread(target=work_meanwhile)
    other.start()
    ndcache_dask.fetch(client, server.url, max_workers=4)
    other.join()
    assert done == [3, 3, 3]
    assert_cached(server, [tmp_path / f"home{number}" for number in range(3)], arrays)


def test_from_within_a_task(client: Any, tmp_path: Path, serve: Serve) -> None:
    arrays = simple_model(tmp_path / "model")
    server = serve(tmp_path / "model")
    assert client.submit(dask_cluster.fetch_in_task, server.url).result(timeout=TIMEOUT) == 3
    assert_cached(server, [tmp_path / f"home{number}" for number in range(3)], arrays)


def test_options(client: Any, tmp_path: Path, serve: Serve) -> None:
    arrays = simple_model(tmp_path / "model", shards=3, shard_bytes=MIB // 4)
    server = serve(tmp_path / "model")
    with pytest.raises(TypeError, match="Did you mean 'max_workers'"):
        ndcache_dask.fetch(client, server.url, max_worker=3)
    with pytest.raises(ValueError, match="not a local path"):
        ndcache_dask.fetch(client, str(tmp_path))
    assert server.requests == []
    ndcache_dask.fetch(client, server.url, names="layer.[01]", scope="app", memory_limit=MIB // 4)
    homes = [tmp_path / f"home{number}" for number in range(3)]
    for home in homes:
        weights = ndcache.load(server.url, names="layer.[01]", scope="app", cache_dir=home, offline=True)
        assert_same(weights, {name: arrays[name] for name in ("layer.0", "layer.1")})
    assert requested(server)["/params_shard_2.bin"] == 0


def test_an_asynchronous_client_is_refused(shared: DaskCluster) -> None:
    import asyncio

    async def call() -> None:
        async with distributed.Client(shared.scheduler.address, asynchronous=True) as client:
            ndcache_dask.fetch(client, "http://127.0.0.1:1/")

    with pytest.raises(TypeError, match="not asynchronous"):
        asyncio.run(call())


@pytest.mark.once
def test_workers_in_this_process_are_one_node(tmp_path: Path, serve: Serve) -> None:
    arrays = simple_model(tmp_path / "model")
    server = serve(tmp_path / "model")
    with (
        distributed.LocalCluster(n_workers=2, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        distributed.Client(cluster) as client,
    ):
        assert len(ndcache_dask.fetch(client, server.url)) == 1
    assert_cached(server, [tmp_path / "home"], arrays)


# --- workers that come and go -------------------------------------------------------------------------


@pytest.mark.once
def test_row_74_a_killed_worker_costs_only_its_share(
    start: Callable[[], DaskCluster], tmp_path: Path, serve: Serve
) -> None:
    arrays = simple_model(tmp_path / "model", shards=16)
    server, cluster = serve(tmp_path / "model"), start()
    homes = [tmp_path / f"home{number}" for number in range(3)]
    for home in homes:
        cluster.add(home)
    server.gate.clear()
    survivors = {worker.address for worker in cluster.workers[1:]}

    def kill() -> None:
        wait_for(lambda: sum(requested(server).values()) > 3)
        cluster.workers[0].kill()
        server.gate.set()

    with connected(cluster) as client:
        killer = threading.Thread(target=kill)
        killer.start()
        directories = ndcache_dask.fetch(client, server.url, max_workers=2)
        killer.join()
        assert set(directories) == survivors
        shards = sum(count for path, count in requested(server).items() if path.endswith(".bin"))
        assert shards <= 16 + 16 // 3
        assert_cached(server, homes[1:], arrays)
        again = cluster.add(homes[0])
        client.wait_for_workers(3, timeout=TIMEOUT)
        assert set(ndcache_dask.fetch(client, server.url)) == {*survivors, again.address}
        assert sum(count for path, count in requested(server).items() if path.endswith(".bin")) == shards
        assert_cached(server, homes, arrays)


@pytest.mark.once
def test_row_75_a_late_worker_catches_up(start: Callable[[], DaskCluster], tmp_path: Path, serve: Serve) -> None:
    arrays = simple_model(tmp_path / "model", shards=16)
    server, cluster = serve(tmp_path / "model"), start()
    homes = [tmp_path / f"home{number}" for number in range(3)]
    cluster.add(homes[0])
    cluster.add(homes[1])
    server.gate.clear()

    def add() -> None:
        wait_for(lambda: sum(requested(server).values()) > 3)
        cluster.add(homes[2])
        wait_for(homes[2].exists)  # it has a task
        server.gate.set()

    with connected(cluster) as client:
        adder = threading.Thread(target=add)
        adder.start()
        directories = ndcache_dask.fetch(client, server.url, max_workers=2)
        adder.join()
        assert set(directories) == {worker.address for worker in cluster.workers}
        assert set(requested(server).values()) == {1}
        assert_cached(server, homes, arrays)
