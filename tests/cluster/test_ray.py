"""`ndcache.ray.fetch` on a real Ray cluster of several nodes on this machine."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ndcache
import ndcache.ray

from ..helpers.companions import mlc_model
from ..helpers.loads import QUICK, flip, partial_files, wait_until
from ..helpers.models import random_array, write_model
from ..helpers.ray_cluster import TIMEOUT, RayCluster, open_ray_cluster, wait_for_nothing
from ..helpers.servers import FileServer
from ..helpers.tensor_files import write_files

SHARDS = 24
SECRET = "lindwurm"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Start three nodes; the last two share a cache."""
    one, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    with open_ray_cluster(one, other, other) as cluster:
        yield cluster


@pytest.fixture
def model(tmp_path: Path) -> Path:
    mlc_model(tmp_path / "model", shards=SHARDS)
    return tmp_path / "model"


@pytest.fixture
def server(serve: Callable[..., FileServer], model: Path) -> FileServer:
    return serve(model)


def fetch(url: str, **options: Any) -> dict[str, Path]:
    """Fetch in a driver, whose end would hide what is left."""
    try:
        return ndcache.ray.fetch(url, **options)
    finally:
        wait_for_nothing()


def assert_complete(found: dict[str, Path], cluster: RayCluster, server: FileServer, model: Path) -> None:
    """Check that each cache directory has the model, and that loads with it request no shard."""
    assert found.keys() <= cluster.homes.keys()
    homes = {cluster.homes[node] for node in found}
    assert homes == set(cluster.homes.values())
    assert len(found) == len(homes)
    before = len(server.shard_requests())
    for node, directory in found.items():
        assert directory.is_relative_to(cluster.homes[node])
        for path in model.iterdir():
            assert (directory / path.name).read_bytes() == path.read_bytes(), path.name
        ndcache.load(directory, verify="always").close()
        ndcache.load(server.url, cache_dir=cluster.homes[node], verify="always").close()
        assert not partial_files(directory)
    assert len(server.shard_requests()) == before


def counts(server: FileServer) -> dict[str, int]:
    return dict(Counter(request.path for request in server.requests))


def test_each_file_leaves_the_origin_once(cluster: RayCluster, server: FileServer, model: Path) -> None:
    found = cluster.run(fetch, server.url)
    assert counts(server) == {f"/{path.name}": 1 for path in model.iterdir()}
    assert_complete(found, cluster, server, model)


@pytest.mark.once
def test_nothing_is_requested_again(cluster: RayCluster, server: FileServer, model: Path) -> None:
    found = cluster.run(fetch, server.url)
    again = cluster.run(fetch, server.url, offline=True)
    assert set(again.values()) == set(found.values())
    assert len(server.shard_requests()) == SHARDS


@pytest.mark.once
def test_in_pieces_and_without_digests(cluster: RayCluster, serve: Callable[..., FileServer], tmp_path: Path) -> None:
    """A shard larger than a piece takes several, and the node that downloads it computes a digest."""
    model = tmp_path / "model"
    write_model(model, [{f"layer.{i}": random_array((1000 * (i + 1),), seed=i)} for i in range(4)], md5=False)
    server = serve(model)
    found = cluster.run(fetch, server.url, memory_limit=20_000)
    assert_complete(found, cluster, server, model)
    assert len(server.shard_requests()) == 4


@pytest.mark.once
def test_safetensors_files(cluster: RayCluster, serve: Callable[..., FileServer], tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_files(model, {f"layer.{i}": random_array((1000 * (i + 1),), seed=i) for i in range(8)}, 3)
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text(name)
    server = serve(model)
    found = cluster.run(fetch, server.url, memory_limit=20_000)
    assert_complete(found, cluster, server, model)
    ranges = Counter((request.path, request.headers.get("range")) for request in server.shard_requests())
    assert set(ranges.values()) == {1}, "the header of each file, and the file"
    assert len(ranges) == 6


def fetch_in_a_task(url: str, done: Path) -> dict[str, Path]:
    import ray

    def work() -> dict[str, Path]:
        import ndcache.ray

        return ndcache.ray.fetch(url)

    def block() -> None:
        while not done.exists():
            time.sleep(0.1)

    task, blocker = ray.remote(num_cpus=1)(work), ray.remote(num_cpus=1)(block)
    result = task.remote()
    # No CPU is left for the actors, which need none.
    blocked = [blocker.remote() for _ in range(int(ray.cluster_resources()["CPU"]) - 1)]
    found: dict[str, Path] = ray.get(result)
    done.touch()
    ray.get(blocked)
    del result, blocked
    wait_for_nothing()
    return found


@pytest.mark.once
def test_in_a_task(cluster: RayCluster, server: FileServer, model: Path, tmp_path: Path) -> None:
    found = cluster.run(fetch_in_a_task, server.url, tmp_path / "done")
    assert_complete(found, cluster, server, model)
    assert len(server.shard_requests()) == SHARDS


@pytest.mark.once
def test_row_73_wrong_bytes_of_another_node_are_refused(cluster: RayCluster, server: FileServer, model: Path) -> None:
    found = cluster.run(fetch, server.url)
    bad, other = found.values()
    shutil.rmtree(other)
    flip(bad / "params_shard_3.bin")
    found = cluster.run(fetch, server.url)
    assert counts(server)["/params_shard_3.bin"] == 2
    assert len(server.shard_requests()) == SHARDS + 1
    assert_complete(found, cluster, server, model)


def test_row_76_an_error_of_the_origin_names_the_shard_and_the_node(cluster: RayCluster, server: FileServer) -> None:
    server.status["/params_shard_5.bin"] = 404
    with pytest.raises(ndcache.NotFoundError) as caught:
        cluster.run(fetch, server.url, retries=QUICK)
    assert caught.value.shard == "params_shard_5.bin"
    assert caught.value.node in cluster.homes
    assert f"params_shard_5.bin ({server.url}params_shard_5.bin), on {caught.value.node}" in str(caught.value)


def under_way(home: Path, server: FileServer) -> int:
    """Return how many shards are being downloaded into a cache; that are at most eight."""
    port = server.url.rpartition(":")[2].rstrip("/")
    return len(list(home.rglob(f"*--{port}--*/.ndcache/locks/*")))


def has_begun(cluster: RayCluster, server: FileServer, node: str) -> bool:
    """Return whether a node downloads some shards, and no node is between its lock and its request."""
    counts = {home: under_way(home, server) for home in cluster.homes.values()}
    return counts[cluster.homes[node]] >= 3 and len(server.shard_requests()) >= sum(counts.values())


@pytest.mark.once
def test_row_74_an_actor_that_is_killed_costs_only_its_share(
    cluster: RayCluster, server: FileServer, model: Path
) -> None:
    server.gate.clear()
    fetching = cluster.start(fetch, server.url)
    victim = next(iter(cluster.homes))
    wait_until(lambda: has_begun(cluster, server, victim), TIMEOUT)
    cluster.kill_actors(victim)
    server.gate.set()
    found = fetching.result(TIMEOUT)
    assert_complete(found, cluster, server, model)
    assert SHARDS < len(server.shard_requests()) <= SHARDS + 8


@pytest.mark.once
def test_a_node_that_joins_later_gets_the_model_from_others(
    cluster: RayCluster, server: FileServer, model: Path, tmp_path: Path
) -> None:
    cluster.run(fetch, server.url)
    node = cluster.add_node(tmp_path / "late")
    try:
        found = cluster.run(fetch, server.url)
        assert node in found
        assert_complete(found, cluster, server, model)
        assert len(server.shard_requests()) == SHARDS
    finally:
        cluster.kill_node(node)


@pytest.mark.once
def test_row_75_nodes_that_come_and_go_meanwhile(
    cluster: RayCluster, server: FileServer, model: Path, tmp_path: Path
) -> None:
    lost = cluster.add_node(tmp_path / "lost")
    server.gate.clear()
    fetching = cluster.start(fetch, server.url)
    wait_until(lambda: has_begun(cluster, server, lost), TIMEOUT)
    cluster.kill_node(lost)
    late = cluster.add_node(tmp_path / "late")
    try:
        server.gate.set()
        found = fetching.result(TIMEOUT)
        assert late in found
        assert lost not in found
        assert_complete(found, cluster, server, model)
        assert SHARDS < len(server.shard_requests()) <= SHARDS + 8
    finally:
        cluster.kill_node(late)


def fetch_until(url: str, stop: Path) -> float:
    """Cancel a fetch as soon as a file is there, and return the seconds that this took."""
    cancel, cancelled = threading.Event(), []

    def watch() -> None:
        wait_until(stop.exists, TIMEOUT)
        cancelled.append(time.monotonic())
        cancel.set()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        with pytest.raises(ndcache.CancelledError):
            fetch(url, cancel=cancel)
        return time.monotonic() - cancelled[0]
    finally:
        thread.join()


@pytest.mark.once
def test_row_77_a_fetch_that_is_cancelled(cluster: RayCluster, server: FileServer, model: Path, tmp_path: Path) -> None:
    server.gate.clear()
    fetching = cluster.start(fetch_until, server.url, tmp_path / "stop")
    wait_until(lambda: len(server.shard_requests()) >= 8, TIMEOUT)
    (tmp_path / "stop").touch()
    assert fetching.result(TIMEOUT) < 30  # while the server sends nothing, and no request has timed out
    server.gate.set()
    assert_complete(cluster.run(fetch, server.url), cluster, server, model)


@pytest.mark.once
def test_row_77_a_driver_that_is_killed(cluster: RayCluster, server: FileServer, model: Path) -> None:
    server.gate.clear()
    fetching = cluster.start(fetch, server.url)
    wait_until(lambda: len(server.shard_requests()) >= 8, TIMEOUT)
    fetching.kill()
    cluster.run(wait_for_nothing)
    server.gate.set()
    assert_complete(cluster.run(fetch, server.url), cluster, server, model)


@pytest.mark.once
def test_row_78_secrets_are_in_no_file_and_no_command_line(cluster: RayCluster, server: FileServer) -> None:
    source = server.url.replace("http://", f"http://user:{SECRET}@")
    server.gate.clear()
    fetching = cluster.start(fetch, source)
    wait_until(lambda: len(server.shard_requests()) >= 8, TIMEOUT)
    wait_until(lambda: all("NdcacheWorker" in str(cluster.workers(node)) for node in cluster.homes), TIMEOUT)
    for node in cluster.homes:
        for pid, title in cluster.workers(node).items():
            assert SECRET not in title + Path(f"/proc/{pid}/environ").read_text("utf-8", "replace")
    server.gate.set()
    fetching.result(TIMEOUT)
    server.status["/tensor-cache.json"] = server.status["/ndarray-cache.json"] = 500
    with pytest.raises(ndcache.NdcacheError):
        cluster.run(fetch, f"{source}other/", retries=QUICK)
    files = [path for path in cluster.folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.once
def test_nodes_without_ndcache(cluster: RayCluster, server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "broken" / "ndcache").mkdir(parents=True)
    (tmp_path / "broken" / "ndcache" / "__init__.py").write_text("raise ImportError('not here')")
    environment = {"env_vars": {"PYTHONPATH": str(tmp_path / "broken")}}
    with pytest.raises(
        RuntimeError, match=r"ndcache cannot run on the Ray node [0-9a-f]+\. It must be installed there"
    ):
        cluster.run(fetch, server.url, runtime_env=environment)
    assert not server.requests


def test_ray_must_be_initialised() -> None:
    with pytest.raises(RuntimeError, match=r"call ray\.init\(address"):
        ndcache.ray.fetch("https://host/model/")


def test_unknown_options() -> None:
    with pytest.raises(TypeError, match="Did you mean 'max_workers'"):
        ndcache.ray.fetch("https://host/model/", max_worker=4)


def test_another_version_on_a_node() -> None:
    with pytest.raises(RuntimeError, match=r"but 0\.0 where"):
        ndcache.ray.NdcacheWorker("0.0")
