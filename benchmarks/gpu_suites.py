"""Suites of loads from the page cache onto a GPU, through wgpu and through CUDA, with torch.

Each contender loads several times in one process. Its seconds are those of the first load; the median of the later ones
is the figure ``later``. Targets whose names begin with the name of a contender bound its gigabytes of files a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from . import choices, inputs
from .harness import Contender, Result, Settings, Target, maker, rounds

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_LOADS = 5
_FIRST, _LATER = "gb_per_second", "later_gb_per_second"

#: Bytes of a tensor, and of all of them.
_SIZES = ((4 * KIB, 80 * MIB), (64 * KIB, GIB), (512 * KIB, 4 * GIB), (8 * MIB, 4 * GIB), (GIB, 4 * GIB))


def raw(settings: Settings) -> Result:
    """Load 4 GiB in 128 shards, of tensors of 8 MiB that are stored as they are, beside the fastest peers."""
    with inputs.working_folder(settings, memory=True) as folder:
        make = _maker(settings, inputs.synthetic(folder / "raw", settings.bytes_or(4 * GIB), safetensors=True))
        wgpu, cuda = "ndcache wgpu", "ndcache CUDA"
        result = Result(
            "gpu",
            [
                make(wgpu, "ndcache_load", gpu=True),
                make(cuda, "ndcache_torch", device="cuda", settings=choices.NDCACHE_CUDA),
                *choices.onto_cuda(make),
                make("bare loop (limit)", "bare_loop", settings=choices.BARE_LOOP),
                make("pinned copy (limit)", "pinned_copy"),
                make("page cache (limit)", "page_cache_reads", settings=choices.PAGE_CACHE),
            ],
            targets=[
                *_speeds(wgpu, 23, 26),
                _ratio("fastsafetensors", wgpu, 1.05),
                *_speeds(cuda, 38, 44),
                _ratio("InstantTensor", cuda, 1.25),
                _ratio("InstantTensor", cuda, 1.25, "later"),
                _ratio("pinned copy (limit)", cuda, 0.8, "later"),
                _ratio("bare loop (limit)", cuda, 0, "later"),
                # Figures without a bound.
                _ratio("InstantTensor", wgpu, 0),
                _ratio("safetensors prefetch", cuda, 0),
                _ratio("safetensors prefetch", cuda, 0, "later"),
            ],
        )
        return rounds(result, settings, folder, warm=inputs.files(folder))


def bf16(settings: Settings) -> Result:
    """Load 4 GiB of bfloat16 as float32. Peers load it as it is, and torch expands each tensor."""
    with inputs.working_folder(settings, memory=True) as folder:
        size = settings.bytes_or(4 * GIB)
        make = _maker(settings, inputs.synthetic(folder / "bf16", size, bf16=True, safetensors=True))
        wgpu, cuda = "ndcache wgpu, bf16", "ndcache CUDA, bf16"
        result = Result(
            "gpu-bf16",
            [
                make(wgpu, "ndcache_load", gpu=True),
                make(cuda, "ndcache_torch", device="cuda", settings=choices.NDCACHE_CUDA),
                *choices.onto_cuda(make, expand=True),
                make("one at a time, bf16", "one_at_a_time", gpu=True, loads=1),
            ],
            targets=[
                *_speeds(wgpu, 16, 19),
                *_speeds(cuda, 30, 36),
                _ratio("one at a time, bf16", wgpu, 0),
                _ratio("InstantTensor", cuda, 0),
            ],
        )
        return rounds(result, settings, folder, warm=inputs.files(folder))


def _of_size(tensor_bytes: int, nbytes: int) -> Callable[[Settings], Result]:
    """Return a suite that loads tensors of one size."""

    def of_size(settings: Settings) -> Result:
        with inputs.working_folder(settings, memory=True) as folder:
            size = min(nbytes, settings.bytes_or(nbytes))
            shard_bytes = max(inputs.SHARD_BYTES, tensor_bytes)
            model = inputs.synthetic(
                folder / "model",
                size,
                tensor_bytes=tensor_bytes,
                shard_bytes=shard_bytes,
                least_shards=max(1, size // shard_bytes),
                safetensors=True,
            )
            make = _maker(settings, model)
            result = Result(
                f"gpu-sizes, {model['tensors']:,} tensors of {_text(min(tensor_bytes, size))}",
                [
                    make("ndcache wgpu", "ndcache_load", gpu=True),
                    make("ndcache CUDA", "ndcache_torch", device="cuda"),
                    # Their own default settings, as there is no time to choose for each size.
                    make("InstantTensor", "instanttensor", package="instanttensor"),
                    make("safetensors prefetch", "safetensors_prefetch", package="safetensors", threads=16),
                ],
                targets=[
                    _ratio("InstantTensor", "ndcache CUDA", 0),
                    _ratio("InstantTensor", "ndcache CUDA", 0, "later"),
                    *(
                        Target(f"{label}, later: µs a tensor", label, None, ">=", 0, "later", 1e6 / model["tensors"])
                        for label in ("ndcache wgpu", "ndcache CUDA")
                    ),
                ],
            )
            return rounds(result, settings, folder, warm=inputs.files(folder))

    return of_size


#: A suite for each size of tensors, one after the other, so that there need not be room for all models.
sizes = tuple(_of_size(tensor_bytes, nbytes) for tensor_bytes, nbytes in _SIZES)


def large_file(settings: Settings) -> Result:
    """Load the same tensors from one file and from 128."""
    with inputs.working_folder(settings, memory=True) as folder:
        size = settings.bytes_or(4 * GIB)
        shards = inputs.synthetic(folder / "shards", size)
        file = inputs.synthetic(folder / "file", size, shard_bytes=size, least_shards=1)
        contenders, targets = [], []
        for name, given in (("wgpu", {"gpu": True}), ("CUDA", {"device": "cuda"})):
            peer = "ndcache_load" if name == "wgpu" else "ndcache_torch"
            many, one = f"{name}, {len(shards['shards'])} shards", f"{name}, one file"
            contenders += [_maker(settings, shards)(many, peer, **given), _maker(settings, file)(one, peer, **given)]
            targets += [_ratio(many, one, 0.9), _ratio(many, one, 0.9, "later")]
        result = Result("gpu-large-file", contenders, targets=targets)
        return rounds(result, settings, folder, warm=inputs.files(folder))


def two_gpus(settings: Settings) -> Result:
    """Load a model onto one GPU, and onto two at once, in two threads of one process."""
    with inputs.working_folder(settings, memory=True) as folder:
        model = inputs.synthetic(folder / "raw", settings.bytes_or(4 * GIB))
        twice = {**model, "stored": 2 * model["stored"], "loaded": 2 * model["loaded"]}
        contenders, targets = [], []
        for name, bound in (("wgpu", 1.6), ("CUDA", 1.8)):
            one, two = f"{name}, one GPU", f"{name}, two GPUs"
            contenders += [
                _maker(settings, model)(one, "ndcache_gpus", device=name.lower(), count=1),
                _maker(settings, twice)(two, "ndcache_gpus", device=name.lower(), count=2),
            ]
            targets += [
                Target(f"{two} / one: first", two, one, ">=", bound, _FIRST),
                Target(f"{two} / one: later", two, one, ">=", bound, _LATER),
            ]
        result = Result("two-gpus", contenders, targets=targets)
        return rounds(result, settings, folder, warm=inputs.files(folder))


def torch_cpu(settings: Settings) -> Result:
    """Load 20,000 tensors of 4 KiB into tensors of torch on the CPU, and into NumPy arrays."""
    size = (200 if settings.quick else 20_000) * 4 * KIB
    with inputs.working_folder(settings, memory=True) as folder:
        contenders, targets = [], []
        for kind in ("raw", "bf16"):
            model = inputs.synthetic(folder / kind, size, tensor_bytes=4 * KIB, bf16=kind == "bf16")
            make = _maker(settings, model)
            torch, numpy = f"torch, {kind}", f"NumPy, {kind}"
            # Both import torch, as Python's garbage collector takes longer where more modules are imported.
            contenders += [make(numpy, "ndcache_load", beside="torch"), make(torch, "ndcache_torch", device="cpu")]
            for word, figure in (("first", "seconds"), ("later", "later")):
                label, scale = f"{kind}, {word}: µs a tensor more", 1e6 / model["tensors"]
                targets.append(Target(label, torch, numpy, "<=", 10, figure, scale, difference=True))
        result = Result("torch-cpu", contenders, targets=targets)
        return rounds(result, settings, folder, warm=inputs.files(folder))


def _maker(settings: Settings, model: dict[str, Any]) -> Callable[..., Contender]:
    """Return a function that makes contenders that load a model several times each.

    Most of them need the GPU's memory, so none of the machine's is touched before, which saves time.
    """
    make = maker({**model, "memory": 0, "loads": 2 if settings.quick else _LOADS, "quick": settings.quick}, model)

    def make_loaded(label: str, peer: str, **more: Any) -> Contender:
        return make(label, peer, loaded=True, **more)

    return make_loaded


def _speeds(label: str, first: float, later: float) -> list[Target]:
    """Bound the speeds of a contender's first and later loads, in GB/s of file bytes."""
    return [
        Target(f"{label}, first: GB/s", label, None, ">=", first, _FIRST),
        Target(f"{label}, later: GB/s", label, None, ">=", later, _LATER),
    ]


def _ratio(above: str, below: str, bound: float, when: Literal["first", "later"] = "first") -> Target:
    """Bound how many times as long as another contender one takes; with 0, only show it."""
    figure = "seconds" if when == "first" else "later"
    return Target(f"{when}: {above} / {below}", above, below, ">=", bound, figure)


def _text(nbytes: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes} bytes"
