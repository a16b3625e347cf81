"""The suites: which contenders are compared, and which ratios are expected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ndcache.devices.gpu.adapters import is_software, list_adapters
from ndcache.errors import NdcacheError

from . import choices, gpu_suites, inputs, many_cores, published, servers
from .cluster import cluster
from .harness import Contender, Result, Settings, Target, maker, rounds

MIB = 1 << 20


def cold(settings: Settings) -> Result:
    """Download from nginx on loopback to an empty directory."""
    with inputs.working_folder(settings) as folder:
        model = inputs.synthetic(folder / "model", settings.bytes_or(1 << 30))
        return _cold("cold", settings, folder, model)


def minilm(settings: Settings) -> Result:
    """Run `cold` with the weights of all-MiniLM-L6-v2."""
    with inputs.working_folder(settings) as folder:
        return _cold("minilm", settings, folder, inputs.minilm(folder / "model"))


def _cold(name: str, settings: Settings, folder: Path, model: dict[str, Any]) -> Result:
    with servers.nginx(folder / "model") as (url, _):
        make = maker({**model, "url": url}, model)
        result = Result(
            name,
            [
                make("ndcache load", "ndcache_load", loaded=True),
                make("ndcache fetch", "ndcache_fetch"),
                *choices.downloaders(make),
                make("huggingface_hub", "huggingface_hub", settings=choices.HUGGINGFACE_HUB),
                make("four quarters", "quarters"),
                make("one at a time, CPU", "one_at_a_time", loaded=True),
                make("md5 alone", "md5_alone"),
            ],
            targets=[
                Target("hf_transfer / ndcache load", "hf_transfer", "ndcache load", ">=", 1.2),
                Target("aria2c / ndcache load", "aria2c", "ndcache load", ">=", 2.5),
                Target("curl / ndcache load", "curl --parallel", "ndcache load", ">=", 1.4),
            ],
        )
        return rounds(result, settings, folder)


def tls(settings: Settings) -> Result:
    """Run `cold` with TLS."""
    with inputs.working_folder(settings) as folder:
        model = inputs.synthetic(folder / "model", settings.bytes_or(1 << 30))
        with servers.nginx(folder / "model", tls=True) as (url, ca):
            make = maker({**model, "url": url, "ca": ca}, model)
            result = Result(
                "tls",
                [
                    make("ndcache load", "ndcache_load", loaded=True),
                    *choices.downloaders(make),
                    make("four quarters", "quarters"),
                ],
                targets=[Target("curl / ndcache load", "curl --parallel", "ndcache load", ">=", 0.75)],
            )
            return rounds(result, settings, folder)


def rate(settings: Settings) -> Result:
    """Download with 20 MiB/s for each connection; the large model has one shard 16 times the size of the others."""
    speed = 20 * MIB
    with inputs.working_folder(settings) as folder:
        size = settings.bytes_or(1 << 30)
        # The shards are small and many, so that all eight workers end at about the same time.
        model = inputs.synthetic(folder / "model", size, shard_bytes=max(size // 64, MIB // 8), tensor_bytes=MIB // 8)
        large = inputs.synthetic(
            folder / "large", size, shard_bytes=max(size // 32, MIB // 8), tensor_bytes=MIB // 8, first_shard=16
        )
        file = inputs.synthetic(folder / "file", size, shard_bytes=size, least_shards=1, tensor_bytes=MIB // 8)
        with (
            servers.nginx(folder / "model", rate=speed) as (url, _),
            servers.nginx(folder / "large", rate=speed) as (large_url, _),
            servers.nginx(folder / "file", rate=speed) as (file_url, _),
        ):
            make_file = maker({**file, "url": file_url}, file)
            make, make_large = maker({**model, "url": url}, model), maker({**large, "url": large_url}, large)
            result = Result(
                "rate",
                [
                    make("ndcache load, 8 workers", "ndcache_load", loaded=True),
                    make("ndcache load, 1 worker", "ndcache_load", loaded=True, workers=1),
                    make("ndcache fetch, 8 workers", "ndcache_fetch"),
                    make("four quarters", "quarters"),
                    make_large("large shard, ranges", "ndcache_load", loaded=True),
                    make_large("large shard, no ranges", "ndcache_load", loaded=True, no_ranges=True),
                    make_file("one file, 8 workers", "ndcache_load", loaded=True),
                ],
                targets=[
                    Target("1 worker / 8 workers", "ndcache load, 1 worker", "ndcache load, 8 workers", ">=", 7.6),
                    Target("four quarters / ndcache", "four quarters", "ndcache load, 8 workers", ">=", 1.9),
                    Target("no ranges / ranges", "large shard, no ranges", "large shard, ranges", ">=", 2.0),
                    Target("many shards / one file", "ndcache load, 8 workers", "one file, 8 workers", ">=", 0.9),
                    Target("load / fetch", "ndcache load, 8 workers", "ndcache fetch, 8 workers", "<=", 1.05),
                ],
            )
            return rounds(result, settings, folder)


def small(settings: Settings) -> Result:
    """Download 1,000 shards of 4 KiB."""
    count = 20 if settings.quick else 1000
    with inputs.working_folder(settings) as folder:
        model = inputs.synthetic(folder / "model", count * 4096, shard_bytes=4096, tensor_bytes=4096)
        with servers.nginx(folder / "model") as (url, _):
            make = maker({**model, "url": url}, model)
            result = Result(
                "small",
                [
                    make("ndcache load, 8 workers", "ndcache_load", loaded=True, workers=8),
                    make("ndcache load, 1 worker", "ndcache_load", loaded=True, workers=1),
                    *choices.downloaders(make),
                ],
                targets=[Target("1 worker / 8 workers", "ndcache load, 1 worker", "ndcache load, 8 workers", ">=", 1)],
            )
            return rounds(result, settings, folder)


def warm_cpu(settings: Settings) -> Result:
    """Load a local directory from the page cache into memory."""
    with inputs.working_folder(settings) as folder:
        size = settings.bytes_or(1 << 30)
        bf16 = inputs.synthetic(folder / "bf16", size, bf16=True, safetensors=True)
        raw = inputs.synthetic(folder / "raw", size, safetensors=True)
        make, make_raw = maker(bf16, bf16), maker(raw, raw)
        result = Result(
            "warm-cpu",
            [
                make("ndcache bf16", "ndcache_load", loaded=True),
                make("TVM C++ bf16", "tvm_cpp", loaded=True),
                make("TVM Python bf16", "tvm_python", loaded=True),
                make("safetensors bf16, as stored", "safetensors_numpy"),
                make("one at a time bf16", "one_at_a_time", loaded=True),
                make("expanding alone", "expand_alone", loaded=True),
                make("fresh memory alone", "pages_alone", loaded=True),
                make_raw("ndcache raw", "ndcache_load", loaded=True),
                make_raw("TVM C++ raw", "tvm_cpp", loaded=True),
                make_raw("safetensors raw", "safetensors_numpy"),
            ],
            targets=[
                Target("bf16: TVM C++ / ndcache", "TVM C++ bf16", "ndcache bf16", ">=", 2),
                Target("bf16: TVM Python / ndcache", "TVM Python bf16", "ndcache bf16", ">=", 20),
                Target("raw: TVM C++ / ndcache", "TVM C++ raw", "ndcache raw", ">=", 50),
            ],
        )
        return rounds(result, settings, folder, warm=inputs.files(folder))


def large_file(settings: Settings) -> Result:
    """Load the same tensors from one file and from many into memory."""
    with inputs.working_folder(settings, memory=True) as folder:
        size = settings.bytes_or(2 << 30)
        contenders, targets = [], []
        for kind in ("bf16", "raw"):
            shards = inputs.synthetic(folder / kind, size, bf16=kind == "bf16")
            file = inputs.synthetic(
                folder / f"{kind}-file", size, bf16=kind == "bf16", shard_bytes=size, least_shards=1
            )
            many, one = f"{kind}, {len(shards['shards'])} shards", f"{kind}, one file"
            contenders += [maker(shards, shards)(many, "ndcache_load", loaded=True)]
            contenders += [maker(file, file)(one, "ndcache_load", loaded=True)]
            targets.append(Target(f"{many} / one file", many, one, ">=", 0.9))
        return rounds(Result("large-file", contenders, targets=targets), settings, folder, warm=inputs.files(folder))


def many(settings: Settings) -> Result:
    """Load 20,000 tensors of 4 KiB from the page cache."""
    count = 200 if settings.quick else 20_000
    with inputs.working_folder(settings) as folder:
        model = inputs.synthetic(folder / "model", count * 4096, tensor_bytes=4096, shard_bytes=count * 1024)
        make = maker(model, model)
        result = Result(
            "many",
            [
                make("ndcache, CPU", "ndcache_load", loaded=True),
                make("ndcache, GPU", "ndcache_load", loaded=True, gpu=True),
                make("bare loop, GPU", "bare_loop", loaded=True, gpu=True),
            ],
            targets=[
                Target("CPU, µs a tensor", "ndcache, CPU", None, "<=", 25, scale=1e6 / model["tensors"]),
                Target("GPU: ndcache / bare loop", "ndcache, GPU", "bare loop, GPU", "<=", 1.5),
            ],
        )
        return rounds(result, settings, folder, warm=inputs.files(folder))


def memory(settings: Settings) -> Result:
    """Compare the peak memory of fetches of two sizes."""
    small, large = (MIB, 8 * MIB) if settings.quick else (64 * MIB, 512 * MIB)
    with inputs.working_folder(settings) as folder:
        models = [inputs.synthetic(folder / str(size), size) for size in (small, large)]
        with servers.nginx(folder) as (url, _):
            makes = [
                maker({**model, "url": f"{url}{size}/"}, model)
                for model, size in zip(models, (small, large), strict=True)
            ]
            result = Result(
                "memory",
                [
                    makes[0]("fetch, small", "ndcache_fetch"),
                    makes[1]("fetch, 8 times as large", "ndcache_fetch"),
                ],
                targets=[_more_memory("MiB more", "fetch, 8 times as large", "fetch, small", 48)],
            )
            return rounds(result, settings, folder)


def memory_gpu(settings: Settings) -> Result:
    """Compare the peak memory of loads to a GPU, raw and expanded, and of a process that only opens the GPU."""
    with inputs.working_folder(settings, memory=True) as folder:
        size = settings.bytes_or(1 << 30)
        raw, bf16 = inputs.synthetic(folder / "raw", size), inputs.synthetic(folder / "bf16", size, bf16=True)
        # On a software GPU, tensors lie in the process's memory, too.
        own = [model["loaded"] / MIB if _has_software_gpu() else 0 for model in (raw, bf16)]
        result = Result(
            "memory-gpu",
            [
                Contender("empty process with a GPU", "empty_gpu", {}, 1, 0),
                maker(raw, raw)("load, raw", "ndcache_load", loaded=True, gpu=True),
                maker(bf16, bf16)("load, bf16", "ndcache_load", loaded=True, gpu=True),
            ],
            targets=[
                _more_memory("raw: MiB more", "load, raw", "empty process with a GPU", 512 + 128 + own[0]),
                _more_memory("bf16: MiB more", "load, bf16", "empty process with a GPU", 512 + 128 + own[1]),
            ],
        )
        return rounds(result, settings, folder)


def growth(settings: Settings) -> Result:
    """Show that the cost grows in proportion to bytes (streamed, bf16) and to tensors (loaded, 1 KiB each)."""
    top = settings.bytes_or(8 << 30, 8 * MIB)
    sizes = [top >> shift for shift in (7, 5, 3, 2, 1, 0)]
    counts = (100, 300) if settings.quick else (100, 1000, 10_000, 100_000)
    with inputs.working_folder(settings) as folder:
        contenders = []
        for size in sizes:
            model = inputs.synthetic(folder / f"bytes{size}", size, bf16=True)
            contenders.append(maker(model, model)(f"{size / MIB:,g} MiB", "ndcache_stream", loaded=True))
        for count in counts:
            model = inputs.synthetic(folder / f"tensors{count}", count * 1024, tensor_bytes=1024)
            contenders.append(maker(model, model)(f"{count:,} tensors", "ndcache_load", loaded=True))
        result = Result("growth", contenders)
        return rounds(result, settings, folder, warm=inputs.files(folder))


def imports(settings: Settings) -> Result:
    """Time ``import ndcache``, and the imports of its first use, beside those of requests and NumPy, which it needs."""
    with inputs.working_folder(settings) as folder:
        result = Result(
            "import",
            [
                Contender("import ndcache", "import_ndcache", {}, 1, 0),
                Contender("from ndcache import load", "import_ndcache_load", {}, 1, 0),
                Contender("import requests, numpy", "import_requests_numpy", {}, 1, 0),
            ],
            targets=[Target("ndcache / both", "import ndcache", "import requests, numpy", "<=", 1.4)],
        )
        return rounds(result, settings, folder)


#: Each suite has one or more parts, which have results of their own.
SUITES: dict[str, tuple[Callable[[Settings], Result], ...]] = {
    "cold": (cold,),
    "minilm": (minilm,),
    "tls": (tls,),
    "rate": (rate,),
    "small": (small,),
    "cold-many-cores": (many_cores.plain, many_cores.tls),
    "processes": (many_cores.processes, many_cores.together),
    "cluster": (cluster,),
    "safetensors": (published.cold, published.warm),
    "warm-cpu": (warm_cpu,),
    "large-file": (large_file,),
    "gpu": (gpu_suites.raw,),
    "gpu-bf16": (gpu_suites.bf16,),
    "gpu-sizes": gpu_suites.sizes,
    "gpu-large-file": (gpu_suites.large_file,),
    "two-gpus": (gpu_suites.two_gpus,),
    "torch-cpu": (gpu_suites.torch_cpu,),
    "many": (many,),
    "memory": (memory,),
    "memory-gpu": (memory_gpu,),
    "growth": (growth,),
    "import": (imports,),
}
#: Suites that cannot run without nginx.
SERVED = frozenset(
    {"cold", "minilm", "tls", "rate", "small", "cold-many-cores", "processes", "cluster", "safetensors", "memory"}
)


def _has_software_gpu() -> bool:
    try:
        return all(map(is_software, list_adapters()))
    except NdcacheError:
        return False


def _more_memory(label: str, above: str, below: str, mebibytes: float) -> Target:
    """Bound the memory that one contender takes more than another, in MiB."""
    return Target(label, above, below, "<=", mebibytes, "peak", 1 / MIB, difference=True)
