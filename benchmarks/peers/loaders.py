"""Loaders, from files or a server into memory or onto a GPU."""

from __future__ import annotations

import json

from .machine import need, open_gpu
from .timing import alive, timed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .timing import Given, Measured

#: STORAGE | COPY_SRC | COPY_DST, as ndcache's tensors have.
_USAGE = 0x8C


def one_at_a_time(given: Given) -> Measured:
    """Load shards in turn (requests or a file), decode with NumPy, write each buffer and wait for it."""
    import numpy as np
    import requests

    device = open_gpu() if given.get("gpu") else None
    manifest = _manifest(given)

    def read(name: str) -> bytes:
        if given.get("url"):
            return requests.get(given["url"] + name, timeout=60).content
        with open(f"{given['directory']}/{name}", "rb") as file:
            return file.read()

    def decode(data: bytes, record: dict[str, Any]) -> Any:
        raw = data[record["byteOffset"] : record["byteOffset"] + record["nbytes"]]
        if record["format"] == "f32-to-bf16" and record["dtype"] == "float32":
            return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        return np.frombuffer(raw, np.uint8)

    def work() -> int:
        for entry in manifest["records"]:
            data = read(entry["dataPath"])
            for record in entry["records"]:
                array = decode(data, record)
                if device is None:
                    alive.append(array)
                    continue
                buffer = device.create_buffer(size=array.nbytes, usage=_USAGE)
                device.queue.write_buffer(buffer, 0, array)
                device.queue.read_buffer(buffer, 0, 4)
                alive.append(buffer)
        return sum(item.nbytes if device is None else item.size for item in alive)

    return timed(work)


def bare_loop(given: Given) -> Measured:
    """Make and write a buffer for each record of files in memory; submit and wait once at the end."""
    import numpy as np

    device = open_gpu()
    manifest = _manifest(given)

    def work() -> int:
        for entry in manifest["records"]:
            data = np.fromfile(f"{given['directory']}/{entry['dataPath']}", np.uint8)
            for record in entry["records"]:
                buffer = device.create_buffer(size=record["nbytes"], usage=_USAGE)
                device.queue.write_buffer(buffer, 0, data, record["byteOffset"], record["nbytes"])
                alive.append(buffer)
        device.queue.submit([])
        device.queue.read_buffer(alive[-1], 0, 4)
        return sum(buffer.size for buffer in alive)

    return timed(work)


def tvm_python(given: Given) -> Measured:
    """Call ``tvm.contrib.tvmjs.load_tensor_cache``."""
    tvm, tvmjs = need("tvm"), need("tvm.contrib.tvmjs")

    def work() -> int:
        alive.append(tvmjs.load_tensor_cache(given["directory"], tvm.cpu())[0])
        return 0

    seconds, _ = timed(work)
    return seconds, sum(tensor.numpy().nbytes for tensor in alive[0].values())


def tvm_cpp(given: Given) -> Measured:
    """Call ``vm.builtin.tensor_cache.load``, and ask for the tensors' bytes afterwards, as it does not return them."""
    tvm = need("tvm")
    load = tvm.get_global_func("vm.builtin.tensor_cache.load")
    get = tvm.get_global_func("vm.builtin.tensor_cache.get")

    def work() -> int:
        load(given["directory"], tvm.cpu().dlpack_device_type(), 0)
        return 0

    seconds, nbytes = timed(work)
    for index in range(given["tensors"]):
        tensor = get(f"layers.{index}.weight")
        nbytes += int(tensor.shape[0]) * (4 if str(tensor.dtype) == "float32" else 2)
    return seconds, nbytes


def safetensors_numpy(given: Given) -> Measured:
    """Call ``safetensors.numpy.load_file``; bfloat16 stays as it is stored."""
    need("ml_dtypes")  # teaches NumPy bfloat16
    module = need("safetensors.numpy")

    def work() -> int:
        alive.append(module.load_file(f"{given['directory']}/model.safetensors"))
        return sum(array.nbytes for array in alive[0].values())

    return timed(work)


def _manifest(given: Given) -> dict[str, Any]:
    with open(f"{given['directory']}/tensor-cache.json") as file:
        return dict(json.load(file))
