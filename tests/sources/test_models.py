"""The tests that every kind of `Model` must pass."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

import ndcache
from ndcache.context import LoadContext
from ndcache.format.manifest import Shard
from ndcache.http.limits.rate_limits import RateLimits
from ndcache.http.transport import Transport
from ndcache.location import locate
from ndcache.sources import open_model
from ndcache.sources.downloads.download import DownloadResult
from ndcache.sources.downloads.shard_request import DownloadPlan
from ndcache.sources.local import LocalModel
from ndcache.sources.model import Flaw, Model
from ndcache.sources.remote import RemoteModel
from ndcache.store.inventory import CacheScope
from ndcache.store.metadata import FileMetadata
from ndcache.workers.cancellation import Cancellation
from ndcache.workers.pool import WorkerPool

from ..helpers import models
from ..helpers.servers import FileServer

Serve = Callable[..., FileServer]
SHARDS = 4
#: Large enough that one of four tensors is fetched without the rest, which saves more than 1 MiB.
LARGE = (1 << 17,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a model of four shards with two small tensors each, and one large shard of four tensors."""
    small = [
        {f"layer.{index}.{name}": models.random_array((16, 64), seed=index) for name in ("weight", "bias")}
        for index in range(SHARDS)
    ]
    large = {f"large.{index}": models.random_array(LARGE, seed=10 + index) for index in range(4)}
    models.write_model(tmp_path / "model", [*small, large])
    return tmp_path / "model"


@pytest.fixture
def context(cache_dir: Path) -> Iterator[LoadContext]:
    """Return the context of a load with four workers."""
    transport = Transport(timeout=(5.0, 5.0), max_connections=4)
    with contextlib.closing(transport), WorkerPool(4, Cancellation()) as workers:
        yield LoadContext(
            transport,
            ndcache.RetryPolicy(retries=1, backoff=0.001),
            RateLimits(),
            workers,
            CacheScope(cache_dir, "default", is_private=False),
        )


class ModelTests:
    """What every `Model` must do; each subclass opens one kind of model."""

    #: Whether the shards need not be fetched.
    is_cached: bool
    #: What an obtained shard was checked by.
    checked: str = "md5"
    #: Whether obtaining a shard takes a while: its bytes are fetched or read.
    has_to_wait: bool = True

    @pytest.fixture
    def model(self, folder: Path, context: LoadContext, serve: Serve) -> Iterator[Model]:
        """Open the model in `folder`; the subclass says how."""
        with contextlib.closing(self.open(folder, context, serve)) as model:
            yield model

    def open(self, folder: Path, context: LoadContext, serve: Serve) -> Model:
        raise NotImplementedError

    def test_the_manifest_has_all_shards(self, model: Model, folder: Path) -> None:
        shards = model.manifest.shards
        assert model.manifest.name == "tensor-cache.json"
        assert [shard.data_path for shard in shards] == [f"params_shard_{index}.bin" for index in range(SHARDS + 1)]
        assert [shard.nbytes for shard in shards] == [(folder / shard.data_path).stat().st_size for shard in shards]

    def test_opening_a_model_obtains_no_shard(self, model: Model, context: LoadContext) -> None:
        assert context.stats.network_bytes == 0

    def test_cached_shards_are_there_before_they_are_obtained(self, model: Model) -> None:
        assert [model.has(shard) for shard in model.manifest.shards] == [self.is_cached] * (SHARDS + 1)
        assert model.prepare(model.manifest.shards) is self.is_cached

    def test_a_whole_shard_counts_all_its_bytes(self, model: Model) -> None:
        assert [model.nbytes(shard) for shard in model.manifest.shards] == [s.nbytes for s in model.manifest.shards]

    def test_an_obtained_shard_has_the_right_bytes(self, model: Model, folder: Path) -> None:
        model.prepare(model.manifest.shards)
        for shard in model.manifest.shards:
            obtained = model.obtain(shard)
            with obtained.file as file:
                file.seek(0)
                assert file.read() == (folder / shard.data_path).read_bytes()
            assert (obtained.from_cache, obtained.checked) == (self.is_cached, self.checked)
        model.finish()

    def test_shards_are_obtained_by_several_threads(self, model: Model, folder: Path) -> None:
        model.prepare(model.manifest.shards)

        def read(shard: ndcache.Shard) -> bytes:
            with model.obtain(shard).file as file:
                file.seek(0)
                return file.read()

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(read, model.manifest.shards))
        assert found == [(folder / shard.data_path).read_bytes() for shard in model.manifest.shards]

    def test_each_caller_has_a_file_of_its_own(self, model: Model) -> None:
        shard = model.manifest.shards[0]
        model.prepare([shard])
        with model.obtain(shard).file as first, model.obtain(shard).file as second:
            first.seek(0)
            second.seek(0)
            assert first.read(10) == second.read(10)
            first.close()
            assert len(second.read()) == shard.nbytes - 10

    def test_an_obtained_file_can_be_read_after_it_lost_its_name(self, model: Model, folder: Path) -> None:
        shard = model.manifest.shards[1]
        right = (folder / shard.data_path).read_bytes()
        model.prepare([shard])
        with model.obtain(shard).file as file:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(model.directory / shard.data_path)
            file.seek(0)
            assert file.read() == right

    def test_a_few_tensors_of_a_shard_have_the_right_bytes(self, model: Model, folder: Path) -> None:
        (shard,) = model.manifest.select("large.3")
        (record,) = shard.records
        model.prepare([shard])
        assert model.nbytes(shard) == (shard.nbytes if self.is_cached else record.nbytes)
        with model.obtain(shard).file as file:
            file.seek(record.byte_offset)
            data = file.read(record.nbytes)
        assert np.array_equal(np.frombuffer(data, np.float32), models.random_array(LARGE, seed=13))

    def test_preparing_no_shard_is_allowed(self, model: Model) -> None:
        model.prepare([])
        model.finish()

    def test_a_model_can_be_closed_twice(self, model: Model) -> None:
        model.prepare(model.manifest.shards)
        model.close()
        model.close()

    def test_checking_tells_what_was_compared(self, model: Model) -> None:
        found = [model.check(shard) for shard in model.manifest.shards]
        assert found == ["md5" if self.is_cached else Flaw.MISSING] * (SHARDS + 1)

    def test_a_cancelled_load_neither_fetches_nor_reads(self, model: Model, context: LoadContext) -> None:
        model.prepare(model.manifest.shards)
        context.cancellation.set()
        with pytest.raises(ndcache.CancelledError) if self.has_to_wait else contextlib.nullcontext():
            for shard in model.manifest.shards:
                model.obtain(shard).file.close()
        assert context.stats.network_bytes == 0


class CachedModelTests(ModelTests):
    """What a `Model` must do whose shards are on disk."""

    is_cached = True

    @pytest.mark.parametrize("damage", ["other bytes", "truncated", "missing"])
    def test_checking_finds_damage(self, model: Model, damage: str) -> None:
        shards = model.manifest.shards
        path = model.directory / shards[2].data_path
        size = path.stat().st_size
        os.unlink(path)
        if damage != "missing":
            path.write_bytes(bytes(size if damage == "other bytes" else size // 2))
        flaw = Flaw.MISSING if damage == "missing" else Flaw.BAD
        assert [model.check(shard) for shard in shards] == ["md5", "md5", flaw, "md5", "md5"]


class TestLocalModel(CachedModelTests):
    """A local directory; digests are not compared by default."""

    checked = "size"
    has_to_wait = False

    def open(self, folder: Path, context: LoadContext, serve: Serve) -> Model:
        model = open_model(locate(folder), context)
        assert isinstance(model, LocalModel)
        return model

    def test_a_shard_that_may_not_be_looked_at_is_an_ndcache_error(
        self, model: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: str | os.PathLike[str], **given: Any) -> os.stat_result:
            if str(path).startswith(str(model.directory)):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return stat(path, **given)

        stat = os.stat
        monkeypatch.setattr(os, "stat", refuse)
        with pytest.raises(ndcache.NotFoundError, match="cannot be read: Permission denied"):
            model.prepare(model.manifest.shards)


class TestLocalModelVerified(CachedModelTests):
    """A local directory, with ``verify="always"``."""

    def open(self, folder: Path, context: LoadContext, serve: Serve) -> Model:
        return open_model(locate(folder), replace(context, verify="always"))


class TestRemoteModelCold(ModelTests):
    """A model on a server, of which nothing is cached."""

    is_cached = False

    def open(self, folder: Path, context: LoadContext, serve: Serve) -> Model:
        model = open_model(locate(serve(folder).url), context)
        assert isinstance(model, RemoteModel)
        return model


class TestRemoteModelFromMirror(ModelTests):
    """A model whose shards only a mirror has."""

    is_cached = False

    def open(self, folder: Path, context: LoadContext, serve: Serve) -> Model:
        server, mirror = serve(folder), serve(folder)
        server.status.update({f"/params_shard_{index}.bin": 404 for index in range(SHARDS + 1)})
        return open_model(locate(server.url), replace(context, mirrors=(locate(mirror.url),)))


class TestRemoteModelCached(CachedModelTests):
    """A model on a server, of which everything is cached; digests were compared when it was fetched."""

    has_to_wait = False

    def open(self, folder: Path, context: LoadContext, serve: Serve) -> Model:
        server = serve(folder)
        ndcache.fetch(server.url)
        return open_model(locate(server.url), context)

    def test_a_confirmed_file_is_closed_if_its_note_cannot_be_written_safely(
        self, model: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert isinstance(model, RemoteModel)
        shard, cache, opened = model.manifest.shards[0], model.cache, []

        def open_shard(shard: Shard, really_open: Callable[[Shard], BinaryIO | None] = cache.open_shard) -> BinaryIO:
            file = really_open(shard)
            assert file is not None
            opened.append(file)
            return file

        def refuse(name: str, metadata: FileMetadata) -> bool:
            raise ndcache.UnsafeCacheError("a folder is a link")

        monkeypatch.setattr(cache, "open_shard", open_shard)
        monkeypatch.setattr(cache, "try_to_remember", refuse)
        plan = DownloadPlan(shard, (), "another one", cached=cache.metadata(shard.data_path))
        with pytest.raises(ndcache.UnsafeCacheError):
            model._shard_file(plan, DownloadResult(None))
        assert [file.closed for file in opened] == [True]


class TestRemoteModelVerified(CachedModelTests):
    """A cached model on a server, with ``verify="always"``."""

    def open(self, folder: Path, context: LoadContext, serve: Serve) -> Model:
        server = serve(folder)
        ndcache.fetch(server.url)
        return open_model(locate(server.url), replace(context, verify="always"))


class TestRemoteModelOffline(TestRemoteModelCached):
    """A cached model whose server is not asked."""

    def open(self, folder: Path, context: LoadContext, serve: Serve) -> Model:
        server = serve(folder)
        ndcache.fetch(server.url)
        requests = len(server.requests)
        model = open_model(locate(server.url), replace(context, offline=True))
        assert len(server.requests) == requests
        return model


class TestRemoteModelWithoutCache(ModelTests):
    """A model on a server whose cache cannot be written: its files stay in memory."""

    is_cached = False

    def open(self, folder: Path, context: LoadContext, serve: Serve) -> Model:
        context.cache.root.write_text("a file in the place of the cache's top directory")
        with pytest.warns(RuntimeWarning, match="stays in memory and is not kept"):
            return open_model(locate(serve(folder).url), context)
