"""Caches of other users, and links that they planted."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

import pytest

import ndcache

from ..helpers import models
from ..helpers.kills import CountingServer, model_directory
from ..helpers.processes import Zygote
from .children import SHARD, Serve, assert_fetched, digest_of, load

NOBODY = 65534


def load_as_nobody(url: str, names: list[str], cache_dir: Path) -> tuple[str, str, str, BaseException | None]:
    """Load some tensors as root; then, as nobody, load them online and offline, and load and fetch the whole model."""
    os.umask(0o022)
    load(url, names=names, cache_dir=cache_dir)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    online = load(url, names=names, cache_dir=cache_dir)
    offline = load(url, names=names, cache_dir=cache_dir, offline=True)
    warnings.simplefilter("ignore")
    all_of_it = load(url, cache_dir=cache_dir)
    try:
        ndcache.fetch(url, cache_dir=cache_dir)
    except ndcache.NdcacheError as error:
        return online, offline, all_of_it, error
    return online, offline, all_of_it, None


def test_row_30_a_cache_of_another_user_serves_what_it_has(model: Path, counting: Serve, zygote: Zygote) -> None:
    arrays = models.simple_model(model)
    server = counting(model)
    names = ["layer.0", "layer.2"]
    with tempfile.TemporaryDirectory() as folder:  # not in pytest's folder, which other users may not enter
        os.chmod(folder, 0o755)
        child = zygote.start(load_as_nobody, server.url, names, Path(folder) / "cache")
        try:
            online, offline, all_of_it, error = child.result()
        except PermissionError as refused:
            pytest.skip(f"only root can become another user: {refused}")
    assert online == offline == digest_of({name: arrays[name] for name in names})
    assert all_of_it == digest_of(arrays)
    assert isinstance(error, ndcache.CacheUnavailableError), error
    assert "NDCACHE_HOME" in str(error)


@pytest.mark.parametrize(
    "planted",
    [".ndcache", ".ndcache/locks", ".ndcache/parts", ".ndcache/validators", f".ndcache/locks{SHARD}", SHARD[1:]],
)
@pytest.mark.parametrize("leads_to", ["something", "nothing"])
def test_row_30_the_victim_of_a_planted_link_is_untouched(
    one_shard: CountingServer, cache_dir: Path, tmp_path: Path, planted: str, leads_to: str
) -> None:
    victim = tmp_path / "victim"
    is_file = planted.endswith(".bin")
    victim.mkdir()
    (victim / "file").write_bytes(b"precious")
    target = (victim / "file" if is_file else victim) if leads_to == "something" else victim / "new"
    link = model_directory(cache_dir, one_shard.url) / planted
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    if planted == SHARD[1:]:
        assert ndcache.fetch(one_shard.url) == link.parent
        assert not link.is_symlink()
        assert_fetched(link.parent, one_shard)
    else:
        with pytest.raises(ndcache.UnsafeCacheError):
            ndcache.fetch(one_shard.url)
        assert link.is_symlink()
    assert {path.name: path.read_bytes() for path in victim.iterdir()} == {"file": b"precious"}
