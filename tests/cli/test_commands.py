"""Test the command line: in real processes for exit statuses, signals and streams, else with click's runner."""

from __future__ import annotations

import configparser
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click.testing
import filelock
import ml_dtypes
import numpy as np
import pytest
from packaging.requirements import Requirement

import ndcache
from ndcache.cli import commands as cli
from ndcache.cli import doctor, options
from ndcache.cli.output import print_table

from ..helpers.commands import new_runner
from ..helpers.companions import mlc_model
from ..helpers.models import random_array, simple_model, through_bf16, write_model
from ..helpers.requirements import need_module
from ..helpers.servers import Connection, FileServer, Request, ScriptedServer, Step, reply, then_stall

ROOT = Path(__file__).parents[2]
DIGEST = f"sha256-{'A' * 43}="
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="signals and terminals of POSIX")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # so that the commands do not set it
    monkeypatch.setenv("PYTHONPATH", str(Path(ndcache.__file__).parents[1]))  # the package may not be installed
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def invoke(*args: object) -> click.testing.Result:
    result = new_runner().invoke(cli.main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "ndcache", *map(str, args)]


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=120, check=False)


def wait_until(happened: Callable[[], Any], process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not happen in 60 seconds"
        time.sleep(0.01)


def real_files(directory: Path) -> list[str]:
    """Return the names of the files in the cache, without ndcache's own state."""
    found = (path for path in directory.glob("[!.]*/**/*") if path.is_file() and ".ndcache" not in path.parts)
    return sorted(path.name for path in found)


# --- load, fetch --------------------------------------------------------------------------------------


@pytest.mark.once
def test_load_reports_on_standard_output(tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    simple_model(tmp_path / "model", shards=4, shard_bytes=1 << 20)
    server = serve(tmp_path / "model")
    first, second = run("load", server.url), run("load", server.url)
    assert first.returncode == second.returncode == 0
    lines = dict(line.split(None, 1) for line in first.stdout.replace("from ", "from_").splitlines())
    assert lines["source"] == server.url
    assert lines["device"] == "cpu"
    assert lines["tensors"] == "4, 4.0 MiB"
    assert re.fullmatch(r"[0-9.]+ s, [0-9.,]+ MiB/s", lines["time"])
    assert lines["from_network"] == "4.0 MiB in 5 requests"
    assert lines["from_cache"] == "0 B"
    assert lines["checked"] == "4 shards: 4 by md5"
    assert re.search(r"^from network +0 B in 1 request$", second.stdout, re.M)
    assert re.search(r"^from cache +4.0 MiB$", second.stdout, re.M)
    assert re.fullmatch(r"Fetched [\d.:]+: 4\.0 MiB in 4 shards, .*B/s", first.stderr.splitlines()[-1])
    assert re.fullmatch(r"Mapped [\d.:]+: 4\.0 MiB in 4 shards, [^/]*s\n", second.stderr)
    assert "\r" not in first.stderr


@pytest.mark.once
def test_quiet_load_prints_nothing_on_standard_error(tmp_path: Path) -> None:
    simple_model(tmp_path / "model")
    result = run("load", tmp_path / "model", "-q", "--device", "auto")
    assert result.returncode == 0
    assert result.stderr == ""
    assert re.search(r"^in place +256.0 KiB$", result.stdout, re.M)
    assert re.search(r"^checked +4 shards: 4 by size alone$", result.stdout, re.M)


@pytest.mark.once
def test_row_40_secrets_of_the_source_are_not_printed(tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    simple_model(tmp_path / "model")
    url = serve(tmp_path / "model").url.replace("http://", "http://user:hunter2@") + "?key=hunter2"
    for result in (run("load", url), run("ls"), run("load", url + "&more", "--names", "none"), run("rm", url)):
        assert "hunter2" not in result.stdout + result.stderr
    assert result.returncode == 0


def test_load_only_some_tensors(tmp_path: Path) -> None:
    simple_model(tmp_path / "model")
    result = invoke("load", tmp_path / "model", "--names", "layer.0", "--names", "layer.[12]", "-q")
    assert re.search(r"^tensors +3, 192.0 KiB$", result.stdout, re.M)


def test_load_without_decoding(tmp_path: Path) -> None:
    write_model(tmp_path / "model", [{"a": random_array((512,))}], encoding="f32-to-bf16")
    assert re.search(r"^tensors +1, 2.0 KiB$", invoke("load", tmp_path / "model").stdout, re.M)
    assert re.search(r"^tensors +1, 1.0 KiB$", invoke("load", tmp_path / "model", "--no-decode").stdout, re.M)


@pytest.mark.once
def test_load_names_the_gpu(tmp_path: Path, gpu: Any) -> None:
    simple_model(tmp_path / "model")
    result = run("load", tmp_path / "model", "--device", "gpu", "-q")
    assert result.returncode == 0, result.stderr
    assert re.search(rf"^device +{re.escape(gpu.adapter.info['device'])}, \w+, \w+$", result.stdout, re.M)


def test_fetch_prints_only_the_path(tmp_path: Path, serve: Callable[..., FileServer], cache_dir: Path) -> None:
    arrays = simple_model(tmp_path / "model")
    result = run("fetch", serve(tmp_path / "model").url)
    assert result.returncode == 0
    directory = Path(result.stdout.removesuffix("\n"))
    assert cache_dir in directory.parents
    assert set(ndcache.load(directory)) == set(arrays)


def test_cache_dir_and_scope(tmp_path: Path, serve: Callable[..., FileServer], cache_dir: Path) -> None:
    simple_model(tmp_path / "model")
    other = ("--cache-dir", tmp_path / "other", "--scope", "my app")
    assert invoke("fetch", serve(tmp_path / "model").url, *other, "-q").stdout.startswith(str(tmp_path / "other"))
    assert not cache_dir.exists()
    (model,) = json.loads(invoke("ls", *other, "--json").stdout)
    assert model["scope"] == "my app"
    assert invoke("ls", "--cache-dir", tmp_path / "other", "--scope", "elsewhere").stdout == ""


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], {"offline": False}),
        (["--max-workers", "3"], {"max_workers": 3}),
        (["--processes", "3"], {"processes": 3}),
        (["--processes", "auto"], {"processes": "auto"}),
        (["--timeout", "2.5"], {"timeout": 2.5}),
        (["--timeout", "2.5,60"], {"timeout": (2.5, 60.0)}),
        (["--retries", "0"], {"retries": 0}),
        (["--verify", "always"], {"verify": "always"}),
        (["--offline"], {"offline": True}),
        (["--mirror", "http://a/", "--mirror", "hf://b/c"], {"mirrors": ("http://a/", "hf://b/c")}),
        (["--memory-limit-mib", "64"], {"memory_limit": 64 << 20}),
    ],
)
def test_options_reach_the_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], expected: dict[str, object]
) -> None:
    simple_model(tmp_path / "model")
    given: dict[str, object] = {}

    class Spy(ndcache.Loader):
        def __init__(self, **options: Any) -> None:
            given.update(options)
            super().__init__(**options)

    monkeypatch.setattr(options, "Loader", Spy)
    assert invoke("fetch", tmp_path / "model", "-q", *args).exit_code == 0
    assert given == {"offline": False} | expected


def test_companion_files_and_a_directory_of_the_users(tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    mlc_model(tmp_path / "model")
    (tmp_path / "model" / "README.md").touch()
    url, target = serve(tmp_path / "model").url, tmp_path / "target"
    invoke("fetch", url, "-q", "--local-dir", target, "--include", "README.md", "--exclude", "*_config.json")
    names = {path.name for path in target.iterdir() if path.suffix != ".bin"}
    assert names == {".ndcache", "README.md", "mlc-chat-config.json", "tensor-cache.json", "tokenizer.json"}
    result = invoke("fetch", url, "-q", "--include", "*.md")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: include has the pattern '*.md', and there is no listing of the files")
    directory = Path(invoke("fetch", url, "-q", "--no-files").stdout.strip())
    assert not (directory / "mlc-chat-config.json").exists()
    assert invoke("fetch", url, "-q").exit_code == 0
    good = invoke("verify", url).stdout.splitlines()[0]
    assert "3 shards and 3 companion files, " in good
    (directory / "tokenizer.json").write_text("damaged")
    result = invoke("verify", url)
    assert result.exit_code == 1
    assert "error: 1 file bad and set aside; the next load downloads it again" in result.stderr


def test_retries_can_be_switched_off(scripted: ScriptedServer) -> None:
    scripted.script["/tensor-cache.json"] = [reply(500)]
    result = run("fetch", scripted.url, "--retries", "0")
    assert result.returncode == 1
    assert len(scripted.requests) == 1


# --- inspect, ls, rm, verify --------------------------------------------------------------------------


def mixed_model(directory: Path) -> None:
    shards = [
        {"a.q_weight": random_array((8, 4), "uint32"), "a.norm": random_array((6,))},
        {"scalar": random_array((), "float16")},
    ]
    write_model(directory, shards, encoding="f32-to-bf16", metadata={"ParamSize": 3})


def test_inspect_shows_shards_tensors_and_totals(tmp_path: Path) -> None:
    mixed_model(tmp_path / "model")
    lines = [re.sub(r" {2,}", "|", line.strip()) for line in invoke("inspect", tmp_path / "model").stdout.splitlines()]
    assert "params_shard_0.bin|140 B|2|md5" in lines
    assert "a.norm|[6]|float32 as bfloat16|12 B|params_shard_0.bin" in lines
    assert "scalar|[]|float16|2 B|params_shard_1.bin" in lines
    assert "uint32|1|128 B" in lines
    assert lines[-1] == "3 tensors, 142 B, 2 shards"


def test_inspect_prints_json(tmp_path: Path) -> None:
    mixed_model(tmp_path / "model")
    result = run("inspect", tmp_path / "model", "--json")
    assert result.stderr == ""
    value = json.loads(result.stdout)
    assert value["metadata"] == {"ParamSize": 3}
    assert (value["tensors"], value["nbytes"], len(value["shards"])) == (3, 142, 2)
    assert value["dtypes"]["float32 as bfloat16"] == {"tensors": 1, "nbytes": 12}
    assert value["shards"][0]["tensors"][1] == {
        "name": "a.norm",
        "shape": [6],
        "dtype": "float32",
        "stored_dtype": "bfloat16",
        "offset": 128,
        "nbytes": 12,
    }


def test_very_long_json_is_on_one_line(tmp_path: Path) -> None:
    ndcache.dump({f"layer.{number}": np.zeros((), np.uint8) for number in range(12_000)}, tmp_path / "model")
    printed = invoke("inspect", tmp_path / "model", "--json").stdout
    assert len(printed) > 1 << 20
    assert printed.count("\n") == 1
    assert len(json.loads(printed)["shards"][0]["tensors"]) == 12_000


def test_inspect_fetches_no_shard(tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    simple_model(tmp_path / "model")
    server = serve(tmp_path / "model")
    assert invoke("inspect", server.url).exit_code == 0
    assert server.shard_requests() == []


def test_names_with_control_characters_are_escaped(tmp_path: Path) -> None:
    name = "[bold]:smile:[/bold][/nothing]\x1b[31m\r\x9b2J\u202e" + "long" * 100
    write_model(tmp_path / "model", [{name: random_array((1,))}])
    shown = "[bold]:smile:[/bold][/nothing]\\x1b[31m \\x9b2J\\u202e" + "long" * 100
    assert shown in invoke("inspect", tmp_path / "model").stdout
    result = invoke("load", tmp_path / "model", "--names", "\x1b[31m", "-q")
    assert "\x1b" not in result.stderr


def test_ls_and_rm(tmp_path: Path, serve: Callable[..., FileServer], cache_dir: Path) -> None:
    simple_model(tmp_path / "model")
    url = serve(tmp_path / "model").url
    empty = invoke("ls")
    assert (empty.exit_code, empty.stdout, empty.stderr) == (0, "", f"no model in {cache_dir}\n")
    assert invoke("ls", "--json").stdout == "[]\n"
    path = invoke("fetch", url, "-q").stdout.strip()
    header, row, empty_line, total = invoke("ls").stdout.splitlines()
    assert header.split() == ["source", "state", "size", "age", "last", "use"]
    assert re.fullmatch(rf"{re.escape(url)}  complete  (25\d\.\d KiB)  now  now", row)
    assert (empty_line, total) == ("", f"1 model, {row.split()[2]} KiB")
    assert invoke("ls", "--paths").stdout.splitlines()[1].endswith(path)
    assert invoke("ls", "-q").stdout == f"{url}\n"
    (model,) = json.loads(invoke("ls", "--json").stdout)
    assert (model["source"], model["path"]) == (url, path)
    removed = invoke("rm", url)
    assert re.fullmatch(rf"{re.escape(url)}: 25\d\.\d KiB freed\n", removed.stdout)
    assert not Path(path).exists()
    again = invoke("rm", url)
    assert (again.exit_code, again.stdout, again.stderr) == (1, "", f"error: {url} is not in the cache\n")


def test_rm_accepts_paths_of_ls_and_continues_after_an_error(tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    simple_model(tmp_path / "model")
    path = invoke("fetch", serve(tmp_path / "model").url, "-q").stdout.strip()
    result = invoke("rm", tmp_path / "model", path)
    assert result.exit_code == 1
    assert "does not lie in the cache" in result.stderr
    assert not Path(path).exists()
    assert (tmp_path / "model" / "tensor-cache.json").exists()


def test_row_31_verify_finds_what_is_bad_and_the_next_load_repairs_it(
    tmp_path: Path, serve: Callable[..., FileServer]
) -> None:
    simple_model(tmp_path / "model")
    url = serve(tmp_path / "model").url
    directory = Path(invoke("fetch", url, "-q").stdout.strip())
    good = invoke("verify", url)
    assert (good.exit_code, good.stdout) == (0, "good  4 shards, 256.0 KiB: 4 by md5\n")
    (directory / "params_shard_1.bin").write_bytes(b"\0" * (1 << 16))
    (directory / "params_shard_2.bin").unlink()
    bad = run("verify", url)
    assert bad.returncode == 1
    assert re.search(r"^good +2 shards, 128.0 KiB: 2 by md5$", bad.stdout, re.M)
    assert re.search(r"^bad +params_shard_1.bin$", bad.stdout, re.M)
    assert re.search(r"^missing +1 shard, not downloaded yet$", bad.stdout, re.M)
    assert bad.stderr == "error: 1 shard bad and set aside; the next load downloads it again\n"
    assert invoke("load", url, "-q").exit_code == 0
    assert invoke("verify", url).exit_code == 0


# --- dump ---------------------------------------------------------------------------------------------


def test_dump_of_npz(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {f"layer.{index}": random_array((300, 1024), seed=index) for index in range(3)}
    np.savez(tmp_path / "in.npz", **arrays)
    result = invoke("dump", tmp_path / "in.npz", tmp_path / "out", "--encode", "raw", "--shard-mib", "2")
    assert result.stdout == f"{tmp_path / 'out'}: 3 tensors, 3.5 MiB, 3 shards\n"
    for name, array in ndcache.load(tmp_path / "out").items():
        np.testing.assert_array_equal(array, arrays[name])


def test_dump_of_safetensors(tmp_path: Path) -> None:
    numpy_files = pytest.importorskip("safetensors.numpy")
    arrays = {"a": random_array((8,)), "b": random_array((3, 3), "bfloat16")}
    numpy_files.save_file(arrays, tmp_path / "in.safetensors")
    result = invoke("dump", tmp_path / "in.safetensors", tmp_path / "out")
    assert result.stdout.endswith(": 2 tensors, 34 B, 1 shard\nfloat32 became bfloat16 in 1 tensor: a\n")
    loaded = ndcache.load(tmp_path / "out")
    np.testing.assert_array_equal(loaded["a"], arrays["a"].astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(loaded["b"], arrays["b"])


def test_dump_of_a_model(tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    arrays = simple_model(tmp_path / "model", shards=2)
    for source in (tmp_path / "model", tmp_path / "model" / "tensor-cache.json", serve(tmp_path / "model").url):
        result = invoke("dump", source, tmp_path / "out")
        assert result.stdout == (
            f"{tmp_path / 'out'}: 2 tensors, 64.0 KiB, 1 shard\n"
            "float32 became bfloat16 in 2 tensors: layer.0, layer.1\n"
        )
        for name, array in ndcache.load(tmp_path / "out").items():
            np.testing.assert_array_equal(array, through_bf16(arrays[name]))
    assert invoke("dump", tmp_path / "model", tmp_path / "out.npz").stderr.startswith("error: the target ")


def test_dump_takes_the_path_of_a_manifest_for_its_directory(tmp_path: Path) -> None:
    simple_model(tmp_path / "model", shards=2)
    result = invoke("dump", tmp_path / "model", tmp_path / "out" / "tensor-cache.json", "--json")
    assert (result.exit_code, json.loads(result.stdout)["path"]) == (0, str(tmp_path / "out"))
    assert (tmp_path / "out" / "tensor-cache.json").is_file()


def test_dump_runs_no_pickle(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    np.savez(tmp_path / "in.npz", trap=np.array([Trap()], dtype=object))
    result = invoke("dump", tmp_path / "in.npz", tmp_path / "out")
    assert result.exit_code == 1
    assert "array 'trap'" in result.stderr
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["in.npz", "in.safetensors", "in.bin"])
@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 no", b"\x08\0\0\0\0\0\0\0{}{}{}{}"])
def test_dump_of_garbage_is_one_line(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = invoke("dump", tmp_path / name, tmp_path / "out")
    assert result.exit_code == 1
    assert re.fullmatch(rf"error: .*{re.escape(name)}.*\n", result.stderr)


# --- doctor -------------------------------------------------------------------------------------------


@pytest.mark.once
def test_doctor_shows_what_is_installed(tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    simple_model(tmp_path / "model")
    assert invoke("fetch", serve(tmp_path / "model").url, "-q").exit_code == 0
    result = run("doctor")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(rf"^ndcache +{re.escape(ndcache.__version__)}$", result.stdout, re.M)
    assert re.search(rf"^numpy +{re.escape(np.__version__)}$", result.stdout, re.M)
    assert re.search(r"^models +1, 2\d\d\.\d KiB$", result.stdout, re.M)
    assert re.search(r"^disk +[0-9,.]+ \w+ free$", result.stdout, re.M)
    assert re.search(r"^gpu(:0)? +", result.stdout, re.M)


def test_doctor_lists_every_dependency() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    requirements = [Requirement(line) for line in setup["options"]["install_requires"].split("\n") if line]
    required = {each.name for each in requirements if each.marker is None or each.marker.evaluate()}
    assert required == set(doctor._PACKAGES)


def test_doctor_lists_adapters(gpu: Any) -> None:
    info = gpu.adapter.info
    kind = "software" if info["adapter_type"] == "CPU" else info["adapter_type"]
    line = rf"^gpu:0 +{re.escape(info['device'])}, {kind}, {info['backend_type']}$"
    assert re.search(line, invoke("doctor").stdout, re.M)


def test_doctor_without_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert re.search(r"^cuda +none: PyTorch is not installed\. Install it: pip install", invoke("doctor").stdout, re.M)


@pytest.mark.torch
def test_doctor_with_a_pytorch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = need_module("torch")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: 1 // 0)
    out = invoke("doctor").stdout
    assert re.search(rf"^torch +{re.escape(importlib.metadata.version('torch'))}$", out, re.M)
    assert re.search(r"^cuda +none: PyTorch \S+ was built without CUDA", out, re.M)


@pytest.mark.torch
def test_a_load_without_cuda_is_one_line(tmp_path: Path) -> None:
    need_module("torch")
    simple_model(tmp_path)
    result = invoke("load", tmp_path, "--device", "cuda:99")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.match(r"error: PyTorch \S+ (was built without CUDA|finds)", result.stderr)


@pytest.mark.cuda
def test_commands_with_cuda(tmp_path: Path) -> None:
    simple_model(tmp_path)
    name = need_module("torch").cuda.get_device_name(0)
    assert re.search(rf"^cuda:0 +{re.escape(name)}, [0-9.]+ GiB$", invoke("doctor").stdout, re.M)
    assert re.search(rf"^device +cuda:0, {re.escape(name)}", invoke("load", tmp_path, "--device", "cuda").stdout, re.M)
    assert invoke("demo", "--device", "cuda:0", "--size-mib", "1", "--rate-mib", "99", "--quiet").exit_code == 0


def test_doctor_without_wgpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wgpu", None)
    result = invoke("doctor")
    assert result.exit_code == 0
    assert re.search(r"^gpu +none: wgpu cannot be loaded", result.stdout, re.M)


@pytest.mark.parametrize(
    ("found", "words"), [([], "wgpu finds no adapter"), (RuntimeError("driver broken"), "driver broken")]
)
def test_doctor_without_a_gpu(monkeypatch: pytest.MonkeyPatch, found: Any, words: str) -> None:
    def list_adapters() -> list[Any]:
        if isinstance(found, Exception):
            raise found
        return list(found)

    monkeypatch.setattr(doctor, "list_adapters", list_adapters)
    result = invoke("doctor")
    assert result.exit_code == 0
    assert re.search(rf"^gpu +none: .*{words}", result.stdout, re.M)


def test_row_40_doctor_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    monkeypatch.setenv("HF_ENDPOINT", "https://user:hunter2@mirror.example/path?token=hunter2")
    monkeypatch.setenv("HTTP_PROXY", "http://user:hunter2@proxy.example:3128")
    monkeypatch.setenv("https_proxy", "user:hunt#er2@proxy.example:3129")
    monkeypatch.setenv("NDCACHE_OFFLINE", "1")
    monkeypatch.setenv("NDCACHE_MAX_SIZE", "50GB")
    out = invoke("doctor").stdout
    assert "hunter2" not in out
    assert "hunt#er2" not in out
    for words in (
        "HF_TOKEN +set",
        "HF_ENDPOINT +https://mirror.example/path",
        "NDCACHE_OFFLINE +1",
        "NDCACHE_MAX_SIZE +50GB",
    ):
        assert re.search(rf"^{words}$", out, re.M)
    assert re.search(r"^HTTP_PROXY +http://proxy.example:3128$", out, re.M)
    assert re.search(r"^https_proxy +proxy.example:3129$", out, re.M | re.I)


@pytest.mark.parametrize("command_name", ["load", "demo"])
def test_an_unknown_device_is_wrong_usage(command_name: str) -> None:
    result = invoke(command_name, *(["model"] if command_name == "load" else []), "--device", "tpu")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "it must be cpu, gpu, gpu:N, cuda, cuda:N or auto" in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="POSIX's message")
def test_doctor_says_that_the_cache_directory_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "is not a directory" in invoke("doctor", "--cache-dir", tmp_path / "file").stdout


def test_verify_of_a_local_model_without_a_shard_fails(tmp_path: Path) -> None:
    simple_model(tmp_path)
    (tmp_path / "params_shard_2.bin").unlink()
    result = invoke("verify", tmp_path)
    assert result.exit_code == 1
    assert re.search(r"^missing +params_shard_2\.bin$", result.stdout, re.M)
    assert result.stderr == "error: 1 shard bad or missing; copy it again\n"


@pytest.mark.once
@pytest.mark.skipif(sys.platform != "linux", reason="libwayland")
def test_gpu_drivers_print_nothing(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    result = run("doctor")
    assert result.stderr == ""
    assert "gpu:0" in result.stdout


# --- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["load", "{model}", "--names", "layer"],
            "error: no tensor of tensor-cache.json matches 'layer'; did you mean 'layer.*'",
        ),
        (["load", "{model}", "--names", "nothing"], "error: no tensor of tensor-cache.json matches 'nothing'"),
        (["load", "{model}", "--scope", ".x"], "error: scope must be a name"),
        (["load", "ftp://host/"], "error: sources of the kind ftp://"),
        (["load", "http://host:x/"], "error: this URL cannot be used"),
        (["fetch", "http://host/", "--mirror", "."], "error: a mirror is an http(s) URL"),
        (
            ["inspect", "http://host/", "--integrity", f"tensor-cache-x.json={DIGEST}", "--offline"],
            "error: integrity is given for tensor-cache-x.json",
        ),
        (["rm", "ftp://host/"], "error: sources of the kind ftp://"),
        (
            ["dump", "{model}/params_shard_0.bin", "out"],
            "error: {model}/params_shard_0.bin is neither .safetensors",
        ),
        (["dump", "none.safetensors", "out"], "error: there is no such directory or file"),
        (["load", "no/where"], "error: there is no such directory or file"),
        (["fetch", "http://host/", "--offline"], "error: offline, and not in the cache"),
        (["verify", "http://host/"], "error: http://host/ is not in the cache"),
        (["dump", "none.npz", "out"], "error: none.npz: No such file or directory"),
    ],
)
def test_a_wrong_argument_is_one_line(tmp_path: Path, args: list[str], message: str) -> None:
    simple_model(tmp_path / "model")
    result = invoke(*(arg.format(model=tmp_path / "model") for arg in args))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(message.format(model=tmp_path / "model"))
    assert result.stderr.count("\n") == 1


def test_the_working_directory_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"in {tmp_path}, and no" in invoke("load", ".").stderr


@pytest.mark.parametrize("args", [["--verbose", "load", "no/where"], ["load", "no/where", "--verbose"]])
def test_verbose_shows_the_traceback(args: list[str]) -> None:
    result = run(*args)
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert result.stderr.splitlines()[-1].startswith("error: there is no such directory")


@pytest.mark.once
def test_verbose_shows_what_is_logged(tmp_path: Path) -> None:
    simple_model(tmp_path / "model")
    assert "info: " not in run("load", tmp_path / "model").stderr
    assert re.search(r"^info: .*LoadStats", run("load", tmp_path / "model", "--verbose").stderr, re.M)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["lod"], "No such command 'lod'. Did you mean 'load'?"),
        (["remov"], "No such command 'remov'. Did you mean 'rm'?"),
        (["zzz"], "No such command 'zzz'."),
        (["load"], "Missing argument 'SOURCE'"),
        (["load", "x", "--devic", "gpu"], "No such option"),
        (["load", "x", "--integrity", "a=md5-x"], "FILE=sha256-..."),
        (["demo", "--rate-mib", "nan"], "--rate-mib"),
        (["load", "x", "--max-workers", "0"], "--max-workers"),
        (["load", "x", "--memory-limit-mib", "0"], "--memory-limit-mib"),
        (["load", "x", "--timeout", "0"], "--timeout"),
        (["load", "x", "--timeout", "5,x"], "CONNECT,READ such as 5,30"),
        (["load", "x", "--timeout", "1,2,3"], "CONNECT,READ such as 5,30"),
        (["inspect", "x", "--summary", "--names"], "not both"),
        (["fetch", "x", "y", "--local-dir", "z"], "one SOURCE"),
        (["fetch", "x", "--local-dir", ""], "it is empty"),
        (["rm", "--all", "--cache-dir", ""], "it is empty"),
        (["rm", "--all", "--scope", ""], "it is empty"),
        (["load", "x", "--token", ""], "it is empty"),
        (["load", "x", "--revision", ""], "it is empty"),
        (["load", "x", "--mirror", ""], "it is empty"),
        (["load", "x", "--lock", ""], "it is empty"),
        (["load", "x", "--trace", "-"], "./- is a file of this name"),
        (["lock", "x", "-o", "-"], "./- is a file of this name"),
        (["convert", "x", "-"], "./- is a file of this name"),
        (["dump", "x", "hf://owner/name"], "it must be a path on this machine, not 'hf://owner/name'"),
        (["load", "x", "--timeout", "inf"], "'inf' is not SECONDS"),
        (["demo", "--rate-mib", "0"], "--rate-mib"),
    ],
)
def test_wrong_usage(args: list[str], message: str) -> None:
    result = invoke(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["help"], "No such command 'help'. Did you mean '--help'?"),
        (["prune", "--keep-last", "x"], "'x' is not a valid whole number."),
        (["dump", "m", "n", "--shard-mib", "0"], "0 is not in the range x>=1."),
    ],
)
def test_mistakes_are_named_in_plain_words(args: list[str], message: str) -> None:
    result = invoke(*args)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize(("typed", "meant"), [("--devic", "--device"), ("--max-worker", "--max-workers")])
def test_an_unknown_option_is_named_with_a_suggestion(typed: str, meant: str) -> None:
    error = invoke("load", "x", typed, "2").stderr
    assert re.search(rf"No such option:? '?{typed}\b", error)
    assert re.search(rf"{meant}\b", error)


def test_version_and_help() -> None:
    assert invoke("--version").stdout == f"ndcache, version {ndcache.__version__}\n"
    for name in cli.main.commands:
        assert invoke(name, "-h").exit_code == 0


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyError, ValueError, TypeError, ImportError, RuntimeWarning])
def test_a_bug_shows_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("a bug")

    monkeypatch.setattr(ndcache.cache, "models", fail)
    monkeypatch.setattr(ndcache.Loader, "load", fail)
    monkeypatch.setattr(ndcache.cache, "delete", fail)
    for command_name, *args in (["ls"], ["load", tmp_path], ["rm", tmp_path]):
        with pytest.raises(kind, match="a bug"):
            invoke(command_name, *args)


@pytest.mark.parametrize("kind", [ndcache.ServerError, OSError, MemoryError])
def test_an_expected_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("as it happens")

    monkeypatch.setattr(ndcache.Loader, "load", fail)
    result = invoke("load", tmp_path)
    assert result.exit_code == 1
    assert re.fullmatch(r"error: .*\n", result.stderr)


def test_row_34_a_warning_is_one_line(tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    simple_model(tmp_path / "model")
    server = serve(tmp_path / "model")
    assert run("fetch", server.url).returncode == 0
    server.status["/tensor-cache.json"] = 503
    result = run("load", server.url, "-q")
    assert result.returncode == 0
    assert re.fullmatch(r"warning: using the cached manifest of .*\n", result.stderr)


def test_importing_the_package_imports_no_command_line() -> None:
    code = "import sys, ndcache; print(sorted({'wgpu', 'rich', 'click', 'ndcache.cli.commands'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_the_version_imports_no_large_library() -> None:
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['numpy', 'requests', 'rich', 'tqdm']))\n"
        "from ndcache.cli import main\n"
        "main(['--version'])\n"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).startswith("ndcache, version ")


@pytest.mark.parametrize("args", [["lod"], ["load"], ["load", "x", "--retries", "y"], ["--quite"]])
def test_wrong_usage_is_spelled_like_other_errors(args: list[str]) -> None:
    assert re.search(r"^error: ", invoke(*args).stderr, re.MULTILINE)


def test_rows_are_printed_while_they_are_made(capsys: pytest.CaptureFixture[str]) -> None:
    def rows() -> Iterator[tuple[str, str]]:
        for number in range(3000):
            yield f"{10 ** (number // 1000)}", "x"
        printed = capsys.readouterr().out.splitlines()
        assert (printed[0], printed[1], printed[-1]) == ("a  b", "1  x", "  100  x"[2:])

    print_table(("a ", "b"), rows())


def test_a_file_that_was_named_is_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simple_model(tmp_path, shards=1)
    assert invoke("convert", tmp_path, tmp_path / "x.safetensors", "-q").exit_code == 0
    monkeypatch.chdir(tmp_path)
    for source in ("x.safetensors", "tensor-cache.json"):
        assert re.search(rf"^source +{source}$", invoke("load", source, "-q").stdout, re.MULTILINE)
        assert json.loads(invoke("inspect", source, "--json").stdout)["source"] == source


@pytest.mark.parametrize("option", ["--trace", "--report"])
def test_a_dry_run_has_no_trace(tmp_path: Path, option: str) -> None:
    simple_model(tmp_path / "model", shards=1)
    result = invoke("fetch", tmp_path / "model", "-n", option, tmp_path / "file")
    assert (result.exit_code, f"error: {option} is for a download" in result.stderr) == (2, True)
    fetch: Any = ndcache.fetch
    with pytest.raises(ValueError, match="dry_run makes none"):
        fetch(tmp_path / "model", dry_run=True, **{option[2:]: tmp_path / "file"})
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    ("args", "option"),
    [(["load"], "--trace"), (["fetch"], "--report"), (["convert", "new.npz"], "--report"), (["lock"], "--output")],
    ids=str,
)
def test_no_directory_is_made_for_a_file_that_an_option_names(
    tmp_path: Path, serve: Callable[..., FileServer], args: list[str], option: str
) -> None:
    simple_model(tmp_path / "model", shards=1)
    server = serve(tmp_path / "model")
    result = invoke(args[0], server.url, *args[1:], option, tmp_path / "a" / "b" / "file", "-q")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {tmp_path / 'a' / 'b'}: the ")
    assert result.stderr.endswith("cannot be written: no such directory\n")
    assert not (tmp_path / "a").exists()
    assert server.requests == []


def test_the_page_of_a_report_needs_a_directory(tmp_path: Path) -> None:
    simple_model(tmp_path / "model", shards=1)
    assert invoke("load", tmp_path / "model", "-q", "--trace", tmp_path / "trace.json").exit_code == 0
    result = invoke("report", tmp_path / "trace.json", tmp_path / "a" / "page.html")
    assert result.stderr == f"error: {tmp_path / 'a'}: the page cannot be written: no such directory\n"


def test_sources_are_optional_where_all_can_be_meant() -> None:
    assert "[OPTIONS] [SOURCE]...\n" in invoke("verify", "--help").stdout
    assert "[OPTIONS] [SOURCE|PATTERN]...\n" in invoke("rm", "--help").stdout


def test_a_conversion_has_a_report(tmp_path: Path) -> None:
    simple_model(tmp_path / "model", shards=1)
    result = invoke("convert", tmp_path / "model", tmp_path / "new.npz", "-q", "--report", tmp_path / "page.html")
    assert result.exit_code == 0
    assert "params_shard_0.bin" in (tmp_path / "page.html").read_text("utf-8")


# --- pipes, terminals, signals ------------------------------------------------------------------------


@pytest.mark.once
@posix_only
@pytest.mark.parametrize("args", [["inspect", "{model}"], ["inspect", "{model}", "--json"], ["load", "{model}", "-q"]])
def test_a_reader_that_goes_away_causes_no_message(tmp_path: Path, args: list[str]) -> None:
    simple_model(tmp_path / "model")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        arguments = command(*(arg.format(model=tmp_path / "model") for arg in args))
        result = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    finally:
        os.close(writer)
    assert result.stderr == b""
    assert result.returncode == 1


@pytest.mark.once
@posix_only
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_characters_that_the_terminal_lacks_are_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    write_model(tmp_path / "model", [{"模型": random_array((1,))}])
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    result = run("inspect", tmp_path / "model")
    assert (result.returncode, result.stderr) == (0, "")
    assert "\\u6a21\\u578b" in result.stdout


@pytest.mark.once
@posix_only
@pytest.mark.parametrize(("quiet", "columns"), [(False, 120), (False, 0), (True, 120)])
def test_bar_on_a_terminal(tmp_path: Path, serve: Callable[..., FileServer], quiet: bool, columns: int) -> None:
    simple_model(tmp_path / "model", shards=4, shard_bytes=1 << 20)
    arguments = command("load", serve(tmp_path / "model").url, *(["-q"] if quiet else []))
    terminal, status, out = on_a_terminal(arguments, columns)
    assert status == 0
    assert out.startswith(b"source")
    if quiet:
        assert terminal == ""
        return
    last = terminal.rstrip().splitlines()[-1].rpartition("\r")[2]
    assert re.fullmatch(r"Fetched [\d.:]+: 4\.0 MiB in 4 shards, .*B/s", last)
    assert re.search(r" 0% \|.*4\.0 MiB", terminal)


def on_a_terminal(arguments: list[str], columns: int = 120) -> tuple[str, int, bytes]:
    """Run with standard error on a terminal; return what it shows, the exit status, and standard output."""
    import fcntl
    import pty
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=slave) as process:
        os.close(slave)
        shown = b""
        try:
            while piece := os.read(master, 1 << 16):
                shown += piece
        except OSError:
            pass  # Linux says so when the other end is closed
        os.close(master)
        out, _ = process.communicate(timeout=60)
    return shown.decode(), process.returncode, out


@posix_only
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("verb", ["load", "fetch"])
def test_row_36_signals_stop_a_load(
    tmp_path: Path,
    serve: Callable[..., FileServer],
    cache_dir: Path,
    verb: str,
    number: signal.Signals,
    status: int,
    word: str,
) -> None:
    simple_model(tmp_path / "model", shards=20)
    server = serve(tmp_path / "model")
    server.gate.clear()
    with subprocess.Popen(
        command(verb, server.url, "-q"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until(server.shard_requests, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (status, "", f"{word}\n")
    assert real_files(cache_dir) == ["tensor-cache.json"]
    assert list(cache_dir.rglob("parts/*")) == []


HALF = 1 << 15


@posix_only
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "phase",
    ["the manifest's headers", "a shard's body", "a retry", "a lock", pytest.param("hashing", marks=pytest.mark.once)],
)
def test_row_36_signals_in_each_phase(
    tmp_path: Path, scripted: ScriptedServer, cache_dir: Path, phase: str, number: signal.Signals, status: int
) -> None:
    simple_model(tmp_path / "model", shards=2)
    good: dict[str, list[bytes | Step]] = {
        f"/{path.name}": [reply(200, path.read_bytes(), {"ETag": f'"{path.name}"'})]
        for path in (tmp_path / "model").iterdir()
    }
    data = (tmp_path / "model" / "params_shard_1.bin").read_bytes()
    manifest, shard, is_refused = "/tensor-cache.json", "/params_shard_1.bin", threading.Event()
    scripted.script = dict(good)
    with contextlib.ExitStack() as while_it_runs:
        if phase == "the manifest's headers":
            scripted.script[manifest] = [then_stall(b"HTTP/1.1 200")]
        elif phase == "a shard's body":
            headers = {"ETag": '"params_shard_1.bin"'}
            scripted.script[shard] = [then_stall(reply(200, data[:HALF], headers, length=len(data)))]
        elif phase == "a retry":

            def refuse(connection: Connection, request: Request) -> None:
                while not other_is_done(cache_dir):  # a 503 would make the other shard wait, too
                    time.sleep(0.01)
                connection.send(reply(503, headers={"Retry-After": "200"}))
                is_refused.set()

            scripted.script[shard] = [refuse]
        elif phase == "a lock":
            state = ndcache.fetch(scripted.url, names="layer.0") / ".ndcache"
            (state / "locks").mkdir(exist_ok=True)
            while_it_runs.enter_context(filelock.FileLock(state / "locks" / "params_shard_1.bin"))
        else:
            written = json.loads((tmp_path / "model" / "tensor-cache.json").read_text())
            written["records"][1]["nbytes"] = 1 << 37  # takes minutes to hash
            scripted.script[manifest] = [reply(200, json.dumps(written).encode())]
            path = ndcache.fetch(scripted.url, names="layer.0") / "params_shard_1.bin"
            path.touch()
            os.truncate(path, 1 << 37)  # sparse
        scripted.requests.clear()
        process = while_it_runs.enter_context(
            subprocess.Popen(
                command("fetch", scripted.url, "--timeout", 600, "--verify", "always"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        if phase == "the manifest's headers":
            wait_until(lambda: scripted.requests, process)
        elif phase == "a shard's body":
            wait_until(lambda: other_is_done(cache_dir) and HALF in sizes(cache_dir.rglob("parts/*")), process)
        elif phase == "a retry":
            wait_until(is_refused.is_set, process)
        else:
            # After the first shard, only the other one is in progress.
            line = "1/2"
            assert process.stderr is not None
            while line not in process.stderr.readline():
                assert process.poll() is None
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (status, ""), err
    word = "interrupted" if number == signal.SIGINT else "terminated"
    has_news = phase in ("a shard's body", "a retry", "a lock")
    nbytes = "96 KiB" if phase == "a shard's body" else "64 KiB"
    assert err.splitlines()[-1] == (f"{word}: {nbytes} kept; run it again to go on" if has_news else word)
    kept = sorted(cache_dir.rglob("parts/*"))
    if phase != "a shard's body":
        assert kept == []
        return
    part, note = kept
    assert note.name == f"{part.name}.json"
    assert part.read_bytes() == data[:HALF]
    scripted.script = good
    assert run("fetch", scripted.url).returncode == 0
    assert scripted.requests_for(shard)[-1].headers["range"] == f"bytes={HALF}-{len(data) - 1}"


def other_is_done(cache_dir: Path) -> bool:
    found = list(cache_dir.rglob("params_shard_0.bin*"))
    return [path.parent.name for path in found if path.parent.name in ("parts", "locks")] == [] != found


def sizes(paths: Iterable[Path]) -> list[int]:
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found.append(path.stat().st_size)
    return found


@posix_only
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("module", ["click", "numpy", "ml_dtypes", "ndcache.loader", "ndcache.cli.commands"])
def test_ctrl_c_while_the_command_line_is_imported_ends_quietly(tmp_path: Path, module: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupter:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupter())\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(ndcache.__file__).parents[1])])
    result = subprocess.run(
        command("ls"), env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_the_handler_of_sigterm_is_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    invoke("ls")
    assert signal.getsignal(signal.SIGTERM) is before


# --- other names, several sources, dry runs -----------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("download", "fetch"), ("pull", "fetch"), ("list", "ls"), ("remove", "rm"), ("delete", "rm"), ("info", "inspect")],
)
def test_names_that_commands_have_elsewhere(typed: str, meant: str) -> None:
    assert f"Usage: ndcache {meant} " in invoke(typed, "--help").stdout.replace("main", "ndcache")


def test_fetch_of_several_sources_goes_on_after_an_error(tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    simple_model(tmp_path / "model")
    url = serve(tmp_path / "model").url
    result = invoke("fetch", url, tmp_path / "none", "ftp://x/", tmp_path / "model", "-q")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[1:] == [str(tmp_path / "model")]
    assert [line[:12] for line in result.stderr.splitlines()] == ["error: there", "error: sourc"]


def test_a_dry_run_shows_what_would_be_fetched(
    tmp_path: Path, serve: Callable[..., FileServer], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simple_model(tmp_path / "model", shards=2)
    url = serve(tmp_path / "model").url
    result = invoke("fetch", url, "--dry-run")
    assert result.exit_code == 0
    assert not cache_dir.exists()
    lines = [re.sub(r" {2,}", "|", line.strip()) for line in result.stdout.splitlines()]
    assert lines[1:4] == ["params_shard_0.bin|64.0 KiB|64.0 KiB", "params_shard_1.bin|64.0 KiB|64.0 KiB", ""]
    assert "to fetch|128.0 KiB of 128.0 KiB" in lines
    monkeypatch.setattr("ndcache.loaders.plan.free_bytes", lambda directory: 1024)
    full = invoke("fetch", url, "--dry-run")
    assert (full.exit_code, full.stderr) == (1, "error: no room: 128.0 KiB needed, 1.0 KiB free\n")


def test_force_downloads_again(tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    simple_model(tmp_path / "model", shards=2)
    server = serve(tmp_path / "model")
    for args in ([], [], ["--force"]):
        assert invoke("fetch", server.url, "-q", *args).exit_code == 0
    assert len(server.shard_requests()) == 4


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    simple_model(tmp_path / "model")
    assert invoke("load", tmp_path / "model", "-q", "--trace", tmp_path / "trace.json").exit_code == 0
    page = tmp_path / "none" / "page.html"
    assert invoke("report", tmp_path / "trace.json", page).stderr == (
        f"error: {page.parent}: the page cannot be written: no such directory\n"
    )
    lock = tmp_path / "trace.json" / "model.lock"
    assert invoke("lock", tmp_path / "model", "-q", "-o", lock).stderr == (
        f"error: {lock.parent}: the lock file cannot be written: no such directory\n"
    )
