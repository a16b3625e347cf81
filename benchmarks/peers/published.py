"""Load a model that is published in safetensors files, from its server."""

from __future__ import annotations

from .machine import need
from .timing import alive, free, timed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .timing import Given, Measured


def published_ndcache(given: Given) -> Measured:
    """Load into arrays: views of the mapped files, or copies."""
    load = need("ndcache").load

    def work() -> int:
        weights = load(given["url"], cache_dir=given["out"], copy=given.get("copy", False))
        alive.append(weights)
        return sum(tensor.nbytes for tensor in weights.values())

    return _timed(given, work)


def published_hub(given: Given) -> Measured:
    """Call `snapshot_download` of huggingface_hub, in several threads, and `safetensors.numpy.load_file`."""
    import os

    os.environ["HF_ENDPOINT"] = given["url"].rstrip("/")
    os.environ["HF_HUB_DISABLE_XET"] = "1"
    hub, safetensors = need("huggingface_hub"), need("safetensors.numpy")
    need("huggingface_hub.utils").disable_progress_bars()

    def work() -> int:
        folder = hub.snapshot_download("bench/model", cache_dir=given["out"], max_workers=given["threads"])
        arrays: dict[str, object] = {}
        for name in given["shards"]:
            arrays.update(safetensors.load_file(f"{folder}/{name}"))
        alive.append(arrays)
        return sum(array.nbytes for array in arrays.values())  # type: ignore[attr-defined]

    return _timed(given, work)


def _timed(given: Given, work: Callable[[], int]) -> Measured:
    """Time one load, after another one that fills the cache if it is to be warm."""
    if given["is_warm"]:
        work()
        free()
    return timed(work)
