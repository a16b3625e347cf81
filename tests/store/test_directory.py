"""A model's cache directory: lookups, publishing, and files that must not be touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

import ndcache
from ndcache.store.cleanup import check_free_space
from ndcache.store.directory import ModelDirectory
from ndcache.store.housekeeping.deletion import delete_model
from ndcache.store.inventory import cache_root
from ndcache.store.metadata import Match

#: A content ID that no file here was published with.
CONTENT_ID = "tensor-cache.json 0"


def shard(data: bytes, name: str = "params_shard_0.bin", *, md5: bool = True) -> ndcache.Shard:
    digest = hashlib.md5(data).hexdigest() if md5 else None
    return ndcache.Shard(name, len(data), digest, None, "raw-shard", ())


@pytest.fixture
def cache(tmp_path: Path) -> ModelDirectory:
    return ModelDirectory(tmp_path / "scope" / "model", "https://host/model/")


def publish(cache: ModelDirectory, name: str, data: bytes) -> Path:
    with cache.partials.create(name) as partial:
        partial.hasher.add("md5", lambda: None)
        partial.write(data)
        cache.publish(partial, name).close()
    return cache.path(name)


def test_a_partial_file_gets_its_name_when_it_is_published(cache: ModelDirectory) -> None:
    with cache.partials.create("a/b.bin") as partial:
        partial.hasher.add("md5", lambda: None)
        partial.write(b"abc")
        partial.write(b"def")
        assert cache.size("a/b.bin") is None
        with cache.publish(partial, "a/b.bin") as file:
            assert file.read() == b"abcdef"
    assert cache.path("a/b.bin").read_bytes() == b"abcdef"
    assert cache.has(shard(b"abcdef", "a/b.bin"))
    assert cache.compare(shard(b"abcdef", "a/b.bin"), CONTENT_ID) is Match.SAME
    assert list((cache.directory / ".ndcache" / "parts").iterdir()) == []


def test_row_67_a_writer_that_waits_shows_now_and_then_that_it_lives(cache: ModelDirectory) -> None:
    with cache.partials.create("a.bin") as partial:
        os.utime(partial.path, (0, 0))
        before = cache.partials.progress("a.bin")
        partial.touch()
        after = cache.partials.progress("a.bin")
        assert after != before
        os.utime(partial.path, (0, 0))
        partial.touch()
        assert cache.partials.progress("a.bin") == before


def test_a_partial_file_that_is_not_published_leaves_nothing(cache: ModelDirectory) -> None:
    with pytest.raises(ZeroDivisionError), cache.partials.create("a.bin") as partial:
        partial.write(b"abc")
        1 / 0  # noqa: B018
    assert cache.size("a.bin") is None
    assert list((cache.directory / ".ndcache" / "parts").iterdir()) == []


def test_two_writers_of_one_file_do_not_disturb_each_other(cache: ModelDirectory) -> None:
    with cache.partials.create("a.bin") as one, cache.partials.create("a.bin") as two:
        one.write(b"one")
        two.write(b"two")
        assert one.path != two.path
        cache.publish(one, "a.bin").close()
        assert cache.path("a.bin").read_bytes() == b"one"
        opened = open(cache.path("a.bin"), "rb")  # noqa: SIM115 - a reader that began before
        cache.publish(two, "a.bin").close()
    with opened:
        assert opened.read() == b"one"
    assert cache.path("a.bin").read_bytes() == b"two"


def test_nothing_is_created_before_something_is_written(cache: ModelDirectory) -> None:
    assert cache.size("a.bin") is None
    assert cache.read("a.json", 100) is None
    assert cache.metadata("a.bin") is None
    assert delete_model(cache) == 0
    assert not cache.directory.parent.exists()


@pytest.mark.parametrize(
    ("now", "match"),
    [
        (b"abc", Match.SAME),
        (b"abd", Match.UNKNOWN),  # other bytes, written later
        (b"abcd", Match.UNKNOWN),
    ],
)
def test_metadata_hold_only_for_the_file_that_was_published(cache: ModelDirectory, now: bytes, match: Match) -> None:
    path = publish(cache, "params_shard_0.bin", b"abc")
    if now != b"abc":
        path.write_bytes(now)
        os.utime(path, ns=(1, 1))
    assert cache.compare(shard(b"abc"), CONTENT_ID) is match


MANIFEST_1, MANIFEST_2, OTHER_MANIFEST = "tensor-cache.json 1", "tensor-cache.json 2", "tensor-cache-b16.json 3"


@pytest.mark.parametrize(
    ("algorithms", "then", "now", "has_md5", "match"),
    [
        # Nothing was hashed (verify="never"): what the manifest said is remembered.
        ((), "1234", "1234", True, Match.UNKNOWN),
        ((), "1234", "5678", True, Match.DIFFERENT),
        ((), MANIFEST_1, "5678", True, Match.UNKNOWN),  # it may have this digest
        # Without digests, a changed manifest may mean changed shards; another manifest beside it does not.
        ((), MANIFEST_1, MANIFEST_1, False, Match.SAME),
        ((), MANIFEST_1, MANIFEST_2, False, Match.DIFFERENT),
        ((), MANIFEST_1, OTHER_MANIFEST, False, Match.DIFFERENT),
        ((), "1234", MANIFEST_2, False, Match.DIFFERENT),
        # What was hashed needs no content ID.
        (("md5",), "anything", "another thing", True, Match.SAME),
    ],
)
def test_row_11_what_the_manifest_said_of_a_shard_is_remembered(
    cache: ModelDirectory, algorithms: tuple[str, ...], then: str, now: str, has_md5: bool, match: Match
) -> None:
    with cache.partials.create("params_shard_0.bin") as partial:
        for algorithm in algorithms:
            partial.hasher.add(algorithm, lambda: None)
        partial.write(b"abc")
        cache.publish(partial, "params_shard_0.bin", content_id=then).close()
    assert cache.compare(shard(b"abc", md5=has_md5), now) is match


def test_metadata_of_a_new_file_do_not_hold_for_the_one_that_it_replaced(cache: ModelDirectory) -> None:
    publish(cache, "params_shard_0.bin", b"abc")
    with open(cache.path("params_shard_0.bin"), "rb") as old:
        publish(cache, "params_shard_0.bin", b"abd")
        assert cache.compare(shard(b"abc"), CONTENT_ID) is Match.DIFFERENT
        metadata = cache.metadata("params_shard_0.bin")
        assert metadata is not None
        assert (
            metadata.compare(os.fstat(old.fileno()), shard(b"abc"), CONTENT_ID) is not Match.SAME
        )  # it is the new file's
        cache.quarantine("params_shard_0.bin", old)
    assert cache.path("params_shard_0.bin").read_bytes() == b"abd"


def test_row_11_a_note_is_withdrawn_before_another_file_takes_the_name(
    cache: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the rename and the new note, nobody may take the new file for the old one."""
    name, replace, matches = "params_shard_0.bin", os.replace, []
    for data, content_id in (b"abc", MANIFEST_1), (b"abd", MANIFEST_2):
        with cache.partials.create(name) as partial:
            partial.write(data)

            def looked(source: str, target: str, **folders: int) -> None:
                replace(source, target, **folders)
                if target == name:
                    matches.append(cache.compare(shard(b"abc", md5=False), MANIFEST_1))

            monkeypatch.setattr(os, "replace", looked)
            cache.publish(partial, name, content_id=content_id).close()
    assert matches == [Match.UNKNOWN, Match.DIFFERENT]


@pytest.mark.parametrize("seconds", [0, 1, 2])
def test_row_11_a_file_has_another_time_than_the_one_that_it_replaces(
    cache: ModelDirectory, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """Notes know files by size and time; clocks tick slowly, and some file systems keep whole or even seconds only."""
    name, utime, unit = "params_shard_0.bin", os.utime, max(1, seconds * 10**9)

    def rounded(file: int, *, ns: tuple[int, int]) -> None:
        utime(file, ns=(ns[0], ns[1] - ns[1] % unit))

    monkeypatch.setattr(os, "utime", rounded)
    with open(publish(cache, name, b"abc"), "rb") as old, cache.partials.create(name) as partial:
        rounded(old.fileno(), ns=(10**18, 10**18))
        partial.write(b"abd")
        rounded(partial.file.fileno(), ns=(10**18, 10**18))
        with cache.publish(partial, name) as new:
            assert os.fstat(new.fileno()).st_mtime_ns != os.fstat(old.fileno()).st_mtime_ns
    assert cache.is_intact(name)


def test_a_disk_too_full_for_a_note_still_publishes_the_file(
    cache: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with cache.partials.create("params_shard_0.bin") as partial:
        partial.write(b"abc")
        monkeypatch.setattr(json, "dumps", full)
        cache.publish(partial, "params_shard_0.bin").close()
    assert cache.has(shard(b"abc"))
    assert cache.compare(shard(b"abc"), CONTENT_ID) is Match.UNKNOWN
    assert list((cache.directory / ".ndcache" / "validators").iterdir()) == []


def test_a_file_that_another_process_replaces_at_once_is_returned_as_it_was_checked(
    cache: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def overtaken(source: str, target: str, **folders: int) -> None:
        replace(source, target, **folders)
        if target == "params_shard_0.bin":
            monkeypatch.setattr(os, "replace", replace)
            publish(cache, "params_shard_0.bin", b"another version")

    with cache.partials.create("params_shard_0.bin") as partial:
        partial.write(b"abc")
        monkeypatch.setattr(os, "replace", overtaken)
        with cache.publish(partial, "params_shard_0.bin") as file:
            assert file.read() == b"abc"  # these bytes were checked
    assert cache.path("params_shard_0.bin").read_bytes() == b"another version"
    assert cache.is_intact("params_shard_0.bin")


def test_publishing_fails_if_the_partial_file_was_removed_as_an_orphan(cache: ModelDirectory) -> None:
    with cache.partials.create("params_shard_0.bin") as partial:
        partial.write(b"abc")
        partial.path.unlink()
        with pytest.raises(ndcache.CacheUnavailableError) as caught:
            cache.publish(partial, "params_shard_0.bin")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_another_digest_in_the_manifest_means_other_content(cache: ModelDirectory) -> None:
    publish(cache, "params_shard_0.bin", b"abc")
    assert cache.compare(shard(b"abd"), CONTENT_ID) is Match.DIFFERENT
    assert (
        cache.compare(shard(b"abd", md5=False), CONTENT_ID) is Match.DIFFERENT
    )  # and without one, nothing vouches for it


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"nbytes": 3}', b'{"odd": 1}', b"\xff"])
def test_damaged_metadata_count_as_none(cache: ModelDirectory, content: bytes) -> None:
    publish(cache, "params_shard_0.bin", b"abc")
    (cache.directory / ".ndcache" / "validators" / "params_shard_0.bin.json").write_bytes(content)
    assert cache.metadata("params_shard_0.bin") is None
    assert cache.compare(shard(b"abc"), CONTENT_ID) is Match.UNKNOWN


def test_names_with_slashes_and_percent_signs_stay_apart(cache: ModelDirectory) -> None:
    for name, data in (("a/b.bin", b"1"), ("a%2Fb.bin", b"22")):
        publish(cache, name, data)
    assert cache.compare(shard(b"1", "a/b.bin"), CONTENT_ID) is Match.SAME
    assert cache.compare(shard(b"22", "a%2Fb.bin"), CONTENT_ID) is Match.SAME


def test_row_31_a_bad_file_goes_to_quarantine(cache: ModelDirectory) -> None:
    publish(cache, "params_shard_0.bin", b"abc")
    cache.quarantine("params_shard_0.bin")
    cache.quarantine("params_shard_0.bin")
    assert cache.size("params_shard_0.bin") is None
    assert (cache.directory / ".ndcache" / "aside" / "params_shard_0.bin").read_bytes() == b"abc"


@pytest.mark.parametrize("planted", ["a.bin", ".ndcache"])
def test_row_30_a_planted_symlink_leaves_its_victim_alone(cache: ModelDirectory, tmp_path: Path, planted: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_bytes(b"precious")
    cache.directory.mkdir(parents=True)
    target = victim / "file" if planted == "a.bin" else victim
    (cache.directory / planted).symlink_to(target)
    assert cache.size("a.bin") is None
    if planted == ".ndcache":
        with pytest.raises(ndcache.UnsafeCacheError):
            publish(cache, "a.bin", b"abc")
        with pytest.raises(ndcache.UnsafeCacheError):
            delete_model(cache)
        assert sorted(path.name for path in victim.iterdir()) == ["file"]
    else:
        assert publish(cache, "a.bin", b"abc").read_bytes() == b"abc"
        assert not cache.path("a.bin").is_symlink()
    assert (victim / "file").read_bytes() == b"precious"


def test_deleting_frees_everything_and_open_files_stay_readable(cache: ModelDirectory) -> None:
    path = publish(cache, "params_shard_0.bin", b"x" * 100_000)
    os.link(path, path.with_name("another name"))
    with open(path, "rb") as reader:
        assert 200_000 > delete_model(cache) >= 100_000
        assert reader.read() == b"x" * 100_000
    assert list(cache.directory.parent.iterdir()) == []


def test_a_directory_that_ndcache_did_not_make_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"abc")
    with pytest.raises(ndcache.UnsafeCacheError):
        delete_model(ModelDirectory(tmp_path / "photos"))
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_row_29_a_lack_of_room_is_noticed_before_the_download(cache: ModelDirectory, tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_free_space(cache, 0)
    with pytest.raises(ndcache.DiskFullError) as caught:
        check_free_space(cache, free * 2)
    assert caught.value.expected == free * 2
    assert isinstance(caught.value.received, int)
    assert caught.value.errno == errno.ENOSPC


def test_row_30_a_file_in_the_place_of_the_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"abc")
    cache = ModelDirectory(tmp_path / "model")
    assert cache.size("a.bin") is None
    with pytest.raises(ndcache.CacheUnavailableError, match="NDCACHE_HOME"):
        publish(cache, "a.bin", b"abc")


def test_models_are_listed(cache: ModelDirectory, tmp_path: Path) -> None:
    assert ndcache.cache.models(cache_dir=tmp_path) == []
    publish(cache, "a.bin", b"x" * 1000)
    (found,) = ndcache.cache.models(cache_dir=tmp_path)
    assert (found.scope, found.source, found.path) == ("scope", "https://host/model/", cache.directory)
    assert found.size >= 1000


def test_the_root_is_the_option_then_the_variable_then_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(tmp_path / "a", "b") == tmp_path / "a"
    assert cache_root("~/a", None) == tmp_path / "a"
    assert cache_root(None, str(tmp_path / "b")) == tmp_path / "b"
    assert "ndcache" in cache_root(None, None).parts[-1]


def test_new_directories_are_synced_in_those_above(cache: ModelDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    fsync = os.fsync

    def spy(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to see what is synced")
    publish(cache, "a/b/c.bin", b"abc")
    above = {cache.directory / name for name in ("", "a", "a/b")}
    assert above | {cache.directory.parent, cache.directory.parent.parent} <= set(synced)
    synced.clear()
    publish(cache, "a/b/d.bin", b"abc")
    assert {path for path in synced if path.is_dir()} == {cache.directory / "a/b"}


@pytest.mark.parametrize(
    "note",
    [
        *(b"[]", b"null", b"{", b'{"nbytes": 3}', b'{"nbytes": 3, "mtime_ns": 0, "colour": "red"}'),
        *(b'{"nbytes": "3", "mtime_ns": 0}', b'{"nbytes": true, "mtime_ns": 0}', b"[" * 60_000),
        *(b'{"nbytes": 3, "mtime_ns": 0, "digests": null}', b'{"nbytes": 3, "mtime_ns": 0, "digests": {"md5": 1}}'),
        *(b'{"nbytes": 3, "mtime_ns": 0, "etag": 1}', b'{"nbytes": 3, "mtime_ns": 0, "claim": ["x"]}'),
    ],
)
def test_a_note_of_another_form_counts_as_none(cache: ModelDirectory, note: bytes) -> None:
    publish(cache, "params_shard_0.bin", b"abc")
    (cache.directory / ".ndcache" / "validators" / "params_shard_0.bin.json").write_bytes(note)
    assert cache.metadata("params_shard_0.bin") is None
    assert cache.compare(shard(b"abc"), CONTENT_ID) is Match.UNKNOWN


@pytest.mark.parametrize("kind", ["fifo", "symlink", "directory"])
def test_row_30_a_special_file_in_the_place_of_a_note_is_not_read(
    cache: ModelDirectory, tmp_path: Path, kind: str
) -> None:
    publish(cache, "params_shard_0.bin", b"abc")
    note = cache.directory / ".ndcache" / "validators" / "params_shard_0.bin.json"
    note.rename(tmp_path / "real")
    if kind == "fifo":
        os.mkfifo(note)
    elif kind == "symlink":
        note.symlink_to(tmp_path / "real")
    else:
        note.mkdir()
    assert cache.metadata("params_shard_0.bin") is None


@pytest.mark.parametrize("call", ["publish", "open", "quarantine", "size"])
def test_row_30_a_folder_that_is_a_symlink_is_not_followed(cache: ModelDirectory, tmp_path: Path, call: str) -> None:
    publish(cache, "other.bin", b"abc")
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "x.bin").write_bytes(b"precious")
    (cache.directory / "sub").symlink_to(tmp_path / "victim")
    with pytest.raises(ndcache.UnsafeCacheError, match="symbolic link"):
        if call == "publish":
            publish(cache, "sub/x.bin", b"abc")
        elif call == "open":
            cache.open_shard(shard(b"precious", "sub/x.bin"))
        elif call == "quarantine":
            cache.quarantine("sub/x.bin")
        else:
            cache.size("sub/x.bin")
    assert {path.name: path.read_bytes() for path in (tmp_path / "victim").iterdir()} == {"x.bin": b"precious"}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_directories_is_used(
    cache: ModelDirectory, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fsync = os.fsync

    def files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, "not here")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    assert publish(cache, "a.bin", b"abc").read_bytes() == b"abc"


def test_the_next_deletion_empties_the_trash_of_an_interrupted_one(
    cache: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(cache, "a.bin", b"abc")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            delete_model(cache)
    assert [path.suffix for path in cache.directory.parent.iterdir()] == [".deleted"]
    publish(cache, "a.bin", b"abc")
    delete_model(cache)
    assert list(cache.directory.parent.iterdir()) == []
