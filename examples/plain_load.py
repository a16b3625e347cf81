"""Load a model and look at its tensors.

Usage::

    python plain_load.py https://host/model/     # or hf://owner/name, or a directory
    python plain_load.py                         # a small one, written to a temporary directory first
"""

from __future__ import annotations

import sys
import tempfile

import numpy as np

import ndcache


def write_small_model(directory: str) -> str:
    rng = np.random.default_rng(0)
    params = {
        "embedding": rng.standard_normal((1000, 64)).astype(np.float32),
        "layers.0.weight": rng.standard_normal((64, 64)).astype(np.float32),
        "layers.0.bias": np.zeros(64, np.float32),
    }
    ndcache.dump(params, directory, metadata={"ParamSize": len(params)})
    return directory


def show(source: str) -> None:
    with ndcache.load(source, progress=True) as weights:
        print(weights, dict(weights.metadata))
        for name, array in weights.items():
            print(f"{name:40} {array.dtype!s:10} {array.shape}")
        print(f"{weights.stats.gb_per_second:.2f} GB/s")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        show(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as directory:
            show(write_small_model(directory))
