"""A demonstration that needs no network: a small model made here, served on loopback, loaded, and compared.

The model is shaped like a quantised MLC one. A server on loopback gives each connection a fixed rate, as many real ones
do, so that what parallel fetching gains can be seen anywhere. Every value that was loaded is compared with what was
generated; the rounding to bfloat16 is computed here, apart from the package's own encoder and decoder.
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
#: Of 4-bit weights: how many share a scale, and how many one uint32 holds.
_GROUP, _PER_WORD = 32, 8
_SHARD_BYTES = 3 << 19
_WORKERS = 8
#: One write of the server. Small enough for a smooth rate, large enough to cost nothing.
_PIECE_BYTES = 1 << 16

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class DemoLoad:
    """One load of the demonstration.

    Attributes
    ----------
    title : str
        Where the shards came from.
    workers : int
    stats : LoadStats
    wrong : tuple of str
        Names of tensors that are missing, or differ from what was generated in a value, shape or dtype.
    """

    title: str
    workers: int
    stats: LoadStats
    wrong: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """From the request for the manifest until everything is on the device; opening the device is not in it."""
        return self.stats.seconds["total"]


@dataclass(frozen=True)
class DemoReport:
    """What a demonstration found.

    Attributes
    ----------
    manifest : Manifest
        The model's.
    loads : tuple of DemoLoad
        With one worker, with eight, and from the cache.
    """

    manifest: Manifest
    loads: tuple[DemoLoad, ...]

    @property
    def ok(self) -> bool:
        """Whether every value of every load is right."""
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
    """Make a model, serve it on loopback, load it three times and compare every value.

    Everything is written to a temporary directory that is removed at the end, whatever happens. While it runs, proxies
    and the offline switches of the environment do not apply.

    Parameters
    ----------
    device : str
        As for `ndcache.load`.
    size_mib : int
        About how large the model is on disk. Default 40 MiB.
    rate_mib : float
        MiB per second that the server sends over each connection. Default 8.
    progress
        As for `ndcache.load`, for each of the loads.
    say : callable
        Is given what is being done, line by line.
    describe : callable
        Puts a `Weights.device` into words.

    Returns
    -------
    DemoReport

    Raises
    ------
    ValueError
        `size_mib` or `rate_mib` is not positive, or `device` is none.
    NdcacheError
        A load failed.
    """
    if size_mib < 1 or not rate_mib > 0:
        raise ValueError(f"size_mib and rate_mib are positive, not {size_mib} and {rate_mib}")
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
    """Title, workers and cache of each load: two fresh caches, and the second again."""
    return [
        ("over the network", 1, top / "cache-1"),
        ("over the network", _WORKERS, top / "cache-2"),
        ("from the cache", _WORKERS, top / "cache-2"),
    ]


# --- the model ----------------------------------------------------------------------------------------


def _make_params(size_mib: int) -> dict[str, Array]:
    """The tensors, always the same ones: `size_mib` decides how many layers there are."""
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
    """What mlc_llm writes there."""
    nbytes = float(_stored_bytes(params))
    values = sum(array.size * (_PER_WORD if array.dtype == np.uint32 else 1) for array in params.values())
    return {"ParamSize": len(params), "ParamBytes": nbytes, "BitsPerParam": nbytes * 8 / values}


def _as_loaded(array: Array) -> Array:
    """The tensor as a load must give it: float32 rounded to the nearest bfloat16, ties to even, by its bits."""
    if array.dtype != np.float32:
        return array
    bits = array.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded: Array = ((bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)).view(np.float32)
    return rounded


def _differences(weights: Weights, expected: Mapping[str, Array]) -> tuple[str, ...]:
    """The names for which the two do not have the same bits."""
    wrong = [name for name in weights if name not in expected]
    for name, values in expected.items():
        loaded = np.asarray(weights[name]) if name in weights else np.empty(0)
        same_kind = loaded.dtype == values.dtype and loaded.shape == values.shape
        # As bytes, so that no value equals another one that is written differently.
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
        # Not HTTPServer's own, which asks the name service for this host's name: that can take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: a client that goes away, as on Ctrl-C, is no error here."""


class _Handler(SimpleHTTPRequestHandler):
    """Sends files at a fixed rate, and keeps connections."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, *args: Any, rate: float, **kwargs: Any) -> None:
        self._rate = rate
        super().__init__(*args, **kwargs)

    def copyfile(self, source: IO[bytes], outputfile: IO[bytes]) -> None:  # type: ignore[override]
        start, sent = time.monotonic(), 0
        while piece := source.read(_PIECE_BYTES):
            outputfile.write(piece)
            sent += len(piece)
            ahead = sent / self._rate - (time.monotonic() - start)
            if ahead > 0:
                time.sleep(ahead)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(directory: Path, rate: float) -> Iterator[str]:
    """Serve `directory` on loopback at `rate` bytes per second and connection; gives the URL."""
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
    """Without what would keep a load from loopback: proxies, those of the system's settings too, offline switches."""
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
