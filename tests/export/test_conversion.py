"""Convert models: the bytes that the usual writers make, from every source, with little memory, or nothing at all."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import pytest

import ndcache
from ndcache.export import conversion
from ndcache.export.tensors import OutputTensor
from ndcache.format.dtypes import ITEM_SIZES

from ..helpers import models
from ..helpers.devices import SHAPES
from ..helpers.disks import mounted
from ..helpers.loads import Serve, assert_same, flip
from ..helpers.requirements import need_module
from ..helpers.servers import FileServer
from ..helpers.tensor_files import file_bytes, tensor, write_files

#: The dtypes that NumPy has by itself.
PLAIN = [dtype for dtype in ITEM_SIZES if "float8" not in dtype and dtype != "bfloat16"]
NAMES = ["layers.10.w", "layers.9.w", "ä/é", 'quoted "\\"', "line\n\t\x7f", "Z", "empty", "scalar", "x.npy"]
KINDS = ["out.safetensors", "out.npz", "safetensors", "tensor-cache"]

Arrays: TypeAlias = "dict[str, np.ndarray[Any, Any]]"


def tensors(dtypes: list[str]) -> Arrays:
    """Return tensors of each dtype and shape, in no particular order."""
    number = iter(range(10_000))
    return {
        f"{NAMES[n % len(NAMES)]} {dtype} {shape}": models.random_array(shape, dtype, next(number))
        for n, shape in enumerate(SHAPES)
        for dtype in dtypes
    }


def write(model: Path, arrays: Arrays, encoding: str = "raw", **options: Any) -> Path:
    items = list(arrays.items())
    models.write_model(model, [dict(items[::2]), dict(items[1::2])], encoding=encoding, gap=b"x", **options)
    return model


def convert(source: Any, target: Path, **options: Any) -> ndcache.ConvertReport:
    """Convert a model to a file, or to a directory with the name of its format."""
    if target.name in ("safetensors", "tensor-cache"):
        options.setdefault("format", target.name)
    return ndcache.convert(source, target, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the same bytes as the usual writers


@pytest.mark.parametrize("limit", [1, 1 << 20])
def test_a_safetensors_file_is_that_of_the_library(tmp_path: Path, limit: int) -> None:
    save_file = need_module("safetensors.numpy").save_file
    model = write(tmp_path / "model", tensors(list(ITEM_SIZES)), metadata={"ParamSize": 3, "format": "pt"})
    report = ndcache.convert(model, tmp_path / "out.safetensors", memory_limit=limit)
    loaded = ndcache.load(model)
    save_file(dict(loaded), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert report == ndcache.ConvertReport(
        tmp_path / "out.safetensors", "safetensors", tuple(loaded), loaded.nbytes, ()
    )


def test_a_file_without_tensors_is_one_too(tmp_path: Path) -> None:
    models.write_model(tmp_path / "model", [])
    for target in KINDS:
        convert(tmp_path / "model", tmp_path / target)
    need_module("safetensors.numpy").save_file({}, tmp_path / "theirs")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
    np.savez(tmp_path / "theirs.npz")
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "theirs.npz").read_bytes()


def test_an_npz_file_is_that_of_numpy(tmp_path: Path) -> None:
    model = write(tmp_path / "model", tensors(PLAIN))
    ndcache.convert(model, tmp_path / "out.npz", memory_limit=1)
    loaded = ndcache.load(model)
    theirs = io.BytesIO()
    np.savez(theirs, **dict[str, Any](loaded))
    assert (tmp_path / "out.npz").read_bytes() == theirs.getvalue()
    with np.load(tmp_path / "out.npz") as arrays:
        assert_same(dict(arrays), dict(loaded))


@pytest.mark.parametrize("encode", ["raw", "f32-to-bf16", {"*": "f32-to-bf16", "Z float32 (0,)": "raw"}])
def test_a_tensor_cache_is_that_of_dump(tmp_path: Path, encode: Any) -> None:
    model = write(tmp_path / "model", tensors(list(ITEM_SIZES)), metadata={"ParamSize": 3})
    options: dict[str, Any] = {"encode": encode, "shard_bytes": 700}
    convert(model, tmp_path / "tensor-cache", **options)
    loaded = ndcache.load(model)
    ndcache.dump(loaded, tmp_path / "theirs", metadata=loaded.metadata, **options)
    assert contents(tmp_path / "tensor-cache") == contents(tmp_path / "theirs")


def test_a_directory_is_that_of_huggingface_hub(tmp_path: Path) -> None:
    """A tensor larger than a file comes before the file that was begun."""
    sizes = {"b": 60, "a": 60, "large": 300, "c": 30, "e": 0, "d": 10}
    arrays = {name: models.random_array((size,), "uint8", n) for n, (name, size) in enumerate(sizes.items())}
    models.write_model(tmp_path / "model", [arrays], metadata={"ParamSize": 6})
    ndcache.convert(tmp_path / "model", tmp_path / "out", shard_bytes=100)
    files = [["b"], ["large"], ["a", "c", "e", "d"]]
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for name, file in zip(names, files, strict=True):
        path = tmp_path / "theirs"
        need_module("safetensors.numpy").save_file({key: arrays[key] for key in file}, path, metadata={"format": "pt"})
        assert (tmp_path / "out" / name).read_bytes() == path.read_bytes()
    index = {
        "metadata": {"total_size": 460},
        "weight_map": {key: name for name, file in zip(names, files, strict=True) for key in file},
    }
    assert (tmp_path / "out" / "model.safetensors.index.json").read_text() == json.dumps(index, indent=2)
    assert len(os.listdir(tmp_path / "out")) == 4


# --- values, and what becomes of them


@pytest.mark.parametrize("target", KINDS)
def test_float32_that_is_stored_as_bfloat16(tmp_path: Path, target: str) -> None:
    arrays = {"a": models.random_array((3, 1001)), "b": models.random_array((5,), "float16")}
    model = write(tmp_path / "model", arrays, "f32-to-bf16")
    convert(model, tmp_path / target, memory_limit=1)
    dumped = tmp_path / "dumped"
    ndcache.dump(ndcache.load(model), dumped, encode="raw")
    convert(dumped, tmp_path / "raw" / target)
    written = tmp_path / target
    if written.is_file():
        assert written.read_bytes() == (tmp_path / "raw" / target).read_bytes()
    else:
        assert contents(written) == contents(tmp_path / "raw" / target)
    if not target.endswith(".npz"):
        report = convert(model, tmp_path / "stored" / target, decode=False)
        assert (report.nbytes, report.halved) == (2 * 3003 + 10, ())
        report = convert(model, tmp_path / "stored again" / target, encode="f32-to-bf16")
        assert (report.nbytes, report.halved) == (2 * 3003 + 10, ())


def test_halved_tensors_are_named(tmp_path: Path) -> None:
    arrays = {"a": models.random_array((3, 3)), "b": models.random_array((5,), "float16"), "c": models.random_array(())}
    model = write(tmp_path / "model", arrays)
    report = ndcache.convert(model, tmp_path / "out.safetensors", encode={"c": "raw", "*": "f32-to-bf16"})
    assert report.halved == ("a",)
    with need_module("safetensors").safe_open(tmp_path / "out.safetensors", "numpy") as file:
        assert [file.get_slice(name).get_dtype() for name in "abc"] == ["BF16", "F16", "F32"]
    data = (tmp_path / "out.safetensors").read_bytes()
    assert models.through_bf16(arrays["a"]).astype(ml_dtypes.bfloat16).tobytes() in data


@pytest.mark.parametrize("target", KINDS)
def test_a_model_that_is_converted_again_has_the_same_files(tmp_path: Path, serve: Serve, target: str) -> None:
    arrays = {f"t{n}": models.random_array((n % 7 * 40 + 1,), seed=n) for n in range(40)}
    model = write(tmp_path / "model", arrays, metadata={"ParamSize": 40})
    options: dict[str, Any] = {} if target.startswith("out") else {"shard_bytes": 2000}
    convert(model, tmp_path / "1" / target, **options)
    convert(serve(model).url, tmp_path / "2" / target, **options)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    if target == "tensor-cache":
        convert(tmp_path / "1" / target, tmp_path / "3" / target, **options)
        assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_names_choose_tensors_and_rows(tmp_path: Path) -> None:
    arrays = {f"t{n}": models.random_array((10, 3), seed=n) for n in range(4)}
    model = write(tmp_path / "model", arrays)
    asked: list[str] = []

    def odd(name: str) -> bool:
        asked.append(name)
        return int(name[1:]) % 2 == 1

    ndcache.convert(model, tmp_path / "odd.npz", names=odd)
    assert len(asked) == 4
    ndcache.convert(model, tmp_path / "rows.npz", names={"t2": slice(-3, None)}, memory_limit=1)
    ndcache.convert(model, tmp_path / "one.npz", names=iter(["t0"]))
    for name, expected in {
        "odd": {name: arrays[name] for name in ("t1", "t3")},
        "rows": {"t2": arrays["t2"][-3:]},
        "one": {"t0": arrays["t0"]},
    }.items():
        with np.load(tmp_path / f"{name}.npz") as found:
            assert_same(dict(found), expected)


def test_metadata(tmp_path: Path) -> None:
    model = write(tmp_path / "model", {"a": np.ones(3)}, metadata={"n": 1})
    convert(model, tmp_path / "tensor-cache", metadata={"other": [2]})
    assert ndcache.read_manifest(tmp_path / "tensor-cache").metadata == {"other": [2]}
    ndcache.convert(model, tmp_path / "out.safetensors", metadata={"b": "1", "a": "2"})
    assert b'{"__metadata__":{"a":"2","b":"1"},' in (tmp_path / "out.safetensors").read_bytes()
    with pytest.raises(TypeError, match=r"metadata\['n'\] must be a string"):
        ndcache.convert(model, tmp_path / "out.safetensors", metadata={"n": 1})


@pytest.mark.parametrize("name", ["model", "unusual"])
def test_files_of_an_index_become_one_that_transformers_accepts(tmp_path: Path, name: str) -> None:
    arrays = {key: np.ones(3, np.float32) for key in ("a", "b")}
    write_files(tmp_path / "model", arrays, 2, name)
    ndcache.convert(tmp_path / "model", tmp_path / "out.safetensors")
    header = ndcache.read_manifest(tmp_path / "out.safetensors")
    assert header.metadata == {"format": "pt"}


# --- what a target cannot hold


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_row_107_npz_has_no_name_for_the_dtypes_of_ml_dtypes(tmp_path: Path, serve: Serve, dtype: str) -> None:
    server = serve(write(tmp_path / "model", {"good": np.ones(3), "bad": models.random_array((4,), dtype)}))
    (tmp_path / "out.npz").write_bytes(b"before")
    with pytest.raises(ndcache.UnsupportedDtypeError, match=rf"'bad' has the dtype {dtype}.*\.safetensors"):
        ndcache.convert(server.url, tmp_path / "out.npz")
    assert server.shard_requests() == []
    assert (tmp_path / "out.npz").read_bytes() == b"before"
    ndcache.convert(server.url, tmp_path / "out.npz", names="good")
    with pytest.raises(ndcache.UnsupportedDtypeError, match="'float' would become bfloat16"):
        ndcache.convert(
            write(tmp_path / "other", {"float": np.ones(3, np.float32)}), tmp_path / "out.npz", encode="f32-to-bf16"
        )


@pytest.mark.parametrize(
    ("name", "target"), [("__metadata__", "out.safetensors"), ("nul\0", "out.npz"), ("n" * 65_532, "out.npz")]
)
def test_row_107_names_that_a_target_cannot_hold(tmp_path: Path, name: str, target: str) -> None:
    model = write(tmp_path / "model", {name: np.ones(3)})
    with pytest.raises(ndcache.UnsupportedFormatError, match=r"can be called '(__m|nul|nnn)"):
        ndcache.convert(model, tmp_path / target)
    assert os.listdir(tmp_path) == ["model"]


# --- failures leave nothing behind


@pytest.fixture
def before(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return a function that makes a target; after the test, it must be as it was, and nothing else be there."""
    made: list[Path] = []

    def make(kind: str) -> Path:
        folder = tmp_path / "targets"
        folder.mkdir()
        if kind.startswith("out"):
            (folder / kind).write_bytes(b"before")
        else:
            (folder / kind).mkdir()
            for name in ("model-00001-of-00009.safetensors", "params_shard_0.bin", "params_shard_7.bin", "mine.txt"):
                (folder / kind / name).write_bytes(b"before")
        made.append(folder)
        return folder / kind

    yield make
    for folder in made:
        found = contents(folder)
        assert set(found.values()) == {b"before"}, sorted(found)
        assert len(found) in (1, 4)
        assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("target", KINDS)
def test_row_108_a_source_that_fails_in_the_middle(
    tmp_path: Path, serve: Serve, before: Callable[[str], Path], target: str
) -> None:
    models.simple_model(tmp_path / "model")
    server = serve(tmp_path / "model")
    flip(tmp_path / "model" / "params_shard_2.bin")
    for path in (before(target), tmp_path / "new" / "folders" / target):
        with pytest.raises(ndcache.ChecksumError, match="params_shard_2"):
            convert(server.url, path, retries=0)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("target", KINDS)
def test_row_108_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Callable[[str], Path], target: str
) -> None:
    models.simple_model(tmp_path / "model")
    original = OutputTensor.encode

    def encode(tensor: OutputTensor, pieces: Any) -> Any:
        if tensor.name == "layer.2":
            signal.raise_signal(signal.SIGINT)
        return original(tensor, pieces)

    monkeypatch.setattr(OutputTensor, "encode", encode)
    for path in (before(target), tmp_path / "new" / target):
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "model", path)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 3 MiB."""
    with mounted(tmp_path / "disk") as folder:
        yield folder


@pytest.mark.parametrize("target", KINDS)
def test_row_109_a_full_disk(
    tmp_path: Path, small_disk: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    models.simple_model(tmp_path / "model", shards=8, shard_bytes=1 << 19)
    server = serve(tmp_path / "model")
    with pytest.raises(ndcache.DiskFullError, match="bytes needed") as caught:
        convert(server.url, small_disk / target)
    assert (caught.value.expected, caught.value.received) == (4 << 20, shutil.disk_usage(small_disk).free)
    assert server.shard_requests() == []
    monkeypatch.setattr(conversion, "_check_free_space", lambda *_: None)  # somebody else fills the disk meanwhile
    with pytest.raises(ndcache.DiskFullError, match="no room for"):
        convert(server.url, small_disk / target)
    assert os.listdir(small_disk) == []


def test_row_109_a_dump_onto_a_full_disk(small_disk: Path) -> None:
    target = small_disk / "model"
    with pytest.raises(ndcache.DiskFullError, match=rf"no room for {re.escape(str(target))}") as caught:
        ndcache.dump({"a": np.zeros(1 << 20, np.float32)}, target, encode="raw")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(small_disk) == []


@pytest.mark.once
@pytest.mark.parametrize("target", KINDS)
def test_a_target_in_a_file_is_named_as_it_was_given(tmp_path: Path, target: str) -> None:
    model = write(tmp_path / "model", {"a": np.zeros(10)})
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught:
        convert(model, tmp_path / "file" / target)
    assert str(caught.value.filename) == str(tmp_path / "file" / target)


# --- targets that are there


@pytest.mark.parametrize("old", ["tensor-cache", "safetensors"])
def test_an_older_model_in_the_other_format_goes_unless_it_is_the_source(tmp_path: Path, old: Any) -> None:
    new, target = "safetensors" if old == "tensor-cache" else "tensor-cache", tmp_path / "target"
    ndcache.dump({"old": np.zeros(4, np.float32)}, tmp_path / "old")
    ndcache.dump({"new": np.ones(4, np.float32)}, tmp_path / "new")
    convert(tmp_path / "old", target, format=old)
    (target / "mine.json").write_text("{}")
    convert(tmp_path / "new", target, format=new)
    with ndcache.load(target) as weights:
        assert list(weights) == ["new"]
    names = {"model.safetensors", "model.safetensors.index.json", "mine.json"}
    if new == "tensor-cache":
        names = {"tensor-cache.json", "params_shard_0.bin", "mine.json"}
    assert {path.name for path in target.iterdir()} == names
    convert(target, target, format=old)
    assert {path.name for path in target.iterdir()} > names


def test_an_older_model_is_replaced(tmp_path: Path) -> None:
    model = write(tmp_path / "model", {f"t{n}": np.full(10, n) for n in range(6)})
    for target in KINDS:
        for shard_bytes in (100, 1000):
            convert(model, tmp_path / target, shard_bytes=shard_bytes)
        convert(model, tmp_path / "new" / target)
    (tmp_path / "safetensors" / "model.safetensors.backup").write_bytes(b"mine")
    convert(model, tmp_path / "safetensors")
    assert contents(tmp_path / "safetensors") == {
        **contents(tmp_path / "new" / "safetensors"),
        "model.safetensors.backup": b"mine",
    }
    assert contents(tmp_path / "tensor-cache") == contents(tmp_path / "new" / "tensor-cache")
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "new" / "out.npz").read_bytes()


def test_a_model_is_converted_into_itself(tmp_path: Path) -> None:
    arrays = models.simple_model(tmp_path / "model")
    with ndcache.load(tmp_path / "model") as weights:
        convert(tmp_path / "model", tmp_path / "model", format="tensor-cache", encode="f32-to-bf16")
        assert_same(weights, arrays)  # the files that are mapped stay as they are
    rounded = {name: models.through_bf16(array) for name, array in arrays.items()}
    assert_same(ndcache.load(tmp_path / "model"), rounded)
    ndcache.convert(tmp_path / "model", tmp_path / "model" / "model.safetensors")
    assert_same(ndcache.load(tmp_path / "model"), rounded)


def test_links_are_followed_and_the_mode_is_the_usual_one(tmp_path: Path) -> None:
    model = write(tmp_path / "model", {"a": np.ones(3)})
    (tmp_path / "link.npz").symlink_to(tmp_path / "elsewhere.npz")
    (tmp_path / "folder").symlink_to(tmp_path / "there", target_is_directory=True)
    usual = os.stat(tmp_path / "model" / "tensor-cache.json").st_mode, os.stat(tmp_path / "model").st_mode
    ndcache.convert(model, tmp_path / "link.npz")
    ndcache.convert(model, tmp_path / "folder")
    assert (tmp_path / "link.npz").is_symlink()
    assert (tmp_path / "folder").is_symlink()
    found = os.stat(tmp_path / "elsewhere.npz").st_mode, os.stat(tmp_path / "there").st_mode
    assert found == usual
    assert os.stat(tmp_path / "there" / "model.safetensors").st_mode == usual[0]


@pytest.mark.parametrize("name", ["out.npz", "out.safetensors"])
def test_a_private_file_stays_private(tmp_path: Path, name: str) -> None:
    model = write(tmp_path / "model", {"a": np.ones(3)})
    (tmp_path / name).touch(0o600)
    ndcache.convert(model, tmp_path / name)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


# --- memory


@pytest.mark.once
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("encoding", ["raw", "f32-to-bf16"])
def test_memory_is_bounded_however_large_a_tensor_is(tmp_path: Path, encoding: str) -> None:
    """The peak of the process's memory is compared with what it had after converting a small model."""
    model, nbytes = tmp_path / "model", 192 << 20
    models.write_model(tmp_path / "small", [{"a": np.ones(3, np.float32)}], encoding=encoding)
    manifest = models.write_model(model, [{"a": np.ones(3, np.float32)}], encoding=encoding, md5=False)
    (record,) = manifest["records"][0]["records"]
    manifest["records"][0]["nbytes"] = record["nbytes"] = nbytes
    record["shape"] = [nbytes // (2 if encoding == "f32-to-bf16" else 4)]
    (model / "tensor-cache.json").write_text(json.dumps(manifest))
    os.truncate(model / "params_shard_0.bin", nbytes)
    script = f"""
        import ndcache
        def memory(field):
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))
        for target in {KINDS!r}:
            format = None if "." in target else target
            for folder in ("small", "model"):
                with open("/proc/self/clear_refs", "w") as file:
                    file.write("5")  # begin a new peak
                before = memory("VmRSS")
                path = {str(tmp_path)!r} + "/" + folder
                ndcache.convert(path, path + "-" + target, format=format, memory_limit=16 << 20)
            print(memory("VmHWM") - before)
    """
    output = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True, text=True)
    growth = [int(line) >> 20 for line in output.stdout.split()]
    assert len(growth) == len(KINDS)
    assert max(growth) <= 16 + 64, growth


@pytest.mark.once
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_file_is_split_with_little_memory(tmp_path: Path) -> None:
    nbytes = 192 << 20
    for name, size in (("small", 8), ("large", nbytes)):
        data = {"a": tensor("U8", [size], 0, size)}
        (tmp_path / f"{name}.safetensors").write_bytes(file_bytes(data))
    for name, size in (("small", 8), ("large", nbytes)):
        path = tmp_path / f"{name}.safetensors"
        os.truncate(path, path.stat().st_size + size)
    script = f"""
        import ndcache
        def memory(field):
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))
        for name in ("small", "large"):
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # begin a new peak
            before = memory("VmRSS")
            path = {str(tmp_path)!r} + "/" + name
            ndcache.convert(path + ".safetensors", path, format="safetensors", memory_limit=16 << 20)
        print(memory("VmHWM") - before)
    """
    output = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True, text=True)
    assert int(output.stdout) >> 20 <= 16 + 64


@pytest.mark.once
def test_the_command(tmp_path: Path) -> None:
    """Print one line, and one more about halved tensors; a mistake is one line."""
    model = write(tmp_path / "model", {"a": np.ones(300, np.float32), "b": np.ones(3, np.float16)})
    command = [sys.executable, "-m", "ndcache", "convert", str(model)]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)

    done = run("out.safetensors", "-q", "--encode", "f32-to-bf16")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"{tmp_path / 'out.safetensors'}: 2 tensors, 606 B\nfloat32 became bfloat16 in 1 tensor: a\n"
    )
    refused = run("https://host/x.npz")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "it must be a path on this machine, not 'https://host/x.npz'" in refused.stderr


def test_the_server_is_asked_once(tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    arrays = models.simple_model(tmp_path / "model")
    server = serve(tmp_path / "model")
    reports: list[ndcache.ProgressReport] = []
    ndcache.convert(server.url, tmp_path / "out.npz", progress=reports.append)
    assert len(server.shard_requests()) == len(arrays)
    assert reports[-1].progress == 1.0
    ndcache.convert(server.url, tmp_path / "again.npz", offline=True)
    assert len(server.shard_requests()) == len(arrays)
