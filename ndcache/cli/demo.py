"""Demonstrate parallel loading without a network: generate a model, serve it on loopback, load it, compare it.

The model is shaped like a quantised MLC model. The server limits the rate of each connection, as many real servers do,
so that the gain of parallel downloads shows on any machine. Every loaded value is compared with the generated one. The
expected rounding to bfloat16 is computed here, independently of the package's encoder and decoder.
"""

from __future__ import annotations

import contextlib
import os
import socketserver
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..format.manifest import Manifest
from ..format.writer import dump
from ..loader import Loader
from ..progress import Progress
from ..stats import LoadStats
from ..weights import Weights

__all__ = ["DemoLoad", "DemoReport", "run_demo", "serving"]

_SEED = 20240229
_HIDDEN, _INTERMEDIATE, _VOCABULARY = 512, 1536, 1024
#: 4-bit weights per scale, and per uint32.
_GROUP, _PER_WORD = 32, 8
_SHARD_BYTES = 3 << 19
_WORKERS = 8
#: Bytes of one write of the server: small enough for a smooth rate, large enough to cost nothing.
_WRITE_BYTES = 1 << 16

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class DemoLoad:
    """One load of the demonstration.

    Attributes
    ----------
    title : str
        Where the shards came from, as shown to the user.
    workers : int
    stats : LoadStats
    wrong : tuple of str
        Names of tensors that are missing, or whose values, shape or dtype differ from the generated ones.
    """

    title: str
    workers: int
    stats: LoadStats
    wrong: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Return the seconds from the request for the manifest until all tensors are on the (already open) device."""
        return self.stats.seconds["total"]


@dataclass(frozen=True)
class DemoReport:
    """The result of a demonstration.

    Attributes
    ----------
    manifest : Manifest
    loads : tuple of DemoLoad
        With one worker, with eight, and from the cache.
    """

    manifest: Manifest
    loads: tuple[DemoLoad, ...]

    @property
    def ok(self) -> bool:
        """Return whether every value of every load is right."""
        return not any(load.wrong for load in self.loads)


def run_demo(
    device: str = "auto",
    *,
    size_mib: int = 40,
    rate_mib: float = 8.0,
    progress: Progress = None,
    say: Callable[[str], object] = lambda text: None,
    describe: Callable[[Any], str] = str,
) -> DemoReport:
    """Generate a model, serve it on loopback, load it three times and compare every value.

    All files lie in a temporary directory, which is removed at the end, even after an error. Until then, proxies and
    offline switches of the environment are ignored.

    Parameters
    ----------
    device : str
        As for `ndcache.load`.
    size_mib : int
        Approximate size of the model on disk, in MiB. Default 40.
    rate_mib : float
        Rate of the server's connections, in MiB per second each. Default 8.
    progress
        As for `ndcache.load`, for each load.
    say : callable
        Called with a line about each step.
    describe : callable
        Returns a `Weights.device` in words.

    Returns
    -------
    DemoReport

    Raises
    ------
    ValueError
        `size_mib` or `rate_mib` is not positive, or `device` is unknown.
    NdcacheError
        A load failed.
    """
    if size_mib < 1 or not rate_mib > 0:
        raise ValueError(f"size_mib and rate_mib must be positive, not {size_mib} and {rate_mib}")
    with (
        tempfile.TemporaryDirectory(prefix="ndcache-demo-", ignore_cleanup_errors=True) as folder,
        _plain_environment(),
    ):
        top = Path(folder)
        params = _make_params(size_mib)
        manifest = dump(params, top / "model", shard_bytes=_SHARD_BYTES, metadata=_metadata(params))
        say(f"made {len(manifest)} tensors, {manifest.nbytes / 2**20:.1f} MiB in {len(manifest.shards)} shards")
        expected = {name: _as_loaded(array) for name, array in params.items()}
        loads: list[DemoLoad] = []
        with serving(top / "model", rate_mib * 2**20) as url:
            say(f"serving them at {url}, {rate_mib:g} MiB/s over each connection")
            for title, workers, cache in _plan(top):
                say(f"loading {title}, {workers} worker{'s' if workers > 1 else ''}")
                with Loader(max_workers=workers, cache_dir=cache) as loader:
                    weights = loader.load(url, device, progress=progress)
                with weights:
                    if not loads:
                        say(f"the tensors are on {describe(weights.device)}")
                    loads.append(DemoLoad(title, workers, weights.stats, _differences(weights, expected)))
        return DemoReport(manifest, tuple(loads))


def _plan(top: Path) -> list[tuple[str, int, Path]]:
    """Return the title, workers and cache of each load: two fresh caches, and the second one again."""
    return [
        ("over the network", 1, top / "cache-1"),
        ("over the network", _WORKERS, top / "cache-2"),
        ("from the cache", _WORKERS, top / "cache-2"),
    ]


# --- the model ----------------------------------------------------------------------------------------


def _make_params(size_mib: int) -> dict[str, Array]:
    """Generate tensors, always the same ones; `size_mib` decides the number of layers."""
    rng = np.random.default_rng(_SEED)
    params = {"model.embed_tokens.weight": rng.standard_normal((_VOCABULARY, _HIDDEN), np.float32)}
    size, layer = _stored_bytes(params), 0
    while layer == 0 or size < size_mib << 20:
        made = _make_layer(rng, f"model.layers.{layer}")
        params |= made
        size += _stored_bytes(made)
        layer += 1
    params["model.norm.weight"] = rng.standard_normal(_HIDDEN, np.float32)
    return params


def _make_layer(rng: np.random.Generator, prefix: str) -> dict[str, Array]:
    shapes = {
        "self_attn.qkv_proj": (3 * _HIDDEN, _HIDDEN),
        "self_attn.o_proj": (_HIDDEN, _HIDDEN),
        "mlp.gate_up_proj": (2 * _INTERMEDIATE, _HIDDEN),
        "mlp.down_proj": (_HIDDEN, _INTERMEDIATE),
    }
    layer: dict[str, Array] = {}
    for name, (rows, columns) in shapes.items():
        layer[f"{prefix}.{name}.q_weight"] = rng.integers(0, 1 << 32, (rows, columns // _PER_WORD), np.uint32)
        scale = rng.standard_normal((rows, columns // _GROUP), np.float32)
        layer[f"{prefix}.{name}.q_scale"] = scale.astype(np.float16)
    for name in ("input_layernorm", "post_attention_layernorm"):
        layer[f"{prefix}.{name}.weight"] = rng.standard_normal(_HIDDEN, np.float32)
    return layer


def _stored_bytes(params: Mapping[str, Array]) -> int:
    return sum(array.nbytes // (2 if array.dtype == np.float32 else 1) for array in params.values())


def _metadata(params: Mapping[str, Array]) -> dict[str, object]:
    """Return the metadata that mlc_llm writes."""
    nbytes = float(_stored_bytes(params))
    values = sum(array.size * (_PER_WORD if array.dtype == np.uint32 else 1) for array in params.values())
    return {"ParamSize": len(params), "ParamBytes": nbytes, "BitsPerParam": nbytes * 8 / values}


def _as_loaded(array: Array) -> Array:
    """Return the tensor that a load must give: float32 is rounded to the nearest bfloat16, ties to even."""
    if array.dtype != np.float32:
        return array
    bits = array.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded: Array = ((bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)).view(np.float32)
    return rounded


def _differences(weights: Weights[Any], expected: Mapping[str, Array]) -> tuple[str, ...]:
    """Return the names of the tensors whose bits differ."""
    wrong = [name for name in weights if name not in expected]
    for name, values in expected.items():
        tensor = weights[name] if name in weights else np.empty(0)
        loaded = np.asarray(tensor.cpu() if hasattr(tensor, "cpu") else tensor)  # those of PyTorch have to be copied
        same_kind = loaded.dtype == values.dtype and loaded.shape == values.shape
        # Compare bytes: 0.0 equals -0.0, and NaN does not equal itself.
        if not same_kind or not np.array_equal(_bytes(loaded), _bytes(values)):
            wrong.append(name)
    return tuple(wrong)


def _bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


# --- the server ---------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def server_bind(self) -> None:
        # HTTPServer's own method asks the name service for this host's name, which can take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: clients disconnect at any time, for instance on Ctrl-C."""


class _Handler(SimpleHTTPRequestHandler):
    """Send files at a fixed rate, over connections that are kept alive."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, *args: Any, rate: float, **kwargs: Any) -> None:
        self._rate = rate
        super().__init__(*args, **kwargs)

    def copyfile(self, source: IO[bytes], outputfile: IO[bytes]) -> None:  # type: ignore[override]
        start, sent = time.monotonic(), 0
        while data := source.read(_WRITE_BYTES):
            outputfile.write(data)
            sent += len(data)
            ahead = sent / self._rate - (time.monotonic() - start)
            if ahead > 0:
                time.sleep(ahead)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(directory: Path, rate: float) -> Iterator[str]:
    """Serve `directory` on loopback, at `rate` bytes per second for each connection, and yield the URL."""
    with _Server(("127.0.0.1", 0), partial(_Handler, directory=str(directory), rate=rate)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def _plain_environment() -> Iterator[None]:
    """Hide proxies, also those of the system's settings, and offline switches: they would keep a load from loopback."""
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name in ("NDCACHE_OFFLINE", "HF_HUB_OFFLINE") or name.lower().endswith("_proxy")
    }
    os.environ["no_proxy"] = "127.0.0.1"
    try:
        yield
    finally:
        del os.environ["no_proxy"]
        os.environ.update(hidden)
