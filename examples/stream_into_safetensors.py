"""Convert a model to one safetensors file, with one tensor in memory at a time.

Usage::

    python stream_into_safetensors.py https://host/model/ model.safetensors
    python stream_into_safetensors.py            # a small model and a temporary file
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

import numpy as np

import ndcache

NAMES = {
    **{"bool": "BOOL", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}


def convert(source: str, path: str) -> None:
    header, end = {}, 0
    for record in ndcache.read_manifest(source).records:
        nbytes = 2 * record.nbytes if record.is_bf16_encoded else record.nbytes
        start, end = end, end + nbytes
        header[record.name] = {"dtype": NAMES[record.dtype], "shape": record.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        # Tensors come in manifest order, each as soon as its shard is there.
        for _name, tensor in ndcache.stream(source, progress=True):
            file.write(tensor.tobytes())


if __name__ == "__main__":
    if len(sys.argv) == 3:
        convert(sys.argv[1], sys.argv[2])
    else:
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "model.safetensors")
            params = {
                "a": np.arange(12, dtype=np.float32).reshape(3, 4),
                "b": np.arange(5),
                "c": np.ones(2, np.float16),
            }
            ndcache.dump(params, directory)
            convert(directory, path)

            from safetensors.numpy import load_file

            for name, array in load_file(path).items():
                np.testing.assert_array_equal(array, params[name])
                print(name, array.dtype, array.shape)
